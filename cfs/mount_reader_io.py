"""How pyfuse3's workers take turns at /dev/fuse, with fewer trips through trio's scheduler.

pyfuse3 has a task per request in progress. They take turns: one waits, behind a `trio.Lock`, until
the descriptor is readable, reads one request, lets the next one wait, and handles the request. It
reaches trio through a module attribute (its asyncio support replaces it), and so does this:

- the lock is a bare stack of parked tasks: a worker that has just ended is warm, and it goes first;
- a descriptor that is readable already is not waited for. Only `IMMEDIATE_MAX` times in a row, so
  that requests that need no wait cannot keep the other tasks of the process from running.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from types import SimpleNamespace, TracebackType

import trio

from cfs.mount_fuse_io import pyfuse3

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


class Readiness:
    """`trio.lowlevel.wait_readable` for one descriptor. Before it waits it hands on what the last
    read has diverted: whoever has read comes here next, or the worker that got the turn does."""

    def __init__(self, diverted: Callable[[], None]) -> None:
        self._diverted = diverted
        self._poll = select.poll()
        self._descriptor = -1
        self._immediate = 0

    async def wait_readable(self, descriptor: int) -> None:
        self._diverted()
        if descriptor != self._descriptor:
            self._poll = select.poll()
            self._poll.register(descriptor, select.POLLIN)
            self._descriptor = descriptor
        if self._immediate < IMMEDIATE_MAX and self._poll.poll(0):
            self._immediate += 1
            return
        self._immediate = 0
        await trio.lowlevel.wait_readable(descriptor)


def take_turns(diverted: Callable[[], None]) -> None:
    """Make pyfuse3's workers wait as described above; call before `pyfuse3.main`. `diverted` is
    called after each read of the session."""
    lowlevel = trio.lowlevel
    pyfuse3.trio = SimpleNamespace(  # type: ignore[attr-defined]
        Lock=Turn,
        ClosedResourceError=trio.ClosedResourceError,
        open_nursery=trio.open_nursery,
        lowlevel=SimpleNamespace(
            wait_readable=Readiness(diverted).wait_readable,
            current_task=lowlevel.current_task,
            current_trio_token=lowlevel.current_trio_token,
            notify_closing=lowlevel.notify_closing,
        ),
    )
