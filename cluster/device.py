"""What every layer above the block service sees of a disk or a volume.

A device that has lost its storage or its quorum *waits* (freeze); it does not raise, unless it was
opened to give up after a time, which file systems never do. It raises
`DeviceError` when the store itself answered with an error and `BarredError` when this instance
has been put out of the cluster: then nothing that was not flushed may be assumed durable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class BlockDevice(Protocol):
    """An array of bytes with explicit durability.

    Offsets and lengths are in bytes and multiples of 512. A completed write is visible to every
    later read by anyone; it is durable only after `flush` returned (or with `fua`). Writes that
    overlap and are in flight together end in either order: callers do not do that.
    """

    @property
    def size_bytes(self) -> int: ...

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes: ...

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read (offset, length) ranges, all in flight at once; results in the same order."""
        ...

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None: ...

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        """Write (offset, data) parts, all in flight at once, in any order; wait for all."""
        ...

    async def flush(self) -> None:
        """Make every write that completed before this call durable."""
        ...

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """The range holds nothing of value any more; it reads as anything afterwards."""
        ...

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None: ...
