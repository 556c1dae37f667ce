"""Attempts that wait for nothing: done when all is here, without a trace when something is not."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from cfs.attributes import SetAttributes
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.transaction import NotNow
from tests.cfs.harness import QUIET, cluster, fsck, make_device, mounted, tree_of
from tests.cfs.test_model import attempt_write

pytestmark = pytest.mark.trio

ATTEMPTS: dict[str, Callable[[FileSystem, int], object]] = {
    "create": lambda fs, ino: fs.try_create(fs.root_ino, b"new", 0o644, 0, 0, 0),
    "mkdir": lambda fs, ino: fs.try_mkdir(fs.root_ino, b"new", 0o755, 0, 0, 0),
    "unlink": lambda fs, ino: fs.try_remove(fs.root_ino, b"f", directory=False),
    "rename": lambda fs, ino: fs.try_rename(fs.root_ino, b"f", fs.root_ino, b"g", 0),
    "setattr": lambda fs, ino: fs.try_setattr(ino, SetAttributes(mode=0o600)),
    "write": lambda fs, ino: attempt_write(fs, ino, 1, b"abc"),
}


@pytest.mark.parametrize("operation", ATTEMPTS)
async def test_what_is_here_is_changed_at_once(operation: str) -> None:
    device = await make_device()
    async with mounted(device) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        before = await tree_of(fs), await fs.getattr(made.ino)
        ATTEMPTS[operation](fs, made.ino)
        if operation == "setattr":
            assert (await fs.getattr(made.ino)).mode & 0o777 == 0o600
        else:
            assert await tree_of(fs) != before[0]
    await fsck(device)


@pytest.mark.parametrize("operation", ATTEMPTS)
async def test_nothing_is_done_when_another_node_has_the_locks(operation: str) -> None:
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        made = await one.create(one.root_ino, b"f", 0o644, 0, 0)
        await two.setattr(made.ino, SetAttributes(mode=0o644))
        await two.mkdir(two.root_ino, b"d", 0o755, 0, 0)
        with pytest.raises(NotNow):
            ATTEMPTS[operation](one, made.ino)
        assert await tree_of(one) == {b"/f": ("file", b""), b"/d": ("dir",)}
    await fsck(device)


@pytest.mark.parametrize("operation", ATTEMPTS)
async def test_nothing_is_done_when_blocks_are_not_here(operation: str) -> None:
    device = await make_device()
    async with mounted(device) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
    async with mounted(device, QUIET) as fs:
        with pytest.raises(NotNow):
            ATTEMPTS[operation](fs, made.ino)
        assert await tree_of(fs) == {b"/f": ("file", b"")}
    await fsck(device)


async def test_refusals_are_those_of_the_waiting_way() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        root = fs.root_ino
        await fs.create(root, b"f", 0o644, 0, 0)
        inner = await fs.mkdir(root, b"d", 0o755, 0, 0)
        await fs.create(inner.ino, b"x", 0o644, 0, 0)
        for number, attempt in (
            (errno.EEXIST, lambda: fs.try_create(root, b"f", 0o644, 0, 0, 0)),
            (errno.EEXIST, lambda: fs.try_mkdir(root, b"f", 0o755, 0, 0, 0)),
            (errno.ENOENT, lambda: fs.try_remove(root, b"none", directory=False)),
            (errno.EISDIR, lambda: fs.try_remove(root, b"d", directory=False)),
            (errno.ENOTDIR, lambda: fs.try_remove(root, b"f", directory=True)),
            (errno.ENOTEMPTY, lambda: fs.try_remove(root, b"d", directory=True)),
            (errno.ENOENT, lambda: fs.try_rename(root, b"none", root, b"g", 0)),
            (errno.ENAMETOOLONG, lambda: fs.try_create(root, b"x" * 256, 0o644, 0, 0, 0)),
        ):
            with pytest.raises(FsError, match=errno.errorcode[number]):
                attempt()
    await fsck(device)


async def test_nothing_is_done_that_others_could_not_learn_of() -> None:
    """Who has looked for space on all nodes is told before a map changes (lock `S`)."""
    device = await make_device(32)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        await one.create(one.root_ino, b"f", 0o644, 0, 0)
        await two.statfs()
        with pytest.raises(NotNow):
            ATTEMPTS["unlink"](one, 0)
        await one.unlink(one.root_ino, b"f")
        one.try_create(one.root_ino, b"g", 0o644, 0, 0, 0)
    await fsck(device)


async def test_a_transaction_does_not_outgrow_its_journal() -> None:
    """When the running transaction is full the commit comes first, and that is waited for."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device, QUIET) as fs:
        journal = fs.core.journal
        files = [
            (await fs.create(fs.root_ino, b"f%d" % number, 0o644, 0, 0)).ino
            for number in range(journal.log_blocks)
        ]
        await fs.sync()
        for ino in files:
            if journal.running_full:
                with pytest.raises(NotNow):
                    fs.try_setattr(ino, SetAttributes(mode=0o600))
            else:
                fs.try_setattr(ino, SetAttributes(mode=0o600))
        assert journal.running_full
        for ino in files:
            await fs.setattr(ino, SetAttributes(mode=0o600))
    await fsck(device)


@pytest.mark.parametrize("operation", ATTEMPTS)
async def test_nothing_is_done_on_a_mount_that_cannot_go_on(operation: str) -> None:
    device = await make_device()
    async with mounted(device, QUIET, unmount=False) as fs:
        made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
        before = await tree_of(fs), await fs.getattr(made.ino)
        fs.core.fail(OSError("the journal is gone"))
        with pytest.raises(NotNow):
            ATTEMPTS[operation](fs, made.ino)
        assert (await tree_of(fs), await fs.getattr(made.ino)) == before
        with pytest.raises(FsError, match="EIO"):
            await fs.setattr(made.ino, SetAttributes(mode=0o600))
