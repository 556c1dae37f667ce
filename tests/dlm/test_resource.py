"""The grant rules against an oracle written from the published text, over all small cases."""

import itertools

import pytest

from cluster.ids import Instance
from cluster.locks import Mode
from dlm.messages import NO_MODE, Bast, Reply
from dlm.modes import COMPATIBLE, Flags, Result
from dlm.resource import OVERTAKES_MAX, MasterLock, Resource

NL, CR, CW, PR, PW, EX = Mode
ALL = list(Mode)


def make(number, resource):
    lock = MasterLock(resource, Instance(1, 1, number), number, 0)
    lock.op = 1
    return lock


class Table:
    """A resource with a few locks, and what the master said."""

    def __init__(self):
        self.out = []
        self.resource = Resource(b"r", 0, self.out)
        self.count = 0

    def request(self, mode, flags=Flags.NONE, probe=False):
        self.count += 1
        lock = make(self.count, self.resource)
        self.resource.request(lock, mode, flags, probe=probe)
        self.resource.check()
        return lock

    def convert(self, lock, mode, flags=Flags.NONE, lvb=None):
        lock.op += 1
        self.resource.convert(lock, mode, flags, lvb)
        self.resource.check()

    def unlock(self, lock, flags=Flags.NONE, lvb=None):
        lock.op += 1
        self.resource.unlock(lock, flags, lvb)
        self.resource.check()

    def said(self, lock, kind=Reply):
        return [m for to, m in self.out if to is lock and isinstance(m, kind)]

    def result(self, lock):
        replies = self.said(lock)
        return replies[-1].result if replies else None


def granted(lock):
    return lock.requested == NO_MODE and lock.granted != NO_MODE


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
@pytest.mark.parametrize("third", ALL)
def test_new_requests_are_first_in_first_out(first, second, third):
    t = Table()
    a, b, c = t.request(first), t.request(second), t.request(third)
    assert granted(a)
    assert granted(b) == COMPATIBLE[first][second]
    expect = COMPATIBLE[first][third] and granted(b) and COMPATIBLE[second][third]
    assert granted(c) == expect
    t.unlock(a)
    assert granted(b)
    assert granted(c) == COMPATIBLE[second][third]


@pytest.mark.parametrize("held", list(itertools.product(ALL, repeat=2)))
@pytest.mark.parametrize("wanted", ALL)
@pytest.mark.parametrize("queue", [Flags.NONE, Flags.QUECVT])
def test_conversion_beside_one_holder(held, wanted, queue):
    one, two = held
    if not COMPATIBLE[one][two]:
        return
    t = Table()
    a, b = t.request(one), t.request(two)
    t.convert(a, wanted, queue)
    assert granted(a) == COMPATIBLE[wanted][two]
    t.unlock(b)
    assert granted(a)
    assert a.granted == wanted


@pytest.mark.parametrize("modes", list(itertools.product(ALL, repeat=4)))
def test_two_conversions(modes):
    """Grant in place if compatible; behind a queued one EDEADLK if my granted mode blocks it."""
    one, two, want_one, want_two = modes
    if not COMPATIBLE[one][two]:
        return
    t = Table()
    a, b = t.request(one), t.request(two)
    t.convert(a, want_one)
    first = granted(a)
    holds = want_one if first else one
    t.convert(b, want_two)
    if COMPATIBLE[want_two][holds]:
        assert granted(b)
        assert b.granted == want_two
    elif not first and not COMPATIBLE[two][want_one]:
        assert t.result(b) == Result.DEADLOCK
        assert b.granted == two
    else:
        assert b in t.resource.converting


def test_conversions_go_before_requests_and_quecvt_keeps_the_order():
    t = Table()
    a, b, c = t.request(CR), t.request(CR), t.request(PW)
    new = t.request(EX)
    t.convert(a, PW, Flags.QUECVT)
    t.convert(b, CW)
    assert not granted(a)
    assert not granted(b)
    t.unlock(c)
    assert a.granted == PW
    assert b.granted == CR
    assert not granted(new)


def test_in_place_conversion_overtakes_the_queue():
    t = Table()
    a, b, c = t.request(CR), t.request(NL), t.request(PR)
    t.convert(a, CW)
    assert not granted(a)
    t.convert(b, CR)
    assert granted(b)
    t.convert(b, NL)
    t.convert(b, CR, Flags.QUECVT)
    assert not granted(b)
    t.unlock(c)
    assert a.granted == CW
    assert b.granted == CR


def test_overtaking_is_bounded():
    t = Table()
    waiting, reader = t.request(CR), t.request(PR)
    other = t.request(NL)
    t.convert(waiting, CW)
    for _ in range(OVERTAKES_MAX):
        t.convert(other, CR)
        assert granted(other)
        t.convert(other, NL)
    t.convert(other, CR)
    assert not granted(other)
    t.unlock(reader)
    assert granted(waiting)
    assert granted(other)


def test_noqueue_fails_at_once_and_tells_only_if_asked():
    t = Table()
    a = t.request(EX)
    b = t.request(PR, Flags.NOQUEUE)
    assert t.result(b) == Result.AGAIN
    assert not t.said(a, Bast)
    c = t.request(PR, Flags.NOQUEUE | Flags.NOQUEUEBAST)
    assert t.result(c) == Result.AGAIN
    assert [bast.mode for bast in t.said(a, Bast)] == [PR]


def test_expedite_and_noorder():
    t = Table()
    t.request(PR)
    t.request(EX)
    assert granted(t.request(NL, Flags.EXPEDITE))
    assert not granted(t.request(NL))
    assert granted(t.request(PR, Flags.NOORDER))


def test_headque():
    t = Table()
    a = t.request(EX)
    t.request(EX)
    head = t.request(EX, Flags.HEADQUE)
    t.unlock(a)
    assert granted(head)


def test_altpr_and_altcw():
    t = Table()
    t.request(PR)
    b = t.request(CW, Flags.ALTPR)
    assert b.granted == PR
    assert t.said(b)[-1].status & 4
    c = t.request(EX, Flags.ALTCW)
    assert not granted(c)


def test_convdeadlk_gives_up_the_granted_mode():
    t = Table()
    a, b = t.request(PR), t.request(PR)
    t.convert(a, EX)
    t.convert(b, EX, Flags.CONVDEADLK)
    assert a.granted == EX
    assert b.granted == NL
    t.unlock(a)
    assert b.granted == EX
    assert t.said(b)[-1].status & 1


def test_nodlckwt_tells_the_one_behind():
    t = Table()
    a, b = t.request(PR), t.request(PR)
    t.convert(a, EX)
    t.convert(b, EX, Flags.NODLCKWT)
    assert b in t.resource.converting
    assert t.said(b, Bast)[-1].mode == EX


def test_blocking_modes_accumulate_and_start_anew_after_a_grant():
    t = Table()
    a = t.request(EX)
    t.request(CR)
    t.request(PR)
    assert [b.waiting for b in t.said(a, Bast)] == [1 << CR, 1 << CR | 1 << PR]
    t.convert(a, PW)
    assert t.said(a, Bast)[-1].mode == PR
    assert len(t.said(a, Bast)) == 3


def test_pr_and_cw_block_each_other_in_both_orders():
    for held, wanted in ((PR, CW), (CW, PR)):
        t = Table()
        a = t.request(held)
        t.request(wanted)
        assert t.said(a, Bast)[-1].mode == wanted


@pytest.mark.parametrize("held", [PW, EX])
def test_value_block_is_written_on_the_way_down_only(held):
    t = Table()
    a = t.request(held, Flags.VALBLK)
    assert t.said(a)[-1].status & 2
    t.convert(a, NL, Flags.VALBLK, b"v" * 64)
    b = t.request(PR, Flags.VALBLK)
    assert t.said(b)[-1].lvb == b"v" * 64
    assert not t.said(b)[-1].status & 2
    t.convert(b, NL, Flags.VALBLK, b"w" * 64)
    c = t.request(PR, Flags.VALBLK)
    assert t.said(c)[-1].lvb == b"v" * 64


def test_ivvalblk_until_the_next_write():
    t = Table()
    a, keep = t.request(EX), t.request(NL, Flags.EXPEDITE)
    t.unlock(a, Flags.VALBLK, b"v" * 64)
    b = t.request(EX, Flags.VALBLK)
    t.unlock(b, Flags.IVVALBLK)
    c = t.request(PR, Flags.VALBLK)
    assert t.said(c)[-1].status & 2
    t.unlock(c)
    d = t.request(EX)
    t.unlock(d, Flags.VALBLK, b"w" * 64)
    assert t.resource.lvb_valid
    assert granted(keep)


def test_a_dead_writer_spoils_the_value_and_a_dead_reader_does_not():
    for mode, valid in ((PR, True), (PW, False), (EX, False)):
        t = Table()
        keep = t.request(NL)
        a = t.request(EX)
        t.convert(a, mode, Flags.VALBLK, b"v" * 64)
        if mode == EX:
            t.convert(a, NL, Flags.VALBLK, b"v" * 64)
            t.convert(a, EX)
        t.resource.owner_died(a.owner)
        t.resource.check()
        assert t.resource.lvb_valid == valid, mode
        assert granted(keep)


def test_grant_numbers_rise():
    t = Table()
    numbers = []
    for _ in range(5):
        a = t.request(EX)
        numbers.append(t.said(a)[-1].grant)
        t.unlock(a)
    assert numbers == sorted(set(numbers))
