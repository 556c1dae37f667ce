"""What every layer above the block service sees of a disk or a volume.

A device that has lost its storage or its quorum *waits* (freeze); it does not raise, unless it was
opened to give up after a time, which file systems never do. It raises
`DeviceError` when the store itself answered with an error and `BarredError` when this instance
has been put out of the cluster: then nothing that was not flushed may be assumed durable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

Buffer = bytes | bytearray | memoryview
Read = Callable[[Exception | None, list[Buffer]], None]
"""How a read that was started ends: an error, or the bytes in pieces, in order."""
Written = Callable[[Exception | None], None]
"""How a write that was started ends."""


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


@runtime_checkable
class PromptDevice(Protocol):
    """A `BlockDevice` that is also asked without a task: the end is a call, made once, perhaps
    before `start_...` returns. It must not raise. Nobody can cancel what was started."""

    def can_start(self) -> bool:
        """Whether a request may be started now; else the caller has to wait, with `read` or
        `write_many`."""
        ...

    def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None: ...

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        """As `write_many`. The caller may change the data as soon as this has returned."""
        ...
