"""Requests that end or are overtaken half-way: the kernel believes nothing that is not so."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator, Callable

import pytest
import trio

from cfs.attributes import FLAG_IMMUTABLE, SetAttributes
from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.interrupt_io import RequestWaits
from cfs.fuse.kernel_cache import KernelInode
from cfs.fuse.kernel_cache_io import KernelCaches
from cfs.fuse.layout import CREATE_IN, FALLOCATE_IN
from cfs.operations.base_io import Handle
from cfs.operations.extension_io import Later
from cfs.operations.handlers_io import CfsOperations
from cfs.range_calls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE
from cfs.transaction import NotNow
from dlm.cache import Glock
from native.requests import (
    WRITE_CACHE,
    WRITE_KILL_SUIDGID,
    WRITE_LOCKOWNER,
    Opcode,
    Request,
)
from tests.cfs.harness import make_device, mounted
from tests.cfs.test_operations import make_file, refused

pytestmark = pytest.mark.trio


class Table:
    def add(self, node: int) -> int:
        return 0

    def remove(self, slot: int) -> None:
        """Nothing is kept."""


class Caches(KernelCaches):
    """What is taken back from a kernel that is not there."""

    def __init__(self, root: int) -> None:
        super().__init__(Table(), root)
        self.dropped: list[int] = []
        self.distrusted = 0

    def distrust(self) -> None:
        self.distrusted += 1

    async def drop_all_pages(self, number: int) -> None:
        self.dropped.append(number)


@pytest.fixture
async def operations() -> AsyncIterator[CfsOperations]:
    async with mounted(await make_device()) as fs:
        yield CfsOperations(fs, Caches(fs.root_ino), RequestWaits())


async def opened(operations: CfsOperations, ino: int, flags: int) -> Handle:
    made = await operations.fs.getattr(ino)
    inode = operations.caches.know(ino, made.generation, directory=False)
    return await operations.open_handle(inode, flags)


async def killed(*_: object, **__: object) -> None:
    raise FsError(errno.EINTR)


def not_now(*_: object) -> Handle:
    raise NotNow


def request(opcode: Opcode, inode: int) -> Request:
    return Request(1, inode, 0, 0, 0, opcode, 0, 0, 0, 0, 0, os.getpid())


async def test_an_open_that_truncates_waits_for_no_lock_afterwards(
    operations: CfsOperations,
) -> None:
    fs = operations.fs
    ino = await make_file(fs, b"f", b"x" * 9000)
    made = await fs.getattr(ino)
    inode = operations.caches.know(ino, made.generation, directory=False)
    operations._start_shared_writing = killed  # type: ignore[method-assign, assignment]
    handle = await operations.open_handle(inode, os.O_RDWR | os.O_TRUNC)
    assert (await fs.getattr(ino)).size == 0
    assert inode.writers == 1
    operations._close(handle.number)
    with refused(errno.EINTR):
        await operations.open_handle(inode, os.O_RDWR)
    assert (inode.writers, inode.handles, fs.core.state(ino).open_count) == (0, 0, 0)


async def test_a_file_that_was_made_and_not_opened_is_seen(
    operations: CfsOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = operations.fs
    await make_file(fs, b"before")
    monkeypatch.setattr(operations, "try_open_handle", not_now)
    operations.open_handle = killed  # type: ignore[method-assign, assignment]
    body = CREATE_IN.pack(os.O_RDWR | os.O_CREAT, 0o644, 0, 0) + b"f\0"
    create = request(Opcode.CREATE, fs.root_ino)
    with pytest.raises(Later) as later:
        operations._try_create(create, body)
    with refused(errno.EINTR):
        await later.value.handle(create, body)
    await fs.lookup(fs.root_ino, b"f")
    caches = operations.caches
    assert isinstance(caches, Caches)
    assert caches.distrusted == 1


@pytest.mark.parametrize("mode", [0, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE])
async def test_what_may_be_zero_by_now_is_dropped(operations: CfsOperations, mode: int) -> None:
    fs = operations.fs
    ino = await make_file(fs, b"f", b"x" * 9000)
    handle = await opened(operations, ino, os.O_WRONLY)
    fs.fallocate = killed  # type: ignore[method-assign, assignment]
    body = FALLOCATE_IN.pack(handle.number, 0, 9000, mode, 0)
    with refused(errno.EINTR):
        await operations._fallocate(request(Opcode.FALLOCATE, ino), body)
    caches = operations.caches
    assert isinstance(caches, Caches)
    assert caches.dropped == ([ino] if mode else [])
    operations._close(handle.number)


async def test_what_may_be_copied_in_part_is_dropped(operations: CfsOperations) -> None:
    fs = operations.fs
    ino = await make_file(fs, b"f", b"x" * 9000)
    handle = await opened(operations, ino, os.O_WRONLY)
    fs.copy_range = killed  # type: ignore[method-assign, assignment]
    body = layout.COPY_IN.pack(handle.number, 0, 0, handle.number, 9000, 9000, 0)
    with refused(errno.EINTR):
        await operations._copy(request(Opcode.COPY_FILE_RANGE, ino), body)
    caches = operations.caches
    assert isinstance(caches, Caches)
    assert caches.dropped == [ino]
    operations._close(handle.number)


async def test_a_page_of_a_hole_has_its_block_if_a_shared_writer_came_while_it_was_read(
    operations: CfsOperations,
) -> None:
    fs = operations.fs
    ino = await make_file(fs, b"f")
    await fs.setattr(ino, SetAttributes(size=1 << 20))
    handle = await opened(operations, ino, os.O_RDONLY)
    read_held, reads, go_on = fs.read_held, trio.Event(), trio.Event()

    async def slow(*what: int) -> bytes:
        reads.set()
        await go_on.wait()
        return await read_held(*what)

    fs.read_held = slow  # type: ignore[method-assign, assignment]
    async with trio.open_nursery() as nursery:
        read = request(Opcode.READ, ino)
        nursery.start_soon(operations._read, handle, read, 0, 8192)
        await reads.wait()
        writer = await opened(operations, ino, os.O_RDWR)
        go_on.set()
    assert not await fs.has_holes_held(ino, 0, 8192)
    assert await fs.has_holes_held(ino, 0, 1 << 20)
    for each in (handle, writer):
        operations._close(each.number)


async def test_an_open_that_is_refused_at_last_keeps_no_lock(
    operations: CfsOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = operations.fs
    made = await fs.create(fs.root_ino, b"f", 0o644, 0, 0)
    inode = operations.caches.know(made.ino, made.generation, directory=False)
    monkeypatch.setattr("cfs.operations.base_io.HANDLES_MAX", 0)
    with refused(errno.ENFILE):
        operations.try_open_handle(inode, os.O_RDWR)
    state = fs.core.state(made.ino)
    assert (inode.writers, inode.handles, state.open_count) == (0, 0, 0)
    assert isinstance(state.lock, Glock)
    assert state.lock.describe()["holders"] == 0


async def test_a_refused_write_has_still_been_in_pages(operations: CfsOperations) -> None:
    """The kernel fills its pages before it asks: they are dropped when the lock goes."""
    fs = operations.fs
    ino = await make_file(fs, b"f", b"x" * 9000)
    handle = await opened(operations, ino, os.O_WRONLY)
    await fs.set_flags(ino, FLAG_IMMUTABLE, FLAG_IMMUTABLE)
    body = bytes(layout.WRITE_IN_BYTES) + b"y" * 10
    write = request(Opcode.WRITE, ino)._replace(handle=handle.number, offset=5000)
    with refused(errno.EPERM):
        operations._try_write(write, body)
    assert handle.inode.pages.overlaps(5000, 5010)
    assert handle.inode.write_number == 1


WAITING: dict[str, tuple[dict[str, int], Callable[[KernelInode], object]]] = {
    "laundered": ({"operation_flags": WRITE_CACHE}, lambda inode: None),
    "past the cache": ({"operation_flags": WRITE_LOCKOWNER}, lambda inode: None),
    "O_APPEND": ({"flags": os.O_APPEND}, lambda inode: None),
    "O_DSYNC": ({"flags": os.O_DSYNC}, lambda inode: None),
    "O_SYNC": ({"flags": os.O_SYNC}, lambda inode: None),
    "a revocation": ({}, lambda inode: setattr(inode, "revoking", 1)),
    "pages read after one": ({}, lambda inode: inode.filled.add(4096, 8192)),
    "set-user-id": ({"operation_flags": WRITE_KILL_SUIDGID}, lambda inode: None),
}


@pytest.mark.parametrize("why", WAITING)
async def test_a_write_that_needs_more_than_the_lock_is_not_done_at_once(
    operations: CfsOperations, why: str
) -> None:
    fs = operations.fs
    ino = await make_file(fs, b"f", b"x" * 9000)
    await fs.setattr(ino, SetAttributes(mode=0o4755))
    handle = await opened(operations, ino, os.O_WRONLY)
    fields, prepare = WAITING[why]
    body = bytes(layout.WRITE_IN_BYTES) + b"y" * 10
    write = request(Opcode.WRITE, ino)._replace(handle=handle.number, offset=5000)
    assert operations._try_write(write, body) == layout.WRITE_OUT.pack(10, 0)
    prepare(handle.inode)
    assert operations._try_write(write._replace(offset=6000, **fields), body) is None
    assert await fs.read(ino, 6000, 10) == b"x" * 10
    handle.inode.revoking = 0


async def test_a_listing_waits_only_so_long_for_what_it_does_not_need(
    operations: CfsOperations, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = operations.fs
    ino = await make_file(fs, b"f")
    monkeypatch.setattr(fs, "has_attributes", lambda _: False)
    monkeypatch.setattr(fs, "prefetch", never)
    found = await fs.readdir(fs.root_ino, 0, 10)
    assert ino in [item.ino for item in found]
    with trio.fail_after(60):
        await operations._prefetch(found, patient=True)


async def never(*_: object) -> None:
    await trio.sleep_forever()
