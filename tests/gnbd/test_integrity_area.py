"""The integrity area in C beside a model in Python: what is stored, what is believed."""

from __future__ import annotations

import errno
import os
import random
import threading
from array import array

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CorruptionError
from gnbd.server import keeper_io
from gnbd.server.backends_io import FileBackend
from gnbd.server.damages_io import Damages
from gnbd.server.integrity import (
    HEADER_BYTES,
    Header,
    decode_header_untrusted,
    encode_header,
    newest_untrusted,
)
from gnbd.server.integrity_io import Integrity, area_path, make_area, read_header
from gnbd.server.keeper_io import Keeper
from lab.block_server import wait_for
from native.integrity import BITS_AT, BITS_BYTES, BLOCK_BYTES, REGION_BYTES, SUMS_AT, ChecksumError

ZERO_SUM = google_crc32c.value(bytes(BLOCK_BYTES))
SIZE = 3 * REGION_BYTES + 5 * BLOCK_BYTES + 512


class Disk:
    """A file with an area, and what must be in both."""

    def __init__(self, directory, size=SIZE, settled=True):
        self.path = area_path(directory, "disk")
        self.backend = FileBackend(directory / "disk.img", size)
        make_area(self.path, Header("disk", "disk.img", size), settled=settled)
        self.open()

    def open(self):
        self.integrity = Integrity(self.path, read_header(self.path))
        self.area = self.backend.area = self.integrity.area

    def kill(self):
        """The server is gone, the page cache is not."""
        self.integrity.close(False)

    def close(self, flushed=True):
        self.integrity.close(flushed)
        self.backend.close()

    def settle_all(self):
        region = 0
        while (found := self.area.settle(self.backend.fd, region)) is not None:
            assert found[1] == 0
            region = found[0] + 1

    def rest(self):
        """Everything becomes clean."""
        for _ in range(2):
            self.area.pick()
            self.area.clear(durable=True)

    def read(self, offset, length):
        data = bytearray(length)
        self.backend.read_into(offset, memoryview(data))
        return bytes(data)

    def write(self, offset, data):
        self.backend.write(offset, memoryview(data), False)

    def stored(self):
        count = -(-self.integrity.size_bytes // BLOCK_BYTES)
        raw = os.pread(self.integrity._fd, 4 * count, SUMS_AT)
        return array("I", raw)

    def bits(self):
        raw = os.pread(self.integrity._fd, BITS_BYTES, BITS_AT)
        return {n for n in range(8 * len(raw.rstrip(b"\0"))) if raw[n // 8] >> n % 8 & 1}

    def damage(self, offset, data):
        os.pwrite(self.backend.fd, data, offset)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path)
    yield disk
    disk.close()


def sums_of(data: bytes):
    """By another implementation, from the definition."""
    blocks = (bytes(data[at : at + BLOCK_BYTES]) for at in range(0, len(data), BLOCK_BYTES))
    return array("I", (google_crc32c.value(b.ljust(BLOCK_BYTES, b"\0")) ^ ZERO_SUM for b in blocks))


def test_sums_that_the_disk_has_refused_are_computed_anew(disk, monkeypatch):
    """The kernel drops them, says so once, and the next fdatasync succeeds."""
    data, before, real = b"a" * BLOCK_BYTES, disk.stored(), os.fdatasync
    refused = threading.Event()

    def fdatasync(fd):
        if os.path.samestat(os.fstat(fd), os.stat(disk.path)) and not refused.is_set():
            os.pwrite(disk.integrity._fd, before, SUMS_AT)
            refused.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    monkeypatch.setattr(keeper_io, "CLEAR_S", 0.01)
    disk.write(REGION_BYTES, data)
    damages = Damages()
    keeper = Keeper("disk", disk.integrity, disk.backend.fd, damages, disk.backend.flush)
    try:
        wait_for(lambda: refused.is_set() and not disk.bits(), "all regions are clean")
        assert disk.read(REGION_BYTES, BLOCK_BYTES) == data
        assert disk.stored()[REGION_BYTES // BLOCK_BYTES] == sums_of(data)[0]
        assert damages.count == 0
    finally:
        keeper.stop()


def test_an_area_that_is_given_up_calls_nothing_damage(disk):
    """Requests that began under it are beside others that do not keep it up any more."""
    disk.write(0, b"a" * 3 * BLOCK_BYTES)
    disk.damage(BLOCK_BYTES, b"b" * BLOCK_BYTES)
    with pytest.raises(ChecksumError):
        disk.read(0, BLOCK_BYTES + 1)
    disk.area.doubt(every=True)
    assert disk.read(BLOCK_BYTES - 1, 2) == b"ab"
    disk.write(BLOCK_BYTES + 1, b"c")
    assert disk.read(BLOCK_BYTES, 3) == b"bcb"
    assert disk.area.counters()["unsettled_regions"] == 4


OFFSETS = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, SIZE // BLOCK_BYTES).map(lambda n: n * BLOCK_BYTES),
    st.sampled_from([REGION_BYTES - 100, SIZE - 512, SIZE - 513, SIZE - 5000]),
)
LENGTHS = st.one_of(
    st.integers(0, 3 * BLOCK_BYTES),
    st.sampled_from([BLOCK_BYTES, 2 * BLOCK_BYTES, 40 * BLOCK_BYTES, 300 * BLOCK_BYTES + 7]),
)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "trim", "no hole", "read", "rest", "kill"]),
        OFFSETS,
        LENGTHS,
        st.integers(1, 255),
    ),
    max_size=25,
)


@settings(max_examples=80, deadline=None)
@given(steps=STEPS, before=st.booleans())
def test_any_history_leaves_the_sums_of_the_data(tmp_path_factory, steps, before):
    """Writes, zeroes and trims of any place and length, servers that die, regions that become
    clean: each read is right, and at the end each sum is that of its block."""
    directory = tmp_path_factory.mktemp("history")
    model = bytearray(SIZE)
    if before:  # a disk that is converted
        model[:] = random.Random(1).randbytes(SIZE)
        (directory / "disk.img").write_bytes(model)
    disk = Disk(directory, settled=not before)
    try:
        for kind, offset, length, value in steps:
            length = min(length, SIZE - offset)
            end = offset + length
            if kind == "read":
                assert disk.read(offset, length) == model[offset:end]
            elif kind == "write":
                model[offset:end] = random.Random(value).randbytes(length)
                disk.write(offset, bytes(model[offset:end]))
            elif kind == "rest":
                disk.rest()
            elif kind == "kill":
                disk.kill()
                disk.open()
                assert disk.area.counters()["unsettled_regions"] == len(disk.bits())
            elif length:
                model[offset:end] = bytes(length)
                if kind == "trim":
                    disk.backend.trim(offset, length)
                else:
                    disk.backend.zero(offset, length, kind == "no hole")
        disk.settle_all()
        assert disk.stored() == sums_of(model)
        assert disk.read(0, SIZE) == model
    finally:
        disk.close()


def test_a_region_is_marked_before_it_is_written_and_cleared_when_it_rests(disk):
    """The bit is in the file after the first write, and goes after two rounds without one."""
    disk.write(REGION_BYTES + 5, b"x")
    assert disk.bits() == {1}
    disk.write(2 * REGION_BYTES - 1, b"xy")
    assert disk.bits() == {1, 2}
    assert disk.area.pick() == 0
    disk.write(2 * REGION_BYTES, b"z")  # it does not rest
    assert disk.area.pick() == 1
    disk.area.clear(durable=False)
    assert disk.bits() == {1, 2}
    assert disk.area.pick() == 2
    disk.write(REGION_BYTES, b"z")  # while data and sums are being flushed
    disk.area.clear(durable=True)
    assert disk.bits() == {1}
    assert disk.area.counters()["flux_regions"] == 1


def test_damage_is_found_by_every_kind_of_read(disk):
    """And told with the address; a rewritten block is good again, a partly written one is not."""
    data = random.Random(2).randbytes(SIZE)
    disk.write(0, data)
    disk.damage(5 * BLOCK_BYTES + 77, b"?")
    for offset, length in ((5 * BLOCK_BYTES, 1), (6 * BLOCK_BYTES - 1, 1), (0, SIZE), (20000, 900)):
        with pytest.raises(ChecksumError) as caught:
            disk.read(offset, length)
        assert caught.value.offset == 5 * BLOCK_BYTES
    assert disk.read(6 * BLOCK_BYTES, 100) == data[6 * BLOCK_BYTES :][:100]
    with pytest.raises(ChecksumError):  # it would make a good sum of bad bytes
        disk.write(5 * BLOCK_BYTES, b"x" * 100)
    with pytest.raises(ChecksumError):
        disk.backend.trim(6 * BLOCK_BYTES - 10, 20)
    assert disk.read(6 * BLOCK_BYTES, 100) == data[6 * BLOCK_BYTES :][:100]
    assert disk.area.counters()["mismatches"] == 6
    assert set(disk.area.take_bad()) == {5 * BLOCK_BYTES}
    disk.write(5 * BLOCK_BYTES, b"n" * BLOCK_BYTES)
    assert disk.read(5 * BLOCK_BYTES, BLOCK_BYTES) == b"n" * BLOCK_BYTES


@pytest.mark.parametrize("clean", [True, False])
def test_damage_while_nobody_serves(tmp_path, clean):
    """After a clean end everything is known; after a kill, all but the regions in flux."""
    disk = Disk(tmp_path)
    disk.write(0, b"a" * SIZE)
    disk.rest()
    disk.write(REGION_BYTES, b"b")
    if clean:
        disk.integrity.close(True)
    else:
        disk.kill()
    assert read_header(disk.path).size_bytes == SIZE
    disk.damage(10, b"?")
    disk.damage(REGION_BYTES + 10, b"?")
    disk.open()
    disk.settle_all()
    with pytest.raises(ChecksumError):
        disk.read(0, 1)
    if clean:
        with pytest.raises(ChecksumError):
            disk.read(REGION_BYTES, 1)
    else:
        assert disk.read(REGION_BYTES + 9, 3) == b"a?a"
    disk.close()


def test_a_hole_that_was_data_is_no_hole(disk):
    """A lost write below us that left zeroes: neither read nor reported as such."""
    disk.write(0, b"x" * (64 << 10))
    disk.area.pick(every=True)
    os.truncate(disk.backend.path, 0)
    os.truncate(disk.backend.path, SIZE)
    with pytest.raises(ChecksumError):
        disk.read(0, BLOCK_BYTES)
    assert not disk.area.is_zero(0, 64 << 10)
    assert disk.area.is_zero(64 << 10, REGION_BYTES)
    extents = disk.backend.extents(0, SIZE - SIZE % BLOCK_BYTES)
    assert not any(hole for _, hole in extents)  # one hole, of which a part is not true


@pytest.mark.parametrize("beyond", [b"", b"was here before" * 9000])
def test_growth_checks_what_was_and_learns_what_is_new(tmp_path, beyond):
    """The short last block keeps its sum or is found to be wrong; the rest is taken as it is."""
    (tmp_path / "disk.img").write_bytes(bytes(SIZE) + beyond)
    disk = Disk(tmp_path)
    disk.write(SIZE - 700, b"e" * 700)
    longer = SIZE + 2 * REGION_BYTES + 512
    disk.backend.resize(longer)
    disk.integrity.grow(disk.backend.fd, longer)
    assert disk.area.counters()["unsettled_regions"] == 2
    disk.settle_all()
    data = (bytes(SIZE - 700) + b"e" * 700 + beyond).ljust(longer, b"\0")
    assert disk.read(0, longer) == data
    assert disk.stored() == sums_of(data)
    disk.close()
    assert read_header(disk.path).size_bytes == longer

    disk.backend = FileBackend(tmp_path / "disk.img", longer)
    disk.open()
    disk.damage(longer - 1, b"?")
    disk.backend.resize(longer + 512)
    disk.integrity.grow(disk.backend.fd, longer + 512)
    disk.settle_all()
    with pytest.raises(ChecksumError):
        disk.read(longer, 512)
    disk.close()


def test_a_failed_write_leaves_what_can_be_read(disk):
    """The disk took some of it: the sums are of what is there."""
    disk.write(0, b"a" * 4 * BLOCK_BYTES)

    def half_way():
        with disk.area.zeroing(disk.backend.fd, 100, 3 * BLOCK_BYTES):
            disk.damage(100, bytes(5000))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half_way()
    rest = b"a" * (4 * BLOCK_BYTES - 5100)
    assert disk.read(0, 4 * BLOCK_BYTES) == b"a" * 100 + bytes(5000) + rest


def test_writers_of_the_same_blocks(disk):
    """Threads that write parts of the same blocks, readers between them: no sum is wrong at the
    end, no reader is told so on the way."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    problems: list[BaseException] = []
    ended = threading.Event()

    def guarded(work, *arguments):
        try:
            work(*arguments)
        except BaseException as error:
            problems.append(error)

    def write(number):
        chance = random.Random(seed + number)
        for _ in range(1500):
            offset = REGION_BYTES - 4 * BLOCK_BYTES + chance.randrange(8 * BLOCK_BYTES)
            disk.write(offset, bytes([chance.randrange(256)]) * chance.randrange(1, 9000))

    def read():
        while not ended.is_set():
            disk.read(REGION_BYTES - 4 * BLOCK_BYTES, 12 * BLOCK_BYTES)

    def rest():
        while not ended.is_set():
            disk.rest()

    writers = [threading.Thread(target=guarded, args=(write, n)) for n in range(4)]
    others = [threading.Thread(target=guarded, args=(work,)) for work in (read, rest)]
    for thread in (*writers, *others):
        thread.start()
    for thread in writers:
        thread.join()
    ended.set()
    for thread in others:
        thread.join()
    assert not problems
    assert disk.stored() == sums_of(disk.backend.path.read_bytes())


def test_the_header(tmp_path):
    """Two copies; the newer one counts, one alone is enough, none is an error with a hint."""
    header = Header("a/b ü", "/srv/disk.img", 1 << 40, 7)
    data = encode_header(header)
    assert len(data) == HEADER_BYTES
    assert decode_header_untrusted(data) == header
    newer = encode_header(Header("a/b ü", "/srv/disk.img", 1 << 41, 8))
    assert newest_untrusted([data, newer]).generation == 8
    assert newest_untrusted([data, newer[:-1] + b"?"]).generation == 7
    with pytest.raises(CorruptionError):
        newest_untrusted([bytes(HEADER_BYTES), data[:-9]])
    path = area_path(tmp_path, "a/b ü")
    assert path.parent == tmp_path / "integrity"
    assert len({area_path(tmp_path, "x" * n).name for n in range(190, 210)}) == 20
    make_area(path, Header("a/b ü", "/srv/disk.img", SIZE), settled=False)
    assert read_header(path).name == "a/b ü"
    with open(path, "r+b") as file:
        file.write(bytes(2 * HEADER_BYTES))
    with pytest.raises(CorruptionError) as caught:
        read_header(path)
    assert "remove" in caught.value.hint
    assert read_header(area_path(tmp_path, "other")) is None
