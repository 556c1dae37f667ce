"""Blocks of a server's disks that were found not to be what was written, for those who ask."""

from __future__ import annotations

import threading
from collections import deque

DAMAGES_MAX = 256


class Damages:
    """The newest `DAMAGES_MAX`, numbered. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: deque[tuple[str, int]] = deque(maxlen=DAMAGES_MAX)
        self._count = 0

    @property
    def count(self) -> int:
        """How many there have been."""
        return self._count

    def add(self, export: str, offset: int) -> None:
        """One more: the address of a block in bytes."""
        with self._lock:
            self._found.append((export, offset))
            self._count += 1

    def after(self, number: int) -> tuple[list[tuple[str, int]], int]:
        """What is left of those after the first `number`, and how many there are now."""
        with self._lock:
            fresh = min(self._count - number, len(self._found))
            return list(self._found)[len(self._found) - fresh :], self._count
