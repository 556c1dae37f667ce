"""The state file of a server: the newest state that was answered, or a clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import random

import pytest

from cluster import paths_io
from cluster.control import MemberInfo
from cluster.errors import CorruptionError
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from fencing import store, store_io
from fencing.admission import InstallRecord
from fencing.reservations import Registration, ReservationState
from fencing.store import ExportState, ServerState
from fencing.store_io import StateFile

SECTOR = store.SECTOR_BYTES


def state(number: int, registrations: int = 1) -> ServerState:
    """The state of epoch `number`, with as many keys as it takes to have some length."""
    record = InstallRecord(
        Epoch(number),
        [MemberInfo(NodeId(1), Incarnation(2), [InstanceNo(3)], InstanceNo(4), "n1")],
        {},
        {NodeId(2): Incarnation(8)},
        1000,
    )
    keys = [
        Registration(Instance(NodeId(1), Incarnation(2), InstanceNo(n)), n + 1)
        for n in range(registrations)
    ]
    exports = {"disk0": ExportState(ReservationState(keys, None, 7), 11)}
    return ServerState(4, record, exports)


class Disk:
    """A state file in memory, written as `StateFile` does it."""

    def __init__(self, first: ServerState) -> None:
        data, self.place = store.encode_file(store.encode_state(first))
        self.data = bytearray(data)

    def written(self, new: ServerState) -> bytes:
        data = store.encode_slot(store.encode_state(new), self.place)
        assert data is not None
        return data

    def save(self, new: ServerState) -> None:
        self.land(self.written(new))
        self.place = self.place.after()

    def land(self, data: bytes, sectors=None) -> None:
        """All of a write, or those sectors of it."""
        for index in range(len(data) // SECTOR) if sectors is None else sectors:
            at = self.place.offset + index * SECTOR
            self.data[at : at + SECTOR] = data[index * SECTOR : (index + 1) * SECTOR]

    def epoch(self) -> int:
        """Of the state that a start believes. Raises CorruptionError."""
        found, self.place = store.decode_file_untrusted(bytes(self.data))
        return found.record.epoch

    def twin(self) -> Disk:
        twin = object.__new__(Disk)
        twin.data, twin.place = bytearray(self.data), self.place
        return twin


LENGTHS = [(1, 1), (1, 60), (60, 1), (60, 61), (200, 30), (30, 200)]


def aged(before: int, after: int) -> Disk:
    """Slots that have held longer and shorter states; epoch 5 counts."""
    disk = Disk(state(1, before))
    for number, length in enumerate((after, 300, before, after), 2):
        disk.save(state(number, length))
    return disk


@pytest.mark.parametrize(("before", "after"), LENGTHS)
def test_a_write_that_is_cut_short_anywhere(before, after):
    """At every byte: the state before it, or in the middle of a sector, which disks do not do,
    an error; all of it: the new state."""
    disk = aged(before, after)
    data = disk.written(state(6, after))
    for length in range(len(data)):
        cut = disk.twin()
        at = cut.place.offset
        cut.data[at : at + length] = data[:length]
        if data[length:] == cut.data[at + length : at + len(data)]:
            continue  # what is missing was there before
        try:
            assert cut.epoch() == 5, length
        except CorruptionError:
            assert length % SECTOR, length
            assert length > len(data) - SECTOR, length
    disk.land(data)
    assert disk.epoch() == 6


@pytest.mark.parametrize(("before", "after"), LENGTHS)
def test_any_sectors_of_a_write_land(before, after):
    """Also out of order, and again and again: what was answered last counts, until all of a later
    write is there."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(60):
        disk, answered = aged(before, after), 5
        for number in range(6, 16):
            data = disk.written(state(number, rng.choice((before, after))))
            count = len(data) // SECTOR
            landed = {n for n in range(count) if rng.random() < 0.7}
            disk.land(data, landed)
            if len(landed) == count:
                answered = number
            assert disk.epoch() == answered


@pytest.mark.parametrize(("before", "after"), LENGTHS)
def test_decay_never_brings_back_what_was_replaced(before, after):
    """Any sectors of the newest state broken: an error. Of the other slot: the newest state, or an
    error where nothing is left that shows which one is newer."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    whole = aged(before, after)
    newest, other = 1 - whole.place.slot, whole.place.slot
    told = 0
    count = len(whole.written(state(6, after))) // SECTOR
    for _ in range(300):
        for slot in (newest, other):
            disk = whole.twin()
            start = slot * disk.place.slot_bytes
            for index in {rng.randrange(count) for _ in range(rng.randrange(1, 5))}:
                at = start + index * SECTOR + rng.randrange(SECTOR)
                disk.data[at] ^= 1 << rng.randrange(8)
            if slot == newest:
                with pytest.raises(CorruptionError):
                    disk.epoch()
            else:
                with contextlib.suppress(CorruptionError):
                    assert disk.epoch() == 5
                    told += 1
    assert told > 100


def test_decay_of_a_newer_state_over_a_torn_write():
    """A slot that decayed after it had been finished, over any rest of what was cut short in it
    before, is never taken for one that was not finished."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(400):
        disk = aged(60, 61)
        for number in range(6, 9):
            data = disk.written(state(number, rng.choice((1, 60, 61, 200))))
            disk.land(data, {n for n in range(len(data) // SECTOR - 1) if rng.random() < 0.7})
            assert disk.epoch() == 5
        disk.save(state(9, rng.choice((1, 60, 200))))
        slot = 1 - disk.place.slot
        broken = [n for n in range(8) if rng.random() < 0.5] or [0]
        for index in broken:
            at = slot * disk.place.slot_bytes + index * SECTOR
            disk.data[at : at + SECTOR] = rng.choice((bytes(SECTOR), rng.randbytes(SECTOR)))
        with contextlib.suppress(CorruptionError):
            assert disk.epoch() == 9


def test_every_flipped_byte_and_every_cut_of_the_file_is_noticed():
    """Of the write that counts; no length becomes an empty table."""
    disk = Disk(state(1))
    disk.save(state(2))
    start, length = disk.place.slot_bytes, len(disk.written(state(2)))
    for index in range(start, start + length):
        damaged = disk.twin()
        damaged.data[index] ^= 0x40
        with pytest.raises(CorruptionError):
            damaged.epoch()
    for length in (0, 1, SECTOR, start - 1, start, 2 * start - SECTOR, 2 * start - 1):
        with pytest.raises(CorruptionError):
            store.decode_file_untrusted(bytes(disk.data[:length]))


def test_another_version_is_named():
    """The file of an earlier program is refused, by its version."""
    with pytest.raises(CorruptionError, match="version 1 is not known"):
        store.decode_file_untrusted(store.MAGIC + b"\1\0\0\0" + bytes(200))


def test_round_trip(tmp_path):
    """What is saved is loaded, also when it outgrows its slots; a server that never stored anything
    starts fresh. Only a new file is made anew."""
    path = tmp_path / "state"
    file = StateFile(path)
    assert file.load() == ServerState()
    inodes = []
    for number, registrations in enumerate((1, 2, 3, 9000, 9001, 1, 2), 1):
        file.save(state(number, registrations))
        assert StateFile(path).load() == state(number, registrations)
        inodes.append(path.stat().st_ino)
        assert path.stat().st_mode & 0o777 == 0o600
    assert len(set(inodes)) == 2
    other = StateFile(path)
    assert other.load().record.epoch == 7
    for number in (8, 9):
        other.save(state(number))
        assert StateFile(path).load() == state(number)
    assert path.stat().st_ino == inodes[-1]
    grown = StateFile(path)
    grown.load()
    for number in (10, 11):  # what was read does not come back into the new file
        grown.save(state(number, 40_000))
        assert StateFile(path).load() == state(number, 40_000)
    assert path.stat().st_ino != inodes[-1]


def test_a_file_that_a_killed_server_has_renamed_is_durable_once_it_was_loaded(
    tmp_path, monkeypatch
):
    """The next states are written into that file: without its name they would be lost."""
    path = tmp_path / "state"
    with monkeypatch.context() as killed:
        killed.setattr(paths_io, "sync_directory", _die)
        with pytest.raises(Killed):
            StateFile(path).save(state(1))
    synced = []
    monkeypatch.setattr(paths_io, "sync_directory", synced.append)
    file = StateFile(path)
    assert file.load() == state(1)
    file.save(state(2))
    assert synced == [tmp_path]


class Killed(Exception):
    """In place of a signal."""


def _die(_path):
    raise Killed


def test_a_file_that_was_taken_away_is_made_again(tmp_path):
    """An admin's mistake does not outlive the next change."""
    path = tmp_path / "state"
    file = StateFile(path)
    file.save(state(1))
    path.unlink()
    file.save(state(2))
    assert StateFile(path).load() == state(2)


def test_a_write_that_fails_leaves_the_old_state(tmp_path, monkeypatch):
    """Wherever it fails; also when the next ones fail, and the last one is good."""
    path = tmp_path / "state"
    file = StateFile(path)
    file.save(state(1, 200))
    file.save(state(2, 200))
    real = os.pwrite

    def failing(fd: int, data: memoryview, offset: int) -> int:
        if failing.left < len(data):
            real(fd, data[: failing.left], offset)
            raise OSError(errno.EIO, "no")
        return real(fd, data, offset)

    monkeypatch.setattr(store_io.os, "pwrite", failing)
    for number, left in enumerate(range(0, 4 * SECTOR, SECTOR), 3):
        failing.left = left
        with pytest.raises(OSError, match="no") as caught:
            file.save(state(number, 200))
        assert caught.value.filename == str(path)
        assert StateFile(path).load() == state(2, 200)
    failing.left = 1 << 30
    file.save(state(99, 200))
    assert StateFile(path).load() == state(99, 200)


def test_the_error_names_the_file(tmp_path):
    """The admin learns which file, and what it would mean to remove it."""
    path = tmp_path / "fencing.state"
    path.write_bytes(b"garbage")
    with pytest.raises(CorruptionError, match=str(path)) as caught:
        StateFile(path).load()
    assert "bars" in caught.value.hint
