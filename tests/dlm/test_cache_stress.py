"""Caches of several members at work while members die, come and leave: exclusion, no hang."""

import random

import pytest
import trio
import trio.lowlevel

from cluster.locks import Mode
from cluster.mesh_io import open_mesh
from dlm.lockspace_io import join
from dlm.modes import COMPATIBLE
from tests.dlm.cluster_io import cluster, instance, until

pytestmark = pytest.mark.trio

NAMES = [b"s%d" % number for number in range(6)]


class Judge:
    """Knows what every process does under its locks, also those that died a moment ago."""

    def __init__(self):
        self.active = {}
        self.value = dict.fromkeys(NAMES, 0)
        self.cached = {}
        self.turns = 0
        self.hooks = {}
        self.fenced = set()

    def enter(self, me, name, mode):
        if me in self.fenced:
            return
        for other, held in self.active.get(name, []):
            assert other == me or COMPATIBLE[held][mode], (name, me, mode, other, held)
        self.active.setdefault(name, []).append((me, mode))

    def leave(self, me, name, mode):
        if me not in self.fenced:
            self.active[name].remove((me, mode))


class Hooks:
    """A cached copy of the value, dropped and written back as a file system would."""

    def __init__(self, judge, me, name):
        self.judge, self.me, self.name = judge, me, name
        self.copy = None
        self.dirty = False

    async def demote(self, lock, mode):
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        if self.dirty and self.me not in self.judge.fenced:
            self.judge.value[self.name] = self.copy
            self.dirty = False
        if mode < Mode.PR:
            self.copy = None

    def granted(self, lock, mode):
        assert not self.dirty
        self.copy = None


async def user(judge, member, chooser, rounds):
    me = member.space.me
    hooks = judge.hooks.setdefault(me, {name: Hooks(judge, me, name) for name in NAMES})
    locks = {name: member.get(name, hooks[name]) for name in NAMES}
    for _ in range(rounds):
        name = chooser.choice(NAMES)
        mode = chooser.choice([Mode.PR, Mode.PR, Mode.EX])
        lock, hook = locks[name], hooks[name]
        if not lock.try_hold(mode):
            await lock.hold(mode)
        judge.enter(me, name, mode)
        if hook.copy is None:
            hook.copy = judge.value[name]
        for _ in range(chooser.randrange(3)):
            await trio.lowlevel.checkpoint()
        if me in judge.fenced:
            return
        if mode == Mode.EX:
            hook.copy += 1
            hook.dirty = True
            judge.cached[name] = hook.copy
        else:
            assert hook.copy == judge.cached.get(name, 0), name
        judge.leave(me, name, mode)
        lock.release(mode)
        judge.turns += 1
        member.cache.check()


@pytest.mark.parametrize("seed", range(4))
async def test_every_read_sees_the_last_write(seed):
    judge = Judge()
    async with cluster(3, locks_max=5) as (_hub, members):
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number, member in enumerate(members):
                    for task in range(2):
                        chooser = random.Random(seed * 100 + number * 10 + task)
                        nursery.start_soon(user, judge, member, chooser, 60)
    assert judge.turns == 3 * 2 * 60


@pytest.mark.parametrize("seed", range(4))
async def test_a_member_dies_in_the_middle_and_the_others_go_on(seed):
    judge = Judge()
    async with cluster(3) as (hub, members):
        victim = members[seed % 3]
        others = [member for member in members if member is not victim]

        async def doomed(scope, task_status):
            with scope:
                task_status.started()
                await user(judge, victim, random.Random(seed), 100_000)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                scope = trio.CancelScope()
                await nursery.start(lambda task_status: doomed(scope, task_status))
                for number, member in enumerate(others):
                    nursery.start_soon(user, judge, member, random.Random(seed + number), 150)
                await until(lambda: judge.turns > 60)
                me = victim.space.me
                judge.fenced.add(me)
                hub.crash(me)
                scope.cancel()
                for name, held in judge.active.items():
                    judge.active[name] = [item for item in held if item[0] != me]
                for name in NAMES:
                    # What the dead one had not written back is lost; its journal says so.
                    lock = victim.get(name)
                    if lock.mode == Mode.EX:
                        judge.cached[name] = judge.value[name]
                hub.hub.silent(me)
                hub.hub.released(me)
        assert all(not member.dead_instances() for member in others)


async def test_over_the_real_mesh():
    """Two members over TCP on the loopback address."""
    from cluster.control import GroupEvent, GroupMember

    one, two = instance(1), instance(2)
    async with open_mesh(one, ["127.0.0.1"], b"k" * 32, group="t") as mesh_one:
        async with open_mesh(two, ["127.0.0.1"], b"k" * 32, group="t") as mesh_two:
            async with join(mesh_one, "t") as a, join(mesh_two, "t") as b:
                event = GroupEvent(
                    "t", 1, 1, "view",
                    [
                        GroupMember(one, "n1", ["127.0.0.1"], mesh_one.port),
                        GroupMember(two, "n2", ["127.0.0.1"], mesh_two.port),
                    ],
                    joined=[one, two],
                )  # fmt: skip
                mesh_one.group_event(event)
                mesh_two.group_event(event)
                with trio.fail_after(60):
                    for number in range(50):
                        lock = (a, b)[number % 2].get(b"ping")
                        await lock.hold(Mode.EX)
                        lock.release(Mode.EX)
                    await b.leave()
