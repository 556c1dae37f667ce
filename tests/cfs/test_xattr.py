"""Extended attributes on one mount: values of all sizes, flags, blocks that come and go."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from cfs import tree
from cfs.attributes import BLOCK_BYTES, XATTR_BYTES_MAX
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.format import Kind
from cfs.fsck.checker import check
from cfs.xattr import CREATE, REPLACE
from cluster.device_memory import MemoryDevice
from tests.cfs.harness import cluster, fsck, make_device, mounted
from tests.cfs.test_crash import image

pytestmark = pytest.mark.trio

SIZES = [0, 1, 30, 200, 700, 990, 1000, 1001, 4032, 4033, 20_000, XATTR_BYTES_MAX]


def refused(number: int) -> object:
    return pytest.raises(FsError, match=errno.errorcode[number])


async def everything(fs: FileSystem, ino: int) -> dict[bytes, bytes]:
    names = await fs.listxattr(ino)
    assert len(set(names)) == len(names)
    return {name: await fs.getxattr(ino, name) for name in names}


async def test_flags_sizes_and_names_are_exact() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        with refused(errno.ENODATA):
            await fs.getxattr(ino, b"user.a")
        with refused(errno.ENODATA):
            await fs.setxattr(ino, b"user.a", b"1", REPLACE)
        with refused(errno.ENODATA):
            await fs.removexattr(ino, b"user.a")
        before = await fs.getattr(ino)
        await fs.setxattr(ino, b"user.a", b"1", CREATE)
        after = await fs.getattr(ino)
        assert after.ctime_ns > before.ctime_ns
        assert after.mtime_ns == before.mtime_ns
        with refused(errno.EEXIST):
            await fs.setxattr(ino, b"user.a", b"2", CREATE)
        assert await fs.getxattr(ino, b"user.a") == b"1"
        await fs.setxattr(ino, b"user.a", b"", REPLACE)
        assert await fs.getxattr(ino, b"user.a") == b""
        longest = b"user." + b"n" * 250
        await fs.setxattr(ino, longest, b"v" * XATTR_BYTES_MAX)
        assert await fs.getxattr(ino, longest) == b"v" * XATTR_BYTES_MAX
        with refused(errno.ERANGE):
            await fs.setxattr(ino, longest + b"n", b"")
        with refused(errno.E2BIG):
            await fs.setxattr(ino, b"user.big", b"v" * (XATTR_BYTES_MAX + 1))
        for name, error in ((b"user.", errno.EINVAL), (b"other.a", errno.EOPNOTSUPP)):
            with refused(error):
                await fs.setxattr(ino, name, b"")
        assert sorted(await fs.listxattr(ino)) == sorted([b"user.a", longest])
    await fsck(device)


async def test_names_that_listxattr_could_not_give_are_refused() -> None:
    device = await make_device(64)
    async with mounted(device) as fs:
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        for number in range(256):
            await fs.setxattr(ino, b"user." + b"%03d" % number * 83 + b"x", b"v")
        with refused(errno.ENOSPC):
            await fs.setxattr(ino, b"user.one-more", b"")
        assert len(await fs.listxattr(ino)) == 256
        await fs.removexattr(ino, b"user." + b"007" * 83 + b"x")
        await fs.setxattr(ino, b"user." + b"777" * 83 + b"y", b"v")
        with refused(errno.ENOSPC):
            await fs.setxattr(ino, b"user.one-more", b"")
    async with mounted(device) as fs:
        with refused(errno.ENOSPC):
            await fs.setxattr(ino, b"user.one-more", b"")
        await fs.removexattr(ino, b"user." + b"777" * 83 + b"y")
        await fs.setxattr(ino, b"user.one-more", b"")
        await fs.unlink(fs.root_ino, b"f")
    await fsck(device)


async def test_many_attributes_cost_no_more_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new one reads does not grow with their number."""
    device = await make_device()
    items = 0
    original = tree.items

    def counted(*arguments: object, **how: object) -> Iterator[object]:
        nonlocal items
        for item in original(*arguments, **how):  # type: ignore[arg-type]
            items += 1
            yield item

    monkeypatch.setattr(tree, "items", counted)
    async with mounted(device) as fs:
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        for number in range(1000):
            await fs.setxattr(ino, b"user.%d" % number, b"v")
        assert items < 10_000
    await fsck(device)


@pytest.mark.parametrize("seed", range(4))
async def test_random_changes_agree_with_a_dictionary(seed: int) -> None:
    rng = random.Random(seed)
    device = await make_device()
    async with mounted(device) as fs:
        free = (await fs.statfs()).free_blocks
        made = await fs.mkdir(fs.root_ino, b"d", 0o755, 0, 0)
        model: dict[bytes, bytes] = {}
        names = [b"user.%d" % n + b"x" * rng.randrange(200) for n in range(40)]
        for step in range(300):
            name = rng.choice(names)
            if rng.random() < 0.35:
                if name in model:
                    await fs.removexattr(made.ino, name)
                    del model[name]
            else:
                model[name] = rng.randbytes(rng.choice(SIZES))
                await fs.setxattr(made.ino, name, model[name])
            if step % 50 == 0:
                assert await everything(fs, made.ino) == model
                await fs.tick(checkpoint=True)
        assert await everything(fs, made.ino) == model
        await fs.create(made.ino, b"names-and-attributes", 0o600, 0, 0)
        await fs.tick(checkpoint=True)
    await fsck(device)
    async with mounted(device) as fs:
        found = await fs.lookup(fs.root_ino, b"d")
        assert await everything(fs, found.ino) == model
        await fs.unlink(found.ino, b"names-and-attributes")
        for name in list(model):
            await fs.removexattr(found.ino, name)
        assert (await fs.getattr(found.ino)).blocks == 0
        await fs.rmdir(fs.root_ino, b"d")
        await fs.tick(checkpoint=True)
        # What the pool of inodes holds ready is free as well.
        assert (await fs.statfs()).free_blocks == free
    await fsck(device)


async def test_a_file_gives_all_blocks_of_its_attributes_back() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        free = (await fs.statfs()).free_blocks
        for attributes in (1, 5, 200):
            ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
            await fs.write(ino, 0, b"data" * 5000)
            for number in range(attributes):
                await fs.setxattr(ino, b"user.%d" % number, bytes(9000))
            assert (await fs.getattr(ino)).blocks >= attributes * 3 * 8
            await fs.unlink(fs.root_ino, b"f")
            while fs.orphans.where:
                await fs.core.runtime.sleep(0)
            await fs.tick(checkpoint=True)
            assert (await fs.statfs()).free_blocks == free
    await fsck(device)


async def test_every_prefix_of_the_log_has_whole_attributes() -> None:
    rng = random.Random(5)
    device = await make_device(8, group_blocks=512, log_writes=True)
    begin = len(device.log)
    values: dict[bytes, list[bytes]] = {}
    async with mounted(device, unmount=False) as fs:
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        await fs.sync()
        for step in range(60):
            name = b"user.%d" % rng.randrange(6)
            value = rng.randbytes(rng.choice(SIZES[:-1]))
            await fs.setxattr(ino, name, value)
            values.setdefault(name, []).append(value)
            if step % 3 == 0:
                await fs.sync()
            if step % 20 == 10:
                await fs.tick(checkpoint=True)
    log = list(device.log)
    for count in sorted(rng.sample(range(begin, len(log) + 1), 30)):
        for choice in (None, random.Random(count)):
            crashed: MemoryDevice = image(device.size_bytes, log, count, choice)
            await fsck(crashed)
            async with mounted(crashed) as fs:
                try:
                    found = await fs.lookup(fs.root_ino, b"f")
                except FsError:
                    continue
                for name, value in (await everything(fs, found.ino)).items():
                    assert value in values[name], "neither an old nor a new value"


async def test_another_mount_sees_attributes_at_once() -> None:
    device = await make_device()
    async with cluster(device) as world:
        one, two = await world.mount(1), await world.mount(2)
        ino = (await one.create(one.root_ino, b"f", 0o644, 0, 0)).ino
        for size in SIZES:
            await one.setxattr(ino, b"user.a", bytes([size % 256]) * size)
            assert await two.getxattr(ino, b"user.a") == bytes([size % 256]) * size
            await two.setxattr(ino, b"user.b", b"%d" % size)
            assert await one.getxattr(ino, b"user.b") == b"%d" % size
        await two.removexattr(ino, b"user.a")
        assert await one.listxattr(ino) == [b"user.b"]
    await fsck(device)


async def test_fsck_notices_damaged_attributes() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = (await fs.create(fs.root_ino, b"f", 0o644, 0, 0)).ino
        for number in range(20):
            await fs.setxattr(ino, b"user.%d" % number, bytes(4000))
        nodes = dict(fs.core.state(ino).nodes)
    for kind in (Kind.XATTR_TREE, Kind.XATTR_VALUE):
        block = next(block for block, node in nodes.items() if node.kind == kind)
        damaged = device.snapshot()
        await damaged.write(block * BLOCK_BYTES, bytes(BLOCK_BYTES))
        assert not (await check(damaged)).clean
        async with mounted(damaged) as fs:
            with refused(errno.EIO):
                await everything(fs, ino)
            assert (await fs.getattr(ino)).size == 0
