"""ClusterCore with one node and its acceptor: first read, entry, commands, servers, the end."""

from __future__ import annotations

import msgspec

from cluster.actions import MS, Notify, Persist, Received, Reply, Send, Tick
from cluster.control import GroupMember, ServerInfo
from cluster.core import ClusterCore
from cluster.core_events import (
    Barred,
    Command,
    GroupDelivery,
    GroupJoin,
    InstanceEnded,
    InstanceStarted,
    Leave,
    ReadState,
    ServerUp,
    StateChanged,
    Stay,
    TakeIncarnation,
)
from cluster.errors import NotQuorateError, UsageError
from cluster.guard_events import Facts, Sighting, Vouch, Vouched
from cluster.ids import Instance
from cluster.messages import ACCEPTOR_MESSAGES, DecidedNotice, Install, Installed
from cluster.register import Acceptor, birth_record
from cluster.state import (
    AddNode,
    AddServer,
    NodeInfo,
    SetVolumeGroup,
    ViewChange,
    VolumeGroup,
    apply_change,
    initial_state,
)
from cluster.timing import timing_of

TIMING = timing_of("fast")


class OneNode:
    """A node, its acceptor, a guard that hears every voter, and servers that obey."""

    def __init__(self, incarnation=1, state=None, voting=True):
        known = initial_state("00" * 16, "demo", "fast", NodeInfo(1, "n1", ["10.0.0.1"]))
        self.now = 0
        self.acceptor = Acceptor(1, birth_record(state or known))
        self.core = ClusterCore(1, incarnation, TIMING, known, 0)
        self.voting = voting
        self.installs, self.replies, self.notified = [], {}, []
        self.answer_installs = True
        self.step(Tick())
        self.step(Sighting(peers=[], voters=[1], witnessed=[], stalled=[], late_ms=0))

    def step(self, event):
        self.take(self.core.step(self.now, event))
        self.core.check()

    def take(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.send(action)
            elif isinstance(action, Reply):
                self.replies[action.request] = action
            elif isinstance(action, Notify):
                self.notify(action.event)
            else:
                assert isinstance(action, Persist)

    def send(self, action):
        message = action.message
        if isinstance(message, ACCEPTOR_MESSAGES):
            if self.voting:
                answers = self.acceptor.step(self.now, Received(1, message))
                self.take_answers(answers)
        elif isinstance(message, Install):
            self.installs.append((action.to, message))
            if self.answer_installs:
                self.step(Received(action.to, Installed(message.request, message.epoch)))

    def take_answers(self, actions):
        for action in actions:
            if isinstance(action, Send):
                self.step(Received(1, action.message))
            elif isinstance(action, Notify) and isinstance(action.event, Vouch):
                vouched = Vouched(action.event.token, [], 5)
                self.take_answers(self.acceptor.step(self.now, vouched))

    def notify(self, event):
        self.notified.append(event)

    def run(self, milliseconds):
        end = self.now + milliseconds * MS
        while (deadline := self.core.deadline()) is not None and deadline <= end:
            self.now = max(deadline, self.now + 1)
            self.step(Tick())
        self.now = end

    def last(self, kind):
        return [event for event in self.notified if isinstance(event, kind)][-1]


def member(number):
    return GroupMember(Instance(1, 1, number), "n1", ["10.0.0.1"], 7000)


def test_the_first_node_lets_itself_in():
    node = OneNode()
    node.run(300)
    change = node.last(StateChanged)
    assert (change.view.epoch, change.admitted, change.view.quorate) == (1, True, True)
    assert node.last(Facts).instances == [0]


def test_a_used_incarnation_is_not_taken():
    state = initial_state("00" * 16, "demo", "fast", NodeInfo(1, "n1", []))
    state = apply_change(state, ViewChange({1: 4}), "w")
    node = OneNode(incarnation=4, state=state)
    assert node.last(TakeIncarnation).incarnation == 5
    assert node.core.stopped
    assert not any(isinstance(event, Facts | StateChanged) for event in node.notified)


def test_commands_are_decided_or_refused():
    node = OneNode()
    node.run(300)
    node.step(Command(1, AddNode(NodeInfo(2, "n2", ["10.0.0.2"]))))
    assert [info.name for info in node.replies[1].result.nodes] == ["n1", "n2"]
    node.step(Command(2, AddNode(NodeInfo(3, "n2", []))))
    assert isinstance(node.replies[2].error, UsageError)
    node.step(Command(3, AddNode(NodeInfo(2, "n2", ["10.0.0.2"]))))
    assert node.replies[3].error is None
    node.step(ReadState(4))
    assert node.replies[4].result == node.core.state


def test_the_end_of_a_volume_group_is_told_as_done():
    """A command is judged once more on the value that has it."""
    node = OneNode()
    node.run(300)
    group = VolumeGroup("a", "vg0", 1)
    node.step(Command(1, SetVolumeGroup("a", 0, group)))
    node.step(Command(2, SetVolumeGroup("a", 1, None)))
    assert node.replies[1].error is None
    assert node.replies[2].error is None
    assert node.replies[2].result.volume_groups == []


def test_without_voters_commands_end_in_time():
    node = OneNode()
    node.run(300)
    node.voting = False
    node.step(Command(1, AddNode(NodeInfo(2, "n2", [])), timeout_ms=2000))
    node.step(ReadState(2, timeout_ms=1500))
    node.run(2500)
    assert isinstance(node.replies[1].error, NotQuorateError)
    assert isinstance(node.replies[2].error, NotQuorateError)


def test_every_epoch_is_installed_until_it_is_answered():
    node = OneNode()
    node.run(300)
    node.answer_installs = False
    node.step(Command(1, AddServer(ServerInfo(129, "s1", ["10.0.1.1"]))))
    node.step(ServerUp(129))
    node.run(1000)
    assert len(node.installs) > 3
    assert node.last(StateChanged).view.installed == []
    target, install = node.installs[-1]
    assert (target, install.epoch, install.dead_ms) == (129, 1, TIMING.dead_ms)
    node.answer_installs = True
    node.run(400)
    assert node.last(StateChanged).view.installed == [129]
    assert node.last(Facts).reached_servers == [129]


def test_an_instance_that_dies_is_barred_and_its_group_told():
    node = OneNode()
    node.run(300)
    for number in (1, 2):
        node.step(InstanceStarted(number))
        node.step(GroupJoin(number, "fs", member(number)))
    node.step(InstanceEnded(1, clean=False, reason="killed"))
    assert node.last(Barred).numbers == [1]
    event = [e.event for e in node.notified if isinstance(e, GroupDelivery) and e.to == 2][-1]
    assert event.failed == [Instance(1, 1, 1)]
    node.run(2000)
    event = [e.event for e in node.notified if isinstance(e, GroupDelivery) and e.to == 2][-1]
    assert (event.kind, event.subject) == ("silent", Instance(1, 1, 1))
    assert node.core.state.fences[-1].reason == "killed"


def test_a_clean_end_is_no_decision_unless_it_is_still_in_a_group():
    node = OneNode()
    node.run(300)
    version = node.core.state.version
    node.step(InstanceStarted(1))
    node.step(InstanceEnded(1, clean=True))
    assert node.core.state.version == version
    node.step(InstanceStarted(2))
    node.step(GroupJoin(5, "fs", member(2)))
    node.step(InstanceEnded(2, clean=True))
    assert node.last(Barred).numbers == [2]


def test_leave():
    node = OneNode()
    node.run(300)
    node.step(Leave(9))
    assert node.replies[9].error is None
    assert node.replies[9].result.members == []
    assert node.core.stopped
    node.step(ReadState(10))
    assert node.replies[10].error is not None


def test_a_leave_that_is_given_up_is_not_done_later():
    node = OneNode()
    node.run(300)
    node.voting = False
    node.step(Leave(9))
    node.run(5000)
    node.step(Stay())
    node.run(5000)  # what was proposed last is over
    node.voting = True
    node.run(5000)
    assert 9 not in node.replies
    assert not node.core.stopped
    assert node.core.membership.admitted


def test_a_leave_that_is_decided_after_it_was_given_up_ends_this_life():
    node = OneNode()
    node.run(300)
    node.voting = False
    node.step(Leave(9))
    node.run(100)
    node.step(Stay())
    left = ViewChange(members={}, reason="left")
    node.step(Received(2, DecidedNotice(apply_change(node.core.state, left, "n1.1.7"), [], 0)))
    assert node.last(Barred).numbers == [0]
    assert node.core.stopped


def test_a_notice_that_bars_this_life_ends_it():
    node = OneNode()
    node.run(300)
    state = msgspec.structs.replace(
        node.core.state, nodes=[*node.core.state.nodes, NodeInfo(2, "n2", [])]
    )
    state = apply_change(state, ViewChange({2: 1}, reason="expelled"), "w")
    node.step(Received(2, DecidedNotice(state)))
    assert node.last(Barred).numbers == [0]
    assert node.core.stopped
    assert node.core.deadline() is None
