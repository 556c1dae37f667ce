"""The mesh core: order, exactly once, markers, fail-over between paths."""

import random

from cluster.control import GroupEvent, GroupMember
from cluster.ids import Instance
from cluster.mesh import (
    OWED_ITEMS_MAX,
    RETRIES_PER_ACK,
    Batch,
    Hello,
    Marker,
    MeshCore,
    Message,
    Out,
    Transmit,
    View,
)
from cluster.mesh_memory import MemoryHub

A, B, C = (Instance(n, 1, 1) for n in (1, 2, 3))


def collect(hub, instances):
    logs = {}
    for one in instances:
        mesh = hub.mesh(one)
        logs[one] = []
        mesh.start(logs[one].append)
    return logs


def payloads(log):
    return [(e.source, e.payload) for e in log if isinstance(e, Message)]


def test_messages_arrive_in_order_and_to_oneself():
    hub = MemoryHub()
    logs = collect(hub, [A, B])
    hub.view([A, B])
    for n in range(10):
        hub.members[A].send(B, b"%d" % n)
    hub.members[A].send(A, b"self")
    hub.settle()
    assert payloads(logs[B]) == [(A, b"%d" % n) for n in range(10)]
    assert payloads(logs[A]) == [(A, b"self")]


def test_message_after_view_is_held_until_the_view_is_installed():
    hub = MemoryHub()
    logs = collect(hub, [A, B, C])
    hub.view([A, B, C])
    hub.settle()
    hub.members[A].send(B, b"old")
    hub.view([A, B], hold=True)
    hub.give(A)
    hub.members[A].send(B, b"new")
    hub.settle()
    assert payloads(logs[B]) == [(A, b"old")]
    hub.give(B)
    hub.settle()
    order = [e.payload if isinstance(e, Message) else "view" for e in logs[B]]
    assert order == ["view", b"old", "view", b"new"]


def test_messages_of_a_failed_member_are_dropped_after_the_view():
    hub = MemoryHub()
    logs = collect(hub, [A, B, C])
    hub.view([A, B, C])
    hub.settle()
    hub.members[C].send(A, b"late")
    hub.crash(C)
    hub.ready()
    hub.view([A, B])
    hub.settle()
    assert payloads(logs[A]) == []


def test_rejoined_instance_starts_a_new_stream():
    hub = MemoryHub()
    logs = collect(hub, [A, B])
    hub.view([A, B])
    hub.members[A].send(B, b"1")
    hub.settle()
    hub.view([A], failed=False)
    logs |= collect(hub, [B])
    hub.view([A, B])
    hub.members[A].send(B, b"2")
    hub.members[B].send(A, b"3")
    hub.settle()
    assert payloads(logs[B]) == [(A, b"2")]
    assert payloads(logs[A]) == [(B, b"3")]


def group(members, seq, joined=()):
    infos = [GroupMember(m, f"n{m.node}", [], 0) for m in members]
    return GroupEvent("g", 1, seq, "view", infos, joined=list(joined))


def test_random_path_failures_lose_and_repeat_nothing():
    """Two cores over three lossy paths: whatever breaks, each message comes once and in order."""
    for seed in range(60):
        rng = random.Random(seed)
        cores = {A: MeshCore(A, 1, 100), B: MeshCore(B, 2, 100)}
        for core in cores.values():
            core.group_event(group([A, B], 1, [A, B]))
        wires = {}
        up = set()
        got = {A: [], B: []}
        sent = {A: [], B: []}

        def perform(me, actions, wires=wires, up=up, got=got):
            for action in actions:
                if isinstance(action, Transmit) and action.path in up:
                    wires.setdefault((me, action.path), []).append(action.batch)
                elif isinstance(action, Out) and isinstance(action.event, Message):
                    got[me].append(action.event.payload)

        def connect(path, cores=cores, wires=wires, up=up):
            seen = {me: core.links[B if me == A else A].received for me, core in cores.items()}
            for me, peer in ((A, B), (B, A)):
                wires[me, path] = []
                cores[me].path_up(Hello("g", peer, me, cores[peer].mesh_id, path, b"", seen[peer]))
            up.add(path)

        now = 0
        for step in range(400):
            now += rng.randrange(30)
            choice = rng.randrange(10)
            path = rng.randrange(3)
            me = rng.choice([A, B])
            peer = B if me == A else A
            if step > 340:
                for p in range(3):
                    if p not in up:
                        connect(p)
            elif choice == 0 and path in up:
                up.discard(path)
                for one in (A, B):
                    wires[one, path] = []
                    cores[one].path_down(B if one == A else A, path)
            elif choice == 1 and path not in up:
                connect(path)
            elif choice < 6:
                body = b"%d" % step
                sent[peer].append(body)
                cores[me].send(peer, body)
            for one in (A, B):
                perform(one, cores[one].tick(now))
            ready = [k for k, v in wires.items() if v]
            for key in ready if step > 340 else rng.sample(ready, min(len(ready), 1)):
                while wires[key]:
                    batch = wires[key].pop(0)
                    perform(
                        B if key[0] == A else A,
                        cores[B if key[0] == A else A].receive(key[0], batch),
                    )
                    if step <= 340:
                        break
            for core in cores.values():
                core.check()
        assert got == sent, seed


def test_gap_is_not_delivered():
    core = MeshCore(A, 1, 100)
    core.group_event(group([A, B], 1, [A, B]))
    assert core.receive(B, Batch(0, 2, [b"x"])) == []
    out = core.receive(B, Batch(0, 1, [b"w", b"x"]))
    assert [a.event.payload for a in out] == [b"w", b"x"]
    assert core.receive(B, Batch(0, 1, [b"w", b"x"])) == []


def test_acknowledgements_ride_along_or_go_by_themselves():
    """On the next batch; alone after a part of the retry time, after many items, and at once to who
    repeats itself, or else it would go on."""
    retry_ns = 100 * RETRIES_PER_ACK
    core = MeshCore(A, 1, retry_ns)
    core.group_event(group([A, B], 1, [A, B]))
    core.path_up(Hello("g", B, A, 2, 0, b"", 0))
    assert [a.batch for a in core.tick(0)] == [Batch(0, 1, [Marker(1, 1)])]

    def sends(now_ns, *items, first, ack=1):
        core.receive(B, Batch(ack, first, list(items)))
        return [(a.batch.ack, a.batch.items) for a in core.tick(now_ns)]

    assert sends(1000, b"a", first=1) == []
    core.send(B, b"answer")
    assert [(a.batch.ack, a.batch.items) for a in core.tick(1001)] == [(1, [b"answer"])]
    assert sends(2000, b"b", first=2, ack=2) == []
    assert core.deadline() == 2100
    assert sends(2099, b"c", first=3, ack=2) == []
    assert sends(2100, first=4, ack=2) == [(3, [])]
    assert core.deadline() is None
    assert sends(3000, b"b", b"c", first=2, ack=2) == [(3, [])]
    many = [b"x"] * OWED_ITEMS_MAX
    assert sends(4000, *many, first=4, ack=2) == []
    assert sends(4001, b"y", first=4 + OWED_ITEMS_MAX, ack=2) == [(4 + OWED_ITEMS_MAX, [])]
    core.check()


def test_old_group_event_is_ignored():
    core = MeshCore(A, 1, 100)
    first = core.group_event(group([A, B], 5, [A, B]))
    assert any(isinstance(a, Out) and isinstance(a.event, View) for a in first)
    assert core.group_event(group([A], 4)) == []
    assert core.installed == Marker(1, 5)
