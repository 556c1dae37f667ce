"""clusterguard's core: liveness, one-way links, lateness, flapping, leases."""

from __future__ import annotations

from cluster.actions import MS, Datagram, Notify, Tick
from cluster.control import MemberInfo
from cluster.detector import GuardCore
from cluster.guard_events import (
    ClusterdDied,
    Facts,
    Heard,
    LeaseEnd,
    LocalPurged,
    Progress,
    Sighting,
    Vouch,
)
from cluster.links import Link
from cluster.messages import Echo, Heartbeat, decode_message_untrusted, encode_message
from cluster.timing import timing_of

TIMING = timing_of("fast")
SECOND = 1000 * MS


def facts(nodes=(1, 2), voters=(1, 2, 3), instances=(0, 1)):
    return Facts(
        epoch=3, version=7, config_epoch=1, electorates=[list(voters)], nodes=list(nodes),
        reached_servers=[129], instances=list(instances), members=[],
    )  # fmt: skip


MEMBERS = [MemberInfo(n, 1, [0], 1) for n in (1, 2, 3)]


class Pair:
    """Two guards and the links between them, driven in steps of 10 ms."""

    def __init__(self):
        self.guards = {n: GuardCore(n, 1, TIMING, 0) for n in (1, 2)}
        self.now = 0
        self.cuts = set()
        self.deaf = set()
        self.sightings = {1: None, 2: None}
        self.leases = {1: {}, 2: {}}
        for number in (1, 2):
            self.step(number, facts(voters=(1, 2)))
            self.step(number, Vouch(1, 1, MEMBERS))

    def step(self, node, event):
        for action in self.guards[node].step(self.now, event):
            if isinstance(action, Datagram):
                self.send(node, action)
            elif isinstance(action, Notify) and isinstance(action.event, Sighting):
                self.sightings[node] = action.event
            elif isinstance(action, Notify) and isinstance(action.event, LeaseEnd):
                self.leases[node][action.event.number] = action.event.end_ns
        self.guards[node].check()

    def send(self, source, action):
        if action.to in self.guards and (source, action.to, action.network) not in self.cuts:
            message = decode_message_untrusted(encode_message(action.message))
            self.step(action.to, Heard(action.network, source, 1, message))

    def run(self, milliseconds, nodes=(1, 2)):
        for _ in range(milliseconds // 10):
            self.now += 10 * MS
            for node in nodes:
                if self.guards[node].deadline() <= self.now:
                    self.step(node, Tick())

    def cut(self, source, target, networks=(0, 1)):
        self.cuts |= {(source, target, network) for network in networks}

    def alive(self, node):
        return [(p.node, p.alive) for p in self.sightings[node].peers]


def test_two_nodes_see_each_other_and_have_leases():
    pair = Pair()
    pair.run(400)
    assert pair.alive(1) == [(2, True)]
    assert pair.sightings[1].voters == [1, 2]
    peer = pair.sightings[1].peers[0]
    assert (peer.epoch, peer.version, peer.servers, peer.running) == (3, 7, [129], [0, 1])
    assert peer.links == [True, True]
    assert pair.leases[1][1] > pair.now


def test_silence_is_death_after_dead_ms_and_the_lease_ends_before():
    pair = Pair()
    pair.run(400)
    pair.cut(1, 2)
    pair.cut(2, 1)
    cut = pair.now
    pair.run(800)
    assert pair.alive(1) == [(2, True)]
    assert pair.leases[1][1] <= pair.now
    pair.run(300)
    assert pair.alive(1) == [(2, False)]
    assert pair.now - cut < 1200 * MS
    assert pair.sightings[1].voters == [1]


def test_one_network_is_enough():
    pair = Pair()
    pair.run(400)
    pair.cut(1, 2, networks=[0])
    pair.cut(2, 1, networks=[0])
    pair.run(1500)
    assert pair.alive(1) == [(2, True)]
    assert pair.sightings[1].peers[0].links == [False, True]


def test_a_one_way_cut_is_seen_on_both_ends():
    pair = Pair()
    pair.run(400)
    pair.cut(1, 2)
    pair.run(1300)
    assert pair.alive(1) == [(2, False)]
    assert pair.alive(2) == [(1, False)]


def test_own_lateness_accuses_nobody():
    pair = Pair()
    pair.run(400)
    pair.run(900, nodes=(2,))
    pair.now += 400 * MS
    guard = pair.guards[1]
    pair.step(1, Tick())
    assert pair.alive(1) == [(2, True)]
    assert pair.sightings[1].late_ms > 1000
    assert guard.lease_end_ns(1) <= pair.now + TIMING.lease_ms * MS


def test_a_new_life_is_seen_and_the_old_one_ignored():
    pair = Pair()
    pair.run(400)
    pair.guards[2] = GuardCore(2, 2, TIMING, pair.now)
    beat = Heartbeat(
        node=2, incarnation=2, sequence=1, epoch=0, version=0, config_epoch=1, instances=[],
        purged=[], reach=0, servers=0, late_ms=0,
    )  # fmt: skip
    pair.step(1, Heard(0, 2, 2, beat))
    peer = pair.sightings[1].peers[0]
    assert (peer.incarnation, peer.alive) == (2, False)
    old = Heartbeat(
        node=2, incarnation=1, sequence=999, epoch=9, version=9, config_epoch=1, instances=[],
        purged=[], reach=0, servers=0, late_ms=0,
    )  # fmt: skip
    assert pair.guards[1].step(pair.now, Heard(0, 2, 1, old)) == []


def test_the_death_of_clusterd_is_announced_at_once():
    pair = Pair()
    pair.run(400)
    pair.step(2, ClusterdDied())
    assert pair.alive(1) == [(2, False)]
    pair.step(2, LocalPurged([1]))
    assert pair.sightings[1].peers[0].purged == [1]
    before = dict(pair.leases[2])
    pair.run(300)
    assert pair.leases[2] == before


def test_stalled_instances_are_told():
    pair = Pair()
    pair.run(400)
    pair.step(2, Progress([(0, 0), (1, 2100)]))
    pair.run(200)
    assert pair.sightings[1].peers[0].stalled == [1]
    assert pair.sightings[2].stalled == [1]


def test_echoes_of_other_lives_or_unknown_heartbeats_count_for_nothing():
    pair = Pair()
    guard = pair.guards[1]
    pair.run(150, nodes=(1,))
    for echo in (Echo(2, 1, 9, 1, True, [0, 1]), Echo(2, 777, 1, 1, True, [0, 1])):
        actions = guard.step(pair.now, Heard(0, 2, 1, echo))
        assert not any(isinstance(a, Notify) and isinstance(a.event, LeaseEnd) for a in actions)


def test_nothing_is_sent_before_the_facts():
    guard = GuardCore(1, 1, TIMING, 0)
    assert guard.step(SECOND, Tick()) == []


def heard_until_up(link, now):
    """Packets arrive every 50 ms; gives the time when the link counts as up."""
    for _ in range(1000):
        link.heard_ns = now
        link.update(now, 300 * MS)
        if link.up:
            return now
        now += 50 * MS
    raise AssertionError("never up")


def test_a_flapping_link_is_held_down_for_longer_and_longer():
    link = Link()
    now, held = heard_until_up(link, 0), []
    for _ in range(4):
        now += 400 * MS
        assert link.update(now, 300 * MS)
        up = heard_until_up(link, now)
        held.append((up - now) // SECOND)
        now = up
    assert held == [0, 1, 2, 4]
