"""Several mounts on one disk: coherence, hand-over of locks, deaths and recovery."""

from __future__ import annotations

import contextlib
import errno
import gc
import random

import pytest
import trio
import trio.testing

from cfs.attributes import BLOCK_BYTES, MountOptions, SetAttributes
from cfs.errors import FsError
from cfs.filesystem import RECOVERY_WAIT_S, FileSystem
from cfs.journal_format import LOG_OFFSET
from cfs.lock_names import MOUNT_LOCK
from cfs.nodes import BlockState
from cfs.runtime_io import TrioRuntime
from cfs.stage import read_superblock
from cluster.errors import BusyError
from cluster.locks import Mode
from tests.cfs.harness import (
    QUIET,
    Clock,
    Environment,
    cluster,
    fsck,
    instance,
    make_device,
    mounted,
    tree_of,
)
from tests.cfs.shared_locks import LockTable
from tests.cfs.test_crash import image, random_step
from tests.cfs.test_model import Model, both, resolve
from tests.corrupter.image import Image

pytestmark = pytest.mark.trio
BUSY = MountOptions(commit_interval_ms=20, checkpoint_interval_ms=60, inode_pool=4)


async def test_what_one_returned_the_other_sees() -> None:
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        root = one.root_ino
        for number in range(30):
            first, second = (one, two) if number % 2 else (two, one)
            made = await first.create(root, b"f%d" % number, 0o644, 0, 0)
            assert await second.lookup(root, b"f%d" % number) == made
            await second.write(made.ino, 0, b"x" * number * 500)
            seen = await first.getattr(made.ino)
            assert seen.size == number * 500
            assert await first.read(made.ino, 0, 99_999) == b"x" * number * 500
            await first.setattr(made.ino, SetAttributes(size=7))
            assert (await second.read(made.ino, 0, 100)) == (b"x" * number * 500)[:7].ljust(
                7, b"\0"
            )
            await second.rename(root, b"f%d" % number, root, b"g%d" % number)
            with pytest.raises(FsError, match="ENOENT"):
                await first.lookup(root, b"f%d" % number)
        assert await tree_of(one) == await tree_of(two)
    await fsck(device)


@pytest.mark.parametrize("datasync", [False, True])
async def test_fsync_covers_what_another_node_wrote(datasync: bool) -> None:
    """As on a local file system, where any process may sync what any other one wrote."""
    device = await make_device(8, group_blocks=512, log_writes=True)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        made = await one.create(one.root_ino, b"f", 0o644, 0, 0)
        await two.open_ref(made.ino)
        await one.write(made.ino, 0, b"x" * 10_000)
        await two.fsync(made.ino, datasync=datasync)
        crashed = image(device.size_bytes, list(device.log), len(device.log), random.Random(1))
        two.close_ref(made.ino)
    async with mounted(crashed) as fs:
        assert await fs.read(made.ino, 0, 20_000) == b"x" * 10_000


async def test_attributes_are_brought_here_before_they_are_asked_for() -> None:
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        made = [await one.create(one.root_ino, b"f%d" % n, 0o644, 0, 0) for n in range(3)]
        used, idle, gone = (each.ino for each in made)
        await two.getattr(idle)
        await two.setattr(idle, SetAttributes(mode=0o600))
        assert not one.has_attributes(idle)
        for ino in (used, idle):
            await two.prefetch(ino, False)
        assert not two.has_attributes(used)  # the other node has it
        await two.prefetch(used, True)
        assert two.has_attributes(used)
        assert two.try_getattr(used) == await one.getattr(used)
        await one.unlink(one.root_ino, b"f2")
        await two.prefetch(gone, True)
        assert not two.has_attributes(gone)
    await fsck(device)


async def test_all_append_to_one_file() -> None:
    device = await make_device(32)
    async with cluster(device) as group:
        mounts = [await group.mount(number, BUSY) for number in (1, 2, 3)]
        made = await mounts[0].create(mounts[0].root_ino, b"log", 0o644, 0, 0)

        async def append(number: int, fs: FileSystem) -> None:
            for step in range(100):
                record = b"%d %03d %s\n" % (number, step, b"x" * (step * 7 % 200))
                assert await fs.write(made.ino, 0, record, append=True) == len(record)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number, fs in enumerate(mounts):
                    nursery.start_soon(append, number, fs)
        text = await mounts[1].read(made.ino, 0, 1 << 20)
        lines = text.splitlines()
        for number in range(3):
            mine = [line for line in lines if line.startswith(b"%d " % number)]
            assert [int(line.split()[1]) for line in mine] == list(range(100))
        assert len(lines) == 300
    await fsck(device)


async def test_all_work_in_one_directory() -> None:
    device = await make_device(64, group_blocks=512)
    async with cluster(device) as group:
        mounts = [await group.mount(number, BUSY) for number in (1, 2, 3)]
        root = mounts[0].root_ino

        async def work(number: int, fs: FileSystem) -> None:
            rng = random.Random(number)
            for step in range(120):
                name = b"n%d-%d" % (number, step)
                made = await fs.create(root, name, 0o644, 0, 0)
                await fs.write(made.ino, 0, name * rng.randrange(1, 1500))
                if step % 3 == 0:
                    await fs.rename(root, name, root, b"moved-" + name)
                elif step % 4 == 1:
                    await fs.unlink(root, name)
                if step % 10 == 0:
                    await fs.fsync(made.ino)

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for number, fs in enumerate(mounts):
                    nursery.start_soon(work, number, fs)
        trees = [await tree_of(fs) for fs in mounts]
        assert trees[0] == trees[1] == trees[2]
        assert len(trees[0]) == 3 * 100
    await fsck(device)


async def test_crossing_renames_end() -> None:
    """Directories moved into each other from all mounts: no cycle, no deadlock."""
    device = await make_device(32)
    async with cluster(device) as group:
        mounts = [await group.mount(number, BUSY) for number in (1, 2, 3)]
        root = mounts[0].root_ino
        names = [b"a", b"b", b"c", b"d"]
        for name in names:
            await mounts[0].mkdir(root, name, 0o755, 0, 0)

        async def move(number: int, fs: FileSystem) -> None:
            rng = random.Random(number)
            for _ in range(60):
                paths = list(await tree_of_retrying(fs))
                source, target = rng.choice(paths), rng.choice([*paths, b""])
                try:
                    old = await resolve(fs, tuple(source.split(b"/")[1:-1]))
                    new = await resolve(fs, tuple(target.split(b"/")[1:]))
                    name = source.split(b"/")[-1]
                    await fs.rename(old, name, new, name)
                except FsError as error:
                    assert error.errno in (  # noqa: PT017
                        errno.EINVAL, errno.ENOENT, errno.ENOTEMPTY, errno.ENOTDIR, errno.ESTALE
                    )  # fmt: skip

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for number, fs in enumerate(mounts):
                    nursery.start_soon(move, number, fs)
        assert len(await tree_of(mounts[0])) == len(names)
    await fsck(device)


async def tree_of_retrying(fs: FileSystem) -> dict[bytes, object]:
    for _ in range(1000):
        try:
            found = await tree_of(fs)
        except FsError:
            continue
        if found:
            return found
    raise AssertionError("the tree never stands still")


async def test_open_elsewhere_keeps_the_file() -> None:
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        root = one.root_ino
        free = (await one.statfs()).free_blocks
        made = await one.create(root, b"f", 0o644, 0, 0)
        await one.write(made.ino, 0, b"x" * 100_000)
        await two.open_ref(made.ino)
        await one.unlink(root, b"f")
        assert await two.read(made.ino, 99_990, 100) == b"x" * 10
        await two.write(made.ino, 0, b"y")
        await one.sync()
        assert (await two.getattr(made.ino)).nlink == 0
        two.close_ref(made.ino)
        with trio.fail_after(60):
            while one.orphans.where:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await one.sync()
        await two.sync()
        with pytest.raises(FsError, match="ESTALE"):
            await two.getattr(made.ino)
        used = free - (await one.statfs()).free_blocks
        assert used <= 1
    await fsck(device)


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_open_is_freed_however_it_comes_and_goes(seed: int) -> None:
    """One mount waits to free a file that others open, use and close, with and without its lock."""
    rng = random.Random(seed)
    print("seed", seed)
    device = await make_device(32)
    async with cluster(device) as group:
        mounts = [await group.mount(number, BUSY) for number in (1, 2, 3)]
        one = mounts[0]
        made = await one.create(one.root_ino, b"f", 0o644, 0, 0)
        await one.write(made.ino, 0, b"x" * 10_000)
        for fs in mounts:
            await fs.open_ref(made.ino)
        await one.unlink(one.root_ino, b"f")

        async def use(fs: FileSystem) -> None:
            for _ in range(rng.randrange(10, 40)):
                assert await fs.read(made.ino, 9_999, 10) == b"x"
                if rng.random() < 0.5:
                    await fs.open_ref(made.ino)
                    fs.close_ref(made.ino)
                elif rng.random() < 0.5:
                    await fs.write(made.ino, 0, b"y")
                await trio.sleep(rng.random() * 0.002)
            fs.close_ref(made.ino)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for fs in mounts:
                    nursery.start_soon(use, fs)
            while one.orphans.where:  # noqa: ASYNC110
                await trio.sleep(0.001)
        for fs in mounts:
            with pytest.raises(FsError, match="ESTALE"):
                await fs.open_ref(made.ino)
    await fsck(device)


async def test_remounts_find_journals_and_more_are_made() -> None:
    device = await make_device(64, journals=2)
    async with cluster(device) as group:
        for number in range(1, 6):
            fs = await group.mount(number)
            with trio.fail_after(60):
                while True:
                    journals = await fs.query("journals", {})
                    if any(journal["state"] == "free" for journal in journals):
                        break
                    await trio.sleep(0.001)
            await fs.create(fs.root_ino, b"f%d" % number, 0o644, 0, 0)
        assert len(journals) == 6
    await fsck(device)


async def test_a_new_journal_holds_nothing_of_what_was_in_its_blocks() -> None:
    """Files may have held anything there, also what looks like transactions."""
    device = await make_device(16, journals=1)
    disk = Image(device, await read_superblock(device))
    for group in await disk.groups():
        base = group.owner * disk.superblock.group_blocks
        for index, state in enumerate(group.states):
            if state == BlockState.FREE:
                await device.write((base + index) * BLOCK_BYTES, b"\xee" * BLOCK_BYTES)
    await device.flush()
    async with mounted(device):
        with trio.fail_after(60):
            while len(await disk.journals()) < 2:  # noqa: ASYNC110
                await trio.sleep(0.001)
    first, count = (await disk.journals())[1]
    log = await device.read((first + LOG_OFFSET) * BLOCK_BYTES, (count - LOG_OFFSET) * BLOCK_BYTES)
    assert not any(log)
    await fsck(device)


@contextlib.asynccontextmanager
async def dead_mount_alone(device):
    """A lock table where a dead member, the master of everything, is not released: what it may
    have locked counts as locked in EX. Yields the table, its engine, and how to mount."""
    table = LockTable()
    async with trio.open_nursery() as nursery:
        dead = table.member(nursery)
        assert await dead.try_lock(MOUNT_LOCK, Mode.EX) is not None
        dead.engine.dead = True

        async def mount() -> FileSystem:
            environment = Environment(TrioRuntime(nursery), instance(2), Clock())
            return await FileSystem.mount(device, table.member(nursery), environment, QUIET)

        yield table, dead.engine, mount
        nursery.cancel_scope.cancel()


async def test_a_mount_waits_for_the_recovery_of_a_dead_one(autojump_clock) -> None:
    device = await make_device(16)
    async with dead_mount_alone(device) as (table, engine, mount), trio.open_nursery() as nursery:

        async def recover() -> None:
            await trio.sleep(RECOVERY_WAIT_S / 2)
            table.release_dead(engine)

        nursery.start_soon(recover)
        fs = await mount()
        assert trio.current_time() >= RECOVERY_WAIT_S / 2
        await fs.unmount()


async def test_a_mount_does_not_wait_for_ever_for_a_dead_one(autojump_clock) -> None:
    async with dead_mount_alone(await make_device(16)) as (_table, _engine, mount):
        with pytest.raises(BusyError, match="not recovered"):
            await mount()


async def test_growth_is_seen_by_all() -> None:
    device = await make_device(16, group_blocks=1024)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        device.grow(64 << 20)
        grown = await one.grow()
        two._beliefs_at = -(1 << 62)
        assert (await two.statfs()).blocks == grown.blocks == 16_384
        made = await two.create(two.root_ino, b"f", 0o644, 0, 0)
        for step in range(30):
            await two.write(made.ino, step << 20, bytes([step]) * (1 << 20))
        assert await one.read(made.ino, 29 << 20, 4) == bytes([29]) * 4
    await fsck(device)


async def test_orphans_of_the_dead_are_freed() -> None:
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        free = (await one.statfs()).free_blocks
        made = await two.create(two.root_ino, b"f", 0o644, 0, 0)
        await two.write(made.ino, 0, b"x" * 1_000_000)
        await two.open_ref(made.ino)
        await two.unlink(two.root_ino, b"f")
        await two.sync()
        group.kill(2)
        await group.recover(2)
        with trio.fail_after(60):
            while one.orphans.where:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await one.sync()
        await one.tick(checkpoint=True)
        one._beliefs_at = -(1 << 62)
        assert (await one.statfs()).free_blocks == free
    await fsck(device)


async def test_the_recovery_of_who_looked_for_space_waits_for_no_lock() -> None:
    """A survivor has changed maps since, and cannot say so: the dead one has lock `S`."""
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        mine = await one.create(one.root_ino, b"mine", 0o644, 0, 0)
        made = await two.create(two.root_ino, b"f", 0o644, 0, 0)
        await two.open_ref(made.ino)
        await two.unlink(two.root_ino, b"f")
        await two.sync()
        await two.core.demand.lock.hold(Mode.EX)
        two.core.demand.lock.release(Mode.EX)
        group.kill(2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.write, mine.ino, 0, b"x" * 10_000)
            await trio.testing.wait_all_tasks_blocked()
            assert one.core.demand.untold
            with trio.fail_after(10):
                await group.recover(2)
    await fsck(device)


async def test_a_state_stays_as_long_as_its_lock() -> None:
    """A task that refers to an inode while its lock comes and goes works on its only state."""
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        made = await one.create(one.root_ino, b"f", 0o644, 0, 0)
        state = one.core.state(made.ino)
        await two.setattr(made.ino, SetAttributes(mode=0o600))
        await one.tick()
        assert made.ino not in one.core.table.states
        await state.hold(Mode.EX)
        changes = SetAttributes(mode=0o640)
        body = one.inodes._setattr_body
        _, changed = await one.core.run(lambda tx, s=state: body(tx, s, changes))
        state.release(Mode.EX)
        number = id(state)
        del state
        gc.collect()
        assert await one.getattr(made.ino) == changed
        assert id(one.core.state(made.ino)) == number
    await fsck(device)


@pytest.mark.parametrize("seed", range(4))
async def test_a_dead_mount_leaves_what_it_synced(seed: int) -> None:
    rng = random.Random(seed)
    device = await make_device(64, group_blocks=512)
    async with cluster(device) as group:
        mounts = {number: await group.mount(number, BUSY) for number in (1, 2, 3)}
        root = mounts[1].root_ino
        synced: dict[bytes, bytes] = {}

        async def work(number: int) -> None:
            fs = mounts[number]
            local = random.Random(seed * 10 + number)
            for step in range(400):
                name = b"n%d-%d" % (number, step)
                data = local.randbytes(16) * local.choice([1, 10, 1000])
                made = await fs.create(root, name, 0o644, 0, 0)
                await fs.write(made.ino, 0, data)
                if local.random() < 0.3:
                    await fs.fsync(made.ino)
                    synced[name] = data
                if step % 5 == 2 and name not in synced:
                    await fs.unlink(root, name)

        victim = rng.choice([1, 2, 3])
        scopes = {number: trio.CancelScope() for number in mounts}

        async def run(number: int) -> None:
            with scopes[number]:
                try:
                    await work(number)
                except (RuntimeError, BaseExceptionGroup):
                    assert number == victim

        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                for number in mounts:
                    nursery.start_soon(run, number)
                await trio.sleep(rng.uniform(0.05, 0.3))
                scopes[victim].cancel()
                group.kill(victim)
                await group.recover(victim)
        survivor = group.members[min(group.members)].fs
        for name, data in synced.items():
            found = await survivor.lookup(root, name)
            assert await survivor.read(found.ino, 0, 1 << 20) == data
        await tree_of(survivor)
    await fsck(device)


@pytest.mark.parametrize("seed", range(4))
async def test_crash_of_all_is_clean_and_keeps_the_order(seed: int) -> None:
    """Both mounts and the disk's cache die at once: journals hold old images of blocks that the
    other mount changed, freed and used again since."""
    rng = random.Random(seed)
    device = await make_device(8, group_blocks=512, log_writes=True)
    begin = len(device.log)
    model = Model()
    options = MountOptions(background=False, inode_pool=4)
    async with trio.open_nursery() as nursery:
        async with cluster(device) as group:
            mounts = [await group.mount(number, options) for number in (1, 2)]
            states = [model.tree()]
            marks = [len(device.log)]
            synced = [0]
            for step_number in range(150):
                step = random_step(rng)
                fs = mounts[rng.randrange(2)]
                await both(fs, model, step)
                if step[0] == "sync" or step_number % 10 == 9:
                    for each in mounts:
                        await each.sync()
                    step = ("sync",)
                if step_number % 23 == 22:
                    await fs.tick(checkpoint=True)
                states.append(model.tree())
                marks.append(len(device.log))
                synced.append(len(states) - 1 if step[0] == "sync" else synced[-1])
            log = list(device.log)
        nursery.cancel_scope.cancel()
    for count in sorted(rng.sample(range(begin, len(log)), 30)):
        for choice in (None, random.Random(count)):
            crashed = image(device.size_bytes, log, count, choice)
            await fsck(crashed)
            async with mounted(crashed) as fs:
                found = await tree_of(fs)
            done = max((index for index, mark in enumerate(marks) if mark <= count), default=0)
            for path, content in states[synced[done]].items():
                if all(state.get(path) == content for state in states[synced[done] : done + 2]):
                    assert found.get(path) == content, path
            await fsck(crashed)
