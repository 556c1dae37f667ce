"""Replay of a journal whose owner is gone.

An item is applied if its version is newer than that of the block on the disk. That is idempotent
and needs no order among journals, as long as a block holds metadata. Freed blocks are what versions
cannot protect, so the maps decide: first the journal's own maps are brought up to date, then an
item is applied only to a block that the map calls META (or FREEING, if metadata is still in it:
its next user may have begun to write there, and the map that says so need not be in place).

Why the map on the disk is enough, without its lock:
* A block leaves META by a map that is in its place and flushed before the block is used for data
  (`cfs.space`), so a stale item meets a map that says so.
* An inode's lock goes to another mount only after the maps of its blocks are in place
  (`Journal.checkpoint` writes everything), so a live item meets META, or its map stands in the same
  journal.
* A map that says META again is in place only after new metadata is in that block (rule 3 of
  `cfs.journal`), whose generation is higher.
* While a dead mount is recovered no block goes from FREEING to another use.

Blocks of journals are never replayed into, except orphan lists by orphan lists.
"""

from __future__ import annotations

import msgspec

from cfs import journal_format
from cfs.attributes import BLOCK_BYTES
from cfs.errors import REMEDY, CorruptionError
from cfs.format import (
    SLOT_TABLE_BLOCK,
    Header,
    Kind,
    Superblock,
    is_whole,
    open_block_untrusted,
)
from cfs.journal import joined
from cfs.journal_format import (
    HEADER_BLOCKS,
    LOG_OFFSET,
    ORPHAN_BLOCKS,
    Item,
    JournalHeader,
    commit_parts,
    commit_sequence,
    decode_commit_untrusted,
    decode_header_untrusted,
    image_is_whole,
    unreadable_copies,
)
from cfs.nodes import BlockState, GroupNode, SlotsNode, decode_node_untrusted
from cluster.device import BlockDevice, Buffer

SEQUENCE_GAP = 1024
"""A replayed journal goes on so much later: what a torn transaction left never fits."""
READ_BLOCKS_MAX = 256
TRANSACTION_SHARE = 4
TRANSACTION_SLACK = 256
"""A transaction takes at most a quarter of the log and what one operation adds (`Journal`)."""

Image = tuple[Header, bytes]


class Replayed(msgspec.Struct, frozen=True):
    """What a replay did."""

    slot: int
    transactions: int
    applied: int
    skipped: int


class LogReader:
    """Reads a ring of log blocks, many at a time."""

    def __init__(self, device: BlockDevice, first_block: int, blocks: int) -> None:
        self._device = device
        self._first = first_block + LOG_OFFSET
        self._count = blocks - LOG_OFFSET
        self._cache: dict[int, bytes] = {}

    @property
    def length(self) -> int:
        return self._count

    def number(self, position: int) -> int:
        return self._first + position % self._count

    async def read(self, position: int, ahead: int = READ_BLOCKS_MAX) -> bytes:
        block = self.number(position)
        found = self._cache.get(block)
        if found is not None:
            return found
        self._cache.clear()
        count = min(ahead, self._first + self._count - block)
        data = await self._device.read(block * BLOCK_BYTES, count * BLOCK_BYTES)
        for index in range(count):
            self._cache[block + index] = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        return self._cache[block]


async def read_log(
    fs: int, log: LogReader, header: JournalHeader
) -> tuple[dict[int, Image], int, int]:
    """The newest image of each block in the log: (images, head position, transactions). Raises
    CorruptionError if a transaction in the middle cannot be read: what was acknowledged after it
    would be lost."""
    images: dict[int, Image] = {}
    position, sequence = header.tail, header.sequence
    count = 0
    while position - header.tail < log.length:
        found = await _read_transaction(fs, log, header.slot, position, sequence)
        if found is None:
            break
        length, items = found
        if position + length - header.tail > log.length:
            break
        for image_header, image in items:
            known = images.get(image_header.block)
            if known is None or _version(known[0]) <= _version(image_header):
                images[image_header.block] = (image_header, image)
        position += length
        sequence += 1
        count += 1
    await _need_end(fs, log, header, position, sequence)
    return images, position, count


async def _need_end(
    fs: int, log: LogReader, header: JournalHeader, position: int, sequence: int
) -> None:
    """Raises CorruptionError if the log goes on behind `position`: a transaction is written only
    when the one before it is durable, so if a later one is there, this one was whole. (Of the last
    one nobody can tell whether it rotted or was never written to the end.)"""
    reach = log.length // TRANSACTION_SHARE + TRANSACTION_SLACK
    for at in range(position + 1, min(header.tail + log.length, position + reach)):
        block, number = await log.read(at), log.number(at)
        if commit_sequence(block, number, header.slot) <= sequence:
            continue
        if is_whole(fs, number, block):
            raise CorruptionError(
                f"block {log.number(position)} of journal {header.slot} is damaged: transaction "
                f"{sequence} cannot be read, a later one is there",
                hint=REMEDY,
                block=log.number(position),
            )


async def _read_transaction(
    fs: int, log: LogReader, slot: int, position: int, sequence: int
) -> tuple[int, list[Image]] | None:
    """One whole transaction: (blocks, images); None where the log ends."""
    items: list[Item] = []
    parts = 1
    part = 0
    while part < parts:
        try:
            found = decode_commit_untrusted(
                fs, log.number(position + part), await log.read(position + part), slot, sequence
            )
        except CorruptionError:
            return None
        if found.part != part or found.position != position:
            return None
        parts = found.parts
        items += found.items
        part += 1
        if parts != commit_parts(found.item_count) or parts + found.item_count > log.length:
            return None
    images = []
    for index, item in enumerate(items):
        image = await log.read(position + parts + index)
        header = image_is_whole(fs, item, image)
        if header is None:
            return None
        images.append((header, image))
    return parts + len(items), images


def _version(header: Header) -> tuple[int, int]:
    return header.generation, header.change


class Replayer:
    """Replays journals of one file system; nobody else changes the blocks they name."""

    def __init__(self, device: BlockDevice, superblock: Superblock) -> None:
        self.device = device
        self.superblock = superblock
        self.fs = superblock.fs

    async def header(self, place: tuple[int, int]) -> JournalHeader:
        data = await self.device.read(place[0] * BLOCK_BYTES, HEADER_BLOCKS * BLOCK_BYTES)
        return decode_header_untrusted(self.fs, place[0], data)

    async def unreadable_copies(self, place: tuple[int, int]) -> list[int]:
        """Header blocks of a journal that rot while their twins are whole."""
        data = await self.device.read(place[0] * BLOCK_BYTES, HEADER_BLOCKS * BLOCK_BYTES)
        return unreadable_copies(self.fs, place[0], data)

    async def replay(self, place: tuple[int, int], header: JournalHeader) -> Replayed:
        """Bring every block of the journal up to date, flushed. The header stays as it is: the
        caller marks it clean with `finish` when all else is done."""
        # Who was killed while it committed has left a transaction that is whole in the caches only.
        # It becomes durable before a part of it is in place: a power cut would leave that part.
        await self.device.flush()
        log = LogReader(self.device, *place)
        images, head, count = await read_log(self.fs, log, header)
        applied = await self.apply(images)
        self._head = head, header.sequence + count
        return Replayed(header.slot, count, applied, len(images) - applied)

    async def apply(self, images: dict[int, Image]) -> int:
        """Put the images in place that are newer and belong there, flushed; how many. Maps last."""
        maps = {b: image for b, image in images.items() if image[0].kind == Kind.GROUP}
        newer_maps = await self._newer(maps)
        others, freed = await self._allowed(images, newer_maps)
        newer = await self._newer(others, freed)
        for chosen in (newer, newer_maps):
            writes: list[tuple[int, Buffer]] = [(b, image) for b, (_, image) in chosen.items()]
            if writes:
                await self.device.write_many(joined(writes))
        await self.device.flush()
        return len(newer) + len(newer_maps)

    async def finish(self, place: tuple[int, int], header: JournalHeader) -> None:
        """Mark a replayed journal as free."""
        head, sequence = self._head
        clean = JournalHeader(
            header.slot, False, header.owner, head, sequence + SEQUENCE_GAP, header.change + 1,
            place[1],
        )  # fmt: skip
        block, data = journal_format.encode_header(self.fs, clean, place[0])
        await self.device.write(block * BLOCK_BYTES, data)
        await self.device.flush()

    async def _read(self, blocks: list[int]) -> dict[int, bytes]:
        result: dict[int, bytes] = {}
        for start in range(0, len(blocks), READ_BLOCKS_MAX):
            part = blocks[start : start + READ_BLOCKS_MAX]
            ranges = [(block * BLOCK_BYTES, BLOCK_BYTES) for block in part]
            result.update(zip(part, await self.device.read_many(ranges), strict=True))
        return result

    async def _newer(
        self, images: dict[int, Image], freed: frozenset[int] = frozenset()
    ) -> dict[int, Image]:
        """The images that are newer than what is on the disk. In a block that was `freed` there
        must be metadata for that: anything else is what its next user wrote."""
        result: dict[int, Image] = {}
        for block, data in (await self._read(list(images))).items():
            image = images[block]
            try:
                found = open_block_untrusted(self.fs, block, data)
            except CorruptionError:
                if block not in freed:
                    result[block] = image
                continue
            if _version(image[0]) > _version(found):
                result[block] = image
        return result

    async def _allowed(
        self, images: dict[int, Image], newer_maps: dict[int, Image]
    ) -> tuple[dict[int, Image], frozenset[int]]:
        """The images of blocks that hold metadata as far as the maps say, and which of these blocks
        the maps call freed."""
        areas = await self._journal_areas(images)
        others = {b: image for b, image in images.items() if image[0].kind != Kind.GROUP}
        if others and max(others) >= self.superblock.total_blocks:
            raise CorruptionError(f"a journal has an image of block {max(others)}, beyond the end")
        maps = await self._maps({self.superblock.group_of(block) for block in others}, newer_maps)
        result: dict[int, Image] = {}
        freed: set[int] = set()
        for block, image in others.items():
            number, index = divmod(block, self.superblock.group_blocks)
            states = maps[number]
            if index >= len(states):
                continue
            if states[index] not in (BlockState.META, BlockState.FREEING):
                continue
            in_orphans = [
                first + HEADER_BLOCKS <= block < first + HEADER_BLOCKS + ORPHAN_BLOCKS
                for first, length in areas
                if first <= block < first + length
            ]
            if (image[0].kind == Kind.ORPHANS) == any(in_orphans) and all(in_orphans):
                result[block] = image
                if states[index] == BlockState.FREEING:
                    freed.add(block)
        return result, frozenset(freed)

    async def _maps(self, groups: set[int], newer: dict[int, Image]) -> dict[int, bytearray]:
        """The maps of groups. Raises CorruptionError if one is damaged: without it nobody knows
        which images may be applied."""
        blocks = {self.superblock.group_block(g): g for g in groups}
        result: dict[int, bytearray] = {}
        for block, data in (await self._read(list(blocks))).items():
            image = newer.get(block)
            states = self._states(block, data if image is None else image[1])
            if states is None:
                states = await self._map_elsewhere(block)
            if states is None:
                raise CorruptionError(
                    f"block {block} (allocation group {blocks[block]}) is damaged: a journal with "
                    "images for the group cannot be replayed",
                    hint=REMEDY,
                    block=block,
                )
            result[blocks[block]] = states
        return result

    def _states(self, block: int, data: bytes) -> bytearray | None:
        try:
            node = decode_node_untrusted(open_block_untrusted(self.fs, block, data), data)
        except CorruptionError:
            return None
        return node.states if isinstance(node, GroupNode) else None

    async def _map_elsewhere(self, block: int) -> bytearray | None:
        """A map that is torn in its place stands whole in the journal of whoever was writing it."""
        best: Image | None = None
        for place in await self._journal_areas({}):
            try:
                header = await self.header(place)
                log = LogReader(self.device, *place)
                image = (await read_log(self.fs, log, header))[0].get(block)
            except CorruptionError:
                continue
            if image and (best is None or _version(image[0]) > _version(best[0])):
                best = image
        return None if best is None else self._states(block, best[1])

    async def _journal_areas(self, images: dict[int, Image]) -> list[tuple[int, int]]:
        data = await self.device.read(SLOT_TABLE_BLOCK * BLOCK_BYTES, BLOCK_BYTES)
        areas: list[tuple[int, int]] = []
        candidates = [data]
        if SLOT_TABLE_BLOCK in images:
            candidates.append(images[SLOT_TABLE_BLOCK][1])
        for each in candidates:
            try:
                node = decode_node_untrusted(
                    open_block_untrusted(self.fs, SLOT_TABLE_BLOCK, each), each
                )
            except CorruptionError:
                continue
            if isinstance(node, SlotsNode):
                areas += [journal for journal in node.journals if journal not in areas]
        return areas
