"""Any sequence of operations gives what a dictionary gives, and leaves a clean file system."""

from __future__ import annotations

import contextlib
import stat

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.attributes import RENAME_EXCHANGE, MountOptions, SetAttributes
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.transaction import NotNow
from cluster.locks import Mode
from tests.cfs.harness import QUIET, fsck, make_device, mounted, tree_of

NAMES = [b"a", b"b", b"c", b"d" * 200, b"e" * 255]
names = st.sampled_from(NAMES)
paths = st.lists(names, min_size=1, max_size=3).map(tuple)
Path = tuple[bytes, ...]
offsets = st.integers(0, 40_000)
sizes = st.integers(0, 20_000)
operations = st.one_of(
    st.tuples(st.just("create"), paths),
    st.tuples(st.just("mkdir"), paths),
    st.tuples(st.just("symlink"), paths, st.binary(min_size=1, max_size=300)),
    st.tuples(st.just("link"), paths, paths),
    st.tuples(st.just("unlink"), paths),
    st.tuples(st.just("rmdir"), paths),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("exchange"), paths, paths),
    st.tuples(st.just("write"), paths, offsets, sizes, st.booleans()),
    st.tuples(st.just("append"), paths, sizes),
    st.tuples(st.just("truncate"), paths, offsets),
    st.tuples(st.just("sync")),
    st.tuples(st.just("remount")),
)


class Entry:
    """An inode of the model."""

    def __init__(self, kind: str, content: bytes = b"") -> None:
        self.kind = kind
        self.content = content
        self.children: dict[bytes, Entry] = {}


class Refused(Exception):
    pass


class Model:
    """What a file system is, as dictionaries."""

    def __init__(self) -> None:
        self.root = Entry("dir")

    def at(self, path: Path) -> Entry:
        entry = self.root
        for name in path:
            if entry.kind != "dir" or name not in entry.children:
                raise Refused
            entry = entry.children[name]
        return entry

    def parent(self, path: Path) -> Entry:
        entry = self.at(path[:-1])
        if entry.kind != "dir":
            raise Refused
        return entry

    def add(self, path: Path, entry: Entry) -> None:
        parent = self.parent(path)
        if path[-1] in parent.children:
            raise Refused
        parent.children[path[-1]] = entry

    def do(self, kind: str, *how: object) -> None:
        getattr(self, kind)(*how)

    def create(self, path: Path) -> None:
        self.add(path, Entry("file"))

    def mkdir(self, path: Path) -> None:
        self.add(path, Entry("dir"))

    def symlink(self, path: Path, target: bytes) -> None:
        self.add(path, Entry("link", target))

    def link(self, path: Path, new: Path) -> None:
        entry = self.at(path)
        if entry.kind == "dir":
            raise Refused
        self.add(new, entry)

    def unlink(self, path: Path) -> None:
        if self.at(path).kind == "dir":
            raise Refused
        del self.parent(path).children[path[-1]]

    def rmdir(self, path: Path) -> None:
        entry = self.at(path)
        if entry.kind != "dir" or entry.children:
            raise Refused
        del self.parent(path).children[path[-1]]

    def rename(self, path: Path, new: Path) -> None:
        entry, parent = self.at(path), self.parent(new)
        if entry.kind == "dir" and new[: len(path)] == path and new != path:
            raise Refused
        target = parent.children.get(new[-1])
        if target is not None:
            if target is entry:
                return
            if (entry.kind == "dir") != (target.kind == "dir") or target.children:
                raise Refused
        del self.parent(path).children[path[-1]]
        parent.children[new[-1]] = entry

    def exchange(self, path: Path, new: Path) -> None:
        entry, other = self.at(path), self.at(new)
        if entry is other:
            return
        if path == new[: len(path)] or new == path[: len(new)]:
            raise Refused
        self.parent(path).children[path[-1]] = other
        self.parent(new).children[new[-1]] = entry

    def file(self, path: Path) -> Entry:
        entry = self.at(path)
        if entry.kind != "file":
            raise Refused
        return entry

    def write(self, path: Path, offset: int, size: int, direct: bool) -> None:
        entry = self.file(path)
        if size:
            content = entry.content.ljust(offset, b"\0")
            entry.content = content[:offset] + pattern(offset, size) + content[offset + size :]

    def append(self, path: Path, size: int) -> None:
        entry = self.file(path)
        entry.content += pattern(len(entry.content), size)

    def truncate(self, path: Path, size: int) -> None:
        entry = self.file(path)
        entry.content = entry.content[:size].ljust(size, b"\0")

    def sync(self) -> None: ...

    def remount(self) -> None: ...

    def tree(self) -> dict[bytes, object]:
        result: dict[bytes, object] = {}

        def visit(entry: Entry, path: bytes) -> None:
            for name, child in entry.children.items():
                where = path + b"/" + name
                result[where] = (
                    (child.kind,) if child.kind == "dir" else (child.kind, child.content)
                )
                visit(child, where)

        visit(self.root, b"")
        return result


def pattern(offset: int, size: int) -> bytes:
    return bytes((offset * 7 + step) % 255 + 1 for step in range(size))


async def resolve(fs: FileSystem, path: Path) -> int:
    ino = fs.root_ino
    for name in path:
        ino = (await fs.lookup(ino, name)).ino
    return ino


def attempt(fs: FileSystem, kind: str, parent: int, path: Path, rest: tuple[object, ...]) -> None:
    """The operations that can be tried at once. Raises NotNow: nothing is done."""
    if kind == "create":
        fs.try_create(parent, path[-1], 0o644, 0, 0, 0)
    elif kind == "mkdir":
        fs.try_mkdir(parent, path[-1], 0o755, 0, 0, 0)
    elif kind in ("unlink", "rmdir"):
        fs.try_remove(parent, path[-1], directory=kind == "rmdir")
    elif kind in ("rename", "exchange"):
        new_parent, new_name = rest
        flags = RENAME_EXCHANGE if kind == "exchange" else 0
        fs.try_rename(parent, path[-1], new_parent, new_name, flags)  # type: ignore[arg-type]
    else:
        raise NotNow


def attempt_write(fs: FileSystem, ino: int, offset: int, data: bytes) -> None:
    """A write at once. Raises NotNow: nothing is done."""
    lock = fs.inode_lock(ino)
    if not lock.try_hold(Mode.EX):
        raise NotNow
    try:
        assert fs.try_write_held(ino, offset, data, kill=True) == len(data)
    finally:
        lock.release(Mode.EX)


def attempt_direct_write(fs: FileSystem, ino: int, offset: int, data: bytes) -> None:
    """A direct write of which nothing is left to wait for. Raises NotNow: nothing is done."""
    ends: list[Exception | None] = []
    fs.start_write(ino, offset, bytearray(data), ends.append, kill=True)
    assert ends == [None]


async def apply(fs: FileSystem, kind: str, *how: object) -> None:
    """One operation by path. Those on paths of odd length are tried at once first."""
    if kind in ("sync", "remount"):
        await fs.sync()
        return
    path: Path = how[0]  # type: ignore[assignment]
    rest = how[1:]
    if kind in ("write", "append", "truncate"):
        ino = await resolve(fs, path)
        attributes = await fs.getattr(ino)
        if not stat.S_ISREG(attributes.mode):
            raise FsError(21)
        if kind == "write":
            offset, size, direct = rest
            data = pattern(offset, size)  # type: ignore[arg-type]
            try:
                if not len(path) % 2:
                    raise NotNow
                attempt_one = attempt_direct_write if direct else attempt_write
                attempt_one(fs, ino, offset, data)  # type: ignore[arg-type]
            except NotNow:
                await fs.write(ino, offset, data, direct=direct)  # type: ignore[arg-type]
        elif kind == "append":
            data = pattern(attributes.size, rest[0])  # type: ignore[arg-type]
            await fs.write(ino, 0, data, append=True)
        else:
            await fs.setattr(ino, SetAttributes(size=rest[0]))  # type: ignore[arg-type]
        return
    if kind == "link":
        new: Path = rest[0]  # type: ignore[assignment]
        await fs.link(await resolve(fs, path), await resolve(fs, new[:-1]), new[-1])
        return
    parent = await resolve(fs, path[:-1])
    if kind in ("rename", "exchange"):
        new = rest[0]  # type: ignore[assignment]
        rest = (await resolve(fs, new[:-1]), new[-1])
    if len(path) % 2:
        with contextlib.suppress(NotNow):
            attempt(fs, kind, parent, path, rest)
            return
    if kind == "create":
        await fs.create(parent, path[-1], 0o644, 0, 0)
    elif kind == "mkdir":
        await fs.mkdir(parent, path[-1], 0o755, 0, 0)
    elif kind == "symlink":
        await fs.symlink(parent, path[-1], rest[0], 0, 0)  # type: ignore[arg-type]
    elif kind == "unlink":
        await fs.unlink(parent, path[-1])
    elif kind == "rmdir":
        await fs.rmdir(parent, path[-1])
    else:
        flags = RENAME_EXCHANGE if kind == "exchange" else 0
        await fs.rename(parent, path[-1], *rest, flags)  # type: ignore[arg-type]


async def both(fs: FileSystem, model: Model, operation: tuple[object, ...]) -> None:
    """Do one operation on both sides; both refuse or both do it."""
    kind, how = str(operation[0]), operation[1:]
    try:
        model.do(kind, *how)
        expected = True
    except Refused:
        expected = False
    try:
        await apply(fs, kind, *how)
        done = True
    except FsError:
        done = False
    assert done == expected, operation


@given(st.lists(operations, max_size=30))
@settings(max_examples=80, deadline=None)
def test_operations_are_those_of_a_dictionary(steps: list[tuple[object, ...]]) -> None:
    trio.run(_run, steps)


async def _run(steps: list[tuple[object, ...]]) -> None:
    device = await make_device(8, group_blocks=512)
    model = Model()
    rounds: list[list[tuple[object, ...]]] = [[]]
    for step in steps:
        rounds[-1].append(step)
        if step[0] == "remount":
            rounds.append([])
    for number, part in enumerate(rounds):
        options = QUIET if number % 2 else MountOptions(commit_interval_ms=1)
        async with mounted(device, options) as fs:
            for step in part:
                await both(fs, model, step)
            assert await tree_of(fs) == model.tree()
        await fsck(device)
