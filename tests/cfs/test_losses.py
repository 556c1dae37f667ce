"""Write-behind: how much, in which order, and what happens when the disk refuses data."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from cfs.attributes import BLOCK_BYTES, MountOptions, SetAttributes
from cfs.errors import FsError
from cfs.files import Files
from cfs.transaction import NotNow
from cluster.device import Buffer
from cluster.device_memory import MemoryDevice
from cluster.errors import DeviceError
from cluster.locks import Mode
from tests.cfs.harness import QUIET, cluster, fsck, make_device, mounted
from tests.cfs.test_operations import make_file, refused

BAD = b"BAD!"
pytestmark = pytest.mark.trio


class RefusingDevice(MemoryDevice):
    """Refuses to write blocks that begin with BAD while `refuses`."""

    refuses = True

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await super().write(offset_bytes, self._good(offset_bytes, data), fua=fua)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        for offset, data in parts:
            await self.write(offset, data, fua=fua)

    def _good(self, offset: int, data: Buffer) -> Buffer:
        view = memoryview(data)
        for at in range(0, len(view), BLOCK_BYTES):
            if self.refuses and view[at : at + 4] == BAD:
                raise DeviceError(f"block {(offset + at) // BLOCK_BYTES} is bad")
        return data


async def refusing_device() -> RefusingDevice:
    """A file system whose free blocks are full of what somebody else has left there."""
    plain = await make_device(16, group_blocks=512)
    async with mounted(plain) as fs:
        ino = await make_file(fs, b"old")
        await fs.write(ino, 0, b"S" * 6_000_000)
        await fs.sync()
        await fs.unlink(fs.root_ino, b"old")
    device = RefusingDevice(plain.size_bytes)
    device._current, device._durable = plain._current.copy(), plain._current.copy()
    return device


def blocks(*contents: bytes) -> bytes:
    return b"".join(content.ljust(BLOCK_BYTES, content[-1:]) for content in contents)


async def test_each_handle_hears_of_a_loss_once() -> None:
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"x" * 50_000)
        await fs.open_ref(ino)
        marks = [fs.error_mark(ino) for _ in range(3)]
        await fs.write(ino, 0, BAD * 2000)
        await fs.fsync(ino)
        for turn in (0, 1):
            for number, mark in enumerate(marks[:2]):
                found, marks[number] = fs.take_error(ino, mark)
                assert found == (0 if turn else errno.EIO)
        late = fs.error_mark(ino)
        assert fs.take_error(ino, late) == (0, late)
        await fs.write(ino, 0, BAD * 2000)
        await fs.sync()
        assert fs.take_error(ino, marks[2])[0] == errno.EIO  # two losses, told as one
        assert fs.take_error(ino, late)[0] == errno.EIO
        fs.close_ref(ino)
    await fsck(device)


async def test_a_loss_that_nobody_has_heard_of_is_told_to_the_next_handle() -> None:
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", BAD * 9000)
        await fs.sync()  # written by a handle that is closed by now
        mark = fs.error_mark(ino)
        assert fs.take_error(ino, mark)[0] == errno.EIO
        mark = fs.error_mark(ino)
        assert fs.take_error(ino, mark)[0] == 0


async def test_what_is_written_past_the_buffer_over_lost_pages_stays() -> None:
    """Their blocks become unwritten; that comes first."""
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        await fs.write(ino, 0, blocks(BAD, BAD))
        data = blocks(b"d", b"e")
        await fs.write(ino, 0, data, direct=True)
        assert await fs.read(ino, 0, 2 * BLOCK_BYTES) == data
        await trio.testing.wait_all_tasks_blocked()
        assert await fs.read(ino, 0, 2 * BLOCK_BYTES) == data
    async with mounted(device) as fs:
        assert await fs.read(ino, 0, 2 * BLOCK_BYTES) == data
    await fsck(device)


async def test_a_lost_page_is_zero_from_then_on() -> None:
    """Not only when its block has been made unwritten."""
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        await fs.write(ino, 0, blocks(b"a", BAD, b"b"))
        state = fs.core.state(ino)
        await fs.core.pages.flush(state)
        assert state.spoiled == {1}
        with pytest.raises(NotNow):
            fs.start_read(ino, BLOCK_BYTES, BLOCK_BYTES, lambda error, pieces: None)
        assert fs.try_read(ino, BLOCK_BYTES, BLOCK_BYTES) == bytes(BLOCK_BYTES)
        assert await fs.read(ino, 0, 8192) == blocks(b"a") + bytes(BLOCK_BYTES)
    await fsck(device)


@pytest.mark.parametrize("how", ["fsync", "commit", "timer", "demotion"])
async def test_only_refused_pages_are_lost_and_nothing_stale_shows(how: str) -> None:
    device = await refusing_device()
    async with cluster(device) as group:
        fs, other = await group.mount(1), await group.mount(2)
        ino = await make_file(fs, b"f")
        await fs.write(ino, 0, blocks(b"a", BAD, b"b", BAD, BAD, b"c", BAD))
        if how == "fsync":
            await fs.fsync(ino)
        elif how == "commit":
            await fs.core.journal.commit()
        elif how == "timer":
            await fs.tick(checkpoint=True)
        zero = bytes(BLOCK_BYTES)
        expected = blocks(b"a") + zero + blocks(b"b") + zero * 2 + blocks(b"c") + zero
        assert await other.read(ino, 0, 100_000) == expected
        assert await fs.read(ino, 0, 100_000) == expected
        told = group.members[1].fs.core.environment.told  # type: ignore[attr-defined]
        assert [block for block, _ in told] == [ino]
        # What is written there later is kept.
        device.refuses = False
        await fs.write(ino, 2 * BLOCK_BYTES, blocks(b"d", b"e"))
        await fs.fsync(ino)
        expected = expected[: 2 * BLOCK_BYTES] + blocks(b"d", b"e") + expected[4 * BLOCK_BYTES :]
        assert await other.read(ino, 0, 100_000) == expected
    await fsck(device)
    async with mounted(device) as fs:
        assert await fs.read(ino, 0, 100_000) == expected


async def test_a_full_volume_shows_nothing_stale_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no block is left for the tree, lost pages become zeroes instead of unwritten."""

    def full(*_arguments: object) -> None:
        raise FsError(errno.ENOSPC)

    monkeypatch.setattr(Files, "_isolate_body", full)
    device = await refusing_device()
    async with cluster(device) as group:
        fs, other = await group.mount(1), await group.mount(2)
        ino = await make_file(fs, b"f")
        await fs.write(ino, 0, blocks(b"a", BAD, b"b", BAD))
        zero = bytes(BLOCK_BYTES)
        assert await other.read(ino, 0, 100_000) == blocks(b"a") + zero + blocks(b"b") + zero
    await fsck(device)


async def test_an_overwrite_that_is_refused_leaves_what_was_there() -> None:
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", blocks(b"a", b"b", b"c"))
        await fs.fsync(ino)
        await fs.write(ino, BLOCK_BYTES, blocks(BAD))
        await fs.fsync(ino)
        assert await fs.read(ino, 0, 100_000) == blocks(b"a", b"b", b"c")
    await fsck(device)


async def test_what_a_failed_direct_write_has_written_is_flushed_before_the_lock_leaves() -> None:
    device = await refusing_device()
    async with cluster(device) as group:
        fs, other = await group.mount(1), await group.mount(2)
        ino = await make_file(fs, b"f", b"1" * BLOCK_BYTES)
        between = await make_file(fs, b"g")
        for number in range(1, 3):
            await fs.write(between, number * BLOCK_BYTES, b"2" * BLOCK_BYTES)
            await fs.write(ino, number * BLOCK_BYTES, b"1" * BLOCK_BYTES)
        await fs.sync()
        await fs.core.counter.flush()
        with refused(errno.EIO):
            await fs.write(ino, 0, blocks(b"3", b"3", BAD), direct=True)
        written = fs.core.counter.written
        assert not fs.core.counter.is_flushed(written)
        assert (await other.read(ino, 0, 1)) == b"3"
        assert fs.core.counter.is_flushed(written)
    await fsck(device)


async def test_synchronous_and_direct_writes_fail_themselves() -> None:
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", blocks(b"a", b"b"))
        await fs.fsync(ino)
        for sync, direct, offset in ((True, False, 0), (False, True, 0), (False, True, 20_480)):
            with refused(errno.EIO):
                await fs.write(ino, offset, blocks(BAD), sync=sync, direct=direct)
    await fsck(device)


async def test_dirty_data_is_bounded_and_writers_wait_in_turn() -> None:
    """With a disk that takes nothing: the bound holds; once it does, all go on in their order."""
    device = await make_device(32)
    gate = trio.Event()

    async def block(kind: str, offset: int, length: int) -> None:
        if kind == "write":
            await gate.wait()

    options = MountOptions(background=False, dirty_bytes_start=1 << 18, dirty_bytes_max=1 << 20)
    async with mounted(device, options) as fs:
        inos = [await make_file(fs, b"f%d" % number) for number in range(8)]
        await fs.sync()
        device.hook = block
        done: list[int] = []

        async def write(number: int) -> None:
            for step in range(20):
                await fs.write(inos[number], step * 65_536, b"x" * 65_536)
                assert fs.core.pages.dirty_bytes <= 1 << 20
            done.append(number)

        scope = trio.CancelScope()

        async def give_up() -> None:
            with scope:
                await fs.write(inos[0], 0, b"y" * 65_536)
                raise AssertionError("it was not held back")

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(write, number)
                if number == 3:
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.start_soon(give_up)
            await trio.testing.wait_all_tasks_blocked()
            assert not done
            assert (1 << 20) - 65_536 < fs.core.pages.dirty_bytes <= 1 << 20
            scope.cancel()  # one that gives up loses only its own place
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        assert sorted(done) == list(range(8))
        device.hook = None
        for ino in inos:
            assert await fs.read(ino, 0, 2 << 20) == b"x" * 1_310_720
        assert fs.core.pages._promised == 0
    await fsck(device)


async def test_one_write_larger_than_the_bound_is_taken() -> None:
    device = await make_device(32)
    options = MountOptions(background=False, dirty_bytes_start=1 << 16, dirty_bytes_max=1 << 18)
    async with mounted(device, options) as fs:
        ino = await make_file(fs, b"f")
        with trio.fail_after(60):
            for step in range(4):
                await fs.write(ino, step << 20, b"x" * (1 << 20))
        assert await fs.read(ino, 0, 4 << 20) == b"x" * (4 << 20)


async def test_sync_waits_for_what_is_on_its_way() -> None:
    """The write-behind task has taken the pages; sync must not flush before they are written."""
    device = await make_device(32)
    gate = trio.Event()
    data_offset = 0

    async def block(kind: str, offset: int, length: int) -> None:
        if kind == "write" and offset == data_offset:
            await gate.wait()

    async with mounted(device, unmount=False) as fs:
        ino = await make_file(fs, b"f", b"a" * 50_000)
        await fs.sync()
        data_offset = fs.reader.one_place(fs.core.state(ino), 0, BLOCK_BYTES)
        await fs.write(ino, 0, b"b" * 50_000)
        device.hook = block
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.core.pages.flush, fs.core.state(ino))
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(fs.sync)
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        device.hook = None
        device.crash()
    async with mounted(device) as fs:
        assert await fs.read(ino, 0, 50_000) == b"b" * 50_000


async def test_data_of_a_file_that_is_cut_is_not_missed() -> None:
    """Pages that were lost, then cut off: nothing is left to be isolated."""
    device = await refusing_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", blocks(b"a", BAD, BAD))
        state = fs.core.state(ino)
        await fs.core.pages.flush(state)
        assert state.spoiled == {1, 2}
        await state.hold(Mode.EX)
        try:
            await fs.setattr_held(ino, SetAttributes(size=BLOCK_BYTES))
        finally:
            state.release(Mode.EX)
        assert not state.spoiled
        await fs.write(ino, 0, blocks(b"x", b"y", b"z"))
        await fs.fsync(ino)
        assert await fs.read(ino, 0, 100_000) == blocks(b"x", b"y", b"z")
    await fsck(device)


async def test_losses_in_a_row_end_soon() -> None:
    """A disk that takes nothing is not asked for each of many pages."""
    device = await refusing_device()
    asked = 0

    async def refuse(kind: str, offset: int, length: int) -> None:
        nonlocal asked
        asked += kind == "write"
        raise DeviceError("no")

    async with mounted(device, QUIET, unmount=False) as fs:
        ino = await make_file(fs, b"f")
        await fs.sync()
        await fs.write(ino, 0, b"x" * (4 << 20))
        device.hook = refuse
        await fs.core.pages.flush(fs.core.state(ino))
        device.hook = None
        assert asked < 100
        assert fs.core.pages.dirty_bytes == 0
        await trio.testing.wait_all_tasks_blocked()
        assert await fs.read(ino, 0, 4 << 20) == bytes(4 << 20)  # not what was there before
