"""The control mesh: authenticated TCP between all clusterds, over every network at once.

Two services on the same connections. `send` is unreliable: cores repeat what matters. `call` is a
remote procedure call that survives the loss of a network: the request is sent again until the
answer comes, and the callee runs it once (answers are kept and matched by caller, incarnation and
number). A call ends with UnreachableError when its time is over.

The greater node id dials. Every connection carries a ping per period; the sender takes the first
network on which it has heard something within `link_down_ms`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import msgspec
import trio

from cluster.channel_io import Channel, accept_one, connect, listen
from cluster.control import Failure, Timing
from cluster.control_io import unwrap_group
from cluster.decoding import decode_untrusted
from cluster.errors import (
    AuthenticationError,
    ProtocolError,
    StackError,
    UnreachableError,
    UsageError,
)
from cluster.errors_wire import failure_of, raise_failure
from cluster.identity import Identity
from cluster.ids import NODE_ID_MAX, Incarnation, NodeId
from cluster.wire import Frame

ANSWERS_MAX = 1024
NETWORKS_MAX = 2
STRANGERS_MAX = 256
"""Connections that have not authenticated themselves yet."""
CALL_TIMEOUT_S = 30.0
REDIAL_FIRST_S = 0.05
REDIAL_MAX_S = 0.5
REFUSALS = 5
"""So many dials one after another must end in the handshake before it is told."""


class Ping(msgspec.Struct, frozen=True, tag="p", tag_field="k"):
    """Keeps a path proven."""


class Data(msgspec.Struct, frozen=True, tag="d", tag_field="k"):
    """A message of a core (cluster/messages.py)."""

    body: bytes


class Request(msgspec.Struct, frozen=True, tag="q", tag_field="k"):
    """A call. `life` distinguishes the calls of two lives of a caller."""

    life: int
    number: int
    method: str
    params: dict[str, Any]


class Answer(msgspec.Struct, frozen=True, tag="a", tag_field="k"):
    """The end of a call."""

    life: int
    number: int
    result: Any = None
    error: Failure | None = None


class Greeting(msgspec.Struct, frozen=True):
    """Body of the handshake: which node and network, of which life."""

    node: NodeId
    path: int


_Packet = Ping | Data | Request | Answer
_packets: msgspec.msgpack.Decoder[_Packet] = msgspec.msgpack.Decoder(_Packet)
_greetings = msgspec.msgpack.Decoder(Greeting)

Method = Callable[[NodeId, dict[str, Any]], Awaitable[Any]]
OnMessage = Callable[[NodeId, Incarnation, bytes], None]


class Transport:
    """This node's end of the control mesh. `run` must run in a nursery."""

    def __init__(
        self,
        identity: Identity,
        addresses: Sequence[str],
        port: int,
        timing: Timing,
        on_message: OnMessage,
    ) -> None:
        self._identity = identity
        self._addresses = list(addresses)[:NETWORKS_MAX]
        self._port = port
        self._timing = timing
        self._on_message = on_message
        self.methods: dict[str, Method] = {}
        self.on_wrong_key: Callable[[NodeId], None] = lambda _node: None
        """A peer, at one of its own addresses, has another key (or somebody forges that)."""
        self.on_refused: Callable[[NodeId], None] = lambda _node: None
        """A peer hangs up at our hello again and again."""
        self.on_circuits: Callable[[dict[NodeId, Incarnation]], None] = lambda _up: None
        """The lives of the peers with a connection, whenever that changes."""
        self._up: dict[NodeId, Incarnation] | None = None
        self.epochs: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self._peers: dict[NodeId, list[str]] = {}
        self._dialers: dict[NodeId, list[trio.CancelScope]] = {}
        self._channels: dict[tuple[NodeId, int], Channel] = {}
        self._life = int.from_bytes(os.urandom(7), "little")
        self._number = 0
        self._waiting: dict[int, tuple[trio.Event, list[Answer]]] = {}
        self._answers: OrderedDict[tuple[NodeId, int, int], Answer | None] = OrderedDict()
        self._nursery: trio.Nursery | None = None
        self._strangers = 0

    @property
    def me(self) -> NodeId:
        return NodeId(self._identity.sender)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on every network and keep connections to all peers."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for address in self._addresses:
                nursery.start_soon(self._accept_loop, listen(address, self._port))
            for node in self._peers:
                self._start_dialers(node)
            nursery.start_soon(self._ping_loop)
            task_status.started()

    def set_peers(self, peers: Mapping[NodeId, Sequence[str]]) -> None:
        """Tell the addresses of the other nodes; connections to nodes not named here close."""
        wanted = {node: list(hosts) for node, hosts in peers.items() if node != self.me}
        for node in list(self._peers):
            if wanted.get(node) != self._peers[node]:
                del self._peers[node]
                for scope in self._dialers.pop(node, []):
                    scope.cancel()
                if node not in wanted:
                    for key in [key for key in self._channels if key[0] == node]:
                        self._channels[key].close()
        for node, hosts in wanted.items():
            if node not in self._peers:
                self._peers[node] = hosts
                if self._nursery is not None:
                    self._start_dialers(node)
        self._tell_circuits()

    def _tell_circuits(self) -> None:
        up: dict[NodeId, Incarnation] = {}
        for (node, _path), channel in self._channels.items():
            up[node] = max(up.get(node, Incarnation(0)), channel.peer_incarnation)
        if up != self._up:
            self._up = up
            self.on_circuits(up)

    def _start_dialers(self, node: NodeId) -> None:
        assert self._nursery is not None
        if node > self.me:
            return
        scopes = self._dialers.setdefault(node, [])
        for path in range(min(len(self._addresses), len(self._peers[node]))):
            scopes.append(trio.CancelScope())
            self._nursery.start_soon(self._dial, node, path, scopes[-1])

    def connected(self, node: NodeId) -> list[int]:
        """The networks on which `node` was heard lately."""
        return [path for path in range(NETWORKS_MAX) if self._fresh(node, path)]

    def nodes(self) -> list[NodeId]:
        """Every node with a connection."""
        return sorted({key[0] for key in self._channels})

    def _fresh(self, node: NodeId, path: int) -> bool:
        channel = self._channels.get((node, path))
        if channel is None:
            return False
        silent_s = trio.current_time() - channel.last_received
        return silent_s * 1000 < self._timing.link_down_ms

    def _best(self, node: NodeId) -> Channel | None:
        for path in range(NETWORKS_MAX):
            if self._fresh(node, path):
                return self._channels[node, path]
        for path in range(NETWORKS_MAX):
            if (node, path) in self._channels:
                return self._channels[node, path]
        return None

    def _push(self, channel: Channel, packet: _Packet) -> None:
        epoch, config_epoch = self.epochs()
        channel.push(msgspec.msgpack.encode(packet), epoch, config_epoch)

    def send(self, node: NodeId, body: bytes) -> bool:
        """Send a core's message if there is a connection."""
        channel = self._best(node)
        if channel is None:
            return False
        self._push(channel, Data(body))
        return True

    async def call(
        self,
        node: NodeId,
        method: str,
        params: Mapping[str, Any],
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> Any:
        """Run `method` on the clusterd of `node`, once. Raises what it raised there."""
        if node == self.me:
            return msgspec.to_builtins(await self._find(method)(self.me, dict(params)))
        self._number += 1
        request = Request(self._life, self._number, method, msgspec.to_builtins(dict(params)))
        slot: tuple[trio.Event, list[Answer]] = (trio.Event(), [])
        self._waiting[request.number] = slot
        try:
            with trio.move_on_after(timeout_s):
                while not slot[1]:
                    channel = self._best(node)
                    if channel is not None:
                        self._push(channel, request)
                    with trio.move_on_after(self._timing.link_down_ms / 1000):
                        await slot[0].wait()
        finally:
            del self._waiting[request.number]
        if not slot[1]:
            raise UnreachableError(
                f"node {node} does not answer {method}", hint="see: clusterctl nodes"
            )
        answer = slot[1][0]
        if answer.error is not None:
            raise_failure(answer.error)
        return answer.result

    def _find(self, method: str) -> Method:
        found = self.methods.get(method)
        if found is None:
            raise UsageError(f"no such method between nodes: {method}")
        return found

    async def _ping_loop(self) -> None:
        while True:
            for channel in list(self._channels.values()):
                self._push(channel, Ping())
                silent_s = trio.current_time() - channel.last_received
                if silent_s * 1000 > self._timing.dead_ms:
                    channel.close()
            await trio.sleep(self._timing.heartbeat_ms / 1000)

    async def _dial(self, node: NodeId, path: int, scope: trio.CancelScope) -> None:
        wait_s, refused = REDIAL_FIRST_S, 0
        with scope:
            while True:
                try:
                    sock = await connect(
                        self._peers[node][path], self._port, self._addresses[path],
                        self._timing.dead_ms,
                    )  # fmt: skip
                    channel = Channel(sock, self._identity)
                    with contextlib.closing(channel):
                        hello = msgspec.msgpack.encode(Greeting(self.me, path))
                        frame = await channel.dial(hello, *self.epochs())
                        if frame.sender != node:
                            raise ProtocolError("another node answers there")
                        wait_s, refused = REDIAL_FIRST_S, 0
                        await self._run_channel(channel, node, path)
                except ProtocolError:
                    refused += 1
                    if refused >= REFUSALS:
                        self.on_refused(node)
                except (OSError, trio.TooSlowError):
                    refused = 0
                await trio.sleep(wait_s)
                wait_s = min(wait_s * 2, REDIAL_MAX_S)

    async def _accept_loop(self, listener: socket.socket) -> None:
        with listener:
            while True:
                sock = await accept_one(listener, self._timing.dead_ms)
                if self._strangers >= STRANGERS_MAX:
                    sock.close()  # each of them is gone within HANDSHAKE_S; members dial again
                    continue
                assert self._nursery is not None
                self._nursery.start_soon(self._accepted, sock)

    async def _accepted(self, sock: socket.socket) -> None:
        async def answer(_frame: Frame) -> bytes:
            return msgspec.msgpack.encode(Greeting(self.me, 0))

        channel = Channel(sock, self._identity)
        address = channel.peer_address()
        try:
            with contextlib.closing(channel):
                self._strangers += 1
                try:
                    frame = await channel.accept(answer)
                finally:
                    self._strangers -= 1
                greeting = decode_untrusted(_greetings, frame.payload, "greeting")
                if frame.sender != greeting.node or not 1 <= frame.sender <= NODE_ID_MAX:
                    raise ProtocolError("greeting of somebody else")
                if greeting.node == self.me or not 0 <= greeting.path < NETWORKS_MAX:
                    raise ProtocolError("impossible greeting")
                await self._run_channel(channel, greeting.node, greeting.path)
        except AuthenticationError as error:
            claimed = NodeId(error.claimed_sender)
            if address in self._peers.get(claimed, []):
                self.on_wrong_key(claimed)
        except (OSError, ProtocolError, trio.TooSlowError):
            pass

    async def _run_channel(self, channel: Channel, node: NodeId, path: int) -> None:
        key = (node, path)
        old = self._channels.get(key)
        if old is not None:
            if old.peer_incarnation > channel.peer_incarnation:
                return
            old.close()
        self._channels[key] = channel
        self._tell_circuits()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.write_loop)
                while (frame := await channel.receive()) is not None:
                    self._take(node, channel, decode_untrusted(_packets, frame.payload, "packet"))
                nursery.cancel_scope.cancel()
        except* ProtocolError:
            pass
        finally:
            if self._channels.get(key) is channel:
                del self._channels[key]
                self._tell_circuits()

    def _take(self, node: NodeId, channel: Channel, packet: _Packet) -> None:
        if isinstance(packet, Data):
            self._on_message(node, channel.peer_incarnation, packet.body)
        elif isinstance(packet, Answer):
            slot = self._waiting.get(packet.number)
            if slot is not None and packet.life == self._life and not slot[1]:
                slot[1].append(packet)
                slot[0].set()
        elif isinstance(packet, Request):
            key = (node, packet.life, packet.number)
            if key in self._answers:
                done = self._answers[key]
                if done is not None:
                    self._push(channel, done)
                return
            self._answers[key] = None
            while len(self._answers) > ANSWERS_MAX:
                self._answers.popitem(last=False)
            assert self._nursery is not None
            self._nursery.start_soon(self._serve, node, packet)

    async def _serve(self, node: NodeId, request: Request) -> None:
        try:
            result = await self._find(request.method)(node, request.params)
            answer = Answer(request.life, request.number, msgspec.to_builtins(result))
        except StackError as error:
            answer = Answer(request.life, request.number, error=failure_of(error))
        except Exception as error:
            # One bad call between nodes must not be the death of this one.
            inner = unwrap_group(error) if isinstance(error, BaseExceptionGroup) else error
            text = f"{request.method}: {type(inner).__name__}: {inner}"
            failure = failure_of(inner) if isinstance(inner, StackError) else Failure(text)
            answer = Answer(request.life, request.number, error=failure)
        self._answers[node, request.life, request.number] = answer
        channel = self._best(node)
        if channel is not None:
            self._push(channel, answer)
