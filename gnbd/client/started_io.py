"""Requests that no task waits for: their end is a call (`cluster.device.PromptDevice`)."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.device import Buffer, Read, Written
from cluster.errors import StackError
from cluster.paths_io import boottime_ns
from gnbd import protocol as p
from gnbd.client.core import ClientCore
from gnbd.client.lanes import Request
from gnbd.client.link_io import Link
from gnbd.client.pieces import flat
from gnbd.client.retained import owned


def started_read(offset: int, length: int, done: Read) -> Request:
    """A READ that is not longer than one request may be."""
    request = Request(p.CMD_READ, offset, length)
    request.waiter = _StartedRead(request, done)
    return request


def started_write(parts: Sequence[tuple[int, Buffer]], done: Written) -> list[Request]:
    """WRITEs that are not longer each than one request may be; what the caller may change is
    copied."""
    waiter = _StartedWrite(len(parts), done)
    kept = [(offset, flat(owned(data))) for offset, data in parts]
    return [Request(p.CMD_WRITE, offset, len(data), data, waiter=waiter) for offset, data in kept]


class _StartedRead:
    """Hands on what was read."""

    __slots__ = ("_done", "_request")

    def __init__(self, request: Request, done: Read) -> None:
        self._request = request
        self._done = done

    def done(self, error: StackError | None) -> None:
        self._done(error, [self._request.result])


class _StartedWrite:
    """Waits for all parts."""

    __slots__ = ("_done", "_error", "_left")

    def __init__(self, left: int, done: Written) -> None:
        self._left = left
        self._done = done
        self._error: StackError | None = None

    def done(self, error: StackError | None) -> None:
        self._left -= 1
        self._error = self._error or error
        if not self._left:
            self._done(self._error)


class Starter:
    """The part of a device that starts requests: a `cluster.device.PromptDevice`."""

    core: ClientCore
    _closed: bool
    _links: dict[int, Link]

    def pump(self) -> None:
        """Send whatever may be sent."""
        raise NotImplementedError

    def can_start(self) -> bool:
        return True

    def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None:
        self._start(started_read(offset_bytes, length_bytes, done))

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        for request in started_write(parts, done):
            self._start(request)

    def _start(self, request: Request) -> None:
        try:
            if self._closed:
                raise StackError("the device is closed")
            self.core.submit(request)
        except StackError as error:
            request.finish(error)
            return
        lane = self.core.assign_one(boottime_ns())
        if lane is None:
            self.pump()
        else:
            link = self._links[id(lane)]
            link.post(request)
            link.callers_lead = False
            link.kick()
