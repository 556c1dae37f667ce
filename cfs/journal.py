"""The journal of one mount: group commit, write-ahead, checkpoints.

The life of a changed block: `running` (changed, in memory only) -> `sealed` (its transaction is
being written) -> `committed` (durable in the log, not yet in its place) -> in place.

Rules:
1. Data that a transaction refers to through new blocks is on the disk, flushed, before the
   transaction is written (`Ordered`).
2. A block is written in place only from an image that is durable in the log.
3. In a checkpoint the maps of groups are written after everything else has been written: who
   sees a block as metadata in a map on the disk finds metadata in it.
4. The log's tail moves on only over transactions whose images are all in place and flushed, and
   the log is reused only behind a tail that is itself durable on the disk.

All disk work is done by one task; who needs something waits for it. So a cancelled caller never
leaves a half-done commit behind.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from cfs import journal_format
from cfs.attributes import BLOCK_BYTES
from cfs.format import block_checksum
from cfs.journal_format import LOG_OFFSET, Item, JournalHeader
from cfs.nodes import GroupNode, Node
from cfs.seams import Event, Runtime
from cluster.device import BlockDevice, Buffer

JOIN_BYTES_MAX = 1 << 20
DURABLE_RUNS_MAX = 2
TAIL_LAG_BLOCKS_MAX = 256
"""Log behind the tail whose images may be in their places already. A hand-over of a lock does not
wait for the tail to move; what a replay would then read once more is bounded by this."""


class Ordered(Protocol):
    """File data that must be written before the transaction that is being sealed."""

    def seal(self) -> Callable[[], Awaitable[bool]] | None:
        """Take what belongs to the running transaction; the result writes it and says whether
        anything was written. None: nothing."""
        ...


class FlushCounter:
    """Knows which writes a flush has covered, so that nobody flushes for nothing."""

    def __init__(self, device: BlockDevice) -> None:
        self.device = device
        self.written = 0
        self.flushed = 0

    def wrote(self) -> int:
        """A write has completed; its number for `is_flushed`."""
        self.written += 1
        return self.written

    def is_flushed(self, number: int) -> bool:
        return number <= self.flushed

    async def write(self, *batches: list[tuple[int, Buffer]]) -> None:
        """Write each batch of (block, bytes) after the one before, durable when this returns, with
        everything else that was written before it."""
        runs = [joined(batch) for batch in batches if batch]
        alone = bool(runs) and self.flushed == self.written
        durable = alone and all(are_few(run) for run in runs)
        for run in runs:
            await self.device.write_many(run, fua=durable)
        if durable:
            return
        if runs:
            self.wrote()
        await self.flush()

    async def flush(self) -> None:
        covered = self.written
        await self.device.flush()
        self.flushed = max(self.flushed, covered)

    async def ensure(self, number: int) -> None:
        if number > self.flushed:
            await self.flush()


def are_few(runs: list[tuple[int, Buffer]]) -> bool:
    """Whether these writes are better sent as durable ones, with one answer to wait for, than
    followed by a flush."""
    return len(runs) <= DURABLE_RUNS_MAX


def joined(writes: list[tuple[int, Buffer]]) -> list[tuple[int, Buffer]]:
    """(block, bytes) in block order, with neighbours joined into one write."""
    result: list[tuple[int, Buffer]] = []
    run: list[Buffer] = []
    start = end = size = 0
    for block, data in sorted(writes, key=lambda write: write[0]):
        if run and block == end and size < JOIN_BYTES_MAX:
            run.append(data)
        else:
            if run:
                result.append((start * BLOCK_BYTES, run[0] if len(run) == 1 else b"".join(run)))
            run = [data]
            start = block
            size = 0
        size += len(data)
        end = block + len(data) // BLOCK_BYTES
    if run:
        result.append((start * BLOCK_BYTES, run[0] if len(run) == 1 else b"".join(run)))
    return result


class Journal:
    """The log of this mount; see the module's text."""

    def __init__(
        self,
        fs: int,
        counter: FlushCounter,
        runtime: Runtime,
        place: tuple[int, int],
        header: JournalHeader,
    ) -> None:
        self._fs = fs
        self._counter = counter
        self._device = counter.device
        self._runtime = runtime
        self.first_block, blocks = place
        self.log_blocks = blocks - LOG_OFFSET
        self._header = header
        self._head = header.tail
        self._durable_tail = header.tail
        self._pending_tail = (header.tail, 0)
        self.running: dict[int, Node] = {}
        self.sealed: dict[int, Node] = {}
        self.committed: dict[int, tuple[Node, bytes]] = {}
        self.sequence = header.sequence
        self.ordered: Ordered | None = None
        self.on_placed: Callable[[GroupNode], None] = lambda node: None
        self.on_error: Callable[[BaseException], None] = lambda error: None
        self.error: BaseException | None = None
        self.running_id = 1
        self.durable_id = 0
        self._commit_wanted = 0
        self._commit_done = 0
        self._checkpoint_wanted = 0
        self._checkpoint_done = 0
        self._move_tail = False
        self._waiters: list[Event] = []
        self._working = False

    # -- what others ask for ---------------------------------------------------------------------

    @property
    def slot(self) -> int:
        return self._header.slot

    @property
    def running_full(self) -> bool:
        """The running transaction is as large as one may become before operations wait."""
        return len(self.running) >= self.log_blocks // 4

    @property
    def is_clean(self) -> bool:
        return not (self.running or self.sealed or self.committed)

    @property
    def is_empty(self) -> bool:
        """Whether a replay would have nothing to do."""
        return self.is_clean and self._header.tail == self._head

    def is_dirty(self, block: int) -> bool:
        """Whether the block waits for its commit or for its place."""
        return block in self.running or block in self.committed or block in self.sealed

    async def commit(self) -> None:
        """Everything that was changed before this call is durable when it returns."""
        self._commit_wanted += 1
        await self._wait(commit=self._commit_wanted, checkpoint=0)

    async def checkpoint(self, *, move_tail: bool = False) -> None:
        """Everything that was changed before this call is in its place, flushed. `move_tail`: and a
        replay will have nothing to do."""
        self._checkpoint_wanted += 1
        self._move_tail = self._move_tail or move_tail
        await self._wait(commit=0, checkpoint=self._checkpoint_wanted)

    async def _wait(self, commit: int, checkpoint: int) -> None:
        while self._commit_done < commit or self._checkpoint_done < checkpoint:
            if self.error is not None:
                raise self.error
            event = self._runtime.event()
            self._waiters.append(event)
            if not self._working:
                self._working = True
                self._runtime.spawn(self._work, "journal")
            await event.wait()
        if self.error is not None:
            raise self.error

    async def _work(self) -> None:
        try:
            while self.error is None:
                commit, checkpoint = self._commit_wanted, self._checkpoint_wanted
                if commit == self._commit_done and checkpoint == self._checkpoint_done:
                    break
                await self._commit()
                self._commit_done = commit
                self._wake()
                if checkpoint != self._checkpoint_done:
                    await self._checkpoint()
                    self._checkpoint_done = checkpoint
                    self._wake()
        except Exception as error:
            self.error = error
            self.on_error(error)
        except BaseException as error:
            self.error = error  # The mount is being ended; nobody may wait for more.
            raise
        finally:
            self._working = False
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for event in waiters:
            event.set()

    # -- commit ----------------------------------------------------------------------------------

    async def _commit(self) -> None:
        """Seal the running transaction and make it durable."""
        write_data = self.ordered.seal() if self.ordered is not None else None
        assert not self.sealed
        self.sealed, self.running = self.running, self.sealed
        sealed_id = self.running_id
        self.running_id += 1
        if write_data is not None and await write_data() and self.sealed:
            await self._flush()
        if not self.sealed:
            await self._counter.ensure(self._counter.written)
            self.durable_id = sealed_id
            return
        nodes = list(self.sealed.values())
        sequence = self.sequence
        images = [node.encode(self._fs, sequence | self.slot << 48) for node in nodes]
        items = [
            Item(node.block, node.generation, node.change, block_checksum(image))
            for node, image in zip(nodes, images, strict=True)
        ]
        parts = journal_format.commit_parts(len(items))
        await self._make_room(parts + len(images))
        places = [self._place(self._head + index) for index in range(parts)]
        commits = journal_format.encode_commit(
            self._fs, self.slot, sequence, self._head, items, places
        )
        writes: list[tuple[int, Buffer]] = list(zip(places, commits, strict=True))
        for index, image in enumerate(images):
            writes.append((self._place(self._head + parts + index), image))
        await self._flush(writes)
        self._head += parts + len(images)
        self.sequence += 1
        self.durable_id = sealed_id
        for node, image in zip(nodes, images, strict=True):
            self.committed[node.block] = (node, image)
        self.sealed.clear()

    def _place(self, position: int) -> int:
        return self.first_block + LOG_OFFSET + position % self.log_blocks

    async def _flush(self, *batches: list[tuple[int, Buffer]]) -> None:
        """Write (`FlushCounter.write`) and flush; a header that was written before counts now."""
        tail, change = self._pending_tail
        await self._counter.write(*batches)
        if change == self._header.change:
            self._durable_tail = max(self._durable_tail, tail)

    async def _make_room(self, blocks: int) -> None:
        assert blocks <= self.log_blocks, "a transaction is larger than its journal"
        if self._head + blocks - self._durable_tail <= self.log_blocks:
            return
        self._move_tail = True
        await self._checkpoint()
        if self._head + blocks - self._durable_tail > self.log_blocks:
            await self._flush()
        assert self._head + blocks - self._durable_tail <= self.log_blocks

    # -- checkpoint ------------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """Write all committed images in place; move the tail up to the head if it is time."""
        move_tail, self._move_tail = self._move_tail, False
        batch = dict(self.committed)
        maps: list[tuple[int, Buffer]] = []
        others: list[tuple[int, Buffer]] = []
        for block, (node, image) in batch.items():
            (maps if isinstance(node, GroupNode) else others).append((block, image))
        if batch:
            await self._flush(others, maps)
        else:
            await self._counter.ensure(self._counter.written)
        for block, entry in batch.items():
            if self.committed.get(block) is entry:
                del self.committed[block]
            if isinstance(entry[0], GroupNode):
                self.on_placed(entry[0])
        lag = self._head - self._header.tail
        if lag and (move_tail or lag > min(TAIL_LAG_BLOCKS_MAX, self.log_blocks // 4)):
            await self._write_header(in_use=True)

    async def _write_header(self, *, in_use: bool) -> None:
        """The tail is the head: everything before it is in its place."""
        old = self._header
        self._header = JournalHeader(
            old.slot, in_use, old.owner, self._head, self.sequence, old.change + 1, old.blocks
        )
        block, data = journal_format.encode_header(self._fs, self._header, self.first_block)
        await self._device.write(block * BLOCK_BYTES, data)
        self._counter.wrote()
        self._pending_tail = (self._head, self._header.change)

    async def close(self) -> None:
        """Commit, write everything in place, mark the journal as free. Nothing else runs."""
        await self.checkpoint()
        if not self.is_clean:
            await self.checkpoint()
        await self._flush()  # the header before the last is overwritten only behind a durable one
        await self._write_header(in_use=False)
        await self._flush()
