"""A file system on a RAM disk with something of everything, and what must be found in it."""

from __future__ import annotations

import stat
from dataclasses import dataclass, field

from cfs import acl
from cfs.attributes import BLOCK_BYTES
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.format import Superblock
from cfs.stage import read_superblock
from cfs.xattr import ACCESS_ACL
from cluster.device_memory import MemoryDevice
from tests.cfs.harness import make_device, mounted

MEBIBYTES = 16
GROUP_BLOCKS = 512
READ_BYTES_MAX = 4 << 20
"""No kernel asks for more at once than this; a damaged size may be anything."""
LARGE_NAMES = 120
PIECES = 400
"""Extents of the file `pieces`: more than one block of a tree holds."""

LISTED = acl.encode(
    [
        acl.Entry(acl.USER_OBJ, 6), acl.Entry(acl.USER, 4, 1000), acl.Entry(acl.GROUP_OBJ, 4),
        acl.Entry(acl.MASK, 6), acl.Entry(acl.OTHER, 0),
    ]
)  # fmt: skip
"""The access control list of `listed`; its mode is 0660."""

Found = tuple[object, ...]


@dataclass
class World:
    """What was built. `early` is the disk at an earlier moment, for blocks that are stale."""

    device: MemoryDevice
    early: MemoryDevice
    crashed: MemoryDevice
    superblock: Superblock
    inos: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Found] = field(default_factory=dict)
    """What `look` found at each path."""
    orphan: int = 0


async def build() -> World:
    """The same world every time."""
    device = await make_device(MEBIBYTES, group_blocks=GROUP_BLOCKS, journals=3)
    world = World(device, device, device, await read_superblock(device))
    async with mounted(device) as fs:
        await _first_half(fs, world)
    world.early = device.snapshot()
    async with mounted(device) as fs:
        await _second_half(fs, world)
        orphan = await _file(fs, fs.root_ino, b"orphan", b"o" * 30_000)
        await fs.open_ref(orphan)
        await fs.unlink(fs.root_ino, b"orphan")
        world.orphan = orphan
    world.device = device.snapshot()
    async with mounted(device.snapshot()) as fs:
        world.facts = await look(fs)
        world.inos = await _numbers(fs)
    async with mounted(device, unmount=False) as fs:
        for number in range(20):
            await _file(fs, world.inos["/dir"], b"late%02d" % number, b"l" * 9000)
            await fs.sync()
        await fs.unlink(world.inos["/dir"], b"late03")
        await fs.sync()
    world.crashed = device.snapshot()
    return world


def large_name(number: int) -> bytes:
    """A name in the directory `large`: long, so that few fill a block."""
    return b"%04d" % number * 25


async def _file(fs: FileSystem, parent: int, name: bytes, content: bytes) -> int:
    made = await fs.create(parent, name, 0o644, 7, 8)
    if content:
        await fs.write(made.ino, 0, content)
    return made.ino


async def _first_half(fs: FileSystem, world: World) -> None:
    root = fs.root_ino
    await _file(fs, root, b"small", b"s" * 100)
    await _file(fs, root, b"empty", b"")
    await _file(fs, root, b"big", bytes(range(256)) * 400)
    pieces = await _file(fs, root, b"pieces", b"")
    for number in range(PIECES):
        await fs.write(pieces, number * 2 * BLOCK_BYTES, b"%06d" % number * 600)
        if not number % 100:
            await fs.sync()
    await fs.symlink(root, b"link", b"dir/one", 0, 0)
    await fs.symlink(root, b"longlink", b"t" * 3000, 0, 0)
    hard = await _file(fs, root, b"hard1", b"h" * 5000)
    await fs.link(hard, root, b"hard2")
    made = await fs.mkdir(root, b"dir", 0o755, 0, 0)
    for name in (b"one", b"two", b"three"):
        await _file(fs, made.ino, name, name * 3000)
    large = await fs.mkdir(root, b"large", 0o755, 0, 0)
    for number in range(LARGE_NAMES // 2):
        await _file(fs, large.ino, large_name(number), b"%d" % number)
    at = root
    for name in (b"deep", b"er", b"and", b"deeper"):
        at = (await fs.mkdir(at, name, 0o755, 0, 0)).ino
    await _file(fs, at, b"bottom", b"b" * 200)
    await fs.mknod(root, b"fifo", stat.S_IFIFO | 0o600, 0, 0, 0)
    listed = await _file(fs, root, b"listed", b"l" * 60)
    await fs.setxattr(listed, ACCESS_ACL, LISTED)
    marked = await _file(fs, root, b"marked", b"m" * 50)
    await fs.setxattr(marked, b"user.small", b"1")


async def _second_half(fs: FileSystem, world: World) -> None:
    root = fs.root_ino
    large = (await fs.lookup(root, b"large")).ino
    for number in range(LARGE_NAMES // 2, LARGE_NAMES):
        await _file(fs, large, large_name(number), b"%d" % number)
    marked = (await fs.lookup(root, b"marked")).ino
    await fs.setxattr(marked, b"user.large", b"x" * 20_000)
    for number in range(12):
        await fs.setxattr(marked, b"user.many%d" % number, b"%d" % number * 400)
    big = (await fs.lookup(root, b"big")).ino
    await fs.write(big, 102_400, b"more" * 10_000)
    one = (await fs.lookup((await fs.lookup(root, b"dir")).ino, b"one")).ino
    await fs.write(one, 20_000, b"tail" * 5000)


async def look(fs: FileSystem) -> dict[str, Found]:
    """Everything by path, found by listing."""
    paths: list[str] = []

    async def visit(ino: int, path: str) -> None:
        cookie = 0
        while entries := await fs.readdir(ino, cookie, 50):
            cookie = entries[-1].cookie
            for entry in entries:
                if entry.name not in (b".", b".."):
                    paths.append(f"{path}/{entry.name.decode(errors='replace')}")
                    if entry.type == stat.S_IFDIR:
                        await visit(entry.ino, paths[-1])

    await visit(fs.root_ino, "")
    return await look_by_name(fs, paths)


async def look_by_name(fs: FileSystem, paths: list[str]) -> dict[str, Found]:
    """(type, mode, owner, links, ...content, attributes) of each path; ("errno", N) if an operation
    failed."""
    return {path: await _look_at(fs, path) for path in paths}


async def _look_at(fs: FileSystem, path: str) -> Found:
    try:
        ino = fs.root_ino
        for name in path.encode().split(b"/")[1:]:
            found = await fs.lookup(ino, name)
            ino = found.ino
        kind = stat.S_IFMT(found.mode)
        facts: Found = (kind, found.mode & 0o7777, found.uid, found.nlink)
        if kind == stat.S_IFREG:
            size = min(found.size, READ_BYTES_MAX)
            facts += (found.size, await fs.read(found.ino, 0, size))
        elif kind == stat.S_IFLNK:
            facts += (await fs.readlink(found.ino),)
        names = await fs.listxattr(found.ino)
        return (*facts, tuple([(each, await fs.getxattr(ino, each)) for each in sorted(names)]))
    except FsError as error:
        return ("errno", error.errno)


async def _numbers(fs: FileSystem) -> dict[str, int]:
    result = {"/": fs.root_ino}

    async def visit(ino: int, path: str) -> None:
        cookie = 0
        while entries := await fs.readdir(ino, cookie, 100):
            cookie = entries[-1].cookie
            for entry in entries:
                if entry.name in (b".", b".."):
                    continue
                result[f"{path}/{entry.name.decode()}"] = entry.ino
                if entry.type == stat.S_IFDIR:
                    await visit(entry.ino, f"{path}/{entry.name.decode()}")

    await visit(fs.root_ino, "")
    return result
