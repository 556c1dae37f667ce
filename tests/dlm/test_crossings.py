"""Operations of the cache, of owners and of deaths that cross each other."""

import pytest
import trio

from cluster.locks import Mode
from dlm.cache import LockCache
from dlm.dispatcher import Dispatcher
from dlm.modes import COMPATIBLE, Flags, Result
from tests.dlm.cluster_io import cluster, until
from tests.dlm.net import FrozenRuntime, Net, instance

NL, CR, CW, PR, PW, EX = Mode
VALBLK = Flags.VALBLK


class Step:
    """One suspension of a coroutine that the test drives by hand."""

    def __await__(self):
        yield


class Hooks:
    """Records; `demote` stops once in the middle."""

    def __init__(self):
        self.log = []

    async def demote(self, lock, mode):
        self.log.append(("demote", mode))
        await Step()

    def granted(self, lock, mode):
        self.log.append(("granted", mode))


class LateHooks:
    """Hooks that end when the test says so."""

    def __init__(self):
        self.gate = trio.Event()
        self.running = 0

    async def demote(self, lock, mode):
        self.running += 1
        await self.gate.wait()

    def granted(self, lock, mode):
        pass


def finish(coroutine):
    """Run to the end; the value returned."""
    while True:
        try:
            coroutine.send(None)
        except StopIteration as end:
            return end.value


class CacheAt:
    """The lock cache of one member of a `Net`, its dispatcher on the wires of the test."""

    def __init__(self, net, node):
        self.net, self.me, self.sent = net, instance(node), []
        self.runtime = FrozenRuntime()
        self.dispatcher = Dispatcher(
            net.at(node), self.send, self.runtime.now_ns, lambda action: None
        )
        self.cache = LockCache(self.dispatcher, self.runtime)

    def send(self, to, payload):
        self.sent.append((to, payload))

    def push(self):
        """What the cache has said arrives."""
        sent, self.sent = self.sent, []
        for to, payload in sent:
            self.net.spaces[to].receive(self.me, payload)
            self.net.collect(to)

    def pull(self):
        """What others have said to the cache arrives."""
        for (source, to), link in self.net.links.items():
            while to == self.me and link:
                self.dispatcher.receive(source, link.popleft())

    def talk(self):
        while self.sent or any(link for (_, to), link in self.net.links.items() if to == self.me):
            self.push()
            self.pull()


@pytest.mark.parametrize("crossing", [False, True])
def test_a_stronger_wish_during_a_demotion_is_told_again(crossing):
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    two = CacheAt(net, 2)
    lock = two.cache.get(name, Hooks())
    holding = lock.hold(EX)
    holding.send(None)
    two.talk()
    finish(holding)
    lock.release(EX)
    two.runtime.time_ns = 10**12
    reader = net.lock(1, name, PR, settle=False)
    two.talk()
    demote = two.runtime.spawned.pop()()
    demote.send(None)
    writer = net.lock(3, name, EX, settle=False)
    net.deliver(3, 1)
    if not crossing:
        two.pull()
        assert lock._demand == 1 << PR | 1 << EX
    finish(demote)
    assert lock.mode == PR
    two.talk()
    assert net.results(1, reader) == [Result.GRANTED]
    assert lock._demand == 1 << EX
    finish(two.runtime.spawned.pop()())
    two.talk()
    assert lock.mode == NL
    net.unlock(1, reader, settle=False)
    net.deliver(1, 3, 9)
    assert net.results(3, writer) == [Result.GRANTED]


@pytest.mark.parametrize("mode", [PR, CW])
def test_try_lock_after_a_demotion_lowers_nothing_without_the_hook(mode):
    """While it waited for the old lock to go, another task took it anew and wrote under it."""
    net = Net(1)
    one = CacheAt(net, 1)
    hooks = Hooks()
    lock = one.cache.get(b"r", hooks)
    finish(lock.hold(EX))
    lock.release(EX)
    lock.send_away()
    demote = one.runtime.spawned.pop()()
    demote.send(None)
    trying = one.cache.try_lock(b"r", mode)
    trying.send(None)
    writing = lock.hold(EX)
    writing.send(None)
    finish(demote)
    finish(writing)
    lock.release(EX)
    assert hooks.log == [("granted", EX), ("demote", NL), ("granted", EX)]
    assert finish(trying) is lock
    assert lock.mode == EX, "nobody has written back what was changed under EX"
    lock.release(mode)
    one.cache.check()


def test_a_value_set_under_pw_survives_the_way_up_to_ex():
    net = Net(1)
    net.lock(1, b"r", NL)
    one = CacheAt(net, 1)
    lock = one.cache.get(b"r")
    finish(lock.hold(PW))
    lock.set_lvb(b"w" * 64)
    lock.release(PW)
    finish(lock.hold(EX))
    assert (lock.lvb, lock.lvb_valid) == (b"w" * 64, True)
    lock.release(EX)
    lock.send_away()
    finish(one.runtime.spawned.pop()())
    finish(lock.hold(PR))
    assert (lock.lvb, lock.lvb_valid) == (b"w" * 64, True)


@pytest.mark.parametrize(
    ("held", "wanted", "flags", "others"),
    [(PR, CW, 0, (PR, CW)), (PR, EX, Flags.CONVDEADLK, (PR, EX))],
)
def test_a_cancelled_conversion_whose_master_dies_may_have_been_granted(
    held, wanted, flags, others
):
    """The master let go of the old mode and told somebody else; its answer to us is lost."""
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    mine = net.lock(2, name, held)
    other = net.lock(3, name, NL)
    if flags:
        net.convert(3, other, others[0])
    net.convert(3, other, others[1], settle=False)
    net.deliver(3, 1)
    net.convert(2, mine, wanted, flags, settle=False)
    net.deliver(2, 1)
    net.deliver(1, 3, 9)
    assert net.mode(3, other) == others[1]
    net.cancel(2, mine, settle=False)
    net.crash(1)
    net.settle()
    assert COMPATIBLE[net.mode(2, mine)][net.mode(3, other)]
    net.make_silent(1)
    net.release(1)
    net.settle()
    net.unlock(3, other)
    assert len(net.results(2, mine)) == 2
    assert not net.at(2).owner.locks[mine].pending


def test_a_conversion_that_lost_its_mode_does_not_vouch_for_its_value():
    net = Net(3)
    name = net.name_for(1)
    net.lock(1, name, NL)
    writer = net.lock(2, name, EX)
    net.unlock(2, writer, VALBLK, b"o" * 64)
    first = net.lock(2, name, PR, VALBLK)
    second = net.lock(3, name, PR, VALBLK)
    net.convert(2, first, EX, settle=False)
    net.deliver(2, 1)
    net.convert(3, second, EX, Flags.CONVDEADLK)
    assert net.results(2, first)[-1] == Result.GRANTED
    net.unlock(2, first, VALBLK, b"n" * 64)
    assert net.mode(3, second) == EX
    net.crash(1)
    net.settle()
    net.convert(3, second, PR)
    reader = net.lock(2, name, PR, VALBLK)
    (done,) = net.done(2, reader)
    assert not done.lvb_valid or done.lvb == b"n" * 64


@pytest.mark.trio
async def test_giving_everything_back_ends_when_the_instance_is_barred_meanwhile():
    async with cluster(1) as (_hub, (one,)):
        hooks = LateHooks()
        locks = [one.get(name, hooks) for name in (b"a", b"b")]
        for lock in locks:
            await lock.hold(EX)
            lock.release(EX)
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(one.cache.drop_all)
                await until(lambda: hooks.running == 2)
                one.bar("test")
                hooks.gate.set()
            await one.drop(b"a")
