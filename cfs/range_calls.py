"""The part of the door of `cfs.filesystem` for ranges of files: fallocate, lseek, copy_file_range;
and what became of written data."""

from __future__ import annotations

import errno
from collections.abc import Callable

from cfs.cache import InodeState, hold_all, release_all
from cfs.core import Core
from cfs.errors import FsError
from cfs.files import Files
from cfs.protection import need_mutable, need_unprotected
from cfs.ranges import FileRanges
from cfs.reading import FileReader
from cfs.transaction import READER
from cluster.locks import Mode

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 16
OFFSET_MAX = (1 << 63) - 1


class RangeCalls:
    """Base of `FileSystem`."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.reader = FileReader(core)
        self.files = Files(core)
        self.ranges = FileRanges(core, self.reader, self.files)

    async def fallocate(
        self,
        ino: int,
        mode: int,
        offset: int,
        length: int,
        *,
        kill: bool = False,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """fallocate(2): mode 0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE [| KEEP_SIZE]; others
        are EOPNOTSUPP. All or nothing. `kill`: the caller may not keep set-user-id and
        set-group-id. `stopped` true ends it with EINTR."""
        if offset < 0 or length <= 0:
            raise FsError(errno.EINVAL)
        if offset + length > OFFSET_MAX:
            raise FsError(errno.EFBIG)
        keep_size = bool(mode & FALLOC_KEEP_SIZE)
        what = mode & ~FALLOC_KEEP_SIZE
        if what not in (0, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE) or mode == FALLOC_PUNCH_HOLE:
            raise FsError(errno.EOPNOTSUPP)
        state, end = self.core.state(ino), offset + length
        await state.hold(Mode.EX)
        try:
            inode = await self.core.see(lambda: READER.inode(state))
            (need_unprotected if what else need_mutable)(inode)
            await self.ranges.take_privileges(state, kill=kill)
            if what == FALLOC_PUNCH_HOLE:
                await self.ranges.punch(state, offset, end)
            elif what == FALLOC_ZERO_RANGE:
                await self.ranges.zero(state, offset, end, keep_size=keep_size, stopped=stopped)
            else:
                await self.ranges.allocate(state, offset, end, keep_size=keep_size, stopped=stopped)
        finally:
            state.release(Mode.EX)

    async def seek(
        self, ino: int, offset: int, *, data: bool, unwritten_is_data: bool = False
    ) -> int:
        """SEEK_DATA or SEEK_HOLE: see `FileReader.seek`. `unwritten_is_data`: the kernel may hold
        stores to pages of unwritten blocks that nobody else knows of."""
        state = self.core.state(ino)
        await state.hold(Mode.PR)
        try:
            return await self.reader.seek(
                state, offset, data=data, unwritten_is_data=unwritten_is_data
            )
        finally:
            state.release(Mode.PR)

    async def copy_range(
        self, source: int, offset: int, target: int, to: int, length: int, *, kill: bool = False
    ) -> int:
        """copy_file_range(2); see `FileRanges.copy`. `kill` as of `fallocate`. Raises
        FsError(EINVAL) for a range that overlaps itself."""
        one, two = self.core.state(source), self.core.state(target)
        if offset < 0 or to < 0 or (one is two and abs(offset - to) < length):
            raise FsError(errno.EINVAL)
        wants = [(two, Mode.EX)] if one is two else [(one, Mode.PR), (two, Mode.EX)]
        await hold_all(wants)
        try:
            need_mutable(await self.core.see(lambda: READER.inode(two)))
            await self.ranges.take_privileges(two, kill=kill)
            return await self.ranges.copy(one, offset, two, to, length)
        finally:
            release_all(wants)

    async def reserve_held(self, ino: int, offset: int, size: int) -> None:
        """The caller holds EX. Give blocks to the holes of a range inside the file, so that stores
        through a shared mapping cannot run out of space (rule G5)."""
        await self.ranges.reserve(self.core.state(ino), offset, size)

    async def has_holes_held(self, ino: int, offset: int, end: int) -> bool:
        """The caller holds PR or EX. Whether `reserve_held` would have anything to do."""
        return await self.ranges.has_holes(self.core.state(ino), offset, end)

    # -- what became of written data -------------------------------------------------------------

    def error_mark(self, ino: int) -> int:
        """What a handle that is opened now gives to `take_error`."""
        return self.core.state(ino).errors.mark()

    def take_error(self, ino: int, mark: int) -> tuple[int, int]:
        """(errno or 0, new mark): whether data was lost that a handle has not been told of."""
        state = self.core.table.find(ino)
        return (0, mark) if state is None else state.errors.hear(mark)

    def note_error(self, ino: int, number: int) -> None:
        """Data that the kernel was told is written could not be kept."""
        state: InodeState = self.core.state(ino)
        state.errors.note(number)
