"""Ranges of files as a whole: allocate, punch a hole, zero, copy, reserve for a mapping.

`allocate` gives unwritten blocks to the holes of a range: no data goes to the disk, and a write
there finds its space. `punch` gives blocks back; `zero` keeps them and makes them unwritten. Both
turn into plain writes of zeroes where an extent has to be split and there is no block for the tree.

A long range is done in several transactions. The file is whole after each: blocks are unwritten
until written, and a range that is being emptied is emptied from its start. What fails for want of
space leaves nothing behind; after a crash in the middle the file may keep blocks that it did not
ask for in the end, never other bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from cfs import extents
from cfs.attributes import BLOCK_BYTES, FILE_BYTES_MAX
from cfs.cache import InodeState
from cfs.core import Core
from cfs.errors import FsError
from cfs.files import CUT_EXTENTS_MAX, Files, PageChanges
from cfs.nodes import CONTENT_BYTES_MAX, InodeNode
from cfs.reading import ZERO_PAGE, FileReader, need_regular
from cfs.transaction import READER, Reader, Tx

ALLOCATE_BLOCKS_MAX = 16384
"""Blocks that one transaction allocates."""
COPY_BYTES_MAX = 32 << 20
"""Data that one call copies: as long as that others wait for the locks."""
COPY_STEP_BYTES = 1 << 20
ZERO_BLOCKS_MAX = 256
"""Blocks that are zeroed by writing, in one step."""

Span = tuple[int, int]
"""First block, count."""
Step = Callable[[Tx, InodeState, int, int], int]
"""One transaction on the blocks [first, last): where to go on, `last` when all is done."""


def whole_blocks(offset: int, end: int) -> tuple[int, int]:
    """The blocks [first, last) that lie in the bytes [offset, end) as a whole; none if not first <
    last."""
    return -(-offset // BLOCK_BYTES), end // BLOCK_BYTES


def ragged_edges(offset: int, end: int) -> list[tuple[int, int, int]]:
    """The parts of blocks at the two ends of the bytes [offset, end): (block, start, end)."""
    first, last = whole_blocks(offset, end)
    if first > last:
        index = offset // BLOCK_BYTES
        return [(index, offset - index * BLOCK_BYTES, end - index * BLOCK_BYTES)]
    edges = []
    if offset < first * BLOCK_BYTES:
        edges.append((first - 1, offset % BLOCK_BYTES, BLOCK_BYTES))
    if end > last * BLOCK_BYTES:
        edges.append((last, 0, end % BLOCK_BYTES))
    return edges


class FileRanges:
    """The methods want the inode's lock held in EX by the caller."""

    def __init__(self, core: Core, reader: FileReader, files: Files) -> None:
        self.core = core
        self.reader = reader
        self.files = files

    async def take_privileges(self, state: InodeState, *, kill: bool) -> None:
        """The content is going to be changed. `kill`: by somebody who may not keep set-user-id and
        set-group-id."""

        def body(tx: Tx) -> None:
            seen = self._regular(tx, state)
            if seen.mode & 0o6000 or seen.xattrs is not None:
                self.files.drop_privileges(tx, state, tx.edit_inode(state), kill=kill)

        await self.core.run(body)

    # -- allocating ------------------------------------------------------------------------------

    async def allocate(
        self,
        state: InodeState,
        offset: int,
        end: int,
        *,
        keep_size: bool,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """Give blocks to all holes in [offset, end); all or nothing. Raises FsError(ENOSPC), and
        EINTR when `stopped` says so."""
        filled: list[Span] = []
        try:
            await self._allocate(
                state, (offset, end), keep_size=keep_size, filled=filled, stopped=stopped
            )
        except FsError:
            for first, count in filled:
                await self._steps(self._give_back_body, state, first, first + count)
            raise
        await self.core.run(lambda tx: self._finish(tx, state, end, keep_size=keep_size))

    async def _allocate(
        self,
        state: InodeState,
        span_bytes: tuple[int, int],
        *,
        keep_size: bool,
        filled: list[Span],
        stopped: Callable[[], bool],
    ) -> None:
        core = self.core
        offset, end = span_bytes
        at, last = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        if end > FILE_BYTES_MAX:
            raise FsError(errno.EFBIG)
        mapped = await core.see(lambda: self._regular(READER, state).blocks)
        await core.demand.need_free(last - at - mapped)
        while at < last:
            if stopped():
                raise FsError(errno.EINTR, "the caller was killed")
            start = at
            at, new = await core.run(
                lambda tx: self._allocate_body(tx, state, (start, last), end, keep_size=keep_size)  # noqa: B023
            )
            for first, count in new:
                if filled and sum(filled[-1]) == first:
                    filled[-1] = (filled[-1][0], filled[-1][1] + count)
                else:
                    filled.append((first, count))

    @staticmethod
    def _regular(reader: Reader, state: InodeState) -> InodeNode:
        inode = reader.inode(state)
        need_regular(inode)
        return inode

    def _allocate_body(
        self, tx: Tx, state: InodeState, blocks: tuple[int, int], end_bytes: int, *, keep_size: bool
    ) -> tuple[int, list[Span]]:
        """One step in the blocks [first, last): (the block to go on with, what is new)."""
        first, last = blocks
        seen = self._regular(tx, state)
        size = seen.size if keep_size else max(seen.size, end_bytes)
        if seen.root is None and max(end_bytes, size) <= CONTENT_BYTES_MAX:
            return last, []  # the inode itself has the room
        self.files.need_whole_cut(state, seen)
        inode = tx.edit_inode(state)
        changes = PageChanges()
        if inode.root is None:
            self.files.spill(tx, state, inode, changes)
        new: list[Span] = []
        room = ALLOCATE_BLOCKS_MAX
        at = first
        _, until = self._some_extents(tx, state, inode, first, last)
        for logical, block, count, _ in extents.pieces(tx, state, inode, first, until - first):
            if not block:
                count = min(count, room)
                self.files.fill(tx, state, inode, logical, count, unwritten=True)
                new.append((logical, count))
                room -= count
            at = logical + count
            if not room:
                break
        self.files.put(tx, state, changes)
        self.files.mark_changed(tx, state)
        return at, new

    def _finish(self, tx: Tx, state: InodeState, end: int, *, keep_size: bool) -> None:
        """The last transaction: size and times."""
        inode = tx.edit_inode(state)
        if not keep_size and end > inode.size:
            self.files.extend(tx, state, inode, end)
        self.files.touch(inode)
        self.files.mark_changed(tx, state)

    async def reserve(self, state: InodeState, offset: int, size: int) -> None:
        """Give blocks to the holes of a range inside the file, so that a mapping of it can be
        stored to. Raises FsError(ENOSPC)."""
        core = self.core
        at, last, end = await core.see(lambda: self._unreserved(state, offset, size))
        while at < last:
            span = (at, last)
            at, _ = await core.run(
                lambda tx: self._allocate_body(tx, state, span, end, keep_size=True)  # noqa: B023
            )

    def _unreserved(self, state: InodeState, offset: int, size: int) -> tuple[int, int, int]:
        """The blocks [first, last) in which there are holes, and the end of the range; first is
        last when there are none."""
        inode = self._regular(READER, state)
        end = min(offset + size, inode.size)
        first, last = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        if end <= offset or (inode.root is None and inode.size <= CONTENT_BYTES_MAX):
            return last, last, end
        found = extents.pieces(READER, state, inode, first, last - first)
        if all(block for _, block, _, _ in found):
            return last, last, end
        return first, last, end

    async def has_holes(self, state: InodeState, offset: int, end: int) -> bool:
        """Whether `reserve` would have something to do."""
        first, last, _ = await self.core.see(lambda: self._unreserved(state, offset, end - offset))
        return first < last

    # -- emptying --------------------------------------------------------------------------------

    async def punch(self, state: InodeState, offset: int, end: int) -> None:
        """[offset, end) reads as zeroes, and its whole blocks are free. The size stays."""
        size = await self.core.see(lambda: self._regular(READER, state).size)
        if end >= size:
            end = -(-end // BLOCK_BYTES) * BLOCK_BYTES  # nobody sees the rest of the last block
        await self.core.run(lambda tx: self._edges_body(tx, state, offset, end))
        await self._empty(self._free_body, state, *whole_blocks(offset, end))
        await self.core.run(lambda tx: self._finish(tx, state, 0, keep_size=True))

    async def zero(
        self,
        state: InodeState,
        offset: int,
        end: int,
        *,
        keep_size: bool,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """[offset, end) reads as zeroes and has all its blocks."""
        await self.allocate(state, offset, end, keep_size=keep_size, stopped=stopped)
        await self.core.run(lambda tx: self._edges_body(tx, state, offset, end))
        await self._empty(self._unwrite_body, state, *whole_blocks(offset, end))
        await self.core.run(lambda tx: self._finish(tx, state, end, keep_size=keep_size))

    def _edges_body(self, tx: Tx, state: InodeState, offset: int, end: int) -> None:
        """Zero what is not a whole block, and the range in a file that has no blocks."""
        self._regular(tx, state)
        inode = tx.edit_inode(state)
        if inode.root is None:
            zeroes = bytes(max(min(end, len(inode.data)) - offset, 0))
            inode.data = inode.data[:offset] + zeroes + inode.data[offset + len(zeroes) :]
            return
        changes = PageChanges()
        for edge in ragged_edges(offset, end):
            self.files.zero_bytes(tx, state, inode, edge, changes)
        self.files.put(tx, state, changes)

    async def _empty(self, body: Step, state: InodeState, first: int, last: int) -> None:
        """Take whole blocks away, or make them unwritten; where an extent cannot be split for want
        of a block, write zeroes."""
        try:
            await self._steps(body, state, first, last)
        except FsError as error:
            if error.errno != errno.ENOSPC:
                raise
            await self._steps(self._write_zeroes_body, state, first, last)

    async def _steps(self, body: Step, state: InodeState, first: int, last: int) -> None:
        """Run a body from where it has got to until it is at `last`."""
        while first < last:
            start = first
            first = await self.core.run(lambda tx: body(tx, state, start, last))  # noqa: B023

    def _free_body(self, tx: Tx, state: InodeState, first: int, last: int) -> int:
        inode = tx.edit_inode(state)
        if inode.root is None:
            return last
        self.files.settle(state, first, last)
        found, reached = self._some_extents(tx, state, inode, first, last)
        for mapped in found:
            self._free(tx, state, inode, mapped, (first, last))
        self.files.forget(tx, state, first, reached)
        return reached

    def _give_back_body(self, tx: Tx, state: InodeState, first: int, last: int) -> int:
        """Undo an allocation as far as it is still unwritten."""
        inode = tx.edit_inode(state)
        if inode.root is None:
            return last
        found, reached = self._some_extents(tx, state, inode, first, last)
        for mapped in found:
            if mapped[1].unwritten:
                self._free(tx, state, inode, mapped, (first, last))
        return reached

    def _free(
        self,
        tx: Tx,
        state: InodeState,
        inode: InodeNode,
        mapped: extents.Mapped,
        span: tuple[int, int],
    ) -> None:
        gone = extents.take_away(self.files.editor(tx, state, inode), mapped, *span)
        self.core.space.free(tx, gone.block, gone.length)
        inode.blocks -= gone.length
        self.files.mark_changed(tx, state)

    def _unwrite_body(self, tx: Tx, state: InodeState, first: int, last: int) -> int:
        inode = tx.edit_inode(state)
        if inode.root is None:
            return last
        self.files.settle(state, first, last)
        found, reached = self._some_extents(tx, state, inode, first, last)
        for mapped in found:
            if not mapped[1].unwritten:
                extents.convert(self.files.editor(tx, state, inode), mapped, first, last)
                self.files.mark_changed(tx, state)
        self.files.forget(tx, state, first, reached)
        return reached

    def _write_zeroes_body(self, tx: Tx, state: InodeState, first: int, last: int) -> int:
        inode = tx.edit_inode(state)
        last = min(last, first + ZERO_BLOCKS_MAX)
        changes = PageChanges()
        for logical, block, count, unwritten in extents.pieces(
            tx, state, inode, first, last - first
        ):
            if block and not unwritten:
                for step in range(count):
                    changes.pages[logical + step] = (ZERO_PAGE, block + step)
        self.files.put(tx, state, changes)
        return last

    @staticmethod
    def _some_extents(
        tx: Tx, state: InodeState, inode: InodeNode, first: int, last: int
    ) -> tuple[list[extents.Mapped], int]:
        """What is in the first part of [first, last), a bounded number of extents; where that
        part ends."""
        found = extents.overlapping(tx, state, inode, first, last, CUT_EXTENTS_MAX)
        if len(found) == CUT_EXTENTS_MAX:
            last = min(last, found[-1][0] + found[-1][1].length)
        return found, last

    # -- copying ---------------------------------------------------------------------------------

    async def copy(
        self, source: InodeState, offset: int, target: InodeState, to: int, length: int
    ) -> int:
        """Copy bytes from a file (held in PR or EX) to another one or to another place of the same;
        how many: at most COPY_BYTES_MAX of data, 0 at the end of the source. Holes stay holes."""
        size = await self.core.see(lambda: self._regular(READER, source).size)
        await self.core.see(lambda: self._regular(READER, target))
        length = min(length, size - offset)
        done, budget = 0, COPY_BYTES_MAX
        try:
            while done < length and budget > 0:
                at = offset + done
                data, until = await self.reader.segment(source, at)
                step = min(until - at, length - done)
                if data:
                    step = min(step, COPY_STEP_BYTES)
                    budget -= step
                    content = await self.reader.read(source, at, step)
                    await self.files.write(target, to + done, content, kill=False)
                else:
                    await self._copy_hole(target, to + done, to + done + step)
                done += step
        except FsError:
            if not done:
                raise
        return max(done, 0)

    async def _copy_hole(self, target: InodeState, start: int, end: int) -> None:
        if end > FILE_BYTES_MAX:
            raise FsError(errno.EFBIG)
        await self.punch(target, start, end)
        await self.core.run(lambda tx: self._finish(tx, target, end, keep_size=False))
