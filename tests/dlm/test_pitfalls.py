"""The known ways to get a distributed lock manager wrong, one test each."""

import pytest

from cluster.errors import ProtocolError
from cluster.locks import Mode
from dlm import messages as m
from dlm.cache import HOLD_MAX_NS, LockCache
from dlm.directory import slot_of, slot_table
from dlm.dispatcher import Dispatcher
from dlm.messages import Batch, decode_untrusted, encode
from dlm.modes import LVB_ZERO, Flags, Result
from dlm.resource import OVERTAKES_MAX
from tests.dlm.net import FrozenRuntime, Net, instance

NL, CR, CW, PR, PW, EX = Mode
VALBLK, NOQUEUE, QUECVT = Flags.VALBLK, Flags.NOQUEUE, Flags.QUECVT
FORCE = Flags.FORCEUNLOCK
GRANTED, AGAIN, CANCELLED, UNLOCKED = (
    Result.GRANTED,
    Result.AGAIN,
    Result.CANCELLED,
    Result.UNLOCKED,
)


def two_with_master_one():
    """Two members; 1 masters `name` (also its directory) and holds NL there."""
    net = Net(2)
    name = net.name_for(1)
    net.lock(1, name, NL)
    assert net.master_of(name) == instance(1)
    return net, name


def test_01_the_grant_comes_before_the_blocking_callback():
    net, name = two_with_master_one()
    b = net.lock(2, name, EX, settle=False)
    net.deliver(2, 1)
    net.lock(1, name, PR, settle=False)
    kinds = [type(message) for message in net.pending(1, 2)]
    assert kinds == [m.Reply, m.Bast]
    net.settle()
    assert net.results(2, b) == [GRANTED]
    assert [e.mode for e in net.blocked(2, b)] == [PR]


def test_02_old_callbacks_are_ignored_and_new_ones_come_after_every_conversion():
    net, name = two_with_master_one()
    b = net.lock(2, name, EX)
    net.lock(1, name, EX, settle=False)
    net.convert(2, b, PR, settle=False)
    net.deliver(1, 2, 9)
    assert net.blocked(2, b) == []
    net.settle()
    assert [e.mode for e in net.blocked(2, b)] == [EX]


def test_03_a_grant_is_used_once_before_it_is_given_up():
    net, name = two_with_master_one()
    mine = net.lock(1, name, EX)
    sent = []
    dispatcher = Dispatcher(net.at(2), lambda to, p: sent.append(p), lambda: 0, lambda e: None)
    lock = LockCache(dispatcher, FrozenRuntime()).get(name)
    waiting = lock.hold(EX)
    waiting.send(None)
    for payload in sent:
        net.at(1).receive(instance(2), payload)
    net.unlock(1, mine, settle=False)
    net.lock(1, name, EX, settle=False)
    assert [type(message) for message in net.pending(1, 2)][-2:] == [m.Reply, m.Bast]
    for payload in net.links.pop((instance(1), instance(2))):
        dispatcher.receive(instance(1), payload)
    assert lock.mode == EX
    assert lock._holds[EX] == 1
    assert lock._demand
    with pytest.raises(StopIteration):
        waiting.send(None)


def test_04_cancel_and_grant_cross_and_cancel_before_the_request_arrived():
    net, name = two_with_master_one()
    mine = net.lock(1, name, EX)
    b = net.lock(2, name, PR)
    net.unlock(1, mine, settle=False)
    net.cancel(2, b, settle=False)
    net.settle()
    assert net.results(2, b) == [GRANTED]
    other = net.name_for(1, b"other")
    c = net.lock(2, other, EX, settle=False)
    net.cancel(2, c, settle=False)
    net.settle()
    assert net.results(2, c) in ([GRANTED], [CANCELLED])
    net.unlock(1, net.lock(1, name, NL))


def test_05_forced_unlock_while_a_request_and_a_conversion_are_in_flight():
    net, name = two_with_master_one()
    b = net.lock(2, name, EX, settle=False)
    net.unlock(2, b, FORCE, settle=False)
    net.settle()
    assert net.results(2, b) == [CANCELLED, UNLOCKED]
    assert not net.at(2).owner.locks
    c = net.lock(2, name, PR)
    net.convert(2, c, EX, settle=False)
    net.unlock(2, c, FORCE)
    assert net.results(2, c) == [GRANTED, CANCELLED, UNLOCKED]
    assert [lock.owner for lock in net.resource(name).locks()] == [instance(1)]


def test_06_a_second_operation_is_refused_without_a_message():
    net, name = two_with_master_one()
    b = net.lock(2, name, PR)
    net.lock(1, name, PR)
    assert net.convert(2, b, EX) == GRANTED
    before = len(net.pending(2, 1))
    assert net.convert(2, b, EX) == Result.BUSY
    assert net.unlock(2, b) == Result.BUSY
    assert len(net.pending(2, 1)) == before


def test_07_a_refused_conversion_wants_nothing_any_more():
    net, name = two_with_master_one()
    net.lock(1, name, PR)
    b = net.lock(2, name, PR)
    net.convert(2, b, EX, NOQUEUE)
    assert net.results(2, b) == [GRANTED, AGAIN]
    (there,) = [lock for lock in net.resource(name).locks() if lock.owner == instance(2)]
    assert (there.granted, there.requested) == (PR, m.NO_MODE)
    assert net.at(2).owner.locks[b].wanted == m.NO_MODE


@pytest.mark.parametrize(("held", "ahead"), [(PR, EX), (PR, CW), (CR, EX)])
def test_08_conversion_deadlock_is_about_the_newcomers_granted_mode(held, ahead):
    net, name = two_with_master_one()
    a, b = net.lock(1, name, held), net.lock(2, name, held)
    net.convert(1, a, ahead)
    net.convert(2, b, EX)
    assert net.results(2, b) == [GRANTED, Result.DEADLOCK]
    net.unlock(2, b)
    assert net.results(1, a) == [GRANTED, GRANTED]


def test_09_nobody_starves():
    net, name = two_with_master_one()
    reader = net.lock(1, name, PR)
    writer = net.lock(2, name, EX)
    later = net.lock(1, name, PR)
    assert net.results(1, later) == []
    net.unlock(1, reader)
    assert net.results(2, writer) == [GRANTED]
    net.unlock(2, writer)
    waiting = net.lock(2, name, CR)
    net.convert(2, waiting, CW)
    churn = net.lock(1, name, NL, Flags.EXPEDITE)
    for _ in range(OVERTAKES_MAX):
        net.convert(1, churn, CR)
        net.convert(1, churn, NL)
    net.convert(1, churn, CR)
    assert net.at(1).owner.locks[churn].pending
    net.unlock(1, later)
    assert not net.at(1).owner.locks[churn].pending
    assert net.mode(2, waiting) == CW


def test_10_the_wrong_master_says_so_and_only_one_request_probes():
    net = Net(3)
    name = net.name_for(1)
    keep = net.lock(2, name, NL)
    net.lock(3, name, EX, settle=False)
    net.lock(3, name, EX, settle=False)
    assert len(net.pending(3, 1)) == 1
    net.settle()
    net.unlock(2, keep)
    for lock in list(net.at(3).owner.locks):
        net.unlock(3, lock, FORCE)
    assert net.at(3).owner.hints[name] == instance(2)
    net.lock(1, name, NL)
    again = net.lock(3, name, EX)
    assert net.results(3, again) == [GRANTED]
    assert net.master_of(name) == instance(1)


def test_11_removal_crosses_a_request_that_the_directory_sent_there():
    net = Net(3)
    name = net.name_for(1)
    first = net.lock(2, name, EX)
    c = net.lock(3, name, EX, settle=False)
    net.deliver(3, 1)
    net.unlock(2, first, settle=False)
    net.deliver(1, 3)
    net.deliver(3, 2)
    net.settle()
    assert net.results(3, c) == [GRANTED]
    net.unlock(3, c)
    assert net.master_of(name) is None
    assert not net.at(1).directory.records
    stale = net.lock(2, name, PR)
    net.at(1).master.remove(instance(3), m.Remove(name, 0))
    assert net.at(1).directory.records == {name: instance(2)}
    net.unlock(2, stale)


def test_12_a_request_reaches_the_new_master_before_it_knows():
    net = Net(3)
    name = net.name_for(1)
    a = net.lock(2, name, PR, settle=False)
    net.deliver(2, 1)
    b = net.lock(3, name, PR, settle=False)
    net.deliver(3, 1)
    net.deliver(1, 3)
    net.deliver(3, 2)
    assert net.results(3, b) == []
    net.settle()
    assert net.results(2, a) == net.results(3, b) == [GRANTED]


def test_13_a_process_that_comes_back_is_another_one():
    net = Net(2)
    name = net.name_for(1)
    net.lock(2, name, EX)
    reborn = instance(2, incarnation=2)
    del net.spaces[instance(2)]
    net.view_members.remove(instance(2))
    net.dead.append(instance(2))
    net.add(reborn)
    net.view(joined=[reborn], failed=[instance(2)])
    net.settle()
    old = encode(Batch(1, 1, [m.Unlock(1, 2)]))
    net.at(1).receive(instance(2), old)
    number = net.spaces[reborn].lock(name, EX)
    net.collect(reborn)
    net.settle()
    assert net.spaces[reborn].owner.locks[number].pending
    net.make_silent(2)
    net.release(2)
    net.settle()
    assert net.spaces[reborn].owner.locks[number].mode == EX


def test_14_a_second_death_during_recovery_starts_again_and_keeps_both():
    net = Net(4)
    name = net.name_for(2, among=net.view_members)
    after = [one for one in net.view_members if one != instance(2)]
    while slot_table(after)[slot_of(name)] != instance(3):
        name = net.name_for(2, name + b"x")
    net.lock(2, name, PR)
    a = net.lock(1, name, PR)
    net.crash(2)
    net.deliver(1, 3)
    net.deliver(4, 3)
    net.crash(3)
    net.settle()
    assert net.mode(1, a) == PR
    w = net.lock(4, name, EX)
    net.unlock(1, a)
    assert net.results(4, w) == []
    owners = {lock.owner for lock in net.resource(name).granted if lock.dead}
    assert owners == {instance(2), instance(3)}
    net.make_silent(2)
    net.settle()
    assert net.results(4, w) == []
    net.make_silent(3)
    net.settle()
    net.release(2)
    net.release(3)
    net.settle()
    assert net.results(4, w) == [GRANTED]


def test_15_an_answer_that_came_before_the_view_is_not_asked_for_again():
    net = Net(3)
    name = net.name_for(1)
    b = net.lock(2, name, PR, settle=False)
    net.deliver(2, 1)
    event = net.crash(3, to=[instance(1)])
    net.deliver(1, 2)
    net.give(2, event)
    net.settle()
    assert net.results(2, b) == [GRANTED]
    net.unlock(2, b)
    assert not net.at(2).owner.locks
    assert net.master_of(name) is None


def test_16_a_value_on_its_way_to_a_dying_master_is_not_lost():
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    b = net.lock(2, name, EX, VALBLK)
    net.convert(2, b, PR, VALBLK, b"v" * 64, settle=False)
    net.links.clear()
    net.crash(1)
    net.settle()
    c = net.lock(3, name, PR, VALBLK)
    (done,) = net.done(3, c)
    assert (done.lvb, done.lvb_valid) == (b"v" * 64, True)


def test_17_the_owner_knows_what_it_holds():
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    b = net.lock(2, name, EX)
    c = net.lock(3, name, EX)
    net.convert(2, b, NL, settle=False)
    net.deliver(2, 1)
    # The master has granted 3, and dies with its words unsaid: 2 holds nothing, 3 still waits.
    net.crash(1)
    net.settle()
    assert net.mode(2, b) == NL
    assert net.results(3, c) == []
    net.make_silent(1)
    net.release(1)
    net.settle()
    assert net.results(3, c) == [GRANTED]


def test_18_the_newest_value_wins_and_is_valid_only_if_nobody_dead_wrote_it():
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    old = net.lock(2, name, PR, VALBLK)
    net.convert(2, old, NL)
    writer = net.lock(3, name, EX, VALBLK)
    net.unlock(3, writer, VALBLK, b"2" * 64)
    net.crash(1)
    net.settle()
    reader = net.lock(3, name, PR, VALBLK)
    net.make_silent(1)
    net.release(1)
    net.settle()
    assert not net.done(3, reader)[0].lvb_valid
    net.unlock(3, reader)
    # A surviving reader shows that nobody wrote.
    writer = net.lock(3, name, EX, VALBLK)
    net.convert(3, writer, PR, VALBLK, b"3" * 64)
    net.unlock(3, writer)
    reader = net.lock(3, name, PR, VALBLK)
    master = net.master_of(name)
    assert master == instance(2) or master == instance(3)
    net.convert(2, old, PR, VALBLK)
    net.crash(master.node)
    net.settle()
    survivor = 2 if master.node == 3 else 3
    last = net.lock(survivor, name, PR, VALBLK)
    assert net.done(survivor, last)[0].lvb_valid
    assert net.done(survivor, last)[0].lvb == b"3" * 64


def test_19_a_clean_leave_hands_everything_over():
    net = Net(3)
    names = [b"k%d" % number for number in range(40)]
    for name in names:
        lock = net.lock(1, name, EX, VALBLK)
        net.lock(2, name, NL, Flags.EXPEDITE)
        net.unlock(1, lock, VALBLK, name.ljust(64, b"."))
    assert len(net.at(1).master.resources) == 40
    net.at(1).leave()
    net.collect(instance(1))
    net.settle()
    assert net.left(1)
    del net.spaces[instance(1)]
    net.view_members.remove(instance(1))
    net.view(left=[instance(1)])
    net.settle()
    for name in names:
        lock = net.lock(3, name, PR, VALBLK)
        (done,) = net.done(3, lock)
        assert (done.result, done.lvb, done.lvb_valid) == (GRANTED, name.ljust(64, b"."), True)


def test_20_the_minimal_hold_is_bounded():
    assert HOLD_MAX_NS <= 200_000_000


def test_21_callbacks_keep_their_order_and_may_call_back():
    net = Net(1)
    name = b"r"
    order = []

    class Client:
        def __init__(self, tag):
            self.tag = tag

        def completed(self, completion):
            order.append((self.tag, completion.result))
            if self.tag == "a" and len(order) == 1:
                dispatcher.lock(name, PR, 0, Client("b"))
                order.append("back")

        def blocking(self, mode, waiting):
            order.append((self.tag, mode))

    dispatcher = Dispatcher(net.at(1), lambda *a: None, lambda: 0, lambda e: None)
    dispatcher.lock(name, PR, 0, Client("a"))
    assert order == [("a", GRANTED), "back", ("b", GRANTED)]


def test_22_demotion_runs_in_its_own_task():
    net = Net(1)
    runtime = FrozenRuntime()
    dispatcher = Dispatcher(net.at(1), lambda *a: None, lambda: 0, lambda e: None)
    lock = LockCache(dispatcher, runtime).get(b"r")
    with pytest.raises(StopIteration):
        lock.hold(EX).send(None)
    lock.release(EX)
    runtime.time_ns = 10**12
    lock.blocking(PR, 1 << PR)
    assert runtime.spawned == [lock._demote]
    assert lock.mode == EX


def test_23_idle_memory_is_bounded():
    net = Net(2)
    for number in range(200):
        net.unlock(1, net.lock(1, b"n%d" % number, EX))
    for node in (1, 2):
        space = net.at(node)
        assert not space.owner.locks
        assert not space.owner.resources
        assert not space.master.resources
        assert not space.directory.records


def test_24_nothing_is_granted_against_a_member_that_may_still_serve():
    net = Net(2)
    name = net.name_for(1)
    for mode, until_silent in ((PR, True), (EX, False)):
        net = Net(3)
        net.lock(1, name, NL)
        net.lock(3, name, mode)
        net.crash(3)
        net.settle()
        w = net.lock(2, name, EX)
        assert net.results(2, w) == []
        net.make_silent(3)
        net.settle()
        assert net.results(2, w) == ([GRANTED] if until_silent else [])
        net.release(3)
        net.settle()
        assert net.results(2, w) == [GRANTED]
    barred = net.at(2)
    barred.bar()
    assert barred.lock(name, PR) is None
    assert barred.take() == [] or not any(hasattr(a, "payload") for a in barred.take())


def test_25_lock_numbers_carry_the_life_of_their_owner():
    net = Net(2)
    name = net.name_for(1)
    net.lock(1, name, NL)
    for life in (1, 2):
        me = instance(2, incarnation=life)
        if life == 2:
            net.spaces.pop(instance(2))
            net.view_members.remove(instance(2))
            net.dead.append(instance(2))
            net.add(me)
            net.view(joined=[me], failed=[instance(2)])
            net.settle()
        assert net.spaces[me].lock(name, CR) == 1
        net.collect(me)
        net.settle()
    locks = {(lock.owner, lock.number) for lock in net.resource(name).locks()}
    assert {(instance(2), 1), (instance(2, incarnation=2), 1)} <= locks


@pytest.mark.parametrize(
    "message",
    [
        m.Request(1, 1, b"", PR),
        m.Request(1, 1, b"x" * 65, PR),
        m.Unlock(1, 1, 0, b"short"),
        m.Convert(1, 1, EX, 0, b"x" * 65),
        m.Request(1, 1, b"x", 6),
        m.Request(-1, 1, b"x", PR),
        m.Reply(1, 1, 1, GRANTED, 7),
        m.DirPush([b"x" * 65]),
    ],
)
def test_26_lengths_and_numbers_are_checked_at_the_door(message):
    with pytest.raises(ProtocolError):
        decode_untrusted(encode(Batch(1, 1, [message])))
    with pytest.raises(ProtocolError):
        decode_untrusted(b"\xff\x00garbage")


def test_27_one_writer_against_many_readers():
    net = Net(4)
    name = net.name_for(1)
    readers = [(node, net.lock(node, name, PR)) for node in (1, 2, 3, 4) for _ in range(25)]
    writer = net.lock(2, name, EX)
    assert all(len(net.blocked(node, lock)) == 1 for node, lock in readers)
    for node, lock in readers:
        net.unlock(node, lock, settle=False)
    net.settle()
    assert net.results(2, writer) == [GRANTED]


def test_28_the_death_of_a_process_is_a_forced_unlock_that_spoils_the_value():
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    a = net.lock(2, name, EX, VALBLK)
    net.convert(2, a, NL, VALBLK, b"v" * 64)
    net.convert(2, a, EX)
    net.crash(2)
    net.make_silent(2)
    net.release(2)
    net.settle()
    b = net.lock(3, name, PR, VALBLK)
    (done,) = net.done(3, b)
    assert done.result == GRANTED
    assert not done.lvb_valid
    assert done.lvb in (b"v" * 64, LVB_ZERO)


def test_29_a_home_name_is_locked_without_a_message():
    net = Net(3)
    names = [
        b"%c%016x" % (kind, 16 * run + last)
        for run in range(40)
        for kind in b"IO"
        for last in (0, 9)
    ]
    homes = {name: [n for n in (1, 2, 3) if net.at(n).is_home(name)] for name in names}
    assert all(len(nodes) == 1 for nodes in homes.values())
    assert {nodes[0] for nodes in homes.values()} == {1, 2, 3}
    for name, (node,) in homes.items():
        assert homes[b"I" + name[1:-1] + b"0"] == [node], "neighbours share their directory member"
        lock = net.lock(node, name, EX, settle=False)
        assert net.results(node, lock) == [GRANTED]
        assert not any(net.links.values())
    net.crash(3)
    net.settle()
    taken = [name for name, (node,) in homes.items() if node == 3]
    assert not any(net.at(n).is_home(name) for n in (1, 2) for name in taken)
    net.make_silent(3)
    net.release(3)
    net.settle()
    assert all(net.at(1).is_home(name) != net.at(2).is_home(name) for name in taken)
