"""How requests are read from /dev/fuse, with few trips through trio's scheduler.

pyfuse3 has a task per request in progress. They take turns: one waits, behind a `trio.Lock`, until
the descriptor is readable, reads one request, lets the next one wait, and handles the request. It
reaches trio through a module attribute (its asyncio support replaces it), and so does this:

- the lock is a bare stack of parked tasks: a worker that has just ended is warm, and it goes first;
- who waits for the descriptor reads it: requests that are diverted from libfuse are handed on in
  place, and most are answered before the next one is read. After `IMMEDIATE_MAX` in a row the other
  tasks of the process have their turn.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace, TracebackType

import trio

from cfs.fuse.pyfuse3_io import fuse, pyfuse3

IMMEDIATE_MAX = 16


class Turn:
    """A lock for `async with`; whoever asked last is served first."""

    __slots__ = ("_parked", "_taken")

    def __init__(self) -> None:
        self._taken = False
        self._parked: dict[trio.lowlevel.Task, None] = {}

    async def __aenter__(self) -> None:
        if not self._taken:
            self._taken = True
            return
        task = trio.lowlevel.current_task()
        parked = self._parked
        parked[task] = None

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            # A task that was given the turn is no longer parked, and no longer cancelled here.
            del parked[task]
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._parked:
            task, _ = self._parked.popitem()
            trio.lowlevel.reschedule(task)
        else:
            self._taken = False


class Reader:
    """Reads the session in place of `trio.lowlevel.wait_readable`: what was diverted is handled at
    once, without a worker; it returns when there is a message for libfuse."""

    def __init__(self, dispatch: Callable[[int], None]) -> None:
        self._dispatch = dispatch
        self._immediate = 0

    async def wait_readable(self, descriptor: int) -> None:
        read, dispatch = fuse.read, self._dispatch
        while True:
            length = read()
            if length >= 0:
                dispatch(length)
            elif length == fuse.NOTHING:
                self._immediate = 0
                await trio.lowlevel.wait_readable(descriptor)
                continue
            self._immediate += 1
            if self._immediate > IMMEDIATE_MAX:
                self._immediate = 0
                await trio.lowlevel.checkpoint()
            if length == fuse.FOR_LIBFUSE:
                return


def take_turns(dispatch: Callable[[int], None]) -> None:
    """Make pyfuse3's workers wait as described above; call before `pyfuse3.main`. `dispatch` is
    called with the length of the body of each diverted message."""
    lowlevel = trio.lowlevel
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=Turn,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        lowlevel=SimpleNamespace(
            wait_readable=Reader(dispatch).wait_readable,
            current_task=lowlevel.current_task,
            current_trio_token=lowlevel.current_trio_token,
            notify_closing=lowlevel.notify_closing,
        ),
    )
