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
        self._waiting: dict[int, Callable[[], None]] = {}
        self._signalled: set[int] = set()  # unanswered requests whose caller got some signal

    @contextmanager
    def watch(self, request: Request, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, `wake()` is called when the request's caller has a fatal signal pending.

        `wake` runs in the trio thread, must not block, and may be called several times. The usual
        one cancels a scope: `with interrupts.watch(request, scope.cancel), scope: await ...`.
        """
        self._waiting[request.unique] = wake
        try:
            if request.unique in self._signalled:
                self._check(request.unique)
            yield
        finally:
            del self._waiting[request.unique]

    async def run(self) -> None:
        """Serve until cancelled."""
        descriptor = fuse.interrupt_fd()
        while True:
            timeout_s = POLL_S if self._signalled else float("inf")
            with trio.move_on_after(timeout_s):
                await trio.lowlevel.wait_readable(descriptor)
            self._signalled.update(fuse.take_interrupts())
            for unique in list(self._signalled):
                self._check(unique)

    def _check(self, unique: int) -> None:
        """Wake the handler, or abandon the kept answer, if the caller is being killed."""
        if not fuse.interrupted(unique):  # answered
            self._signalled.discard(unique)
        elif unique in self._waiting or fuse.kept(unique):
            if not fatal_signal_pending(fuse.caller(unique)):
                return
            if unique in self._waiting:
                self._waiting[unique]()
            else:
                fuse.gate_abandon(unique, errno.EINTR)
