"""CONTROL sessions from clusterd (trio). The blocking ones are in `control_blocking_io`."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import TypeVar

import trio

from cluster.channel_io import tune
from cluster.control import MemberInfo, ServerInfo
from cluster.errors import UnreachableError
from cluster.ids import Epoch, Incarnation, Instance, NodeId
from cluster.messages import Message, decode_message_untrusted, encode_message
from cluster.wire import Keys
from gnbd import messages as m
from gnbd.control.client import CONNECT_TIMEOUT_S, ControlProtocol, InstallRefusedError, expect
from gnbd.control.session import Peer

__all__ = ["Control", "InstallRefusedError", "drive", "open_control"]
A = TypeVar("A")

CUT_MS = 1000
"""A session whose peer does not acknowledge for so long breaks (a cut network): open another."""


class Control:
    """A long-lived session of clusterd (trio). Calls are serialised; when the connection breaks
    every call raises UnreachableError: open a new session."""

    def __init__(self, protocol: ControlProtocol, stream: trio.SocketStream) -> None:
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

    async def ping(self) -> m.Done:
        """A sign of life (R3)."""
        return expect(await self.ask(m.Ping()), m.Done)

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
        return [decode_message_untrusted(payload) for payload in payloads]

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
            tune(stream.socket, CUT_MS)
            protocol = ControlProtocol(keys, identity)
            with trio.fail_after(CONNECT_TIMEOUT_S):
                await drive(protocol.open(secrets.token_bytes(m.NONCE_BYTES)), stream)
            yield Control(protocol, stream)
            return
    raise UnreachableError(
        f"server {server.name} does not answer: {problem}", hint="is gnbd-server running there?"
    )
