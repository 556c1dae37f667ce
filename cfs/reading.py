"""Reading the bytes of a file: from the inode, from pages not yet on the disk, from blocks.

The methods want the inode's lock held (PR or EX) by the caller.
"""

from __future__ import annotations

import errno
from bisect import bisect_right

from cfs import extents
from cfs.attributes import BLOCK_BYTES
from cfs.cache import InodeState
from cfs.core import Core
from cfs.errors import FsError
from cfs.nodes import Extent, InodeNode
from cfs.transaction import READER
from cluster.errors import DeviceError

SEEK_EXTENTS_MAX = 1024
"""Extents that one step of a search looks at."""
ZERO_PAGE = bytes(BLOCK_BYTES)
Part = bytes | tuple[int, int]
"""Bytes, or (device offset, length) still to be read."""


def need_regular(inode: InodeNode) -> None:
    if inode.is_directory:
        raise FsError(errno.EISDIR)
    if not inode.is_regular:
        raise FsError(errno.EINVAL)


class FileReader:
    """Reads files of one mount."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def read_now(self, state: InodeState, offset: int, size: int) -> bytes | None:
        """What can be read without the disk; None otherwise. May raise Missing."""
        parts = self._plan_read(state, offset, size)
        if any(isinstance(part, tuple) for part in parts):
            return None
        return self._assemble(parts, [], offset, size, state)

    async def read(self, state: InodeState, offset: int, size: int) -> bytes:
        core = self.core
        place = self.one_place(state, offset, size)
        if place:
            version = state.map_version
            try:
                data = await core.device.read(place, size)
            except DeviceError as error:
                raise FsError(errno.EIO, error.message) from error
            if version == state.map_version:
                return data
        while True:
            parts = await core.see(lambda: self._plan_read(state, offset, size))
            ranges = [part for part in parts if isinstance(part, tuple)]
            if not ranges:
                return self._assemble(parts, [], offset, size, state)
            version = state.map_version
            try:
                blocks = await core.device.read_many(ranges)
            except DeviceError as error:
                raise FsError(errno.EIO, error.message) from error
            if version == state.map_version:
                return self._assemble(parts, blocks, offset, size, state)

    @staticmethod
    def one_place(state: InodeState, offset: int, size: int) -> int:
        """Where a range of whole blocks inside the file is on the device, if that is one place and
        easily found: the extents are in the inode and nothing newer is in memory. Else 0."""
        node = state.nodes.get(state.number)
        if (
            state.pages
            or state.flushing
            or state.spoiled
            or not isinstance(node, InodeNode)
            or not node.is_regular
            or (offset | size) % BLOCK_BYTES
            or not size
            or offset + size > node.size
            or node.root is None
            or node.root.level
        ):
            return 0
        root = node.root
        first = offset // BLOCK_BYTES
        position = bisect_right(root.keys, first) - 1
        if position < 0:
            return 0
        extent = root.values[position]
        skip = first - root.keys[position]
        if (
            not isinstance(extent, Extent)
            or extent.unwritten
            or skip + size // BLOCK_BYTES > extent.length
        ):
            return 0
        return (extent.block + skip) * BLOCK_BYTES

    def _plan_read(self, state: InodeState, offset: int, size: int) -> list[Part]:
        """The whole blocks of the range (clipped at the end of file) in order."""
        inode = READER.inode(state)
        need_regular(inode)
        end = min(offset + size, inode.size)
        if end <= offset:
            return []
        if inode.root is None:
            data = inode.data[offset:end]
            return [data.ljust(end - offset, b"\0")]
        first = offset // BLOCK_BYTES
        count = -(-end // BLOCK_BYTES) - first
        parts: list[Part] = []
        dirty = bool(state.pages or state.flushing or state.spoiled)
        for logical, block, length, unwritten in extents.pieces(READER, state, inode, first, count):
            physical = 0 if unwritten else block
            if dirty:
                self._overlay(state, parts, logical, physical, length)
            elif physical:
                parts.append((physical * BLOCK_BYTES, length * BLOCK_BYTES))
            else:
                parts.append(bytes(length * BLOCK_BYTES))
        return parts

    @staticmethod
    def _overlay(
        state: InodeState, parts: list[Part], logical: int, physical: int, length: int
    ) -> None:
        """One extent or hole with pages that are not yet on the disk, or lost, over it."""
        pages, flushing, spoiled = state.pages, state.flushing, state.spoiled
        run = 0
        for step in range(length + 1):
            page = None
            if step < length:
                index = logical + step
                page = pages.get(index) or flushing.get(index)
                if page is None and index in spoiled:
                    page = (ZERO_PAGE, 0)
                if page is None:
                    run += 1
                    continue
            if run and physical:
                start = physical + step - run
                parts.append((start * BLOCK_BYTES, run * BLOCK_BYTES))
            elif run:
                parts.append(bytes(run * BLOCK_BYTES))
            run = 0
            if page is not None:
                parts.append(bytes(page[0]))

    @staticmethod
    def _assemble(
        parts: list[Part], blocks: list[bytes], offset: int, size: int, state: InodeState
    ) -> bytes:
        node = state.node
        assert node is not None
        if node.root is None:
            return b"".join(part for part in parts if isinstance(part, bytes))
        source = iter(blocks)
        joined = [part if isinstance(part, bytes) else next(source) for part in parts]
        data = joined[0] if len(joined) == 1 else b"".join(joined)
        skip = offset % BLOCK_BYTES
        length = max(min(offset + size, node.size) - offset, 0)
        if skip or len(data) != length:
            return data[skip : skip + length]
        return data

    # -- holes -----------------------------------------------------------------------------------

    async def seek(
        self, state: InodeState, offset: int, *, data: bool, unwritten_is_data: bool = False
    ) -> int:
        """The first byte at or after `offset` that is data, or in a hole; the end of file is a
        hole. Raises FsError(ENXIO) at or beyond the end, and if no data follows."""
        at = offset
        while True:
            found, until, size = await self.core.see(
                lambda: self._segment(state, at, unwritten_is_data)  # noqa: B023
            )
            if at >= size:
                if data or offset >= size or offset < 0:
                    raise FsError(errno.ENXIO)
                return size
            if found == data:
                return at
            at = min(until, size)

    async def segment(self, state: InodeState, offset: int) -> tuple[bool, int]:
        """Whether the byte at `offset` is data, and up to where that is certainly so."""
        found, until, _ = await self.core.see(lambda: self._segment(state, offset, False))
        return found, until

    @staticmethod
    def _segment(state: InodeState, offset: int, unwritten_is_data: bool) -> tuple[bool, int, int]:
        """(data?, up to which byte at least, size of the file)."""
        inode = READER.inode(state)
        need_regular(inode)
        if inode.root is None:
            end = len(inode.data)
            return (True, end, inode.size) if offset < end else (False, 1 << 63, inode.size)
        found, until = extents.boundary(
            READER, state, inode, offset // BLOCK_BYTES,
            unwritten_is_data=unwritten_is_data, limit=SEEK_EXTENTS_MAX,
        )  # fmt: skip
        return found, until * BLOCK_BYTES, inode.size
