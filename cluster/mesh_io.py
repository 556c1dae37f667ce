"""The mesh over TCP: one connection per network and member; the core decides what goes where.

The greater instance dials the smaller one, on every network, for as long as both are members.
A hello of somebody whose membership we have not heard of yet is parked (at most `PARKED_MAX`, at
most `PARKED_S`), because group events reach the members at slightly different times.
Use:

    async with open_mesh(me, addresses, key, group="fs-vg0-vol0") as mesh:
        await session.call("group.join", {"group": ..., "addresses": ..., "port": mesh.port})
        mesh.start(deliver)                 # Message(source, payload), View(event), in order
        ... on control event "group": mesh.group_event(event)
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections import deque
from collections.abc import AsyncIterator, Sequence

import msgspec
import trio

from cluster.channel_io import Channel, accept_one, connect, listen
from cluster.control import GroupEvent, GroupMember
from cluster.control_io import unwrap_group
from cluster.decoding import decode_untrusted
from cluster.errors import BusyError, ProtocolError
from cluster.identity import Identity
from cluster.ids import Instance
from cluster.mesh import (
    PATHS_MAX,
    RETRIES_PER_ACK,
    Batch,
    Closed,
    Deliver,
    Hello,
    MeshAction,
    MeshCore,
    MeshEvent,
    Opened,
    Out,
    Transmit,
)
from cluster.paths_io import boottime_ns
from cluster.wire import Frame, Keys

PARKED_MAX = 64
PARKED_S = 10.0
STRANGERS_MAX = 256
"""Connections that have not authenticated themselves yet, the parked ones among them."""
EARLY_MAX = 1 << 16
REDIAL_FIRST_S = 0.02
REDIAL_MAX_S = 0.5
DEAD_MS = 3000

_batches = msgspec.msgpack.Decoder(Batch)
_hellos = msgspec.msgpack.Decoder(Hello)


class TrioMesh:
    """A member's end of the mesh; made by `open_mesh`. Implements `cluster.mesh.Mesh`."""

    def __init__(
        self, me: Instance, group: str, key: bytes | None, retry_ms: int, nursery: trio.Nursery
    ) -> None:
        self._core = MeshCore(me, int.from_bytes(os.urandom(7), "little"), retry_ms * 1_000_000)
        self._group = group
        self._key = key
        self._nursery = nursery
        self._sources: list[str] = []
        self._channels: dict[tuple[Instance, int], Channel] = {}
        self._dialers: dict[Instance, list[trio.CancelScope]] = {}
        self._deliver: Deliver | None = None
        self._early: deque[MeshEvent] = deque()
        self._pump: trio.lowlevel.Task | None = None
        self._due = False
        self._receiving = False
        self._busy = trio.Event()
        self._tick_s = retry_ms / 1000 / RETRIES_PER_ACK
        self._changed = trio.Event()
        self._parked = 0
        self._strangers = 0
        self.port = 0

    @property
    def me(self) -> Instance:
        return self._core.me

    def start(self, deliver: Deliver) -> None:
        """Begin delivery; what came before is delivered now, in order."""
        self._deliver = deliver
        while self._early:
            deliver(self._early.popleft())

    def send(self, to: Instance, payload: bytes) -> None:
        """Queue a message; all messages of one scheduler tick leave in one frame, and all that
        answer a frame."""
        self._core.send(to, payload)
        if not self._receiving:
            self._wake()

    def group_event(self, event: GroupEvent) -> None:
        """Take a group event (control event `group`)."""
        if self._key is None and event.mesh_key:
            self._key = bytes.fromhex(event.mesh_key)
        self._perform(self._core.group_event(event))
        self._wake()
        self._changed.set()
        self._changed = trio.Event()

    def paths(self, peer: Instance) -> list[int]:
        """The networks on which `peer` is connected now (for status)."""
        link = self._core.links.get(peer)
        return sorted(link.paths) if link is not None else []

    def unreached(self) -> list[tuple[Instance, int]]:
        """The other members that no connection leads to, and how many connections there have been;
        none of them when this end closes."""
        if self._nursery.cancel_scope.cancel_called:
            return []
        return sorted(
            (p, link.connections) for p, link in self._core.links.items() if not link.paths
        )

    def _perform(self, actions: Sequence[MeshAction]) -> None:
        for action in actions:
            if isinstance(action, Out):
                self._out(action.event)
            elif isinstance(action, Transmit):
                channel = self._channels.get((action.peer, action.path))
                if channel is not None:
                    channel.push(msgspec.msgpack.encode(action.batch))
            elif isinstance(action, Opened):
                self._open(action.member)
            elif isinstance(action, Closed):
                self._close(action.peer)

    def _out(self, event: MeshEvent) -> None:
        if self._deliver is not None:
            self._deliver(event)
        else:
            assert len(self._early) < EARLY_MAX, "mesh.start was not called"
            self._early.append(event)

    def _open(self, member: GroupMember) -> None:
        if self.me < member.instance:
            return
        scopes = self._dialers.setdefault(member.instance, [])
        for path in range(min(len(self._sources), len(member.addresses), PATHS_MAX)):
            scopes.append(trio.CancelScope())
            self._nursery.start_soon(self._dial, member, path, scopes[-1])

    def _close(self, peer: Instance) -> None:
        for scope in self._dialers.pop(peer, []):
            scope.cancel()
        for key in [key for key in self._channels if key[0] == peer]:
            self._channels.pop(key).close()

    def _identity(self) -> Identity:
        assert self._key is not None
        group = hashlib.blake2b(self._group.encode(), digest_size=16).digest()
        return Identity(self.me.node, group, self.me.incarnation, Keys(0, {0: self._key}))

    def _hello(self, to: Instance, path: int) -> bytes:
        link = self._core.links.get(to)
        received = link.received if link is not None else 0
        hello = Hello(self._group, self.me, to, self._core.mesh_id, path, b"", received)
        return msgspec.msgpack.encode(hello)

    async def _dial(self, member: GroupMember, path: int, scope: trio.CancelScope) -> None:
        wait_s = REDIAL_FIRST_S
        with scope:
            while True:
                try:
                    source = self._sources[path]
                    sock = await connect(member.addresses[path], member.port, source, DEAD_MS)
                    channel = Channel(sock, self._identity())
                    with contextlib.closing(channel):
                        reply = await channel.dial(self._hello(member.instance, path))
                        hello = decode_untrusted(_hellos, reply.payload, "hello")
                        if hello.instance != member.instance or not self._core.hello_ok(hello):
                            raise ProtocolError("another process answers there")
                        wait_s = REDIAL_FIRST_S
                        await self._run(channel, hello)
                except (OSError, ProtocolError, trio.TooSlowError):
                    pass
                await trio.sleep(wait_s)
                wait_s = min(wait_s * 2, REDIAL_MAX_S)

    async def _answer(self, frame: Frame) -> bytes:
        """Decide on a dialer's hello; waits while its membership is not known here."""
        hello = decode_untrusted(_hellos, frame.payload, "hello")
        if hello.to != self.me or hello.group != self._group or not 0 <= hello.path < PATHS_MAX:
            raise ProtocolError("hello for somebody else")
        if not self._core.hello_ok(hello):
            if self._parked >= PARKED_MAX:
                raise ProtocolError("too many unknown members")
            self._parked += 1
            try:
                with trio.fail_after(PARKED_S):
                    while not self._core.hello_ok(hello):
                        await self._changed.wait()
            finally:
                self._parked -= 1
        return self._hello(hello.instance, hello.path)

    async def _accepted(self, sock: socket.socket) -> None:
        try:
            self._strangers += 1
            try:
                with trio.fail_after(PARKED_S):
                    while self._key is None:
                        await self._changed.wait()
                channel = Channel(sock, self._identity())
                accepted = await channel.accept(self._answer)
            finally:
                self._strangers -= 1
            with contextlib.closing(channel):
                hello = decode_untrusted(_hellos, accepted.payload, "hello")
                if self._core.hello_ok(hello):
                    await self._run(channel, hello)
        except (OSError, ProtocolError, trio.TooSlowError):
            pass
        finally:
            sock.close()

    async def _run(self, channel: Channel, hello: Hello) -> None:
        """Carry frames of one connection until it breaks or a newer one replaces it."""
        key = (hello.instance, hello.path)
        old = self._channels.get(key)
        if old is not None:
            old.close()
            self._core.path_down(*key)
        self._channels[key] = channel
        self._core.path_up(hello)
        self._wake()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(channel.write_loop)
                while (frame := await channel.receive()) is not None:
                    if self._channels.get(key) is not channel:
                        break
                    batch = decode_untrusted(_batches, frame.payload, "batch")
                    self._receive(key[0], batch)
                nursery.cancel_scope.cancel()
        except* ProtocolError:
            pass
        finally:
            if self._channels.get(key) is channel:
                del self._channels[key]
                self._core.path_down(*key)
                self._wake()

    def _receive(self, peer: Instance, batch: Batch) -> None:
        """Take a batch, and send what it brings about."""
        self._receiving = True
        try:
            self._perform(self._core.receive(peer, batch))
        finally:
            self._receiving = False
        self._busy.set()
        self.flush()

    def flush(self) -> None:
        """Transmit what is queued now."""
        self._perform(self._core.tick(boottime_ns()))

    def _wake(self) -> None:
        """Let the pump run in the next tick of the scheduler."""
        self._busy.set()
        if not self._due:
            self._due = True
            if self._pump is not None:
                trio.lowlevel.reschedule(self._pump)
                self._pump = None

    async def pump(self) -> None:
        """Transmit what was queued, once per tick."""
        while True:
            if not self._due:
                self._pump = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort_pump)
            else:
                await trio.lowlevel.checkpoint()
            self._due = False
            self.flush()

    def _abort_pump(self, _raise_cancel: object) -> trio.lowlevel.Abort:
        self._pump = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def watch(self) -> None:
        """Acknowledge what nothing answers; switch paths that do not acknowledge."""
        while True:
            await self._busy.wait()
            due = self._core.deadline()
            if due is None:
                self._busy = trio.Event()
                continue
            # Another deadline may have come before this one meanwhile.
            await trio.sleep(min(self._tick_s, max(0, due - boottime_ns()) / 1e9))
            if self._core.deadline() is not None:
                self.flush()

    async def listen(self, addresses: Sequence[str]) -> None:
        """Bind one port on all addresses and accept on each."""
        listeners = _listen_all(addresses)
        self.port = listeners[0].getsockname()[1]
        self._sources = list(addresses)
        for listener in listeners:
            self._nursery.start_soon(self._accept_loop, listener)

    async def _accept_loop(self, listener: socket.socket) -> None:
        with listener:
            while True:
                sock = await accept_one(listener, DEAD_MS)
                if self._strangers >= STRANGERS_MAX:
                    sock.close()  # each of them is gone within PARKED_S; members dial again
                    continue
                self._nursery.start_soon(self._accepted, sock)


def _listen_all(addresses: Sequence[str]) -> list[socket.socket]:
    """Sockets on all addresses with the same port, chosen by the kernel on the first one."""
    for _attempt in range(32):
        first = listen(addresses[0], 0)
        port = first.getsockname()[1]
        sockets = [first]
        try:
            for address in addresses[1:]:
                sockets.append(listen(address, port))
        except BusyError:
            for sock in sockets:
                sock.close()
            continue
        return sockets
    raise BusyError(f"no port is free on all of {', '.join(addresses)}")


@contextlib.asynccontextmanager
async def open_mesh(
    me: Instance,
    addresses: Sequence[str],
    key: bytes | None = None,
    *,
    group: str = "",
    retry_ms: int = 300,
) -> AsyncIterator[TrioMesh]:
    """Listen on `addresses` (one per network) and run the mesh for the life of the block.

    `key` None: it is taken from the first group event. `retry_ms`: after so long without an
    acknowledgement another network is used (`Timing.link_down_ms`).
    """
    try:
        async with trio.open_nursery() as nursery:
            mesh = TrioMesh(me, group, key, retry_ms, nursery)
            await mesh.listen(addresses)
            nursery.start_soon(mesh.pump)
            nursery.start_soon(mesh.watch)
            try:
                yield mesh
                # What is queued has one tick to leave; peers see us go by the group's events.
                mesh.flush()
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group_error:
        inner = unwrap_group(group_error)
        if inner is group_error:
            raise
        raise inner from None
