"""What a judge of circuits counts, one look after the other; the world is in tests/sim."""

import pytest

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.timing import timing_of
from node.circuits import Circuits, limit_ns, look_ns

TIMING = timing_of("fast")
LOOK_NS = look_ns(TIMING)
LOOKS = -(-limit_ns(TIMING) // (LOOK_NS + LOOK_NS // 10)) + 3
"""More than enough of them."""
A, B, C = (Instance(NodeId(n), Incarnation(1), InstanceNo(1)) for n in range(1, 4))


class Judge:
    """The judge of one instance, and its clock."""

    def __init__(self, me):
        self.me = me
        self.now_ns = 100 * LOOK_NS
        self.core = Circuits(TIMING)

    def looks(self, mine, others, count=1, works=True, took_ns=LOOK_NS // 10, pause_ns=LOOK_NS):
        """Look so often; who goes for whom then."""
        found = {}
        for _ in range(count):
            begun_ns = self.now_ns + pause_ns
            self.now_ns = begun_ns + took_ns
            rows = {one: dict.fromkeys(row, 1) for one, row in {self.me: mine, **others}.items()}
            own = {self.me: rows[self.me]}
            found = self.core.look(begun_ns, self.now_ns, works, own, rows)
            if found:
                break
        return found


def test_the_greater_end_goes_and_the_lower_one_stays():
    assert Judge(B).looks([A], {A: [B]}, LOOKS) == {B: A}
    assert not Judge(A).looks([B], {B: [A]}, LOOKS)


def test_the_end_that_misses_more_goes():
    assert Judge(A).looks([B, C], {B: [A], C: [A]}, LOOKS) == {A: B}
    assert not Judge(B).looks([A], {A: [B, C], C: [A]}, LOOKS)
    assert not Judge(C).looks([A], {A: [B, C], B: [A]}, LOOKS)


def test_both_on_one_node():
    rows = {A: {B: 1}, B: {A: 1}}
    core, now_ns, found = Circuits(TIMING), LOOK_NS, {}
    for _ in range(LOOKS):
        found = core.look(now_ns, now_ns + 1, True, rows, rows)
        now_ns += LOOK_NS
    assert found == {B: A}


def test_the_word_of_one_end_is_not_enough():
    """The other one hangs, is dead, or does not know of it yet."""
    assert not Judge(B).looks([A], {}, LOOKS)
    assert not Judge(B).looks([A], {A: []}, LOOKS)
    assert not Judge(B).looks([A], {A: [C]}, LOOKS)
    assert not Judge(B).looks([], {A: [B]}, LOOKS)


@pytest.mark.parametrize(
    "once",
    [
        {"others": {}},
        {"others": {A: []}},
        {"mine": []},
        {"mine": [A, C]},
        {"others": {A: [B, C]}},
        {"works": False},
        {"took_ns": LOOK_NS + 1},
        {"pause_ns": 2 * LOOK_NS + 1},
        {"pause_ns": 100 * LOOK_NS},
    ],
    ids=str,
)
def test_time_begins_anew(once):
    """After one look without an answer, with another one, without quorum, or that was late."""
    judge = Judge(B)
    usual = {"mine": [A], "others": {A: [B]}}
    assert judge.looks(**usual, count=LOOKS) == {B: A}
    assert judge.looks(**usual) == {B: A}
    assert not judge.looks(**{**usual, **once})
    assert not judge.looks(**usual)
    assert not judge.looks(**usual, count=LOOKS // 2 - 1)
    assert judge.looks(**usual, count=LOOKS) == {B: A}
