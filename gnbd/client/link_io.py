"""One client connection in transmission, and the caller that waits (trio).

C moves the bytes (`native.link`), under TLS to and from a thread that encrypts them.

A request costs no task. Its caller posts it and parks on a counter (`Group`). The first few under
way, and large ones, are sent at once; with more, those that are posted in one turn of the scheduler
go out together, by the sender. A receiver takes many replies in one call. When nothing is in flight
the receiver rests, and the caller of the next request takes the replies in its place (`lead`) until
its own has come: one switch of tasks less. While requests come that are answered by a call, it does
not rest.

Memory of a request belongs to the link until the reply, `Link.forsake` or `Link.close`.
"""

from __future__ import annotations

import socket
import struct
from array import array
from typing import Protocol

import structlog
import trio

from cluster.device import Buffer
from cluster.errors import StackError
from cluster.paths_io import boottime_ns
from gnbd import protocol as p
from gnbd.client.connection_io import Connection
from gnbd.client.lanes import WITH_DATA, Lane, Request
from gnbd.client.path_choice import LARGE_BYTES
from gnbd.client.retained import is_fixed
from native.buffers import unset_bytes
from native.link import (
    BLOCK_BYTES,
    COMPARES,
    MISMATCH,
    NO_DATA,
    RECEIVES,
    SENDS,
    TRAILER,
    OutOfStepError,
)
from native.link import Link as Transport

SENT_AT_ONCE_MAX = 2
"""Requests under way on a lane: a further one waits for its neighbours,"""
SENT_TOGETHER = 16
"""but not for more of them: the server shall not be idle while callers prepare what they want."""
PROBES_MIN = 2
"""A single probe of a closed window may go without an answer: Linux answers one in 500 ms
(tcp_invalid_ratelimit)."""
_TCP_INFO = struct.Struct("=3xB20xI28xI")
"""Of linux/tcp.h: probes (of a closed window) and segments without an acknowledgement, and ms since
the last one came."""
_CHECKED = {p.CMD_READ: p.CMD_READ_CHECKED, p.CMD_WRITE: p.CMD_WRITE_CHECKED}
_SPOILED = (MISMATCH, p.EBADMSG)
"""Of what goes with checksums: seen by us in what was read, by the server in what was written."""
log = structlog.get_logger("gnbd.client")


class Owner(Protocol):
    """What a link needs of its device."""

    @property
    def name(self) -> str: ...

    def completed(self, lane: Lane, cookie: int, number: int) -> None: ...

    def place(self, lane: Lane, request: Request) -> None: ...

    def pump(self) -> None: ...


def is_checkable(request: Request) -> bool:
    """Its checksums are those of blocks, and stay so while it is under way."""
    return (
        request.kind in _CHECKED
        and request.length > 0
        and request.offset % BLOCK_BYTES == 0
        and (request.data is None or is_fixed(request.data))
    )


class Group:
    """A caller that waits for some requests."""

    __slots__ = ("error", "left", "link", "task")

    def __init__(self, count: int) -> None:
        self.left = count
        self.error: StackError | None = None
        self.task: trio.lowlevel.Task | None = None
        self.link: Link | None = None
        """Its caller leads this link at the moment."""

    def done(self, error: StackError | None) -> None:
        self.left -= 1
        if error is not None and self.error is None:
            self.error = error
        if self.left == 0:
            if self.task is not None:
                task, self.task = self.task, None
                trio.lowlevel.reschedule(task)
            elif self.link is not None:
                self.link.interrupt()

    async def wait(self) -> None:
        """Return when all requests are done. A cancelled caller leaves them to finish alone, after
        `Link.forsake`."""
        if self.left:
            self.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self.error is not None:
            raise self.error

    def _abort(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED


class _Pong:
    """Waits for the answer to a PING."""

    __slots__ = ("_link",)

    def __init__(self, link: Link) -> None:
        self._link = link

    def done(self, error: StackError | None) -> None:
        self._link.pinged_ns = 0


class Link:
    """One connection in transmission: socket, sender, receiver."""

    def __init__(
        self,
        owner: Owner,
        lane: Lane,
        connection: Connection,
        scope: trio.CancelScope,
    ) -> None:
        self._owner = owner
        self.lane = lane
        self._sock = connection.sock
        self._wire = connection.wire
        self._checked = connection.checked
        self._transport = Transport(self._sock.fileno())
        self._scope = scope
        self._sender: trio.lowlevel.Task | None = None
        """The sender while it has nothing to do."""
        self._posted = 0
        """Requests that nobody has tried to send."""
        self._is_full = False
        """The socket takes no more; the sender waits for it."""
        self._at_once = False
        """Something large is posted: the server would idle until it is the sender's turn."""
        self._receiver: trio.lowlevel.Task | None = None
        """The receiver while it rests."""
        self._led = False
        self._leader_waits = False
        self.callers_lead = True
        """Whether the last caller waits, and might have led: if not, the receiver does not rest."""
        self.pinged_ns = 0
        """When the PING that is under way was sent; 0: none is."""
        self._unheard_ns = 0
        """When something was first seen on the wire that nobody has acknowledged since."""

    # -- is it alive? ------------------------------------------------------------------------

    def ping(self) -> None:
        """Put something on the wire that has to be acknowledged, unless it is there already."""
        if not self.pinged_ns:
            self.pinged_ns = boottime_ns()
            request = Request(p.CMD_PING, length=p.SIZE.size, waiter=_Pong(self))
            self._owner.place(self.lane, request)
            self.post(request)
            self.kick()

    def is_unheard(self, timeout_ms: int) -> bool:
        """Whether something has been on the wire for so long and nothing was acknowledged. To be
        asked again and again: a closed window is probed more and more rarely, so that the last
        acknowledgement alone may be old."""
        if self._wire.family == socket.AF_UNIX:  # its peer's end ends it at once
            return False
        now_ns = boottime_ns()
        try:
            info = self._wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return True
        probes, segments, last_heard_ms = _TCP_INFO.unpack(info)
        if probes < PROBES_MIN and not segments:
            self._unheard_ns = 0
            return False
        if now_ns - last_heard_ms * 1_000_000 > self._unheard_ns:
            self._unheard_ns = now_ns
        return now_ns - self._unheard_ns >= timeout_ms * 1_000_000

    def has_ended(self) -> bool:
        """Whether the server has hung up while nobody listened."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def give_up(self) -> None:
        """End the whole path."""
        self._scope.cancel()

    # -- sending ---------------------------------------------------------------------------

    def post(self, request: Request) -> None:
        """Append one request to what goes out."""
        kind = request.kind
        memory: Buffer | None
        if kind in WITH_DATA:
            ways, memory = RECEIVES, request.into
            if memory is None:
                memory = request.result = unset_bytes(request.length)
        else:
            ways, memory = (SENDS if request.data is not None else NO_DATA), request.data
        if kind == p.CMD_COMPARE_AND_WRITE:
            ways |= COMPARES
        sums, request.sums = request.wanted, None
        if self._checked and is_checkable(request):
            kind, ways = _CHECKED[kind], ways | TRAILER
            if sums is None:
                sums = array("I", bytes(4 * -(-request.length // BLOCK_BYTES)))
            request.sums = sums
        try:
            request.place = self._transport.post(
                request.cookie, kind, request.flags, request.offset, request.length, ways, memory,
                sums,
            )  # fmt: skip
        except OSError:  # it has just been closed: the request is one of those that are lost
            self._scope.cancel()
        self._posted += 1
        self._at_once = self._at_once or request.length >= LARGE_BYTES

    def kick(self) -> None:
        """Send: now, or together with what others post in this turn."""
        if self._receiver is not None and not self._led:
            self._wake_receiver()
        if self._is_full or not self._posted:
            return
        few = self._posted < SENT_TOGETHER and not self._at_once
        waits = few and len(self.lane.in_flight) > SENT_AT_ONCE_MAX
        if (waits or self._send()) and self._sender is not None:
            task, self._sender = self._sender, None
            trio.lowlevel.reschedule(task)

    def _send(self) -> bool:
        """Whether something is left that the socket does not take now."""
        self._posted = 0
        self._at_once = False
        try:
            return self._transport.send()
        except OSError:
            self._scope.cancel()
            return False

    async def send_loop(self) -> None:
        """Sends what was collected, and what is left over."""
        while True:
            if self._send():
                self._is_full = True
                try:
                    await trio.lowlevel.wait_writable(self._sock)
                except (OSError, trio.ClosedResourceError):
                    self._scope.cancel()
                    return
                self._is_full = False
            elif not self._posted:
                self._sender = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort_sender)

    def _abort_sender(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._sender = None
        return trio.lowlevel.Abort.SUCCEEDED

    def forsake(self, request: Request) -> None:
        """Nobody waits for it any more: its caller's memory is not used from now on."""
        if request.cookie in self.lane.in_flight:
            memory = request.result if request.kind in WITH_DATA else request.data
            if memory is not None:
                self._transport.move(
                    request.place, request.cookie, memory, request.length, request.sums
                )

    def counters(self) -> dict[str, int]:
        """See `native.link.Link.counters`."""
        return self._transport.counters()

    def close(self) -> None:
        """No memory of any request is used from now on. Ends the path. Counts no further."""
        self._transport.close()
        self._scope.cancel()

    # -- receiving -------------------------------------------------------------------------

    async def receive_loop(self) -> None:
        """Takes replies until the connection ends, then gives up the whole path."""
        try:
            while True:
                if self._led or (self.callers_lead and not self.lane.in_flight):
                    self._receiver = trio.lowlevel.current_task()
                    await trio.lowlevel.wait_task_rescheduled(self._abort_receiver)
                    continue
                await trio.lowlevel.wait_readable(self._sock)
                self._receive()
                self._owner.pump()
        except (OSError, OutOfStepError, trio.ClosedResourceError) as error:
            log.debug("connection lost", server=self._owner.name, error=str(error))
        finally:
            self._scope.cancel()

    def _abort_receiver(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._receiver = None
        return trio.lowlevel.Abort.SUCCEEDED

    def _receive(self) -> None:
        """Raises OSError when the connection has ended or spoils data, OutOfStepError."""
        completed, lane = self._owner.completed, self.lane
        for cookie, number in self._transport.receive():
            if number in _SPOILED and (request := lane.in_flight[cookie]).sums is not None:
                # What of these replies is not taken is repeated elsewhere, with all that is lost.
                log.error("data has changed under way", server=self._owner.name,
                          offset=request.offset, sent=request.data is not None)  # fmt: skip
                raise ConnectionAbortedError("it spoils data")
            completed(lane, cookie, number)

    def _wake_receiver(self) -> None:
        if self._receiver is not None and not self._led:
            task, self._receiver = self._receiver, None
            trio.lowlevel.reschedule(task)

    def take_lead(self) -> bool:
        """Whether the caller may `lead`, which it then must do at once: the receiver rests."""
        self.callers_lead = True
        if self._receiver is None or self._led:
            return False
        self._led = True
        return True

    async def lead(self, group: Group) -> None:
        """Take replies until those of `group` are here. What remains to be done is the receiver's,
        also when this is cancelled."""
        group.link = self
        try:
            while group.left:
                self._leader_waits = True
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                finally:
                    self._leader_waits = False
                self._receive()
                if group.left:
                    self._owner.pump()
        except trio.ClosedResourceError:
            pass  # `interrupt`: the group is done by other means, or the path has ended.
        except (OSError, OutOfStepError) as error:
            log.debug("connection lost", server=self._owner.name, error=str(error))
            self._scope.cancel()
        finally:
            group.link = None
            self._led = False
            if self.lane.in_flight:
                self._wake_receiver()
        self._owner.pump()

    def interrupt(self) -> None:
        """Whoever leads stops waiting for this connection. Call it before the socket is closed."""
        if self._leader_waits:
            trio.lowlevel.notify_closing(self._sock)
