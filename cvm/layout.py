"""Where the bytes of a volume are: `VolumeMap` and the arithmetic on it. Pure.

A volume is a concatenation of segments; a segment is one or more stripes, dealt out in units of
`stripe_bytes` in turn; a stripe is one or more legs (mirror copies; exactly one for now). A leg is
a range of a PV, named the same on every node.

Invariants (`check_map`): segments follow one another without a gap from byte 0 to `size_bytes`;
every stripe of a segment has the same length, a whole number of stripe units; no two legs overlap.
So every byte of the volume is exactly one byte per copy, and adding segments moves nothing.

`Layout` is a map prepared for the data path. It plans a request as *runs*: what lies side by side
on one leg is one run, whatever it looks like in the volume, so a large request to a striped volume
becomes one contiguous transfer per leg and its bytes are copied once.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence

import msgspec

from cluster.control import ServerInfo
from cluster.decoding import BROKEN
from cluster.device import Buffer
from cluster.errors import CorruptionError
from cluster.ids import ServerId

SEGMENTS_MAX = 4096
STRIPES_MAX = 64
RUN_BYTES_MAX = 1 << 20
"""Longer runs are several requests: a server works on them side by side."""

SECTOR_BYTES = 512


class Leg(msgspec.Struct, frozen=True):
    """One copy of one stripe: `length_bytes / stripes` bytes of PV `pv` from `offset_bytes`. `uuid`
    is that of the PV, which its label must have wherever it is reached."""

    pv: str
    server: ServerId
    export: str
    offset_bytes: int
    state: str = "in_sync"
    uuid: str = ""


class Stripe(msgspec.Struct, frozen=True):
    """All copies of one stripe; a mirror has several legs."""

    legs: tuple[Leg, ...]


class Segment(msgspec.Struct, frozen=True):
    """`length_bytes` of the volume from `start_bytes`. Linear is one stripe of any unit."""

    start_bytes: int
    length_bytes: int
    stripe_bytes: int
    stripes: tuple[Stripe, ...]


class VolumeMap(msgspec.Struct, frozen=True):
    """A volume as every instance that has it open sees it at one sequence number of its VG.

    `generation` counts changes of leg states (mirrors). `servers` says how to reach the servers
    named in the legs, so that a map is complete in itself. `claim` is that of the register's
    entry when the map was given out (cvm/transaction.py).
    """

    name: str
    uuid: str
    vg: str
    sequence: int
    size_bytes: int
    segments: tuple[Segment, ...]
    generation: int = 0
    servers: tuple[ServerInfo, ...] = ()
    claim: int = 0

    @property
    def full_name(self) -> str:
        return f"{self.vg}/{self.name}"


def same_layout(old: VolumeMap, new: VolumeMap) -> bool:
    """True when both maps put every byte at the same place."""
    return old.segments == new.segments and old.size_bytes == new.size_bytes


def map_legs(volume_map: VolumeMap) -> dict[str, Leg]:
    """One leg per PV that the volume uses, by PV name, in order of first use."""
    legs: dict[str, Leg] = {}
    for segment in volume_map.segments:
        for stripe in segment.stripes:
            for leg in stripe.legs:
                legs.setdefault(leg.pv, leg)
    return legs


def decode_map_untrusted(data: object) -> VolumeMap:
    """Build a map from the value that came over the control socket. Raises CorruptionError."""
    try:
        volume_map = msgspec.convert(data, VolumeMap)
    except BROKEN as error:
        raise CorruptionError(f"not a volume map: {error}") from error
    check_map(volume_map)
    return volume_map


def check_map(volume_map: VolumeMap) -> None:
    """Raise CorruptionError unless the invariants of this module hold."""

    def require(condition: bool, text: str) -> None:
        if not condition:
            raise CorruptionError(f"map of {volume_map.full_name}: {text}")

    require(len(volume_map.segments) <= SEGMENTS_MAX, "too many segments")
    position = 0
    used: dict[str, list[tuple[int, int]]] = {}
    for segment in volume_map.segments:
        require(segment.start_bytes == position, f"gap or overlap at byte {position}")
        require(segment.length_bytes > 0, "empty segment")
        count = len(segment.stripes)
        require(1 <= count <= STRIPES_MAX, f"{count} stripes")
        unit = segment.stripe_bytes
        require(unit > 0 and unit % SECTOR_BYTES == 0, f"stripe unit of {unit} bytes")
        require(segment.length_bytes % (count * unit) == 0 or count == 1, "partial stripe")
        require(segment.length_bytes % SECTOR_BYTES == 0, "partial sector")
        for stripe in segment.stripes:
            require(len(stripe.legs) >= 1, "stripe without a leg")
            for leg in stripe.legs:
                require(leg.offset_bytes >= 0, "negative offset")
                end = leg.offset_bytes + segment.length_bytes // count
                used.setdefault(leg.pv, []).append((leg.offset_bytes, end))
        position += segment.length_bytes
    require(position == volume_map.size_bytes, "segments do not add up to the size")
    for pv, ranges in used.items():
        ranges.sort()
        for (_, end), (start, _) in itertools.pairwise(ranges):
            require(end <= start, f"legs overlap on {pv}")


class _Row(msgspec.Struct, frozen=True, gc=False):
    """A segment prepared for arithmetic. `shift` is -1 when the unit is not a power of two."""

    start: int
    end: int
    unit: int
    shift: int
    count: int
    legs: tuple[int, ...]
    offsets: tuple[int, ...]


Run = tuple[int, int]
"""(offset on the leg, length): contiguous on one leg."""

Slice = tuple[int, int, int, int]
"""(leg number, run number on that leg, offset in the run, length): a piece of a request."""


class ReadPlan(msgspec.Struct, frozen=True, gc=False):
    """What to read from each leg, and how the requests are put together from it."""

    runs: dict[int, list[Run]]
    slices: list[list[Slice]]


class WriteRun(msgspec.Struct, gc=False):
    """Buffers that lie side by side on one leg, starting at `offset_bytes`."""

    offset_bytes: int
    end_bytes: int
    buffers: list[memoryview]


def joined(runs: list[WriteRun]) -> list[tuple[int, Buffer]]:
    """One buffer for each run: a copy of at most RUN_BYTES_MAX costs less than the requests that
    it saves."""
    return [
        (run.offset_bytes, run.buffers[0] if len(run.buffers) == 1 else b"".join(run.buffers))
        for run in runs
    ]


class Layout:
    """A map prepared for the data path. Legs are numbered by position in `pvs`."""

    __slots__ = ("_rows", "_starts", "pvs", "size_bytes")

    def __init__(self, volume_map: VolumeMap) -> None:
        self.size_bytes = volume_map.size_bytes
        self.pvs = tuple(map_legs(volume_map))
        numbers = {pv: number for number, pv in enumerate(self.pvs)}
        rows = []
        for segment in volume_map.segments:
            count = len(segment.stripes)
            unit = segment.length_bytes if count == 1 else segment.stripe_bytes
            power = count > 1 and unit & (unit - 1) == 0
            rows.append(
                _Row(
                    start=segment.start_bytes,
                    end=segment.start_bytes + segment.length_bytes,
                    unit=unit,
                    shift=unit.bit_length() - 1 if power else -1,
                    count=count,
                    legs=tuple(numbers[stripe.legs[0].pv] for stripe in segment.stripes),
                    offsets=tuple(stripe.legs[0].offset_bytes for stripe in segment.stripes),
                )
            )
        self._rows = rows
        self._starts = [row.start for row in rows]

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        assert 0 <= offset_bytes, "negative offset"  # noqa: SIM300
        assert length_bytes >= 0, "negative length"
        assert offset_bytes + length_bytes <= self.size_bytes, "beyond the end of the volume"

    def locate(self, offset_bytes: int, length_bytes: int) -> tuple[int, int] | None:
        """(leg number, offset on it) when the range lies in one stripe unit, else None."""
        self._check(offset_bytes, length_bytes)
        if length_bytes == 0:
            return None
        row = self._rows[bisect_right(self._starts, offset_bytes) - 1]
        relative = offset_bytes - row.start
        if row.count == 1:
            if offset_bytes + length_bytes > row.end:
                return None
            return row.legs[0], row.offsets[0] + relative
        unit = row.unit
        if row.shift >= 0:
            number = relative >> row.shift
            within = relative & (unit - 1)
        else:
            number, within = divmod(relative, unit)
        if within + length_bytes > unit:
            return None
        line, stripe = divmod(number, row.count)
        return row.legs[stripe], row.offsets[stripe] + line * unit + within

    def pieces(self, offset_bytes: int, length_bytes: int) -> list[tuple[int, int, int]]:
        """(leg number, offset on it, length) pieces of a range, in the order of the volume; none
        is longer than RUN_BYTES_MAX."""
        self._check(offset_bytes, length_bytes)
        out: list[tuple[int, int, int]] = []
        end = offset_bytes + length_bytes
        index = bisect_right(self._starts, offset_bytes) - 1
        while offset_bytes < end:
            row = self._rows[index]
            stop = min(end, row.end)
            unit = row.unit
            number, within = divmod(offset_bytes - row.start, unit)
            while offset_bytes < stop:
                line, stripe = divmod(number, row.count)
                size = min(unit - within, stop - offset_bytes, RUN_BYTES_MAX)
                out.append((row.legs[stripe], row.offsets[stripe] + line * unit + within, size))
                offset_bytes += size
                within += size
                if within == unit:
                    number += 1
                    within = 0
            index += 1
        return out

    def plan_reads(self, ranges: Sequence[tuple[int, int]]) -> ReadPlan:
        """Plan reads of (offset, length) ranges: contiguous runs per leg, also across ranges."""
        runs: dict[int, list[Run]] = {}
        slices: list[list[Slice]] = []
        for offset, length in ranges:
            parts: list[Slice] = []
            for leg, start, size in self.pieces(offset, length):
                of_leg = runs.setdefault(leg, [])
                begin, had = of_leg[-1] if of_leg else (-1, 0)
                if begin + had == start and had and had + size <= RUN_BYTES_MAX:
                    of_leg[-1] = (begin, had + size)
                    parts.append((leg, len(of_leg) - 1, had, size))
                else:
                    parts.append((leg, len(of_leg), 0, size))
                    of_leg.append((start, size))
            slices.append(parts)
        return ReadPlan(runs, slices)

    def plan_writes(self, parts: Sequence[tuple[int, Buffer]]) -> dict[int, list[WriteRun]]:
        """Plan writes of (offset, data) parts: per leg, runs of buffer slices, uncopied. The parts
        do not overlap."""
        out: dict[int, list[WriteRun]] = {}
        for offset, data in parts:
            view = memoryview(data).cast("B")
            taken = 0
            for leg, start, size in self.pieces(offset, len(view)):
                piece = view[taken : taken + size]
                taken += size
                of_leg = out.setdefault(leg, [])
                last = of_leg[-1] if of_leg else None
                if (
                    last is not None
                    and last.end_bytes == start
                    and start + size - last.offset_bytes <= RUN_BYTES_MAX
                ):
                    last.buffers.append(piece)
                    last.end_bytes += size
                else:
                    of_leg.append(WriteRun(start, start + size, [piece]))
        return out

    def plan_ranges(self, offset_bytes: int, length_bytes: int) -> dict[int, list[Run]]:
        """Per leg, the contiguous runs of a range (discard, zeroes)."""
        return self.plan_reads([(offset_bytes, length_bytes)]).runs


def assemble(plan: ReadPlan, data: dict[int, list[bytes]]) -> list[bytes]:
    """Put the requests of a read plan together; a request that is one run is not copied."""
    out: list[bytes] = []
    for slices in plan.slices:
        if len(slices) == 1:
            leg, number, start, size = slices[0]
            whole = data[leg][number]
            out.append(whole if len(whole) == size else whole[start : start + size])
        else:
            out.append(
                b"".join(
                    memoryview(data[leg][number])[start : start + size]
                    for leg, number, start, size in slices
                )
            )
    return out
