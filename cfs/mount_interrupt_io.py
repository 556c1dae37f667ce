"""Requests whose caller was killed stop waiting (rule G6).

Once the daemon has read a request, `kill -9` of the caller waits for its answer. So a request that
waits for a cluster lock ends with EINTR when a fatal signal is pending for its caller. Only waits
for locks end like this: nothing has been changed yet when they do. The lock cache waits through its
runtime, so that is where it is put in.
"""

from __future__ import annotations

import errno

import trio

from cfs.errors import FsError
from dlm.engine import Runtime, Wakeup
from native.fuse_io import Interrupts
from native.requests import Request


class RequestWaits:
    """The requests in handlers, by task. pyfuse3 handles one request per task at a time."""

    def __init__(self) -> None:
        self.requests: dict[trio.lowlevel.Task, Request] = {}
        self._interrupts = Interrupts()
        self.ended = 0

    async def wait(self, event: trio.Event) -> None:
        """Wait for `event` on behalf of the current task's request, if it has one."""
        request = self.requests.get(trio.lowlevel.current_task())
        if request is None:
            await event.wait()
            return
        with trio.CancelScope() as scope, self._interrupts.watch(request, scope.cancel):
            await event.wait()
        if scope.cancelled_caught:
            self.ended += 1
            raise FsError(errno.EINTR, "the caller was killed")

    async def run(self) -> None:
        """Watch for interrupts, for ever."""
        await self._interrupts.run()


class _RequestEvent:
    __slots__ = ("_event", "_waits")

    def __init__(self, waits: RequestWaits) -> None:
        self._waits = waits
        self._event = trio.Event()

    def set(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._waits.wait(self._event)


class InterruptibleRuntime:
    """The lock cache's runtime, whose waits end when their caller is killed."""

    def __init__(self, runtime: Runtime, waits: RequestWaits) -> None:
        self._waits = waits
        self.now_ns = runtime.now_ns
        self.spawn = runtime.spawn
        self.call_at = runtime.call_at

    def wakeup(self) -> Wakeup:
        """An event that a request waits for."""
        return _RequestEvent(self._waits)
