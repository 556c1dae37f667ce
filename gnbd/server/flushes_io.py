"""Flushes of one export. A failure reaches everybody whose writes it may have lost (R7).

The kernel tells the error of a write-back once per open file, and all flushes share one: whoever
flushes beside or right after a failed flush would be told that all is well. So one flush runs at a
time (those that come meanwhile share the next one), and before another may begin after a failure
`failed` is called, which sees to it that all clients learn of it. Durable writes go through open
files of their own: what one of them is told is not missed by a flush, nor by another one.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable


class Flushes:
    """Numbers the flushes: a flush covers what was written before it began."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = 0
        self._ended = 0
        self._failed = 0
        self._running = False

    def run(
        self, flush: Callable[[], None], failed: Callable[[], None], closing: Callable[[], bool]
    ) -> None:
        """Return when a flush that began after this call has succeeded; `flush` may be called or
        not. `failed` is called when ours has failed; `closing`: the client was cut off. Raises
        OSError."""
        with self._changed:
            mine = self._begun + 1
            while self._running and self._ended < mine:
                self._changed.wait()
            if self._ended >= mine:
                if self._failed >= mine:
                    raise _error(errno.EIO)
                return
            if closing():
                raise _error(errno.ESHUTDOWN)
            self._running = True
            self._begun = mine
        try:
            self._lead(mine, flush, failed)
        finally:
            with self._changed:
                self._running = False
                self._ended = mine
                self._changed.notify_all()

    def _lead(self, mine: int, flush: Callable[[], None], failed: Callable[[], None]) -> None:
        try:
            flush()
        except OSError:
            self._spoil()
            failed()
            raise
        with self._changed:
            if self._failed >= mine:
                raise _error(errno.EIO)

    def write_failed(self, flush: Callable[[], None], failed: Callable[[], None]) -> None:
        """A durable write has failed, which is as bad as a failed flush: one that runs now fails,
        and the next one is ours. `flush` takes the error from the file that flushes go by."""

        def refused() -> None:
            flush()
            raise _error(errno.EIO)

        self._spoil()
        while True:
            try:
                self.run(refused, failed, lambda: False)  # another one's may be good, and for us
            except OSError:
                return

    def _spoil(self) -> None:
        with self._changed:
            self._failed = self._begun


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
