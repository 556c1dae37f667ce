"""Metadata of volume groups and its form on the PVs. Pure.

Every PV of a VG carries a label, two slots of VG metadata that are written in turn (slot =
sequence modulo 2), and a ring of the last 20 versions. The metadata is JSON text with LVM's
structure: PVs with extents, LVs with segments of extents. All integers little endian.

| offset | size | what |
|---|---|---|
| 0 | 4096 | label |
| 524288 | 524288 | slot 0 (even sequence numbers) |
| 1048576 | 524288 | slot 1 (odd sequence numbers) |
| 1572864 | 20 x 131072 | archive: cell = sequence modulo 20, same form as a slot |
| 4194304 | | data: extents |

Label:

| offset | size | field |
|---|---|---|
| 0 | 8 | magic "CVM-PV01" |
| 8 | 4 | CRC32C of the 4096 bytes with this field zero |
| 12 | 4 | version (1) |
| 16 | 16 | PV uuid |
| 32 | 16 | cluster id |
| 48 | 8 | size of the device |
| 56 | 8 | offset of the data |
| 64 | 8 | offset of slot 0 |
| 72 | 8 | size of a slot |
| 80 | 8 | offset of the archive |
| 88 | 8 | size of an archive cell |
| 96 | 4 | number of archive cells |
| 100 | 2 | length of the name |
| 102 | 255 | name at creation, UTF-8 (a hint only) |
| 357 | 3739 | zero |

Slot and archive cell:

| offset | size | field |
|---|---|---|
| 0 | 8 | magic "CVM-VG01" |
| 8 | 4 | CRC32C of the 512 bytes of the header with this field zero |
| 12 | 4 | version (1) |
| 16 | 8 | sequence |
| 24 | 8 | offset of this slot on the PV (a misdirected write shows) |
| 32 | 16 | PV uuid (a copied disk shows) |
| 48 | 16 | VG uuid |
| 64 | 4 | encoding of the body: 0 JSON, 1 JSON compressed with zlib |
| 68 | 4 | length of the body |
| 72 | 4 | CRC32C of the body |
| 76 | 436 | zero |
| 512 | n | body, then zeroes up to a multiple of 4096 |

Which sequence counts is said by the register, with a checksum of the text: a slot that carries that
sequence but another text is the rest of a change that was never committed.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib

import msgspec

from cluster.control import ServerInfo
from cluster.decoding import BROKEN
from cluster.errors import CorruptionError, StackError, UsageError
from cluster.ids import ServerId
from cvm.layout import Leg, Segment, Stripe, VolumeMap
from native import crc32c

LABEL_BYTES = 4096
SLOT_COUNT = 2
SLOT_OFFSET_BYTES = 512 * 1024
SLOT_BYTES = 512 * 1024
ARCHIVE_OFFSET_BYTES = SLOT_OFFSET_BYTES + SLOT_COUNT * SLOT_BYTES
ARCHIVE_CELLS = 20
ARCHIVE_CELL_BYTES = 128 * 1024
DATA_OFFSET_BYTES = 4 * 1024 * 1024
EXTENT_BYTES_DEFAULT = 4 * 1024 * 1024
PVS_MAX = 256
LVS_MAX = 1024
TEXT_BYTES_MAX = 64 << 20
NAME_BYTES_MAX = 127

assert ARCHIVE_OFFSET_BYTES + ARCHIVE_CELLS * ARCHIVE_CELL_BYTES == DATA_OFFSET_BYTES

_LABEL = struct.Struct("<8sII16s16sQQQQQQIH")
_LABEL_MAGIC = b"CVM-PV01"
_SLOT = struct.Struct("<8sIIQQ16s16sIII")
_SLOT_MAGIC = b"CVM-VG01"
_SLOT_HEADER_BYTES = 512
_VERSION = 1
_ALIGN_BYTES = 4096
_NAME = re.compile(r"^[A-Za-z0-9+_.][A-Za-z0-9+_.-]*$")
_RESERVED_NAMES = ("snapshot", "pvmove")

assert _LABEL.size == 102
assert _SLOT.size == 76


class PvRecord(msgspec.Struct, frozen=True):
    """A PV inside a VG. `freed_sequence`: the newest change that freed extents here;
    `minimum_sequence`: what its server has been told to require since."""

    name: str
    uuid: str
    server: ServerId
    export: str
    device_bytes: int
    data_offset_bytes: int
    extent_count: int
    freed_sequence: int = 0
    minimum_sequence: int = 0


class LegRecord(msgspec.Struct, frozen=True):
    """Extents of one PV, from `start_extent`."""

    pv: str
    start_extent: int
    state: str = "in_sync"


class SegmentRecord(msgspec.Struct, frozen=True):
    """`extent_count` extents of the LV from `start_extent`: stripes, each with its legs."""

    start_extent: int
    extent_count: int
    stripe_bytes: int
    stripes: tuple[tuple[LegRecord, ...], ...]

    @property
    def leg_extents(self) -> int:
        return self.extent_count // len(self.stripes)


class LvRecord(msgspec.Struct, frozen=True):
    name: str
    uuid: str
    segments: tuple[SegmentRecord, ...]
    generation: int = 0
    created_sequence: int = 0
    created_on: str = ""

    @property
    def extent_count(self) -> int:
        return sum(segment.extent_count for segment in self.segments)

    @property
    def stripe_count(self) -> int:
        return max(len(segment.stripes) for segment in self.segments)


class VgRecord(msgspec.Struct, frozen=True):
    """A volume group: the whole text of a slot."""

    name: str
    uuid: str
    sequence: int
    extent_bytes: int
    pvs: tuple[PvRecord, ...]
    lvs: tuple[LvRecord, ...] = ()
    description: str = ""
    written_on: str = ""
    format: int = 1

    def pv(self, name: str) -> PvRecord | None:
        return next((pv for pv in self.pvs if pv.name == name), None)

    def lv(self, name: str) -> LvRecord | None:
        return next((lv for lv in self.lvs if lv.name == name), None)


class PvLabel(msgspec.Struct, frozen=True):
    uuid: str
    cluster_id: str
    device_bytes: int
    data_offset_bytes: int
    name: str


class SlotContent(msgspec.Struct, frozen=True):
    """A slot whose checksums hold."""

    sequence: int
    pv_uuid: str
    vg_uuid: str
    text: bytes


def check_name(kind: str, name: str) -> None:
    """LVM's rules for names of VGs and LVs. Raises UsageError."""
    if (
        not _NAME.match(name)
        or len(name) > NAME_BYTES_MAX
        or name in (".", "..")
        or name.startswith(_RESERVED_NAMES)
    ):
        raise UsageError(
            f'{kind} name "{name}" is invalid.',
            hint="names have letters, digits, + _ . and - (not first), at most 127",
        )


def text_checksum(text: bytes) -> str:
    """What the register stores about a text, so that a sequence number names one text only."""
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def encode_text(vg: VgRecord) -> bytes:
    """The metadata as JSON text, readable by people."""
    return msgspec.json.format(msgspec.json.encode(vg), indent=1) + b"\n"


def decode_text_untrusted(text: bytes) -> VgRecord:
    """The inverse of `encode_text`, checked. Raises CorruptionError."""
    try:
        vg = msgspec.json.decode(text, type=VgRecord)
    except BROKEN as error:
        raise CorruptionError(f"volume group metadata is damaged: {error}") from error
    check_vg(vg)
    return vg


def check_vg(vg: VgRecord) -> None:
    """Raise CorruptionError unless names are unique and extents lie apart and on their PVs."""

    def require(condition: bool, text: str) -> None:
        if not condition:
            raise CorruptionError(f"volume group {vg.name}: {text}")

    require(vg.format == 1, f"format {vg.format} is not known")
    require(vg.extent_bytes >= 4096 and vg.extent_bytes & (vg.extent_bytes - 1) == 0, "extent size")
    require(len({pv.name for pv in vg.pvs}) == len(vg.pvs), "two PVs of the same name")
    require(len({lv.name for lv in vg.lvs}) == len(vg.lvs), "two LVs of the same name")
    require(len(vg.pvs) <= PVS_MAX and len(vg.lvs) <= LVS_MAX, "too many PVs or LVs")
    used: dict[str, list[tuple[int, int, str]]] = {pv.name: [] for pv in vg.pvs}
    for lv in vg.lvs:
        position = 0
        for segment in lv.segments:
            count = len(segment.stripes)
            require(segment.start_extent == position, f"{lv.name}: gap between segments")
            require(count >= 1 and segment.extent_count > 0, f"{lv.name}: empty segment")
            require(segment.extent_count % count == 0, f"{lv.name}: partial stripe")
            unit = segment.stripe_bytes
            require(unit > 0 and vg.extent_bytes % unit == 0, f"{lv.name}: stripe unit {unit}")
            for leg in (leg for stripe in segment.stripes for leg in stripe):
                require(leg.pv in used, f"{lv.name}: unknown PV {leg.pv}")
                end = leg.start_extent + segment.leg_extents
                used[leg.pv].append((leg.start_extent, end, lv.name))
            position += segment.extent_count
    for pv in vg.pvs:
        position = 0
        for start, end, name in sorted(used[pv.name]):
            require(start >= position, f"{name}: extents of {pv.name} are used twice")
            position = end
        require(position <= pv.extent_count, f"extents beyond the end of {pv.name}")


# --- the form on the PV ------------------------------------------------------------------------


def _uuid_bytes(uuid: str) -> bytes:
    raw = bytes.fromhex(uuid)
    assert len(raw) == 16, f"uuid {uuid} is not 128 bits"
    return raw


def extents_of_device(device_bytes: int, extent_bytes: int) -> int:
    """How many extents a PV of this size has."""
    return max(0, device_bytes - DATA_OFFSET_BYTES) // extent_bytes


def encode_label(label: PvLabel) -> bytes:
    """The label block of a PV."""
    name = label.name.encode()[:255]
    body = bytearray(LABEL_BYTES)
    _LABEL.pack_into(
        body, 0, _LABEL_MAGIC, 0, _VERSION, _uuid_bytes(label.uuid), _uuid_bytes(label.cluster_id),
        label.device_bytes, label.data_offset_bytes, SLOT_OFFSET_BYTES, SLOT_BYTES,
        ARCHIVE_OFFSET_BYTES, ARCHIVE_CELL_BYTES, ARCHIVE_CELLS, len(name),
    )  # fmt: skip
    body[_LABEL.size : _LABEL.size + len(name)] = name
    struct.pack_into("<I", body, 8, crc32c(body))
    return bytes(body)


def _check_crc(data: bytes, what: str) -> None:
    """Check the CRC32C at byte 8 of `data`, computed with that field zero."""
    stored = int(struct.unpack_from("<I", data, 8)[0])
    if crc32c(data[:8] + bytes(4) + data[12:]) != stored:
        raise CorruptionError(f"{what} fails its checksum")


def decode_label_untrusted(data: bytes) -> PvLabel | None:
    """The label, or None when the block is not one. Raises CorruptionError if it is damaged."""
    if len(data) < LABEL_BYTES or data[:8] != _LABEL_MAGIC:
        return None
    data = data[:LABEL_BYTES]
    _check_crc(data, "PV label")
    fields = _LABEL.unpack_from(data)
    if fields[2] != _VERSION:
        raise CorruptionError(f"PV label of version {fields[2]} is not known")
    if fields[6:12] != (
        DATA_OFFSET_BYTES, SLOT_OFFSET_BYTES, SLOT_BYTES,
        ARCHIVE_OFFSET_BYTES, ARCHIVE_CELL_BYTES, ARCHIVE_CELLS,
    ):  # fmt: skip
        raise CorruptionError("PV label names areas that this version does not use")
    name = data[_LABEL.size : _LABEL.size + min(fields[12], 255)]
    return PvLabel(
        uuid=fields[3].hex(),
        cluster_id=fields[4].hex(),
        device_bytes=fields[5],
        data_offset_bytes=fields[6],
        name=name.decode(errors="replace"),
    )


def is_label_of(uuid: str, head: bytes) -> bool:
    """Whether a device that begins with `head` is this PV; its label may be damaged."""
    return head[:8] == _LABEL_MAGIC and head[16:32].hex() == uuid


def slot_offset(sequence: int) -> int:
    """Where on a PV the metadata of this sequence number stands."""
    return SLOT_OFFSET_BYTES + sequence % SLOT_COUNT * SLOT_BYTES


def archive_offset(sequence: int) -> int:
    """Where on a PV the archived metadata of this sequence number stands."""
    return ARCHIVE_OFFSET_BYTES + sequence % ARCHIVE_CELLS * ARCHIVE_CELL_BYTES


def encode_slot(content: SlotContent, offset_bytes: int, room_bytes: int = SLOT_BYTES) -> bytes:
    """Header and body of a slot or archive cell, padded to 4096. Raises StackError if too long."""
    encoding, body = 0, content.text
    if _SLOT_HEADER_BYTES + len(body) > room_bytes:
        encoding, body = 1, zlib.compress(content.text, 9)
    if _SLOT_HEADER_BYTES + len(body) > room_bytes:
        raise StackError(
            f"metadata of {len(content.text)} bytes does not fit into its area",
            hint="use fewer or less fragmented logical volumes",
        )
    whole = bytearray(-(-(_SLOT_HEADER_BYTES + len(body)) // _ALIGN_BYTES) * _ALIGN_BYTES)
    _SLOT.pack_into(
        whole, 0, _SLOT_MAGIC, 0, _VERSION, content.sequence, offset_bytes,
        _uuid_bytes(content.pv_uuid), _uuid_bytes(content.vg_uuid), encoding, len(body),
        crc32c(body),
    )  # fmt: skip
    struct.pack_into("<I", whole, 8, crc32c(whole[:_SLOT_HEADER_BYTES]))
    whole[_SLOT_HEADER_BYTES : _SLOT_HEADER_BYTES + len(body)] = body
    return bytes(whole)


def decode_slot_untrusted(data: bytes, offset_bytes: int) -> SlotContent | None:
    """What a slot holds, or None when it was never written. Raises CorruptionError if torn."""
    if len(data) < _SLOT_HEADER_BYTES or data[:8] != _SLOT_MAGIC:
        return None
    _check_crc(data[:_SLOT_HEADER_BYTES], "metadata header")
    fields = _SLOT.unpack_from(data)
    _, _, version, sequence, stored_offset, pv_uuid, vg_uuid, encoding, length, checksum = fields
    if version != _VERSION or encoding not in (0, 1):
        raise CorruptionError(f"metadata of version {version}.{encoding} is not known")
    if stored_offset != offset_bytes:
        raise CorruptionError("metadata was written to a wrong place")
    body = data[_SLOT_HEADER_BYTES : _SLOT_HEADER_BYTES + length]
    if len(body) != length or crc32c(body) != checksum:
        raise CorruptionError(f"metadata {sequence} is torn")
    if encoding == 1:
        inflater = zlib.decompressobj()
        try:
            body = inflater.decompress(body, TEXT_BYTES_MAX)
        except zlib.error as error:
            raise CorruptionError(f"metadata {sequence} does not decompress") from error
        if not inflater.eof:
            raise CorruptionError(f"metadata {sequence} does not decompress")
    return SlotContent(sequence, pv_uuid.hex(), vg_uuid.hex(), body)


# --- from records to maps ----------------------------------------------------------------------


def build_map(
    vg: VgRecord, lv: LvRecord, servers: tuple[ServerInfo, ...] = (), claim: int = 0
) -> VolumeMap:
    """The map of a logical volume at the sequence number of its VG."""
    pvs = {pv.name: pv for pv in vg.pvs}

    def leg(record: LegRecord) -> Leg:
        pv = pvs[record.pv]
        offset = pv.data_offset_bytes + record.start_extent * vg.extent_bytes
        return Leg(pv.name, pv.server, pv.export, offset, record.state, pv.uuid)

    segments = tuple(
        Segment(
            start_bytes=segment.start_extent * vg.extent_bytes,
            length_bytes=segment.extent_count * vg.extent_bytes,
            stripe_bytes=segment.stripe_bytes,
            stripes=tuple(
                Stripe(tuple(leg(record) for record in stripe)) for stripe in segment.stripes
            ),
        )
        for segment in lv.segments
    )
    used = {pvs[leg.pv].server for one in lv.segments for stripe in one.stripes for leg in stripe}
    return VolumeMap(
        name=lv.name,
        uuid=lv.uuid,
        vg=vg.name,
        sequence=vg.sequence,
        size_bytes=lv.extent_count * vg.extent_bytes,
        segments=segments,
        generation=lv.generation,
        servers=tuple(server for server in servers if server.id in used),
        claim=claim,
    )
