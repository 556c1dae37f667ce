"""Filters: small wrappers around a back end that inject what real disks and hosts do.

- `volatile`: writes stay in memory until FLUSH or FUA; a SIGKILL of the server loses the rest, as a
  power cut would. Without it the page cache survives and a client that never flushes passes all.
- `log`: each request with its data, appended to a file in execution order (for crash points).
- `delay`: milliseconds before each request.
- `error`: the next `count` requests of a kind fail (-1: all), optionally in a range only.

The write log: per entry 40 bytes little endian (magic u32 "GLOG", operation u32, flags u32, zero
u32, offset u64, length u64, time ns u64), then `length` bytes of data if the operation is a write.
Operations: 1 write, 2 flush, 3 trim, 4 zeroes, 5 open; flags: 1 FUA. An entry is written before the
request is executed, that of a flush after it, and is complete in the file before the request is
answered. A flush has the time when it arrived as its offset: it promises nothing for a write that
is executed later. At an open everything unflushed is lost (if there is a `volatile` below).
"""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

from cluster.errors import UsageError
from gnbd.backends_io import (
    FALLOC_KEEP_SIZE,
    FALLOC_PUNCH_HOLE,
    Backend,
    fallocate,
    read_exactly,
    write_exactly,
)
from gnbd.exports import FilterSpec
from gnbd.intervals import IntervalSet

LOG_ENTRY = struct.Struct("<IIIIQQQ")
LOG_MAGIC = 0x474F4C47
LOG_WRITE, LOG_FLUSH, LOG_TRIM, LOG_ZERO, LOG_OPEN = 1, 2, 3, 4, 5
_COPY_BYTES = 1 << 20
_OPTIMISTIC_READS = 3


class Filter(Backend):
    """Passes everything on."""

    kind = ""

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        self.below = below
        self.spec = spec
        self.read_only = below.read_only

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        return self.below.size_bytes

    def configure(self, spec: FilterSpec) -> None:
        """New parameters while requests run."""
        self.spec = spec

    def read_into(self, offset: int, view: memoryview) -> None:
        self.below.read_into(offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.below.write(offset, view, fua)

    def flush(self) -> None:
        self.below.flush()

    def trim(self, offset: int, length: int) -> None:
        self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        self.below.zero(offset, length, no_hole, fast)

    def cache(self, offset: int, length: int) -> None:
        self.below.cache(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return self.below.extents(offset, length)

    def resize(self, size_bytes: int) -> None:
        self.below.resize(size_bytes)

    def close(self) -> None:
        self.below.close()


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


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Log(Filter):
    """Appends every changing request to a file, in the order of execution."""

    kind = "log"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        path = Path(str(spec.parameters["path"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._entry(LOG_OPEN, 0, 0, 0, b"")

    def _entry(
        self, operation: int, flags: int, offset: int, length: int, data: bytes | memoryview
    ) -> None:
        head = LOG_ENTRY.pack(
            LOG_MAGIC,
            operation,
            flags,
            0,
            offset,
            length,
            _now_ns(),
        )
        written = os.writev(self._file, [head, data])
        if written != len(head) + len(data):
            raise OSError(28, "the write log is full")

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        with self._lock:
            self._entry(LOG_WRITE, int(fua), offset, len(view), view)
            self.below.write(offset, view, fua)

    def flush(self) -> None:
        arrival_ns = _now_ns()
        with self._lock:
            self.below.flush()
            self._entry(LOG_FLUSH, 0, arrival_ns, 0, b"")

    def trim(self, offset: int, length: int) -> None:
        with self._lock:
            self._entry(LOG_TRIM, 0, offset, length, b"")
            self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        with self._lock:
            self._entry(LOG_ZERO, 0, offset, length, b"")
            self.below.zero(offset, length, no_hole, fast)

    def close(self) -> None:
        os.close(self._file)
        super().close()


class Delay(Filter):
    """Waits before each request."""

    kind = "delay"

    def _wait(self, name: str) -> None:
        milliseconds = int(self.spec.parameters.get(name, 0))
        if milliseconds:
            time.sleep(milliseconds / 1000)

    def read_into(self, offset: int, view: memoryview) -> None:
        self._wait("read_ms")
        self.below.read_into(offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        self._wait("write_ms")
        self.below.write(offset, view, fua)

    def flush(self) -> None:
        self._wait("flush_ms")
        self.below.flush()

    def trim(self, offset: int, length: int) -> None:
        self._wait("write_ms")
        self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        self._wait("write_ms")
        self.below.zero(offset, length, no_hole, fast)


class Error(Filter):
    """Fails requests: `operation` read, write, flush or all; `count` how many (-1: for ever)."""

    kind = "error"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        self._lock = threading.Lock()
        self._left = int(spec.parameters.get("count", -1))

    def configure(self, spec: FilterSpec) -> None:
        with self._lock:
            self.spec = spec
            self._left = int(spec.parameters.get("count", -1))

    def _maybe_fail(self, operation: str, offset: int = 0, length: int = 0) -> None:
        parameters = self.spec.parameters
        if parameters.get("operation", "all") not in (operation, "all"):
            return
        start = int(parameters.get("offset", 0))
        end = start + int(parameters.get("length", 1 << 62))
        if operation != "flush" and (offset + length <= start or offset >= end):
            return
        with self._lock:
            if self._left == 0:
                return
            self._left -= self._left > 0
        number = int(parameters.get("errno", 5))
        raise OSError(number, os.strerror(number))

    def read_into(self, offset: int, view: memoryview) -> None:
        self._maybe_fail("read", offset, len(view))
        self.below.read_into(offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        self._maybe_fail("write", offset, len(view))
        self.below.write(offset, view, fua)

    def flush(self) -> None:
        self._maybe_fail("flush")
        self.below.flush()

    def trim(self, offset: int, length: int) -> None:
        self._maybe_fail("write", offset, length)
        self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        self._maybe_fail("write", offset, length)
        self.below.zero(offset, length, no_hole, fast)


_KINDS: dict[str, type[Filter]] = {f.kind: f for f in (Volatile, Log, Delay, Error)}


def stack_filter(below: Backend, spec: FilterSpec) -> Filter:
    """Put one filter on top."""
    return _KINDS[spec.kind](below, spec)


def filters_of(top: Backend) -> list[Filter]:
    """The stack from the bottom to the top."""
    found: list[Filter] = []
    while isinstance(top, Filter):
        found.append(top)
        top = top.below
    return found[::-1]


def changed_stack(top: Backend, action: str, spec: FilterSpec) -> Backend:
    """The new top after `add`, `set` or `remove` of a filter. Raises UsageError. What is running
    in the old top ends there: every filter but `volatile` is stateless for its requests."""
    if action == "add":
        if spec.kind == Volatile.kind:
            raise UsageError("the filter 'volatile' can only be set in the exports file")
        return stack_filter(top, spec)
    found = next((f for f in filters_of(top) if f.kind == spec.kind), None)
    if found is None:
        raise UsageError(f"the export has no filter {spec.kind!r}")
    if action == "set":
        found.configure(spec)
        return top
    if action != "remove" or spec.kind == Volatile.kind:
        raise UsageError(f"cannot {action} the filter {spec.kind!r}")
    if found is top:
        return found.below
    above = top
    while isinstance(above, Filter) and above.below is not found:
        above = above.below
    assert isinstance(above, Filter)
    above.below = found.below
    return top
