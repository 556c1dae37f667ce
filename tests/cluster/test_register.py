"""Acceptor and proposer together, over a network that the test drives by hand."""

from __future__ import annotations

import itertools
import random

import msgspec
import pytest

from cluster.actions import MS, Notify, Persist, Received, Send, Tick
from cluster.errors import CorruptionError
from cluster.guard_events import Vouch, Vouched
from cluster.messages import (
    Accept,
    Accepted,
    Ballot,
    Current,
    EchoAge,
    Initialise,
    Prepare,
    Promised,
    Query,
    Refused,
    Uninitialised,
    decode_message_untrusted,
    encode_message,
)
from cluster.proposer import Conflict, Decided, NoQuorum, Propose, Proposer, Read
from cluster.register import (
    Acceptor,
    Record,
    Replace,
    Replaced,
    birth_record,
    decode_record_untrusted,
    encode_record,
)
from cluster.state import (
    FinishVoterChange,
    NodeInfo,
    StartVoterChange,
    apply_change,
    initial_state,
    recovered_state,
)
from cluster.timing import timing_of

TIMING = timing_of("fast")


def first_state(voters=(1, 2, 3)):
    state = initial_state("00" * 16, "demo", "fast", NodeInfo(1, "n1", []))
    nodes = [NodeInfo(n, f"n{n}", []) for n in (1, 2, 3)]
    return msgspec.structs.replace(state, nodes=nodes, voters=list(voters))


class Cluster:
    """Acceptors with stores, proposers; messages wait until `run` delivers them."""

    def __init__(self, state, empty=()):
        self.state = state
        self.stores = {v: birth_record(state) for v in (1, 2, 3) if v not in empty}
        self.acceptors = {v: Acceptor(1, self.stores.get(v)) for v in (1, 2, 3)}
        self.proposers = {}
        self.queue = []
        self.down = set()
        self.now = 0
        self.ages = []

    def proposer(self, node):
        return self.proposers.setdefault(node, Proposer(node, 1, TIMING, self.state))

    def step(self, node, event):
        self.take(node, self.proposer(node).step(self.now, event))

    def take(self, source, actions):
        for action in actions:
            if isinstance(action, Send):
                message = decode_message_untrusted(encode_message(action.message))
                self.queue.append((source, action.to, message))
            elif isinstance(action, Persist):
                self.stores[source] = action.record
            elif isinstance(action, Notify) and isinstance(action.event, Vouch):
                vouched = Vouched(action.event.token, self.ages, 7)
                self.take(source, self.acceptors[source].step(self.now, vouched))

    def restart(self, voter):
        self.acceptors[voter] = Acceptor(2, self.stores.get(voter))

    def deliver(self, index=0):
        source, target, message = self.queue.pop(index)
        if source in self.down or target in self.down:
            return
        if isinstance(message, Prepare | Accept | Query | Initialise):
            self.take(target, self.acceptors[target].step(self.now, Received(source, message)))
            self.acceptors[target].check()
        else:
            self.take(target, self.proposer(target).step(self.now, Received(source, message)))
            self.proposer(target).check()

    def run(self, node, rng=None):
        """Deliver everything, then let time pass, until `node` has an outcome."""
        for _ in range(10_000):
            while self.queue:
                self.deliver(rng.randrange(len(self.queue)) if rng else 0)
            done = self.proposer(node).take_done()
            if done:
                return done[0].outcome
            self.now = min(p.deadline() for p in self.proposers.values() if p.deadline())
            for number, proposer in self.proposers.items():
                self.take(number, proposer.step(self.now, Tick()))
        raise AssertionError("no outcome")

    def propose(self, node, value, expected=None, until_ms=5000):
        expected = value.version - 1 if expected is None else expected
        self.step(node, Propose(value.version, expected, value, self.now + until_ms * MS))

    def read(self, node, **options):
        self.step(node, Read(999, self.now + 5000 * MS, **options))
        return self.run(node)


def changed(state, writer):
    return msgspec.structs.replace(state, version=state.version + 1, writer=writer)


def test_a_value_is_decided_and_read():
    cluster = Cluster(first_state())
    value = changed(cluster.state, "w")
    cluster.propose(1, value)
    outcome = cluster.run(1)
    assert isinstance(outcome, Decided)
    assert outcome.value == value
    assert cluster.read(2).value == value


def test_accepts_carry_the_ages_of_echoes():
    from cluster.ids import Instance

    cluster = Cluster(first_state())
    cluster.ages = [EchoAge(Instance(3, 1, 1), 55)]
    cluster.propose(1, changed(cluster.state, "w"))
    outcome = cluster.run(1)
    assert [answer.ages for answer in outcome.ages] == [cluster.ages] * 2
    assert all(answer.start_age_ns == 7 for answer in outcome.ages)
    assert cluster.read(2, fresh_ages=True).ages


def test_only_one_of_two_proposals_wins():
    cluster = Cluster(first_state())
    cluster.propose(1, changed(cluster.state, "a"))
    cluster.propose(2, changed(cluster.state, "b"))
    first, second = cluster.run(1), cluster.run(2)
    assert sorted([type(first), type(second)], key=str) == [Conflict, Decided]
    assert first.value == second.value


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_messages_and_restarts(seed):
    rng = random.Random(seed)
    cluster = Cluster(first_state())
    for node in (1, 2, 3):
        cluster.propose(node, changed(cluster.state, f"w{node}"))
    outcomes = []
    for node in (1, 2, 3):
        cluster.restart(rng.choice((1, 2, 3)))
        outcomes.append(cluster.run(node, rng))
    assert len({msgspec.msgpack.encode(outcome.value) for outcome in outcomes}) == 1
    assert sum(isinstance(outcome, Decided) for outcome in outcomes) <= 1


def test_a_minority_decides_nothing():
    cluster = Cluster(first_state())
    cluster.down = {2, 3}
    cluster.propose(1, changed(cluster.state, "w"), until_ms=700)
    assert cluster.run(1) == NoQuorum([1])
    assert cluster.now == 700 * MS


def test_a_half_accepted_value_is_finished_by_the_next():
    cluster = Cluster(first_state())
    value = changed(cluster.state, "w")
    cluster.propose(1, value)
    while not any(isinstance(m, Accept) for _, _, m in cluster.queue):
        cluster.deliver()
    cluster.queue = [(s, t, m) for s, t, m in cluster.queue if t == 1 and isinstance(m, Accept)]
    cluster.deliver()
    cluster.queue.clear()
    cluster.proposers.clear()
    cluster.down = {3}
    assert cluster.read(2).value == value


def test_promises_survive_a_restart():
    acceptor = Acceptor(1, birth_record(first_state()))
    high, low = Ballot(9, 1, 1), Ballot(5, 2, 1)
    persist, answer = acceptor.step(0, Received(1, Prepare(1, high, 1)))
    assert isinstance(persist, Persist)
    assert isinstance(answer.message, Promised)
    again = Acceptor(2, persist.record)
    [send] = again.step(0, Received(2, Prepare(1, low, 1)))
    assert isinstance(send.message, Refused)
    assert send.message.promised == high


def test_a_repeated_accept_is_answered_without_writing():
    state = first_state()
    acceptor = Acceptor(1, birth_record(state))
    accept = Accept(1, Ballot(9, 1, 1), 1, changed(state, "w"))
    persist, notify = acceptor.step(0, Received(1, accept))
    assert isinstance(persist, Persist)
    [send] = acceptor.step(0, Vouched(notify.event.token, [], 3))
    assert isinstance(send.message, Accepted)
    [notify] = acceptor.step(0, Received(1, accept))
    assert isinstance(notify, Notify)


def test_an_accept_is_answered_only_after_the_echoes_stopped():
    state = first_state()
    acceptor = Acceptor(1, birth_record(state))
    actions = acceptor.step(0, Received(1, Accept(1, Ballot(9, 1, 1), 1, changed(state, "w"))))
    assert not any(isinstance(action, Send) for action in actions)


def test_a_lower_config_epoch_is_refused_with_the_value():
    state = msgspec.structs.replace(first_state(), config_epoch=5)
    acceptor = Acceptor(1, birth_record(state))
    [send] = acceptor.step(0, Received(1, Prepare(1, Ballot(9, 1, 1), 4)))
    assert isinstance(send.message, Refused)
    assert send.message.value == state


def test_a_voter_without_a_store_counts_for_nothing():
    cluster = Cluster(first_state(), empty=(2, 3))
    [send] = cluster.acceptors[2].step(0, Received(1, Query(1)))
    assert send.message == Uninitialised(1, 1)
    cluster.propose(1, changed(cluster.state, "w"), until_ms=600)
    assert isinstance(cluster.run(1), NoQuorum)
    assert 2 not in cluster.stores


def test_voters_are_added_and_get_their_stores():
    cluster = Cluster(first_state(voters=(1,)), empty=(2, 3))
    state = cluster.state
    for voter, step in itertools.product((2, 3), ("start", "finish")):
        change = StartVoterChange(add=voter) if step == "start" else FinishVoterChange()
        state = apply_change(state, change, f"{voter}{step}")
        cluster.propose(1, state)
        assert isinstance(cluster.run(1), Decided)
    assert sorted(cluster.stores) == [1, 2, 3]
    cluster.down = {1}
    cluster.state = state
    outcome = cluster.read(2)
    assert outcome.value.voters == [1, 2, 3]


def test_a_proposer_with_the_old_voters_learns_the_new_ones():
    cluster = Cluster(first_state(voters=(1, 2)), empty=(3,))
    state = cluster.state
    for change in (StartVoterChange(add=3), FinishVoterChange(), StartVoterChange(remove=1)):
        state = apply_change(state, change, str(change))
        cluster.propose(2, state)
        assert isinstance(cluster.run(2), Decided)
    state = apply_change(state, FinishVoterChange(), "last")
    cluster.propose(2, state)
    assert isinstance(cluster.run(2), Decided)
    assert cluster.read(1).value == state


def test_initialise_is_for_this_start_only():
    acceptor = Acceptor(7, None)
    assert acceptor.step(0, Received(1, Initialise(1, 6))) == []
    assert acceptor.record is None
    [persist] = acceptor.step(0, Received(1, Initialise(1, 7)))
    assert isinstance(persist, Persist)
    [send] = acceptor.step(0, Received(1, Query(2)))
    assert isinstance(send.message, Current)
    assert send.message.value is None


def test_nothing_that_comes_later_undoes_a_recovery():
    """Others go on asking for the old register while this voter is about to start anew."""
    state = first_state()
    acceptor = Acceptor(1, birth_record(state))
    waits = Accept(1, Ballot(2, 2, 1), 1, state)
    assert isinstance(acceptor.step(0, Received(2, waits))[-1], Notify)
    ballot = Ballot(1000, 1, 1)
    record = Record(ballot, ballot, recovered_state(state, [1], {}, "recover"))
    actions = acceptor.step(0, Replace(record))
    assert actions == [Persist(encode_record(record)), Notify(Replaced())]
    assert acceptor.step(0, Vouched(1, [], 0)) == []
    [refused] = acceptor.step(0, Received(2, Prepare(7, Ballot(9, 2, 1), 1)))
    assert refused.message.value == record.value
    [refused] = acceptor.step(0, Received(2, Prepare(8, Ballot(2000, 2, 1), 1)))
    assert refused.message.value == record.value
    epoch = record.value.config_epoch
    [kept, _promised] = acceptor.step(0, Received(2, Prepare(9, Ballot(2000, 2, 1), epoch)))
    assert decode_record_untrusted(kept.record).value == record.value


def test_a_damaged_store_is_an_error():
    record = birth_record(first_state())
    assert encode_record(decode_record_untrusted(record)) == record
    for broken in (record[:-1], b"x" + record[1:], record[:40] + b"\xff" + record[41:], b""):
        with pytest.raises(CorruptionError):
            decode_record_untrusted(broken)
