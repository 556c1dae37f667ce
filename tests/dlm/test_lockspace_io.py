"""The lock cache of several members: sharing, hand-over, hooks, fairness, deaths, leaving."""

import pytest
import trio
import trio.lowlevel

from cluster.errors import BarredError
from cluster.locks import Mode
from dlm.modes import Flags, Result
from tests.dlm.cluster_io import cluster, until

pytestmark = pytest.mark.trio

NAME = b"I0000000000000001"


class Hooks:
    """Records what happens; `demote` can be held up."""

    def __init__(self):
        self.log = []
        self.gate = trio.Event()
        self.gate.set()
        self.during = None

    async def demote(self, lock, mode):
        self.log.append(("demote", mode))
        await self.gate.wait()
        if self.during is not None:
            await self.during(lock)

    def granted(self, lock, mode):
        self.log.append(("granted", mode))


async def test_hold_share_and_hand_over():
    async with cluster(3) as (_hub, (one, two, three)):
        a, b, c = (member.get(NAME, Hooks()) for member in (one, two, three))
        await a.hold(Mode.PR)
        await b.hold(Mode.PR)
        assert a.try_hold(Mode.PR)
        a.release(Mode.PR)
        a.release(Mode.PR)
        b.release(Mode.PR)
        await c.hold(Mode.EX)
        assert c.mode == Mode.EX
        assert a.mode == b.mode == Mode.NL
        assert not a.try_hold(Mode.PR)
        c.set_lvb(b"x" * 64)
        c.release(Mode.EX)
        await a.hold(Mode.PR)
        assert c.mode == Mode.PR
        assert a.lvb == b"x" * 64
        assert a.lvb_valid
        a.release(Mode.PR)


async def test_hooks_run_before_the_lock_goes_and_before_holders_run():
    async with cluster(2) as (_hub, (one, two)):
        hooks = Hooks()
        hooks.gate = trio.Event()
        a, b = one.get(NAME, hooks), two.get(NAME)
        await a.hold(Mode.EX)
        a.release(Mode.EX)
        assert hooks.log == [("granted", Mode.EX)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.hold, Mode.PR)
            await until(lambda: a.demoting)
            assert not a.try_hold(Mode.PR)
            assert a.hold_demoting(Mode.EX)
            a.release(Mode.EX)
            await until(lambda: hooks.log[-1] == ("demote", Mode.PR))
            assert b.mode == Mode.NL
            hooks.gate.set()
        assert b.mode == a.mode == Mode.PR


async def test_a_hold_during_the_hook_makes_it_run_again():
    async with cluster(2) as (_hub, (one, two)):
        hooks = Hooks()
        a, b = one.get(NAME, hooks), two.get(NAME)
        await a.hold(Mode.EX)
        a.release(Mode.EX)

        async def during(lock):
            hooks.during = None
            assert lock.hold_demoting(Mode.EX)
            lock.release(Mode.EX)

        hooks.during = during
        await b.hold(Mode.EX)
        assert [what for what, _mode in hooks.log] == ["granted", "demote", "demote"]


async def test_two_readers_that_both_want_to_write_never_block_each_other():
    async with cluster(2) as (_hub, (one, two)):
        done = []

        async def work(member):
            lock = member.get(NAME)
            for _ in range(20):
                await lock.hold(Mode.PR)
                await trio.lowlevel.checkpoint()
                lock.release(Mode.PR)
                await lock.hold(Mode.EX)
                await trio.lowlevel.checkpoint()
                lock.release(Mode.EX)
            done.append(member)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work, one)
                nursery.start_soon(work, two)
        assert len(done) == 2


async def test_counter_under_ex_from_three_members():
    async with cluster(3) as (_hub, members):
        value = [0]
        inside = [0]

        async def work(member):
            lock = member.get(NAME)
            for _ in range(30):
                await lock.hold(Mode.EX)
                inside[0] += 1
                assert inside[0] == 1
                seen = value[0]
                await trio.lowlevel.checkpoint()
                value[0] = seen + 1
                inside[0] -= 1
                lock.release(Mode.EX)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for member in members:
                    nursery.start_soon(work, member)
        assert value[0] == 90


async def test_a_local_waiter_closes_the_fast_path():
    async with cluster(2) as (_hub, (one, _two)):
        lock = one.get(NAME)
        order = []
        await lock.hold(Mode.PR)

        async def wait(mode, tag):
            await lock.hold(mode)
            order.append(tag)
            lock.release(mode)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, Mode.EX, "writer")
            await until(lambda: len(lock._queue) == 1)
            assert not lock.try_hold(Mode.PR)
            nursery.start_soon(wait, Mode.PR, "reader")
            await until(lambda: len(lock._queue) == 2)
            assert order == []
            lock.release(Mode.PR)
        assert sorted(order) == ["reader", "writer"]
        assert lock.mode == Mode.EX


async def test_cancelled_waiter_leaks_nothing():
    async with cluster(2) as (_hub, (one, two)):
        a, b = one.get(NAME), two.get(NAME)
        await a.hold(Mode.EX)
        with trio.move_on_after(0.05):
            await b.hold(Mode.EX)
        assert not b._queue
        a.release(Mode.EX)
        await until(lambda: b.mode == Mode.EX)
        b.check()
        await a.hold(Mode.EX)
        a.release(Mode.EX)


async def test_try_lock():
    async with cluster(2) as (_hub, (one, two)):
        held = await one.try_lock(NAME, Mode.EX)
        assert held is not None
        assert await two.try_lock(NAME, Mode.PR) is None
        held.release(Mode.EX)
        await one.drop(NAME)
        assert (await two.try_lock(NAME, Mode.PR)).mode == Mode.PR


async def test_a_try_may_tell_who_is_in_the_way():
    """Nobody waits behind it, and the lock comes when it is free."""
    async with cluster(3) as (_hub, (one, two, three)):
        held = await one.try_lock(NAME, Mode.PR)
        assert await two.try_lock(NAME, Mode.EX, poke=True) is None
        await until(lambda: held.wanted)
        assert await three.try_lock(NAME, Mode.PR) is not None
        three.get(NAME).release(Mode.PR)
        assert await two.try_lock(NAME, Mode.EX, poke=True) is None
        held.release(Mode.PR)
        await until(lambda: held.mode == Mode.NL)
        await until(lambda: three.get(NAME).mode == Mode.NL)
        assert await two.try_lock(NAME, Mode.EX) is not None


async def test_pr_to_cw_goes_through_nothing():
    async with cluster(1) as (_hub, (one,)):
        hooks = Hooks()
        lock = one.get(NAME, hooks)
        await lock.hold(Mode.PR)
        lock.release(Mode.PR)
        await lock.hold(Mode.CW)
        lock.release(Mode.CW)
        assert hooks.log == [("granted", 3), ("demote", 0), ("granted", 2)]
        assert (await one.try_lock(NAME, Mode.PR)).mode == Mode.PR


async def test_lru_sends_old_locks_away():
    async with cluster(2, locks_max=50) as (_hub, (one, _two)):
        for number in range(300):
            lock = one.get(b"n%d" % number)
            await lock.hold(Mode.EX)
            lock.release(Mode.EX)
            await trio.lowlevel.checkpoint()
        await until(lambda: len(one.cache) <= 60)
        await until(lambda: len(one.space.owner.locks) <= 60)


async def test_death_blocks_only_what_the_dead_could_write():
    async with cluster(3) as (hub, (one, two, three)):
        mine, read, dirty = one.get(b"mine"), one.get(b"read"), one.get(b"dirty")
        await mine.hold(Mode.EX)
        mine.release(Mode.EX)
        await three.get(b"read").hold(Mode.PR)
        await three.get(b"dirty").hold(Mode.EX)
        hub.crash(three.space.me)
        await mine.hold(Mode.EX)
        granted = []

        async def wait(lock):
            await lock.hold(Mode.EX)
            granted.append(lock.name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, read)
            nursery.start_soon(wait, dirty)
            await until(lambda: one.space.recovery.phase == "idle")
            assert granted == []
            assert one.dead_instances() == [three.space.me]
            hub.hub.silent(three.space.me)
            await until(lambda: granted == [b"read"] or granted == [])
            hub.hub.released(three.space.me)
            await until(lambda: sorted(granted) == [b"dirty", b"read"])
        assert not dirty.lvb_valid
        assert two.dead_instances() == []


async def test_clean_leave_hands_over():
    async with cluster(3) as (hub, (one, two, three)):
        locks = [one.get(b"k%d" % n) for n in range(50)]
        others = [two.get(b"k%d" % n) for n in range(50)]
        for lock, other in zip(locks, others, strict=True):
            await lock.hold(Mode.EX)
            lock.set_lvb(lock.name.ljust(64, b"."))
            lock.release(Mode.EX)
            await other.hold(Mode.CR)
            other.release(Mode.CR)
        assert any(one.space.me == r.master for r in two.space.owner.resources.values())
        await one.leave()
        hub.left(one.space.me)
        for lock in [three.get(b"k%d" % n) for n in range(50)]:
            await lock.hold(Mode.PR)
            assert lock.lvb_valid
            assert lock.lvb == lock.name.ljust(64, b".")
            lock.release(Mode.PR)


async def test_barred_waiters_get_an_error():
    async with cluster(2) as (_hub, (one, two)):
        await one.get(NAME).hold(Mode.EX)
        caught = []

        async def wait():
            with pytest.raises(BarredError):
                await two.get(NAME).hold(Mode.PR)
            caught.append(True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await until(lambda: two.get(NAME)._queue)
            two.bar("test")
        assert caught
        with pytest.raises(BarredError):
            await two.get(b"other").hold(Mode.PR)
        assert await_nothing(two)


def await_nothing(member):
    return not member.get(NAME).try_hold(Mode.PR)


async def test_low_level_lock():
    async with cluster(2) as (_hub, (one, two)):
        a = await one.acquire(NAME, Mode.EX, Flags.VALBLK)
        b = await two.acquire(NAME, Mode.PR, Flags.NOQUEUE)
        assert b.last.result == Result.AGAIN
        with trio.move_on_after(0.05):
            await two.acquire(NAME, Mode.PR)
        await until(lambda: a.blocked_by)
        assert await a.convert(Mode.PR, Flags.VALBLK, b"v" * 64) == Result.GRANTED
        c = await two.acquire(NAME, Mode.PR, Flags.VALBLK)
        assert c.last.lvb == b"v" * 64
        assert c.last.grant > a.last.grant
        assert a.unlock() == Result.GRANTED
        await until(lambda: len(two.space.owner.locks) == 1)


async def test_why_names_holders_and_the_chain():
    async with cluster(2) as (_hub, (one, two)):
        await one.get(b"A").hold(Mode.EX)
        await two.get(b"B").hold(Mode.EX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.get(b"A").hold, Mode.PR)
            nursery.start_soon(one.get(b"B").hold, Mode.PR)
            await until(lambda: one.get(b"B")._queue)
            await until(lambda: two.get(b"A")._queue)
            chain = await two.query("why", {"name": "A"})
            assert [link["name"] for link in chain] == ["A", "B"]
            text = "\n".join(chain[0]["lines"])
            assert f"{one.space.me} holds EX" in text
            assert f"{two.space.me} waits for PR" in text
            waiters = await one.query("waiters", {})
            assert "B" in waiters["waiting_for"]
            spaces = await one.query("spaces", {})
            assert spaces["recovery"] == "idle"
            await one.query("dump", {})
            nursery.cancel_scope.cancel()
