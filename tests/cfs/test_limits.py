"""As large as promised: names in a directory, hard links, name lengths.

`CFS_FULL=1` takes the promised sizes (200 000 names, 65 000 links; minutes), else a tenth.
"""

from __future__ import annotations

import os
import random

import pytest
import trio

from cfs.attributes import MountOptions
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from tests.cfs.harness import cluster, fsck, make_device, mounted

FULL = bool(os.environ.get("CFS_FULL"))
pytestmark = [pytest.mark.trio, *([pytest.mark.timeout(3600)] if FULL else [])]
ENTRIES = 200_000 if FULL else 20_000
LINKS = 65_000 if FULL else 6500
TICKING = MountOptions(commit_interval_ms=200)


async def listed(fs: FileSystem, ino: int) -> list[bytes]:
    """All names, in many short calls."""
    found: list[bytes] = []
    cookie = 0
    while entries := await fs.readdir(ino, cookie, 500):
        cookie = entries[-1].cookie
        found += [entry.name for entry in entries]
        await trio.lowlevel.checkpoint()
    return [name for name in found if name not in (b".", b"..")]


async def test_a_large_directory_is_listed_and_emptied_while_another_node_works_in_it() -> None:
    rng = random.Random(1)
    device = await make_device(1024 if FULL else 192)
    async with cluster(device) as world:
        one, two = await world.mount(1, TICKING), await world.mount(2, TICKING)
        place = (await one.mkdir(one.root_ino, b"d", 0o755, 0, 0)).ino
        first = (await one.create(place, b"first", 0o644, 0, 0)).ino
        # Links are names like any other, and need no inode each.
        stable = {b"stable-%06d" % number for number in range(ENTRIES)}
        for name in stable:
            await one.link(first, place, name)
        working = True
        made: set[bytes] = set()

        async def work() -> None:
            number = 0
            while working:
                number += 1
                name = b"moving-%d" % number
                await two.create(place, name, 0o644, 0, 0)
                made.add(name)
                if rng.random() < 0.9:
                    victim = rng.choice(sorted(made)) if len(made) < 50 else name
                    await two.unlink(place, victim)
                    made.discard(victim)
                await trio.sleep(0.001)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            found = await listed(one, place)
            assert len(set(found)) == len(found)
            assert stable <= set(found)
            for name in found:
                if name in stable:
                    await one.unlink(place, name)
            working = False
        left = await listed(two, place)
        assert set(left) == made | {b"first"}
        for name in left:
            await one.unlink(place, name)
        await two.rmdir(two.root_ino, b"d")
    await fsck(device)


async def test_an_inode_with_very_many_names() -> None:
    device = await make_device(128)
    async with mounted(device, TICKING) as fs:
        root = fs.root_ino
        ino = (await fs.create(root, b"0", 0o644, 0, 0)).ino
        for number in range(1, LINKS):
            await fs.link(ino, root, b"%d" % number)
        assert (await fs.getattr(ino)).nlink == LINKS
    await fsck(device)
    async with mounted(device, TICKING) as fs:
        for number in range(LINKS):
            await fs.unlink(root, b"%d" % number)
        with pytest.raises(FsError):
            await fs.getattr(ino)
        assert await listed(fs, root) == []
    await fsck(device)
