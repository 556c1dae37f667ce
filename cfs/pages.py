"""File data that was written but is not yet on the disk (write-behind).

Blocks are allocated when write() is called, so a page knows where it goes, and flushing needs no
lock and no map. A page lives in `InodeState.pages`, then in `InodeState.flushing` while its write
is on the way; it is read from there until that write has completed.

Data that the device refuses is lost, as on a local file system, page by page: those that it takes
are written. The loss is counted in `InodeState.errors`, which every open handle reports once. The
block of a lost page that never held anything of this file (`InodeState.fresh`) is `spoiled`: it
must become unwritten before anybody reads in it what another file has left there.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Awaitable, Callable, Iterable

from cfs.attributes import BLOCK_BYTES, MountOptions
from cfs.cache import InodeState, Page
from cfs.journal import FlushCounter, are_few, joined
from cfs.seams import Event, Runtime
from cluster.device import Buffer, PromptDevice, Written
from cluster.errors import DeviceError

REFUSED_IN_A_ROW_MAX = 64
"""Pages refused one after another: then the device takes nothing."""


def _lies_in(pages: Iterable[int], first: int, end: int) -> bool:
    return any(first <= index < end for index in pages)


class DirtyPages:
    """All unwritten data of a mount; implements `cfs.journal.Ordered`."""

    def __init__(self, counter: FlushCounter, runtime: Runtime, options: MountOptions) -> None:
        self._counter = counter
        self._runtime = runtime
        self._options = options
        self.dirty_pages = 0
        self.dirty: dict[InodeState, None] = {}
        self._flushing: dict[InodeState, None] = {}
        self._ordered: dict[InodeState, None] = {}
        self._sealing: dict[InodeState, None] = {}
        self._writing_back = False
        self._room: deque[tuple[int, Event]] = deque()
        self._promised = 0
        self.on_spoiled: Callable[[InodeState], None] = lambda state: None
        """`InodeState.spoiled` is not empty any more."""
        self.isolate: Callable[[InodeState], Awaitable[None]]
        """Makes the blocks in `spoiled` unwritten; the lock is held in EX, or being demoted."""
        self.on_lost: Callable[[InodeState, int], None] = lambda state, count: None
        """So many pages of an inode were lost; for the log."""

    @property
    def dirty_bytes(self) -> int:
        return self.dirty_pages * BLOCK_BYTES

    def put(
        self,
        state: InodeState,
        pages: dict[int, Page],
        *,
        ordered: bool,
        fresh: Iterable[tuple[int, int]] = (),
    ) -> None:
        """Take pages over. `ordered`: the running transaction may be written only after them.
        `fresh`: (first, count) of blocks that this transaction is the first to call written."""
        before = len(state.pages)
        state.pages.update(pages)
        self.dirty_pages += len(state.pages) - before
        self.dirty[state] = None
        for first, count in fresh:
            state.fresh.update(range(first, first + count))
        if state.clean:
            for index in pages:
                state.clean.pop(index, None)
        if state.spoiled:
            again = state.spoiled.intersection(pages)
            state.spoiled -= again
            state.fresh |= again
        if ordered:
            self._ordered[state] = None
        if self.dirty_bytes > self._options.dirty_bytes_start:
            self._start_write_back()

    def discard(self, state: InodeState, first: int, end: int) -> None:
        """Forget pages [first, end): their blocks are taken away."""
        gone = [index for index in state.pages if first <= index < end]
        for index in gone:
            del state.pages[index]
        self.dirty_pages -= len(gone)
        for index in [index for index in state.clean if first <= index < end]:
            del state.clean[index]
        for marks in (state.fresh, state.spoiled):
            marks.difference_update([index for index in marks if first <= index < end])
        if not state.pages:
            self.dirty.pop(state, None)
        self._wake()

    def overlaps(self, state: InodeState, first: int, end: int) -> bool:
        """Whether blocks [first, end) are waiting to be written or on their way."""
        return _lies_in(state.pages, first, end) or self._on_the_way(state, first, end)

    @staticmethod
    def written_directly(state: InodeState, first: int, end: int) -> bool:
        """Whether a write past the buffer to blocks in [first, end) is under way."""
        return any(first < last and begin < end for begin, last in state.direct_writes)

    def _on_the_way(self, state: InodeState, first: int, end: int) -> bool:
        return _lies_in(state.flushing, first, end) or self.written_directly(state, first, end)

    def must_wait(self, state: InodeState, first: int, end: int) -> bool:
        """Whether blocks [first, end) may not be taken away yet: a write to them is on the way, or
        the transaction that is being sealed gives them to the file."""
        sealing = state in self._sealing and _lies_in(state.pages, first, end)
        return sealing or self._on_the_way(state, first, end)

    async def settle(self, state: InodeState, first: int, end: int) -> None:
        """Wait until nothing of blocks [first, end) is on the way to the disk."""
        while True:
            if state.flush_done is not None and _lies_in(state.flushing, first, end):
                await state.flush_done.wait()
            elif _lies_in(state.pages, first, end):
                await self.flush(state)
            elif self.written_directly(state, first, end):
                await self._direct_end(state)
            else:
                return

    # -- past the buffer -------------------------------------------------------------------------

    def begin_direct(self, state: InodeState, span: tuple[int, int]) -> None:
        """Blocks [first, end) are going to be written past the buffer; nothing `overlaps` them."""
        state.direct_writes.append(span)

    def end_direct(self, state: InodeState, span: tuple[int, int]) -> None:
        """That very write is over, or was never begun."""
        # Also after an error: what was written must be flushed before the lock leaves.
        state.written_at = self._counter.wrote()
        state.direct_writes = [one for one in state.direct_writes if one is not span]
        if state.direct_done is not None:
            state.direct_done.set()
            state.direct_done = None

    async def write_direct(
        self, state: InodeState, span: tuple[int, int], writes: list[tuple[int, Buffer]]
    ) -> None:
        """Write whole blocks that the file has, past the buffer, and end that."""
        try:
            await self._counter.device.write_many(
                [(block * BLOCK_BYTES, data) for block, data in writes]
            )
        finally:
            self.end_direct(state, span)

    def start_direct(
        self,
        device: PromptDevice,
        state: InodeState,
        span: tuple[int, int],
        writes: list[tuple[int, Buffer]],
        done: Written,
    ) -> None:
        """As `write_direct`, without a task. `device`: ours."""

        def ended(error: Exception | None) -> None:
            self.end_direct(state, span)
            done(error)

        device.start_write([(block * BLOCK_BYTES, data) for block, data in writes], ended)

    async def _direct_end(self, state: InodeState) -> None:
        """Wait for the end of any of them."""
        if state.direct_done is None:
            state.direct_done = self._runtime.event()
        await state.direct_done.wait()

    # -- writing behind --------------------------------------------------------------------------

    async def room(self, size: int) -> None:
        """Wait while there is too much unwritten data; first come, first served. The caller may
        then bring `size` bytes, and calls `settled` when it has, or will not."""
        if not self.has_room(size):
            self._start_write_back()
            event = self._runtime.event()
            entry = (size, event)
            self._room.append(entry)
            try:
                await event.wait()
            except BaseException:
                if event.is_set():
                    self.settled(size)
                else:
                    self._room.remove(entry)
                    self._wake()
                raise
        else:
            self._promised += size

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes may come now, before anybody who waits."""
        return not self._room and self._fits(size)

    def settled(self, size: int) -> None:
        """What `room` promised is in the buffer, or is not needed."""
        self._promised -= size
        if self._room:
            self._wake()

    def _fits(self, size: int) -> bool:
        taken = self.dirty_bytes + self._promised
        return not taken or taken + size <= self._options.dirty_bytes_max

    def _start_write_back(self) -> None:
        if not self._writing_back:
            self._writing_back = True
            self._runtime.spawn(self._write_back, "write-behind")

    async def _write_back(self) -> None:
        """Write until half of what starts this is left."""
        try:
            while self.dirty and (
                self._room or self.dirty_bytes > self._options.dirty_bytes_start // 2
            ):
                await self.flush(next(iter(self.dirty)))
        finally:
            self._writing_back = False

    def _wake(self) -> None:
        while self._room and self._fits(self._room[0][0]):
            size, event = self._room.popleft()
            self._promised += size
            event.set()
        if self._room:
            self._start_write_back()

    async def flush(self, state: InodeState, *, durable: bool = False) -> None:
        """Write the inode's pages as they are now. They have been written when this returns, not
        flushed to stable storage (`InodeState.written_at` numbers the last write), or are lost.
        `durable`: the caller is going to wait for a flush, so a few writes become durable ones."""
        while state.flush_done is not None:
            await state.flush_done.wait()
        if not state.pages:
            return
        event = state.flush_done = self._runtime.event()
        batch, state.pages = state.pages, {}
        state.flushing = batch
        self.dirty.pop(state, None)
        self._flushing[state] = None
        lost: set[int] | None = None
        try:
            while any(not batch.keys().isdisjoint(range(*one)) for one in state.direct_writes):
                await self._direct_end(state)
            lost, done = await self._write_out(batch, durable=durable)
            if not done:
                state.written_at = self._counter.wrote()
        finally:
            self.dirty_pages -= len(batch)
            state.flushing = {}
            if lost is None:
                self._put_back(state, batch)
            elif state.fresh or lost:
                self._account(state, batch, lost)
            state.flush_done = None
            del self._flushing[state]
            event.set()
            self._wake()

    async def _write_out(self, batch: dict[int, Page], *, durable: bool) -> tuple[set[int], bool]:
        """Write a batch; the pages that the device refuses, and whether the others are durable."""
        device = self._counter.device
        runs = joined([(block, data) for data, block in batch.values()])
        durable = durable and are_few(runs)
        try:
            await device.write_many(runs, fua=durable)
            return set(), durable
        except DeviceError:
            pass
        lost: set[int] = set()
        row = 0
        for index, (data, block) in batch.items():
            if row < REFUSED_IN_A_ROW_MAX:
                try:
                    await device.write(block * BLOCK_BYTES, data)
                    row = 0
                    continue
                except DeviceError:
                    row += 1
            lost.add(index)
        return lost, False

    def _account(self, state: InodeState, batch: dict[int, Page], lost: set[int]) -> None:
        """After a flush: what is not fresh any more, and what was lost."""
        if lost:
            state.errors.note(errno.EIO)
            self.on_lost(state, len(lost))
            spoiled = {index for index in state.fresh & lost if index not in state.pages}
            if spoiled:
                state.spoiled |= spoiled
                self.on_spoiled(state)
        if len(lost) != len(batch):
            state.fresh.difference_update(batch.keys() - lost)
        state.fresh -= state.spoiled

    def _put_back(self, state: InodeState, batch: dict[int, Page]) -> None:
        """The writing task was cancelled: newer pages win over those that were on the way."""
        merged = {**batch, **state.pages}
        self.dirty_pages += len(merged) - len(state.pages)
        state.pages = merged
        self.dirty[state] = None

    async def flush_all(self) -> None:
        """Everything that is in the buffer now, or on its way, has been written."""
        for state in [*self._flushing, *self.dirty]:
            await self.flush(state)

    # -- data before metadata --------------------------------------------------------------------

    def seal(self) -> Callable[[], Awaitable[bool]] | None:
        if not self._ordered:
            return None
        self._sealing, self._ordered = self._ordered, {}
        return self._write_sealed

    async def _write_sealed(self) -> bool:
        written = False
        alone = len(self._sealing) == 1
        for state in list(self._sealing):
            await self.flush(state, durable=alone)
            written = written or not self._counter.is_flushed(state.written_at)
            self._sealing.pop(state, None)
        return written
