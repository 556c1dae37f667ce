"""The mesh over real sockets: delivery, parking of early hellos, a broken network."""

import contextlib
import socket

import pytest
import trio
import trio.lowlevel

from cluster import mesh_io
from cluster.channel_io import Channel
from cluster.control import GroupEvent, GroupMember
from cluster.identity import Identity
from cluster.ids import Incarnation, Instance, NodeId
from cluster.mesh import Message, View
from cluster.mesh_io import open_mesh
from cluster.wire import Keys

A, B = Instance(1, 1, 1), Instance(2, 1, 1)
KEY = b"k" * 32
HOSTS = {A: ["127.0.1.1", "127.0.1.2"], B: ["127.0.2.1", "127.0.2.2"]}


def view(meshes, seq, members):
    infos = [GroupMember(m, f"n{m.node}", HOSTS[m], meshes[m].port) for m in members]
    return GroupEvent("g", 1, seq, "view", infos, joined=members if seq == 1 else [])


class Log:
    def __init__(self):
        self.items = []
        self.changed = trio.Event()

    def __call__(self, event):
        self.items.append(event)
        self.changed.set()
        self.changed = trio.Event()

    async def until(self, predicate):
        with trio.fail_after(60):
            while not predicate(self.items):
                await self.changed.wait()

    def payloads(self):
        return [e.payload for e in self.items if isinstance(e, Message)]


@contextlib.asynccontextmanager
async def pair():
    async with open_mesh(A, HOSTS[A], KEY, group="g", retry_ms=100) as a:
        async with open_mesh(B, HOSTS[B], KEY, group="g", retry_ms=100) as b:
            meshes = {A: a, B: b}
            logs = {A: Log(), B: Log()}
            for one, mesh in meshes.items():
                mesh.start(logs[one])
            yield meshes, logs


@pytest.mark.trio
async def test_messages_both_ways_with_late_view():
    async with pair() as (meshes, logs):
        meshes[B].group_event(view(meshes, 1, [A, B]))
        meshes[B].send(A, b"early")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert logs[A].items == []
        meshes[A].group_event(view(meshes, 1, [A, B]))
        meshes[A].send(B, b"hello")
        await logs[A].until(lambda log: any(isinstance(e, Message) for e in log))
        await logs[B].until(lambda log: any(isinstance(e, Message) for e in log))
        assert isinstance(logs[A].items[0], View)
        assert logs[A].payloads() == [b"early"]
        assert logs[B].payloads() == [b"hello"]


@pytest.mark.trio
async def test_broken_connections_lose_nothing():
    async with pair() as (meshes, logs):
        for one in (A, B):
            meshes[one].group_event(view(meshes, 1, [A, B]))
        sent = []
        for n in range(300):
            body = b"%d" % n
            sent.append(body)
            meshes[A].send(B, body)
            if n % 40 == 10:
                key = sorted(meshes[B]._channels)[:1]
                for one in key:
                    meshes[B]._channels[one].close()
            await trio.lowlevel.checkpoint()
        await logs[B].until(lambda log: len(log) >= 301)
        assert logs[B].payloads() == sent


@pytest.mark.trio
async def test_wrong_key_is_not_heard():
    async with open_mesh(A, HOSTS[A], KEY, group="g") as a:
        async with open_mesh(B, HOSTS[B], b"x" * 32, group="g") as b:
            meshes = {A: a, B: b}
            log = Log()
            a.start(log)
            for mesh in (a, b):
                mesh.group_event(view(meshes, 1, [A, B]))
            b.send(A, b"forged")
            with trio.move_on_after(0.3):
                await log.until(lambda items: any(isinstance(e, Message) for e in items))
            assert log.payloads() == []
            assert a.paths(B) == []


@pytest.mark.trio
async def test_a_channel_that_broke_while_it_answered_has_ended() -> None:
    """The answer to a frame found the connection broken: there is no next frame, and no socket."""
    near, far = socket.socketpair()
    with far:
        channel = Channel(near, Identity(NodeId(1), bytes(16), Incarnation(1), Keys(0, {0: KEY})))
        channel._drained = True
        channel.close()
        assert await channel.receive() is None


@pytest.mark.trio
async def test_members_that_no_connection_leads_to_are_known(monkeypatch):
    """One that has left counts no more, and an end that closes accuses nobody."""
    async with pair() as (meshes, _logs):

        async def until(condition):
            with trio.fail_after(60):
                while not condition():  # noqa: ASYNC110
                    await trio.sleep(0.001)

        def reach(one, other):
            return meshes[one].paths(other) == list(range(len(HOSTS[one])))

        def missed(one):
            return [peer for peer, _count in meshes[one].unreached()]

        assert meshes[A].unreached() == []
        meshes[A].group_event(view(meshes, 1, [A, B]))
        assert meshes[A].unreached() == [(B, 0)]
        meshes[B].group_event(view(meshes, 1, [A, B]))
        # All of them, or one that is on its way would come after the others are closed.
        await until(lambda: reach(A, B) and reach(B, A))
        assert meshes[A].unreached() == meshes[B].unreached() == []

        async def nowhere(*_arguments):
            raise OSError("blocked")

        monkeypatch.setattr(mesh_io, "connect", nowhere)
        for channel in list(meshes[B]._channels.values()):
            channel.close()
        await until(lambda: missed(A) == [B] and missed(B) == [A])
        meshes[A].group_event(view(meshes, 2, [A]))
        assert meshes[A].unreached() == []
    assert meshes[B].unreached() == []
