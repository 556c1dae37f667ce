"""A device whose writes stay in memory: how fsck replays journals without touching the disk."""

from __future__ import annotations

from collections.abc import Sequence

from cfs.attributes import BLOCK_BYTES
from cluster.device import BlockDevice, Buffer


class OverlayDevice:
    """Reads from `base`, except blocks that were written here. Whole blocks only."""

    def __init__(self, base: BlockDevice) -> None:
        self._base = base
        self.written: dict[int, bytes] = {}

    @property
    def size_bytes(self) -> int:
        return self._base.size_bytes

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        first, count = offset_bytes // BLOCK_BYTES, length_bytes // BLOCK_BYTES
        data = await self._base.read(offset_bytes, length_bytes)
        if not any(first <= block < first + count for block in self.written):
            return data
        copy = bytearray(data)
        for index in range(count):
            block = self.written.get(first + index)
            if block is not None:
                copy[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES] = block
        return bytes(copy)

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not self.written:
            return await self._base.read_many(ranges)
        return [await self.read(offset, length) for offset, length in ranges]

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
