"""Page-aligned memory for O_DIRECT, handed out and taken back.

| call | gives |
|---|---|
| `aligned(n)` | one new buffer of n bytes, freed with its last view |
| `AlignedPool(size, limit)` | buffers of one size, reused; at most `limit` exist |
"""

from __future__ import annotations

import mmap

ALIGNMENT = mmap.PAGESIZE


def aligned(length_bytes: int) -> memoryview:
    """A zeroed, page-aligned, writable buffer."""
    if length_bytes == 0:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(-1, length_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class AlignedPool:
    """Buffers of one size. Invariant: a buffer is either taken or free, never both.

    The content of a taken buffer is whatever its last user left.
    """

    def __init__(self, buffer_bytes: int, count_max: int) -> None:
        if buffer_bytes <= 0 or count_max <= 0:
            raise ValueError("buffer_bytes and count_max must be positive")
        self.buffer_bytes = buffer_bytes
        self.count_max = count_max
        self._free: list[memoryview] = []
        self._taken: dict[int, memoryview] = {}

    @property
    def taken(self) -> int:
        """Buffers in use."""
        return len(self._taken)

    def take(self) -> memoryview | None:
        """A buffer, or None when `count_max` are in use."""
        if self._free:
            buffer = self._free.pop()
        elif len(self._taken) < self.count_max:
            buffer = aligned(self.buffer_bytes)
        else:
            return None
        self._taken[id(buffer)] = buffer
        return buffer

    def give(self, buffer: memoryview) -> None:
        """Return the very object that `take` gave; nobody may use a view of it afterwards."""
        if self._taken.pop(id(buffer), None) is None:
            raise ValueError("the buffer was not taken from this pool")
        self._free.append(buffer)
