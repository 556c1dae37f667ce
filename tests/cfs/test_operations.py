"""Each operation alone, on one mount."""

from __future__ import annotations

import errno
import stat

import pytest
import trio
import trio.testing

from cfs.attributes import BLOCK_BYTES, NOW, RENAME_NOREPLACE, MountOptions, SetAttributes
from cfs.cache import GroupState
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.journal_format import LOG_OFFSET
from cfs.mkfs_plan import Choices, plan, write_plan
from tests.cfs.harness import QUIET, fsck, make_device, mounted, tree_of

pytestmark = pytest.mark.trio


def refused(number: int) -> object:
    return pytest.raises(FsError, match=errno.errorcode[number])


async def make_file(fs: FileSystem, name: bytes, data: bytes = b"", parent: int = 0) -> int:
    made = await fs.create(parent or fs.root_ino, name, 0o644, 0, 0)
    if data:
        assert await fs.write(made.ino, 0, data) == len(data)
    return made.ino


async def test_empty_file_system_is_clean() -> None:
    device = await make_device()
    await fsck(device)
    async with mounted(device) as fs:
        root = await fs.getattr(fs.root_ino)
        assert stat.S_ISDIR(root.mode)
        assert root.nlink == 2
        names = [entry.name for entry in await fs.readdir(fs.root_ino, 0, 10)]
        assert names == [b".", b".."]
    await fsck(device)


async def test_names_come_and_go() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        first = await fs.create(root, b"a", 0o640, 7, 8)
        assert (first.mode, first.uid, first.gid) == (stat.S_IFREG | 0o640, 7, 8)
        assert await fs.lookup(root, b"a") == first
        with refused(errno.EEXIST):
            await fs.create(root, b"a", 0o640, 7, 8)
        with refused(errno.ENOENT):
            await fs.lookup(root, b"b")
        with refused(errno.ENOTDIR):
            await fs.lookup(first.ino, b"b")
        with refused(errno.ENAMETOOLONG):
            await fs.create(root, b"x" * 256, 0o640, 7, 8)
        linked = await fs.link(first.ino, root, b"b")
        assert linked.nlink == 2
        await fs.unlink(root, b"a")
        assert (await fs.getattr(first.ino)).nlink == 1
        await fs.unlink(root, b"b")
        with refused(errno.ESTALE):
            await fs.getattr(first.ino)
        link = await fs.symlink(root, b"s", b"some/where", 1, 2)
        assert await fs.readlink(link.ino) == b"some/where"
        with refused(errno.EINVAL):
            await fs.readlink(root)
    await fsck(device)


async def test_directories_count_their_links() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        one = await fs.mkdir(root, b"one", 0o755, 0, 0)
        two = await fs.mkdir(one.ino, b"two", 0o755, 0, 0)
        assert (await fs.getattr(root)).nlink == 3
        assert (await fs.getattr(one.ino)).nlink == 3
        assert (await fs.lookup(two.ino, b"..")).ino == one.ino
        with refused(errno.ENOTEMPTY):
            await fs.rmdir(root, b"one")
        with refused(errno.EISDIR):
            await fs.unlink(root, b"one")
        with refused(errno.EPERM):
            await fs.link(two.ino, root, b"hard")
        await fs.rename(one.ino, b"two", root, b"moved")
        assert (await fs.lookup(two.ino, b"..")).ino == root
        assert (await fs.getattr(one.ino)).nlink == 2
        with refused(errno.EINVAL):
            await fs.rename(root, b"moved", two.ino, b"inside")
        await fs.rename(root, b"one", two.ino, b"one")
        with refused(errno.EINVAL):
            await fs.rename(root, b"moved", one.ino, b"loop")
        await fs.rmdir(two.ino, b"one")
        await fs.rmdir(root, b"moved")
        assert (await fs.getattr(root)).nlink == 2
    await fsck(device)


async def test_rename_replaces_only_what_fits() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        file = await make_file(fs, b"file", b"x" * 9000)
        other = await make_file(fs, b"other", b"y" * 9000)
        await fs.mkdir(root, b"dir", 0o755, 0, 0)
        await fs.mkdir(root, b"empty", 0o755, 0, 0)
        full = await fs.mkdir(root, b"full", 0o755, 0, 0)
        await make_file(fs, b"in", parent=full.ino)
        with refused(errno.EISDIR):
            await fs.rename(root, b"file", root, b"dir")
        with refused(errno.ENOTDIR):
            await fs.rename(root, b"dir", root, b"file")
        with refused(errno.ENOTEMPTY):
            await fs.rename(root, b"dir", root, b"full")
        with refused(errno.EEXIST):
            await fs.rename(root, b"file", root, b"other", RENAME_NOREPLACE)
        await fs.rename(root, b"dir", root, b"empty")
        await fs.rename(root, b"file", root, b"other")
        with refused(errno.ESTALE):
            await fs.getattr(other)
        assert (await fs.lookup(root, b"other")).ino == file
        await fs.link(file, root, b"same")
        await fs.rename(root, b"same", root, b"other")
        assert (await fs.getattr(file)).nlink == 2
        await fs.rename(root, b"same", full.ino, b"in")
        assert (await fs.lookup(full.ino, b"in")).ino == file
        with refused(errno.ENOENT):
            await fs.rename(root, b"nothing", root, b"x")
    await fsck(device)


async def test_data_is_read_back_at_every_size() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        model = bytearray()
        for offset, size in [
            (0, 10), (5, 3000), (3400, 300), (100, 1), (4096, 4096), (9000, 5000), (3, 8190),
            (100_000, 7), (50_000, 70_000), (0, 200_000),
        ]:  # fmt: skip
            data = bytes((offset + step) % 251 for step in range(size))
            model.extend(bytes(max(offset + size - len(model), 0)))
            model[offset : offset + size] = data
            assert await fs.write(ino, offset, data) == size
            assert await fs.read(ino, 0, len(model) + 5) == model
        await fs.fsync(ino)
        assert await fs.read(ino, 0, len(model) + 5) == model
        assert await fs.read(ino, 99_990, 30) == model[99_990:100_020]
        assert await fs.read(ino, len(model), 30) == b""
    async with mounted(device) as fs:
        assert await fs.read(ino, 0, len(model) + 5) == model
    await fsck(device)


async def test_truncate_leaves_zeroes_behind() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        for name, size in ((b"small", 3000), (b"large", 30_000)):
            ino = await make_file(fs, name, b"x" * size)
            await fs.fsync(ino)
            await fs.setattr(ino, SetAttributes(size=1000))
            await fs.setattr(ino, SetAttributes(size=20_000))
            expected = b"x" * 1000 + bytes(19_000)
            assert await fs.read(ino, 0, 30_000) == expected
            await fs.fsync(ino)
            assert await fs.read(ino, 0, 30_000) == expected
            assert (await fs.getattr(ino)).size == 20_000
        with refused(errno.EISDIR):
            await fs.setattr(fs.root_ino, SetAttributes(size=0))
    await fsck(device)


async def test_attributes_are_set_and_time_moves_on() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"data")
        before = await fs.getattr(ino)
        changed = await fs.setattr(ino, SetAttributes(mode=0o4755, uid=5, gid=6, atime_ns=123))
        assert (changed.mode & 0o7777, changed.uid, changed.gid) == (0o4755, 5, 6)
        assert changed.atime_ns == 123
        assert changed.ctime_ns > before.ctime_ns
        assert changed.mtime_ns == before.mtime_ns
        await fs.write(ino, 0, b"more")
        written = await fs.getattr(ino)
        assert written.mode & 0o7777 == 0o755
        assert written.mtime_ns > before.mtime_ns
        await fs.setattr(ino, SetAttributes(mode=0o6755))
        assert (await fs.setattr(ino, SetAttributes(uid=1))).mode & 0o7777 == 0o755
        assert (await fs.setattr(ino, SetAttributes(mtime_ns=NOW))).mtime_ns > written.mtime_ns


async def test_set_group_id_of_a_directory_is_inherited() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        parent = await fs.mkdir(fs.root_ino, b"d", 0o2755, 1, 77)
        child = await fs.mkdir(parent.ino, b"c", 0o755, 2, 2)
        file = await fs.create(parent.ino, b"f", 0o644, 2, 2)
        assert (child.gid, child.mode & 0o2000) == (77, 0o2000)
        assert (file.gid, file.mode & 0o2000) == (77, 0)


async def test_append_goes_to_the_end() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        for number in range(100):
            await fs.write(ino, 0, b"%099d\n" % number, append=True)
        data = await fs.read(ino, 0, 20_000)
        assert data == b"".join(b"%099d\n" % number for number in range(100))
    await fsck(device)


async def test_direct_writes_and_reads() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"a" * 40_960)
        await fs.write(ino, 4096, b"b" * 8192, direct=True)
        await fs.write(ino, 100, b"c", direct=True)
        await fs.write(ino, 36_864, b"d" * 8192, direct=True, sync=True)
        expected = bytearray(b"a" * 36_864 + b"d" * 8192)
        expected[4096:12_288] = b"b" * 8192
        expected[100:101] = b"c"
        assert await fs.read(ino, 0, 99_999, direct=True) == expected
    await fsck(device)


async def test_open_files_outlive_their_names() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        ino = await make_file(fs, b"f", b"x" * 50_000)
        await fs.open_ref(ino)
        await fs.unlink(root, b"f")
        assert (await fs.getattr(ino)).nlink == 0
        assert await fs.read(ino, 0, 10) == b"x" * 10
        await fs.write(ino, 0, b"still there")
        await fs.fsync(ino)
        with refused(errno.ENOENT):
            await fs.link(ino, root, b"back")
        fs.close_ref(ino)
    await fsck(device)
    async with mounted(device) as fs:
        with refused(errno.ESTALE):
            await fs.getattr(ino)


async def test_orphans_are_freed_by_the_next_mount() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        free = (await fs.statfs()).free_blocks
    async with mounted(device, unmount=False) as fs:
        ino = await make_file(fs, b"f", b"x" * 500_000)
        await fs.open_ref(ino)
        await fs.unlink(fs.root_ino, b"f")
        await fs.sync()
    await fsck(device)
    async with mounted(device) as fs:
        with refused(errno.ESTALE):
            for _ in range(100):
                await fs.getattr(ino)
                await fs.sync()
        assert not fs.orphans.where
        await fs.sync()
        assert (await fs.statfs()).free_blocks == free
    await fsck(device)


async def test_large_directory_keeps_its_cookies() -> None:
    device = await make_device(64)
    async with mounted(device) as fs:
        root = fs.root_ino
        names = {b"name-%05d" % number for number in range(3000)}
        for name in sorted(names):
            await fs.create(root, name, 0o644, 0, 0)
        first = await fs.readdir(root, 0, 1000)
        for number in range(0, 3000, 3):
            await fs.unlink(root, b"name-%05d" % number)
            names.discard(b"name-%05d" % number)
        seen = {entry.name for entry in first}
        cookie = first[-1].cookie
        while entries := await fs.readdir(root, cookie, 50):
            for entry in entries:
                assert entry.name not in seen
                seen.add(entry.name)
            cookie = entries[-1].cookie
        assert names <= seen
        for name in names:
            await fs.unlink(root, name)
        assert (await fs.getattr(root)).blocks == 0
    await fsck(device)


async def test_full_file_system_refuses_whole_writes() -> None:
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        size = 0
        with refused(errno.ENOSPC):
            while True:
                size += await fs.write(ino, size, b"x" * 65_536)
        assert (await fs.getattr(ino)).size == size
        assert (await fs.statfs()).free_blocks < 64
        with refused(errno.ENOSPC):
            for number in range(200):
                await make_file(fs, b"n%d" % number)
        await fs.setattr(ino, SetAttributes(size=0))
        again = await make_file(fs, b"g")
        size -= 65_536
        assert await fs.write(again, 0, b"y" * size) == size
        assert await fs.read(again, 0, size) == b"y" * size
    await fsck(device)


async def test_fragmented_file_gets_a_tree() -> None:
    device = await make_device(64)
    async with mounted(device) as fs:
        one, two = await make_file(fs, b"1"), await make_file(fs, b"2")
        for block in range(1500):
            await fs.write(one, block * 8192, b"%04d" % block * 1024)
            await fs.write(two, block * 4096, b"%04d" % block * 1024)
        await fs.fsync(one)
        for block in range(1500):
            assert await fs.read(one, block * 8192, 4) == b"%04d" % block
        await fs.sync()
        await fsck(device)
        await fs.setattr(one, SetAttributes(size=8192 * 3))
        assert (await fs.getattr(one)).blocks == 3 * 8
        await fs.unlink(fs.root_ino, b"2")
    await fsck(device)


async def test_grow_uses_the_new_blocks() -> None:
    device = await make_device(16, group_blocks=1024)
    async with mounted(device) as fs:
        before = await fs.statfs()
        device.grow(64 << 20)
        after = await fs.grow()
        assert after.blocks == 16_384
        assert after.free_blocks > before.free_blocks + 12_000
        ino = await make_file(fs, b"f")
        for step in range(40):
            await fs.write(ino, step << 20, bytes([step]) * (1 << 20))
        assert await fs.read(ino, 39 << 20, 4) == bytes([39]) * 4
    await fsck(device)


async def test_remount_shows_everything() -> None:
    device = await make_device()
    options = MountOptions(commit_interval_ms=10, checkpoint_interval_ms=20)
    async with mounted(device, options) as fs:
        for number in range(50):
            made = await fs.mkdir(fs.root_ino, b"d%d" % number, 0o755, 0, 0)
            await make_file(fs, b"f", b"x" * number * 500, made.ino)
        before = await tree_of(fs)
    async with mounted(device, QUIET) as fs:
        assert await tree_of(fs) == before
    await fsck(device)


async def test_making_a_file_waits_for_a_group_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another mount gets the only groups at hand: a create lets that happen, and never spins."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device, MountOptions(background=False, inode_pool=4)) as fs:
        await fs.create(fs.root_ino, b"first", 0o644, 0, 0)
        await fs.sync()
        fills = 0
        fill_pool = fs.core.fill_pool

        async def counted(*, patient: bool) -> None:
            nonlocal fills
            fills += 1
            assert fills < 100, "it spins: no other task ever runs again"
            await fill_pool(patient=patient)

        monkeypatch.setattr(fs.core, "fill_pool", counted)
        for group in list(fs.core.space.mine.values()):
            group.lock.send_away()  # type: ignore[attr-defined]
        await fs.create(fs.root_ino, b"second", 0o644, 0, 0)
        fs.core.space.pool.clear()
        fs.core.space._pooled.clear()
        # Every block that could become an inode is still being looked at under its old number.
        states = [fs.core.table.get(ino) for ino in fs.core.space.pool_candidates(10_000)]
        for state in states:
            state.pins += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.create, fs.root_ino, b"third", 0o644, 0, 0)
            await trio.testing.wait_all_tasks_blocked()
            for state in states:
                state.pins -= 1
    await fsck(device)


async def test_who_holds_a_group_that_leaves_does_not_wait_for_himself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another mount wants a group when its lock is here and its map is not yet."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"x" * 100_000)
        await fs.sync()
        core = fs.core
        hold_group = core._hold_group
        lost: list[int] = []

        async def hold_and_be_asked(number: int, groups: list[GroupState], held: set[int]) -> None:
            await hold_group(number, groups, held)
            if core.group(number).node is None:
                lost.append(number)
                core.group(number).lock.send_away()  # type: ignore[attr-defined]

        monkeypatch.setattr(core, "_hold_group", hold_and_be_asked)
        for group in list(core.space.mine.values()):
            group.lock.send_away()  # type: ignore[attr-defined]
        with trio.fail_after(10):
            await fs.setattr(ino, SetAttributes(size=0))
        assert lost
    await fsck(device)


async def test_a_late_read_of_a_page_never_comes_over_a_newer_one() -> None:
    """Two partial writes wait for the old page; between them the page was written and went to the
    disk. The first read, which the disk had answered before all that, arrives last but one."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"a" * 8192)
        await fs.fsync(ino)
        state = fs.core.table.get(ino)
        reads: list[trio.Event] = []
        read = device.read

        async def slow(offset_bytes: int, length_bytes: int) -> bytes:
            data = await read(offset_bytes, length_bytes)
            event = trio.Event()
            reads.append(event)
            await event.wait()
            return data

        device.read = slow  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.write, ino, 10, b"1")
            await trio.testing.wait_all_tasks_blocked()
            await fs.write(ino, 0, b"b" * 4096)
            await fs.core.pages.flush(state)
            nursery.start_soon(fs.write, ino, 20, b"2")
            await trio.testing.wait_all_tasks_blocked()
            assert len(reads) == 2
            reads[0].set()
            await trio.testing.wait_all_tasks_blocked()
            device.read = read  # type: ignore[method-assign]
            for event in reads:
                event.set()
        expected = bytearray(b"b" * 4096)
        expected[10:11], expected[20:21] = b"1", b"2"
        assert await fs.read(ino, 0, 4096) == expected


async def test_losses_are_what_nothing_has_made_durable() -> None:
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        assert await fs.query("losses", {}) == {"files": [], "metadata_blocks": 0}
        ino = await make_file(fs, b"f", b"a" * 10_000)
        lost = await fs.query("losses", {})
        assert lost["files"] == [{"ino": ino, "bytes": 12_288}]
        assert lost["metadata_blocks"] > 0
        await fs.fsync(ino)
        assert await fs.query("losses", {}) == {"files": [], "metadata_blocks": 0}


async def test_the_logs_of_new_journals_are_cleared() -> None:
    """Nothing of an earlier file system is left in them, also in one that a mount adds."""
    device = await make_device(32)
    old = b"\xff" * BLOCK_BYTES
    for block in range(device.size_bytes // BLOCK_BYTES):
        await device.write(block * BLOCK_BYTES, old)
    whole = plan(device.size_bytes // BLOCK_BYTES, Choices(bytes(16), bytes(16), 1, journals=1))
    await write_plan(device, whole)
    async with mounted(device) as fs:
        while len(places := (await fs.core.slots()).journals) < 2:
            await trio.testing.wait_all_tasks_blocked()
    for first, blocks in places:
        start, size = first + LOG_OFFSET, blocks - LOG_OFFSET
        log = await device.read(start * BLOCK_BYTES, size * BLOCK_BYTES)
        assert old not in log
    await fsck(device)
