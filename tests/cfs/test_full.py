"""The full volume: whole or not at all, deleting always works, nothing is hidden from others."""

from __future__ import annotations

import errno
import random

import pytest
import trio
import trio.testing

from cfs.attributes import BLOCK_BYTES, MountOptions, SetAttributes
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from tests.cfs.harness import cluster, fsck, make_device, mounted, tree_of
from tests.cfs.test_operations import make_file, refused

pytestmark = pytest.mark.trio
SLOW = MountOptions(background=False, inode_pool=4)
"""Nothing gets into its place by itself."""


async def fill(fs: FileSystem, ino: int, step: int = 1 << 18) -> int:
    """Append until not one block is left; bytes."""
    size = (await fs.getattr(ino)).size
    while step >= BLOCK_BYTES:
        try:
            size += await fs.write(ino, size, b"f" * step)
        except FsError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            step //= 2
    return size


async def free_blocks(fs: FileSystem) -> int:
    """What df says, without what it remembers."""
    fs._beliefs_at = -(1 << 62)
    return (await fs.statfs()).free_blocks


async def emptied(fs: FileSystem, others: list[FileSystem]) -> None:
    with trio.fail_after(60):
        while any(each.orphans.where for each in [fs, *others]):  # noqa: ASYNC110
            await trio.sleep(0.001)


async def test_the_last_block_is_used_and_all_come_back() -> None:
    device = await make_device(16, group_blocks=512)
    async with mounted(device) as fs:
        before = await free_blocks(fs)
        ino = await make_file(fs, b"f")
        await fill(fs, ino)
        assert await free_blocks(fs) == 0
        await fsck(device)
        await fs.unlink(fs.root_ino, b"f")
        await emptied(fs, [])
        assert await free_blocks(fs) == before
    await fsck(device)


async def test_what_others_freed_is_found_at_once() -> None:
    """Three mounts whose maps are only in memory: one fills everything, another one deletes, the
    first one and the third one use it; df is the same everywhere."""
    device = await make_device(32, group_blocks=512)
    async with cluster(device) as group:
        one, two, three = [await group.mount(number, SLOW) for number in (1, 2, 3)]
        root = one.root_ino
        before = await free_blocks(one)
        a, b = await make_file(one, b"a"), await make_file(two, b"b")
        await two.write(b, 0, b"b" * 4_000_000)
        size = await fill(one, a)
        for fs in (one, two, three):
            assert await free_blocks(fs) == 0
        for turn in range(5):
            await two.setattr(b, SetAttributes(size=(4 - turn) * 500_000))
            grown = await fill(one if turn % 2 else three, a)
            assert grown > size, turn
            size = grown
            for fs in (one, two, three):
                assert await free_blocks(fs) == 0, turn
        await three.unlink(root, b"a")
        await one.unlink(root, b"b")
        await emptied(one, [two, three])
        for fs in (two, one, three):
            assert await free_blocks(fs) == before
    await fsck(device)


async def test_deleting_works_when_nothing_is_free() -> None:
    """Names in a deep directory, files in many pieces, files with a tree: all can be removed, cut
    and renamed over on a file system without one free block."""
    device = await make_device(16, group_blocks=512)
    rng = random.Random(4)
    async with mounted(device) as fs:
        root = fs.root_ino
        names = [b"%03d" % number + b"n" * 200 for number in range(300)]
        for name in names:
            await make_file(fs, name, b"x" * rng.choice([10, 5000]))
        pieces, filler = await make_file(fs, b"pieces"), await make_file(fs, b"filler")
        for number in range(600):
            await fs.write(pieces, number * 8192, b"p" * 4096)
        await fill(fs, filler)
        await fs.sync()
        assert await free_blocks(fs) == 0
        rng.shuffle(names)
        await fs.setattr(pieces, SetAttributes(size=300 * 8192 + 100))
        await fill(fs, filler, BLOCK_BYTES)
        for name in names[:200]:
            await fs.unlink(root, name)
            await emptied(fs, [])
            await fill(fs, filler, BLOCK_BYTES)
            assert await free_blocks(fs) <= 2  # an append may need a tree block as well
        for name in names[200:]:
            await fs.rename(root, name, root, b"pieces")
        await emptied(fs, [])
        assert set(await tree_of(fs, len)) == {b"/pieces", b"/filler"}
    await fsck(device)


async def test_operations_are_whole_or_not_at_all() -> None:
    """Every kind of operation with 0 to 12 free blocks: it is done, or nothing is."""
    device = await make_device(8, group_blocks=512, journals=2)
    async with mounted(device, MountOptions(background=False, inode_pool=4)) as fs:
        root = fs.root_ino
        filler = await make_file(fs, b"filler")
        target = await make_file(fs, b"target", b"t" * 100)
        directory = (await fs.mkdir(root, b"dir", 0o755, 0, 0)).ino
        for number in range(14):
            await make_file(fs, b"%02d" % number + b"n" * 250, parent=directory)
        size = await fill(fs, filler)
        for free in range(13):
            await fs.setattr(filler, SetAttributes(size=size - free * BLOCK_BYTES))
            plans = {
                "create": lambda n=free: fs.create(directory, b"%03d" % n * 80, 0o644, 0, 0),
                "mkdir": lambda n=free: fs.mkdir(directory, b"d%03d" % n * 60, 0o755, 0, 0),
                "symlink": lambda n=free: fs.symlink(directory, b"s%d" % n, b"x" * 3000, 0, 0),
                "link": lambda n=free: fs.link(target, directory, b"l%03d" % n * 60),
                "write": lambda: fs.write(target, 30_000, b"w" * 20_000),
                "fallocate": lambda: fs.fallocate(target, 0, 0, 40_000),
                "xattr": lambda: fs.setxattr(target, b"user.x", b"v" * 30_000, 0),
            }
            for what, call in plans.items():
                before, total = await tree_of(fs), await free_blocks(fs)
                attributes = await fs.getattr(target)
                try:
                    await call()
                except FsError as error:
                    assert error.errno == errno.ENOSPC, what  # noqa: PT017
                    assert await tree_of(fs) == before, what
                    assert await free_blocks(fs) == total, what
                    assert await fs.getattr(target) == attributes, what
                await fs.setattr(target, SetAttributes(size=100))
            await fs.sync()
            await fsck(device)
    await fsck(device)


async def test_freed_blocks_wait_for_the_end_of_a_recovery() -> None:
    """While a dead mount is recovered no freed block may be used again: who needs one waits."""
    device = await make_device(16, group_blocks=512)
    async with mounted(device) as fs:
        ino, filler = await make_file(fs, b"f", b"x" * 400_000), await make_file(fs, b"filler")
        await fill(fs, filler)
        await fs.sync()
        fs.set_recovering(True)
        await fs.setattr(ino, SetAttributes(size=0))
        done = trio.Event()

        async def write() -> None:
            await fs.write(ino, 0, b"y" * 40_000)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()
            fs.set_recovering(False)
        assert await fs.read(ino, 0, 50_000) == b"y" * 40_000
        with refused(errno.ENOSPC):
            await fs.write(ino, 0, b"y" * 500_000)
    await fsck(device)
