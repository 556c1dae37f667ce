"""Requests that pyfuse3 and libfuse do not know, or of which they lose arguments.

The session extension takes them out as they are read (`native.fuse.divert`); each is answered by a
task of its own, with the same account of callers and errors as pyfuse3's handlers. A handler gets
the parsed request and the bytes behind its header (layouts: linux/fuse.h), and returns the bytes of
the answer. It raises FsError for an error.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

import trio

from cfs.mount_fuse_io import fuse
from cfs.operations_base_io import OperationsBase
from native.requests import Opcode, Request

log = logging.getLogger("cfs.operations")

Handler = Callable[[Request, bytes], Awaitable[bytes]]


class Extension(NamedTuple):
    """How one operation is answered."""

    handle: Handler
    try_now: Callable[[Request, bytes], bytes | None] | None = None
    """The answer if it needs no waiting at all; None: `handle` is asked. May raise FsError."""


class Extensions:
    """Takes diverted requests from the session and answers them."""

    def __init__(self, operations: OperationsBase, table: Mapping[Opcode, Extension]) -> None:
        self._operations = operations
        self._table = dict(table)
        self._nursery: trio.Nursery | None = None
        fuse.divert(self._table)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """The tasks of requests in progress live in here, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    def dispatch(self) -> None:
        """Start what has been diverted. Called by whoever reads the session, after each read."""
        while (taken := fuse.take_diverted()) is not None:
            request, body = taken
            extension = self._table[Opcode(request.opcode)]
            if not self._answered_now(extension, request, body):
                assert self._nursery is not None, "requests are read before `run` has started"
                name = Opcode(request.opcode).name.lower()
                self._nursery.start_soon(self._answer, name, extension, request, body, name=name)

    def _answered_now(self, extension: Extension, request: Request, body: bytes) -> bool:
        if extension.try_now is None:
            return False
        name = Opcode(request.opcode).name.lower()
        try:
            data = extension.try_now(request, body)
            if data is None:
                return False
            self._count(name)
            self._reply(name, request, 0, data)
        except Exception as error:
            self._count(name)
            self._reply(name, request, self._operations.errno_of(name, error))
        return True

    async def _answer(
        self, name: str, extension: Extension, request: Request, body: bytes
    ) -> None:
        operations = self._operations
        self._count(name)
        task = trio.lowlevel.current_task()
        operations.waits.requests[task] = request
        try:
            data, error = await extension.handle(request, body), 0
        except Exception as failure:
            data, error = b"", operations.errno_of(name, failure)
        finally:
            del operations.waits.requests[task]
            operations.waits.finished(request.unique)
        self._reply(name, request, error, data)

    def _count(self, name: str) -> None:
        counters = self._operations.counters
        counters[name] = counters.get(name, 0) + 1

    def _reply(self, name: str, request: Request, error: int, data: bytes = b"") -> None:
        try:
            fuse.reply(request.unique, error, data)
        except OSError as failure:  # the connection has been aborted: nobody waits
            log.debug("answer to %s: %s", name, failure)
