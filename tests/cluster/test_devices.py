"""The memory and file devices behave as `BlockDevice` promises, and lose what a crash may lose."""

from __future__ import annotations

import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.device import BlockDevice
from cluster.device_file_io import FileDevice
from cluster.device_memory import CHUNK_BYTES, LoggedFlush, MemoryDevice, image_after

SIZE = 4 * CHUNK_BYTES


async def _exercise(device: BlockDevice) -> None:
    model = bytearray(device.size_bytes)
    for index, (offset, length) in enumerate(
        [(0, 512), (CHUNK_BYTES - 512, 1024), (512, CHUNK_BYTES * 2), (SIZE - 512, 512)]
    ):
        data = bytes([index + 1]) * length
        await device.write(offset, memoryview(data), fua=index == 1)
        model[offset : offset + length] = data
    await device.write_zeroes(1024, CHUNK_BYTES + 512)
    model[1024 : 1024 + CHUNK_BYTES + 512] = bytes(CHUNK_BYTES + 512)
    await device.write_many([(2048, b"x" * 512), (4096, bytearray(b"y" * 512))])
    model[2048:2560], model[4096:4608] = b"x" * 512, b"y" * 512
    await device.flush()
    assert bytes(model) == await device.read(0, SIZE)
    assert [bytes(model[512:2048]), b""] == await device.read_many([(512, 1536), (0, 0)])


def test_memory_device_is_an_array_of_bytes() -> None:
    trio.run(_exercise, MemoryDevice(SIZE))


def test_file_device_is_an_array_of_bytes(tmp_path) -> None:
    for name, options in {"a": {}, "b": {"offload": True}, "c": {"direct": True}}.items():
        path = str(tmp_path / name)
        try:
            device = FileDevice(path, create_bytes=SIZE, **options)
        except Exception:
            assert options == {"direct": True}  # tmpfs without O_DIRECT
            continue
        with device:
            trio.run(_exercise, device)


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 255), st.booleans()), max_size=12),
    st.integers(0, 12),
    st.integers(0, 2**12 - 1),
)
@settings(max_examples=60, deadline=None)
def test_crash_keeps_flushed_and_fua_writes_and_a_subset_of_the_rest(
    writes, flush_at, kept
) -> None:
    async def scenario() -> None:
        device = MemoryDevice(8 * 512, log_writes=True)
        model = bytearray(8 * 512)
        unflushed = []
        for index, (sector, value, fua) in enumerate(writes):
            if index == flush_at:
                await device.flush()
                unflushed.clear()
                model = bytearray(await device.read(0, 8 * 512))
            await device.write(sector * 512, bytes([value]) * 512, fua=fua)
            unflushed.append((sector, value, fua))
        for number, (sector, value, fua) in enumerate(unflushed):
            if fua or kept >> number & 1:
                model[sector * 512 : sector * 512 + 512] = bytes([value]) * 512
        whole = image_after(8 * 512, device.log, len(device.log))
        assert await whole.read(0, 8 * 512) == await device.read(0, 8 * 512)
        device.crash(lambda number: bool(kept >> number & 1))
        assert bytes(model) == await device.read(0, 8 * 512)

    trio.run(scenario)


def test_log_prefix_rebuilds_what_a_crash_leaves() -> None:
    async def scenario() -> None:
        device = MemoryDevice(8 * 512, log_writes=True)
        await device.write(0, b"a" * 512)
        await device.flush()
        await device.write(0, b"b" * 512)
        await device.write(512, b"c" * 512, fua=True)
        assert isinstance(device.log[1], LoggedFlush)
        for count, second in ((4, bytes(512)), (5, b"c" * 512)):
            lost = image_after(8 * 512, device.log, count, keep=lambda _position: False)
            assert await lost.read(0, 1024) == b"a" * 512 + second

    trio.run(scenario)
