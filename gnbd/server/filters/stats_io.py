"""`stats`: how many requests of each kind what is below has executed, and how long they took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gnbd.exports import FilterSpec
from gnbd.server.backends_io import Backend
from gnbd.server.filters.filter_io import Filter

BUCKETS = 40
"""Of a histogram of durations: bucket n holds those below 2**n microseconds."""


class _Kind:
    """One kind of request."""

    def __init__(self) -> None:
        self.count = self.errors = self.size_bytes = self.total_us = self.longest_us = 0
        self.buckets = [0] * BUCKETS

    def below_us(self, share: float) -> int:
        """This share of the requests took less."""
        wanted, seen = share * self.count, 0
        for power, count in enumerate(self.buckets):
            seen += count
            if seen >= wanted:
                return 1 << power
        return 1 << BUCKETS


class Stats(Filter):
    """Measures; what it has seen is in `gnbdctl stats`. `set` begins anew."""

    kind = "stats"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        self._lock = threading.Lock()
        self._kinds: dict[str, _Kind] = {}

    def configure(self, spec: FilterSpec) -> None:
        with self._lock:
            self.spec = spec
            self._kinds = {}

    @contextmanager
    def _measured(self, name: str, length: int = 0) -> Iterator[None]:
        begin_ns = time.monotonic_ns()
        error = 1
        try:
            yield
            error = 0
        finally:
            us = (time.monotonic_ns() - begin_ns) // 1000
            with self._lock:
                kind = self._kinds.setdefault(name, _Kind())
                kind.count += 1
                kind.errors += error
                kind.size_bytes += length
                kind.total_us += us
                kind.longest_us = max(kind.longest_us, us)
                kind.buckets[min(us.bit_length(), BUCKETS - 1)] += 1

    def report(self) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._lock:
            for name, kind in sorted(self._kinds.items()):
                found |= {
                    f"{name}_count": kind.count,
                    f"{name}_errors": kind.errors,
                    f"{name}_bytes": kind.size_bytes,
                    f"{name}_mean_us": kind.total_us // kind.count,
                    f"{name}_p50_us": kind.below_us(0.5),
                    f"{name}_p99_us": kind.below_us(0.99),
                    f"{name}_max_us": kind.longest_us,
                }
        return found

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._measured("read", len(view)):
            self.below.read_into(offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        with self._measured("write", len(view)):
            self.below.write(offset, view, fua)

    def flush(self) -> None:
        with self._measured("flush"):
            self.below.flush()

    def trim(self, offset: int, length: int) -> None:
        with self._measured("trim", length):
            self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        with self._measured("zero", length):
            self.below.zero(offset, length, no_hole, fast)

    def cache(self, offset: int, length: int) -> None:
        with self._measured("cache", length):
            self.below.cache(offset, length)
