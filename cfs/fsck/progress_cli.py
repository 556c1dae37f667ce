"""How far fsck is: a line that moves on a terminal, a line now and then elsewhere if asked for."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.status import Status

LINE_S = 2.0
TOUCH_S = 0.1


class ProgressShow:
    """Called as `cfs.fsck.session.Show`. Use it in `with`; what is printed meanwhile goes above."""

    def __init__(self, *, always: bool, never: bool) -> None:
        self._terminal = sys.stderr.isatty() and not never
        self._lines = always and not self._terminal
        self._last = 0.0
        self._what = ""
        self._status: Status | None = None

    def __enter__(self) -> ProgressShow:
        if self._terminal:
            self._status = Console(stderr=True).status("starting")
            self._status.start()
        return self

    def __exit__(self, *_details: object) -> None:
        self.pause()

    def pause(self) -> None:
        """Take the line away, for a question or for good; the next call brings it back."""
        if self._status is not None:
            self._status.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not (self._terminal or self._lines):
            return
        now = time.monotonic()
        if now - self._last < (TOUCH_S if self._terminal else LINE_S) and what == self._what:
            return
        self._last, self._what = now, what
        text = f"{what}: {done * 100 // total}%" if total else f"{what}: {done}"
        if self._status is not None:
            self._status.update(text)
            self._status.start()
        else:
            print(f"fsck.cfs: {text}", file=sys.stderr, flush=True)
