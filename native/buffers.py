"""Page-aligned memory for O_DIRECT, handed out and taken back.

| call | gives |
|---|---|
| `aligned(n)` | one new buffer of n bytes, freed with its last view |
| `unset_bytes(n)` | new bytes of any content, for C to fill before anybody else sees them |
| `AlignedPool(size, limit)` | buffers of one size, reused; at most `limit` exist |
"""

from __future__ import annotations

import ctypes
import mmap

ALIGNMENT = mmap.PAGESIZE
_SHORT_BYTES = 8192

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = [ctypes.c_char_p, ctypes.c_ssize_t]
_new_bytes.restype = ctypes.py_object


def unset_bytes(length_bytes: int) -> bytes:
    """As CPython itself makes bytes: memory first, then the content. Zeroing 1 MiB that is about to
    be overwritten costs as much as receiving it."""
    if length_bytes <= _SHORT_BYTES:  # zeroes are cheaper than the call
        return bytes(length_bytes)
    result: bytes = _new_bytes(None, length_bytes)
    return result


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
