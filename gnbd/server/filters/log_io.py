"""`log`: each changing request with its data, appended to a file in the order of execution: the
source of crash-point tests.

Per entry 40 bytes little endian (magic u32 "GLOG", operation u32, flags u32, zero u32, offset u64,
length u64, time ns u64), then `length` bytes of data if the operation is a write. Operations: 1
write, 2 flush, 3 trim, 4 zeroes, 5 open; flags: 1 FUA. An entry is written before the request is
executed, that of a flush after it, and is complete in the file before the request is answered. A
flush has the time when it arrived as its offset: it promises nothing for a write that is executed
later. At an open everything unflushed is lost (if there is a `volatile` below).
"""

from __future__ import annotations

import os
import struct
import threading
import time
from pathlib import Path

from cluster.errors import UsageError
from gnbd.exports import FilterSpec
from gnbd.server.backends_io import Backend
from gnbd.server.filters.filter_io import Filter

LOG_ENTRY = struct.Struct("<IIIIQQQ")
LOG_MAGIC = 0x474F4C47
LOG_WRITE, LOG_FLUSH, LOG_TRIM, LOG_ZERO, LOG_OPEN = 1, 2, 3, 4, 5


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Log(Filter):
    """Appends every changing request to a file, in the order of execution."""

    kind = "log"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        path = Path(str(spec.parameters["path"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        # A file object: it is closed when the last request has left a filter that was taken away.
        self._file = open(path, "ab", buffering=0, opener=_private)  # noqa: SIM115
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
        written = os.writev(self._file.fileno(), [head, data])
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

    def configure(self, spec: FilterSpec) -> None:
        if spec != self.spec:
            raise UsageError("a log keeps its path", hint="remove the filter and add another one")

    def close(self) -> None:
        self._file.close()
        super().close()
