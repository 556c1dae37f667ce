"""Checks every structure of a file system, read-only.

Journals that are in use are replayed into memory first: what is checked is what a mount would see.
Then: superblock and its copy, slot table, journals, groups; every inode that a name or an orphan
list leads to, with its tree; names, cookies, hashes, types, parents, link counts; at the end the
maps against what was found in use.
"""

from __future__ import annotations

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import (
    SLOT_TABLE_BLOCK,
    SUPERBLOCK_BLOCK,
    Superblock,
    decode_superblock_untrusted,
    open_block_untrusted,
)
from cfs.fsck.claims import Claims
from cfs.fsck.inodes import InodeChecker
from cfs.fsck.overlay import OverlayDevice
from cfs.fsck.report import Report
from cfs.journal_format import HEADER_BLOCKS, LOG_OFFSET, ORPHAN_BLOCKS
from cfs.nodes import BlockState, GroupNode, Node, OrphanNode, SlotsNode, decode_node_untrusted
from cfs.replay import Replayer
from cfs.stage import read_superblock
from cluster.device import BlockDevice


async def check(device: BlockDevice) -> Report:
    """Check the file system on a device that nobody changes meanwhile."""
    report = Report()
    try:
        superblock = await read_superblock(device)
    except CorruptionError as error:
        report.error(f"superblock: {error}")
        return report
    await Checker(device, superblock, report).run()
    return report


class Checker:
    """One run over one device."""

    def __init__(self, device: BlockDevice, superblock: Superblock, report: Report) -> None:
        self.device = OverlayDevice(device)
        self.superblock = superblock
        self.report = report
        self.claims = Claims(superblock, report)
        self.inodes = InodeChecker(self.device, superblock, report, self.claims)
        report.total_blocks = superblock.total_blocks

    async def run(self) -> None:
        if self.superblock.total_blocks * BLOCK_BYTES > self.device.size_bytes:
            self.report.error("the file system is larger than its device")
            return
        places = await self._slots()
        await self._replay(places)
        await self._superblocks()
        orphans: list[int] = []
        for slot, place in enumerate(await self._slots()):
            orphans += await self._journal(slot, place)
        await self.inodes.walk(orphans)
        await self._groups()

    async def _node(self, block: int) -> Node | None:
        data = await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        try:
            header = open_block_untrusted(self.superblock.fs, block, data)
            return decode_node_untrusted(header, data)
        except CorruptionError as error:
            self.report.error(str(error))
            return None

    async def _superblocks(self) -> None:
        for block in (SUPERBLOCK_BLOCK, self.superblock.backup_block):
            data = await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
            try:
                found = decode_superblock_untrusted(block, data)
            except CorruptionError as error:
                self.report.error(f"superblock: {error}")
                continue
            if found != self.superblock:
                self.report.error(f"the superblock in block {block} differs from the other one")

    async def _slots(self) -> list[tuple[int, int]]:
        node = await self._node(SLOT_TABLE_BLOCK)
        if not isinstance(node, SlotsNode):
            self.report.error("the slot table is damaged")
            return []
        return node.journals

    async def _replay(self, places: list[tuple[int, int]]) -> None:
        replayer = Replayer(self.device, self.superblock)
        for slot, place in enumerate(places):
            try:
                header = await replayer.header(place)
            except CorruptionError as error:
                self.report.error(str(error))
                continue
            if header.in_use:
                done = await replayer.replay(place, header)
                self.report.note(
                    f"journal {slot} was not closed by {header.owner}: checked as after the "
                    f"replay of {done.transactions} transactions"
                )

    async def _journal(self, slot: int, place: tuple[int, int]) -> list[int]:
        """Claim a journal's blocks; the inodes in its orphan list."""
        first, length = place
        if not self.claims.claim(first, length, BlockState.META, f"journal {slot}"):
            return []
        if length <= LOG_OFFSET:
            self.report.error(f"journal {slot} is too short")
            return []
        try:
            header = await Replayer(self.device, self.superblock).header(place)
            if header.slot != slot:
                self.report.error(f"journal {slot} says that it is journal {header.slot}")
        except CorruptionError as error:
            self.report.error(str(error))
        inos: list[int] = []
        for index in range(ORPHAN_BLOCKS):
            node = await self._node(first + HEADER_BLOCKS + index)
            if isinstance(node, OrphanNode) and node.owner == slot:
                inos += [ino for ino in node.inos if ino]
            else:
                self.report.error(f"the orphan list of journal {slot} is damaged")
        return inos

    async def _groups(self) -> None:
        for number in range(self.superblock.group_count):
            node = await self._node(self.superblock.group_block(number))
            if not isinstance(node, GroupNode) or node.owner != number:
                self.report.error(f"the block of group {number} is damaged")
                continue
            self.report.free_blocks += node.free + node.freeing
            if len(node.states) < self.superblock.group_length(number):
                # A crash between growing the superblock and the group: the rest is out of use.
                self.report.note(f"group {number} can still grow: see cfsctl grow")
                missing = self.superblock.group_length(number) - len(node.states)
                node.states += bytes(missing)
            self.claims.compare(number, node.states)
