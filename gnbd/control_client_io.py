"""CONTROL sessions from outside: for clusterd (trio) and for command-line tools (blocking).

Both speak through dialogues, generators that yield bytes to send or a count of bytes to read,
so that the protocol stands in one place.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import msgspec
import trio

from cluster.control import MemberInfo, ServerInfo
from cluster.errors import ProtocolError, StackError, UnreachableError, UsageError
from cluster.ids import Epoch, Incarnation, Instance, NodeId
from cluster.messages import Message, decode_message_untrusted, encode_message
from cluster.wire import Keys
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.control_session import ControlSession, Peer
from gnbd.dialogues import option_exchange

CONNECT_TIMEOUT_S = 5.0
A = TypeVar("A")
T = TypeVar("T", bound=m.Answer)


class InstallRefusedError(StackError):
    """The server has a later epoch, or another keep-list for this one."""

    def __init__(self, message: str, epoch: Epoch) -> None:
        super().__init__(message)
        self.epoch = epoch


class _Protocol:
    """The client's end of one CONTROL session as dialogues."""

    def __init__(self, keys: Keys, identity: Peer) -> None:
        self._keys = keys
        self._identity = identity
        self._session: ControlSession | None = None
        self.server_id = 0
        self.server_name = ""
        self.epoch = Epoch(0)
        """The epoch that the server had installed at its last answer."""

    def open(self) -> Generator[bytes | int, bytes, None]:
        """Greeting, flags, nonces."""
        greeting = yield p.GREETING.size
        magic, option_magic, flags = p.GREETING.unpack(greeting)
        if (magic, option_magic) != (p.INIT_MAGIC, p.OPTION_MAGIC) or not flags & 1:
            raise ProtocolError("this is not a fixed newstyle NBD server")
        yield (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES).to_bytes(4, "big")
        nonce = secrets.token_bytes(m.NONCE_BYTES)
        raw = yield from option_exchange(
            p.OPT_CONTROL, msgspec.msgpack.encode(m.ControlHello(nonce))
        )
        try:
            welcome = msgspec.msgpack.decode(raw, type=m.ControlWelcome)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"bad welcome: {error}") from error
        self.server_id, self.server_name = welcome.server_id, welcome.name
        self._session = ControlSession(self._keys, self._identity, nonce, welcome.nonce)

    def ask(self, request: m.Request) -> Generator[bytes | int, bytes, m.Answer]:
        """One request and its answer."""
        session = self._session
        assert session is not None
        sealed = session.seal(msgspec.msgpack.encode(request), self.epoch)
        frame = session.open_untrusted((yield from option_exchange(p.OPT_CONTROL, sealed)))
        self.epoch = frame.epoch
        try:
            return m.decode_answer_untrusted(frame.payload)
        except msgspec.DecodeError as error:
            raise ProtocolError(f"bad answer: {error}") from error


def expect(answer: m.Answer, kind: type[T]) -> T:
    """The answer as what it must be, or the refusal as an error."""
    if isinstance(answer, m.Refused):
        if answer.kind == "epoch":
            raise InstallRefusedError(answer.message, answer.epoch)
        raise (UsageError if answer.kind == "usage" else StackError)(answer.message)
    if not isinstance(answer, kind):
        raise ProtocolError("an answer of the wrong kind")
    return answer


class Control:
    """A long-lived session of clusterd (trio). Calls are serialised; when the connection breaks
    every call raises UnreachableError: open a new session."""

    def __init__(self, protocol: _Protocol, stream: trio.SocketStream) -> None:
        self._protocol = protocol
        self._stream = stream
        self._lock = trio.Lock()
        self._broken = False

    @property
    def server_id(self) -> int:
        return self._protocol.server_id

    @property
    def epoch(self) -> Epoch:
        """The epoch that the server had installed at its last answer."""
        return self._protocol.epoch

    async def ask(self, request: m.Request) -> m.Answer:
        """One request. A cancelled call breaks the session: its answer would be taken for the
        next one's."""
        async with self._lock:
            if self._broken:
                raise UnreachableError("the control session is broken")
            self._broken = True
            answer = await drive(self._protocol.ask(request), self._stream)
            self._broken = False
            return answer

    async def ping(self) -> Epoch:
        """A sign of life (R3); gives the installed epoch."""
        return expect(await self.ask(m.Ping()), m.Done).epoch

    async def install(
        self,
        epoch: Epoch,
        members: list[MemberInfo],
        tombstones: dict[NodeId, Incarnation] | None = None,
        dead_ms: int = 10_000,
    ) -> Epoch:
        """Rule R2. Raises InstallRefusedError with the server's epoch."""
        request = m.Install(epoch, members, tombstones or {}, dead_ms)
        return expect(await self.ask(request), m.Done).epoch

    async def cluster_call(self, message: Message) -> list[Message]:
        """One `cluster.messages` message (acceptor or Install); gives what comes back."""
        answer = await self.ask(m.ClusterCall(encode_message(message)))
        payloads = expect(answer, m.ClusterAnswer).payloads
        try:
            return [decode_message_untrusted(payload) for payload in payloads]
        except msgspec.DecodeError as error:
            raise ProtocolError(f"bad cluster message: {error}") from error

    async def persistent_reserve_out(self, request: m.ReserveOut) -> m.ReserveResult:
        return expect(await self.ask(request), m.ReserveResult)

    async def persistent_reserve_in(self, export: str) -> m.ReserveReport:
        return expect(await self.ask(m.ReserveIn(export)), m.ReserveReport)

    async def status(self) -> m.StatusReport:
        return expect(await self.ask(m.StatusRequest()), m.StatusReport)

    async def exports(self) -> list[m.ExportReport]:
        return expect(await self.ask(m.ExportsRequest()), m.ExportsReport).exports

    async def filter(
        self, export: str, action: str, kind: str, parameters: dict[str, int | str] | None = None
    ) -> None:
        """`action`: add, set or remove."""
        request = m.FilterCommand(export, action, kind, parameters or {})
        expect(await self.ask(request), m.Done)

    async def raise_minimum(self, export: str, sequence: int) -> None:
        """Refuse nexuses with a lower volume sequence number; they are drained on return."""
        expect(await self.ask(m.SequenceMinimum(export, sequence)), m.Done)

    async def leave(self, instance: Instance) -> None:
        """The instance ended cleanly."""
        expect(await self.ask(m.Leave(instance)), m.Done)


async def drive(dialogue: Generator[bytes | int, bytes, A], stream: trio.SocketStream) -> A:
    buffer = bytearray()
    try:
        wanted = next(dialogue)
        while True:
            if isinstance(wanted, bytes):
                await stream.send_all(wanted)
                wanted = next(dialogue)
                continue
            while len(buffer) < wanted:
                data = await stream.receive_some(wanted - len(buffer))
                if not data:
                    raise UnreachableError("the server closed the control session")
                buffer += data
            piece, buffer = bytes(buffer), bytearray()
            wanted = dialogue.send(piece)
    except StopIteration as stop:
        result: A = stop.value
        return result
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise UnreachableError(f"the control session broke: {error}") from error


@asynccontextmanager
async def open_control(
    server: ServerInfo, keys: Keys, identity: Peer, *, network: int | None = None
) -> AsyncIterator[Control]:
    """A session to a server over the given network, else over the first that answers. `identity`:
    NodeId, cluster id and incarnation of the caller. Raises UnreachableError."""
    chosen = server.addresses if network is None else [server.addresses[network]]
    problem: Exception | None = None
    for address in chosen:
        try:
            with trio.fail_after(CONNECT_TIMEOUT_S):
                stream = await trio.open_tcp_stream(address, server.port)
        except (OSError, trio.TooSlowError) as error:
            problem = error
            continue
        async with stream:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            protocol = _Protocol(keys, identity)
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await drive(protocol.open(), stream)
            yield Control(protocol, stream)
            return
    raise UnreachableError(
        f"server {server.name} does not answer: {problem}", hint="is gnbd-server running there?"
    )


class BlockingControl:
    """The same for command-line tools, without trio."""

    def __init__(self, protocol: _Protocol, sock: socket.socket) -> None:
        self._protocol = protocol
        self._sock = sock

    @property
    def server_id(self) -> int:
        return self._protocol.server_id

    def ask(self, request: m.Request, kind: type[T]) -> T:
        """One request; a refusal is raised."""
        return expect(_drive_blocking(self._protocol.ask(request), self._sock), kind)


def _drive_blocking(dialogue: Generator[bytes | int, bytes, A], sock: socket.socket) -> A:
    try:
        wanted = next(dialogue)
        while True:
            if isinstance(wanted, bytes):
                sock.sendall(wanted)
                wanted = next(dialogue)
                continue
            data = bytearray()
            while len(data) < wanted:
                more = sock.recv(wanted - len(data))
                if not more:
                    raise UnreachableError("the server closed the control session")
                data += more
            wanted = dialogue.send(bytes(data))
    except StopIteration as stop:
        result: A = stop.value
        return result
    except OSError as error:
        raise UnreachableError(f"the control session broke: {error}") from error


@contextmanager
def open_blocking(
    addresses: Sequence[str], port: int, keys: Keys, identity: Peer, timeout_s: float = 30.0
) -> Iterator[BlockingControl]:
    """A blocking session over the first address that answers. Raises UnreachableError."""
    problem: Exception | None = None
    for address in addresses:
        try:
            sock = socket.create_connection((address, port), CONNECT_TIMEOUT_S)
        except OSError as error:
            problem = error
            continue
        with sock:
            sock.settimeout(timeout_s)
            protocol = _Protocol(keys, identity)
            _drive_blocking(protocol.open(), sock)
            yield BlockingControl(protocol, sock)
            return
    raise UnreachableError(
        f"no server answers at {', '.join(addresses)} port {port}: {problem}",
        hint="is gnbd-server running there?",
    )
