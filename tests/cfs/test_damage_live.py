"""Damage that running mounts meet: frees into a damaged group, and what a dead member left."""

from __future__ import annotations

import errno

import pytest

from cfs.attributes import SetAttributes
from cfs.damage import LINES_MAX, REPEAT_NS, WINDOW_NS, DamageLog
from cfs.errors import CorruptionError, FsError
from cfs.format import SUPERBLOCK_BLOCK
from cfs.fsck.checker import check
from cfs.journal_format import HEADER_BLOCKS, HEADER_COPIES
from cfs.stage import read_superblock
from tests.cfs.harness import cluster, make_device, mounted
from tests.corrupter.campaign import repaired
from tests.corrupter.image import Image


async def _image(device) -> Image:
    return Image(device, await read_superblock(device))


@pytest.mark.trio
async def test_frees_into_a_damaged_group_are_put_off_and_lose_nothing() -> None:
    device = await make_device(16, group_blocks=512)
    async with mounted(device) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        await fs.write(made.ino, 0, b"x" * 200_000)
        await fs.create(fs.root_ino, b"other", 0o644, 0, 0)
    image = await _image(device)
    group = made.ino // 512
    await image.flip(image.superblock.group_block(group))
    async with mounted(device) as fs:
        with pytest.raises(FsError) as caught:
            await fs.setattr(made.ino, SetAttributes(size=10))
        assert caught.value.errno == errno.EIO
        assert await fs.read(made.ino, 0, 300_000) == b"x" * 200_000
        await fs.unlink(fs.root_ino, b"f")
        with pytest.raises(FsError) as caught:
            await fs.lookup(fs.root_ino, b"f")
        assert caught.value.errno == errno.ENOENT
        assert made.ino in fs.orphans.where
        new = await fs.create(fs.root_ino, b"new", 0o644, 0, 0)
        await fs.write(new.ino, 0, b"n" * 100_000)
        await fs.sync()
        assert new.ino // 512 != group
        told = fs.core.environment.told
        assert len(told) == 1
        assert f"allocation group {group}" in told[0][1]
    await repaired(device)
    async with mounted(device) as fs:
        await fs.tick()
        assert await fs.read((await fs.lookup(fs.root_ino, b"new")).ino, 0, 4) == b"nnnn"
    report = await check(device)
    assert report.clean, report.errors


@pytest.mark.trio
async def test_a_block_that_comes_back_older_than_it_was_is_damage() -> None:
    """A write that was acknowledged and lost, while the mount has forgotten the block."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        await fs.tick(checkpoint=True)
        old = await (await _image(device)).get(made.ino)
        await fs.write(made.ino, 0, b"second")
        await fs.tick(checkpoint=True)
        fs.core.state(made.ino).nodes.clear()
        assert await fs.read(made.ino, 0, 10) == b"second"
        fs.core.state(made.ino).nodes.clear()
        await (await _image(device)).put(made.ino, old)
        with pytest.raises(FsError) as caught:
            await fs.getattr(made.ino)
        assert caught.value.errno == errno.EIO
        assert "older than it was" in fs.core.environment.told[0][1]
        await (await _image(device)).zero(made.ino)
        await fs.getattr(fs.root_ino)


@pytest.mark.trio
async def test_a_damaged_superblock_does_no_harm_to_a_running_mount() -> None:
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        image = await _image(device)
        await image.zero(SUPERBLOCK_BLOCK)
        fs._beliefs_at = -(1 << 62)
        await fs.statfs()
        await image.zero(image.superblock.backup_block)
        fs._beliefs_at = -(1 << 62)
        assert (await fs.statfs()).blocks == 2048
        await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        assert {block for block, _ in fs.core.environment.told} == {16, 511}


@pytest.mark.trio
async def test_the_damaged_orphan_list_of_a_dead_member_keeps_nobody_back() -> None:
    device = await make_device(16, group_blocks=512)
    async with cluster(device) as members:
        one, two = await members.mount(1), await members.mount(2)
        made = await two.create(two.root_ino, b"f", 0o644, 0, 0)
        await two.write(made.ino, 0, b"x" * 5000)
        await two.sync()
        places = await (await _image(device)).journals()
        members.kill(2)
        slot = two.core.journal.slot
        await (await _image(device)).flip(places[slot][0] + HEADER_BLOCKS)
        await members.recover(2)
        found = await one.lookup(one.root_ino, b"f")
        assert await one.read(found.ino, 0, 5000) == b"x" * 5000
        told = one.core.environment.told
        assert [f"journal {slot}" in text for _, text in told] == [True]


@pytest.mark.trio
async def test_the_lost_headers_of_a_dead_member_stop_its_recovery_and_nothing_else() -> None:
    device = await make_device(16, group_blocks=512)
    async with cluster(device) as members:
        one, two = await members.mount(1), await members.mount(2)
        await two.create(two.root_ino, b"f", 0o644, 0, 0)
        await two.sync()
        await one.mkdir(one.root_ino, b"mine", 0o755, 0, 0)
        places = await (await _image(device)).journals()
        dead = members.kill(2)
        image = await _image(device)
        first = places[two.core.journal.slot][0]
        for index in range(HEADER_COPIES):
            await image.flip(first + index, 90)
        with pytest.raises(CorruptionError, match="lost the headers"):
            await one.recover(dead)
        place = await one.lookup(one.root_ino, b"mine")
        made = await one.create(place.ino, b"g", 0o644, 0, 0)
        await one.write(made.ino, 0, b"goes on")
        await one.fsync(made.ino)


def test_damage_is_told_once_and_not_too_much_of_it() -> None:
    now = 0
    lines: list[str] = []
    log = DamageLog(lambda block, text: lines.append(text), lambda: now)
    for _ in range(5):
        log.report(7, "inode 7", "block 7 is damaged")
    assert len(lines) == 1
    for number in range(100):
        log.report(number + 10, "", f"block {number + 10} is damaged")
    assert len(lines) == LINES_MAX
    now += WINDOW_NS
    log.report(500, "", "block 500 is damaged")
    assert f"{101 - LINES_MAX} more were not told" in lines[-1]
    now += REPEAT_NS
    log.report(7, "inode 7", "block 7 is damaged")
    assert "block 7" in lines[-1]
    assert log.count == 107
