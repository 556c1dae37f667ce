"""`GnbdDevice`: one export of one gnbd-server as a block device, over all networks (trio).

One task per path keeps its connections up; per connection a sender (parked unless the socket is
full or requests come while others are in flight: these share one sendmsg) and a receiver that
parses many replies per recv. A request costs no task: its caller parks on a counter. Storage that
is away is waited for; only a bar (`BarredError`) or an error of the store (`DeviceError`) raise.

A dead path is noticed by the kernel: PINGs keep unacknowledged bytes on the wire, and
TCP_USER_TIMEOUT breaks the connection after `dead_ms`. A server that is merely slow is not dead.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Generator, Sequence

import msgspec
import structlog
import trio

from cluster.control import ServerInfo
from cluster.device import Buffer
from cluster.errors import BarredError, ProtocolError, StackError, UnreachableError, UsageError
from cluster.ids import Epoch, Instance
from cluster.paths_io import boottime_ns
from cluster.wire import login_proof
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.client import ClientCore, Lane, Path, Request
from gnbd.control_client_io import drive, option_exchange

RECEIVE_BYTES = 256 << 10
SEND_PARTS_MAX = 512
RETRY_FIRST_S = 0.02
RETRY_MAX_S = 0.25
REQUEST_BYTES_MAX = 4 << 20
DEAD_MS_DEFAULT = 1000
log = structlog.get_logger("gnbd.client")


class Options(msgspec.Struct, frozen=True):
    """How a device behaves. `sequence`: the volume sequence number declared at LOGIN."""

    connections_per_path: int = 1
    dead_ms: int = DEAD_MS_DEFAULT
    sequence: int = 0


class _Group:
    """A caller that waits for some requests."""

    __slots__ = ("error", "left", "task")

    def __init__(self, count: int) -> None:
        self.left = count
        self.error: StackError | None = None
        self.task: trio.lowlevel.Task | None = None

    def done(self, error: StackError | None) -> None:
        self.left -= 1
        if error is not None and self.error is None:
            self.error = error
        if self.left == 0 and self.task is not None:
            task, self.task = self.task, None
            trio.lowlevel.reschedule(task)

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


class _Link:
    """One connection in transmission: socket, sender, receiver."""

    def __init__(
        self, device: GnbdDevice, lane: Lane, sock: socket.socket, scope: trio.CancelScope
    ) -> None:
        self._device = device
        self.lane = lane
        self._sock = sock
        self._scope = scope
        self._out: list[Buffer] = []
        self._sender: trio.lowlevel.Task | None = None
        self._sender_busy = False
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        # One long READ is received at a time; a fresh buffer for each would cost page faults.
        self._scratch = memoryview(bytearray(REQUEST_BYTES_MAX))
        self._start = 0
        self._end = 0

    # -- sending ---------------------------------------------------------------------------

    def post(self, request: Request) -> None:
        """Append one request to what goes out."""
        self._out.append(request.header())
        if request.kind == p.CMD_WRITE:
            assert request.data is not None
            self._out.append(request.data)

    def kick(self, alone: bool) -> None:
        """Send: at once if nothing else is in flight (nothing to share a call with), else by the
        sender, after the other runnable tasks have had their say."""
        if self._sender_busy or not self._out:
            return
        if alone and not self._send_some():
            return
        if self._out and self._sender is not None:
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
                if not await self._fill():
                    return
                while self._end - self._start >= p.REPLY.size:
                    if not await self._reply():
                        return
                self._device.pump()
        except (OSError, ProtocolError, trio.ClosedResourceError) as error:
            log.debug("connection lost", server=self._device.server.name, error=str(error))
        finally:
            self._scope.cancel()

    async def _fill(self) -> bool:
        """At least one more byte in the buffer."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        count = await self._recv_into(self._view[self._end :])
        self._end += count
        return count > 0

    async def _recv_into(self, view: memoryview) -> int:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                return self._sock.recv_into(view)
            except BlockingIOError:
                continue

    async def _reply(self) -> bool:
        """One reply from the buffer. False if the server hung up in the middle."""
        magic, number, cookie = p.REPLY.unpack_from(self._buffer, self._start)
        request = self.lane.in_flight.get(cookie)
        if magic != p.REPLY_MAGIC or request is None:
            raise ProtocolError("a reply that nobody waits for")
        self._start += p.REPLY.size
        if request.kind == p.CMD_READ and number == 0:
            length = request.length
            have = min(length, self._end - self._start)
            if request.into is None and have == length:
                request.result = bytes(self._view[self._start : self._start + length])
                self._start += length
            elif not await self._long_read(request, have):
                return False
        self._device.core.completed(self.lane, cookie, number)
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


class GnbdDevice:
    """A `cluster.device.BlockDevice`. Make it with `open_device`."""

    def __init__(
        self, server: ServerInfo, export: str, instance: Instance, secret: bytes, options: Options
    ) -> None:
        self.server = server
        self.export = export
        self.core = ClientCore(len(server.addresses), boottime_ns())
        self._instance = instance
        self._secret = secret
        self._options = options
        self._sequence = options.sequence
        self._links: dict[int, _Link] = {}
        self._scopes: dict[int, trio.CancelScope] = {}
        self._wake = trio.Event()
        self._opened = trio.Event()
        self._fatal: StackError | None = None
        self._scope = trio.CancelScope()
        self._closed = False

    # -- BlockDevice -----------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self.core.size_bytes

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        if length_bytes > REQUEST_BYTES_MAX:
            return b"".join(await self.read_many(_chunks(offset_bytes, length_bytes)))
        return (await self.read_many([(offset_bytes, length_bytes)]))[0]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        group = _Group(len(ranges))
        requests = [Request(p.CMD_READ, o, n, waiter=group) for o, n in ranges]
        await self._run(group, requests)
        return [request.result for request in requests]

    async def read_into(self, offset_bytes: int, view: memoryview) -> None:
        """Read straight into a buffer; do not touch it before the return."""
        group = _Group(1)
        request = Request(p.CMD_READ, offset_bytes, len(view), waiter=group)
        request.into = view
        await self._run(group, [request])

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await self.write_many([(offset_bytes, data)], fua=fua)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        flags = p.CMD_FLAG_FUA if fua else 0
        group = _Group(0)
        requests = []
        for offset, data in parts:
            if len(data) <= REQUEST_BYTES_MAX:
                requests.append(Request(p.CMD_WRITE, offset, len(data), data, flags, group))
                continue
            view = memoryview(data)
            for start, length in _chunks(0, len(data)):
                piece = view[start : start + length]
                requests.append(Request(p.CMD_WRITE, offset + start, length, piece, flags, group))
        group.left = len(requests)
        await self._run(group, requests)

    async def flush(self) -> None:
        group = _Group(1)
        await self._run(group, [Request(p.CMD_FLUSH, waiter=group)])

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        group = _Group(1)
        await self._run(group, [Request(p.CMD_TRIM, offset_bytes, length_bytes, waiter=group)])

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        group = _Group(1)
        request = Request(p.CMD_WRITE_ZEROES, offset_bytes, length_bytes, waiter=group)
        await self._run(group, [request])

    # -- cluster ---------------------------------------------------------------------------

    def set_epoch(self, required: Epoch) -> None:
        """Rule R3: requests wait until the server is known to have installed this epoch."""
        self.core.set_epoch(required)

    def note_installed(self, epoch: Epoch) -> None:
        """The server has installed this epoch (from the view)."""
        self.core.note_installed(epoch)
        self._retry_now()
        self.pump()

    async def set_sequence(self, sequence: int) -> None:
        """Declare the volume sequence number that this instance works with. Call it while nothing
        is in flight; it is declared again at every LOGIN."""
        self._sequence = sequence
        group = _Group(1)
        await self._run(group, [Request(p.CMD_SEQUENCE, sequence, waiter=group)])

    def status(self) -> dict[str, object]:
        """For humans: paths, requests, epochs."""
        core = self.core
        return {
            "server": self.server.name,
            "export": self.export,
            "paths": [len(path.lanes) for path in core.paths],
            "pending": len(core.all_requests()),
            "retained_bytes": core.retained.bytes,
            "installed": core.installed,
            "required": core.required,
            "barred": core.barred,
        }

    async def aclose(self) -> None:
        """End cleanly: the registration at the server goes. Nothing may be in flight."""
        if self._closed:
            return
        self._closed = True
        link = next(iter(self._links.values()), None)
        if link is not None and self.core.barred is None:
            group = _Group(1)
            request = Request(p.CMD_LOGOUT, waiter=group)
            self.core.place_private(link.lane, request)
            link.post(request)
            link.kick(True)
            with trio.move_on_after(self._options.dead_ms / 1000):
                await group.wait()
        self._scope.cancel()

    # -- requests --------------------------------------------------------------------------

    async def _run(self, group: _Group, requests: list[Request]) -> None:
        if self._closed:
            raise StackError("the device is closed")
        core = self.core
        for request in requests:
            core.submit(request)
        self.pump()
        await group.wait()

    def pump(self) -> None:
        """Send whatever may be sent."""
        core = self.core
        if any(path.stranded for path in core.paths):
            self._send_drains()
        if not core.queue and not core.urgent:
            return
        idle = {id(link) for link in self._links.values() if not link.lane.in_flight}
        used: dict[int, _Link] = {}
        for lane, request in core.assign():
            link = self._links[id(lane)]
            link.post(request)
            used[id(link)] = link
        for key, link in used.items():
            link.kick(key in idle)

    def _send_drains(self) -> None:
        for drain in self.core.drains():
            link = self._links[id(drain.lane)]
            waiter = _DrainWaiter(self, drain.path, drain.generation)
            request = Request(p.CMD_DRAIN, drain.generation, drain.path.index, waiter=waiter)
            self.core.place_private(drain.lane, request)
            link.post(request)
            link.kick(True)

    # -- paths -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep all paths up; ends with `aclose`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                for path in self.core.paths:
                    nursery.start_soon(self._path_loop, path)
        self.core.fail_all(StackError("the device is closed"))
        self._opened.set()

    async def wait_open(self) -> None:
        """Return when the first path is up. Raises what makes that impossible."""
        await self._opened.wait()
        if self._fatal is not None:
            raise self._fatal
        if self.core.barred is not None:
            raise BarredError(self.core.barred)

    def _retry_now(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    async def _path_loop(self, path: Path) -> None:
        delay_s = RETRY_FIRST_S
        while self.core.barred is None:
            began_ns = boottime_ns()
            with trio.CancelScope() as scope:
                self._scopes[path.index] = scope
                await self._path_once(path, scope)
            if self.core.barred is not None:
                break
            if boottime_ns() - began_ns > 1_000_000_000:
                delay_s = RETRY_FIRST_S
            with trio.move_on_after(delay_s):
                await self._wake.wait()
            delay_s = min(delay_s * 2, RETRY_MAX_S)
        self._opened.set()

    async def _path_once(self, path: Path, scope: trio.CancelScope) -> None:
        """One life of a path: connect, serve, clean up."""
        sockets: list[socket.socket] = []
        links: list[_Link] = []
        try:
            async with trio.open_nursery() as nursery:
                for _ in range(self._options.connections_per_path):
                    sock = await self._connect(path)
                    sockets.append(sock)
                    if not await self._negotiate(path, sock):
                        scope.cancel()
                        return
                    link = _Link(self, self.core.lane_up(path), sock, scope)
                    links.append(link)
                    self._links[id(link.lane)] = link
                    nursery.start_soon(link.receive_loop)
                    nursery.start_soon(link.send_loop)
                nursery.start_soon(self._ping_loop, links)
                self._opened.set()
                self.pump()
        except* (OSError, StackError) as group:
            log.debug("path", server=self.server.name, path=path.index, error=str(group.exceptions))
        finally:
            for link in links:
                self._links.pop(id(link.lane), None)
            for sock in sockets:
                sock.close()
            self.core.path_lost(path)
            self.pump()

    async def _ping_loop(self, links: list[_Link]) -> None:
        """Keeps bytes on the wire, so that the kernel notices a dead path."""
        while True:
            await trio.sleep(self._options.dead_ms / 4000)
            for link in links:
                if not any(r.kind == p.CMD_PING for r in link.lane.in_flight.values()):
                    request = Request(p.CMD_PING)
                    alone = not link.lane.in_flight
                    self.core.place_private(link.lane, request)
                    link.post(request)
                    link.kick(alone)

    async def _connect(self, path: Path) -> socket.socket:
        address = self.server.addresses[path.index]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = trio.socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self._options.dead_ms)
            with trio.fail_after(self._options.dead_ms / 1000):
                await sock.connect((address, self.server.port))
        except trio.TooSlowError as error:
            sock.close()
            raise UnreachableError(f"{address} does not answer") from error
        except BaseException:
            sock.close()
            raise
        plain = socket.socket(fileno=os.dup(sock.fileno()))
        sock.close()
        plain.setblocking(False)
        return plain

    async def _negotiate(self, path: Path, sock: socket.socket) -> bool:
        """Greeting, LOGIN, GO. False: not now."""
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock.dup()))
        async with stream:
            hello = m.LoginHello(
                self._instance, self.export, path.index, path.generation,
                secrets.token_bytes(m.NONCE_BYTES), self._sequence,
            )  # fmt: skip
            result = await drive(_login(hello, self._secret), stream)
            if not self._login_answer(path, result):
                return False
            size_bytes = await drive(_go(self.export), stream)
        cut = self.core.logged_in(path, result.epoch, result.cache_generation, size_bytes)
        for other in cut:
            self._scopes[other.index].cancel()
            for lane in other.lanes:
                self._links.pop(id(lane), None)
            self.core.path_lost(other)
        return True

    def _login_answer(self, path: Path, result: m.LoginResult) -> bool:
        match result.status:
            case m.LOGIN_OK:
                return True
            case m.LOGIN_BARRED:
                self.core.bar(result.message)
                self._retry_now()
            case m.LOGIN_OLD_GENERATION:
                self.core.generation_floor(path, result.generation)
            case m.LOGIN_NO_EXPORT | m.LOGIN_REFUSED if not self._opened.is_set():
                self._fatal = UsageError(f"server {self.server.name}: {result.message}")
                self._opened.set()
        return False


class _DrainWaiter:
    """Takes the answer to a DRAIN."""

    def __init__(self, device: GnbdDevice, path: Path, generation: int) -> None:
        self._device = device
        self._path = path
        self._generation = generation

    def done(self, error: StackError | None) -> None:
        if error is None:
            self._device.core.drained(self._path, self._generation)


def _chunks(offset: int, length: int) -> list[tuple[int, int]]:
    limit = REQUEST_BYTES_MAX
    return [(offset + at, min(limit, length - at)) for at in range(0, length, limit)]


def _login(hello: m.LoginHello, secret: bytes) -> Generator[bytes | int, bytes, m.LoginResult]:
    """Greeting and LOGIN; checks that the server knows the secret too."""
    magic, option_magic, flags = p.GREETING.unpack((yield p.GREETING.size))
    if (magic, option_magic) != (p.INIT_MAGIC, p.OPTION_MAGIC) or not flags & 1:
        raise ProtocolError("this is not a fixed newstyle NBD server")
    yield (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES).to_bytes(4, "big")
    try:
        raw = yield from option_exchange(p.OPT_LOGIN, msgspec.msgpack.encode(hello))
        nonce = msgspec.msgpack.decode(raw, type=m.LoginNonce).nonce
        proof = login_proof(secret, nonce, hello.path, hello.generation)
        raw = yield from option_exchange(p.OPT_LOGIN, msgspec.msgpack.encode(m.LoginProof(proof)))
        result = msgspec.msgpack.decode(raw, type=m.LoginResult)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"bad login answer: {error}") from error
    expected = login_proof(secret, hello.nonce, hello.path, hello.generation)
    if result.status != m.LOGIN_REFUSED and not secrets.compare_digest(result.proof, expected):
        raise ProtocolError("the server does not know the secret of this instance")
    return result


def _go(export: str) -> Generator[bytes | int, bytes, int]:
    """GO; gives the size. Transmission begins with the return."""
    yield p.option(p.OPT_GO, p.go_data(export))
    size_bytes = 0
    while True:
        magic, option, kind, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC or option != p.OPT_GO or length > p.OPTION_BYTES_MAX:
            raise ProtocolError("bad option reply")
        body = (yield length) if length else b""
        if kind == p.REP_ACK:
            return size_bytes
        if kind & p.REP_ERROR:
            raise StackError(f"the server refuses: {body.decode(errors='replace')}")
        if kind == p.REP_INFO and len(body) == p.EXPORT_INFO.size:
            number, size, _flags = p.EXPORT_INFO.unpack(body)
            if number == p.INFO_EXPORT:
                size_bytes = size


async def open_device(
    server: ServerInfo,
    export: str,
    instance: Instance,
    secret: bytes,
    nursery: trio.Nursery,
    options: Options | None = None,
) -> GnbdDevice:
    """Open one export; its tasks live in `nursery`. Waits until a path is up. Raises BarredError,
    or UsageError if the server has no such export."""
    device = GnbdDevice(server, export, instance, secret, options or Options())
    nursery.start_soon(device.run)
    try:
        await device.wait_open()
    except BaseException:
        device._scope.cancel()
        raise
    return device
