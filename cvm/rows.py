"""What the listings show, as typed rows (sizes in bytes). The CLI makes columns of them.

Reading takes no lock: the register names one committed version of every VG, and that is shown.
A server that does not answer is shown as such, never waited for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from cluster.errors import StackError, UsageError
from cvm.allocate import free_ranges
from cvm.metadata import LvRecord, PvRecord, VgRecord
from cvm.requests import Listing
from cvm.seams import ExportInfo, Opener, PhysicalDevices, VgEntry, VgRegister, VolumeInstances
from cvm.store import MetadataStore

Row = dict[str, Any]
Verb = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


def _listing(params: dict[str, Any]) -> tuple[str, ...]:
    try:
        return msgspec.convert(params, Listing).names
    except msgspec.ValidationError as error:
        raise UsageError(f"Invalid parameters: {error}.") from error


def _segment_type(lv: LvRecord) -> str:
    return "striped" if lv.stripe_count > 1 else "linear"


def _devices(lv: LvRecord) -> str:
    """LVM's `devices`: PV(first extent) of every leg."""
    return ",".join(
        f"{leg.pv}({leg.start_extent})"
        for segment in lv.segments
        for stripe in segment.stripes
        for leg in stripe
    )


class _Group:
    """One VG as it is shown: its entry and, if a PV with it answers, its record."""

    def __init__(self, entry: VgEntry, record: VgRecord | None, trouble: str) -> None:
        self.entry = entry
        self.record = record
        self.trouble = trouble
        self.free: dict[str, int] = {}
        if record is not None:
            ranges = free_ranges(record)
            self.free = {pv: sum(count for _, count in one) for pv, one in ranges.items()}


class Rows:
    """The verbs `pvs`, `vgs`, `lvs` and `status`."""

    def __init__(
        self,
        register: VgRegister,
        devices: PhysicalDevices,
        instances: VolumeInstances,
        store: MetadataStore,
    ) -> None:
        self._register = register
        self._devices = devices
        self._instances = instances
        self._store = store

    async def _groups(self) -> list[_Group]:
        groups = []
        for _, entry in sorted((await self._register.read()).items()):
            if entry.sequence == 0:
                continue
            try:
                groups.append(_Group(entry, await self._store.load(entry), ""))
            except StackError as error:
                groups.append(_Group(entry, None, error.message))
        return groups

    def _server_names(self) -> dict[int, str]:
        return {int(server.id): server.name for server in self._devices.servers()}

    # --- pvs -----------------------------------------------------------------------------------

    async def pvs(self, params: dict[str, Any]) -> dict[str, Any]:
        names = _listing(params)
        groups = await self._groups()
        exports = {export.pv: export for export in await self._devices.exports()}
        rows = []
        seen = set()
        for group in groups:
            for pv in group.entry.pvs:
                seen.add(pv)
                record = None if group.record is None else group.record.pv(pv)
                rows.append(self._pv_row(group, pv, record, exports.get(pv)))
        for name, export in sorted(exports.items()):
            if name not in seen:
                row = await self._orphan_row(export)
                if row is not None:
                    rows.append(row)
        return {"rows": _only(rows, "pv_name", names, 'Failed to find physical volume "{}".')}

    def _pv_row(
        self, group: _Group, pv: str, record: PvRecord | None, export: ExportInfo | None
    ) -> Row:
        missing = export is None or not export.reachable
        extent = 0 if group.record is None else group.record.extent_bytes
        count = 0 if record is None else record.extent_count
        free = group.free.get(pv, 0)
        server = pv.partition("/")[0] if record is None else self._server_of(record)
        return {
            "pv_name": pv,
            "vg_name": group.entry.name,
            "pv_fmt": "cvm",
            "pv_attr": "a-m" if missing else "a--",
            "pv_size": count * extent,
            "pv_free": free * extent,
            "pv_used": (count - free) * extent,
            "pv_uuid": "" if record is None else record.uuid,
            "dev_size": 0 if record is None else record.device_bytes,
            "pe_start": 0 if record is None else record.data_offset_bytes,
            "pv_pe_count": count,
            "pv_pe_alloc_count": count - free,
            "pv_missing": missing,
            "server": server,
            "export": pv.partition("/")[2],
            "minimum_seqno": 0 if record is None else record.minimum_sequence,
        }

    def _server_of(self, record: PvRecord) -> str:
        return self._server_names().get(int(record.server), str(record.server))

    async def _orphan_row(self, export: ExportInfo) -> Row | None:
        """A PV that is in no VG, or None when the export is not a PV (or does not answer)."""
        if not export.reachable:
            return None
        try:
            label = await self._store.read_label(export.pv)
        except StackError:
            return None
        if label is None:
            return None
        return {
            "pv_name": export.pv,
            "vg_name": "",
            "pv_fmt": "cvm",
            "pv_attr": "---",
            "pv_size": label.device_bytes,
            "pv_free": label.device_bytes,
            "pv_used": 0,
            "pv_uuid": label.uuid,
            "dev_size": label.device_bytes,
            "pe_start": label.data_offset_bytes,
            "pv_pe_count": 0,
            "pv_pe_alloc_count": 0,
            "pv_missing": False,
            "server": export.pv.partition("/")[0],
            "export": export.export,
            "minimum_seqno": 0,
        }

    # --- vgs -----------------------------------------------------------------------------------

    async def vgs(self, params: dict[str, Any]) -> dict[str, Any]:
        names = _listing(params)
        exports = {export.pv: export for export in await self._devices.exports()}
        rows = []
        for group in await self._groups():
            entry, record = group.entry, group.record
            away = [pv for pv in entry.pvs if pv not in exports or not exports[pv].reachable]
            count = 0 if record is None else sum(pv.extent_count for pv in record.pvs)
            extent = 0 if record is None else record.extent_bytes
            rows.append(
                {
                    "vg_name": entry.name,
                    "pv_count": len(entry.pvs),
                    "lv_count": 0 if record is None else len(record.lvs),
                    "snap_count": 0,
                    "vg_attr": f"wz-{'p' if away else '-'}ns",
                    "vg_size": count * extent,
                    "vg_free": sum(group.free.values()) * extent,
                    "vg_uuid": entry.uuid,
                    "vg_seqno": entry.sequence,
                    "vg_extent_size": extent,
                    "vg_extent_count": count,
                    "vg_free_count": sum(group.free.values()),
                    "vg_missing_pv_count": len(away),
                    "change": "" if entry.change is None else entry.change.purpose,
                }
            )
        return {"rows": _only(rows, "vg_name", names, 'Volume group "{}" not found')}

    # --- lvs -----------------------------------------------------------------------------------

    async def lvs(self, params: dict[str, Any]) -> dict[str, Any]:
        names = _listing(params)
        openers = await self._instances.openers("")
        rows = []
        for group in await self._groups():
            record = group.record
            for lv in record.lvs if record is not None else ():
                assert record is not None
                mine = [one for one in openers if one.volume == f"{record.name}/{lv.name}"]
                rows.append(_lv_row(record, lv, mine))
        wanted = tuple(name.removeprefix("/dev/") for name in names)
        for name in wanted:
            key = "lv_full_name" if "/" in name else "vg_name"
            if not any(row[key] == name for row in rows):
                raise StackError(
                    f'Failed to find logical volume "{name}"'
                    if "/" in name
                    else f'Volume group "{name}" not found',
                    hint="see: cvmctl lvs",
                )
        if wanted:
            rows = [
                row for row in rows if row["lv_full_name"] in wanted or row["vg_name"] in wanted
            ]
        return {"rows": rows}

    # --- status --------------------------------------------------------------------------------

    async def status(self, params: dict[str, Any]) -> dict[str, Any]:
        """Everything that `cvmctl status` draws, per VG."""
        names = _listing(params)
        exports = {export.pv: export for export in await self._devices.exports()}
        openers = await self._instances.openers("")
        rows = [self._status_row(group, exports, openers) for group in await self._groups()]
        return {"rows": _only(rows, "vg_name", names, 'Volume group "{}" not found')}

    def _status_row(
        self, group: _Group, exports: dict[str, ExportInfo], openers: list[Opener]
    ) -> Row:
        entry, record = group.entry, group.record

        def state(pv: str) -> str:
            return "ONLINE" if pv in exports and exports[pv].reachable else "UNAVAIL"

        pvs = [{"pv_name": pv, "state": state(pv)} for pv in entry.pvs]
        lvs = []
        for lv in record.lvs if record is not None else ():
            assert record is not None
            mine = [one for one in openers if one.volume == f"{record.name}/{lv.name}"]
            legs: dict[str, int] = {}
            for segment in lv.segments:
                for leg in (leg for stripe in segment.stripes for leg in stripe):
                    size = segment.leg_extents * record.extent_bytes
                    legs[leg.pv] = legs.get(leg.pv, 0) + size
            row = _lv_row(record, lv, mine)
            row["legs"] = [{"pv_name": pv, "size": legs[pv], "state": state(pv)} for pv in legs]
            row["openers"] = msgspec.to_builtins(mine)
            row["state"] = _worst([state(pv) for pv in legs])
            lvs.append(row)
        extent = 0 if record is None else record.extent_bytes
        total = 0 if record is None else sum(pv.extent_count for pv in record.pvs)
        return {
            "vg_name": entry.name,
            "state": "UNAVAIL" if record is None else _worst([pv["state"] for pv in pvs]),
            "trouble": group.trouble,
            "vg_seqno": entry.sequence,
            "change": "" if entry.change is None else entry.change.purpose,
            "vg_size": total * extent,
            "vg_free": sum(group.free.values()) * extent,
            "description": "" if record is None else record.description,
            "written_on": "" if record is None else record.written_on,
            "pvs": pvs,
            "lvs": lvs,
        }


def _worst(states: list[str]) -> str:
    """The state of something that needs all of its parts (no mirrors yet)."""
    if not states or all(state == "ONLINE" for state in states):
        return "ONLINE"
    return "UNAVAIL" if all(state == "UNAVAIL" for state in states) else "DEGRADED"


def _lv_row(record: VgRecord, lv: LvRecord, openers: list[Opener]) -> Row:
    last = lv.segments[-1]
    return {
        "lv_name": lv.name,
        "vg_name": record.name,
        "lv_full_name": f"{record.name}/{lv.name}",
        "lv_attr": f"-wi-{'a' if openers else '-'}{'o' if openers else '-'}----",
        "lv_size": lv.extent_count * record.extent_bytes,
        "lv_uuid": lv.uuid,
        "seg_count": len(lv.segments),
        "segtype": _segment_type(lv),
        "stripes": len(last.stripes),
        "stripe_size": last.stripe_bytes if len(last.stripes) > 1 else 0,
        "devices": _devices(lv),
        "lv_active": "active" if openers else "",
        "lv_open_count": len(openers),
        "open_on": ",".join(sorted({one.node_name for one in openers})),
        "open_mode": ",".join(sorted({one.mode for one in openers})),
        "lv_host": lv.created_on,
        "vg_seqno": record.sequence,
    }


def _only(rows: list[Row], key: str, names: tuple[str, ...], message: str) -> list[Row]:
    """The rows that were asked for; a name without a row is an error, as in LVM."""
    for name in names:
        if not any(row[key] == name for row in rows):
            raise StackError(message.format(name))
    return [row for row in rows if not names or row[key] in names]
