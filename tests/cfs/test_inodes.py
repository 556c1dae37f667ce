"""What is neither data nor plain names: exchange, nameless files, access lists, flags, times."""

from __future__ import annotations

import errno
import stat
import struct

import pytest
import trio
import trio.testing

from cfs import acl
from cfs.acl import GROUP, GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, Entry
from cfs.attributes import (
    FLAG_APPEND,
    FLAG_IMMUTABLE,
    FLAG_NOATIME,
    NOW,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    MountOptions,
    SetAttributes,
)
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.xattr import ACCESS_ACL, CAPABILITY, DEFAULT_ACL
from cluster.locks import Mode
from tests.cfs.harness import Clock, cluster, fsck, make_device, mounted

pytestmark = pytest.mark.trio


def refused(number: int):
    return pytest.raises(FsError, match=errno.errorcode[number])


async def make(fs: FileSystem, name: bytes, parent: int = 0) -> int:
    return (await fs.create(parent or fs.root_ino, name, 0o644, 0, 0)).ino


# -- two lives of one number ------------------------------------------------------------------


async def test_a_change_or_link_is_of_the_inode_that_is_meant() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        earlier = made.generation - 1
        meant = SetAttributes(mode=0o777, generation=earlier)
        for refusal in (
            lambda: fs.setattr(made.ino, meant),
            lambda: fs.setattr(made.ino, SetAttributes(size=5, generation=earlier)),
            lambda: fs.link(made.ino, fs.root_ino, b"g", generation=earlier),
        ):
            with refused(errno.ESTALE):
                await refusal()
        with refused(errno.ESTALE):
            fs.try_setattr(made.ino, meant)
        assert await fs.getattr(made.ino) == made
        await fs.setattr(made.ino, SetAttributes(size=5, generation=made.generation))
        await fs.link(made.ino, fs.root_ino, b"g", generation=made.generation)
    await fsck(device)


# -- exchange ----------------------------------------------------------------------------------


async def test_exchange_of_a_file_and_a_directory_keeps_counts_and_parents() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        one = (await fs.mkdir(root, b"one", 0o755, 0, 0)).ino
        two = (await fs.mkdir(root, b"two", 0o755, 0, 0)).ino
        file = await make(fs, b"file", one)
        inner = (await fs.mkdir(two, b"inner", 0o755, 0, 0)).ino
        await fs.rename(one, b"file", two, b"inner", RENAME_EXCHANGE)
        assert (await fs.lookup(one, b"file")).ino == inner
        assert (await fs.lookup(two, b"inner")).ino == file
        assert (await fs.lookup(inner, b"..")).ino == one
        assert [(await fs.getattr(d)).nlink for d in (one, two)] == [3, 2]
        with refused(errno.EINVAL):
            await fs.rename(root, b"one", one, b"file", RENAME_EXCHANGE)
        with refused(errno.EINVAL):
            await fs.rename(one, b"file", root, b"one", RENAME_EXCHANGE)
        with refused(errno.ENOENT):
            await fs.rename(root, b"one", root, b"three", RENAME_EXCHANGE)
        with refused(errno.EINVAL):
            await fs.rename(root, b"one", root, b"two", RENAME_EXCHANGE | RENAME_NOREPLACE)
        await fs.rename(root, b"one", root, b"two", RENAME_EXCHANGE)
        assert (await fs.lookup(root, b"one")).ino == two
    await fsck(device)


async def test_crossing_exchanges_of_two_mounts_never_lose_a_name() -> None:
    device = await make_device()
    async with cluster(device) as world:
        mounts = [await world.mount(1), await world.mount(2)]
        root = mounts[0].root_ino
        dirs = [(await mounts[0].mkdir(root, b"d%d" % n, 0o755, 0, 0)).ino for n in (0, 1)]
        inside = [(await mounts[0].mkdir(d, b"x", 0o755, 0, 0)).ino for d in dirs]

        async def swap(fs: FileSystem, first: int, second: int) -> None:
            for _ in range(40):
                await fs.rename(first, b"x", second, b"x", RENAME_EXCHANGE)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(swap, mounts[0], *dirs)
                nursery.start_soon(swap, mounts[1], *reversed(dirs))
        for fs in mounts:
            found = [(await fs.lookup(d, b"x")).ino for d in dirs]
            assert found == inside  # 80 exchanges
    await fsck(device)


# -- files without a name ------------------------------------------------------------------------


async def test_a_nameless_file_goes_with_its_last_handle_or_gets_a_name() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        free = (await fs.statfs()).free_blocks
        made = await fs.tmpfile(root, 0o666, 7, 8, 0o022)
        assert (made.nlink, made.mode, made.uid) == (0, stat.S_IFREG | 0o644, 7)
        await fs.write(made.ino, 0, b"x" * 50_000)
        fs.close_ref(made.ino)
        await trio.testing.wait_all_tasks_blocked()
        await fs.tick(checkpoint=True)
        assert (await fs.statfs()).free_blocks == free
        with refused(errno.ESTALE):
            await fs.getattr(made.ino)

        named = await fs.tmpfile(root, 0o600, 0, 0)
        await fs.write(named.ino, 0, b"kept")
        assert (await fs.link(named.ino, root, b"name")).nlink == 1
        assert named.ino not in fs.orphans.where
        fs.close_ref(named.ino)
        await trio.testing.wait_all_tasks_blocked()
        assert await fs.read((await fs.lookup(root, b"name")).ino, 0, 10) == b"kept"
        assert not fs.orphans.where
        await fs.open_ref(named.ino)
        await fs.unlink(root, b"name")
        with refused(errno.ENOENT):
            await fs.link(named.ino, root, b"again")
        fs.close_ref(named.ino)

        secret = await fs.tmpfile(root, 0o600, 0, 0, linkable=False)
        with refused(errno.ENOENT):
            await fs.link(secret.ino, root, b"secret")
        fs.close_ref(secret.ino)
        await trio.testing.wait_all_tasks_blocked()
    await fsck(device)


async def test_a_nameless_file_of_a_dead_mount_is_freed() -> None:
    device = await make_device()
    async with mounted(device, unmount=False) as fs:
        made = await fs.tmpfile(fs.root_ino, 0o600, 0, 0)
        await fs.write(made.ino, 0, b"x" * 50_000)
        await fs.sync()
    async with mounted(device) as fs:
        await trio.testing.wait_all_tasks_blocked()
        with refused(errno.ESTALE):
            await fs.getattr(made.ino)
        assert not fs.orphans.where
    await fsck(device)


# -- access control lists ------------------------------------------------------------------------


def acl_bytes(*entries: tuple[int, int] | tuple[int, int, int]) -> bytes:
    return acl.encode([Entry(*entry) for entry in entries])


LIST = acl_bytes((USER_OBJ, 7), (USER, 5, 1000), (GROUP_OBJ, 4), (MASK, 6), (OTHER, 1))


async def test_an_access_list_and_the_mode_agree() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make(fs, b"f")
        await fs.setattr(ino, SetAttributes(mode=0o6644))
        await fs.setxattr(ino, ACCESS_ACL, LIST)
        assert (await fs.getattr(ino)).mode & 0o7777 == 0o6761
        assert await fs.getxattr(ino, ACCESS_ACL) == LIST
        await fs.setxattr(ino, ACCESS_ACL, LIST, kill_group_id=True)
        assert (await fs.getattr(ino)).mode & 0o7777 == 0o4761
        await fs.setattr(ino, SetAttributes(mode=0o640))
        changed = acl_bytes((USER_OBJ, 6), (USER, 5, 1000), (GROUP_OBJ, 4), (MASK, 4), (OTHER, 0))
        assert await fs.getxattr(ino, ACCESS_ACL) == changed
        await fs.setxattr(ino, ACCESS_ACL, acl_bytes((USER_OBJ, 7), (GROUP_OBJ, 1), (OTHER, 0)))
        assert (await fs.getattr(ino)).mode & 0o7777 == 0o710
        with refused(errno.ENODATA):
            await fs.getxattr(ino, ACCESS_ACL)
        with refused(errno.EACCES):
            await fs.setxattr(ino, DEFAULT_ACL, LIST)
    await fsck(device)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        struct.pack("<I", 1),
        LIST[:-1],
        acl_bytes((USER_OBJ, 7), (GROUP_OBJ, 7)),
        acl_bytes((USER_OBJ, 7), (USER, 7, 1), (GROUP_OBJ, 7), (OTHER, 7)),
        acl_bytes((USER_OBJ, 8), (GROUP_OBJ, 7), (OTHER, 7)),
        acl_bytes((GROUP_OBJ, 7), (USER_OBJ, 7), (OTHER, 7)),
        acl_bytes((USER_OBJ, 7), (USER_OBJ, 7), (GROUP_OBJ, 7), (OTHER, 7)),
        acl_bytes((USER_OBJ, 7), (GROUP_OBJ, 7), (OTHER, 7), (64, 7)),
    ],
)
async def test_a_list_that_makes_no_sense_is_refused(value: bytes) -> None:
    device = await make_device()
    async with mounted(device) as fs:
        with refused(errno.EINVAL):
            await fs.setxattr(await make(fs, b"f"), ACCESS_ACL, value)


async def test_a_default_list_is_handed_down() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        top = (await fs.mkdir(root, b"top", 0o2755, 0, 50)).ino
        default = acl_bytes(
            (USER_OBJ, 7), (USER, 7, 9), (GROUP_OBJ, 5), (GROUP, 6, 10), (MASK, 7), (OTHER, 4)
        )
        await fs.setxattr(top, DEFAULT_ACL, default)
        file = await fs.create(top, b"f", 0o660, 3, 4, 0o077)
        assert (file.mode & 0o7777, file.gid) == (0o660, 50)
        given = acl.parse(await fs.getxattr(file.ino, ACCESS_ACL))
        assert {(e.tag, e.permissions) for e in given} == {
            (USER_OBJ, 6), (USER, 7), (GROUP_OBJ, 5), (GROUP, 6), (MASK, 6), (OTHER, 0)
        }  # fmt: skip
        with refused(errno.ENODATA):
            await fs.getxattr(file.ino, DEFAULT_ACL)
        below = await fs.mkdir(top, b"d", 0o777, 3, 4, 0o077)
        assert (below.mode & 0o7777, below.gid) == (0o2774, 50)
        assert await fs.getxattr(below.ino, DEFAULT_ACL) == default
        nameless = await fs.tmpfile(below.ino, 0o600, 3, 4, 0o077)
        assert nameless.mode & 0o7777 == 0o600
        assert await fs.getxattr(nameless.ino, ACCESS_ACL)
        fs.close_ref(nameless.ino)
        link = await fs.symlink(top, b"l", b"target", 3, 4)
        assert link.mode == stat.S_IFLNK | 0o777
        assert await fs.listxattr(link.ino) == []
        await fs.setxattr(top, DEFAULT_ACL, acl_bytes((USER_OBJ, 6), (GROUP_OBJ, 4), (OTHER, 2)))
        plain = await fs.create(top, b"plain", 0o777, 3, 4, 0o777)
        assert plain.mode & 0o7777 == 0o642
        assert await fs.listxattr(plain.ino) == []
        await fs.removexattr(top, DEFAULT_ACL)
        masked = await fs.create(top, b"masked", 0o666, 3, 4, 0o027)
        assert masked.mode & 0o7777 == 0o640
    await fsck(device)


async def test_a_damaged_list_is_an_error_of_what_needs_it_alone() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        top = (await fs.mkdir(fs.root_ino, b"top", 0o755, 0, 0)).ino
        state = fs.core.state(top)
        for name in (ACCESS_ACL, DEFAULT_ACL):
            await fs.inodes._change(state, lambda editor, n=name: editor.set(n, b"rubbish"))
        with refused(errno.EIO):
            await fs.create(top, b"f", 0o644, 0, 0)
        with refused(errno.EIO):
            await fs.setattr(top, SetAttributes(mode=0o700))
        assert fs.damage_met
        await fs.setxattr(top, DEFAULT_ACL, acl_bytes((USER_OBJ, 7), (GROUP_OBJ, 5), (OTHER, 5)))
        await fs.create(top, b"f", 0o644, 0, 0)


# -- privileges, flags -----------------------------------------------------------------------


async def test_who_may_not_keep_privileges_takes_them_away() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make(fs, b"f")

        async def arm(mode: int = 0o6775) -> None:
            await fs.setattr(ino, SetAttributes(mode=mode))
            await fs.setxattr(ino, CAPABILITY, b"cap")

        async def left() -> tuple[int, int]:
            return (await fs.getattr(ino)).mode & 0o7000, len(await fs.listxattr(ino))

        await arm()
        await fs.write(ino, 0, b"x", kill=False)
        assert await left() == (0o6000, 0)
        await arm()
        await fs.write(ino, 0, b"x")
        assert await left() == (0, 0)
        await arm(0o6765)
        await fs.write(ino, 0, b"x")
        assert await left() == (0o2000, 0)  # not executable for the group: mandatory locking once
        await arm()
        await fs.setattr(ino, SetAttributes(size=0, kill_privileges=False))
        assert await left() == (0o6000, 0)
        await arm()
        await fs.setattr(ino, SetAttributes(size=10))
        assert await left() == (0, 0)
        await arm()
        await fs.setattr(ino, SetAttributes(uid=5))
        assert await left() == (0, 0)
        await fs.write(ino, 0, bytes(8192))
        await arm()
        await fs.write(ino, 0, bytes(4096), direct=True)
        assert await left() == (0, 0)
    await fsck(device)


async def protected_place(fs: FileSystem, flag: int) -> tuple[int, int, int]:
    """A file "f", a directory "d" with "inside", both with the flag, and a free file "other"."""
    root = fs.root_ino
    file, other = await make(fs, b"f"), await make(fs, b"other")
    await fs.write(file, 0, b"data")
    place = (await fs.mkdir(root, b"d", 0o755, 0, 0)).ino
    await make(fs, b"inside", place)
    for ino in (file, place):
        await fs.set_flags(ino, flag, flag)
    return file, place, other


@pytest.mark.parametrize("flag", [FLAG_IMMUTABLE, FLAG_APPEND])
async def test_immutable_and_append_only_forbid_it_to_everybody(flag: int) -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        file, place, other = await protected_place(fs, flag)
        forbidden = [
            lambda: fs.setattr(file, SetAttributes(size=0)),
            lambda: fs.rename(root, b"other", root, b"f"),
            lambda: fs.unlink(root, b"f"),
            lambda: fs.link(file, root, b"linked"),
            lambda: fs.rmdir(root, b"d"),
            lambda: fs.unlink(place, b"inside"),
            lambda: fs.rename(place, b"inside", root, b"out"),
            lambda: fs.rename(place, b"inside", place, b"renamed"),
            lambda: fs.rename(root, b"other", place, b"inside"),
        ]
        for name, ino in ((b"f", file), (b"d", place)):
            forbidden += [
                lambda ino=ino: fs.setattr(ino, SetAttributes(mode=0o600)),
                lambda ino=ino: fs.setattr(ino, SetAttributes(uid=5)),
                lambda ino=ino: fs.setattr(ino, SetAttributes(atime_ns=5)),
                lambda ino=ino: fs.setxattr(ino, b"user.a", b""),
                lambda ino=ino: fs.setxattr(ino, ACCESS_ACL, LIST),
                lambda name=name: fs.rename(root, name, root, b"moved"),
                lambda name=name: fs.rename(root, b"other", root, name, RENAME_EXCHANGE),
            ]
        additions = [
            lambda: fs.create(place, b"new", 0o644, 0, 0),
            lambda: fs.mkdir(place, b"sub", 0o755, 0, 0),
            lambda: fs.symlink(place, b"link", b"x", 0, 0),
            lambda: fs.tmpfile(place, 0o644, 0, 0),
            lambda: fs.link(other, place, b"linked"),
            lambda: fs.write(file, 4, b"more"),
            lambda: fs.setattr(file, SetAttributes(mtime_ns=NOW)),
            lambda: fs.rename(root, b"other", place, b"other"),
        ]
        for call in forbidden + (additions if flag == FLAG_IMMUTABLE else []):
            with refused(errno.EPERM):
                await call()
        assert await fs.read(file, 0, 10) == b"data"
        if flag == FLAG_APPEND:
            for call in additions:
                await call()
            assert await fs.read(file, 0, 10) == b"datamore"
        for ino in (file, place):
            await fs.set_flags(ino, 0, flag)
            await fs.setattr(ino, SetAttributes(mode=0o755))
        await fs.unlink(place, b"inside")
        await fs.unlink(root, b"f")
        for made in list(fs.orphans.where):
            fs.close_ref(made)
        await trio.testing.wait_all_tasks_blocked()
    await fsck(device)


async def test_laundered_pages_of_an_immutable_file_are_kept() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make(fs, b"f")
        await fs.setattr(ino, SetAttributes(size=4, mode=0o4755))
        await fs.set_flags(ino, FLAG_IMMUTABLE, FLAG_IMMUTABLE)
        with refused(errno.EPERM):
            await fs.write(ino, 0, b"x", direct=True)
        state = fs.core.state(ino)
        await state.hold(Mode.EX)
        await fs.write_held(ino, 0, b"stored", laundered=True)
        state.release(Mode.EX)
        assert await fs.read(ino, 0, 10) == b"stor"
        assert (await fs.getattr(ino)).mode & 0o7777 == 0o4755
        with refused(errno.EOPNOTSUPP):
            await fs.set_flags(ino, 1, 1)
    await fsck(device)


# -- times ---------------------------------------------------------------------------------------


async def test_times_never_go_back_although_clocks_differ() -> None:
    device = await make_device()
    async with cluster(device) as world:
        fast, slow = Clock(), Clock()
        fast.now_ns += 500_000_000
        one, two = await world.mount(1, clock=fast), await world.mount(2, clock=slow)
        root = one.root_ino
        source = (await one.create(root, b"source", 0o644, 0, 0)).ino
        await one.write(source, 0, b"x")
        seen = await two.getattr(source)
        target = await two.create(root, b"target", 0o644, 0, 0)
        assert target.mtime_ns >= seen.mtime_ns  # make(1) finds it newer
        before = await two.getattr(root)
        await two.create(root, b"more", 0o644, 0, 0)
        assert (await two.getattr(root)).mtime_ns > before.mtime_ns
        await two.write(source, 1, b"y")
        assert (await one.getattr(source)).mtime_ns > seen.mtime_ns

        fast.now_ns += 3600 * 10**9  # a clock that is wrong by an hour is not followed
        lost = (await one.create(root, b"lost", 0o644, 0, 0)).ino
        ahead = await two.getattr(lost)
        normal = await two.create(root, b"normal", 0o644, 0, 0)
        assert normal.birth_ns < ahead.birth_ns - 3000 * 10**9
        await two.setattr(lost, SetAttributes(mode=0o600))
        assert (await two.getattr(lost)).ctime_ns > ahead.ctime_ns
    await fsck(device)


async def test_access_times_move_when_they_are_due() -> None:
    device = await make_device()
    options = MountOptions(background=False, access_times=True)
    async with mounted(device, options) as fs:
        ino = await make(fs, b"f")
        born = await fs.getattr(ino)

        async def read() -> int:
            await fs.read(ino, 0, 10)
            fs.accessed(ino)
            await trio.testing.wait_all_tasks_blocked()
            return (await fs.getattr(ino)).atime_ns

        first = await read()
        assert first > born.atime_ns
        assert await read() == first
        await fs.write(ino, 0, b"x")
        second = await read()
        assert second > (await fs.getattr(ino)).mtime_ns
        clock = fs.core.environment._clock  # type: ignore[attr-defined]
        clock.now_ns += 25 * 3600 * 10**9
        assert await read() > second
        await fs.setattr(ino, SetAttributes(atime_ns=1))
        await fs.set_flags(ino, FLAG_NOATIME, FLAG_NOATIME)
        assert await read() == 1
    await fsck(device)
