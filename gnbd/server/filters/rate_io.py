"""`rate`: at most so many bytes and requests a second, of all clients of the export together.

A request is executed and answered at once; its connection then rests until the debt is paid. So a
limit never keeps a bar waiting: nobody sleeps inside the access of a nexus.
"""

from __future__ import annotations

import threading
import time

from gnbd.exports import FilterSpec
from gnbd.server.backends_io import Backend
from gnbd.server.filters.bucket import SECOND_NS, Bucket
from gnbd.server.filters.filter_io import Filter

BURST_MS = 100


class Rate(Filter):
    """`read_bytes_s`, `write_bytes_s`, `requests_s` (0: no limit); `burst_ms` may be saved up."""

    kind = "rate"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        self._lock = threading.Lock()
        self._buckets = _buckets_of(spec)

    def configure(self, spec: FilterSpec) -> None:
        with self._lock:
            self.spec = spec
            self._buckets = _buckets_of(spec)

    def _take(self, name: str, length: int) -> None:
        now_ns = time.monotonic_ns()
        with self._lock:
            for bucket, amount in ((name, length), ("requests_s", 1)):
                if bucket in self._buckets:
                    self._buckets[bucket].take(now_ns, amount)

    def owed_s(self, operation: str) -> float:
        now_ns = time.monotonic_ns()
        own = "read_bytes_s" if operation == "read" else "write_bytes_s"
        with self._lock:
            owed = [
                self._buckets[name].owed_ns(now_ns)
                for name in (own, "requests_s")
                if name in self._buckets
            ]
        return max(max(owed, default=0) / SECOND_NS, self.below.owed_s(operation))

    def read_into(self, offset: int, view: memoryview) -> None:
        self._take("read_bytes_s", len(view))
        self.below.read_into(offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        self._take("write_bytes_s", len(view))
        self.below.write(offset, view, fua)

    def flush(self) -> None:
        self._take("", 0)
        self.below.flush()

    def trim(self, offset: int, length: int) -> None:
        self._take("", 0)
        self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        self._take("", 0)
        self.below.zero(offset, length, no_hole, fast)


def _buckets_of(spec: FilterSpec) -> dict[str, Bucket]:
    burst_ms = int(spec.parameters.get("burst_ms", BURST_MS))
    found = {}
    for name in ("read_bytes_s", "write_bytes_s", "requests_s"):
        per_s = int(spec.parameters.get(name, 0))
        if per_s:
            found[name] = Bucket(per_s, per_s * burst_ms // 1000, time.monotonic_ns())
    return found
