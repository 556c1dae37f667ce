"""Dumps for support: no data in them, and fsck says of the restored image what it says of the
original."""

from __future__ import annotations

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.fsck.checker import check
from cfs.metadump import DUMP_HEADER, dump, read_header_untrusted, read_record_untrusted
from cluster.device_memory import MemoryDevice
from cluster.errors import RefusedError
from tests.cfs.harness import mounted
from tests.cfs.test_damage import spoiled, the_world
from tests.corrupter.table import TABLE

SECRETS = [
    b"s" * 100,
    b"h" * 64,
    b"dir/one",
    b"t" * 64,
    b"m" * 50,
    b"x" * 64,
    b"l" * 64,
    b"more" * 9,
]
CLASSES = [
    "inode flipped", "directory leaf flipped", "group zeroed", "extent leaf zeroed",
    "name with a slash", "block of two files", "attribute value zeroed",
    "tree that points to itself",
    "journal image zeroed", "journal headers lost", "slot table zeroed", "superblock flipped",
    "lost directory", "impossible level", "content longer than an inode",
]  # fmt: skip


async def dumped(device: MemoryDevice, key: bytes) -> bytes:
    parts: list[bytes] = []
    assert await dump(device, key, parts.append, lambda count: None) > 100
    return b"".join(parts)


async def restored(data: bytes) -> MemoryDevice:
    file = io.BytesIO(data)
    info = read_header_untrusted(file.read(DUMP_HEADER.size))
    device = MemoryDevice(info.device_blocks * BLOCK_BYTES)
    while record := read_record_untrusted(info, file.read):
        await device.write(record[0] * BLOCK_BYTES, record[1])
    return device


@pytest.mark.trio
@pytest.mark.parametrize("key", [b"", b"k" * 32])
@pytest.mark.parametrize("crashed", [False, True])
async def test_a_dump_holds_the_structure_and_no_data(key: bytes, crashed: bool) -> None:
    world = await the_world()
    device = world.crashed if crashed else world.device
    data = await dumped(device, key)
    assert len(data) < device.size_bytes // 50
    image = await restored(data)
    original, found = await check(device), await check(image)
    assert found.clean, found.errors
    assert (found.inodes, found.names, found.free_blocks, found.notes) == (
        original.inodes, original.names, original.free_blocks, original.notes,
    )  # fmt: skip
    raw = await image.read(0, image.size_bytes)
    for secret in SECRETS:
        assert secret not in raw, secret
    assert (b"bottom" in raw) == (not key)
    assert (b"user.large" in raw) == (not key)
    with pytest.RaisesGroup(RefusedError, flatten_subgroups=True):
        async with mounted(image):
            raise AssertionError("mounted")


@pytest.mark.trio
@pytest.mark.parametrize("name", CLASSES)
async def test_fsck_says_the_same_of_the_dump_of_a_damaged_one(name: str) -> None:
    _, image = await spoiled(TABLE[name])
    found = await check(await restored(await dumped(image.device, b"")))
    expected = await check(image.device)
    assert len(found.errors) == len(expected.errors), (found.errors, expected.errors)
    raw = await dumped(image.device, b"k" * 32)
    for secret in (*SECRETS, b"bottom"):
        assert secret not in await (await restored(raw)).read(0, image.device.size_bytes)


@given(st.binary(max_size=200), st.integers(0, 63), st.integers(1, 255))
@settings(max_examples=100, deadline=None)
def test_what_is_no_dump_is_refused(noise: bytes, at: int, flip: int) -> None:
    good = bytearray(DUMP_HEADER.pack(b"CFSMETA1", 1, 0, BLOCK_BYTES, 0, 100, 100, bytes(16), 0, 0))
    with pytest.raises(CorruptionError):
        read_header_untrusted(bytes(good))
    with pytest.raises(CorruptionError):
        read_header_untrusted(noise)


@pytest.mark.trio
async def test_damaged_and_short_dumps_are_refused() -> None:
    data = await dumped((await the_world()).device, b"")
    for cut in (10, 70, 100, len(data) - 1, len(data) - 20):
        with pytest.raises(CorruptionError):
            await restored(data[:cut])
    for at in range(3, 3000, 97):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        try:
            await restored(bytes(spoilt))
        except CorruptionError:
            continue
        assert 60 <= at < 64 or at >= DUMP_HEADER.size, at
