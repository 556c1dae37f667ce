"""Metadata on the PVs: read, written, archived. Plain async over `BlockDevice`.

What counts is what the register's entry names: sequence number and checksum of the text. Any one PV
that has it, in its slot or in its archive, is enough to read a VG; a change must reach all of them.

Reads of the devices given by the node are bounded in time; writes are not: a write that was given
up could land after a later one. So all PVs are asked for their labels before the first is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from cluster.device import BlockDevice
from cluster.errors import BusyError, CorruptionError, StackError
from cvm.metadata import (
    ARCHIVE_CELL_BYTES,
    ARCHIVE_OFFSET_BYTES,
    DATA_OFFSET_BYTES,
    LABEL_BYTES,
    SLOT_BYTES,
    SLOT_COUNT,
    PvLabel,
    PvRecord,
    SlotContent,
    VgRecord,
    archive_offset,
    decode_label_untrusted,
    decode_slot_untrusted,
    decode_text_untrusted,
    encode_label,
    encode_slot,
    slot_offset,
    text_checksum,
)
from cvm.seams import PhysicalDevices, VgEntry

CACHE_MAX = 64
_FIRST_READ_BYTES = 64 * 1024


class MetadataStore:
    """Reads and writes the metadata areas of PVs, through the node's devices."""

    def __init__(self, devices: PhysicalDevices) -> None:
        self._devices = devices
        self._cache: dict[tuple[str, int, str], VgRecord] = {}

    async def load(self, entry: VgEntry) -> VgRecord:
        """The record that the register's entry names, from the first PV that has it."""
        key = (entry.uuid, entry.sequence, entry.checksum)
        known = self._cache.get(key)
        if known is not None:
            return known
        troubles: list[str] = []
        answering = {export.pv for export in await self._devices.exports() if export.reachable}
        pvs = sorted(entry.pvs, key=lambda pv: pv not in answering)
        for offset in (slot_offset(entry.sequence), archive_offset(entry.sequence)):
            for pv in pvs:
                try:
                    record = await self._load_from(pv, entry, offset)
                except StackError as error:
                    troubles.append(f"{pv}: {error.message}")
                    continue
                self.remember(entry, record)
                return record
        raise StackError(
            f'Cannot read the metadata {entry.sequence} of volume group "{entry.name}": '
            + "; ".join(troubles),
            hint="are the block servers reachable? see: clusterctl status",
        )

    async def _load_from(self, pv: str, entry: VgEntry, offset_bytes: int) -> VgRecord:
        """The record from one place of one PV. Raises StackError."""
        device = await self._devices.open(pv)
        content = await self._read_slot(device, offset_bytes)
        if content is None or content.sequence != entry.sequence:
            raise CorruptionError(f"has no metadata {entry.sequence}")
        if text_checksum(content.text) != entry.checksum:
            raise CorruptionError("has the metadata of a change that was given up")
        return decode_text_untrusted(content.text)

    def remember(self, entry: VgEntry, record: VgRecord) -> None:
        """Keep a committed record in memory."""
        if len(self._cache) >= CACHE_MAX:
            del self._cache[next(iter(self._cache))]
        self._cache[(entry.uuid, entry.sequence, entry.checksum)] = record

    async def _read_slot(self, device: BlockDevice, offset_bytes: int) -> SlotContent | None:
        """Read a short slot in one request, a long one in two."""
        head = await device.read(offset_bytes, _FIRST_READ_BYTES)
        try:
            return decode_slot_untrusted(head, offset_bytes)
        except CorruptionError:
            room = SLOT_BYTES if offset_bytes < ARCHIVE_OFFSET_BYTES else ARCHIVE_CELL_BYTES
            whole = await device.read(offset_bytes, room)
            return decode_slot_untrusted(whole, offset_bytes)

    async def write_slots(self, vg: VgRecord, text: bytes) -> None:
        """Write the text to the slot of its sequence on all PVs; durable and read back."""
        offset = slot_offset(vg.sequence)
        for pv in vg.pvs:
            await self._check_label(await self._devices.open(pv.name), pv)
        for pv in vg.pvs:
            device = await self._devices.open(pv.name)
            content = SlotContent(vg.sequence, pv.uuid, vg.uuid, text)
            data = encode_slot(content, offset)
            await device.write(offset, data)
            await device.flush()
            if await device.read(offset, len(data)) != data:
                raise CorruptionError(f'Physical volume "{pv.name}" does not keep what is written.')

    async def _check_label(self, device: BlockDevice, pv: PvRecord) -> None:
        """The device behind the name must still be the PV that the record means."""
        label = decode_label_untrusted(await device.read(0, LABEL_BYTES))
        if label is None or label.uuid != pv.uuid:
            raise StackError(
                f'Device "{pv.name}" is not the physical volume {pv.uuid} of this volume group.',
                hint="was the disk of that server replaced or another file exported?",
            )

    async def archive(self, vg: VgRecord, text: bytes) -> None:
        """Keep the text in the ring of every PV."""
        offset = archive_offset(vg.sequence)
        for pv in vg.pvs:
            device = await self._devices.open(pv.name)
            content = SlotContent(vg.sequence, pv.uuid, vg.uuid, text)
            await device.write(offset, encode_slot(content, offset, ARCHIVE_CELL_BYTES))
            await device.flush()

    async def history(self, entry: VgEntry) -> list[VgRecord]:
        """Archived versions of a VG up to the one that counts, oldest first, from all PVs."""
        found: dict[int, VgRecord] = {}
        for pv in entry.pvs:
            device = await self._devices.open(pv)
            for cell in range(archive_offset(0), DATA_OFFSET_BYTES, ARCHIVE_CELL_BYTES):
                try:
                    data = await device.read(cell, ARCHIVE_CELL_BYTES)
                    content = decode_slot_untrusted(data, cell)
                    if content is None or content.vg_uuid != entry.uuid:
                        continue
                    if content.sequence <= entry.sequence:
                        found[content.sequence] = decode_text_untrusted(content.text)
                except CorruptionError:
                    continue
        return [found[sequence] for sequence in sorted(found)]

    # --- labels --------------------------------------------------------------------------------

    async def read_label(self, pv: str) -> PvLabel | None:
        """The label of a device, None when it has none. Raises CorruptionError if damaged."""
        device = await self._devices.open(pv)
        return decode_label_untrusted(await device.read(0, LABEL_BYTES))

    async def check_free(self, pv: str, label: PvLabel, entries: Iterable[VgEntry]) -> None:
        """Raise BusyError if a volume group has this PV, under whatever name: the export may be
        called otherwise now, or another server shows the same disk."""
        device = await self._devices.open(pv)
        groups = set()
        for sequence in range(SLOT_COUNT):
            with contextlib.suppress(CorruptionError):
                content = await self._read_slot(device, slot_offset(sequence))
                groups.add(content.vg_uuid if content is not None else "")
        for entry in entries:
            record = await self.load(entry) if entry.uuid in groups and entry.sequence else None
            for one in record.pvs if record is not None else ():
                if one.uuid == label.uuid:
                    raise BusyError(
                        f'"{pv}" is physical volume "{one.name}" of volume group "{entry.name}".',
                        hint="a disk keeps its export's name: see exports.toml of the server",
                    )

    async def device_bytes(self, pv: str) -> int:
        return (await self._devices.open(pv)).size_bytes

    async def write_label(self, label: PvLabel) -> None:
        """Make a device a PV: its whole metadata area is zeroed first."""
        device = await self._devices.open(label.name)
        await device.write_zeroes(0, DATA_OFFSET_BYTES)
        await device.write(0, encode_label(label))
        await device.flush()

    async def wipe_label(self, pv: str) -> None:
        """Make a PV an ordinary device again."""
        device = await self._devices.open(pv)
        await device.write_zeroes(0, DATA_OFFSET_BYTES)
        await device.flush()
