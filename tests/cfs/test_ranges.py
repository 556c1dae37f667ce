"""fallocate, lseek, copy_file_range: against bytes, on two mounts, on a full disk, in crashes."""

from __future__ import annotations

import errno
import random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.attributes import BLOCK_BYTES, SetAttributes
from cfs.cache import InodeState
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.range_calls import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE
from tests.cfs.harness import cluster, fsck, make_device, mounted
from tests.cfs.test_crash import image
from tests.cfs.test_operations import make_file, refused

PUNCH = FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE
ZERO = FALLOC_ZERO_RANGE
pytestmark = pytest.mark.trio

offsets = st.one_of(st.integers(0, 60_000), st.integers(0, 15).map(lambda n: n * BLOCK_BYTES))
lengths = st.one_of(st.integers(1, 30_000), st.integers(1, 8).map(lambda n: n * BLOCK_BYTES))
steps = st.one_of(
    st.tuples(st.just("write"), st.booleans(), offsets, lengths),
    st.tuples(st.just("direct"), st.booleans(), offsets, lengths),
    st.tuples(st.just("launder"), st.booleans(), offsets),
    st.tuples(st.just("truncate"), st.booleans(), offsets),
    st.tuples(
        st.just("fallocate"), st.booleans(), st.sampled_from([0, 1, PUNCH, ZERO, ZERO | 1]),
        offsets, lengths,
    ),
    st.tuples(st.just("reserve"), st.booleans(), offsets, lengths),
    st.tuples(st.just("copy"), st.booleans(), offsets, st.booleans(), offsets, lengths),
    st.tuples(st.just("sync")),
    st.tuples(st.just("checkpoint")),
)  # fmt: skip


def pattern(offset: int, size: int) -> bytes:
    return bytes((offset * 7 + step) % 255 + 1 for step in range(size))


class Pair:
    """Two files, and what they must hold."""

    def __init__(self, inos: tuple[int, int]) -> None:
        self.inos = inos
        self.content = [bytearray(), bytearray()]

    def grow(self, which: bool, size: int) -> None:
        content = self.content[which]
        content.extend(bytes(max(size - len(content), 0)))

    async def do(self, fs: FileSystem, kind: str, which: bool, *how: int) -> None:
        await getattr(self, kind)(fs, which, *how)

    async def write(self, fs: FileSystem, which: bool, offset: int, size: int) -> None:
        await fs.write(self.inos[which], offset, pattern(offset, size))
        self.grow(which, offset + size)
        self.content[which][offset : offset + size] = pattern(offset, size)

    async def direct(self, fs: FileSystem, which: bool, offset: int, size: int) -> None:
        await fs.write(self.inos[which], offset, pattern(offset + 1, size), direct=True)
        self.grow(which, offset + size)
        self.content[which][offset : offset + size] = pattern(offset + 1, size)

    async def launder(self, fs: FileSystem, which: bool, offset: int) -> None:
        """The kernel writes a page of a mapping back."""
        offset -= offset % BLOCK_BYTES
        size = min(len(self.content[which]) - offset, BLOCK_BYTES)
        page = pattern(offset + 2, max(size, 0)).ljust(BLOCK_BYTES, b"!")
        state = fs.core.state(self.inos[which])
        await state.hold(5)  # type: ignore[arg-type]
        await fs.write_held(state.ino, offset, page, laundered=True)
        state.release(5)  # type: ignore[arg-type]
        if size > 0:
            self.content[which][offset : offset + size] = page[:size]

    async def truncate(self, fs: FileSystem, which: bool, size: int) -> None:
        await fs.setattr(self.inos[which], SetAttributes(size=size))
        self.grow(which, size)
        del self.content[which][size:]

    async def fallocate(
        self, fs: FileSystem, which: bool, mode: int, offset: int, size: int
    ) -> None:
        await fs.fallocate(self.inos[which], mode, offset, size)
        if not mode & FALLOC_KEEP_SIZE:
            self.grow(which, offset + size)
        if mode & (FALLOC_PUNCH_HOLE | FALLOC_ZERO_RANGE):
            end = min(offset + size, len(self.content[which]))
            self.content[which][offset:end] = bytes(max(end - offset, 0))
        if not mode & FALLOC_PUNCH_HOLE:
            await need_room(fs, self.inos[which], offset, offset + size)

    async def reserve(self, fs: FileSystem, which: bool, offset: int, size: int) -> None:
        state = fs.core.state(self.inos[which])
        await state.hold(5)  # type: ignore[arg-type]
        await fs.reserve_held(state.ino, offset, size)
        assert not await fs.has_holes_held(state.ino, offset, offset + size)
        state.release(5)  # type: ignore[arg-type]

    async def copy(
        self, fs: FileSystem, which: bool, offset: int, other: bool, to: int, size: int
    ) -> None:
        source, target = self.inos[which], self.inos[other]
        if source == target and abs(offset - to) < size:
            with refused(errno.EINVAL):
                await fs.copy_range(source, offset, target, to, size)
            return
        data = bytes(self.content[which][offset : offset + size])
        assert await fs.copy_range(source, offset, target, to, size) == len(data)
        if data:
            self.grow(other, to + len(data))
            self.content[other][to : to + len(data)] = data

    async def check(self, fs: FileSystem) -> None:
        for ino, content in zip(self.inos, self.content, strict=True):
            assert (await fs.getattr(ino)).size == len(content)
            assert await fs.read(ino, 0, len(content) + 10) == content
            await check_holes(fs, ino, content)


async def need_room(fs: FileSystem, ino: int, offset: int, end: int) -> None:
    """The range has blocks (or is in the inode)."""
    state: InodeState = fs.core.state(ino)
    await state.hold(3)  # type: ignore[arg-type]
    node = state.node
    if node is None or node.root is not None:
        blocks = await fs.core.see(lambda: fs.ranges._unreserved(state, offset, end - offset))
        assert blocks[0] == blocks[1]
    state.release(3)  # type: ignore[arg-type]


async def check_holes(fs: FileSystem, ino: int, content: bytes | bytearray) -> None:
    """What SEEK_HOLE and SEEK_DATA say covers the file without a gap; holes are zero."""
    at, size = 0, len(content)
    while at < size:
        hole = await fs.seek(ino, at, data=False)
        assert at <= hole <= size
        try:
            data = await fs.seek(ino, hole, data=True) if hole < size else size
        except FsError as error:
            assert error.errno == errno.ENXIO  # noqa: PT017
            data = size
        assert hole <= data <= size
        assert not any(content[hole:data])
        for probe in (hole - 1, data):
            if at <= probe < size:
                assert await fs.seek(ino, probe, data=True) == probe
        at = data
    for data_wanted in (False, True):
        with refused(errno.ENXIO):
            await fs.seek(ino, size, data=data_wanted)


@given(st.lists(steps, max_size=25), st.integers(0, 1 << 16))
@settings(max_examples=40, deadline=None)
async def test_ranges_are_those_of_bytes(plan: list[tuple[object, ...]], turns: int) -> None:
    """Each step by one of two mounts; both see the same afterwards."""
    device = await make_device(16, group_blocks=512)
    async with cluster(device) as group:
        mounts = [await group.mount(number) for number in (1, 2)]
        inos = [await make_file(mounts[0], name) for name in (b"a", b"b")]
        pair = Pair((inos[0], inos[1]))
        for number, step in enumerate(plan):
            fs = mounts[turns >> number % 16 & 1]
            if step[0] == "sync":
                await fs.sync()
            elif step[0] == "checkpoint":
                await fs.tick(checkpoint=True)
            else:
                await pair.do(fs, *step)  # type: ignore[arg-type]
        for fs in mounts:
            await pair.check(fs)
    await fsck(device)
    async with mounted(device) as fs:
        await pair.check(fs)


async def test_modes_that_do_not_exist_are_refused() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"x" * 10_000)
        for mode in (FALLOC_PUNCH_HOLE, 8, 8 | 1, 32, 64, PUNCH | ZERO, 4, 128):
            with refused(errno.EOPNOTSUPP):
                await fs.fallocate(ino, mode, 0, 4096)
        with refused(errno.EINVAL):
            await fs.fallocate(ino, 0, 0, 0)
        with refused(errno.EFBIG):
            await fs.fallocate(ino, 0, (1 << 63) - 10, 20)
        with refused(errno.EISDIR):
            await fs.fallocate(fs.root_ino, 0, 0, 4096)
        with refused(errno.EISDIR):
            await fs.seek(fs.root_ino, 0, data=True)
        assert await fs.read(ino, 0, 20_000) == b"x" * 10_000


async def test_a_large_allocation_writes_no_data() -> None:
    """8 GiB in one call: space for all of it, and next to nothing goes to the disk."""
    device = await make_device(9 << 10)
    written = 0

    async def count(kind: str, offset: int, length: int) -> None:
        nonlocal written
        written += length * (kind == "write")

    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        free = (await fs.statfs()).free_blocks
        device.hook = count
        await fs.fallocate(ino, 0, 0, 8 << 30)
        await fs.fsync(ino)
        device.hook = None
        assert written < 16 << 20
        seen = await fs.getattr(ino)
        assert (seen.size, seen.blocks) == (8 << 30, (8 << 30) // 512)
        assert free - (await fs.statfs()).free_blocks in range(2 << 20, (2 << 20) + 8)
        await fs.write(ino, 5 << 30, b"data")
        assert await fs.read(ino, (5 << 30) - 2, 8) == b"\0\0data\0\0"
        assert await fs.seek(ino, 0, data=True) == 5 << 30
        assert await fs.seek(ino, 5 << 30, data=False) == (5 << 30) + 4096
        with refused(errno.ENOSPC):
            await fs.fallocate(ino, 0, 0, 20 << 30)
        assert (await fs.getattr(ino)).blocks == seen.blocks
        await fs.fallocate(ino, PUNCH, 0, 8 << 30)
        assert (await fs.getattr(ino)).blocks == 0
        await fs.sync()
        assert (await fs.statfs()).free_blocks == free
    await fsck(device)


async def test_sparse_files_of_8_tebibytes() -> None:
    device = await make_device()
    end = 8 << 40
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        await fs.write(ino, end - 5, b"end!\n")
        await fs.write(ino, end // 2, b"middle")
        assert (await fs.getattr(ino)).size == end
        assert (await fs.getattr(ino)).blocks == 16
        assert await fs.seek(ino, 0, data=True) == end // 2
        assert await fs.seek(ino, end // 2 + 4096, data=True) == end - 4096
        assert await fs.read(ino, end - 10, 100) == bytes(5) + b"end!\n"
        other = await make_file(fs, b"g")
        await fs.setattr(other, SetAttributes(size=end))
        done = 0
        while done < end:
            step = await fs.copy_range(ino, done, other, done, end - done)
            assert step
            done += step
        assert (await fs.getattr(other)).blocks == 16
        assert await fs.read(other, end // 2, 6) == b"middle"
        await fs.fallocate(ino, PUNCH, 0, end - 4096)
        assert (await fs.getattr(ino)).blocks == 8
    await fsck(device)


async def test_blocks_beyond_the_end() -> None:
    """They are kept for appends, and go with the next truncate."""
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"x" * 5000)
        await fs.fallocate(ino, FALLOC_KEEP_SIZE, 0, 1 << 20)
        seen = await fs.getattr(ino)
        assert (seen.size, seen.blocks) == (5000, 2048)
        await fs.write(ino, 0, b"y" * 100_000, append=True)
        assert (await fs.getattr(ino)).blocks == 2048
        assert await fs.read(ino, 4998, 4) == b"xxyy"
        await fs.sync()
        await fsck(device)
        await fs.setattr(ino, SetAttributes(size=105_000))
        assert (await fs.getattr(ino)).blocks == 26 * 8
        await fs.setattr(ino, SetAttributes(size=200_000))
        assert await fs.read(ino, 104_999, 4) == b"y\0\0\0"
    await fsck(device)


async def test_small_files_stay_in_their_inode() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f", b"0123456789")
        await fs.fallocate(ino, 0, 0, 3000)
        await fs.fallocate(ino, PUNCH, 2, 3)
        await fs.fallocate(ino, ZERO, 8, 100)
        seen = await fs.getattr(ino)
        assert (seen.size, seen.blocks) == (3000, 0)
        assert await fs.read(ino, 0, 12) == b"01\0\0\x0056" + b"7" + bytes(4)
        assert await fs.seek(ino, 0, data=False) == 10
        await fs.fallocate(ino, 0, 0, 9000)
        assert (await fs.getattr(ino)).blocks == 24
        assert await fs.read(ino, 0, 12) == b"01\0\0\x0056" + b"7" + bytes(4)
    await fsck(device)


async def test_holes_are_copied_as_holes() -> None:
    device = await make_device()
    async with mounted(device) as fs:
        one = await make_file(fs, b"1", b"a" * 8192)
        await fs.write(one, 40_960, b"b" * 100)
        await fs.fallocate(one, 0, 8192, 16_384)
        two = await make_file(fs, b"2", b"c" * 60_000)
        assert await fs.copy_range(one, 0, two, 0, 1 << 40) == 41_060
        expected = b"a" * 8192 + bytes(32_768) + b"b" * 100 + b"c" * (60_000 - 41_060)
        assert await fs.read(two, 0, 70_000) == expected
        assert await fs.seek(two, 0, data=False) == 8192
        assert await fs.seek(two, 8192, data=True) == 40_960
        assert await fs.copy_range(one, 41_060, two, 0, 10) == 0
    await fsck(device)


async def test_copies_between_mounts_take_locks_in_one_order() -> None:
    """Copies in opposite directions at once end, and each is whole."""
    device = await make_device(32)
    async with cluster(device) as group:
        mounts = [await group.mount(number) for number in (1, 2)]
        a = await make_file(mounts[0], b"a", b"a" * 300_000)
        b = await make_file(mounts[0], b"b", b"b" * 300_000)

        async def copy(fs: FileSystem, source: int, target: int) -> None:
            for _ in range(40):
                assert await fs.copy_range(source, 0, target, 0, 300_000) == 300_000

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(copy, mounts[0], a, b)
                nursery.start_soon(copy, mounts[1], b, a)
        found = await mounts[0].read(a, 0, 300_000)
        assert found in (b"a" * 300_000, b"b" * 300_000)
        assert await mounts[1].read(b, 0, 300_000) == found
    await fsck(device)


@pytest.mark.parametrize("seed", range(2))
async def test_a_crash_never_shows_what_was_not_written(seed: int) -> None:
    """Blocks full of another file's bytes are allocated, written in part, zeroed and punched. After
    a crash at any point each sector of the file is zero or holds what was written to it."""
    rng = random.Random(seed)
    device = await make_device(8, group_blocks=512, log_writes=True)
    async with mounted(device) as fs:
        old = await make_file(fs, b"old")
        await fs.write(old, 0, b"S" * 3_000_000)
        await fs.sync()
        await fs.unlink(fs.root_ino, b"old")
        await fs.tick(checkpoint=True)
    begin = len(device.log)
    synced: list[tuple[int, int, bytes]] = []
    async with mounted(device, unmount=False) as fs:
        ino = await make_file(fs, b"f")
        await fs.fsync(ino)
        for number in range(60):
            mode = rng.choice([0, 0, 1, PUNCH, ZERO])
            first, count = rng.randrange(400), rng.randrange(1, 120)
            await fs.fallocate(ino, mode, first * 4096, count * 4096)
            at = rng.randrange(400)
            letter = bytes([97 + number % 26])
            await fs.write(ino, at * 4096, letter * 4096 * rng.randrange(1, 9))
            if rng.random() < 0.3:
                await fs.fsync(ino, datasync=rng.random() < 0.5)
                size = (await fs.getattr(ino)).size
                synced.append((len(device.log), size, await fs.read(ino, 0, size)))
    log = list(device.log)
    for count in rng.sample(range(begin, len(log) + 1), 20):
        crashed = image(device.size_bytes, log, count, random.Random(count))
        await fsck(crashed)
        async with mounted(crashed) as fs:
            try:
                found = (await fs.lookup(fs.root_ino, b"f")).ino
            except FsError:
                continue
            content = await fs.read(found, 0, 1 << 24)
            for sector in range(0, len(content), 512):
                letters = set(content[sector : sector + 512])
                assert len(letters) == 1
                assert letters != {ord("S")}, "stale bytes"
    mark, size, expected = synced[-1]
    crashed = image(device.size_bytes, log, mark, random.Random(7))
    async with mounted(crashed) as fs:
        assert (await fs.getattr(ino)).size == size
        assert await fs.read(ino, 0, size) == expected


async def fill_up(fs: FileSystem, name: bytes = b"filler") -> int:
    """Use every block there is; the file's inode."""
    ino = await make_file(fs, name)
    size, step = 0, 1 << 18
    while step >= BLOCK_BYTES:
        try:
            size += await fs.write(ino, size, b"f" * step)
        except FsError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            step //= 2
    return ino


async def test_on_a_full_disk_allocated_blocks_can_be_written_and_emptied() -> None:
    """With no block left, not even for the tree of the file: writes into allocated ranges, punches
    and zeroes of all shapes."""
    device = await make_device(8, group_blocks=512)
    async with mounted(device) as fs:
        ino = await make_file(fs, b"f")
        await fs.fallocate(ino, 0, 0, 400 * 4096)
        content = bytearray(400 * 4096)
        await fill_up(fs)
        assert (await fs.statfs()).free_blocks == 0
        rng = random.Random(3)
        for number in range(300):
            at, size = rng.randrange(len(content) - 9000), rng.randrange(1, 9000)
            data = bytes([97 + number % 26]) * size
            await fs.write(ino, at, data)
            content[at : at + size] = data
        assert (await fs.statfs()).free_blocks == 0
        assert await fs.read(ino, 0, len(content)) == content
        await fs.fsync(ino)
        await fsck(device)
        for number in range(100):
            at, size = rng.randrange(len(content) - 30_000), rng.randrange(1, 30_000)
            await fs.fallocate(ino, PUNCH, at, size)
            content[at : at + size] = bytes(size)
            assert await fs.read(ino, 0, len(content)) == content, number
    await fsck(device)


async def test_an_allocation_that_fails_leaves_nothing() -> None:
    device = await make_device(8, group_blocks=512)
    async with cluster(device) as group:
        one, two = await group.mount(1), await group.mount(2)
        ino = await make_file(one, b"f", b"x" * 20_000)
        other = await make_file(two, b"g")
        await two.fallocate(other, 0, 0, 800 * 4096)
        await two.tick(checkpoint=True)
        await one.write(ino, 500 * 4096, b"y")
        before = await one.getattr(ino)
        free = (await one.statfs()).free_blocks
        for belief in (0, 512):  # known at once to be too much, and found out on the way
            for group_state in one.core.space.groups:
                group_state.believed_free = belief
            with refused(errno.ENOSPC):
                await one.fallocate(ino, 0, 0, (free + 200) * 4096)
            assert await one.getattr(ino) == before
            assert (await one.statfs()).free_blocks == free
        await one.fallocate(ino, 0, 0, (6 + free) * 4096)  # six blocks are there
        assert (await one.statfs()).free_blocks == 0
    await fsck(device)
