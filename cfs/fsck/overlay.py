"""A device whose writes stay in memory: how fsck replays and repairs without touching the disk."""

from __future__ import annotations

from collections.abc import Sequence

from cfs.attributes import BLOCK_BYTES
from cluster.device import BlockDevice, Buffer


class OverlayDevice:
    """Reads from `base`, except blocks that were written here. Whole blocks only."""

    def __init__(self, base: BlockDevice) -> None:
        self.base = base
        self.written: dict[int, bytes] = {}

    @property
    def size_bytes(self) -> int:
        return self.base.size_bytes

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        return (await self.read_many([(offset_bytes, length_bytes)]))[0]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found = await self.base.read_many(ranges)
        written = self.written
        if not written:
            return found
        for position, (offset, length) in enumerate(ranges):
            first = offset // BLOCK_BYTES
            numbers = range(first, first + length // BLOCK_BYTES)
            changed = [block for block in numbers if block in written]
            if changed:
                copy = bytearray(found[position])
                for block in changed:
                    start = (block - first) * BLOCK_BYTES
                    copy[start : start + BLOCK_BYTES] = written[block]
                found[position] = bytes(copy)
        return found

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        view = memoryview(data)
        for start in range(0, len(view), BLOCK_BYTES):
            block = (offset_bytes + start) // BLOCK_BYTES
            self.written[block] = bytes(view[start : start + BLOCK_BYTES])

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        for offset, data in parts:
            await self.write(offset, data)

    async def flush(self) -> None:
        return None

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        return None

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        await self.write(offset_bytes, bytes(length_bytes))
