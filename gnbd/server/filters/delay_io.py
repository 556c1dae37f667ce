"""`delay`: milliseconds before each request; trim and zeroes count as writes."""

from __future__ import annotations

import time

from gnbd.server.filters.filter_io import Filter


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
