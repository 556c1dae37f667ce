"""Every prefix of the write log mounts, replays, is clean, and holds what was synced.

With operations that never overwrite data the recovered file system must be exactly one of the
states between the last sync and the crash: transactions are atomic and in order, data comes before
the metadata that shows it.
"""

from __future__ import annotations

import random

import pytest
import trio

from cfs.attributes import BLOCK_BYTES, MountOptions, SetAttributes
from cfs.errors import CorruptionError
from cfs.format import open_block_untrusted
from cfs.fsck.checker import repair
from cfs.fsck.report import Report
from cfs.fsck.session import Consent, Session
from cfs.journal_format import LOG_OFFSET
from cfs.mkfs_plan import Choices, plan, write_plan
from cfs.nodes import BlockState, GroupNode, decode_node_untrusted
from cfs.replay import Replayer
from cfs.stage import read_superblock
from cluster.device_memory import (
    LogEntry,
    LoggedAnswer,
    LoggedFlush,
    LoggedWrite,
    MemoryDevice,
    durable_positions,
)
from tests.cfs.harness import QUIET, fsck, make_device, mounted, tree_of
from tests.cfs.test_model import NAMES, Model, Refused, both

PREFIXES_MAX = 40
ATOM_BYTES = 512

pytestmark = pytest.mark.trio


def image(
    size_bytes: int, log: list[LogEntry], count: int, choice: random.Random | None
) -> MemoryDevice:
    """The disk after a crash: what was durable, and of the rest all (None) or any sectors."""
    device = MemoryDevice(size_bytes)
    durable = durable_positions(log, count)
    for position, entry in enumerate(log[:count]):
        if not isinstance(entry, LoggedWrite):
            continue
        for start in range(0, len(entry.data), ATOM_BYTES):
            if choice is None or position in durable or choice.random() < 0.5:
                piece = entry.data[start : start + ATOM_BYTES]
                device._current.write(entry.offset_bytes + start, piece)
    device._durable = device._current.copy()
    return device


def random_step(rng: random.Random) -> tuple[object, ...]:
    def path() -> tuple[bytes, ...]:
        return tuple(rng.choice(NAMES) for _ in range(rng.randint(1, 2)))

    kind = rng.choice(
        ["create", "create", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "rename"]
        + ["exchange"]
        + ["append"] * 6
        + ["sync"] * 2
    )
    if kind == "sync":
        return (kind,)
    if kind == "append":
        return (kind, path(), rng.choice([10, 1000, 4096, 9000, 30_000]))
    if kind == "symlink":
        return (kind, path(), rng.randbytes(20).hex().encode())
    if kind in ("link", "rename", "exchange"):
        return (kind, path(), path())
    return (kind, path())


@pytest.mark.parametrize("seed", range(6))
async def test_every_prefix_holds_what_was_synced(seed: int) -> None:
    rng = random.Random(seed)
    device = await make_device(8, group_blocks=512, log_writes=True)
    model = Model()
    states = [model.tree()]
    synced = [0]
    marks = [len(device.log)]
    begin = len(device.log)
    options = MountOptions(
        background=False, dirty_bytes_start=20_000 if seed % 2 else 1 << 20, inode_pool=4
    )
    async with mounted(device, options, unmount=False) as fs:
        for number in range(120):
            step = random_step(rng)
            await both(fs, model, step)
            if number % 17 == 16:
                await fs.tick(checkpoint=True)
                step = ("sync",)
            states.append(model.tree())
            marks.append(len(device.log))
            synced.append(len(states) - 1 if step[0] == "sync" else synced[-1])
    log = list(device.log)
    points = list(range(begin, len(log) + 1))
    for count in sorted(rng.sample(points, min(len(points), PREFIXES_MAX))):
        done = max(index for index, mark in enumerate(marks) if mark <= count)
        allowed = states[synced[done] : done + 2]
        for choice in (None, random.Random(count)):
            await check_image(image(device.size_bytes, log, count, choice), allowed)


async def check_image(device: MemoryDevice, allowed: list[dict[bytes, object]]) -> None:
    await fsck(device)
    async with mounted(device, QUIET) as fs:
        found = await tree_of(fs)
        assert found in allowed, "not a state between the last sync and the crash"
        made = await fs.create(fs.root_ino, b"after", 0o644, 0, 0)
        await fs.write(made.ino, 0, b"x" * 10_000)
    await fsck(device)


async def test_crash_during_replay_is_replayed_again() -> None:
    rng = random.Random(99)
    device = await make_device(8, group_blocks=512)
    model = Model()
    async with mounted(device, unmount=False) as fs:
        for _ in range(150):
            await both(fs, model, random_step(rng))
        await fs.sync()
    crashed = device.snapshot()
    size = crashed.size_bytes
    recorder = MemoryDevice(size, log_writes=True)
    recorder._current = crashed._current.copy()
    recorder._durable = crashed._current.copy()
    async with mounted(recorder, unmount=False) as fs:
        assert await tree_of(fs) == model.tree()
    log = list(recorder.log)
    assert log
    for count in range(len(log) + 1):
        again = crashed.snapshot()
        durable = durable_positions(log, count)
        for position, entry in enumerate(log[:count]):
            if isinstance(entry, LoggedWrite) and (position in durable or rng.random() < 0.7):
                again._current.write(entry.offset_bytes, entry.data)
        await fsck(again)
        async with mounted(again) as fs:
            assert await tree_of(fs) == model.tree()


def behind(log: list[LogEntry], more: list[LogEntry]) -> list[LogEntry]:
    """Both logs as one; what the second one says of places counts from its own begin."""
    shift = len(log)
    result = list(log)
    for entry in more:
        if isinstance(entry, LoggedFlush):
            entry = LoggedFlush(entry.covered + shift)
        elif isinstance(entry, LoggedAnswer):
            entry = LoggedAnswer(entry.position + shift)
        result.append(entry)
    return result


async def test_a_power_cut_while_the_journal_of_a_killed_mount_is_replayed() -> None:
    """Killed before the flush of its last commit: whoever replays it finds that in the caches, and
    then they are lost too. A transaction is in place as a whole, or not at all."""
    device = await make_device(8, group_blocks=512, log_writes=True)
    model = Model()
    rng = random.Random(1)
    async with mounted(device, unmount=False) as fs:
        begin = len(device.log)
        for _ in range(30):
            await both(fs, model, random_step(rng))
        await fs.sync()
    log = list(device.log)
    kills = [n for n in range(begin, len(log)) if not isinstance(log[n], LoggedWrite)]
    for kill in kills[-8:]:
        killed = image(device.size_bytes, log, kill, None)
        recorder = MemoryDevice(device.size_bytes, log_writes=True)
        recorder._current = killed._current
        async with mounted(recorder, unmount=False):
            pass
        both_lives = behind(log[:kill], list(recorder.log))
        for count in range(kill, len(both_lives) + 1):
            cut = image(device.size_bytes, both_lives, count, random.Random(count))
            await fsck(cut)
            async with mounted(cut):
                pass
            await fsck(cut)


async def test_a_growth_that_a_crash_has_ended_costs_another_growth() -> None:
    """After any of its writes: what is there mounts, and then everything is used."""
    device = await make_device(9, group_blocks=512, log_writes=True)
    async with mounted(device, unmount=False) as fs:
        begin = len(device.log)
        device.grow(23 << 20)
        await fs.grow()
        free = (await fs.statfs()).free_blocks
    log = list(device.log)
    for count in range(begin, len(log) + 1):
        for choice in (None, random.Random(count)):
            cut = image(device.size_bytes, log, count, choice)
            async with mounted(cut) as fs:
                await fs.grow()
                assert (await fs.statfs()).free_blocks == free, count
            await fsck(cut)


async def test_a_mkfs_that_was_interrupted_leaves_nothing_to_mount() -> None:
    """Or all of what was there: no file with holes where the new journals are."""
    device = await make_device(16, log_writes=True)
    async with mounted(device) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        await fs.write(made.ino, 0, b"x" * (10 << 20))
    begin, before, rng = len(device.log), device.snapshot(), random.Random(1)
    other = Choices(uuid=b"another one uuid", hash_seed=bytes(16), now_ns=1, journals=2,
                    journal_bytes=640 << 10)  # fmt: skip
    await write_plan(device, plan(device.size_bytes // BLOCK_BYTES, other))
    log = list(device.log)
    for count in range(begin, begin + 20):
        durable = durable_positions(log, count)
        for share in (0.5, 1.0):
            cut = before.snapshot()
            for position, entry in enumerate(log[begin:count], begin):
                if isinstance(entry, LoggedWrite) and (position in durable or rng.random() < share):
                    cut._current.write(entry.offset_bytes, entry.data)
            try:
                found = await read_superblock(cut)
            except CorruptionError:
                continue
            if found.uuid != other.uuid:
                async with mounted(cut) as fs:
                    ino = (await fs.lookup(fs.root_ino, b"f")).ino
                    assert await fs.read(ino, 0, 10 << 20) == b"x" * (10 << 20), count


async def test_of_two_superblocks_the_newer_one_counts_for_mounts_and_repairs() -> None:
    """A crash within a growth: what goes into the new part is not cut off by a repair."""
    device = await make_device(9, group_blocks=512, log_writes=True)
    async with mounted(device, unmount=False) as fs:
        begin = len(device.log)
        device.grow(23 << 20)
        await fs.grow()
        copy, blocks = fs.core.superblock.backup_block, (await fs.statfs()).blocks
    log = list(device.log)
    copy_at = next(n for n in range(begin, len(log)) if is_write_to(log[n], copy))
    cut = image(device.size_bytes, log, copy_at + 1, None)
    repaired = cut.snapshot()
    for each in (cut, repaired):
        if each is repaired:
            await repair(each, Session(Report(), Consent.ALL))
        async with mounted(each) as fs:
            assert (await fs.statfs()).blocks == blocks
            made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
            await fs.write(made.ino, 0, b"x" * (12 << 20))
        await fsck(each)


def is_write_to(entry: LogEntry, block: int) -> bool:
    return isinstance(entry, LoggedWrite) and entry.offset_bytes == block * BLOCK_BYTES


async def test_freed_metadata_used_as_data_survives_replay() -> None:
    """Blocks that held inodes and trees become file data; an old image never comes back."""
    device = await make_device(8, group_blocks=512, log_writes=True)
    async with mounted(device, unmount=False) as fs:
        root = fs.root_ino
        for number in range(500):
            await fs.create(root, b"%03d" % number * 40, 0o644, 0, 0)
        await fs.sync()
        for number in range(500):
            await fs.unlink(root, b"%03d" % number * 40)
        await fs.sync()
        await fs.tick(checkpoint=True)
        made = await fs.create(root, b"data", 0o644, 0, 0)
        size = 0
        while (await fs.statfs()).free_blocks > 60:
            await fs.write(made.ino, size, b"%07d\n" % size * 4096)
            size += 32_768
            await fs.sync()
        free = (await fs.statfs()).free_blocks
        assert free < 100
    await fsck(device)
    for choice in (None, random.Random(1)):
        crashed = image(device.size_bytes, list(device.log), len(device.log), choice)
        await fsck(crashed)
        async with mounted(crashed) as fs:
            for offset in range(0, size, 32_768):
                data = await fs.read(made.ino, offset, 32_768)
                assert data == b"%07d\n" % offset * 4096


async def test_a_write_that_was_not_acknowledged_may_be_torn_but_is_clean() -> None:
    rng = random.Random(5)
    device = await make_device(8, group_blocks=512, log_writes=True)
    begin = len(device.log)
    model = Model()
    async with mounted(device, unmount=False) as fs:
        steps = [("create", (b"a",)), ("create", (b"b",))]
        for _ in range(60):
            path = (rng.choice([b"a", b"b"]),)
            steps.append(("write", path, rng.randrange(60_000), rng.randrange(20_000), False))
            steps.append(("truncate", path, rng.randrange(60_000)))
            steps.append(("sync",))
        for step in steps:
            try:
                await both(fs, model, step)
            except Refused:
                pass
    log = list(device.log)
    for count in rng.sample(range(begin, len(log)), 40):
        crashed = image(device.size_bytes, log, count, random.Random(count))
        await fsck(crashed)
        async with mounted(crashed) as fs:
            await tree_of(fs)
            await trio.lowlevel.checkpoint()
        await fsck(crashed)


async def test_bytes_beyond_the_end_never_appear() -> None:
    """An append whose data reached the disk and whose transaction did not."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device, unmount=False) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        await fs.write(made.ino, 0, b"a" * 5000)
        await fs.fsync(made.ino)
        await fs.write(made.ino, 5000, b"b" * 2000)
        await fs.core.pages.flush_all()
    for offset in (0, 6000, 20_000):
        crashed = device.snapshot()
        async with mounted(crashed) as fs:
            if offset:
                await fs.write(made.ino, offset, b"c")
            else:
                await fs.setattr(made.ino, SetAttributes(size=9000))
            expected = b"a" * 5000 + bytes(offset - 5000) + b"c" if offset else b"a" * 5000
            expected = expected.ljust(9000, b"\0") if not offset else expected
            assert await fs.read(made.ino, 0, 30_000) == expected
            await fs.fsync(made.ino)
            assert await fs.read(made.ino, 0, 30_000) == expected


async def test_replay_spares_a_freed_block_with_a_new_user() -> None:
    """The write that moved the tail on is lost, the block of an inode that was freed holds data of
    a mount whose own map is not in place yet: the old image of the inode stays in the log."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device, unmount=False) as fs:
        first, blocks = fs.core.journal.first_block, fs.core.journal.log_blocks + LOG_OFFSET
        headers = await device.read(first * 4096, LOG_OFFSET * 4096)
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        await fs.sync()
        await fs.unlink(fs.root_ino, b"f")
        await fs.tick(checkpoint=True)
        superblock = fs.core.superblock
    number, index = divmod(ino, superblock.group_blocks)
    group = await device.read(superblock.group_block(number) * 4096, 4096)
    node = decode_node_untrusted(
        open_block_untrusted(superblock.fs, superblock.group_block(number), group), group
    )
    assert isinstance(node, GroupNode)
    assert node.states[index] == BlockState.FREEING
    await device.write(first * 4096, headers)
    await device.write(ino * 4096, b"data" * 1024)
    replayer = Replayer(device, superblock)
    header = await replayer.header((first, blocks))
    assert (await replayer.replay((first, blocks), header)).transactions > 0
    assert await device.read(ino * 4096, 4096) == b"data" * 1024


async def test_a_size_is_never_durable_before_the_bytes() -> None:
    """An append into the last block, and a commit that another file asks for."""
    device = await make_device(8, group_blocks=512, log_writes=True)
    async with mounted(device, unmount=False) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        other = await fs.create(fs.root_ino, b"g", 0o644, 0, 0)
        await fs.write(made.ino, 0, b"a" * 5000)
        await fs.fsync(made.ino)
        await fs.write(made.ino, 5000, b"b" * 2000)
        await fs.write(other.ino, 0, b"c")
        await fs.fsync(other.ino)
    for choice in (None, random.Random(1)):
        crashed = image(device.size_bytes, list(device.log), len(device.log), choice)
        async with mounted(crashed) as fs:
            content = await fs.read(made.ino, 0, 10_000)
            assert content in (b"a" * 5000, b"a" * 5000 + b"b" * 2000)


async def test_an_append_after_a_cut_spoils_nothing_of_what_was_before_the_cut() -> None:
    """Neither is durable, but the block of the append is on the disk: a crash brings the file as it
    was before both, with all its bytes."""
    device = await make_device(16)
    old = bytes(range(1, 200)) * 100
    async with mounted(device) as fs:
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        await fs.write(ino, 0, old)
        await fs.fsync(ino)
        await fs.setattr(ino, SetAttributes(size=10_264))
        await fs.write(ino, 0, old[10_264:10_274], append=True)
        await fs.core.pages.flush_all()
        crashed = device.snapshot()
        # What lies behind the end is not to be seen when the file becomes longer.
        await fs.setattr(ino, SetAttributes(size=12_000))
        assert await fs.read(ino, 0, 20_000) == old[:10_274] + bytes(12_000 - 10_274)
        await fs.setattr(ino, SetAttributes(size=11_000))
        await fs.write(ino, 11_500, b"x")
        assert await fs.read(ino, 0, 20_000) == old[:10_274] + bytes(11_500 - 10_274) + b"x"
    async with mounted(crashed) as fs:
        assert await fs.read(ino, 0, 20_000) == old
    await fsck(crashed)
    await fsck(device)


async def test_fdatasync_keeps_content_and_size() -> None:
    """Of small files (in the inode), of grown ones, and of overwritten ones; times may be lost."""
    device = await make_device(8, group_blocks=512, log_writes=True)
    expected: dict[int, bytes] = {}
    async with mounted(device, unmount=False) as fs:
        for number, size in enumerate((100_000, 5000, 3000, 10)):
            made = await fs.create(fs.root_ino, b"f%d" % number, 0o644, 0, 0)
            for turn in (1, 2):
                await fs.write(made.ino, 0, bytes([turn]) * size)
                await fs.fsync(made.ino, datasync=True)
            await fs.write(made.ino, 5, b"sync", sync=True)
            if size >= 8192:
                await fs.write(made.ino, 4096, b"d" * 4096, sync=True, direct=True)
            expected[made.ino] = await fs.read(made.ino, 0, size)
    crashed = image(device.size_bytes, list(device.log), len(device.log), random.Random(1))
    await fsck(crashed)
    async with mounted(crashed) as fs:
        for ino, content in expected.items():
            assert await fs.read(ino, 0, 1 << 20) == content
