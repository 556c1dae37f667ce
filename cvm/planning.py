"""What each verb changes in a volume group. Pure: record and request in, plan and messages out.

Messages are LVM's. Nothing here reads a disk or talks to a node; the manager does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from cluster.errors import StackError, UsageError
from cvm.allocate import (
    STRIPE_BYTES_DEFAULT,
    Wanted,
    allocatable_extents,
    allocate,
    check_stripes,
    free_extents,
    resolve_extents,
)
from cvm.metadata import (
    EXTENT_BYTES_DEFAULT,
    LVS_MAX,
    PVS_MAX,
    SLOT_COUNT,
    LvRecord,
    PvRecord,
    SegmentRecord,
    VgRecord,
    check_name,
    check_vg,
)
from cvm.transaction import Plan
from cvm.units import Amount, format_long, parse_extent_amount, parse_size, parse_size_amount

EXTENT_BYTES_MIN = 64 * 1024
EXTENT_BYTES_MAX = 1 << 30


class Outcome(msgspec.Struct, frozen=True):
    """A plan and what to tell the user once it is carried out."""

    plan: Plan
    messages: tuple[str, ...] = ()


class LvCreate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`lvcreate -n NAME -L SIZE | -l EXTENTS [-i N] [-I SIZE] VG [PV...]`."""

    vg: str
    name: str = ""
    size: str = ""
    extents: str = ""
    stripes: int = 0
    stripe_size: str = ""
    pvs: tuple[str, ...] = ()
    dry_run: bool = False


class LvExtend(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`lvextend -L [+]SIZE | -l [+]EXTENTS [-i N] [-I SIZE] VG/LV [PV...]`."""

    volume: str
    size: str = ""
    extents: str = ""
    stripes: int = 0
    stripe_size: str = ""
    pvs: tuple[str, ...] = ()
    dry_run: bool = False


def split_volume(volume: str) -> tuple[str, str]:
    """`vg0/vol0` (or `/dev/vg0/vol0`) as (vg, lv). Raises UsageError."""
    parts = volume.removeprefix("/dev/").split("/")
    if len(parts) != 2 or not all(parts):
        raise UsageError(
            f'"{volume}" is not a volume name.', hint="volumes are named VG/LV, e.g. vg0/vol0"
        )
    return parts[0], parts[1]


def need_vg(vg: VgRecord | None, name: str) -> VgRecord:
    if vg is None:
        raise StackError(f'Volume group "{name}" not found.', hint="see: cvmctl vgs")
    return vg


def need_lv(vg: VgRecord, name: str) -> LvRecord:
    lv = vg.lv(name)
    if lv is None:
        raise StackError(
            f'Failed to find logical volume "{vg.name}/{name}".', hint="see: cvmctl lvs"
        )
    return lv


def _amount(size: str, extents: str) -> Amount:
    if bool(size) == bool(extents):
        raise UsageError("Please specify either size or extents.", hint="-L 10G or -l 100%FREE")
    return parse_size_amount(size) if size else parse_extent_amount(extents)


def _next(vg: VgRecord, purpose: str, node: str, *, least: int = 0, **changes: object) -> VgRecord:
    """The record of the next sequence number, which is `least` or higher, checked."""
    sequence = vg.sequence + 1
    if least > sequence:  # still in the other slot than the present one
        sequence = least + (least - sequence) % SLOT_COUNT
    new = msgspec.structs.replace(
        vg, sequence=sequence, description=purpose, written_on=node, **changes
    )
    check_vg(new)
    return new


def plan_vgcreate(
    name: str, uuid: str, pvs: Sequence[PvRecord], extent_size: str, purpose: str, node: str
) -> Outcome:
    """A new VG of PVs whose `extent_count` is still to be set."""
    check_name("New volume group", name)
    extent_bytes = parse_size(extent_size) if extent_size else EXTENT_BYTES_DEFAULT
    if (
        not EXTENT_BYTES_MIN <= extent_bytes <= EXTENT_BYTES_MAX
        or extent_bytes & (extent_bytes - 1)
    ):  # fmt: skip
        raise UsageError(
            f"Physical extent size {format_long(extent_bytes)} is invalid.",
            hint="a power of two from 64k to 1g",
        )
    empty = VgRecord(name=name, uuid=uuid, sequence=0, extent_bytes=extent_bytes, pvs=())
    new = _next(empty, purpose, node, least=_least(pvs), pvs=_sized(pvs, extent_bytes))
    return Outcome(Plan(new), (f'Volume group "{name}" successfully created',))


def _least(pvs: Sequence[PvRecord]) -> int:
    """What the servers of new PVs require, from the time when another VG had them: a map with a
    lower sequence number would be refused there."""
    return max((pv.minimum_sequence for pv in pvs), default=0)


def _sized(pvs: Sequence[PvRecord], extent_bytes: int) -> tuple[PvRecord, ...]:
    out = []
    for pv in pvs:
        count = max(0, pv.device_bytes - pv.data_offset_bytes) // extent_bytes
        if count == 0:
            raise StackError(
                f'Physical volume "{pv.name}" is too small for one extent '
                f"({format_long(pv.device_bytes)})."
            )
        out.append(msgspec.structs.replace(pv, extent_count=count))
    return tuple(out)


def plan_vgextend(vg: VgRecord, pvs: Sequence[PvRecord], purpose: str, node: str) -> Outcome:
    if len(vg.pvs) + len(pvs) > PVS_MAX:
        raise StackError(f'Volume group "{vg.name}" cannot have more than {PVS_MAX} PVs.')
    pvs_after = vg.pvs + _sized(pvs, vg.extent_bytes)
    new = _next(vg, purpose, node, least=_least(pvs), pvs=pvs_after)
    return Outcome(Plan(new), (f'Volume group "{vg.name}" successfully extended',))


def plan_vgremove(vg: VgRecord) -> Outcome:
    messages = [f'Logical volume "{lv.name}" successfully removed.' for lv in vg.lvs]
    messages.append(f'Volume group "{vg.name}" successfully removed')
    return Outcome(Plan(None), tuple(messages))


def _stripes(request: LvCreate | LvExtend, last: SegmentRecord | None) -> tuple[int, int]:
    """(stripe count, stripe bytes) of a request; an extension goes on as the last segment does."""
    count = request.stripes or (len(last.stripes) if last is not None else 1)
    if request.stripe_size:
        return count, parse_size(request.stripe_size, "k")
    same = last is not None and len(last.stripes) == count
    return count, last.stripe_bytes if last is not None and same else STRIPE_BYTES_DEFAULT


def _rounded(extents: int, stripes: int, messages: list[str]) -> int:
    up = -(-extents // stripes) * stripes
    if up != extents:
        messages.append(
            f"Rounding size ({extents} extents) up to stripe boundary size ({up} extents)."
        )
    return up


def _minimums(
    vg: VgRecord, segments: Sequence[SegmentRecord]
) -> tuple[tuple[PvRecord, ...], tuple[tuple[str, int], ...]]:
    """PVs on which freed extents may be used again: their servers must first refuse older maps."""
    touched = {leg.pv for one in segments for stripe in one.stripes for leg in stripe}
    raised = tuple(
        (pv.name, pv.freed_sequence)
        for pv in vg.pvs
        if pv.name in touched and pv.freed_sequence > pv.minimum_sequence
    )
    names = dict(raised)
    pvs = tuple(
        msgspec.structs.replace(pv, minimum_sequence=names[pv.name]) if pv.name in names else pv
        for pv in vg.pvs
    )
    return pvs, raised


def _free_name(vg: VgRecord) -> str:
    number = 0
    while vg.lv(f"lvol{number}") is not None:
        number += 1
    return f"lvol{number}"


def plan_lvcreate(vg: VgRecord, request: LvCreate, uuid: str, node: str) -> Outcome:
    name = request.name or _free_name(vg)
    check_name("Logical volume", name)
    if vg.lv(name) is not None:
        raise StackError(
            f'Logical volume "{name}" already exists in volume group "{vg.name}"',
            hint="see: cvmctl lvs",
        )
    if len(vg.lvs) >= LVS_MAX:
        raise StackError(f'Volume group "{vg.name}" cannot have more than {LVS_MAX} LVs.')
    messages: list[str] = []
    amount = _amount(request.size, request.extents)
    if amount.sign:
        raise UsageError("Size may not be relative when a volume is created.")
    count, unit = _stripes(request, None)
    wanted = Wanted(0, count, unit, request.pvs)
    check_stripes(vg, wanted)
    extents = resolve_extents(vg, amount, pvs=request.pvs, lv_extents=0)
    if amount.percent is not None:
        most = msgspec.structs.replace(wanted, extent_count=extents // count * count)
        extents = allocatable_extents(vg, most)
        if extents == 0:
            raise StackError(
                f'Volume group "{vg.name}" has insufficient free space '
                f"({free_extents(vg, request.pvs)} extents).",
                hint="add space with: cvmctl vgextend",
            )
    extents = _rounded(extents, count, messages)
    segments = allocate(vg, None, msgspec.structs.replace(wanted, extent_count=extents))
    pvs, minimums = _minimums(vg, segments)
    lv = LvRecord(
        name=name, uuid=uuid, segments=segments, created_sequence=vg.sequence + 1, created_on=node
    )
    new = _next(vg, f"lvcreate {vg.name}/{name}", node, lvs=(*vg.lvs, lv), pvs=pvs)
    messages.append(f'Logical volume "{name}" created.')
    return Outcome(Plan(new, minimums=minimums), tuple(messages))


def plan_lvextend(vg: VgRecord, request: LvExtend, node: str) -> Outcome:
    lv = need_lv(vg, split_volume(request.volume)[1])
    messages: list[str] = []
    amount = _amount(request.size, request.extents)
    if amount.sign == "-":
        raise UsageError("Size may not be negative: lvextend only makes volumes larger.")
    count, unit = _stripes(request, lv.segments[-1])
    wanted = Wanted(0, count, unit, request.pvs)
    check_stripes(vg, wanted)
    extents = resolve_extents(vg, amount, pvs=request.pvs, lv_extents=lv.extent_count)
    # "100%FREE" without a sign is understood as in LVM: all that is free in addition.
    relative = amount.sign == "+" or amount.of in ("FREE", "PVS")
    more = extents if relative else extents - lv.extent_count
    if more <= 0:
        raise StackError(
            f"New size given ({extents} extents) not larger than existing size "
            f"({lv.extent_count} extents)",
            hint="use -L +SIZE to add to the size",
        )
    if amount.of in ("FREE", "PVS"):
        more = allocatable_extents(
            vg, msgspec.structs.replace(wanted, extent_count=more // count * count)
        )
    more = _rounded(more, count, messages)
    if more == 0:
        raise StackError(f'Volume group "{vg.name}" has insufficient free space (0 extents).')
    segments = allocate(vg, lv, msgspec.structs.replace(wanted, extent_count=more))
    pvs, minimums = _minimums(vg, segments)
    larger = msgspec.structs.replace(lv, segments=segments)
    lvs = tuple(larger if one.name == lv.name else one for one in vg.lvs)
    new = _next(vg, f"lvextend {vg.name}/{lv.name}", node, lvs=lvs, pvs=pvs)
    old_size = format_long(lv.extent_count * vg.extent_bytes)
    new_size = format_long(larger.extent_count * vg.extent_bytes)
    messages += [
        f"Size of logical volume {vg.name}/{lv.name} changed from {old_size} "
        f"({lv.extent_count} extents) to {new_size} ({larger.extent_count} extents).",
        f"Logical volume {vg.name}/{lv.name} successfully resized.",
    ]
    return Outcome(Plan(new, volumes=(lv.name,), minimums=minimums), tuple(messages))


def plan_lvremove(vg: VgRecord, names: Sequence[str], node: str) -> Outcome:
    """Remove LVs (none of them open). Their PVs remember at which sequence extents were freed."""
    gone = [need_lv(vg, name) for name in names]
    touched = {
        leg.pv for lv in gone for one in lv.segments for stripe in one.stripes for leg in stripe
    }
    pvs = tuple(
        msgspec.structs.replace(pv, freed_sequence=vg.sequence + 1) if pv.name in touched else pv
        for pv in vg.pvs
    )
    lvs = tuple(lv for lv in vg.lvs if lv not in gone)
    new = _next(vg, f"lvremove {' '.join(f'{vg.name}/{n}' for n in names)}", node, lvs=lvs, pvs=pvs)
    messages = tuple(f'Logical volume "{lv.name}" successfully removed.' for lv in gone)
    return Outcome(Plan(new), messages)


Planner = Callable[[VgRecord | None], Outcome]
