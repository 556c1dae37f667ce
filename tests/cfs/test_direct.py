"""Direct reads and writes that no task waits for: the same bytes and times as by the way that
waits, under the lock until the disk has answered."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing

from cfs.attributes import BLOCK_BYTES, SetAttributes
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.transaction import NotNow
from cluster.device import Buffer, Read, Written
from cluster.device_memory import MemoryDevice
from cluster.errors import DeviceError
from cluster.locks import Mode
from tests.cfs.harness import QUIET, cluster, fsck, make_device, mounted, tree_of

pytestmark = pytest.mark.trio
BLOCKS = 16


class SlowDisk:
    """Carries out and answers what was started when it is told to."""

    def __init__(self, below: MemoryDevice) -> None:
        self.below = below
        self.waiting: list[Callable[[], None]] = []

    def can_start(self) -> bool:
        return True

    def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None:
        self.waiting.append(lambda: self.below.start_read(offset_bytes, length_bytes, done))

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        kept = [(offset, bytes(data)) for offset, data in parts]
        self.waiting.append(lambda: self.below.start_write(kept, done))

    def go_on(self) -> None:
        self.waiting.pop(0)()


class Ends:
    """How requests ended."""

    def __init__(self) -> None:
        self.read: list[bytes] = []
        self.errors: list[Exception | None] = []

    def took(self, error: Exception | None, pieces: list[Buffer]) -> None:
        self.errors.append(error)
        self.read.append(b"".join(pieces))

    def wrote(self, error: Exception | None) -> None:
        self.errors.append(error)


async def make_file(fs: FileSystem, name: bytes = b"f") -> int:
    made = await fs.create(fs.root_ino, name, 0o644, 0, 0)
    await fs.write(made.ino, 0, b"old!" * (BLOCKS * BLOCK_BYTES // 4))
    await fs.fsync(made.ino, False)
    return made.ino


async def test_bytes_and_times_are_those_of_the_way_that_waits() -> None:
    """Also over a commit in between: an image on its way to the log is not changed in place."""
    device = await make_device()
    content = bytearray(b"old!" * (BLOCKS * BLOCK_BYTES // 4))
    async with mounted(device) as fs:
        ino = await make_file(fs)
        before = await fs.getattr(ino)
        ends = Ends()
        for number in range(24):
            block, count = number * 5 % BLOCKS, 1 + number % 3
            count = min(count, BLOCKS - block)
            data = bytearray(os.urandom(count * BLOCK_BYTES))
            fs.start_write(ino, block * BLOCK_BYTES, data, ends.wrote, kill=True)
            content[block * BLOCK_BYTES : (block + count) * BLOCK_BYTES] = data
            data[:] = bytes(len(data))  # it is the caller's again
            now = await fs.getattr(ino)
            assert now.mtime_ns > before.mtime_ns
            assert now.ctime_ns > before.ctime_ns
            assert now.change > before.change
            before = now
            if number % 7 == 3:
                await fs.fsync(ino, False)
            fs.start_read(ino, 0, BLOCKS * BLOCK_BYTES, ends.took)
            assert ends.read.pop() == content
        assert not any(ends.errors)
        await fs.sync()
    async with mounted(device) as fs:
        assert await fs.read(ino, 0, len(content)) == content
        assert await fs.getattr(ino) == before
    await fsck(device)


async def test_a_time_in_the_log_is_not_changed_afterwards() -> None:
    """A commit that is under way when the next write starts brings the older time."""
    device = await make_device()
    async with mounted(device, unmount=False) as fs:
        ino = await make_file(fs)
        fs.core.prompt = SlowDisk(device)
        state = fs.core.state(ino)
        fs.start_write(ino, 0, bytes(BLOCK_BYTES), Ends().wrote, kill=True)
        first = state.node
        assert fs.core.journal.running[ino] is first
        logged = await fs.getattr(ino)
        fs.core.journal.sealed, fs.core.journal.running = fs.core.journal.running, {}
        fs.start_write(ino, BLOCK_BYTES, bytes(BLOCK_BYTES), Ends().wrote, kill=True)
        assert first is not None
        assert (first.mtime_ns, first.counter) == (logged.mtime_ns, logged.change)
        assert fs.core.journal.running[ino] is state.node is not first


async def test_the_lock_stays_until_the_disk_has_answered() -> None:
    device = await make_device()
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        ino = await make_file(one)
        slow = one.core.prompt = SlowDisk(device)
        ends, seen = Ends(), []
        one.start_write(ino, 0, b"new!" * (BLOCK_BYTES // 4), ends.wrote, kill=True)

        async def other() -> None:
            seen.append(await two.read(ino, 0, 8))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            await trio.testing.wait_all_tasks_blocked()
            assert not seen
            slow.go_on()
            with trio.fail_after(60):
                while not seen:  # noqa: ASYNC110
                    await trio.sleep(0.001)
        assert seen == [b"new!new!"]
        assert ends.errors == [None]
        with pytest.raises(NotNow):  # the lock is elsewhere, or shared
            one.start_write(ino, 0, bytes(BLOCK_BYTES), ends.wrote, kill=True)
    await fsck(device)


async def test_a_truncation_waits_for_a_write_under_way() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)
        slow = fs.core.prompt = SlowDisk(device)
        fs.start_write(ino, 0, bytes(BLOCK_BYTES), Ends().wrote, kill=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.setattr, ino, SetAttributes(size=0))
            await trio.testing.wait_all_tasks_blocked()
            assert (await fs.getattr(ino)).size == BLOCKS * BLOCK_BYTES
            slow.go_on()
        assert (await fs.getattr(ino)).size == 0
    await fsck(device)


async def test_a_read_whose_blocks_went_is_to_be_read_again() -> None:
    """They may be another file's by the time they come."""
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)
        slow = fs.core.prompt = SlowDisk(device)
        ends = Ends()
        fs.start_read(ino, 0, BLOCK_BYTES, ends.took)
        await fs.setattr(ino, SetAttributes(size=0))
        slow.go_on()
        assert isinstance(ends.errors[0], NotNow)
        assert not fs.inode_lock(ino).demoting
    await fsck(device)


async def test_what_the_disk_refuses_is_told() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)

        class Broken(SlowDisk):
            def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None:
                done(DeviceError("broken"), [])

            def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
                done(DeviceError("broken"))

        fs.core.prompt = Broken(device)
        ends = Ends()
        written = fs.core.state(ino).written_at
        fs.start_read(ino, 0, BLOCK_BYTES, ends.took)
        fs.start_write(ino, 0, bytes(BLOCK_BYTES), ends.wrote, kill=True)
        for error in ends.errors:
            assert isinstance(error, FsError)
            assert error.errno == errno.EIO
        assert len(ends.errors) == 2
        assert fs.core.state(ino).written_at > written, "a part of it may have been written"
        assert fs.inode_lock(ino).try_hold(Mode.EX)
        fs.inode_lock(ino).release(Mode.EX)
    await fsck(device)


WAITING: dict[str, Callable[[FileSystem, int, Ends], None]] = {
    "ragged read": lambda fs, ino, ends: fs.start_read(ino, 1, BLOCK_BYTES, ends.took),
    "read at the end": lambda fs, ino, ends: fs.start_read(
        ino, (BLOCKS - 1) * BLOCK_BYTES, 2 * BLOCK_BYTES, ends.took
    ),
    "ragged write": lambda fs, ino, ends: fs.start_write(ino, 0, b"x" * 512, ends.wrote, kill=True),
    "longer file": lambda fs, ino, ends: fs.start_write(
        ino, BLOCKS * BLOCK_BYTES, bytes(BLOCK_BYTES), ends.wrote, kill=True
    ),
    "nothing": lambda fs, ino, ends: fs.start_write(ino, 0, b"", ends.wrote, kill=True),
}


@pytest.mark.parametrize("what", WAITING)
async def test_nothing_is_done_where_more_is_needed(what: str) -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)
        before = await tree_of(fs), await fs.getattr(ino)
        ends = Ends()
        with pytest.raises(NotNow):
            WAITING[what](fs, ino, ends)
        assert (await tree_of(fs), await fs.getattr(ino)) == before
        assert not ends.errors
    await fsck(device)


async def test_data_that_is_not_on_the_disk_yet_is_in_the_way() -> None:
    device = await make_device()
    async with mounted(device, QUIET) as fs:
        ino = await make_file(fs)
        await fs.write(ino, 0, b"newer")
        ends = Ends()
        with pytest.raises(NotNow):
            fs.start_read(ino, 0, BLOCK_BYTES, ends.took)
        with pytest.raises(NotNow):
            fs.start_write(ino, 0, bytes(BLOCK_BYTES), ends.wrote, kill=True)
        assert await fs.read(ino, 0, 8) == b"newerld!"
    await fsck(device)


async def test_privileges_and_flags_are_minded() -> None:
    """In place as well as by a transaction."""
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)
        ends = Ends()
        for _ in range(2):
            await fs.setattr(ino, SetAttributes(mode=0o4755))
            fs.start_write(ino, 0, bytes(BLOCK_BYTES), ends.wrote, kill=False)
            assert (await fs.getattr(ino)).mode & 0o7777 == 0o4755
            fs.start_write(ino, 0, bytes(BLOCK_BYTES), ends.wrote, kill=True)
            assert (await fs.getattr(ino)).mode & 0o7777 == 0o755
        await fs.setxattr(ino, b"security.capability", b"\1" * 20, 0)
        fs.start_write(ino, 0, bytes(BLOCK_BYTES), ends.wrote, kill=True)
        assert b"security.capability" not in await fs.listxattr(ino)
        assert not any(ends.errors)
    await fsck(device)


async def test_a_part_of_a_block_that_is_being_written_is_changed_after_that() -> None:
    """What was read before the write has landed would take it back."""
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)
        slow = fs.core.prompt = SlowDisk(device)
        ends = Ends()
        new = b"new!" * (BLOCK_BYTES // 4)
        fs.start_write(ino, 0, new, ends.wrote, kill=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.write, ino, 4, b"part")
            await trio.testing.wait_all_tasks_blocked()
            slow.go_on()
        assert ends.errors == [None]
        assert await fs.read(ino, 0, BLOCK_BYTES) == new[:4] + b"part" + new[8:]
    await fsck(device)


async def test_a_page_is_not_written_beside_the_same_block() -> None:
    """A device may carry out writes of one block that are under way together in either order."""
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs)
        slow = fs.core.prompt = SlowDisk(device)
        fs.start_write(ino, 0, b"old." * (BLOCK_BYTES // 4), Ends().wrote, kill=True)
        new = b"new!" * (BLOCK_BYTES // 4)
        await fs.write(ino, 0, new)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.fsync, ino)
            await trio.testing.wait_all_tasks_blocked()
            slow.go_on()
        assert await fs.read(ino, 0, BLOCK_BYTES) == new
    async with mounted(device) as fs:
        assert await fs.read(ino, 0, BLOCK_BYTES) == new
    await fsck(device)


async def test_writes_of_one_block_go_one_after_another_and_wait_for_no_others() -> None:
    device = await make_device()
    async with mounted(device, QUIET) as fs:
        ino = await make_file(fs)
        await fs.write(ino, 5 * BLOCK_BYTES, b"page" * (BLOCK_BYTES // 4))
        slow = fs.core.prompt = SlowDisk(device)
        ends = Ends()
        block = bytes(BLOCK_BYTES)
        await fs.core.pages.flush(fs.core.state(ino))
        for number in (0, 8):
            fs.start_write(ino, number * BLOCK_BYTES, block, ends.wrote, kill=True)
        with pytest.raises(NotNow):
            fs.start_write(ino, 8 * BLOCK_BYTES, block, ends.wrote, kill=True)
        await fs.write(ino, 5 * BLOCK_BYTES, b"page" * (BLOCK_BYTES // 4))
        with trio.fail_after(60):
            await fs.write(ino, 5 * BLOCK_BYTES, block, direct=True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: fs.write(ino, 0, b"2nd!" * 1024, direct=True))
                await trio.testing.wait_all_tasks_blocked()
                assert not ends.errors
                slow.go_on()
        assert (await fs.read(ino, 0, 8)) == b"2nd!2nd!"
        slow.go_on()
        assert ends.errors == [None, None]
    await fsck(device)
