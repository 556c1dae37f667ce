"""SCSI-3 persistent reservations, from SPC."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from fencing.reservations import (
    ACCESS,
    ALL_REGISTRANTS,
    INVALID_FIELD_IN_CDB,
    INVALID_FIELD_IN_LIST,
    INVALID_RELEASE,
    READ,
    REGISTRATIONS_PREEMPTED,
    RESERVATIONS_PREEMPTED,
    RESERVATIONS_RELEASED,
    TYPES_OFFERED,
    WRITE,
    Attention,
    Request,
    Reservations,
    ReservationType,
    ServiceAction,
    Status,
)

T = ReservationType
A = ServiceAction
RW = READ | WRITE


def nexus(node):
    return Instance(NodeId(node), Incarnation(1), InstanceNo(1))


N1, N2, N3 = nexus(1), nexus(2), nexus(3)


class Table(Reservations):
    """With short verbs; each call checks the table."""

    def do(self, who, action, key=0, service_key=0, kind=0, **more):
        outcome = self.execute(
            Request(who, int(action), key, service_key, int(kind), more.pop("scope", 0), True)
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


@pytest.mark.parametrize(("code", "row"), SPC_ACCESS.items())
def test_access_rows_of_all_types(code, row):
    """The table is SPC's, also for the types that are not offered yet."""
    bits = {"": 0, "r": READ, "rw": RW}
    assert ACCESS[T(code)] == tuple(bits[text] for text in row)


@pytest.mark.parametrize("kind", sorted(TYPES_OFFERED))
def test_access_matrix(kind):
    """Holder, registrant, stranger and anonymous under each offered type."""
    table = registered(0xA, 0xB)
    assert [table.access(n) for n in (N1, N2, N3, None)] == [RW] * 4
    assert table.do(N1, A.RESERVE, 0xA, kind=kind).status is Status.GOOD
    assert [table.access(n) for n in (N1, N2, N3, None)] == [RW, RW, READ, READ]
    assert table.is_holder(N2) == (kind in ALL_REGISTRANTS)


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


@pytest.mark.parametrize("kind", sorted(TYPES_OFFERED))
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
    other = next(t for t in TYPES_OFFERED if t != kind)
    assert table.do(N1, A.RESERVE, 0xA, kind=other).status is Status.RESERVATION_CONFLICT
    second = table.do(N2, A.RESERVE, 0xB, kind=kind)
    good = kind in ALL_REGISTRANTS
    assert second.status is (Status.GOOD if good else Status.RESERVATION_CONFLICT)
    key = 0 if good else 0xA
    assert table.read_reservation() == (generation, key, kind)
    wrong = table.do(N1, A.RELEASE, 0xA, kind=other)
    assert (wrong.status, wrong.sense) == (Status.CHECK_CONDITION, INVALID_RELEASE)
    done = table.do(N1, A.RELEASE, 0xA, kind=kind)
    assert done.attentions == (Attention(N2, RESERVATIONS_RELEASED),)
    assert table.read_reservation() is None
    assert table.generation == generation


def test_unregister_of_the_holder():
    """Registrants only: the reservation goes and the others hear it. All: it stays to the last."""
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


# --- an independent model: sets and plain rules, only what histories can see


def model_step(state, who, action, key, service_key, kind):
    """(registrations, holders, type, generation) -> (status, new state); SPC said once more."""
    regs, holder, held, generation = state
    everybody = held == 7
    mine = regs.get(who)

    def is_holder(x):
        return x in regs if everybody else (held != 0 and holder == x)

    if action in (A.REGISTER, A.REGISTER_AND_IGNORE):
        if action == A.REGISTER and key != (mine or 0):
            return "conflict", state
        if mine is None and not service_key:
            return "good", state
        new = dict(regs)
        if service_key:
            new[who] = service_key
            return "good", (new, holder, held, generation + 1)
        lost = is_holder(who) and not (everybody and len(regs) > 1)
        del new[who]
        return "good", (new, None if lost else holder, 0 if lost else held, generation + 1)
    if mine is None or mine != key:
        return "conflict", state
    if action == A.RESERVE:
        if kind not in (5, 7):
            return "check", state
        if held == 0:
            return "good", (regs, who if kind == 5 else None, kind, generation)
        return ("good" if is_holder(who) and held == kind else "conflict"), state
    if action == A.RELEASE:
        if held == 0 or not is_holder(who):
            return "good", state
        return ("good", (regs, None, 0, generation)) if kind == held else ("check", state)
    if action == A.CLEAR:
        return "good", ({}, None, 0, generation + 1)
    if service_key == 0 and not everybody:
        return "check", state
    if service_key and service_key not in regs.values():
        return "conflict", state
    if service_key == 0 or (held == 5 and regs[holder] == service_key):
        if kind not in (5, 7):
            return "check", state
        new = {x: k for x, k in regs.items() if x == who or (service_key != 0 and k != service_key)}
        return "good", (new, who if kind == 5 else None, kind, generation + 1)
    new = {x: k for x, k in regs.items() if k != service_key}
    return "good", (new, holder, held if new or held != 7 else 0, generation + 1)


STATUS = {Status.GOOD: "good", Status.RESERVATION_CONFLICT: "conflict",
          Status.CHECK_CONDITION: "check"}  # fmt: skip
commands = st.tuples(
    st.sampled_from([N1, N2, N3]),
    st.sampled_from([A.REGISTER, A.REGISTER_AND_IGNORE, A.RESERVE, A.RELEASE, A.CLEAR, A.PREEMPT,
                     A.PREEMPT_AND_ABORT]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([5, 7, 1]),
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(commands, max_size=30))
def test_histories_agree_with_the_model(history):
    """Any history gives the same statuses, keys, holder, type and generation as the model."""
    table = Table()
    state = ({}, None, 0, 0)
    for command in history:
        who, action, key, service_key, kind = command
        expected, state = model_step(state, *command)
        before = table.state()
        outcome = table.do(who, action, key, service_key, kind)
        assert STATUS[outcome.status] == expected, command
        assert (table.keys, table.holder, int(table.type), table.generation) == state
        assert outcome.changed or table.state() == before


def test_short_histories_exhaustively():
    """Every history of three steps over two nexuses agrees with the model."""
    steps = list(itertools.product(
        (N1, N2), (A.REGISTER, A.RESERVE, A.RELEASE, A.CLEAR, A.PREEMPT), (0, 1), (0, 1, 2), (5, 7)
    ))  # fmt: skip
    frontier = [({}, None, 0, 0)]
    seen = {repr(frontier[0])}
    for _ in range(3):
        following = []
        for state in frontier:
            for step in steps:
                table = Table()
                table.keys, table.holder = dict(state[0]), state[1]
                table.type, table.generation = T(state[2]), state[3]
                expected, new = model_step(state, *step)
                assert STATUS[table.do(*step).status] == expected
                assert (table.keys, table.holder, int(table.type), table.generation) == new
                if repr(new) not in seen:
                    seen.add(repr(new))
                    following.append(new)
        frontier = following
