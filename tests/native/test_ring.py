"""The block I/O ring, both engines, with O_DIRECT files and under trio."""

import errno
import os
import random
import select
import subprocess
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from native.buffers import ALIGNMENT, AlignedPool, aligned
from native.ring import REAP_MAX, STREAM, Ring, RingFullError
from native.ring_io import open_ring

BLOCK = 4096
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["io_uring", "threads"])
def engine(request):
    return request.param


@pytest.fixture
def descriptor(tmp_path):
    """A file opened with O_DIRECT."""
    result = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    yield result
    os.close(result)


def filled(data):
    buffer = aligned(len(data))
    buffer[:] = data
    return buffer


def finish(ring, count):
    """Reap `count` completions through the eventfd."""
    result = {}
    while len(result) < count:
        readable, _, _ = select.select([ring], [], [], 20)
        assert readable, "no completion"
        result.update(ring.reap())
    return result


def test_a_batch_of_vectored_direct_writes_and_reads(engine, descriptor):
    data = random.Random(1).randbytes(64 * BLOCK)
    with Ring(64, engine=engine) as ring:
        assert ring.engine == engine
        for index in range(0, 64, 4):
            parts = [filled(data[at * BLOCK :][:BLOCK]) for at in range(index, index + 4)]
            ring.writev(index, descriptor, index * BLOCK, parts, data_sync=index % 8 == 0)
        assert ring.in_flight == 16
        assert ring.submit() == 16
        assert finish(ring, 16) == dict.fromkeys(range(0, 64, 4), 4 * BLOCK)
        ring.fsync(1, descriptor)
        ring.fsync(2, descriptor, data_only=False)
        ring.submit()
        assert finish(ring, 2) == {1: 0, 2: 0}
        targets = [aligned(BLOCK) for _ in range(64)]
        for index, target in enumerate(targets):
            ring.readv(index, descriptor, index * BLOCK, [target])
        ring.submit()
        assert finish(ring, 64) == dict.fromkeys(range(64), BLOCK)
        assert b"".join(targets) == data
        assert (ring.in_flight, ring.room) == (0, 64)


def test_the_end_of_the_file_and_errors(engine, tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"x" * 5000)
    with open(path, "rb") as file, Ring(8, engine=engine) as ring:
        first, second = bytearray(4096), bytearray(4096)
        ring.readv(1, file.fileno(), 0, [first, second])
        ring.readv(2, file.fileno(), 9000, [bytearray(10)])
        ring.writev(3, file.fileno(), 0, [b"no"])
        ring.readv(4, 9999, 0, [bytearray(10)])
        ring.fallocate(5, file.fileno(), 0, 0, 10)
        ring.readv(6, file.fileno(), 0, [])
        ring.submit()
        results = finish(ring, 6)
        assert results[1] == 5000
        assert first + second[:904] == b"x" * 5000
        assert results[2] == 0
        assert results[3] == results[4] == results[5] == -errno.EBADF
        assert results[6] == 0


def test_fallocate_extends_and_punches(engine, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8192)
    with open(path, "r+b") as file, Ring(8, engine=engine) as ring:
        ring.fallocate(1, file.fileno(), 0, 0, 1 << 20)
        ring.submit()
        assert finish(ring, 1) == {1: 0}
        ring.fallocate(2, file.fileno(), 0x03, 0, 4096)  # PUNCH_HOLE | KEEP_SIZE
        ring.submit()
        assert finish(ring, 1) == {2: 0}
    assert path.stat().st_size == 1 << 20
    assert path.read_bytes()[:8192] == bytes(4096) + b"x" * 4096


def test_short_transfers_go_on(engine):
    """A pipe gives at most its capacity at once: the ring goes on until all is moved."""
    reader, writer = os.pipe()
    data = random.Random(2).randbytes(300_000)
    got = [bytearray(100_000) for _ in range(3)]
    with Ring(4, engine=engine) as ring:
        ring.writev(1, writer, STREAM, [data[:1], data[1:200_000], data[200_000:]])
        ring.readv(2, reader, STREAM, got)
        ring.submit()
        assert finish(ring, 2) == {1: 300_000, 2: 300_000}
    assert b"".join(got) == data
    os.close(reader)
    os.close(writer)


def test_the_depth_is_a_bound_and_tags_are_unique(engine, descriptor):
    with Ring(2, engine=engine) as ring:
        ring.fsync(1, descriptor)
        with pytest.raises(ValueError, match="in flight"):
            ring.fsync(1, descriptor)
        ring.fsync(2, descriptor)
        with pytest.raises(RingFullError):
            ring.fsync(3, descriptor)
        ring.submit()
        finish(ring, 2)
        ring.fsync(3, descriptor)
        assert ring.submit() == 1
        assert finish(ring, 1) == {3: 0}


def test_more_completions_than_one_reap_takes(engine, descriptor):
    count = 3 * REAP_MAX
    with Ring(count, engine=engine) as ring:
        for tag in range(count):
            ring.fsync(tag, descriptor)
        ring.submit()
        assert finish(ring, count) == dict.fromkeys(range(count), 0)


def test_close_waits_for_what_runs(engine, descriptor):
    buffer = filled(b"z" * (1 << 20))
    ring = Ring(32, engine=engine)
    for index in range(32):
        ring.writev(index, descriptor, index << 20, [buffer])
    ring.submit()
    ring.close()
    ring.close()
    assert os.fstat(descriptor).st_size == 32 << 20


def test_the_engine_is_chosen_at_run_time():
    with Ring(8) as ring:
        forbidden = Path("/proc/sys/kernel/io_uring_disabled")
        allowed = not forbidden.exists() or forbidden.read_text().strip() == "0"
        assert ring.engine == ("io_uring" if allowed else "threads")
    code = "from native.ring import Ring; print(Ring(8).engine)"
    environment = {**os.environ, "CFS_RING_ENGINE": "threads"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == "threads\n"


@pytest.mark.trio
async def test_trio_many_at_once_through_a_small_ring(engine, descriptor):
    rng = random.Random(3)
    model = bytearray(rng.randbytes(256 * BLOCK))
    async with open_ring(8, engine=engine) as ring:
        parts = [(at, filled(model[at : at + BLOCK])) for at in range(0, len(model), BLOCK)]
        assert await ring.write_many(descriptor, parts) == [BLOCK] * 256
        await ring.fsync(descriptor)

        async def work(lane):
            local = random.Random(lane)
            for _ in range(30):
                block = local.randrange(lane, 256, 8)
                if local.random() < 0.5:
                    data = local.randbytes(BLOCK)
                    model[block * BLOCK : (block + 1) * BLOCK] = data
                    assert await ring.writev(descriptor, block * BLOCK, [filled(data)]) == BLOCK
                else:
                    target = aligned(BLOCK)
                    assert await ring.readv(descriptor, block * BLOCK, [target]) == BLOCK
                    assert target == model[block * BLOCK : (block + 1) * BLOCK]

        async with trio.open_nursery() as nursery:
            for lane in range(8):
                nursery.start_soon(work, lane)
        targets = [(at, aligned(4 * BLOCK)) for at in range(0, len(model), 4 * BLOCK)]
        assert await ring.read_many(descriptor, targets) == [4 * BLOCK] * 64
        assert b"".join(buffer for _, buffer in targets) == model
        with pytest.raises(OSError, match="Bad file descriptor"):
            await ring.readv(9999, 0, [aligned(BLOCK)])
        await ring.fallocate(descriptor, 0, 0, 1 << 21)


@pytest.mark.trio
async def test_trio_a_cancelled_caller_waits_for_its_operation(engine, descriptor):
    async with open_ring(8, engine=engine) as ring:
        buffer = filled(b"c" * (1 << 20))
        with trio.CancelScope() as scope:
            scope.cancel()
            assert await ring.writev(descriptor, 0, [buffer]) == 1 << 20
        assert ring.ring.in_flight == 0
        target = aligned(1 << 20)
        await ring.readv(descriptor, 0, [target])
        assert target == buffer


@pytest.mark.trio
async def test_trio_cancelling_everything_does_not_hang(engine, descriptor):
    with trio.fail_after(60), trio.CancelScope() as scope:
        async with open_ring(4, engine=engine) as ring, trio.open_nursery() as nursery:
            for index in range(20):
                nursery.start_soon(ring.writev, descriptor, index << 20, [filled(b"x" * (1 << 20))])
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught


def test_the_pool_is_aligned_and_bounded():
    pool = AlignedPool(3 * BLOCK, 2)
    first, second = pool.take(), pool.take()
    assert pool.take() is None
    assert len(first) == 3 * BLOCK
    assert pool.taken == 2
    pool.give(first)
    assert pool.take() is first
    with pytest.raises(ValueError, match="not taken"):
        pool.give(memoryview(bytearray(3)))
    pool.give(second)
    with pytest.raises(ValueError, match="not taken"):
        pool.give(second)
    assert ALIGNMENT % 512 == 0
    assert len(aligned(0)) == 0
