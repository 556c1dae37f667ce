"""Dumps of metadata for support: structure without data (docs/formats/metadump.md).

What is private is taken out before it is written: the bytes of small files, targets of symbolic
links, values of extended attributes (not access control lists, which fsck judges and which say no
more than owners and modes do), and, if asked, names. Blocks that are whole get a checksum
that fits again; damaged ones stay damaged, cut down to the part that holds no content.
"""

from __future__ import annotations

import hashlib
import stat
import struct
import zlib
from collections.abc import AsyncIterator, Callable

import msgspec

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    SLOT_TABLE_BLOCK,
    SUPERBLOCK_BLOCK,
    Feature,
    Header,
    Kind,
    Superblock,
    block_checksum,
    decode_superblock_untrusted,
    open_block_untrusted,
    seal_block,
)
from cfs.fsck.salvage import is_name, salvage_group
from cfs.journal_format import (
    HEADER_BLOCKS,
    ITEMS_PER_COMMIT,
    LOG_OFFSET,
    commit_sequence,
    decode_commit_untrusted,
    decode_header_untrusted,
    encode_commit,
)
from cfs.nodes import (
    CONTENT_OFFSET,
    TREE_OFFSET,
    BlockState,
    InodeNode,
    Node,
    SlotsNode,
    Tree,
    TreeNode,
    ValueNode,
    Xattr,
    decode_node_untrusted,
)
from cfs.stage import read_superblock
from cluster.device import BlockDevice
from native.checksum import crc32c

DUMP_MAGIC = b"CFSMETA1"
DUMP_VERSION = 1
DUMP_HEADER = struct.Struct("<8sIIIIQQ16sII")
RECORD = struct.Struct("<QIII")
END = (1 << 64) - 1
NAMES_HASHED = 1
PIECE_BLOCKS_MAX = 256
RECORD_BYTES_MAX = 2 * PIECE_BLOCKS_MAX * BLOCK_BYTES
Piece = tuple[int, bytes]
"""First block, bytes of one or more blocks."""


class Cleaner:
    """Takes what is private out of blocks. `key`: names are hashed with it; b"" leaves them."""

    def __init__(self, superblock: Superblock, key: bytes) -> None:
        self.superblock = superblock
        self.fs = superblock.fs
        self.key = key

    def clean(self, number: int, block: bytes) -> bytes:
        """The block as it may be given away."""
        if not any(block):
            return block
        try:
            header = open_block_untrusted(self.fs, number, block)
        except CorruptionError:
            return self._damaged(block)
        if header.kind == Kind.SUPERBLOCK:
            return self._superblock(number, block)
        if header.kind in (Kind.GROUP, Kind.SLOTS, Kind.ORPHANS, Kind.JOURNAL_HEADER):
            return block
        try:
            node = decode_node_untrusted(header, block)
            self._node(node)
            return node.encode(self.fs, header.sequence)
        except CorruptionError:
            return self._senseless(header, block)

    def _superblock(self, number: int, block: bytes) -> bytes:
        found = decode_superblock_untrusted(number, block)
        features = found.features_incompatible | Feature.METADATA_ONLY
        seed = bytes(16) if self.key else found.hash_seed
        new = msgspec.structs.replace(found, features_incompatible=int(features), hash_seed=seed)
        return new.encode(number)

    @staticmethod
    def _content_from(kind: int) -> int:
        """Where content may begin in a block of a kind."""
        if kind == Kind.INODE:
            return CONTENT_OFFSET
        if kind in (Kind.DIRECTORY_TREE, Kind.XATTR_TREE):
            return TREE_OFFSET
        known = (Kind.GROUP, Kind.SLOTS, Kind.ORPHANS, Kind.EXTENT_TREE, Kind.SUPERBLOCK)
        return BLOCK_BYTES if kind in (*known, Kind.JOURNAL_HEADER) else HEADER_BYTES

    def _damaged(self, block: bytes) -> bytes:
        """A block that fails its checksum, still failing it: no content, whatever it may be."""
        magic, kind = HEADER.unpack_from(block)[:2]
        keep = self._content_from(kind) if magic == MAGIC else 0
        return block[:keep].ljust(BLOCK_BYTES, b"\0")

    def _senseless(self, header: Header, block: bytes) -> bytes:
        """Whole, but it cannot be parsed: no content, and whole again."""
        keep = self._content_from(header.kind)
        return seal_block(self.fs, header, block[HEADER_BYTES:keep])

    def _node(self, node: Node) -> None:
        """Change a node in place."""
        if isinstance(node, InodeNode):
            filler = b"-" if stat.S_ISLNK(node.mode) else b"\0"
            node.data = filler * len(node.data)
            for tree in (node.root, node.xattrs):
                if tree is not None:
                    self._tree(tree)
        elif isinstance(node, TreeNode):
            self._tree(node.tree)
        elif isinstance(node, ValueNode):
            node.data = bytes(len(node.data))

    def _tree(self, tree: Tree) -> None:
        for position, value in enumerate(tree.values):
            if isinstance(value, Xattr):
                prefix, dot, rest = value.name.partition(b".")
                known = prefix == b"system"
                name = value.name if known else prefix + dot + self._hashed(rest)
                kept = value.value if known else bytes(len(value.value))
                tree.values[position] = Xattr(name, value.size, kept, value.blocks)
            elif is_name(value):
                tree.values[position] = (value[0], value[1], self._hashed(value[2]))

    def _hashed(self, name: bytes) -> bytes:
        """A name of the same length."""
        if not self.key or not name:
            return name
        text = hashlib.blake2b(name, key=self.key).hexdigest().encode()
        return (text * (len(name) // len(text) + 1))[: len(name)]


class Dumper:
    """Reads the metadata of one file system."""

    def __init__(self, device: BlockDevice, superblock: Superblock, key: bytes) -> None:
        self.device = device
        self.superblock = superblock
        self.cleaner = Cleaner(superblock, key)
        self.journals: list[tuple[int, int]] = []

    async def pieces(self) -> AsyncIterator[Piece]:
        """All metadata, cleaned, in the order of its blocks (the journals' logs at the end)."""
        await self._read_slots()
        for group in range(self.superblock.group_count):
            wanted = await self._blocks_of(group)
            for first, count in _runs(wanted):
                data = await self._read(first, count)
                parts = [
                    self.cleaner.clean(first + index, _slice(data, index)) for index in range(count)
                ]
                yield first, b"".join(parts)
        for slot, place in enumerate(self.journals):
            async for piece in self._log(slot, place):
                yield piece

    async def _read(self, first: int, count: int) -> bytes:
        return await self.device.read(first * BLOCK_BYTES, count * BLOCK_BYTES)

    async def _read_slots(self) -> None:
        data = await self._read(SLOT_TABLE_BLOCK, 1)
        try:
            header = open_block_untrusted(self.superblock.fs, SLOT_TABLE_BLOCK, data)
            node = decode_node_untrusted(header, data)
        except CorruptionError:
            return
        total = self.superblock.total_blocks
        if isinstance(node, SlotsNode):
            places = node.journals
            self.journals = [(f, n) for f, n in places if f + n <= total and n > LOG_OFFSET]

    async def _blocks_of(self, group: int) -> list[int]:
        """The metadata of a group, without the logs."""
        superblock = self.superblock
        base, length = group * superblock.group_blocks, superblock.group_length(group)
        own = superblock.group_block(group)
        data = await self._read(own, 1)
        node = salvage_group(superblock.fs, own, group, length, data)
        wanted = {own}
        if not group:
            wanted |= {SUPERBLOCK_BLOCK, SLOT_TABLE_BLOCK, superblock.backup_block}
        if node is not None:
            states = node.states
            wanted |= {base + i for i in range(len(states)) if states[i] == BlockState.META}
        else:
            wanted |= await self._looking_like_metadata(base, length)
        for first, count in self.journals:
            wanted.difference_update(range(first + LOG_OFFSET, first + count))
        return sorted(wanted)

    async def _looking_like_metadata(self, base: int, length: int) -> set[int]:
        """Without a map: whole blocks of this file system that are where they say."""
        found = set()
        for start in range(0, length, PIECE_BLOCKS_MAX):
            count = min(PIECE_BLOCKS_MAX, length - start)
            data = await self._read(base + start, count)
            for index in range(count):
                number = base + start + index
                magic, _, _, fs, _, own = HEADER.unpack_from(data, index * BLOCK_BYTES)[:6]
                if (magic, fs, own) == (MAGIC, self.superblock.fs, number):
                    found.add(number)
        return found

    async def _log(self, slot: int, place: tuple[int, int]) -> AsyncIterator[Piece]:
        """What the log of a journal holds that is not closed: its transactions, with checksums of
        the cleaned images."""
        first, length = place
        heads = await self._read(first, HEADER_BLOCKS)
        try:
            if not decode_header_untrusted(self.superblock.fs, first, heads).in_use:
                return
        except CorruptionError:
            pass
        size = length - LOG_OFFSET
        start = first + LOG_OFFSET
        log = b"".join(
            [
                await self._read(start + at, min(PIECE_BLOCKS_MAX, size - at))
                for at in range(0, size, PIECE_BLOCKS_MAX)
            ]
        )
        for position in range(size):
            block = _slice(log, position)
            sequence = commit_sequence(block, start + position, slot)
            if sequence >= 0:
                for piece in self._part(slot, start, log, position, sequence):
                    yield piece

    def _part(self, slot: int, start: int, log: bytes, position: int, sequence: int) -> list[Piece]:
        """One commit block and the images that it lists."""
        fs, size = self.superblock.fs, len(log) // BLOCK_BYTES
        number = start + position
        try:
            part = decode_commit_untrusted(fs, number, _slice(log, position), slot, sequence)
        except CorruptionError:
            return [(number, self.cleaner.clean(number, _slice(log, position)))]
        items = []
        pieces: list[Piece] = []
        at = position - part.part + part.parts + part.part * ITEMS_PER_COMMIT
        for index, item in enumerate(part.items):
            place = (at + index) % size
            image = self.cleaner.clean(item.block, _slice(log, place))
            whole = block_checksum(_slice(log, place)) == item.checksum
            checksum = block_checksum(image) if whole else item.checksum
            items.append(msgspec.structs.replace(item, checksum=checksum))
            pieces.append((start + place, image))
        blank = [part.items[0]] * (part.part * ITEMS_PER_COMMIT)
        rest = part.item_count - len(blank) - len(items)
        every = [*blank, *items, *[part.items[0]] * rest] if part.items else []
        places = [number] * part.parts
        commits = encode_commit(fs, slot, sequence, part.position, every, places)
        return [*pieces, (number, commits[part.part])]


def _slice(data: bytes, index: int) -> bytes:
    return data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]


def _runs(blocks: list[int]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for block in blocks:
        if result:
            first, count = result[-1]
            if block == first + count and count < PIECE_BLOCKS_MAX:
                result[-1] = (first, count + 1)
                continue
        result.append((block, 1))
    return result


async def dump(
    device: BlockDevice, key: bytes, put: Callable[[bytes], object], show: Callable[[int], None]
) -> int:
    """Write a dump piece by piece through `put`; how many blocks it has. `key`: hash names with
    it, b"" to keep them. Raises CorruptionError if there is no superblock."""
    superblock = await read_superblock(device)
    flags = NAMES_HASHED if key else 0
    head = DUMP_HEADER.pack(
        DUMP_MAGIC, DUMP_VERSION, flags, BLOCK_BYTES, 0, device.size_bytes // BLOCK_BYTES,
        superblock.total_blocks, superblock.uuid, 0, 0,
    )  # fmt: skip
    put(head[:-8] + struct.pack("<II", crc32c(head[:-8]), 0))
    records = blocks = 0
    async for first, data in Dumper(device, superblock, key).pieces():
        count = len(data) // BLOCK_BYTES
        packed = zlib.compress(data)
        put(RECORD.pack(first, count, len(packed), crc32c(packed)) + packed)
        records += 1
        blocks += count
        show(blocks)
    put(RECORD.pack(END, records, 0, 0))
    return blocks


class DumpInfo(msgspec.Struct, frozen=True):
    """The header of a dump."""

    device_blocks: int
    total_blocks: int
    uuid: bytes
    names_hashed: bool


def read_header_untrusted(data: bytes) -> DumpInfo:
    """Raises CorruptionError if this is no dump."""
    if len(data) != DUMP_HEADER.size:
        raise CorruptionError("the dump is cut short")
    magic, version, flags, size, _, device, total, uuid, crc, _ = DUMP_HEADER.unpack(data)
    if magic != DUMP_MAGIC or crc32c(data[:-8]) != crc:
        raise CorruptionError("this is no dump of cfs metadata")
    if version != DUMP_VERSION or size != BLOCK_BYTES or not total <= device < 1 << 48:
        raise CorruptionError("a dump of a version that is not known here")
    return DumpInfo(device, total, uuid, bool(flags & NAMES_HASHED))


def read_record_untrusted(info: DumpInfo, take: Callable[[int], bytes]) -> tuple[int, bytes] | None:
    """(first block, bytes) of the next record, None at the end. `take` gives that many bytes, less
    at the end of the file. Raises CorruptionError."""
    head = take(RECORD.size)
    if len(head) != RECORD.size:
        raise CorruptionError("the dump is cut short")
    first, count, length, crc = RECORD.unpack(head)
    if first == END:
        return None
    fits = first + count <= info.device_blocks and 0 < count <= PIECE_BLOCKS_MAX
    if not fits or length > RECORD_BYTES_MAX:
        raise CorruptionError("a record of the dump makes no sense")
    packed = take(length)
    if len(packed) != length or crc32c(packed) != crc:
        raise CorruptionError("a record of the dump is damaged")
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(packed, count * BLOCK_BYTES + 1)
    except zlib.error as error:
        raise CorruptionError("a record of the dump is damaged") from error
    if len(data) != count * BLOCK_BYTES:
        raise CorruptionError("a record of the dump has another length than it says")
    return first, data
