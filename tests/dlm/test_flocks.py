"""flock on the lock manager: modes, changes, waiting, giving up, deaths; where it is answered."""

import pytest

from cluster.locks import Mode
from dlm.modes import Result
from tests.dlm.services import ServiceNet

PR, EX = Mode.PR, Mode.EX
GRANTED, AGAIN, BUSY = Result.GRANTED, Result.AGAIN, Result.BUSY
NAME = b"K0000000000000007"


class Caller:
    """An open file on a member."""

    last = 0

    def __init__(self, net, node):
        self.net, self.node = net, node
        self.flocks = net.at(node).flocks
        Caller.last += 1
        self.key = Caller.last
        self.results = []
        self.wish = None

    def lock(self, mode, wait=True, settle=True):
        self.results.clear()
        self.wish = self.flocks.lock(NAME, self.key, mode, self.results.append, wait=wait)
        self.end(settle)
        return self.results[0] if self.results else None

    def unlock(self, settle=True):
        self.flocks.unlock(NAME, self.key)
        self.end(settle)

    def cancel(self, settle=True):
        self.flocks.cancel(self.wish)
        self.end(settle)

    def end(self, settle):
        if settle:
            self.net.settle()
        self.flocks.check()


def callers(*nodes, members=3):
    net = ServiceNet(members)
    return net, *(Caller(net, node) for node in nodes)


def test_shared_and_exclusive_between_and_within_members():
    net, a, b, c = callers(1, 2, 2)
    assert a.lock(PR) == b.lock(PR) == c.lock(PR, wait=False) == GRANTED
    assert c.lock(EX, wait=False) == AGAIN  # and it has lost what it had, as everywhere
    assert b.lock(EX) is None
    a.unlock()
    assert b.results == [GRANTED]
    assert a.lock(PR, wait=False) == AGAIN
    assert c.lock(PR) is None
    assert b.lock(PR) == GRANTED
    assert c.results == [GRANTED]
    for one in (b, c):
        one.unlock()
    assert a.lock(EX, wait=False) == GRANTED
    a.unlock()
    left = {lock.granted for m in net.members.values() for lock in m.space.master.locks.values()}
    assert left == {Mode.NL}


def test_two_who_hold_shared_both_get_exclusive_in_turn():
    _net, a, b = callers(1, 2)
    assert a.lock(PR) == b.lock(PR) == GRANTED
    assert a.lock(EX) is None  # gives the shared one up and waits
    assert b.lock(EX) is None or b.results == [GRANTED]
    first, second = (a, b) if a.results else (b, a)
    assert first.results == [GRANTED]
    assert second.results == []
    first.unlock()
    assert second.results == [GRANTED]


def test_who_gives_up_waiting_holds_nothing():
    _net, a, b, c = callers(1, 2, 3)
    assert a.lock(EX) == GRANTED
    assert b.lock(EX) is None
    assert c.lock(EX) is None
    b.cancel()
    a.unlock()
    assert b.results == []
    assert c.results == [GRANTED]
    assert b.lock(EX, wait=False) == AGAIN
    c.unlock()
    assert b.lock(EX, wait=False) == GRANTED


def test_a_grant_that_crosses_the_cancellation_is_given_back():
    net, a, b, c = callers(1, 2, 3)
    assert a.lock(EX) == GRANTED
    assert b.lock(EX) is None
    a.unlock(settle=False)  # the grant for b is under way
    assert net.busy()
    b.cancel(settle=False)
    net.settle()
    assert b.results == []
    assert c.lock(EX, wait=False) == GRANTED


@pytest.mark.parametrize("master", [1, 2, 3])
def test_who_is_told_of_an_unlock_finds_it_free(master):
    """It is done when the master has heard of it."""
    net, a, b, first = callers(1, 2, master)
    assert first.lock(PR) == GRANTED
    first.unlock()
    assert a.lock(EX) == GRANTED
    told = []
    a.flocks.unlock(NAME, a.key, told.append)
    assert bool(told) == (master == 1)
    while not told:
        net.deliver(1, master)
        net.deliver(master, 1)
    assert told == [GRANTED]
    assert b.lock(EX, wait=False) == GRANTED


def test_repeated_unlocks_and_locks_in_the_same_mode_are_nothing():
    net, a, _b = callers(1, 2)
    a.unlock()
    assert a.lock(EX) == a.lock(EX) == GRANTED
    a.unlock()
    a.unlock()
    assert a.lock(PR) == GRANTED
    assert net.at(1).flocks.describe(NAME) == [
        {"kind": "flock", "mode": "PR", "waits": False, "pid": 0}
    ]


def test_a_second_thread_on_the_same_open_file_is_told_so():
    _net, a, b = callers(1, 2)
    assert a.lock(EX) == GRANTED
    assert b.lock(EX) is None
    wish = b.wish
    b.results.clear()
    assert b.flocks.lock(NAME, b.key, EX, b.results.append, wait=True) is None
    assert b.results == [BUSY]
    b.unlock()  # nothing is held, and the first one goes on waiting
    b.results.clear()
    a.unlock()
    assert b.results == [GRANTED]
    assert wish.mode == EX


def test_who_uses_it_first_locks_without_messages():
    net, a, b = callers(2, 3)
    assert a.lock(EX) == GRANTED
    a.unlock()
    for _ in range(3):
        assert a.lock(EX, settle=False) == GRANTED
        a.unlock(settle=False)
        assert net.busy() == 0
    assert b.lock(EX) == GRANTED
    assert a.lock(EX, wait=False, settle=False) == AGAIN
    assert net.busy() == 0


def test_the_master_goes_when_enough_other_names_are_used():
    net, a = callers(2)
    flocks = net.at(2).flocks
    flocks.kept_max = 1
    other = b"K0000000000000008"
    results = []
    assert a.lock(EX) == GRANTED
    flocks.lock(other, 99, EX, results.append, wait=True)
    net.settle()
    assert results == [GRANTED]
    flocks.unlock(other, 99)
    a.unlock()
    net.settle()
    assert set(net.at(2).space.master.resources) == {other}


def test_a_dead_member_keeps_shared_locks_until_silent_and_others_until_released():
    net, a, b = callers(1, 2)
    other = Caller(net, 3)
    assert a.lock(PR) == b.lock(PR) == GRANTED
    a.unlock()
    net.crash(2)
    assert a.lock(EX) is None
    net.make_silent(2)
    assert a.results == [GRANTED]
    net.release(2)
    assert other.lock(EX) is None
    net.crash(1)
    net.make_silent(1)
    assert other.results == []
    net.release(1)
    assert other.results == [GRANTED]


def test_survivors_keep_theirs_when_the_master_dies():
    net, a, b, c = callers(1, 2, 3)
    assert a.lock(PR) == GRANTED  # 1 is the master
    a.unlock()
    assert b.lock(EX) == GRANTED
    assert c.lock(EX) is None
    net.crash(1)
    net.make_silent(1)
    net.release(1)
    assert c.results == []
    assert c.flocks.describe(NAME)[0]["waits"]
    b.unlock()
    assert c.results == [GRANTED]
