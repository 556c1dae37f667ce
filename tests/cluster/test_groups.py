"""Process groups: order, acknowledgement, flush, silence and release."""

from __future__ import annotations

import msgspec

from cluster.actions import MS, Notify, Reply, Send
from cluster.control import GroupMember
from cluster.groups import Groups
from cluster.ids import Instance
from cluster.messages import (
    JoinOp,
    LeaveOp,
    ReleasedOp,
    SilentOp,
    decode_message_untrusted,
    encode_message,
)
from cluster.state import NodeInfo, ViewChange, apply_change, initial_state
from cluster.timing import silence_wait_ns, timing_of

TIMING = timing_of("fast")


def first_state():
    state = initial_state("00" * 16, "x", "fast", NodeInfo(1, "n1", []))
    return msgspec.structs.replace(state, nodes=[NodeInfo(n, f"n{n}", []) for n in (1, 2, 3)])


class Cluster:
    """Groups cores of some nodes; messages wait in a queue."""

    def __init__(self, nodes=(1, 2, 3)):
        self.state = apply_change(first_state(), ViewChange(dict.fromkeys(nodes, 1)), "w")
        self.cores = {n: Groups(n, 1, TIMING) for n in nodes}
        self.queue, self.events, self.replies = [], {}, {}
        self.now = 0
        self.down = set()
        self.adopt()

    def take(self, node, actions):
        for action in actions:
            if isinstance(action, Send):
                self.queue.append((node, action.to, encode_message(action.message)))
            elif isinstance(action, Notify):
                self.events.setdefault((node, action.event.to), []).append(action.event.event)
            elif isinstance(action, Reply):
                self.replies[node, action.request] = action

    def adopt(self, members=None, dead=(), running=None, nodes=None):
        if members is not None:
            change = ViewChange(members, list(dead), running or {})
            self.state = apply_change(self.state, change, f"w{self.state.version}")
        for node in nodes or list(self.cores):
            self.take(node, self.cores[node].adopt(self.now, self.state))
        if nodes is None:
            self.run()

    def run(self, until=None):
        while self.queue:
            source, target, data = self.queue.pop(0)
            if source in self.down or target in self.down or target not in self.cores:
                continue
            message = decode_message_untrusted(data)
            if until is not None and until(target, message):
                self.queue.insert(0, (source, target, data))
                return
            self.take(target, self.cores[target].received(self.now, source, message))
            self.cores[target].check()

    def tick(self, milliseconds=200):
        self.now += milliseconds * MS
        for node, core in self.cores.items():
            if node not in self.down:
                self.take(node, core.tick(self.now))
        self.run()

    def request(self, node, operation, request=None):
        self.take(node, self.cores[node].request(self.now, operation, request))

    def join(self, node, number=1):
        member = GroupMember(Instance(node, 1, number), f"n{node}", ["10.0.0.1"], 7000)
        self.request(node, JoinOp("fs", member), node * 10 + number)
        self.run()

    def kinds(self, node, number=1):
        return [event.kind for event in self.events[node, number]]


def test_members_see_the_same_events_in_the_same_order():
    cluster = Cluster()
    for node in (3, 1, 2):
        cluster.join(node)
    assert [e.joined for e in cluster.events[3, 1]] == [[Instance(n, 1, 1)] for n in (3, 1, 2)]
    assert cluster.events[2, 1] == cluster.events[3, 1][-1:]
    assert all(reply.error is None for reply in cluster.replies.values())
    members = [member.instance.node for member in cluster.events[1, 1][-1].members]
    assert members == [1, 2, 3]


def test_nothing_is_delivered_before_all_have_acknowledged():
    cluster = Cluster()
    cluster.down = {3}
    cluster.join(1)
    cluster.tick()
    assert cluster.events == {}
    cluster.down = set()
    cluster.tick()
    assert cluster.kinds(1) == ["view"]


def test_a_clean_leave():
    cluster = Cluster()
    cluster.join(1)
    cluster.join(2)
    cluster.request(1, LeaveOp("fs", Instance(1, 1, 1)), 5)
    cluster.run()
    assert cluster.replies[1, 5].error is None
    assert cluster.events[2, 1][-1].left == [Instance(1, 1, 1)]
    assert cluster.events[2, 1][-1].dead == []
    assert len(cluster.events[1, 1]) == 2


def test_death_silence_release():
    cluster = Cluster()
    cluster.join(1)
    cluster.join(2)
    dead = Instance(2, 1, 1)
    cluster.adopt({1: 1, 2: 1, 3: 1}, dead=[dead], running={2: [0]})
    view = cluster.events[1, 1][-1]
    assert (view.kind, view.failed, view.dead, view.silent) == ("view", [dead], [dead], [])
    assert cluster.cores[1].unsilent() == [dead]
    cluster.request(1, ReleasedOp("fs", dead, Instance(1, 1, 1)), 90)
    cluster.run()
    assert cluster.replies[1, 90].error is not None
    cluster.request(1, SilentOp(dead), None)
    cluster.run()
    silent = cluster.events[1, 1][-1]
    assert (silent.kind, silent.subject, silent.silent) == ("silent", dead, [dead])
    cluster.request(1, ReleasedOp("fs", dead, Instance(1, 1, 1)), 91)
    cluster.run()
    released = cluster.events[1, 1][-1]
    assert (released.kind, released.subject, released.dead) == ("released", dead, [])
    assert cluster.replies[1, 91].error is None


def test_a_barred_instance_does_not_come_in():
    cluster = Cluster()
    dead = Instance(2, 1, 1)
    cluster.adopt({1: 1, 2: 1, 3: 1}, dead=[dead], running={2: [0]})
    cluster.join(2)
    assert cluster.replies[2, 21].error is not None
    assert cluster.events == {}


def test_the_group_outlives_its_members_until_they_are_released():
    cluster = Cluster()
    cluster.join(2)
    dead = Instance(2, 1, 1)
    cluster.adopt({1: 1, 2: 1, 3: 1}, dead=[dead], running={2: [0]})
    cluster.join(1)
    assert cluster.events[1, 1][-1].dead == [dead]


def test_what_one_delivered_before_the_sequencer_died_all_deliver():
    cluster = Cluster()
    cluster.join(2)
    cluster.join(3)
    member = GroupMember(Instance(2, 1, 2), "n2", ["10.0.0.1"], 7000)
    cluster.request(2, JoinOp("fs", member), 50)
    cluster.run(until=lambda target, message: target == 3 and getattr(message, "committed", 0) == 4)
    assert cluster.kinds(2, 2) == ["view"]
    assert (3, 2) not in cluster.events
    before = len(cluster.events[3, 1])
    cluster.queue.clear()
    cluster.down = {1}
    cluster.adopt({2: 1, 3: 1})
    assert len(cluster.events[3, 1]) == before + 2
    assert cluster.events[3, 1] == cluster.events[2, 1][-len(cluster.events[3, 1]) :]


def test_a_request_is_sent_again_to_the_next_sequencer_and_done_once():
    cluster = Cluster()
    cluster.join(2)
    cluster.down = {1}
    cluster.join(3)
    cluster.tick()
    assert (3, 31) not in cluster.replies
    cluster.adopt({2: 1, 3: 1})
    cluster.tick()
    assert cluster.replies[3, 31].error is None
    joined = [event.joined for event in cluster.events[2, 1]]
    assert joined.count([Instance(3, 1, 1)]) == 1


def test_a_new_node_takes_the_state():
    cluster = Cluster(nodes=(1, 2))
    cluster.join(1)
    cluster.cores[3] = Groups(3, 1, TIMING)
    cluster.adopt({1: 1, 2: 1, 3: 1})
    assert cluster.cores[3].snapshot == cluster.cores[1].snapshot
    cluster.join(3)
    assert len(cluster.events[3, 1][-1].members) == 2


def test_lost_messages_are_sent_again():
    cluster = Cluster()
    cluster.join(1)
    for node in (2, 3):
        member = GroupMember(Instance(node, 1, 1), "x", [], 1)
        cluster.request(node, JoinOp("fs", member), node)
        cluster.queue.clear()
        cluster.tick()
        cluster.queue.clear()
        cluster.tick()
    assert len(cluster.events[1, 1]) == 3


def test_after_all_nodes_were_away_groups_wait_for_old_leases():
    cluster = Cluster.__new__(Cluster)
    cluster.state = apply_change(first_state(), ViewChange({1: 1}), "a")
    cluster.state = apply_change(cluster.state, ViewChange({1: 2}), "b")
    cluster.cores = {1: Groups(1, 2, TIMING)}
    cluster.queue, cluster.events, cluster.replies = [], {}, {}
    cluster.now, cluster.down = 0, set()
    cluster.adopt()
    cluster.tick()
    assert not cluster.cores[1].ready
    cluster.tick(silence_wait_ns(TIMING) // MS + 1)
    assert cluster.cores[1].ready
