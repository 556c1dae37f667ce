"""Inodes without names: unlink never fails for want of a place in the list of a slot."""

from __future__ import annotations

import errno

import pytest
import trio

from cfs.attributes import BLOCK_BYTES
from cfs.filesystem import FileSystem
from cfs.fsck.checker import check
from cfs.orphans import REAPERS_MAX
from tests.cfs.harness import cluster, fsck, make_device, mounted
from tests.cfs.test_full import emptied, free_blocks
from tests.cfs.test_operations import make_file, refused
from tests.corrupter.campaign import repaired

pytestmark = pytest.mark.trio
BYTES = 100_000


async def open_file(fs: FileSystem, name: bytes) -> int:
    ino = await make_file(fs, name, name * (BYTES // len(name)))
    await fs.open_ref(ino)
    return ino


async def unlinked(fs: FileSystem, count: int) -> list[int]:
    """So many open files without a name."""
    names = [b"%04d" % number for number in range(count)]
    inos = [await open_file(fs, name) for name in names]
    for name in names:
        await fs.unlink(fs.root_ino, name)
    return inos


def leave_places(fs: FileSystem, count: int) -> None:
    """As if all the others were taken."""
    del fs.orphans._free[: len(fs.orphans._free) - count]


async def test_files_open_elsewhere_do_not_keep_others_from_being_freed() -> None:
    device = await make_device(64)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        names = [b"%04d" % number for number in range(REAPERS_MAX + 6)]
        inos = [await make_file(one, name, b"x") for name in names]
        for ino in inos:
            await two.open_ref(ino)
        for name in names:
            await one.unlink(one.root_ino, name)
        (ino,) = await unlinked(one, 1)
        one.close_ref(ino)
        with trio.fail_after(60):
            while ino in one.orphans.where:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert len(one.orphans.where) == len(inos)
        for each in inos:
            two.close_ref(each)
        await emptied(one, [])
    await fsck(device)


async def test_a_full_list_refuses_no_unlink() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        before = await free_blocks(fs)
        leave_places(fs, 3)
        inos = await unlinked(fs, 10)
        assert fs.orphans.room == 0
        assert len(fs.orphans.unlisted) == 7
        for ino in inos:
            assert (await fs.getattr(ino)).nlink == 0
            assert len(await fs.read(ino, 0, BYTES)) == BYTES
        for ino in inos[:5]:
            fs.close_ref(ino)
        with trio.fail_after(60):
            while len(fs.orphans.where) + len(fs.orphans.unlisted) > 5:  # noqa: ASYNC110
                await trio.sleep(0.001)
        with trio.fail_after(60):
            while fs.orphans.room and fs.orphans.unlisted:  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert len(fs.orphans.where) == 3
        for ino in inos[5:]:
            fs.close_ref(ino)
        await emptied(fs, [])
        assert not fs.orphans.unlisted
        assert await free_blocks(fs) == before
    await fsck(device)


async def test_what_found_no_place_gets_one_as_soon_as_there_is_one() -> None:
    device = await make_device()
    async with mounted(device, unmount=False) as fs:
        leave_places(fs, 2)
        inos = await unlinked(fs, 3)
        fs.close_ref(inos[0])
        with trio.fail_after(60):
            while fs.orphans.unlisted:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await fs.sync()
    await fsck(device)  # after a crash
    async with mounted(device) as fs:
        await emptied(fs, [])


async def test_a_crash_with_a_full_list_costs_only_space_that_fsck_finds() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        before = await free_blocks(fs)
    async with mounted(device, unmount=False) as fs:
        leave_places(fs, 2)
        await unlinked(fs, 5)
        await make_file(fs, b"kept", b"k" * 10)
        await fs.sync()
    assert (await check(device)).errors
    assert not (await repaired(device)).lossy_count
    async with mounted(device) as fs:
        await emptied(fs, [])
        await fs.unlink(fs.root_ino, b"kept")
        assert await free_blocks(fs) == before


async def test_who_finds_the_list_full_waits_for_what_is_being_freed() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        first, second = await open_file(fs, b"first"), await open_file(fs, b"second")
        leave_places(fs, 1)
        await fs.unlink(fs.root_ino, b"first")
        fs.close_ref(first)
        assert first in fs.orphans.where
        await fs.unlink(fs.root_ino, b"second")
        assert first not in fs.orphans.where
        assert second in fs.orphans.where
        assert not fs.orphans.unlisted
        fs.close_ref(second)
    await fsck(device)
    async with mounted(device) as fs:
        with refused(errno.ESTALE):
            await fs.getattr(second)


async def test_the_list_of_a_dead_mount_may_be_more_than_ours_takes() -> None:
    device = await make_device(64)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        before = await free_blocks(one)
        await unlinked(two, 6)
        await two.sync()
        leave_places(one, 4)
        mine = await open_file(one, b"mine")
        await one.unlink(one.root_ino, b"mine")
        group.kill(2)
        await group.recover(2)
        one.close_ref(mine)
        await emptied(one, [])
        three = await group.mount(3)  # takes the slot, and what still stands in its list
        await emptied(three, [one])
        assert await free_blocks(three) == before
    await fsck(device)


async def test_who_takes_the_list_of_a_dead_mount_over_dies_too() -> None:
    """Its change of both lists is in its journal only, and the first dead one is recovered first:
    an orphan does not come to stand in two lists, and in one of them after it is gone."""
    device = await make_device()
    async with cluster(device) as group:
        one, two, three = [await group.mount(number) for number in (1, 2, 3)]
        before = await free_blocks(one)
        (ino,) = await unlinked(three, 1)
        await three.sync()
        await three.core.journal.checkpoint()
        place = three.orphans.where[ino][0] * BLOCK_BYTES
        group.kill(3)
        reached = trio.Event()

        async def never(kind: str, offset: int, length: int) -> None:
            if kind == "write" and offset <= place < offset + length:
                reached.set()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            device.hook = never
            nursery.start_soon(group.recover, 3)
            with trio.fail_after(60):
                await reached.wait()
            group.kill(1)
            nursery.cancel_scope.cancel()
        device.hook = None
        for dead in (3, 1):
            await group.recover(dead)
            await fsck(device)
        await emptied(two, [])
        assert await free_blocks(two) == before
    await fsck(device)


async def test_who_waits_to_free_a_file_keeps_nobody_from_it() -> None:
    """It was opened in the moment in which it was removed."""
    device = await make_device()
    async with cluster(device) as group:
        one, two, three = [await group.mount(number) for number in (1, 2, 3)]
        ino = await make_file(one, b"f", b"x")
        await two.open_ref(ino)
        await one.unlink(one.root_ino, b"f")
        with trio.fail_after(60):
            while not one.orphans._trying:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await three.open_ref(ino)
        with trio.fail_after(60):
            await two.write(ino, 0, b"two")
            await three.write(ino, 0, b"three")
            assert await two.read(ino, 0, 10) == b"three"
        two.close_ref(ino)
        three.close_ref(ino)
        await emptied(one, [])
    await fsck(device)
