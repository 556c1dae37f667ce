"""Reads and writes between the disk and the caller, past the buffer (O_DIRECT).

`start_read` and `start_write` are attempts (`cfs.immediate`): where nothing stands in the way, the
request is on its way to the disk when they return, and no task waits for it. They hold the inode's
lock until the disk has answered.
"""

from __future__ import annotations

import errno

from cfs import extents
from cfs.attributes import BLOCK_BYTES, FLAG_IMMUTABLE
from cfs.cache import InodeState
from cfs.core import Core
from cfs.errors import FsError
from cfs.files import Files
from cfs.protection import need_mutable
from cfs.reading import FileReader, need_regular
from cfs.transaction import NeedWait, NotNow, Tx
from cluster.device import Buffer, PromptDevice, Read, Written
from cluster.errors import DeviceError
from cluster.locks import Mode


def _writes(runs: list[extents.Piece], offset: int, data: Buffer) -> list[tuple[int, Buffer]]:
    """(block, bytes) of a write to mapped blocks."""
    view = memoryview(data)
    result: list[tuple[int, Buffer]] = []
    for logical, physical, blocks, _ in runs:
        start = logical * BLOCK_BYTES - offset
        result.append((physical, view[start : start + blocks * BLOCK_BYTES]))
    return result


def _refused(error: Exception | None) -> Exception | None:
    """An answer of the disk as the caller is told it."""
    return FsError(errno.EIO, error.message) if isinstance(error, DeviceError) else error


class DirectIo:
    """Direct I/O of one mount."""

    def __init__(self, core: Core, files: Files, reader: FileReader) -> None:
        self.core = core
        self._files = files
        self._reader = reader

    # -- without a task --------------------------------------------------------------------------

    def _prompt(self) -> PromptDevice:
        device = self.core.prompt
        if device is None or not device.can_start():
            raise NotNow
        return device

    def start_read(self, state: InodeState, offset: int, size: int, done: Read) -> None:
        """`done` gets what was read, or NotNow if the blocks were taken away meanwhile: then it has
        to be read again. Raises NotNow."""
        device = self._prompt()
        if not state.try_hold(Mode.PR):
            raise NotNow
        place = self._reader.one_place(state, offset, size)
        if not place:
            state.release(Mode.PR)
            raise NotNow
        version = state.map_version

        def ended(error: Exception | None, pieces: list[Buffer]) -> None:
            if error is None and version != state.map_version:
                error = NotNow()
            state.release(Mode.PR)
            done(_refused(error), pieces)

        device.start_read(place, size, ended)

    def start_write(
        self, state: InodeState, offset: int, data: Buffer, done: Written, *, kill: bool
    ) -> None:
        """The caller may change `data` as soon as this has returned. Raises NotNow."""
        device, core = self._prompt(), self.core
        length = len(data)
        if (offset | length) % BLOCK_BYTES or not length or not state.try_hold(Mode.EX):
            raise NotNow
        first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
        span = (first, first + count)
        block = self._place_again(state, span, kill)
        try:
            if block:
                writes = [(block, data)]
            else:
                runs = core.try_run(lambda tx: self._body(tx, state, span, kill))
                if runs is None:
                    raise NotNow
                writes = _writes(runs, offset, data)
        except (FsError, NotNow):
            state.release(Mode.EX)
            raise NotNow from None

        def ended(error: Exception | None) -> None:
            state.release(Mode.EX)
            done(_refused(error))

        core.pages.start_direct(device, state, span, writes, ended)

    def _place_again(self, state: InodeState, span: tuple[int, int], kill: bool) -> int:
        """Begin a write and give the block of its range, if that lies in one place, nothing but the
        times of its inode changes, and the running transaction has an image of that already.
        Nobody has seen that image yet, so it is changed where it is, without a transaction. Else
        0."""
        core, inode = self.core, state.node
        if (
            inode is None
            or core.journal.running.get(inode.block) is not inode
            or core.error is not None
            or inode.flags & FLAG_IMMUTABLE
            or inode.xattrs is not None
            or (kill and inode.mode & 0o6000)
            or core.pages.overlaps(state, *span)
        ):
            return 0
        first, end = span
        place = self._reader.one_place(state, first * BLOCK_BYTES, (end - first) * BLOCK_BYTES)
        if place:
            self._files.touch(inode)
            self._begin(state, span)
        return place // BLOCK_BYTES

    def _begin(self, state: InodeState, span: tuple[int, int]) -> None:
        if state.clean:
            for index in range(*span):
                state.clean.pop(index, None)
        self.core.pages.begin_direct(state, span)

    # -- with a task -----------------------------------------------------------------------------

    async def write(
        self, state: InodeState, offset: int | None, data: Buffer, *, kill: bool = True
    ) -> tuple[int, int]:
        """Past the buffer when all blocks of the range are written; else through it, and out of it
        before it returns. Raises FsError(EIO) if the disk refuses."""
        core = self.core
        length = len(data)
        if offset is not None and not offset % BLOCK_BYTES and not length % BLOCK_BYTES and length:
            first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
            span = (first, first + count)
            try:
                runs = await core.run(lambda tx: self._body(tx, state, span, kill))
            except BaseException:
                core.pages.end_direct(state, span)
                raise
            if runs is not None:
                try:
                    await core.pages.write_direct(state, span, _writes(runs, offset, data))
                except DeviceError as error:
                    raise FsError(errno.EIO, error.message) from error
                return offset, length
        failures = state.errors.count
        done = await self._files.write(state, offset, data, kill=kill)
        await core.pages.flush(state)
        if state.errors.count != failures:
            raise FsError(errno.EIO, "the disk refused the data")
        return done

    def _body(
        self, tx: Tx, state: InodeState, span: tuple[int, int], kill: bool
    ) -> list[extents.Piece] | None:
        """Begin a write; the blocks of its range if that is written and lies inside the file. None
        for any other, of which nothing is begun."""
        seen = tx.inode(state)
        need_regular(seen)
        first, end = span
        if seen.root is None or end * BLOCK_BYTES > seen.size:
            return None
        if not state.spoiled.isdisjoint(range(first, end)):
            raise NeedWait(lambda: self._files.isolate(state))
        runs = extents.pieces(tx, state, seen, first, end - first)
        if not all(block and not unwritten for _, block, _, unwritten in runs):
            return None
        need_mutable(seen)
        pages = self.core.pages
        if pages.overlaps(state, first, end):
            raise NeedWait(lambda: pages.settle(state, first, end))
        inode = tx.edit_inode(state)
        self._files.drop_privileges(tx, state, inode, kill=kill)
        self._files.touch(inode)
        tx.after(lambda: self._begin(state, span))
        return runs
