"""Requests that pyfuse3 and libfuse do not know, lose arguments of, or are too slow for.

The session extension takes them out as they are read (`native.fuse.divert`); what has to wait is
answered by a task of its own, with the same account of callers and errors as pyfuse3's handlers. A
handler gets the parsed request and the bytes behind its header (layouts: linux/fuse.h), and returns
the bytes of the answer. It raises FsError for an error.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple

import trio

from cfs.fuse.pyfuse3_io import fuse
from cfs.operations.base_io import OperationsBase
from cfs.transaction import NotNow
from cluster.device import Buffer
from native.requests import Opcode, Request

log = logging.getLogger("cfs.operations")

Handler = Callable[[Request, bytes], Awaitable[bytes]]


_OPCODES = [Opcode(number) if number in set(Opcode) else None for number in range(64)]


class Later(Exception):
    """Raised by `Extension.try_now` when a part is done and the rest has to wait."""

    def __init__(self, handle: Handler) -> None:
        super().__init__()
        self.handle = handle


class Parked(enum.Enum):
    """What `try_now` returns when a callback will give the answer (`OperationsBase.answer`)."""

    PARKED = 0


PARKED: Final = Parked.PARKED


Answer = bytes | list[Buffer]
"""The data of an answer, whole or in pieces."""


class Extension(NamedTuple):
    """How one operation is answered."""

    handle: Handler
    try_now: Callable[[Request, bytes], Answer | Parked | None] | None = None
    """The answer if it needs no waiting at all; None or NotNow: nothing is done, and `handle` is
    asked. May raise FsError, or Later."""
    try_in_place: Callable[[Request, memoryview], Answer | Parked | None] | None = None
    """As `try_now`, in its place, for bodies that are long: the view ends with the call."""


class Extensions:
    """Answers the diverted requests."""

    def __init__(self, operations: OperationsBase, table: Mapping[Opcode, Extension]) -> None:
        self._operations = operations
        self._rows = [table.get(opcode) if opcode else None for opcode in _OPCODES]
        self._names = [opcode.name.lower() if opcode else "" for opcode in _OPCODES]
        self._nursery: trio.Nursery | None = None
        self._ended = False
        operations.answer = self.answer
        operations.answer_later = self.answer_later
        fuse.divert(table)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """The tasks of requests in progress live in here, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._ended = True
            self._operations.waits.end_parked()

    def dispatch(self, length: int) -> None:
        """Answer the diverted request that was just read, or start the task that will. `length` is
        that of its body. Called by whoever reads the session."""
        request = fuse.current_request()
        extension = self._rows[request.opcode]
        name = self._names[request.opcode]
        counters = self._operations.counters
        counters[name] = counters.get(name, 0) + 1
        assert extension is not None
        handle = extension.handle
        view = fuse.body(length)
        body = b"" if extension.try_in_place is not None else bytes(view)
        if extension.try_now is not None or extension.try_in_place is not None:
            data: Answer | Parked | None
            try:
                if extension.try_in_place is not None:
                    data = extension.try_in_place(request, view)
                else:
                    assert extension.try_now is not None
                    data = extension.try_now(request, body)
            except NotNow:
                data = None
            except Later as later:
                data, handle = None, later.handle
            except Exception as error:
                self._reply(name, request, self._operations.errno_of(name, error))
                return
            if data is not None:
                if data is not PARKED:
                    self._reply(name, request, 0, data)
                return
        self._begin(request, handle, body or bytes(view))

    def _begin(self, request: Request, handle: Handler, body: bytes) -> None:
        """A task of its own for a request."""
        assert self._nursery is not None, "requests are read before `run` has started"
        name = self._names[request.opcode]
        self._nursery.start_soon(self._answer, name, handle, request, body, name=name)

    async def _answer(self, name: str, handle: Handler, request: Request, body: bytes) -> None:
        operations = self._operations
        task = trio.lowlevel.current_task()
        operations.waits.requests[task] = request
        try:
            data, error = await handle(request, body), 0
        except Exception as failure:
            data, error = b"", operations.errno_of(name, failure)
        finally:
            del operations.waits.requests[task]
            if operations.waits.is_abandoned(request.unique):
                await operations.settle_abandoned(request)
            operations.waits.finished(request.unique)
        self._reply(name, request, error, data)

    def answer(self, request: Request, error: int, data: Answer = b"") -> None:
        """The late answer to a request."""
        if not self._ended:
            self._reply(self._names[request.opcode], request, error, data)

    def answer_later(self, request: Request, handle: Handler) -> None:
        """A request without a body was parked in vain: it needs a task after all."""
        if not self._ended:
            self._begin(request, handle, b"")

    def _reply(self, name: str, request: Request, error: int, data: Answer = b"") -> None:
        if request.opcode in fuse.UNANSWERED:
            return
        try:
            if isinstance(data, list):
                fuse.reply_pieces(request.unique, data)
            else:
                fuse.reply(request.unique, error, data)
        except OSError as failure:  # the connection has been aborted: nobody waits
            log.debug("answer to %s: %s", name, failure)
