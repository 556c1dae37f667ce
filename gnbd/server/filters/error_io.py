"""`error`: requests that the chooser takes fail with `errno` (5: EIO)."""

from __future__ import annotations

import errno
import os

from gnbd.server.filters.chooser_io import Choosing


class Error(Choosing):
    """Fails requests before they reach what is below."""

    kind = "error"

    def _maybe_fail(self, operation: str, offset: int = 0, length: int = 0) -> None:
        if self._chooser.takes(operation, offset, length):
            number = int(self.spec.parameters.get("errno", errno.EIO))
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
        self._maybe_fail("trim", offset, length)
        self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        self._maybe_fail("zero", offset, length)
        self.below.zero(offset, length, no_hole, fast)

    def cache(self, offset: int, length: int) -> None:
        self._maybe_fail("cache", offset, length)
        self.below.cache(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        self._maybe_fail("status", offset, length)
        return self.below.extents(offset, length)
