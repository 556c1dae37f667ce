"""Requests whose caller was killed do not keep it (rule G6).

Once the daemon has read a request, `kill -9` of the caller waits for its answer. The kernel sends
INTERRUPT once, at the first signal of any kind; so an interrupted request is looked at again and
again until a fatal signal is pending for its caller or it is answered. Then:
- a request that waits for a lock of a file ends with EINTR at any signal; no task waits for it
  (`park`);
- a request that waits for a cluster lock ends with EINTR: nothing has been changed yet. The lock
  cache waits through its runtime, so that is where this is put in;
- a request that waits for something else (storage that is away) is *abandoned*: the kernel gets
  EINTR at once, the handler goes on, and undoes what only its answer would have made true
  (`is_abandoned`): counted lookups, a handle. A change is made all the same, after the kernel was
  told that it was not: then nothing that the kernel believes of names and attributes is left
  (`OperationsBase.settle_abandoned`). The kernel refuses the late answer;
- an answer that the closed gate keeps is replaced by EINTR, unless the kernel has to know of what
  it counts: then it is sent, and neither believed nor seen by anybody.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable

import trio

from cfs.errors import FsError
from cfs.fuse.pyfuse3_io import fuse
from dlm.engine import Runtime, Wakeup
from native.process import fatal_signal_pending
from native.requests import Opcode, Request

log = logging.getLogger("cfs.mount")

POLL_S = 0.1
CHANGES = frozenset(
    {
        Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR,
        Opcode.RENAME, Opcode.RENAME2, Opcode.LINK, Opcode.CREATE, Opcode.WRITE,
        Opcode.SETXATTR, Opcode.REMOVEXATTR, Opcode.FALLOCATE, Opcode.OPEN,
    }
)  # fmt: skip
ABANDONABLE = CHANGES | {
    Opcode.LOOKUP, Opcode.GETATTR, Opcode.READLINK, Opcode.READ, Opcode.READDIRPLUS,
    Opcode.STATFS, Opcode.FSYNC, Opcode.FSYNCDIR, Opcode.OPENDIR,
    Opcode.GETXATTR, Opcode.LISTXATTR,
}  # fmt: skip
_ERROR_ANSWER = struct.Struct("<IiQ")


class RequestWaits:
    """The requests in handlers, by task. pyfuse3 handles one request per task at a time."""

    def __init__(self) -> None:
        self.requests: dict[trio.lowlevel.Task, Request] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._signalled: set[int] = set()
        self._abandoned: set[int] = set()
        self._parked: dict[int, tuple[Request, Callable[[bool], None]]] = {}
        self.ended = 0

    def park(self, request: Request, signalled: Callable[[bool], None]) -> None:
        """No task waits for the answer to this request. `signalled` is called, again and again,
        when its caller has had a signal; its argument says that it is being killed, or that there
        is no answer to be given any more."""
        self._parked[request.unique] = (request, signalled)

    def unpark(self, unique: int) -> None:
        """The request is answered."""
        if self._parked.pop(unique, None) is not None:
            self._signalled.discard(unique)

    def end_parked(self) -> None:
        """Nobody is answered any more."""
        for _request, signalled in list(self._parked.values()):
            signalled(True)

    async def wait(self, event: trio.Event) -> None:
        """Wait for `event` on behalf of the current task's request, if it has one."""
        request = self.requests.get(trio.lowlevel.current_task())
        if request is None:
            await event.wait()
            return
        with trio.CancelScope() as scope:
            outer = self._scopes.get(request.unique)
            self._scopes[request.unique] = scope
            try:
                await event.wait()
            finally:
                if outer is None:
                    del self._scopes[request.unique]
                else:
                    self._scopes[request.unique] = outer
        if scope.cancelled_caught:
            self.ended += 1
            raise FsError(errno.EINTR, "the caller was interrupted")

    def is_abandoned(self, unique: int) -> bool:
        """Whether the kernel has been told that this request ended."""
        return unique in self._abandoned

    def is_killed(self, request: Request) -> bool:
        """Whether the caller of a request in progress is being killed: for handlers that can stop
        half-way."""
        return request.unique in self._signalled and fatal_signal_pending(request.pid)

    def finished(self, unique: int) -> None:
        """The handler has returned."""
        self._signalled.discard(unique)
        self._abandoned.discard(unique)

    def has_signals(self) -> bool:
        """Whether `finished` has anything to do."""
        return bool(self._signalled or self._abandoned)

    async def run(self) -> None:
        """Watch for interrupts, for ever."""
        descriptor = fuse.interrupt_fd()
        while True:
            with trio.move_on_after(POLL_S if self._signalled else float("inf")):
                await trio.lowlevel.wait_readable(descriptor)
            self._signalled.update(fuse.take_interrupts())
            if self._signalled:
                running = {request.unique: request for request in self.requests.values()}
                for unique in list(self._signalled):
                    self._look_at(unique, running.get(unique))

    def _look_at(self, unique: int, request: Request | None) -> None:
        if unique in self._parked:
            request, signalled = self._parked[unique]
            signalled(fatal_signal_pending(request.pid))
        elif request is None:
            self._look_at_kept(unique)
        elif fatal_signal_pending(request.pid):
            scope = self._scopes.get(unique)
            if scope is not None:
                scope.cancel()
            elif (
                request.opcode in ABANDONABLE
                and unique not in self._abandoned
                and not request.laundered
            ):
                self._abandon(unique)

    def _abandon(self, unique: int) -> None:
        self._abandoned.add(unique)
        self.ended += 1
        answer = _ERROR_ANSWER.pack(_ERROR_ANSWER.size, -errno.EINTR, unique)
        try:
            os.write(fuse.session_fd(), answer)
        except OSError as error:
            log.debug("request %d could not be abandoned: %s", unique, error)

    def _look_at_kept(self, unique: int) -> None:
        """Its handler has returned: either it is answered, or the gate keeps the answer."""
        rows = [row for row in fuse.pending_requests() if row.unique == unique and row.answered]
        if not rows:
            self._signalled.discard(unique)
        elif fatal_signal_pending(rows[0].pid):
            fuse.gate_abandon(unique, errno.EINTR)
            self._signalled.discard(unique)


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
