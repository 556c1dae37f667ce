"""The structures that everything else is found by: superblock, slot table, groups, orphan lists."""

from __future__ import annotations

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import (
    SLOT_TABLE_BLOCK,
    SUPERBLOCK_BLOCK,
    Feature,
    Kind,
    decode_superblock_untrusted,
    open_block_untrusted,
)
from cfs.fsck.salvage import salvage_group
from cfs.fsck.volume import Step, Volume
from cfs.journal_format import (
    HEADER_BLOCKS,
    HEADER_COPIES,
    HEADER_TURNS,
    LOG_OFFSET,
    ORPHAN_BLOCKS,
    JournalHeader,
    decode_header_copy_untrusted,
)
from cfs.nodes import (
    ORPHANS_PER_BLOCK,
    BlockState,
    OrphanNode,
    SlotsNode,
    decode_node_untrusted,
)
from cfs.sanity import check_node_untrusted, slots_fault

Place = tuple[int, int]


async def check_superblocks(volume: Volume) -> None:
    """Both copies are whole and say the same."""
    session, best = volume.session, volume.superblock
    data = await volume.read_blocks((SUPERBLOCK_BLOCK, best.backup_block))
    for block, copy in data.items():
        try:
            found = decode_superblock_untrusted(block, copy)
            if found == best:
                continue
            text = f"the superblock in block {block} differs from the other one"
        except CorruptionError as error:
            text = f"superblock: {error}"
        if await session.fix(text, "Write it anew from the other copy"):
            volume.rewrite_superblocks = True
    text = "a repair was begun and has not ended"
    if best.features_incompatible & Feature.REPAIRING and await session.fix(text, "Go on with it"):
        volume.rewrite_superblocks = True


async def read_groups(volume: Volume) -> None:
    """The maps, as far as they can be read."""
    superblock = volume.superblock
    count = superblock.group_count
    volume.maps = [None] * count
    for start in range(0, count, 256):
        part = range(start, min(start + 256, count))
        data = await volume.read_blocks(superblock.group_block(group) for group in part)
        for group in part:
            block = superblock.group_block(group)
            length = superblock.group_length(group)
            volume.maps[group] = salvage_group(volume.fs, block, group, length, data[block])


# -- slot table ------------------------------------------------------------------------------------


async def read_slots(volume: Volume) -> list[Place]:
    """Where the journals are; found by their headers if the table is damaged."""
    data = await volume.read(SLOT_TABLE_BLOCK)
    change = 0
    try:
        header = open_block_untrusted(volume.fs, SLOT_TABLE_BLOCK, data)
        change = header.change
        node = decode_node_untrusted(header, data)
        check_node_untrusted(node, volume.superblock)
        if isinstance(node, SlotsNode):
            return node.journals
        text = "it holds something else"
    except CorruptionError as error:
        text = error.message
    if not await volume.session.fix(
        f"the slot table is damaged: {text}", "Make it anew from the journals that are found"
    ):
        return []
    places = await _find_journals(volume)
    volume.put(SlotsNode(SLOT_TABLE_BLOCK, change, places), Step.FINAL)
    return places


async def _find_journals(volume: Volume) -> list[Place]:
    """Journals by slot, as their headers tell. A slot without any gets a place of nothing, which
    `need_journals` fills."""
    found: dict[int, list[tuple[int, JournalHeader]]] = {}
    total = volume.superblock.total_blocks
    for start in range(0, total, 1024):
        count = min(1024, total - start)
        data = await volume.device.read(start * BLOCK_BYTES, count * BLOCK_BYTES)
        volume.session.show("looking for journals", start, total)
        for index in range(count):
            block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            if block[4:6] != int(Kind.JOURNAL_HEADER).to_bytes(2, "little"):
                continue
            try:
                header = decode_header_copy_untrusted(volume.fs, start + index, block)
            except CorruptionError:
                continue
            found.setdefault(header.slot, []).append((start + index, header))
    places = []
    for slot in range(max(found, default=-1) + 1):
        place = await _place_of(volume, found.get(slot, []))
        places.append(place)
    while places and slots_fault([place for place in places if place[1]], volume.superblock):
        places.pop()
    return places


async def _place_of(volume: Volume, headers: list[tuple[int, JournalHeader]]) -> Place:
    """Where the journal with these headers begins: where most of them are in their places."""
    votes: dict[Place, int] = {}
    for block, header in headers:
        for copy in range(HEADER_COPIES):
            first = block - header.change % HEADER_TURNS * HEADER_COPIES - copy
            place = (first, header.blocks)
            votes[place] = votes.get(place, 0) + 1
            orphans = first + HEADER_BLOCKS
            if volume.exists(orphans) and await _is_orphan_list(volume, orphans, header.slot):
                votes[place] += 1
    return max(votes, key=lambda place: votes[place]) if votes else (0, 0)


async def _is_orphan_list(volume: Volume, block: int, slot: int) -> bool:
    try:
        header = open_block_untrusted(volume.fs, block, await volume.read(block))
    except CorruptionError:
        return False
    return header.kind == Kind.ORPHANS and header.owner == slot


def claim_journals(volume: Volume, places: list[Place]) -> None:
    for first, length in places:
        if length:
            volume.claims.claim(first, length, BlockState.META)


# -- orphan lists ----------------------------------------------------------------------------------


class OrphanLists:
    """The lists of all slots."""

    def __init__(self, volume: Volume, places: list[Place]) -> None:
        self.volume = volume
        self.places = places
        self.inos: dict[int, tuple[int, int]] = {}
        """Inode -> (block, index) where it stands."""
        self._nodes: dict[int, OrphanNode] = {}

    async def read(self) -> None:
        """Read all lists; empty those that are damaged; strike out what cannot be."""
        session = self.volume.session
        for slot, (first, length) in enumerate(self.places):
            if length <= LOG_OFFSET:
                continue
            start = first + HEADER_BLOCKS
            for block, data in (
                await self.volume.read_blocks(range(start, start + ORPHAN_BLOCKS))
            ).items():
                node = self._decode(slot, block, data)
                if node is None:
                    text = f"the orphan list of journal {slot} is damaged in block {block}"
                    if await session.fix(text, "Empty it: what stood in it is found all the same"):
                        node = OrphanNode(block, slot, 1 << 32, [0] * ORPHANS_PER_BLOCK)
                        self.volume.put(node, Step.PLACE)
                    continue
                await self._entries(slot, node)

    def _decode(self, slot: int, block: int, data: bytes) -> OrphanNode | None:
        try:
            node = decode_node_untrusted(open_block_untrusted(self.volume.fs, block, data), data)
            check_node_untrusted(node, self.volume.superblock)
        except CorruptionError:
            return None
        return node if isinstance(node, OrphanNode) and node.owner == slot else None

    async def _entries(self, slot: int, node: OrphanNode) -> None:
        self._nodes[node.block] = node
        for index, ino in enumerate(node.inos) if any(node.inos) else ():
            if not ino:
                continue
            if not self.volume.exists(ino):
                text = f"the orphan list of journal {slot} names inode {ino}, which cannot be"
            elif ino in self.inos:
                text = f"inode {ino} stands in the orphan lists twice"
            else:
                self.inos[ino] = (node.block, index)
                continue
            if await self.volume.session.fix(text, "Strike it out"):
                self._strike(node.block, index)

    def _strike(self, block: int, index: int) -> None:
        node = self._nodes[block].clone()
        node.inos[index] = 0
        self._nodes[block] = node
        twin = node.clone()
        self.volume.put(twin, Step.PLACE)

    def strike(self, ino: int) -> None:
        """Take an inode out of the list that it stands in."""
        self._strike(*self.inos.pop(ino))
