"""Checks and repairs every structure of a file system.

The passes, each on what the ones before have left: superblock, slot table, journals (replayed),
maps as they are, orphan lists; every inode that a name or an orphan list leads to and those that
nothing leads to any more; blocks that several claim; names; links; then the inodes that need it are
written anew, and at last the maps are held against what is in use.

A check does the same as a repair, in memory only: so one fault is not told as many. A repair is
written when all of it is known (`Volume.write`), and checked again.
"""

from __future__ import annotations

import contextlib

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import SLOT_TABLE_BLOCK, Superblock
from cfs.fsck import tables
from cfs.fsck.conflicts import ConflictResolver
from cfs.fsck.inodes import InodeWalk
from cfs.fsck.logs import LogChecker
from cfs.fsck.lost import Connector, LostInodes
from cfs.fsck.maps import MapChecker
from cfs.fsck.names import NameWalk
from cfs.fsck.report import Report
from cfs.fsck.rewrite import Rewriter
from cfs.fsck.session import Session
from cfs.fsck.volume import NoRoomError, Step, Volume
from cfs.journal_format import JOURNAL_BLOCKS_MIN
from cfs.nodes import BlockState, SlotsNode
from cfs.stage import format_journal, read_superblock
from cluster.device import BlockDevice

ROUNDS_MAX = 4
"""A repair may bring to light what was hidden before; so often it is tried."""


async def check(device: BlockDevice, session: Session | None = None) -> Report:
    """Check the file system on a device that nobody changes meanwhile; write nothing."""
    session = session or Session(Report())
    assert not session.repairing
    superblock = await _superblock(device, session)
    if superblock is not None:
        await Checker(Volume(device, superblock, session)).run()
    return session.report


async def repair(device: BlockDevice, session: Session) -> Report:
    """Check and repair as far as the session's consent goes. What is left is in the report's
    `left_count`: found by a check after the last repair. Raises NeedsHumanError."""
    assert session.repairing
    left = 0
    for _ in range(ROUNDS_MAX):
        superblock = await _superblock(device, session)
        if superblock is None:
            return session.report
        volume = Volume(device, superblock, session)
        await Checker(volume).run()
        if not volume.is_dirty:
            session.report.left_count = max(session.report.left_count, left)
            return session.report
        await volume.write()
        again = await check(device, Session(Report(), show=session.show))
        left = again.error_count
        if not left or again.errors == session.report.errors:
            break
        session.report.left_count = 0
    session.report.left_count = left
    return session.report


async def _superblock(device: BlockDevice, session: Session) -> Superblock | None:
    try:
        superblock = await read_superblock(device)
    except CorruptionError as error:
        session.report.unusable = True
        session.give_up(f"superblock: {error}")
        return None
    if superblock.total_blocks * BLOCK_BYTES > device.size_bytes:
        session.report.unusable = True
        session.give_up("the file system is larger than its device")
        return None
    return superblock


class Checker:
    """One run over one volume."""

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.session = volume.session
        report = volume.session.report
        report.total_blocks = volume.superblock.total_blocks
        report.inodes = report.directories = report.names = 0
        report.data_blocks = report.free_blocks = 0

    async def run(self) -> None:
        volume = self.volume
        await tables.check_superblocks(volume)
        logs = LogChecker(volume, await tables.read_slots(volume))
        await logs.run()
        # A transaction may have entered one more journal.
        places = await self._slots_again(logs.places)
        tables.claim_journals(volume, places)
        await tables.read_groups(volume)
        orphans = tables.OrphanLists(volume, places)
        await orphans.read()
        walk = InodeWalk(volume, orphans.inos)
        await walk.walk([volume.superblock.root_ino])
        if volume.superblock.root_ino not in walk.records:
            return  # Without a root directory, which may not be made, nothing else makes sense.
        await walk.walk(orphans.inos)
        lost = LostInodes(volume, walk)
        await lost.find()
        await ConflictResolver(walk).run()
        names = NameWalk(walk)
        await names.run()
        await Connector(names, orphans, lost.untrusted).run()
        await Rewriter(volume, walk).run()
        await self._missing_journals(places)
        await MapChecker(volume, logs.unsure).run()

    async def _slots_again(self, places: list[tables.Place]) -> list[tables.Place]:
        if SLOT_TABLE_BLOCK in self.volume.steps:
            return places
        again = await tables.read_slots(self.volume)
        return again if len(again) > len(places) else places

    async def _missing_journals(self, places: list[tables.Place]) -> None:
        """Slots whose journals were not found get new ones."""
        volume = self.volume
        if all(length for _, length in places):
            return
        for slot, (_, length) in enumerate(places):
            if length:
                continue
            with contextlib.suppress(NoRoomError):
                places[slot] = place = self._journal_place()
                for block, data in format_journal(volume.fs, slot, place):
                    for index in range(len(data) // BLOCK_BYTES):
                        part = bytes(data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])
                        volume.put_raw(block + index, part, Step.FRESH)
        while places and not all(length for _, length in places):
            places.pop()
            self.session.give_up("there is no room for a journal whose place is not known")
        volume.put(SlotsNode(SLOT_TABLE_BLOCK, 1 << 20, places), Step.FINAL)

    def _journal_place(self) -> tables.Place:
        volume, size = self.volume, volume_journal_blocks(self.volume)
        wanted = bytes(size)
        for group, node in enumerate(volume.maps):
            at = -1 if node is None else node.states.find(wanted)
            first = group * volume.superblock.group_blocks + at
            if at >= 0 and not any(volume.claims.states[first : first + size]):
                volume.claims.take(first, size, BlockState.META)
                return first, size
        raise NoRoomError


def volume_journal_blocks(volume: Volume) -> int:
    """How long a journal that has to be made anew is."""
    return min(max(volume.superblock.group_blocks // 4, JOURNAL_BLOCKS_MIN), 8192)
