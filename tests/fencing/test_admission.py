"""Installs and bars: rules R2 and R3."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.control import MemberInfo
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from fencing.admission import (
    Admission,
    Answer,
    Drained,
    Heard,
    InstallRequested,
    Persist,
    Persisted,
    Refuse,
    Revoke,
    StopServing,
    Tick,
    Verdict,
    verdict_of,
)

MS = 1_000_000


def line(node, incarnation, live=(), next_=0):
    numbers = [InstanceNo(n) for n in live]
    return MemberInfo(NodeId(node), Incarnation(incarnation), numbers, InstanceNo(next_))


def who(node, incarnation, number):
    return Instance(NodeId(node), Incarnation(incarnation), InstanceNo(number))


def request(epoch, members, sender=None, tombstones=None, dead_ms=1000):
    sender = sender or (members[0].node, members[0].incarnation)
    return InstallRequested(
        NodeId(sender[0]), Incarnation(sender[1]), Epoch(epoch), list(members), tombstones or {},
        dead_ms,
    )  # fmt: skip


def install(machine, epoch, members, now=0, **more):
    """The whole order of one install; the refusal, or None."""
    (action,) = machine.step(now, request(epoch, members, **more))
    if isinstance(action, Refuse):
        return action
    assert isinstance(action, Persist)
    assert machine.step(now, Persisted(action.record)) == [Revoke(Epoch(epoch))]
    assert machine.step(now, Drained(Epoch(epoch))) == [Answer(Epoch(epoch))]
    machine.check()
    return None


@pytest.mark.parametrize(
    ("node", "incarnation", "number", "expected"),
    [
        (1, 5, 2, Verdict.ADMITTED),  # live
        (1, 5, 3, Verdict.BARRED),  # below next, not live
        (1, 5, 4, Verdict.ADMITTED),  # next
        (1, 5, 900, Verdict.ADMITTED),  # not started yet
        (1, 4, 2, Verdict.BARRED),  # earlier life
        (1, 6, 0, Verdict.UNKNOWN),  # later life: a later view may admit it
        (2, 9, 0, Verdict.BARRED),  # tombstone
        (2, 8, 0, Verdict.BARRED),
        (2, 10, 0, Verdict.UNKNOWN),
        (3, 1, 0, Verdict.UNKNOWN),
    ],
)
def test_verdict_table(node, incarnation, number, expected):
    """Admitted is the incarnation with a live instance or one >= next; the rest is barred."""
    machine = Admission(None, 0)
    install(machine, 1, [line(1, 5, (2,), 4), line(2, 9, (), 0)])
    install(machine, 2, [line(1, 5, (2,), 4)])
    assert machine.verdict(who(node, incarnation, number)) is expected


def test_nobody_is_served_before_the_answer():
    """A record alone, also one from before a restart, gives no right to serve."""
    machine = Admission(None, 0)
    assert not machine.serving
    (action,) = machine.step(0, request(1, [line(1, 1)]))
    machine.step(0, Persisted(action.record))
    assert not machine.serving
    machine.step(0, Drained(Epoch(1)))
    assert machine.serving
    again = Admission(machine.record, 0)
    assert again.epoch == 1
    assert not again.serving
    assert install(again, 1, [line(1, 1)]) is None
    assert again.serving


def test_an_older_drain_does_not_open_the_door():
    """The answer of epoch 1 that comes after the record of epoch 2 does not start serving."""
    machine = Admission(None, 0)
    (first,) = machine.step(0, request(1, [line(1, 1)]))
    machine.step(0, Persisted(first.record))
    (second,) = machine.step(0, request(2, [line(1, 1)]))
    machine.step(0, Persisted(second.record))
    machine.step(0, Drained(Epoch(1)))
    assert not machine.serving


def test_install_rules():
    """Too old, another list for the same epoch, a stranger as sender, regressions: refused."""
    machine = Admission(None, 0)
    assert install(machine, 5, [line(1, 3, (1,), 2), line(2, 4)]) is None
    before = machine.record
    assert install(machine, 5, [line(2, 4), line(1, 3, (1,), 2)]) is None  # the same list
    bad = {
        "older": (4, [line(1, 3, (1,), 2), line(2, 4)], None),
        "another": (5, [line(1, 3, (1,), 2)], None),
        "not in the keep-list": (6, [line(1, 3, (1,), 2)], (2, 4)),
        "back to incarnation": (6, [line(1, 2), line(2, 4)], None),
        "is barred": (6, [line(1, 3, (0, 1), 2)], None),
    }
    for text, (epoch, members, sender) in bad.items():
        refused = install(machine, epoch, members, sender=sender)
        assert refused is not None, text
        assert text in refused.reason
        assert machine.record == before
    assert install(machine, 6, [line(2, 4)]) is None
    assert "for ever" in install(machine, 7, [line(2, 4), line(1, 3)]).reason
    assert install(machine, 7, [line(2, 4), line(1, 4)]) is None


def test_silence_ends_service():
    """Rule R3: T_dead without an authenticated message of a member stops the server."""
    machine = Admission(None, 0)
    install(machine, 1, [line(1, 3)], now=0)
    assert machine.deadline() == 1000 * MS
    machine.step(600 * MS, Heard(NodeId(1), Incarnation(3)))
    machine.step(900 * MS, Heard(NodeId(1), Incarnation(2)))  # not a member
    machine.step(900 * MS, Heard(NodeId(7), Incarnation(3)))
    assert machine.step(1599 * MS, Tick()) == []
    assert machine.step(1600 * MS, Tick()) == [StopServing()]
    assert not machine.serving
    machine.step(1700 * MS, Heard(NodeId(1), Incarnation(3)))
    assert not machine.serving  # only an install opens again
    assert install(machine, 1, [line(1, 3)], now=1700 * MS) is None
    assert machine.serving


def admitted_set(members, node):
    """Everyone of a small world whom a list admits, said naively."""
    result = set()
    for m in members:
        if m.node == node:
            for number in range(6):
                if number in m.live or number >= m.next:
                    result.add((m.incarnation, number))
    return result


small_lists = [
    [*([line(1, inc, live, nxt)] if inc else []), line(2, 1)]
    for inc, live, nxt in [
        (0, (), 0),
        *itertools.product((1, 2), ((), (0,), (1,), (0, 1), (2,)), (0, 1, 2)),
    ]
]


@pytest.mark.parametrize("first", range(len(small_lists)))
def test_admitted_only_shrinks_exhaustively(first):
    """For every pair of lists: an install is taken exactly when it admits nobody again."""
    old = small_lists[first]
    for new in small_lists:
        machine = Admission(None, 0)
        assert install(machine, 1, old, sender=(2, 1)) is None
        refused = install(machine, 2, new, sender=(2, 1))
        before, after = admitted_set(old, 1), admitted_set(new, 1)
        old_incarnation = max((m.incarnation for m in old if m.node == 1), default=0)
        revived = {x for x in after - before if x[0] <= old_incarnation}
        goes_back = any(x[0] < old_incarnation for x in after) and bool(after)
        assert (refused is not None) == bool(revived or goes_back), (old, new)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(small_lists), st.booleans()), max_size=12)
)
def test_histories_never_readmit(steps):
    """Whatever is installed in whatever order, with restarts: who was barred stays barred."""
    machine = Admission(None, 0)
    barred = set()
    epoch_lists: dict[int, list] = {}
    everyone = [who(n, i, k) for n in (1, 2) for i in (1, 2) for k in range(4)]
    for epoch, members, restart in steps:
        if restart:
            machine = Admission(machine.record, 0)
        if install(machine, epoch, members, sender=(2, 1)) is None:
            assert epoch_lists.setdefault(epoch, members) == members
        for x in everyone:
            verdict = verdict_of(machine.record, x)
            if x in barred:
                assert verdict is Verdict.BARRED
            if verdict is Verdict.BARRED:
                barred.add(x)
