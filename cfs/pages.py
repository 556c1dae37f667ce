"""File data that was written but is not yet on the disk (write-behind).

Blocks are allocated when write() is called, so a page knows where it goes, and flushing needs no
lock and no map. A page lives in `InodeState.pages`, then in `InodeState.flushing` while its write
is on the way; it is read from there until that write has completed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cfs.attributes import BLOCK_BYTES, MountOptions
from cfs.cache import InodeState, Page
from cfs.journal import FlushCounter, joined
from cfs.seams import Event, Runtime
from cluster.device import Buffer
from cluster.errors import DeviceError


class DirtyPages:
    """All unwritten data of a mount; implements `cfs.journal.Ordered`."""

    def __init__(self, counter: FlushCounter, runtime: Runtime, options: MountOptions) -> None:
        self._counter = counter
        self._runtime = runtime
        self._options = options
        self.dirty_pages = 0
        self.dirty: dict[InodeState, None] = {}
        self._ordered: dict[InodeState, None] = {}
        self._sealing: dict[InodeState, None] = {}
        self._writing_back = False
        self._room: list[Event] = []

    @property
    def dirty_bytes(self) -> int:
        return self.dirty_pages * BLOCK_BYTES

    def put(self, state: InodeState, pages: dict[int, Page], *, ordered: bool) -> None:
        """Take pages over. `ordered`: some of them are in blocks that the running transaction
        gives to the file."""
        before = len(state.pages)
        state.pages.update(pages)
        self.dirty_pages += len(state.pages) - before
        self.dirty[state] = None
        for index in pages:
            state.clean.pop(index, None)
        if ordered:
            self._ordered[state] = None
        if self.dirty_bytes > self._options.dirty_bytes_start:
            self._start_write_back()

    def discard(self, state: InodeState, first: int) -> None:
        """Forget pages from index `first` on: the file was cut there."""
        gone = [index for index in state.pages if index >= first]
        for index in gone:
            del state.pages[index]
        self.dirty_pages -= len(gone)
        for index in [index for index in state.clean if index >= first]:
            del state.clean[index]
        if not state.pages:
            self.dirty.pop(state, None)

    def must_wait(self, state: InodeState, first: int) -> bool:
        """Whether blocks from page `first` on may not be freed yet: a write to them is on the way,
        or the transaction that is being sealed gives them to the file."""
        if state.direct_writes or any(index >= first for index in state.flushing):
            return True
        return state in self._sealing and any(index >= first for index in state.pages)

    async def settle(self, state: InodeState) -> None:
        """Wait until nothing is on the way to the disk."""
        while True:
            if state.flush_done is not None:
                await state.flush_done.wait()
            elif state.pages:
                await self.flush(state)
            elif state.direct_writes:
                event = state.direct_done = self._runtime.event()
                await event.wait()
            else:
                return

    async def write_direct(self, state: InodeState, writes: list[tuple[int, Buffer]]) -> None:
        """Write whole blocks that the file has, past the buffer."""
        state.direct_writes += 1
        try:
            await self._counter.device.write_many(
                [(block * BLOCK_BYTES, data) for block, data in writes]
            )
            state.written_at = self._counter.wrote()
        finally:
            state.direct_writes -= 1
            if not state.direct_writes and state.direct_done is not None:
                state.direct_done.set()
                state.direct_done = None

    async def room(self) -> None:
        """Wait while there is too much unwritten data."""
        while self.dirty_bytes > self._options.dirty_bytes_max:
            self._start_write_back()
            event = self._runtime.event()
            self._room.append(event)
            await event.wait()

    def _start_write_back(self) -> None:
        if not self._writing_back:
            self._writing_back = True
            self._runtime.spawn(self._write_back, "write-behind")

    async def _write_back(self) -> None:
        """Write until half of what starts this is left."""
        try:
            while self.dirty and self.dirty_bytes > self._options.dirty_bytes_start // 2:
                await self.flush(next(iter(self.dirty)))
        finally:
            self._writing_back = False
            self._wake()

    def _wake(self) -> None:
        waiters, self._room = self._room, []
        for event in waiters:
            event.set()

    async def flush(self, state: InodeState) -> None:
        """Write the inode's pages as they are now. They have been written when this returns, not
        flushed to stable storage (`InodeState.written_at` numbers the last write)."""
        while state.flush_done is not None:
            await state.flush_done.wait()
        if not state.pages:
            return
        event = state.flush_done = self._runtime.event()
        batch, state.pages = state.pages, {}
        state.flushing = batch
        self.dirty.pop(state, None)
        written = False
        try:
            writes: list[tuple[int, Buffer]] = [
                (physical, data) for data, physical in batch.values()
            ]
            await self._counter.device.write_many(joined(writes))
            written = True
            state.written_at = self._counter.wrote()
        except DeviceError:
            # As a local file system does: the data is lost, and fsync says so once per handle.
            state.error_count += 1
            written = True
        finally:
            self.dirty_pages -= len(batch)
            state.flushing = {}
            if not written:
                self._put_back(state, batch)
            state.flush_done = None
            event.set()
            self._wake()

    def _put_back(self, state: InodeState, batch: dict[int, Page]) -> None:
        """The writing task was cancelled: newer pages win over those that were on the way."""
        merged = {**batch, **state.pages}
        self.dirty_pages += len(merged) - len(state.pages)
        state.pages = merged
        self.dirty[state] = None

    async def flush_all(self) -> None:
        for state in list(self.dirty):
            await self.flush(state)

    # -- data before metadata --------------------------------------------------------------------

    def seal(self) -> Callable[[], Awaitable[bool]] | None:
        if not self._ordered:
            return None
        self._sealing, self._ordered = self._ordered, {}
        return self._write_sealed

    async def _write_sealed(self) -> bool:
        written = False
        for state in list(self._sealing):
            await self.flush(state)
            written = written or not self._counter.is_flushed(state.written_at)
            self._sealing.pop(state, None)
        return written
