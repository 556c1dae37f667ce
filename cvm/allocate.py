"""Allocation of extents. Pure: from a VG record to new segments.

Linear volumes take free ranges in the order of the PVs, starting behind their own last extent when
that is free. Stripes of one segment lie on distinct PVs, on distinct servers where possible; the
PVs with most free space are taken first, so that stripes stay balanced. What is already there never
moves: an extension only adds extents behind (it lengthens the last segment when the new extents
follow it directly on every leg).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.errors import StackError, UsageError
from cvm.layout import STRIPES_MAX
from cvm.metadata import LegRecord, LvRecord, SegmentRecord, VgRecord
from cvm.units import Amount

STRIPE_BYTES_DEFAULT = 64 * 1024
STRIPE_BYTES_MIN = 4096

FreeRange = tuple[int, int]
"""(first extent, count)."""


class Wanted(msgspec.Struct, frozen=True):
    """What to allocate. `pvs` limits the PVs (empty: all of the VG)."""

    extent_count: int
    stripe_count: int = 1
    stripe_bytes: int = STRIPE_BYTES_DEFAULT
    pvs: tuple[str, ...] = ()


def free_ranges(vg: VgRecord) -> dict[str, list[FreeRange]]:
    """Free extents of every PV, in order."""
    used: dict[str, list[tuple[int, int]]] = {pv.name: [] for pv in vg.pvs}
    for lv in vg.lvs:
        for segment in lv.segments:
            for stripe in segment.stripes:
                for leg in stripe:
                    end = leg.start_extent + segment.leg_extents
                    used[leg.pv].append((leg.start_extent, end))
    free: dict[str, list[FreeRange]] = {}
    for pv in vg.pvs:
        position = 0
        ranges = free[pv.name] = []
        for start, end in sorted(used[pv.name]):
            if start > position:
                ranges.append((position, start - position))
            position = end
        if pv.extent_count > position:
            ranges.append((position, pv.extent_count - position))
    return free


def free_extents(vg: VgRecord, pvs: Sequence[str] = ()) -> int:
    """Number of free extents on the PVs (all when none are named)."""
    free = free_ranges(vg)
    return sum(count for name in (pvs or free) for _, count in free[name])


def check_stripes(vg: VgRecord, wanted: Wanted) -> None:
    """Raise UsageError when the stripes make no sense on this VG."""
    unit = wanted.stripe_bytes
    if not 1 <= wanted.stripe_count <= STRIPES_MAX:
        raise UsageError(f"Number of stripes ({wanted.stripe_count}) must be 1 to {STRIPES_MAX}.")
    if unit < STRIPE_BYTES_MIN or unit & (unit - 1) or unit > vg.extent_bytes:
        raise UsageError(
            f"Invalid stripe size of {unit} bytes.",
            hint=f"a power of two from 4k to the extent size ({vg.extent_bytes >> 10}k)",
        )
    for name in wanted.pvs:
        if vg.pv(name) is None:
            raise UsageError(f'Physical Volume "{name}" not found in Volume Group "{vg.name}".')


def resolve_extents(vg: VgRecord, amount: Amount, *, pvs: Sequence[str], lv_extents: int) -> int:
    """Extents that an amount stands for, rounded up as LVM does (the sign is the caller's)."""
    if amount.size_bytes is not None:
        return -(-amount.size_bytes // vg.extent_bytes)
    if amount.extents is not None:
        return amount.extents
    assert amount.percent is not None
    pv_total = sum(pv.extent_count for pv in vg.pvs if not pvs or pv.name in pvs)
    base = {
        "FREE": free_extents(vg, pvs),
        "VG": sum(pv.extent_count for pv in vg.pvs),
        "PVS": pv_total,
        "LV": lv_extents,
    }[amount.of]
    return base * amount.percent // 100


def _take(ranges: list[FreeRange], start: int, count: int) -> None:
    """Remove extents from a list of free ranges; they must be free."""
    for index, (first, size) in enumerate(ranges):
        if first <= start and start + count <= first + size:
            rest = [(first, start - first), (start + count, first + size - start - count)]
            ranges[index : index + 1] = [piece for piece in rest if piece[1]]
            return
    raise AssertionError("extents are not free")


def _free_at(ranges: list[FreeRange], start: int) -> int:
    """How many extents are free from `start` on."""
    for first, size in ranges:
        if first <= start < first + size:
            return first + size - start
    return 0


def _choose(vg: VgRecord, free: dict[str, list[FreeRange]], wanted: Wanted) -> list[str]:
    """PVs for the next segment: most free first, each from another server where possible."""
    names = list(wanted.pvs or free)
    able = [name for name in names if free[name]]
    if wanted.stripe_count == 1:
        return able[:1]
    totals = {name: sum(count for _, count in free[name]) for name in able}
    able.sort(key=lambda name: (-totals[name], names.index(name)))
    chosen: list[str] = []
    servers: set[int] = set()
    for name in able:
        pv = vg.pv(name)
        assert pv is not None
        if pv.server not in servers and len(chosen) < wanted.stripe_count:
            chosen.append(name)
            servers.add(pv.server)
    for name in able:
        if name not in chosen and len(chosen) < wanted.stripe_count:
            chosen.append(name)
    chosen.sort(key=names.index)
    return chosen


def _lengthen(
    last: SegmentRecord, free: dict[str, list[FreeRange]], wanted: Wanted
) -> SegmentRecord:
    """The last segment made longer by what is free directly behind all of its legs."""
    if len(last.stripes) != wanted.stripe_count or (
        wanted.stripe_count > 1 and last.stripe_bytes != wanted.stripe_bytes
    ):
        return last
    legs = [leg for stripe in last.stripes for leg in stripe]
    if wanted.pvs and any(leg.pv not in wanted.pvs for leg in legs):
        return last
    end = {leg.pv: leg.start_extent + last.leg_extents for leg in legs}
    if len(end) != len(legs):
        return last
    lines = min(_free_at(free[pv], start) for pv, start in end.items())
    lines = min(lines, wanted.extent_count // wanted.stripe_count)
    for pv, start in end.items():
        if lines:
            _take(free[pv], start, lines)
    count = last.extent_count + lines * wanted.stripe_count
    return msgspec.structs.replace(last, extent_count=count)


def allocate(vg: VgRecord, lv: LvRecord | None, wanted: Wanted) -> tuple[SegmentRecord, ...]:
    """Segments of the LV (or of a new one) with `wanted.extent_count` more extents.

    The count must be a multiple of the stripe count. Raises StackError when space is short.
    """
    check_stripes(vg, wanted)
    assert wanted.extent_count % wanted.stripe_count == 0
    free = free_ranges(vg)
    segments = list(lv.segments) if lv is not None else []
    missing = wanted.extent_count
    if segments:
        before = segments[-1].extent_count
        segments[-1] = _lengthen(segments[-1], free, wanted)
        missing -= segments[-1].extent_count - before
    position = sum(segment.extent_count for segment in segments)
    while missing:
        chosen = _choose(vg, free, wanted)
        if len(chosen) < wanted.stripe_count:
            raise _no_space(vg, wanted, len(chosen))
        lines = min(free[name][0][1] for name in chosen)
        lines = min(lines, missing // wanted.stripe_count)
        stripes = tuple((LegRecord(name, free[name][0][0]),) for name in chosen)
        for name in chosen:
            _take(free[name], free[name][0][0], lines)
        count = lines * wanted.stripe_count
        segments.append(SegmentRecord(position, count, wanted.stripe_bytes, stripes))
        position += count
        missing -= count
    return tuple(segments)


def _no_space(vg: VgRecord, wanted: Wanted, able: int) -> StackError:
    free = free_extents(vg, wanted.pvs)
    if wanted.stripe_count > 1 and free >= wanted.extent_count:
        return StackError(
            f"Insufficient suitable allocatable extents: {wanted.stripe_count} stripes need as "
            f"many physical volumes with free space, {able} have some.",
            hint="use fewer stripes (-i) or add physical volumes (vgextend)",
        )
    return StackError(
        f'Volume group "{vg.name}" has insufficient free space ({free} extents): '
        f"{wanted.extent_count} required.",
        hint="see: cvmctl vgs; add space with: cvmctl vgextend",
    )


def allocatable_extents(vg: VgRecord, wanted: Wanted) -> int:
    """The largest count up to `wanted.extent_count` that `allocate` can satisfy (for 100%FREE)."""
    low, high = 0, wanted.extent_count // wanted.stripe_count
    while low < high:
        middle = (low + high + 1) // 2
        try:
            count = middle * wanted.stripe_count
            allocate(vg, None, msgspec.structs.replace(wanted, extent_count=count))
            low = middle
        except StackError:
            high = middle - 1
    return low * wanted.stripe_count
