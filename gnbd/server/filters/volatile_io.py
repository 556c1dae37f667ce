"""`volatile`: writes stay in memory until FLUSH or FUA; a SIGKILL of the server loses the rest, as
a power cut would. Without it the page cache survives, and a client that never flushes passes all.
"""

from __future__ import annotations

import os
import threading

from gnbd.exports import FilterSpec
from gnbd.intervals import IntervalSet
from gnbd.server.backends_io import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    Backend,
    fallocate,
    read_exactly,
    write_exactly,
)
from gnbd.server.filters.filter_io import Filter

_COPY_BYTES = 1 << 20
_OPTIMISTIC_READS = 3


class Volatile(Filter):
    """A volatile write cache: an anonymous sparse file over the back end.

    `_dirty` says which bytes are newer in the anonymous file. A flush copies them down, makes them
    durable and punches them out; readers notice a punch by `_punches` and look again.
    """

    kind = "volatile"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        self._memory = os.memfd_create("gnbd-volatile", os.MFD_CLOEXEC)
        os.ftruncate(self._memory, below.size_bytes)
        self._lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._dirty = IntervalSet()
        self._punches = 0
        self._copy = bytearray(_COPY_BYTES)

    def read_into(self, offset: int, view: memoryview) -> None:
        for _ in range(_OPTIMISTIC_READS):
            with self._lock:
                before = self._punches
                pieces = self._dirty.pieces(offset, offset + len(view))
            self._read_pieces(pieces, offset, view)
            if self._punches == before:
                return
        with self._lock:
            self._read_pieces(self._dirty.pieces(offset, offset + len(view)), offset, view)

    def _read_pieces(
        self, pieces: list[tuple[int, int, bool]], base: int, view: memoryview
    ) -> None:
        for start, end, dirty in pieces:
            part = view[start - base : end - base]
            if dirty:
                read_exactly(self._memory, start, part)
            else:
                self.below.read_into(start, part)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        end = offset + len(view)
        with self._lock:
            if not fua:
                write_exactly(self._memory, offset, view)
                self._dirty.add(offset, end)
                return
            self.below.write(offset, view, False)
            self._clean(offset, end)
        self.below.flush()

    def _clean(self, start: int, end: int) -> None:
        """The range is newest below now; give its memory back."""
        self._dirty.remove(start, end)
        self._punches += 1
        fallocate(self._memory, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, start, end - start)

    def flush(self) -> None:
        with self._flush_lock:
            with self._lock:
                for start, end in self._dirty:
                    self._copy_down(start, end)
                    self._clean(start, end)
            self.below.flush()

    def _copy_down(self, start: int, end: int) -> None:
        while start < end:
            part = memoryview(self._copy)[: min(_COPY_BYTES, end - start)]
            read_exactly(self._memory, start, part)
            self.below.write(start, part, False)
            start += len(part)

    def trim(self, offset: int, length: int) -> None:
        self.zero(offset, length, False)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        end = offset + length
        with self._lock:
            # Punched ranges of the anonymous file read as zeroes and still count as newer.
            self._punches += 1
            fallocate(self._memory, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, offset, length)
            self._dirty.add(offset, end)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return [(length, False)]  # what is not down yet is not told apart

    def resize(self, size_bytes: int) -> None:
        with self._lock:
            self.below.resize(size_bytes)
            os.ftruncate(self._memory, size_bytes)

    def close(self) -> None:
        os.close(self._memory)
        super().close()

    def dirty_bytes(self) -> int:
        """How much a power cut would lose now."""
        with self._lock:
            return self._dirty.total()
