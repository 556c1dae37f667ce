"""The journal on the disk.

A journal is a run of blocks: two pairs of headers, `ORPHAN_BLOCKS` orphan blocks, and a ring of log
blocks. The pairs are written in turn; the valid header with the higher change counter counts. Both
headers of a pair say the same: a header that rots takes nothing with it. When both of a pair are
unreadable the other pair does not count either, because it may be the older one, and the log behind
its tail may be overwritten. (A power cut leaves no such pair: what changes in a header is in its
first sector.)

Header, at 64 (kind JOURNAL_HEADER, owner: slot, change: rises with every write):

| bytes | field |
|---|---|
| 4 | state: 0 clean, 1 in use |
| 4 | length of the journal in blocks |
| 8, 8, 8 | instance that uses it: node, incarnation, number |
| 8, 8 | tail: position in the log (in blocks, never wraps), sequence of its transaction |

A transaction: n commit blocks, then the images of its items in the same order. Everything is one
vectored write; it counts when the commit blocks are whole and every image has the checksum that
they name, so nothing needs to be ordered before the flush that makes it durable.

Commit block, at 64 (kind JOURNAL_COMMIT, owner: slot, sequence: of the transaction):

| bytes | field |
|---|---|
| 2, 2 | part, parts |
| 4 | items in all parts |
| 8 | position of the transaction's first block |
| 32 each | item: block u64, generation u64, change u64, crc32c of the image u32, zero u32 |
"""

from __future__ import annotations

import contextlib
import struct

import msgspec

from cfs.attributes import BLOCK_BYTES
from cfs.errors import REMEDY, CorruptionError
from cfs.format import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    SLOTS_MAX,
    Header,
    Kind,
    block_checksum,
    open_block_untrusted,
    seal_block,
)
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId

HEADER_TURNS = 2
HEADER_COPIES = 2
HEADER_BLOCKS = HEADER_TURNS * HEADER_COPIES
ORPHAN_BLOCKS = 16
LOG_OFFSET = HEADER_BLOCKS + ORPHAN_BLOCKS
JOURNAL_BLOCKS_MIN = 128
_HEADER = struct.Struct("<IIQQQQQ")
_COMMIT = struct.Struct("<HHIQ")
_ITEM = struct.Struct("<QQQII")
ITEMS_PER_COMMIT = (BLOCK_BYTES - HEADER_BYTES - _COMMIT.size) // _ITEM.size


class JournalHeader(msgspec.Struct, frozen=True):
    """Who uses a journal, and where its first transaction that may be needed stands."""

    slot: int
    in_use: bool
    owner: Instance
    tail: int
    sequence: int
    change: int
    blocks: int


class Item(msgspec.Struct, frozen=True, gc=False):
    """One image in a transaction."""

    block: int
    generation: int
    change: int
    checksum: int


def encode_header(fs: int, header: JournalHeader, first_block: int) -> tuple[int, bytes]:
    """(block, bytes) of both copies: the pairs alternate."""
    first = first_block + header.change % HEADER_TURNS * HEADER_COPIES
    owner = header.owner
    body = _HEADER.pack(
        header.in_use, header.blocks, owner.node, owner.incarnation, owner.number, header.tail,
        header.sequence,
    )  # fmt: skip
    copies = []
    for block in range(first, first + HEADER_COPIES):
        sealed = Header(Kind.JOURNAL_HEADER, block, header.slot, 0, header.change, header.sequence)
        copies.append(seal_block(fs, sealed, body))
    return first, b"".join(copies)


def decode_header_copy_untrusted(fs: int, number: int, block: bytes) -> JournalHeader:
    """One header. Raises CorruptionError."""
    header = open_block_untrusted(fs, number, block)
    if header.kind != Kind.JOURNAL_HEADER:
        raise CorruptionError(f"block {number} is no journal header")
    state, blocks, node, incarnation, instance, tail, sequence = _HEADER.unpack_from(
        block, HEADER_BYTES
    )
    sensible = state <= 1 and blocks >= JOURNAL_BLOCKS_MIN and header.owner < SLOTS_MAX
    if not sensible or tail >> 62 or sequence >> 48 or header.change >> 62:
        raise CorruptionError(f"the journal header in block {number} makes no sense")
    owner = Instance(NodeId(node), Incarnation(incarnation), InstanceNo(instance))
    return JournalHeader(header.owner, bool(state), owner, tail, sequence, header.change, blocks)


def unreadable_copies(fs: int, first_block: int, blocks: bytes) -> list[int]:
    """The header blocks of a journal that cannot be read; if it has lost no pair, its state is
    known all the same."""
    result = []
    for index in range(HEADER_BLOCKS):
        block = blocks[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        try:
            decode_header_copy_untrusted(fs, first_block + index, block)
        except CorruptionError:
            result.append(first_block + index)
    return result


def decode_header_untrusted(fs: int, first_block: int, blocks: bytes) -> JournalHeader:
    """The header that counts. Raises CorruptionError if a pair cannot be read."""
    turns: list[JournalHeader] = []
    for turn in range(HEADER_TURNS):
        copies: list[JournalHeader] = []
        for index in range(turn * HEADER_COPIES, (turn + 1) * HEADER_COPIES):
            block = blocks[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            with contextlib.suppress(CorruptionError):
                copies.append(decode_header_copy_untrusted(fs, first_block + index, block))
        if not copies:
            raise CorruptionError(
                f"the journal at block {first_block} has lost the headers in blocks "
                f"{first_block + turn * HEADER_COPIES} and the next",
                hint=REMEDY,
            )
        turns.append(max(copies, key=lambda copy: copy.change))
    return max(turns, key=lambda copy: copy.change)


def commit_sequence(block: bytes, number: int, slot: int) -> int:
    """The sequence of what looks like a commit block of a slot's log at its place; else -1."""
    magic, kind, _, _, _, own, owner, _, _, sequence, _ = HEADER.unpack_from(block)
    fits = (magic, kind, own, owner) == (MAGIC, Kind.JOURNAL_COMMIT, number, slot)
    return int(sequence) if fits else -1


def commit_parts(items: int) -> int:
    return max(1, -(-items // ITEMS_PER_COMMIT))


def encode_commit(
    fs: int, slot: int, sequence: int, position: int, items: list[Item], blocks: list[int]
) -> list[bytes]:
    """The commit blocks; `blocks` are the device blocks they go to."""
    result = []
    for part, block in enumerate(blocks):
        chosen = items[part * ITEMS_PER_COMMIT : (part + 1) * ITEMS_PER_COMMIT]
        body = bytearray(_COMMIT.pack(part, len(blocks), len(items), position))
        for item in chosen:
            body += _ITEM.pack(item.block, item.generation, item.change, item.checksum, 0)
        header = Header(Kind.JOURNAL_COMMIT, block, slot, 0, 0, sequence)
        result.append(seal_block(fs, header, bytes(body)))
    return result


class CommitPart(msgspec.Struct, frozen=True):
    """A commit block as read."""

    part: int
    parts: int
    item_count: int
    position: int
    items: list[Item]


def decode_commit_untrusted(
    fs: int, number: int, block: bytes, slot: int, sequence: int
) -> CommitPart:
    """Raises CorruptionError if this is not a commit block of that transaction."""
    header = open_block_untrusted(fs, number, block)
    if (header.kind, header.owner, header.sequence) != (Kind.JOURNAL_COMMIT, slot, sequence):
        raise CorruptionError("the log ends here")
    part, parts, count, position = _COMMIT.unpack_from(block, HEADER_BYTES)
    if part >= parts or parts != commit_parts(count):
        raise CorruptionError("a commit block makes no sense")
    here = min(ITEMS_PER_COMMIT, count - part * ITEMS_PER_COMMIT)
    items = []
    offset = HEADER_BYTES + _COMMIT.size
    for index in range(here):
        number_, generation, change, checksum, _ = _ITEM.unpack_from(
            block, offset + index * _ITEM.size
        )
        items.append(Item(number_, generation, change, checksum))
    return CommitPart(part, parts, count, position, items)


def image_is_whole(fs: int, item: Item, image: bytes) -> Header | None:
    """The header of an image if it is the one that the item means."""
    if block_checksum(image) != item.checksum:
        return None
    try:
        header = open_block_untrusted(fs, item.block, image)
    except CorruptionError:
        return None
    return header if (header.generation, header.change) == (item.generation, item.change) else None
