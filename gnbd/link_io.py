"""One client connection in transmission, and the caller that waits (trio).

Hot path of the client: a request costs no task. Its caller sends it and parks on a counter
(`Group`); a sender, parked unless the socket is full, sends what is left over; a receiver parses
many replies per recv. When nothing is in flight the receiver rests, and the caller of the next
request takes the replies in its place (`lead`) until its own has come: one switch of tasks less.
"""

from __future__ import annotations

import socket
import struct
from typing import Protocol

import structlog
import trio

from cluster.device import Buffer
from cluster.errors import ProtocolError, StackError
from cluster.paths_io import boottime_ns
from gnbd import protocol as p
from gnbd.client import WITH_DATA, Lane, Request

RECEIVE_BYTES = 256 << 10
SEND_PARTS_MAX = 512
REQUEST_BYTES_MAX = 4 << 20
PROBES_MIN = 2
"""A single probe of a closed window may go without an answer: Linux answers one in 500 ms
(tcp_invalid_ratelimit)."""
_TCP_INFO = struct.Struct("=3xB20xI28xI")
"""Of linux/tcp.h: probes (of a closed window) and segments without an acknowledgement, and ms since
the last one came."""
log = structlog.get_logger("gnbd.client")


class Owner(Protocol):
    """What a link needs of its device."""

    @property
    def name(self) -> str: ...

    def completed(self, lane: Lane, cookie: int, number: int) -> None: ...

    def place(self, lane: Lane, request: Request) -> None: ...

    def pump(self) -> None: ...


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
        """Return when all requests are done. A cancelled caller leaves them to finish alone."""
        if self.left:
            self.task = trio.lowlevel.current_task()

            def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
                self.task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if self.error is not None:
            raise self.error


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
        self, owner: Owner, lane: Lane, sock: socket.socket, scope: trio.CancelScope
    ) -> None:
        self._owner = owner
        self.lane = lane
        self._sock = self.wire = sock
        """`wire` is another one under TLS."""
        self._scope = scope
        self._out: list[Buffer] = []
        self._sender: trio.lowlevel.Task | None = None
        self._sender_busy = False
        self._receiver: trio.lowlevel.Task | None = None
        """The receiver while it rests."""
        self._led = False
        self._leader_waits = False
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        # One long READ is received at a time; a fresh buffer for each would cost page faults.
        self._scratch = memoryview(bytearray(REQUEST_BYTES_MAX))
        self._start = 0
        self._end = 0
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
        now_ns = boottime_ns()
        try:
            info = self.wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        except OSError:
            return True
        probes, segments, last_heard_ms = _TCP_INFO.unpack(info)
        if probes < PROBES_MIN and not segments:
            self._unheard_ns = 0
            return False
        if now_ns - last_heard_ms * 1_000_000 > self._unheard_ns:
            self._unheard_ns = now_ns
        return now_ns - self._unheard_ns >= timeout_ms * 1_000_000

    def give_up(self) -> None:
        """End the whole path."""
        self._scope.cancel()

    # -- sending ---------------------------------------------------------------------------

    def post(self, request: Request) -> None:
        """Append one request to what goes out."""
        self._out.append(request.header())
        if request.kind == p.CMD_WRITE:
            assert request.data is not None
            self._out.append(request.data)

    def kick(self) -> None:
        """Send at once; what the socket does not take is the sender's."""
        self._wake_receiver()
        if self._sender_busy or not self._out:
            return
        if self._send_some() and self._out and self._sender is not None:
            task, self._sender = self._sender, None
            self._sender_busy = True
            trio.lowlevel.reschedule(task)

    def _send_some(self) -> bool:
        """One non-blocking sendmsg. False if the connection is broken."""
        parts = self._out[:SEND_PARTS_MAX]
        try:
            sent = self._sock.sendmsg(parts)
        except BlockingIOError:
            return True
        except OSError:
            self._scope.cancel()
            return False
        index = 0
        while index < len(parts) and sent >= len(parts[index]):
            sent -= len(parts[index])
            index += 1
        del self._out[:index]
        if sent:
            self._out[0] = memoryview(self._out[0])[sent:]
        return True

    async def send_loop(self) -> None:
        """Sends what is left over and what was collected."""
        while True:
            if not self._out:
                self._sender_busy = False
                self._sender = trio.lowlevel.current_task()

                def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
                    self._sender = None
                    return trio.lowlevel.Abort.SUCCEEDED

                await trio.lowlevel.wait_task_rescheduled(abort)
                continue
            self._sender_busy = True
            before = len(self._out)
            first = len(self._out[0])
            if not self._send_some():
                return
            if self._out and len(self._out) == before and len(self._out[0]) == first:
                try:
                    await trio.lowlevel.wait_writable(self._sock)
                except (OSError, trio.ClosedResourceError):
                    self._scope.cancel()
                    return

    # -- receiving -------------------------------------------------------------------------

    async def receive_loop(self) -> None:
        """Takes replies until the connection ends, then gives up the whole path."""
        try:
            while True:
                if self._led or not (self.lane.in_flight or self._end > self._start):
                    await self._rest()
                    continue
                while self._end - self._start >= p.REPLY.size:
                    if not (self._short_reply() or await self._reply()):
                        return
                self._owner.pump()
                if self.lane.in_flight or self._end > self._start:
                    count = await self._recv_into(self._room())
                    if count == 0:
                        return
                    self._end += count
        except (OSError, ProtocolError, trio.ClosedResourceError) as error:
            log.debug("connection lost", server=self._owner.name, error=str(error))
        finally:
            self._scope.cancel()

    async def _rest(self) -> None:
        self._receiver = trio.lowlevel.current_task()

        def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._receiver = None
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake_receiver(self) -> None:
        if self._receiver is not None and not self._led:
            task, self._receiver = self._receiver, None
            trio.lowlevel.reschedule(task)

    def take_lead(self) -> bool:
        """Whether the caller may `lead`, which it then must do at once: the receiver rests."""
        if self._receiver is None or self._led:
            return False
        self._led = True
        return True

    async def lead(self, group: Group) -> None:
        """Take replies until those of `group` are here or something unusual comes. What remains to
        be done is the receiver's, also when this is cancelled."""
        group.link = self
        try:
            while group.left:
                self._leader_waits = True
                try:
                    await trio.lowlevel.wait_readable(self._sock)
                finally:
                    self._leader_waits = False
                try:
                    count = self._sock.recv_into(self._room())
                except BlockingIOError:
                    continue
                if count == 0:
                    self._scope.cancel()
                    break
                self._end += count
                while self._end - self._start >= p.REPLY.size:
                    if not self._short_reply():
                        return
        except trio.ClosedResourceError:
            pass  # `interrupt`: the group is done by other means, or the path has ended.
        except OSError as error:
            log.debug("connection lost", server=self._owner.name, error=str(error))
            self._scope.cancel()
        finally:
            group.link = None
            self._led = False
            if self.lane.in_flight or self._end > self._start:
                self._wake_receiver()
        self._owner.pump()

    def interrupt(self) -> None:
        """Whoever leads stops waiting for this connection. Call it before the socket is closed."""
        if self._leader_waits:
            trio.lowlevel.notify_closing(self._sock)

    def _room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._start == self._end:
            self._start = self._end = 0
            return self._view
        if self._start:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    async def _recv_into(self, view: memoryview) -> int:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                continue

    def _short_reply(self) -> bool:
        """One reply that is whole in the buffer. False if it is not, or is something special."""
        start = self._start
        magic, number, cookie = p.REPLY.unpack_from(self._buffer, start)
        request = self.lane.in_flight.get(cookie)
        if magic != p.REPLY_MAGIC or request is None:
            return False
        start += p.REPLY.size
        if request.kind in WITH_DATA and number == 0:
            end = start + request.length
            if request.into is not None or end > self._end:
                return False
            request.result = bytes(self._view[start:end])
            start = end
        self._start = start
        self._owner.completed(self.lane, cookie, number)
        return True

    async def _reply(self) -> bool:
        """Any reply. False if the server hung up in the middle."""
        magic, number, cookie = p.REPLY.unpack_from(self._buffer, self._start)
        request = self.lane.in_flight.get(cookie)
        if magic != p.REPLY_MAGIC or request is None:
            raise ProtocolError("a reply that nobody waits for")
        self._start += p.REPLY.size
        if request.kind in WITH_DATA and number == 0:
            have = min(request.length, self._end - self._start)
            if not await self._long_read(request, have):
                return False
        self._owner.completed(self.lane, cookie, number)
        return True

    async def _long_read(self, request: Request, have: int) -> bool:
        """A READ whose bytes go where they are wanted, without the receive buffer."""
        into = request.into
        target = self._scratch[: request.length] if into is None else into
        target[:have] = self._view[self._start : self._start + have]
        self._start += have
        while have < request.length:
            try:
                count = self._sock.recv_into(target[have:])
            except BlockingIOError:
                count = await self._recv_into(target[have:])
            if count == 0:
                return False
            have += count
        if into is None:
            request.result = bytes(target)
        return True
