"""Byte ranges between members: where they are decided, what moves, what deaths do, deadlocks."""

from collections import deque

import pytest

from dlm import range_keeper
from dlm.modes import Result
from dlm.range_deadlock import AGAIN_NS, FIRST_NS
from dlm.range_file import Role
from dlm.range_keeper import MOVE_IDLE_NS, MOVE_USES
from dlm.range_locks import RangeLocks
from dlm.ranges import END, READ, WRITE
from tests.dlm.net import instance
from tests.dlm.services import ServiceNet

GRANTED, AGAIN, DEADLOCK, CANCELLED = (
    Result.GRANTED,
    Result.AGAIN,
    Result.DEADLOCK,
    Result.CANCELLED,
)
NAME = b"P0000000000000007"


class Process:
    """An owner on a member."""

    last = 0

    def __init__(self, net, node, name=NAME):
        self.net, self.node, self.name = net, node, name
        self.ranges = net.at(node).ranges
        Process.last += 1
        self.key = Process.last
        self.pid = 1000 + self.key
        self.ended = []
        self.wish = None

    def lock(self, start, end, kind=WRITE, wait=True, settle=True, name=None):
        self.ended.clear()
        self.wish = self.ranges.lock(
            name or self.name, self.key, start, end, kind, self.ended.append,
            wait=wait, pid=self.pid,
        )  # fmt: skip
        return self.end(settle)

    def unlock(self, start=0, end=END, settle=True, name=None):
        self.ended.clear()
        self.wish = self.ranges.unlock(name or self.name, self.key, start, end, self.ended.append)
        return self.end(settle)

    def test(self, start, end, kind=WRITE):
        self.ended.clear()
        self.ranges.test(self.name, self.key, start, end, kind, self.ended.append)
        self.end(True)
        return self.ended[0].conflict

    def close(self, settle=True):
        self.ranges.close(self.name, self.key)
        self.end(settle)

    def withdraw(self, settle=True):
        self.ranges.withdraw(self.wish)
        return self.end(settle)

    def end(self, settle):
        if settle:
            self.net.settle()
            for member in self.net.members.values():
                member.ranges.check()
        return self.result

    @property
    def result(self):
        return self.ended[0].result if self.ended else None

    @property
    def rows(self):
        return [
            (row["start"], row["end"], row["mode"])
            for row in self.ranges.describe(self.name)
            if not row["waits"] and row["pid"] == self.pid
        ]

    @property
    def role(self):
        file = self.ranges.files.get(self.name)
        return file.role if file is not None else Role.NONE


def processes(*nodes, members=3):
    net = ServiceNet(members)
    return net, *(Process(net, node) for node in nodes)


def test_the_first_user_decides_without_messages():
    net, a, b = processes(2, 2)
    assert a.lock(0, 9) == GRANTED
    assert a.role is Role.KEEPER
    assert b.lock(5, 14, READ, wait=False, settle=False) == AGAIN
    assert b.lock(10, 14, READ, settle=False) == GRANTED
    assert b.lock(5, 9, READ, settle=False) is None
    assert a.unlock(5, 7, settle=False) == GRANTED
    assert b.result is None
    assert a.lock(0, 9, READ, settle=False) == GRANTED
    assert b.result == GRANTED
    assert net.busy() == 0
    assert b.rows == [(5, 14, "read")]


def test_others_ask_the_keeper():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(5, 5, wait=False) == AGAIN
    assert b.role is Role.GUEST
    assert b.lock(20, 29) == c.lock(30, 39) == GRANTED
    assert c.lock(25, 26, READ) is None
    before = net.clock.time_ns
    assert b.unlock(settle=False) == GRANTED
    assert b.rows == []  # at once here, and soon at the keeper
    net.settle()
    assert c.result == GRANTED
    assert net.clock.time_ns == before
    found = b.test(0, 4, READ)
    assert (found.instance, found.pid, found.start, found.end) == (a.ranges.me, a.pid, 0, 9)
    assert b.test(10, 24) is None
    assert c.test(0, END).instance == a.ranges.me
    assert a.test(0, END).start == 25


def test_an_idle_keeper_lets_go_and_a_busy_one_says_so():
    _net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    a.unlock()
    assert b.lock(0, 9) == GRANTED
    assert b.role is Role.KEEPER
    assert c.lock(10, 19) == GRANTED
    assert (b.role, c.role) == (Role.KEEPER, Role.GUEST)
    assert a.lock(15, 15, wait=False) == AGAIN
    assert a.role is Role.GUEST


def test_the_keeper_moves_to_who_uses_it_alone():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(10, 19) == GRANTED
    a.unlock()
    net.clock.advance(MOVE_IDLE_NS + 1)
    for _ in range(MOVE_USES):
        assert b.lock(10, 19, READ) == GRANTED
    assert (a.role, b.role) == (Role.NONE, Role.KEEPER)
    assert c.lock(12, 12, wait=False) == AGAIN


def test_the_keeper_stays_where_others_use_it_too():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(10, 19) == c.lock(20, 20) == GRANTED
    a.unlock()
    net.clock.advance(MOVE_IDLE_NS + 1)
    for _ in range(MOVE_USES):
        assert b.lock(10, 19, READ) == GRANTED
    assert (a.role, b.role) == (Role.KEEPER, Role.GUEST)
    c.unlock()
    assert a.lock(30, 30) == GRANTED
    a.unlock()
    net.clock.advance(MOVE_IDLE_NS + 1)
    for _ in range(MOVE_USES - 1):
        assert b.lock(10, 19, READ) == GRANTED
    assert a.role is Role.KEEPER  # which has used it itself since then
    assert b.lock(10, 19, READ) == GRANTED
    assert b.role is Role.KEEPER


@pytest.mark.parametrize("asker", [1, 2])
def test_more_than_a_name_may_have_is_refused(asker, monkeypatch):
    monkeypatch.setattr(range_keeper, "RANGES_MAX", 2)
    _net, a, b, c, d, e = processes(1, asker, 3, asker, asker)
    assert a.lock(0, 0) == c.lock(10, 19) == GRANTED
    assert b.lock(30, 30) == b.lock(30, 30, wait=False) == Result.FULL
    assert b.lock(0, 0) is d.lock(0, 0) is None
    assert e.lock(0, 0) == Result.FULL  # as many wait
    assert b.withdraw() == d.withdraw() == CANCELLED
    assert b.lock(10, 10, wait=False, settle=False) is None
    assert d.lock(11, 11, wait=False, settle=False) is None
    assert e.lock(12, 12, wait=False) == Result.FULL  # as many are asked about
    assert b.result == d.result == AGAIN
    c.unlock()
    assert b.lock(30, 30) == GRANTED


def test_survivors_tell_a_new_keeper_what_they_hold():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(10, 19) == GRANTED
    assert c.lock(5, 14) is None
    net.crash(1)
    assert c.result is None
    net.make_silent(1)
    net.release(1)
    assert (c.role, c.result) == (Role.KEEPER, None)  # the dead one's are free, b's are not
    assert b.lock(30, 39) == GRANTED
    b.unlock(10, 19)
    assert c.result == GRANTED
    assert b.lock(5, 5, wait=False) == AGAIN


def test_a_dead_guest_keeps_its_locks_until_silent():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 0) == GRANTED
    assert b.lock(10, 19) == GRANTED
    net.crash(2)
    assert c.lock(15, 15) is None
    assert a.lock(12, 12, wait=False) == AGAIN
    net.make_silent(2)
    assert c.result == GRANTED
    assert a.lock(12, 12, wait=False) == GRANTED


def test_nothing_is_decided_while_a_dead_member_may_hold_something():
    net, a, b, c = processes(1, 2, 3)
    net.crash(2)
    assert a.lock(0, 9) is None
    assert a.role is Role.ENLISTING
    assert c.lock(20, 29) is None
    net.make_silent(2)
    assert (a.result, c.result) == (GRANTED, GRANTED)
    assert b.rows == []


def test_a_member_that_dies_while_it_is_asked_is_waited_for():
    net, a, b, c = processes(1, 2, 3)
    assert b.lock(0, 9) == GRANTED
    assert c.lock(10, 19) == GRANTED
    b.unlock()
    net.crash(2)
    net.make_silent(2)
    assert a.lock(10, 10, settle=False) is None
    net.release(2)  # now a keeps it and asks c
    assert a.result is None
    net2 = ServiceNet(3)
    a, c = Process(net2, 1), Process(net2, 3)
    assert a.lock(0, 0, settle=False) is None or a.role is Role.ENLISTING
    while a.role is not Role.ENLISTING:
        for source, to in list(net2.links):
            net2.deliver(source.node, to.node, 1)
    net2.crash(3)
    assert (a.role, a.result) == (Role.ENLISTING, None)
    net2.make_silent(3)
    assert a.result == GRANTED
    assert c.rows == []


def test_a_keeper_that_leaves_loses_nothing():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(10, 19) == GRANTED
    assert c.lock(10, 10) is None
    a.unlock()
    net.leave(1)
    assert c.result is None
    assert b.rows == [(10, 19, "write")]
    assert c.lock(0, 5) == GRANTED
    b.unlock()
    assert {b.role, c.role} <= {Role.KEEPER, Role.GUEST}
    assert b.lock(0, 5, READ, wait=False) == AGAIN


def test_an_interrupted_wait_ends_and_holds_nothing():
    net, a, b, c = processes(1, 2, 1)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(0, 9, READ) is None
    assert b.withdraw() == CANCELLED
    assert c.lock(0, 9) is None
    assert c.withdraw(settle=False) == CANCELLED
    a.unlock()
    assert (b.rows, c.rows) == ([], [])
    assert a.lock(0, 9, wait=False) == GRANTED
    assert net.at(1).ranges.files[NAME].table.count == 1


def test_a_grant_that_crosses_the_interruption_is_kept():
    net, a, b = processes(1, 2)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(0, 9) is None
    a.unlock(settle=False)
    b.ranges.withdraw(b.wish)
    net.settle()
    assert b.result == GRANTED
    assert a.lock(0, 0, READ, wait=False) == AGAIN


def test_a_lock_granted_to_a_dead_caller_is_given_back():
    """It had read locks there; they stay."""
    net, a, b = processes(1, 2)
    assert b.lock(0, 4, READ) == a.lock(0, 9, READ) == GRANTED
    assert b.lock(2, 12) is None
    b.ranges.withdraw(b.wish)
    net.links[b.ranges.me, a.ranges.me].clear()  # it never arrives
    b.ranges.abandon(b.wish)
    a.unlock()
    assert b.rows == [(0, 4, "read")]
    assert a.lock(0, 12, READ, wait=False) == GRANTED
    assert a.lock(5, 12, WRITE, wait=False) == GRANTED
    assert b.lock(20, 20) == GRANTED


def test_a_test_that_was_given_up_changes_nothing():
    net, a, b = processes(1, 2)
    assert a.lock(0, 9) == b.lock(10, 19) == GRANTED
    wish = b.ranges.test(NAME, b.key, 10, 12, READ, b.ended.append)
    b.ranges.abandon(wish)
    net.settle()
    assert b.rows == [(10, 19, "write")]
    assert net.at(2).ranges.files[NAME].operations == {}


def test_the_next_operation_of_an_owner_waits_for_what_was_given_up():
    net, a, b = processes(1, 2)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(0, 9) is None
    given_up = b.wish
    b.ranges.withdraw(given_up)
    b.ranges.abandon(given_up)
    assert b.lock(20, 29, settle=False) is None
    assert not b.wish.sent
    net.settle()
    assert b.result == GRANTED
    b.close()
    assert b.rows == []
    assert a.lock(0, END, wait=False) == GRANTED


def test_close_lets_go_of_everything_and_never_waits():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 9) == GRANTED
    assert b.lock(10, 19) == b.lock(30, 39, READ) == GRANTED
    assert c.lock(10, 39) is None
    b.close(settle=False)
    assert b.rows == []
    net.settle()
    assert c.result == GRANTED
    b.close(settle=False)
    assert net.busy() == 0


def test_an_unlock_that_overtakes_an_answer_is_done_in_the_keepers_order():
    """Two threads of one owner: the keeper has granted what this member has not heard of."""
    net, a, b = processes(1, 2)
    assert a.lock(0, 0) == b.lock(10, 19, READ) == GRANTED
    assert b.lock(10, 19, settle=False) is None
    net.deliver(2, 1)  # granted, and the answer is under way
    ended = []
    b.ranges.unlock(NAME, b.key, 10, 19, ended.append)
    net.settle()
    assert [one.result for one in ended] == [GRANTED]
    assert b.rows == []
    assert a.lock(10, 19, wait=False) == GRANTED


@pytest.mark.parametrize("asker", [1, 3])
@pytest.mark.parametrize("how", ["unlock", "close"])
def test_nobody_is_told_that_a_lock_is_taken_which_was_given_back(asker, how):
    """The keeper has not heard of it yet, and asks."""
    net, a, b, c, d = processes(1, 2, asker, 2)
    assert a.lock(0, 0) == b.lock(10, 19) == GRANTED
    if how == "unlock":
        assert b.unlock(settle=False) == GRANTED
    else:
        b.close(settle=False)
    assert c.lock(10, 10, wait=False, settle=False) is None
    net.settle()
    assert c.result == GRANTED
    assert d.lock(15, 20) == GRANTED
    d.unlock(15, 15, settle=False)
    found = c.test(11, END)
    assert (found.instance, found.start) == (d.ranges.me, 16)
    assert d.lock(10, 10, wait=False) == AGAIN


def test_all_who_are_in_the_way_have_to_confirm():
    net, a, b, c, d = processes(1, 2, 3, 1, members=3)
    assert a.lock(0, 0) == b.lock(10, 19, READ) == c.lock(10, 19, READ) == GRANTED
    assert b.unlock(settle=False) == c.unlock(settle=False) == GRANTED
    assert d.lock(10, 10, wait=False, settle=False) is None
    for first in (2, 3):
        net.deliver(1, first)
        assert d.result is None
        net.deliver(first, 1)
    assert d.result == GRANTED


def test_nothing_is_granted_to_an_asker_that_died_meanwhile():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 0) == b.lock(10, 19) == GRANTED
    assert c.lock(10, 10, wait=False, settle=False) is None
    net.deliver(3, 1)
    b.unlock(settle=False)
    late = list(net.links[instance(2), instance(1)])
    net.links[instance(2), instance(1)].clear()
    net.crash(3, settle=False)
    net.make_silent(3)
    net.release(3)
    net.links[instance(2), instance(1)].extendleft(reversed(late))
    net.settle()
    assert a.lock(10, 10, wait=False) == GRANTED


def test_a_holder_that_dies_before_it_confirms():
    net, a, b, c = processes(1, 2, 1)
    assert a.lock(0, 0) == b.lock(10, 19) == GRANTED
    assert c.lock(10, 10, wait=False, settle=False) is None
    assert a.test(15, 15) is not None
    net.crash(2)
    assert c.result == AGAIN  # what the dead one held is taken until it is silent
    assert a.lock(10, 10, wait=False) == AGAIN
    net.make_silent(2)
    assert a.lock(10, 10, wait=False) == GRANTED


def test_a_try_that_waits_for_confirmation_may_be_interrupted_and_moves_with_the_keeper():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 0) == b.lock(10, 19) == GRANTED
    assert a.lock(10, 10, wait=False, settle=False) is None
    assert a.withdraw() == CANCELLED
    assert c.lock(10, 10, wait=False, settle=False) is None
    net.deliver(3, 1)
    net.leave(1)
    assert c.result == AGAIN
    assert net.at(2).ranges.files[NAME].questions == {}


@pytest.mark.parametrize("sees", [True, False])
def test_a_circle_that_was_opened_by_an_unlock_under_way_is_none(sees, monkeypatch):
    """The keeper has not heard yet that the lock is back; its owner waits for another one. (If the
    owner's member is not asked whether it is still so, there is a circle.)"""
    if not sees:
        monkeypatch.setattr(RangeLocks, "stands_in_the_way", lambda self, name, key, wanted: True)
    net, keeper, a, b = processes(3, 1, 2)
    other = b"P0000000000000008"
    assert keeper.lock(9, 9) == GRANTED
    assert a.lock(5, 5, name=other) == b.lock(1, 1) == GRANTED
    assert a.lock(1, 1) is None
    late = net.links.setdefault((instance(2), instance(3)), deque())
    net.links[instance(2), instance(3)] = deque()
    b.unlock(settle=False)
    late, net.links[instance(2), instance(3)] = net.links[instance(2), instance(3)], late
    assert len(late) == 1
    assert b.lock(5, 5, name=other) is None
    for _ in range(4):
        net.clock.advance(AGAIN_NS)
        net.settle()
    assert (DEADLOCK in (a.result, b.result)) != sees
    if not sees:
        return
    assert (a.result, b.result) == (None, None)
    net.links[instance(2), instance(3)].extend(late)
    net.settle()
    assert a.result == GRANTED


def test_many_names_are_kept_only_while_they_are_used():
    net, a, b = processes(1, 2)
    ranges = net.at(1).ranges
    ranges.kept_max = 4
    names = [b"P%016x" % number for number in range(20)]
    for name in names:
        assert a.lock(0, 0, name=name) == GRANTED
        a.unlock(name=name)
    assert len(ranges.files) <= 4
    assert b.lock(0, 0, name=names[0]) == GRANTED
    for name in names:
        assert a.lock(5, 5, name=name) == GRANTED
    assert len(ranges.files) >= len(names)
    ranges.check()


def waits_for_each_other(net, *chain):
    """Each locks its own byte, then waits for that of the next one; returns them."""
    for number, one in enumerate(chain):
        assert one.lock(number, number, name=one.name) == GRANTED
    for number, one in enumerate(chain):
        following = (number + 1) % len(chain)
        net.clock.advance(1_000_000)
        assert one.lock(following, following, name=chain[following].name) is None
    return chain


@pytest.mark.parametrize("nodes", [(1, 1), (1, 2), (2, 3), (1, 2, 3), (3, 3, 1, 2)])
@pytest.mark.parametrize("names", [1, 2])
def test_who_closes_a_circle_is_told_so(nodes, names):
    """On one member and over several, in one file and over two."""
    net = ServiceNet(3)
    chain = [Process(net, node, b"P%016x" % (number % names)) for number, node in enumerate(nodes)]
    waits_for_each_other(net, *chain)
    net.clock.advance(FIRST_NS)
    net.settle()
    assert [one.result for one in chain] == [None] * (len(chain) - 1) + [DEADLOCK]
    chain[-1].close()
    for number in range(len(chain) - 2, -1, -1):
        assert chain[number].result == GRANTED
        for name in {one.name for one in chain}:
            chain[number].ranges.close(name, chain[number].key)
        net.settle()


def test_two_readers_who_both_want_to_write():
    net, a, b = processes(1, 2)
    assert a.lock(0, 9, READ) == b.lock(0, 9, READ) == GRANTED
    assert a.lock(0, 9, WRITE) is None
    net.clock.advance(FIRST_NS // 2)
    assert b.lock(0, 9, WRITE) is None
    net.clock.advance(FIRST_NS)
    net.settle()
    assert (a.result, b.result) == (None, DEADLOCK)
    assert b.rows == [(0, 9, "read")]
    b.unlock()
    assert a.result == GRANTED


def test_long_chains_without_a_circle_are_no_deadlock():
    net, a, b, c = processes(1, 2, 3)
    assert a.lock(0, 0) == b.lock(1, 1) == c.lock(2, 2) == GRANTED
    assert a.lock(1, 1) is None
    assert b.lock(2, 2) is None
    for _ in range(5):
        net.clock.advance(AGAIN_NS)
        net.settle()
    assert (a.result, b.result) == (None, None)
    c.close()
    assert b.result == GRANTED
    b.close()
    assert a.result == GRANTED


def test_a_circle_that_has_opened_meanwhile_is_none():
    """The chase comes back after one of the circle was interrupted: nobody is told anything."""
    net, a, b = processes(2, 3)
    assert a.lock(0, 0) == b.lock(1, 1) == GRANTED
    assert a.lock(1, 1) is None
    net.clock.advance(1_000_000)
    assert b.lock(0, 0) is None
    net.clock.advance(FIRST_NS)
    while not b.wish.rounds or net.links[instance(2), instance(3)]:
        net.deliver(2, 3)
        net.deliver(3, 2, 1)
        if b.wish.rounds:
            break
    assert a.withdraw(settle=False) in (None, CANCELLED)
    net.settle()
    assert b.result is None
    a.close()
    assert b.result == GRANTED
