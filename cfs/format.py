"""Where things are on the disk, and the header of every metadata block.

All numbers are little endian; a block has 4096 bytes. Blocks are counted from the start of the
device; a block number fits in 48 bits.

| block | what |
|---|---|
| 0..15 | left alone (boot sectors of other systems) |
| 16 | superblock |
| 17 | slot table: where the journals are |
| 18 | group block of group 0; group n > 0 has it in its first block |
| backup | copy of the superblock: last block of group 0 |

Header of a metadata block (64 bytes, `HEADER`):

| bytes | field | meaning |
|---|---|---|
| 0 | magic u32 | "CFSb" |
| 4 | kind u16 | `Kind` |
| 6 | format u16 | 1 |
| 8 | fs u32 | first 4 bytes of the file system's uuid |
| 12 | crc32c u32 | over the block with this field zero |
| 16 | block u64 | its own number: a misdirected write shows |
| 24 | owner u64 | the inode (trees), group number, or slot that it belongs to |
| 32 | generation u64 | of the allocation: rises with every allocation in the group |
| 40 | change u64 | rises by one with every transaction that changes the block |
| 48 | sequence u64 | transaction that wrote it last (48 bits), slot in the upper 16 bits |
| 56 | reserved u64 | 0 |

The version of a block is (generation, change). It only grows, whatever the block is used for, as
long as it holds metadata: that is what makes replay idempotent and free of order.
"""

from __future__ import annotations

import enum
import hashlib
import struct

import msgspec

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from native.checksum import crc32c

MAGIC = 0x62534643
FORMAT = 1
HEADER = struct.Struct("<IHHIIQQQQQQ")
HEADER_BYTES = HEADER.size
CRC_OFFSET = 12
_CRC = struct.Struct("<I")

SUPERBLOCK_BLOCK = 16
SLOT_TABLE_BLOCK = 17
FIRST_GROUP_BLOCK = 18
GROUP_BLOCKS_MAX = 15872
GROUP_BLOCKS_MIN = 256
GROUP_BLOCKS_STEP = 64
DEVICE_BLOCKS_MIN = 1024
SLOTS_MAX = 64
TOTAL_BLOCKS_END = 1 << 48

COOKIE_FIRST = 3
HASH_SHIFT = 16


class Kind(enum.IntEnum):
    """What a metadata block holds."""

    SUPERBLOCK = 1
    SLOTS = 2
    GROUP = 3
    INODE = 4
    DIRECTORY_TREE = 5
    EXTENT_TREE = 6
    ORPHANS = 7
    JOURNAL_HEADER = 8
    JOURNAL_COMMIT = 9
    XATTR_TREE = 10
    XATTR_VALUE = 11


class Feature(enum.IntFlag):
    """Incompatible features: who does not know one of a file system must not mount it."""

    UNWRITTEN = 1
    """Extents may be flagged as unwritten."""
    REPAIRING = 2
    """fsck has begun to write repairs and has not ended: no mount."""
    METADATA_ONLY = 4
    """Restored from a dump of metadata: there is no data, and names may be hashes. No mount."""


FEATURES_MADE = Feature.UNWRITTEN
"""What mkfs sets, and the first mount that knows it."""
FEATURES_KNOWN = Feature.UNWRITTEN | Feature.REPAIRING | Feature.METADATA_ONLY


class Header(msgspec.Struct, frozen=True, gc=False):
    kind: int
    block: int
    owner: int
    generation: int
    change: int
    sequence: int


def seal_block(fs: int, header: Header, body: bytes) -> bytes:
    """A whole block: header with checksum, body, zeroes."""
    block = bytearray(BLOCK_BYTES)
    HEADER.pack_into(
        block, 0, MAGIC, header.kind, FORMAT, fs, 0, header.block, header.owner,
        header.generation, header.change, header.sequence, 0,
    )  # fmt: skip
    assert len(body) <= BLOCK_BYTES - HEADER_BYTES
    block[HEADER_BYTES : HEADER_BYTES + len(body)] = body
    _CRC.pack_into(block, CRC_OFFSET, crc32c(block))
    return bytes(block)


def block_checksum(block: bytes) -> int:
    """The checksum field of a sealed block."""
    value: int = _CRC.unpack_from(block, CRC_OFFSET)[0]
    return value


def open_block_untrusted(fs: int, number: int, block: bytes) -> Header:
    """Check a block read from the disk. Raises CorruptionError naming what is wrong."""
    magic, kind, form, uuid, crc, own, owner, generation, change, sequence, _ = HEADER.unpack_from(
        block
    )
    if magic != MAGIC or form != FORMAT:
        raise CorruptionError(f"block {number} holds no metadata")
    if uuid != fs:
        raise CorruptionError(f"block {number} belongs to another file system")
    if own != number:
        raise CorruptionError(f"block {number} holds what belongs to block {own}")
    copy = bytearray(block)
    copy[CRC_OFFSET : CRC_OFFSET + 4] = b"\0\0\0\0"
    if crc32c(copy) != crc:
        raise CorruptionError(f"block {number} fails its checksum")
    return Header(kind, own, owner, generation, change, sequence)


def is_whole(fs: int, number: int, block: bytes) -> bool:
    """Whether a block is a metadata block of this file system in its place."""
    try:
        open_block_untrusted(fs, number, block)
    except CorruptionError:
        return False
    return True


_SUPER = struct.Struct("<16s64s16sIIQQQQQQq")


class Superblock(msgspec.Struct, frozen=True):
    """Body of the superblock (little endian, from byte 64).

    | bytes | field |
    |---|---|
    | 16 | uuid |
    | 64 | label, UTF-8, zero padded |
    | 16 | seed of the name hash |
    | 4, 4 | block_bytes, group_blocks |
    | 8, 8 | total_blocks, root inode |
    | 8, 8, 8 | features: compatible, read-only compatible, incompatible |
    | 8 | version: rises with every rewrite |
    | 8 | created, ns of the wall clock |
    """

    uuid: bytes
    label: str
    hash_seed: bytes
    group_blocks: int
    total_blocks: int
    root_ino: int
    version: int
    created_ns: int
    features_compatible: int = 0
    features_read_only: int = 0
    features_incompatible: int = 0

    @property
    def fs(self) -> int:
        return int.from_bytes(self.uuid[:4], "little")

    @property
    def group_count(self) -> int:
        return -(-self.total_blocks // self.group_blocks)

    @property
    def backup_block(self) -> int:
        return min(self.group_blocks, self.total_blocks) - 1

    def group_of(self, block: int) -> int:
        return block // self.group_blocks

    def group_block(self, group: int) -> int:
        """Where the group's own block is."""
        return group * self.group_blocks if group else FIRST_GROUP_BLOCK

    def group_length(self, group: int) -> int:
        return min(self.group_blocks, self.total_blocks - group * self.group_blocks)

    def name_hash(self, name: bytes) -> int:
        """47 bits."""
        digest = hashlib.blake2b(name, digest_size=8, key=self.hash_seed).digest()
        return int.from_bytes(digest, "little") >> 17

    def encode(self, block: int) -> bytes:
        body = _SUPER.pack(
            self.uuid, self.label.encode(), self.hash_seed, BLOCK_BYTES, self.group_blocks,
            self.total_blocks, self.root_ino, self.features_compatible,
            self.features_read_only, self.features_incompatible, self.version, self.created_ns,
        )  # fmt: skip
        header = Header(Kind.SUPERBLOCK, block, 0, 0, self.version, 0)
        return seal_block(self.fs, header, body)


def decode_superblock_untrusted(number: int, block: bytes) -> Superblock:
    """Raises CorruptionError if this is no superblock of a format that this code knows."""
    fields = _SUPER.unpack_from(block, HEADER_BYTES)
    header = open_block_untrusted(int.from_bytes(fields[0][:4], "little"), number, block)
    if header.kind != Kind.SUPERBLOCK:
        raise CorruptionError(f"block {number} is no superblock")
    found = Superblock(
        uuid=fields[0],
        label=fields[1].rstrip(b"\0").decode(errors="replace"),
        hash_seed=fields[2],
        group_blocks=fields[4],
        total_blocks=fields[5],
        root_ino=fields[6],
        features_compatible=fields[7],
        features_read_only=fields[8],
        features_incompatible=fields[9],
        version=fields[10],
        created_ns=fields[11],
    )
    if fields[3] != BLOCK_BYTES or found.features_incompatible & ~FEATURES_KNOWN:
        raise CorruptionError("this file system uses features that this version does not know")
    size = found.group_blocks
    if not GROUP_BLOCKS_MIN <= size <= GROUP_BLOCKS_MAX or size % GROUP_BLOCKS_STEP:
        raise CorruptionError("the superblock makes no sense: group size")
    if not found.group_blocks <= found.total_blocks < TOTAL_BLOCKS_END:
        raise CorruptionError("the superblock makes no sense: number of blocks")
    if not FIRST_GROUP_BLOCK < found.root_ino < found.total_blocks:
        raise CorruptionError("the superblock makes no sense: root directory")
    return found
