"""Journals under check: what was not yet in place is put there, also out of a damaged log.

A whole journal is replayed as a mount does. Of a damaged one every image that is whole is taken, if
it is newer than what is in place: transactions are torn apart by that, and the rest of the check
finds what does not fit together.
"""

from __future__ import annotations

import contextlib

import msgspec

from cfs import journal_format
from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import Superblock, is_whole
from cfs.fsck.volume import Step, Volume
from cfs.journal_format import (
    HEADER_BLOCKS,
    HEADER_COPIES,
    HEADER_TURNS,
    JournalHeader,
    commit_sequence,
    decode_commit_untrusted,
    decode_header_copy_untrusted,
    decode_header_untrusted,
    image_is_whole,
    unreadable_copies,
)
from cfs.nodes import BlockState
from cfs.replay import SEQUENCE_GAP, Image, LogReader, Replayer
from cfs.stage import NOBODY
from cluster.device import BlockDevice

Place = tuple[int, int]


class SalvagingReplayer(Replayer):
    """Replays also where maps are damaged; those blocks are remembered as they were, in case that
    they turn out to hold data."""

    def __init__(self, device: BlockDevice, superblock: Superblock) -> None:
        super().__init__(device, superblock)
        self.unsure: dict[int, bytes] = {}

    async def _maps(self, groups: set[int], newer: dict[int, Image]) -> dict[int, bytearray]:
        result: dict[int, bytearray] = {}
        for group in groups:
            try:
                result.update(await super()._maps({group}, newer))
            except CorruptionError:
                length = self.superblock.group_length(group)
                result[group] = bytearray((BlockState.META,)) * length
        return result

    async def _allowed(
        self, images: dict[int, Image], newer_maps: dict[int, Image]
    ) -> tuple[dict[int, Image], frozenset[int]]:
        total = self.superblock.total_blocks
        inside = {block: image for block, image in images.items() if block < total}
        chosen, freed = await super()._allowed(inside, newer_maps)
        for block in chosen:
            group = self.superblock.group_of(block)
            try:
                await super()._maps({group}, newer_maps)
            except CorruptionError:
                self.unsure[block] = await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        return chosen, freed


class LogChecker:
    """The journals of one volume."""

    def __init__(self, volume: Volume, places: list[Place]) -> None:
        self.volume = volume
        self.session = volume.session
        self.places = places
        self.unsure: dict[int, bytes] = {}
        """Blocks as they were before an image came over them that may not belong there."""
        self._damaged: list[tuple[int, Place, JournalHeader | None]] = []

    async def run(self) -> None:
        """Replay every journal that is in use, the whole ones first; repair headers."""
        for slot, place in enumerate(self.places):
            await self._journal(slot, place)
        for slot, place, header in self._damaged:
            await self._salvage(slot, place, header)

    async def _journal(self, slot: int, place: Place) -> None:
        session, volume = self.session, self.volume
        data = await volume.device.read(place[0] * BLOCK_BYTES, HEADER_BLOCKS * BLOCK_BYTES)
        try:
            header = decode_header_untrusted(volume.fs, place[0], data)
        except CorruptionError as error:
            text = f"journal {slot}: {error}"
            if await session.fix(text, "Replay what its log holds and make it new", lossy=True):
                self._damaged.append((slot, place, None))
            return
        if header.slot != slot or header.blocks != place[1]:
            text = f"journal {slot} says that it is journal {header.slot} of {header.blocks} blocks"
            if not await session.fix(text, "Write its headers anew"):
                return
            header = msgspec.structs.replace(header, slot=slot, blocks=place[1])
            self._write_headers(place, header)
        if header.in_use:
            if not await self._replay(slot, place, header):
                return
            # The replay has written one copy; the other one may be the damaged one.
            data = await volume.device.read(place[0] * BLOCK_BYTES, HEADER_BLOCKS * BLOCK_BYTES)
            header = decode_header_untrusted(volume.fs, place[0], data)
        faults = self._copies(place, data)
        if faults and await session.fix(f"journal {slot}: {faults}", "Write its headers anew"):
            self._write_headers(place, header)

    def _copies(self, place: Place, data: bytes) -> str:
        """What is wrong with the copies of a header whose state is known."""
        rotten = unreadable_copies(self.volume.fs, place[0], data)
        return f"a copy of its header is damaged, in block {rotten[0]}" if rotten else ""

    async def _replay(self, slot: int, place: Place, header: JournalHeader) -> bool:
        """The journal of somebody who is gone. False: it is to be salvaged."""
        volume, session = self.volume, self.session
        repairing = session.repairing
        replayer = Replayer(volume.base if repairing else volume.device, volume.superblock)
        try:
            done = await replayer.replay(place, header)
        except CorruptionError as error:
            text = f"journal {slot}: {error}"
            if await session.fix(text, "Replay what can be read and lose the rest", lossy=True):
                self._damaged.append((slot, place, header))
            return False
        if repairing:
            await replayer.finish(place, header)
        session.report.note(
            f"journal {slot} was not closed by {header.owner}: "
            f"{'replayed' if repairing else 'checked as after the replay of'} "
            f"{done.transactions} transactions"
        )
        return True

    async def _salvage(self, slot: int, place: Place, header: JournalHeader | None) -> None:
        """Take every image that is whole; the journal is new when the repair has been written."""
        volume = self.volume
        start = 0 if header is None else header.sequence
        images, last = await read_what_is_whole(volume, slot, place, start)
        replayer = SalvagingReplayer(volume.device, volume.superblock)
        before = set(volume.device.written)
        await replayer.apply(images)
        for block in set(volume.device.written) - before:
            volume.steps[block] = Step.PLACE
        self.unsure.update(replayer.unsure)
        change = await self._last_change(place)
        clean = JournalHeader(slot, False, NOBODY, 0, last + SEQUENCE_GAP, change, place[1])
        self._write_headers(place, clean)

    async def _last_change(self, place: Place) -> int:
        data = await self.volume.device.read(place[0] * BLOCK_BYTES, HEADER_BLOCKS * BLOCK_BYTES)
        changes = [0]
        for index in range(HEADER_BLOCKS):
            block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            with contextlib.suppress(CorruptionError):
                number = place[0] + index
                changes.append(decode_header_copy_untrusted(self.volume.fs, number, block).change)
        return max(changes)

    def _write_headers(self, place: Place, header: JournalHeader) -> None:
        """All copies say the same."""
        for step in range(1, HEADER_TURNS + 1):
            new = msgspec.structs.replace(header, change=header.change + step)
            first, data = journal_format.encode_header(self.volume.fs, new, place[0])
            for index in range(HEADER_COPIES):
                block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                self.volume.put_raw(first + index, block, Step.JOURNAL)


async def read_what_is_whole(
    volume: Volume, slot: int, place: Place, start: int
) -> tuple[dict[int, Image], int]:
    """The newest whole image of each block in a log, from transaction `start` on, and the highest
    sequence in it. With start 0 (the headers are lost) all that is in the log is taken."""
    log = LogReader(volume.device, *place)
    images: dict[int, Image] = {}
    last = start
    for position in range(log.length):
        number = log.number(position)
        block = await log.read(position)
        sequence = commit_sequence(block, number, slot)
        if sequence < start or not is_whole(volume.fs, number, block):
            continue
        last = max(last, sequence)
        with contextlib.suppress(CorruptionError):
            part = decode_commit_untrusted(volume.fs, number, block, slot, sequence)
            first = position - part.part + part.parts
            skip = part.part * journal_format.ITEMS_PER_COMMIT
            for index, item in enumerate(part.items):
                data = await volume.read(log.number(first + skip + index))
                header = image_is_whole(volume.fs, item, data)
                if header is None:
                    continue
                known = images.get(header.block)
                version = (header.generation, header.change)
                if known is None or (known[0].generation, known[0].change) <= version:
                    images[header.block] = (header, data)
    return images, last
