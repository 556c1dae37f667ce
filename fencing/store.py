"""The durable state of a gnbd-server: bars, reservations, minimum sequence numbers, start count.

The file has two slots of the same length, rewritten in place and in turns: a change is one write
into the slot that is not the newest, and one flush. A slot is made of sectors that each prove
themselves:

    offset size
    0      8    magic "CFSfence"
    8      2    version (2)
    10     2    slot, 0 or 1
    12     4    index of this sector in its slot
    16     8    sequence of the write that it belongs to; 0: never written
    24     4    payload length of that write
    28     4    CRC32C of bytes 0..28 and 32..512
    32     480  payload: `ServerState` as msgpack, goes on in the next sector; zeroes at the end

All integers little endian. A write has two sectors at least, from the slot's first one on; all of
the same sequence, which is above every sequence in the file. A slot is whole when its write is.

What a start believes is the newest whole slot, and only if it can be shown that no later write was
finished in the other slot: a finished one was answered, and to go back behind it would let barred
instances in. Disks write sectors as wholes, so a write that was cut short leaves new ones and old
ones, all of them good; decay breaks what it hits. A good sector among the first two shows that no
write later than its own was finished there, for that would have gone over it. Its own write was
not finished either if a good older sector stands where it had to go, or a later one anywhere in
the slot: after a finished write the other slot is next. What does not prove itself unfinished in
this way stops the server; so do two slots that are not whole.

A start may believe a slot that only the kernel's cache has, of a server that was killed before it
was durable. So before it writes over the other one it writes out all that it has read, as it is
(`store_io.py`): else the disk could have neither, or the one before both.
`tests/fencing/test_store.py` tries every cut, any sectors, and decay on top of both.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import CorruptionError
from fencing.admission import InstallRecord
from fencing.reservations import ReservationState
from native.checksum import crc32c

MAGIC = b"CFSfence"
VERSION = 2
HEADER = struct.Struct("<8sHHIQI")
_CRC = struct.Struct("<I")
SECTOR_BYTES = 512
DATA_OFFSET = HEADER.size + _CRC.size
DATA_BYTES = SECTOR_BYTES - DATA_OFFSET
SECTORS_MIN = 2
SLOT_BYTES_MIN = 64 << 10
STATE_BYTES_MAX = 16 << 20


class ExportState(msgspec.Struct, frozen=True):
    """What is stored per export. A nexus below `sequence_min` is refused."""

    reservations: ReservationState = ReservationState()
    sequence_min: int = 0


class ServerState(msgspec.Struct, frozen=True):
    """Everything that a gnbd-server must not forget. `start_count` rises at each start."""

    start_count: int = 0
    record: InstallRecord | None = None
    exports: dict[str, ExportState] = {}


class Place(NamedTuple):
    """Where the next write goes, and its sequence."""

    slot: int
    slot_bytes: int
    sequence: int

    @property
    def offset(self) -> int:
        return self.slot * self.slot_bytes

    def after(self) -> Place:
        """The place of the write after this one."""
        return Place(1 - self.slot, self.slot_bytes, self.sequence + 1)

    def again(self) -> Place:
        """The place of another one after this one has failed."""
        return Place(self.slot, self.slot_bytes, self.sequence + 1)


class Sector(NamedTuple):
    sequence: int
    length: int
    data: bytes


_decoder = msgspec.msgpack.Decoder(ServerState)


def encode_state(state: ServerState) -> bytes:
    """The payload."""
    payload = msgspec.msgpack.encode(state)
    assert len(payload) <= STATE_BYTES_MAX
    return payload


def _count(length: int) -> int:
    return max(SECTORS_MIN, -(-length // DATA_BYTES))


def _sector(slot: int, index: int, sequence: int, length: int, data: bytes) -> bytes:
    head = HEADER.pack(MAGIC, VERSION, slot, index, sequence, length)
    data = data.ljust(DATA_BYTES, b"\0")
    return head + _CRC.pack(crc32c(data, crc32c(head))) + data


def encode_slot(payload: bytes, place: Place) -> bytes | None:
    """What is written there; None: it has no room."""
    if _count(len(payload)) * SECTOR_BYTES > place.slot_bytes:
        return None
    return b"".join(
        _sector(place.slot, index, place.sequence, len(payload), payload[at : at + DATA_BYTES])
        for index, at in enumerate(range(0, _count(len(payload)) * DATA_BYTES, DATA_BYTES))
    )


def encode_file(payload: bytes) -> tuple[bytes, Place]:
    """A new file with room for twice as much, and the place of the next write."""
    slot_bytes = SLOT_BYTES_MIN
    while slot_bytes < 2 * _count(len(payload)) * SECTOR_BYTES:
        slot_bytes *= 2
    place = Place(0, slot_bytes, 1)
    written = encode_slot(payload, place)
    assert written is not None
    sectors = slot_bytes // SECTOR_BYTES
    blank = [
        _sector(slot, index, 0, 0, b"")
        for slot, start in ((0, len(written) // SECTOR_BYTES), (1, 0))
        for index in range(start, sectors)
    ]
    return written + b"".join(blank), place.after()


class _Slot:
    """One slot as it was read; a sector that does not prove itself is None."""

    def __init__(self, data: bytes, slot: int) -> None:
        self.sectors = [
            _read_sector_untrusted(data[at : at + SECTOR_BYTES], slot, index)
            for index, at in enumerate(range(0, len(data), SECTOR_BYTES))
        ]
        good = (sector for sector in self.sectors if sector is not None)
        self.latest = max((sector.sequence for sector in good), default=0)

    def whole(self) -> Sector | None:
        """The first sector of its write, if all of them are there."""
        first = self.sectors[0]
        if first is None or not first.sequence:
            return None
        written = self.sectors[: _count(first.length)]
        same = all(s and s[:2] == first[:2] for s in written)
        return first if same and len(written) == _count(first.length) else None

    def payload(self) -> bytes:
        """Of a whole one."""
        first = self.sectors[0]
        assert first is not None
        data = b"".join(s.data for s in self.sectors[: _count(first.length)] if s is not None)
        return data[: first.length]

    def shows_no_later(self, sequence: int) -> bool:
        """Whether it is certain that no write above `sequence` was finished here."""
        good = [sector for sector in self.sectors[:SECTORS_MIN] if sector is not None]
        oldest = min(good, key=lambda s: s.sequence, default=None)
        if oldest is None or oldest.sequence < sequence:
            return oldest is not None
        place = self.sectors[: _count(oldest.length)]
        older = any(s is not None and s.sequence < oldest.sequence for s in place)
        return older or self.latest > oldest.sequence


def _read_sector_untrusted(data: bytes, slot: int, index: int) -> Sector | None:
    magic, version, *place, sequence, length = HEADER.unpack_from(data)
    (crc,) = _CRC.unpack_from(data, HEADER.size)
    if crc != crc32c(data[DATA_OFFSET:], crc32c(data[: HEADER.size])):
        return None
    if (magic, version, place) != (MAGIC, VERSION, [slot, index]) or length > STATE_BYTES_MAX:
        return None
    return Sector(sequence, length, data[DATA_OFFSET:])


def _other_version(data: bytes) -> str:
    magic, version = struct.unpack_from("<8sH", data.ljust(SECTOR_BYTES, b"\0"))
    other = magic == MAGIC and version != VERSION
    return f"version {version} is not known to this program" if other else ""


def decode_file_untrusted(data: bytes) -> tuple[ServerState, Place]:
    """The state that counts, and the place of the next write. Raises CorruptionError."""
    slot_bytes = len(data) // 2
    if len(data) % (2 * SECTOR_BYTES) or slot_bytes < SECTORS_MIN * SECTOR_BYTES:
        raise CorruptionError(_other_version(data) or "its length is wrong")
    slots = [_Slot(data[:slot_bytes], 0), _Slot(data[slot_bytes:], 1)]
    found = [(first.sequence, n) for n, slot in enumerate(slots) if (first := slot.whole())]
    if not found:
        raise CorruptionError(_other_version(data) or "neither of its slots is whole")
    sequence, newest = max(found)
    if len(found) < 2 and not slots[1 - newest].shows_no_later(sequence):
        raise CorruptionError("a slot is damaged which may have been the newer one")
    try:
        state = _decoder.decode(slots[newest].payload())
    except BROKEN as error:
        raise CorruptionError(f"the payload makes no sense: {error}") from error
    # Above what was left of a write that was cut short, too: two of one sequence might mix.
    highest = max(slot.latest for slot in slots)
    return state, Place(1 - newest, slot_bytes, highest + 1)
