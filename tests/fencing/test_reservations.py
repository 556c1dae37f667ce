"""SCSI-3 persistent reservations, from SPC."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from fencing.reservations import (
    ALL_REGISTRANTS,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_LIST,
    INVALID_RELEASE,
    READ,
    REGISTRATIONS_PREEMPTED,
    RESERVATIONS_PREEMPTED,
    RESERVATIONS_RELEASED,
    WRITE,
    Attention,
    Capabilities,
    Request,
    Reservations,
    ReservationType,
    ServiceAction,
    Status,
)
from tests.fencing.reservation_model import Command, Model

CONFLICT = Status.RESERVATION_CONFLICT
T = ReservationType
A = ServiceAction
RW = READ | WRITE


def nexus(node):
    return Instance(NodeId(node), Incarnation(1), InstanceNo(1))


N1, N2, N3 = nexus(1), nexus(2), nexus(3)


class Table(Reservations):
    """With short verbs; each call checks the table."""

    def do(self, who, action, key=0, service_key=0, kind=0, **more):
        scope = more.pop("scope", 0)
        outcome = self.execute(
            Request(who, int(action), key, service_key, int(kind), scope, aptpl=True, **more)
        )
        self.check()
        return outcome

    def register(self, who, key):
        assert self.do(who, A.REGISTER_AND_IGNORE, 0, key).status is Status.GOOD


def registered(*keys):
    table = Table()
    for number, key in enumerate(keys, 1):
        table.register(nexus(number), key)
    return table


SPC_ACCESS = {
    # type: (holder, registered, unregistered) as (read, write)
    1: ("rw", "r", "r"),
    3: ("rw", "", ""),
    5: ("rw", "rw", "r"),
    6: ("rw", "rw", ""),
    7: ("rw", "rw", "r"),
    8: ("rw", "rw", ""),
}


BITS = {"": 0, "r": READ, "rw": RW}


@pytest.mark.parametrize(("code", "row"), SPC_ACCESS.items())
def test_access_matrix(code, row):
    """Holder, registrant, stranger and anonymous under each type, before and after it is held."""
    table = registered(0xA, 0xB)
    assert [table.access(n) for n in (N1, N2, N3, None)] == [RW] * 4
    assert table.do(N1, A.RESERVE, 0xA, kind=code).status is Status.GOOD
    holder, member, other = (BITS[text] for text in row)
    assert [table.access(n) for n in (N1, N2, N3, None)] == [holder, member, other, other]
    assert table.is_holder(N2) == (code in ALL_REGISTRANTS)
    assert table.do(N1, A.RELEASE, 0xA, kind=code).status is Status.GOOD
    assert [table.access(n) for n in (N1, N2, N3, None)] == [RW] * 4


def test_register():
    """REGISTER needs the right old key; zero unregisters; a zero on a stranger is a no-op."""
    table = Table()
    assert table.do(N1, A.REGISTER, 0, 0).status is Status.GOOD
    assert table.generation == 0
    assert table.do(N1, A.REGISTER, 7, 0xA).status is Status.RESERVATION_CONFLICT
    assert table.do(N1, A.REGISTER, 0, 0xA).status is Status.GOOD
    assert table.do(N1, A.REGISTER, 0, 0xB).status is Status.RESERVATION_CONFLICT
    assert table.do(N1, A.REGISTER, 0xA, 0xB).status is Status.GOOD
    assert table.do(N2, A.REGISTER, 0, 0xB).status is Status.GOOD  # the same key is legal
    assert table.read_keys() == (3, [0xB, 0xB])
    assert table.do(N1, A.REGISTER, 0xB, 0).status is Status.GOOD
    assert table.read_keys() == (4, [0xB])


@pytest.mark.parametrize("kind", sorted(SPC_ACCESS))
def test_reserve_and_release(kind):
    """Who may, what repeats, what conflicts; neither counts in the generation."""
    table = registered(0xA, 0xB)
    generation = table.generation
    assert table.do(N3, A.RESERVE, 0, kind=kind).status is Status.RESERVATION_CONFLICT
    assert table.do(N1, A.RESERVE, 0xB, kind=kind).status is Status.RESERVATION_CONFLICT
    bad = table.do(N1, A.RESERVE, 0xA, kind=2)
    assert (bad.status, bad.sense) == (Status.CHECK_CONDITION, INVALID_FIELD_IN_CDB)
    assert table.do(N1, A.RELEASE, 0xA, kind=kind).status is Status.GOOD  # nothing held
    assert table.do(N1, A.RESERVE, 0xA, kind=kind).changed
    assert not table.do(N1, A.RESERVE, 0xA, kind=kind).changed
    other = next(t for t in SPC_ACCESS if t != kind)
    assert table.do(N1, A.RESERVE, 0xA, kind=other).status is Status.RESERVATION_CONFLICT
    second = table.do(N2, A.RESERVE, 0xB, kind=kind)
    good = kind in ALL_REGISTRANTS
    assert second.status is (Status.GOOD if good else Status.RESERVATION_CONFLICT)
    key = 0 if good else 0xA
    assert table.read_reservation() == (generation, key, kind)
    wrong = table.do(N1, A.RELEASE, 0xA, kind=other)
    assert (wrong.status, wrong.sense) == (Status.CHECK_CONDITION, INVALID_RELEASE)
    done = table.do(N1, A.RELEASE, 0xA, kind=kind)
    told = kind not in (T.WRITE_EXCLUSIVE, T.EXCLUSIVE_ACCESS)
    assert done.attentions == ((Attention(N2, RESERVATIONS_RELEASED),) if told else ())
    assert table.read_reservation() is None
    assert table.generation == generation


def test_unregister_of_the_holder():
    """The reservation goes, and with registrants only the others hear it. All registrants: it
    stays to the last."""
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=3)
    assert table.do(N1, A.REGISTER, 0xA, 0).attentions == ()
    assert table.read_reservation() is None
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=5)
    gone = table.do(N1, A.REGISTER, 0xA, 0)
    assert gone.attentions == (Attention(N2, RESERVATIONS_RELEASED),)
    assert table.read_reservation() is None
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=7)
    assert table.do(N1, A.REGISTER, 0xA, 0).attentions == ()
    assert table.type is T.WRITE_EXCLUSIVE_ALL_REGISTRANTS
    table.do(N2, A.REGISTER, 0xB, 0)
    assert table.read_reservation() is None


def test_register_and_move():
    """Only the holder, not with all registrants; the target is registered and holds."""
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=1)
    assert table.do(N2, A.REGISTER_AND_MOVE, 0xB, 9, target=N3).status is CONFLICT
    for bad in ({"service_key": 0, "target": N3}, {"service_key": 9, "target": N1},
                {"service_key": 9}):  # fmt: skip
        done = table.do(N1, A.REGISTER_AND_MOVE, 0xA, **bad)
        assert (done.status, done.sense) == (Status.CHECK_CONDITION, INVALID_FIELD_IN_LIST)
    assert table.read_keys() == (2, [0xA, 0xB])
    assert table.do(N1, A.REGISTER_AND_MOVE, 0xA, 9, target=N3).status is Status.GOOD
    assert [(row.nexus, row.key, row.holder, row.type) for row in table.read_full_status()[1]] == [
        (N1, 0xA, False, 0), (N2, 0xB, False, 0), (N3, 9, True, 1),
    ]  # fmt: skip
    done = table.do(N3, A.REGISTER_AND_MOVE, 9, 0xC, target=N2, unregister=True)
    assert done.removed == (N3,)
    assert table.read_keys() == (4, [0xA, 0xC])
    assert table.read_reservation() == (4, 0xC, 1)
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=8)
    assert table.do(N1, A.REGISTER_AND_MOVE, 0xA, 9, target=N3).status is CONFLICT


def test_capabilities():
    """All six types; what is said of persistence is what the last registration asked for."""
    table = registered(0xA)
    assert table.report_capabilities() == Capabilities(True, True, 0xEA01)
    table.execute(Request(N1, A.REGISTER, 0xA, 0xA, aptpl=False))
    assert table.report_capabilities() == Capabilities(True, False, 0xEA01)


def test_clear():
    """Everything goes, the others get RESERVATIONS PREEMPTED, the generation counts one."""
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=5)
    generation = table.generation
    done = table.do(N2, A.CLEAR, 0xB)
    assert done.attentions == (Attention(N1, RESERVATIONS_PREEMPTED),)
    assert table.read_keys() == (generation + 1, [])
    assert table.read_reservation() is None


def test_preempt_of_the_holder():
    """The holder loses all, the preemptor holds with its type; a changed type is told."""
    table = registered(0xA, 0xB, 0xC)
    table.do(N1, A.RESERVE, 0xA, kind=5)
    done = table.do(N2, A.PREEMPT_AND_ABORT, 0xB, 0xA, 7)
    assert done.removed == (N1,)
    assert done.drain
    assert set(done.attentions) == {
        Attention(N3, RESERVATIONS_RELEASED), Attention(N1, REGISTRATIONS_PREEMPTED),
    }  # fmt: skip
    assert table.read_reservation() == (4, 0, 7)
    assert table.access(N1) == READ


def test_preempt_without_and_beside_the_reservation():
    """A key of non-holders removes them and ignores the type; an unknown key conflicts."""
    table = registered(0xA, 0xB)
    assert table.do(N2, A.PREEMPT, 0xB, 0xA, 0).removed == (N1,)
    table = registered(0xA, 0xB, 0xC)
    table.do(N1, A.RESERVE, 0xA, kind=5)
    assert table.do(N2, A.PREEMPT, 0xB, 0xC, 99).removed == (N3,)
    assert table.read_reservation() == (4, 0xA, 5)
    assert table.do(N2, A.PREEMPT, 0xB, 0xDEAD, 5).status is Status.RESERVATION_CONFLICT
    zero = table.do(N2, A.PREEMPT, 0xB, 0, 5)
    assert (zero.status, zero.sense) == (Status.CHECK_CONDITION, INVALID_FIELD_IN_LIST)
    bad = table.do(N2, A.PREEMPT, 0xB, 0xA, 2)
    assert bad.status is Status.CHECK_CONDITION
    assert table.read_keys()[1] == [0xA, 0xB]


def test_preempt_of_all_registrants():
    """Key 0 removes everybody else; a key removes just its owners and the reservation stays."""
    table = registered(0xA, 0xB, 0xC)
    table.do(N1, A.RESERVE, 0xA, kind=7)
    assert table.do(N2, A.PREEMPT, 0xB, 0xC, 5).removed == (N3,)
    assert table.type == 7
    assert table.do(N2, A.PREEMPT, 0xB, 0, 7).removed == (N1,)
    assert table.read_keys()[1] == [0xB]


def test_self_preempt_changes_the_type():
    """The holder preempts itself: it keeps its registration, the type changes."""
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=5)
    done = table.do(N1, A.PREEMPT, 0xA, 0xA, 7)
    assert done.removed == ()
    assert table.read_keys()[1] == [0xA, 0xB]
    assert table.type == 7


def test_two_preempts_race():
    """Of two that preempt each other exactly one wins, in either order."""
    for first, second in (((N1, 0xA, 0xB), (N2, 0xB, 0xA)), ((N2, 0xB, 0xA), (N1, 0xA, 0xB))):
        table = registered(0xA, 0xB)
        results = [
            table.do(n, A.PREEMPT, key, victim, 7).status for n, key, victim in (first, second)
        ]
        assert results == [Status.GOOD, Status.RESERVATION_CONFLICT]


def test_generation_wraps():
    """32 bits."""
    table = registered(0xA)
    table.generation = (1 << 32) - 1
    table.register(N2, 0xB)
    assert table.generation == 0


def test_state_keeps_everything_but_the_generation():
    """What APTPL keeps through a restart."""
    table = registered(0xA, 0xB)
    table.do(N1, A.RESERVE, 0xA, kind=5)
    again = Reservations(table.stored_state())
    assert again.keys == table.keys
    assert (again.holder, again.type, again.generation) == (N1, 5, 0)
    table.execute(Request(N2, A.REGISTER, 0xB, 0xB, aptpl=False))
    assert Reservations(table.stored_state()).keys == {}


def test_bars_drop_registrations_but_not_the_reservation_of_all():
    """An install takes the dead away; the export never opens to strangers by it."""
    table = Table()
    assert table.hold_for_all(N1, 0xA)
    assert table.hold_for_all(N2, 0xB)
    assert not table.hold_for_all(N2, 0xB)
    table.drop({N1, N2})
    table.check()
    assert table.access(N1) == READ
    assert table.type == 7
    again = Reservations(table.stored_state())
    assert Reservations(again.stored_state()).type == 7, "it ends with the second restart"


STATUS = {Status.GOOD: "good", Status.RESERVATION_CONFLICT: "conflict",
          Status.CHECK_CONDITION: "check"}  # fmt: skip
commands = st.builds(
    Command,
    who=st.sampled_from([N1, N2, N3]),
    action=st.sampled_from(list(A)),
    key=st.sampled_from([0, 1, 2]),
    service_key=st.sampled_from([0, 1, 2]),
    kind=st.sampled_from([1, 3, 5, 6, 7, 8, 2]),
    scope=st.sampled_from([0, 0, 0, 1]),
    target=st.sampled_from([N1, N2, N3]),
    unregister=st.booleans(),
)


def compare(table, model, command):
    """One step of both; statuses, attentions, removals and tables agree."""
    before = table.state()
    outcome = table.do(
        command.who, command.action, command.key, command.service_key, command.kind,
        scope=command.scope, target=command.target, unregister=command.unregister,
    )  # fmt: skip
    answer = model.do(command)
    assert STATUS[outcome.status] == answer.status, command
    assert {(a.nexus, a.code) for a in outcome.attentions} == answer.attentions, command
    assert len(outcome.attentions) == len(answer.attentions)
    assert set(outcome.removed) >= answer.lost
    assert (table.keys, table.generation) == (model.keys(), model.generation)
    assert [n for n in (N1, N2, N3) if table.is_holder(n)] == sorted(model.holders())
    assert int(table.type) == model.kind()
    assert outcome.changed or table.state() == before


@settings(max_examples=300, deadline=None)
@given(st.lists(commands, max_size=40))
def test_histories_agree_with_the_model(history):
    """Any history of three nexuses gives the same as the model, step by step."""
    table, model = Table(), Model()
    for command in history:
        compare(table, model, command)


def test_short_histories_exhaustively():
    """Every history of four steps over two nexuses and two types agrees with the model."""
    steps = [
        Command(*values, target=N2 if values[0] is N1 else N1)
        for values in itertools.product(
            (N1, N2), (A.REGISTER, A.RESERVE, A.RELEASE, A.CLEAR, A.PREEMPT, A.REGISTER_AND_MOVE),
            (0, 1), (0, 1, 2), (1, 8),
        )
    ]  # fmt: skip
    frontier = [(Table(), Model())]
    seen = set()
    for _ in range(4):
        following = []
        for table, model in frontier:
            for step in steps:
                twins = (copy.deepcopy(table), copy.deepcopy(model))
                compare(*twins, step)
                state = repr((twins[0].state(), twins[0].aptpl))
                if state not in seen:
                    seen.add(state)
                    following.append(twins)
        frontier = following
    assert len(seen) == 30, "every table that keys 1 and 2 and types 1 and 8 allow"
