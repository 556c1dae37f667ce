"""Cuts of long files that end half-way: what was cut off is never seen again."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Awaitable, Callable

import pytest
import trio

from cfs.attributes import BLOCK_BYTES, SetAttributes
from cfs.errors import FsError
from cfs.files import CUT_EXTENTS_MAX
from cfs.filesystem import FileSystem
from tests.cfs.harness import cluster, fsck, make_device, mounted
from tests.cfs.test_operations import make_file

pytestmark = pytest.mark.trio
EXTENTS = 4 * CUT_EXTENTS_MAX
END = 2 * EXTENTS * BLOCK_BYTES

GROWTHS: dict[str, Callable[[FileSystem, int], Awaitable[object]]] = {
    "write": lambda fs, ino: fs.write(ino, END - 1, b"\0"),
    "truncate": lambda fs, ino: fs.setattr(ino, SetAttributes(size=END)),
    "fallocate": lambda fs, ino: fs.fallocate(ino, 0, 0, END),
}


async def scattered_file(fs: FileSystem) -> int:
    """A file of many extents, every other block a hole."""
    ino = await make_file(fs, b"f")
    for number in range(EXTENTS):
        await fs.write(ino, 2 * number * BLOCK_BYTES, b"old!" * (BLOCK_BYTES // 4))
    await fs.sync()
    return ino


@pytest.mark.parametrize("growth", GROWTHS)
async def test_a_cut_that_a_signal_ends_shows_nothing_old(growth: str) -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await scattered_file(fs)
        go_on = fs.inodes._cut_more

        def interrupted(*_: object) -> bool:
            raise FsError(errno.EINTR)

        fs.inodes._cut_more = interrupted  # type: ignore[method-assign]
        cut = await fs.setattr(ino, SetAttributes(size=0))
        assert cut.size == 0
        fs.inodes._cut_more = go_on  # type: ignore[method-assign]
        await GROWTHS[growth](fs, ino)
        assert await fs.read(ino, 0, END) == bytes(END)
    await fsck(device)


async def test_what_was_given_to_a_file_behind_such_a_cut_is_kept() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await scattered_file(fs)
        await fs.open_ref(ino)

        def interrupted(*_: object) -> bool:
            raise FsError(errno.EINTR)

        fs.inodes._cut_more = interrupted  # type: ignore[method-assign]
        await fs.setattr(ino, SetAttributes(size=0))
        await fs.write(ino, 4 * BLOCK_BYTES, b"new")
        fs.close_ref(ino)
        with trio.fail_after(60):
            while fs.orphans.holds(ino):  # noqa: ASYNC110
                await trio.sleep(0.001)
        assert await fs.read(ino, 0, END) == bytes(4 * BLOCK_BYTES) + b"new"
        assert (await fs.getattr(ino)).blocks == 8
    await fsck(device)


@pytest.mark.parametrize("growth", GROWTHS)
async def test_a_cut_that_a_crash_ends_shows_nothing_old(growth: str) -> None:
    """Whoever comes before the recovering mount has ended the cut."""
    device = await make_device()
    async with cluster(device) as group:
        one, two, three = [await group.mount(number) for number in (1, 2, 3)]
        ino = await scattered_file(one)

        async def cut() -> None:
            with contextlib.suppress(trio.Cancelled):
                await one.setattr(ino, SetAttributes(size=0))

        waits = trio.Event()
        run = one.core.run

        async def stopping(body: Callable[[object], object]) -> object:
            if one.orphans.holds(ino):
                waits.set()
                await trio.sleep_forever()
            return await run(body)  # type: ignore[arg-type]

        one.core.run = stopping  # type: ignore[method-assign, assignment]
        group.nursery.start_soon(cut)
        with trio.fail_after(60):
            await waits.wait()
        await one.core.journal.commit()
        two.orphans.reap_soon = lambda ino: None  # type: ignore[method-assign]
        group.kill(1)
        await group.recover(1)
        assert two.orphans.holds(ino)
        await GROWTHS[growth](three, ino)
        assert await three.read(ino, 0, END) == bytes(END)
        del two.orphans.reap_soon
        two.orphans.reap_all()
        with trio.fail_after(60):
            while two.orphans.holds(ino):  # noqa: ASYNC110
                await trio.sleep(0.001)
    await fsck(device)
