"""The access word of one nexus on one export, checked when a request executes (R5).

Enter = count in, then load the word. Revoke = store the word, wait for zero in flight. A gate
that is revoked is *closed* and replaced by a new one, so that its count can only fall: waiting for
it ends even when the nexus keeps the right to read.
"""

from __future__ import annotations

import threading

NOBODY = 0
READ = 1
WRITE = 2
STALE = 4
"""The nexus works with too low a volume sequence number."""
CLOSED = 8
"""This gate was replaced: look up the new one."""


class Gate:
    """Counter and word. Enter and leave once per batch; look at `word` before each request."""

    __slots__ = ("_idle", "_in_flight", "_lock", "word")

    def __init__(self, word: int) -> None:
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._in_flight = 0
        self.word = word

    def enter(self) -> int:
        """Count in, then load the word. Call `leave` in any case."""
        with self._lock:
            self._in_flight += 1
            return self.word

    def leave(self) -> None:
        """Count out."""
        with self._lock:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.notify_all()

    def close(self) -> None:
        """Store the word: nothing more executes under this gate."""
        with self._lock:
            self.word = CLOSED

    def wait_idle(self) -> None:
        """Return when nothing is in flight. The gate must be closed."""
        assert self.word == CLOSED
        with self._lock:
            while self._in_flight:
                self._idle.wait()

    def is_idle(self) -> bool:
        with self._lock:
            return self._in_flight == 0
