"""INTERRUPT for trio: wake the handler whose caller got a signal (rule G6).

The kernel sends one INTERRUPT per request, at the first signal; a SIGKILL that follows another
signal sends none. So a watched request that was interrupted is polled until it is answered.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from native import fuse
from native.process import fatal_signal_pending
from native.requests import Request

POLL_S = 0.2
"""How soon a SIGKILL behind an earlier signal is noticed."""


class Interrupts:
    """Routes interrupts to the handlers that wait. One per session; `run` it beside pyfuse3.main.

    Invariant: a wake function is called only between entering and leaving its `watch`.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Request, Callable[[], None]]] = {}
        self._signalled: dict[int, int] = {}  # unique -> thread id of the caller

    @contextmanager
    def watch(self, request: Request, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, `wake()` is called when the request's caller has a fatal signal pending.

        `wake` runs in the trio thread, must not block, and may be called several times. The usual
        one cancels a scope: `with interrupts.watch(request, scope.cancel), scope: await ...`.
        """
        self._waiting[request.unique] = (request, wake)
        try:
            if fuse.interrupted(request.unique):
                self._signal(request.unique)
            yield
        finally:
            del self._waiting[request.unique]
            self._signalled.pop(request.unique, None)

    async def run(self) -> None:
        """Serve until cancelled."""
        descriptor = fuse.interrupt_fd()
        while True:
            timeout_s = POLL_S if self._signalled else float("inf")
            with trio.move_on_after(timeout_s):
                await trio.lowlevel.wait_readable(descriptor)
            for unique in fuse.take_interrupts():
                self._signal(unique)
            for unique in list(self._signalled):
                self._check(unique)

    def _signal(self, unique: int) -> None:
        if unique in self._waiting:
            self._signalled[unique] = self._waiting[unique][0].pid
        elif fuse.kept(unique):
            self._signalled[unique] = 0
        self._check(unique)

    def _check(self, unique: int) -> None:
        """Wake or abandon an interrupted request if its caller is being killed."""
        if unique not in self._signalled:
            return
        entry = self._waiting.get(unique)
        if entry is not None:
            if fatal_signal_pending(entry[0].pid):
                entry[1]()
            return
        rows = [row for row in fuse.pending_requests() if row.unique == unique and row.answered]
        if not rows:
            del self._signalled[unique]
        elif fatal_signal_pending(rows[0].pid):
            fuse.gate_abandon(unique, errno.EINTR)
            del self._signalled[unique]
