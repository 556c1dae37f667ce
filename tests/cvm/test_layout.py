"""The arithmetic of maps: every byte of a volume is exactly one byte of one leg."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CorruptionError, StackError
from cluster.ids import ServerId
from cvm.allocate import Wanted, allocatable_extents, allocate, free_extents, free_ranges
from cvm.layout import (
    RUN_BYTES_MAX,
    Layout,
    Leg,
    Segment,
    Stripe,
    VolumeMap,
    assemble,
    check_map,
    decode_map_untrusted,
)
from cvm.metadata import LvRecord, PvRecord, VgRecord, build_map, check_vg

UNIT = 4096
EXTENT = 64 * 1024


def pv(name: str, extents: int, server: int) -> PvRecord:
    return PvRecord(name, "00" * 16, ServerId(server), name[3:], 0, 1 << 20, extents)


def vg_of(sizes: list[int], lvs: tuple[LvRecord, ...] = ()) -> VgRecord:
    pvs = tuple(pv(f"s{n}/d{n}", size, 129 + n % 2) for n, size in enumerate(sizes))
    return VgRecord("vg0", "11" * 16, 1, EXTENT, pvs, lvs)


@st.composite
def volumes(draw) -> tuple[VgRecord, LvRecord]:
    """A VG with a fragmented volume made by allocating and extending between other volumes."""
    vg = vg_of(draw(st.lists(st.integers(2, 12), min_size=1, max_size=4)))
    lv = None
    for step in range(draw(st.integers(1, 4))):
        stripes = draw(st.integers(1, len(vg.pvs)))
        unit = draw(st.sampled_from([4096, 16384, 65536]))
        count = draw(st.integers(1, 6)) * stripes
        wanted = Wanted(count, stripes, unit)
        try:
            segments = allocate(vg, lv, wanted)
        except StackError:
            break
        lv = LvRecord("vol0", "22" * 16, segments)
        others = tuple(one for one in vg.lvs if one.name != "vol0")
        if draw(st.booleans()):
            taken = msgspec.structs.replace(vg, lvs=(*others, lv))
            try:
                filler = LvRecord(f"f{step}", "33" * 16, allocate(taken, None, Wanted(1)))
                others = (*others, filler)
            except StackError:
                pass
        vg = msgspec.structs.replace(vg, lvs=(*others, lv))
    if lv is None:
        lv = LvRecord("vol0", "22" * 16, allocate(vg, None, Wanted(1)))
        vg = msgspec.structs.replace(vg, lvs=(lv,))
    check_vg(vg)
    return vg, lv


def naive(volume_map: VolumeMap, offset: int) -> tuple[str, int]:
    """Where a byte is, by the definition of striping."""
    for segment in volume_map.segments:
        if segment.start_bytes <= offset < segment.start_bytes + segment.length_bytes:
            relative = offset - segment.start_bytes
            if len(segment.stripes) == 1:
                leg = segment.stripes[0].legs[0]
                return leg.pv, leg.offset_bytes + relative
            number = relative // segment.stripe_bytes
            leg = segment.stripes[number % len(segment.stripes)].legs[0]
            line = number // len(segment.stripes)
            within = relative % segment.stripe_bytes
            return leg.pv, leg.offset_bytes + line * segment.stripe_bytes + within
    raise AssertionError("beyond the end")


@given(volumes())
@settings(max_examples=80, deadline=None)
def test_every_byte_is_one_byte_of_one_leg(made) -> None:
    volume_map = build_map(*made)
    check_map(volume_map)
    layout = Layout(volume_map)
    seen = set()
    for offset in range(0, volume_map.size_bytes, UNIT):
        [(leg, start, length)] = layout.pieces(offset, UNIT)
        assert (layout.pvs[leg], start) == naive(volume_map, offset)
        assert layout.locate(offset, UNIT) == (leg, start)
        assert length == UNIT
        assert (leg, start) not in seen
        seen.add((leg, start))


@given(volumes(), st.data())
@settings(max_examples=80, deadline=None)
def test_plans_carry_every_byte_once(made, data) -> None:
    volume_map = build_map(*made)
    layout = Layout(volume_map)
    sectors = volume_map.size_bytes // 512
    ranges = []
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, sectors - 1))
        ranges.append((start * 512, data.draw(st.integers(0, min(600, sectors - start))) * 512))
    disks = {name: bytearray(2 << 20) for name in layout.pvs}
    model = {}
    for number, (offset, length) in enumerate(ranges):
        content = b"".join(
            (number * sectors + position).to_bytes(4, "little") * 128
            for position in range(length // 512)
        )
        for leg, runs in layout.plan_writes([(offset, content)]).items():
            for run in runs:
                whole = b"".join(run.buffers)
                assert run.end_bytes - run.offset_bytes == len(whole)
                disks[layout.pvs[leg]][run.offset_bytes : run.end_bytes] = whole
        for position in range(0, length, 512):
            model[offset + position] = content[position : position + 512]
    plan = layout.plan_reads(ranges)
    for leg, runs in plan.runs.items():
        for (start, size), (after, more) in pairwise(runs):
            assert start + size != after or size + more > RUN_BYTES_MAX, f"runs of {leg} are one"
    fetched = {
        leg: [bytes(disks[layout.pvs[leg]][start : start + size]) for start, size in runs]
        for leg, runs in plan.runs.items()
    }
    for (offset, length), got in zip(ranges, assemble(plan, fetched), strict=True):
        assert got == b"".join(model[offset + at] for at in range(0, length, 512))
    for offset, block in model.items():
        name, start = naive(volume_map, offset)
        assert disks[name][start : start + 512] == block


@given(volumes(), st.integers(1, 8), st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_extension_moves_nothing_and_takes_only_free_extents(made, count, stripes) -> None:
    vg, lv = made
    free = free_extents(vg)
    try:
        segments = allocate(vg, lv, Wanted(count * stripes, stripes, 16384))
    except StackError:
        assert free < count * stripes or stripes > 1
        return
    larger = LvRecord(lv.name, lv.uuid, segments)
    lvs = tuple(larger if one.name == lv.name else one for one in vg.lvs)
    after = msgspec.structs.replace(vg, lvs=lvs)
    check_vg(after)
    assert free_extents(after) == free - count * stripes
    old, new = build_map(vg, lv), build_map(after, larger)
    assert new.size_bytes == old.size_bytes + count * stripes * EXTENT
    for offset in range(0, old.size_bytes, UNIT):
        assert naive(old, offset) == naive(new, offset)


def test_large_requests_become_one_run_per_leg() -> None:
    vg = vg_of([64, 64])
    lv = LvRecord("vol0", "22" * 16, allocate(vg, None, Wanted(64, 2, 65536)))
    layout = Layout(build_map(vg, lv))
    plan = layout.plan_reads([(0, 1 << 20)])
    assert plan.runs == {0: [(1 << 20, 512 * 1024)], 1: [(1 << 20, 512 * 1024)]}
    writes = layout.plan_writes([(0, bytes(1 << 20))])
    assert [len(runs) for runs in writes.values()] == [1, 1]
    assert [len(runs[0].buffers) for runs in writes.values()] == [8, 8]


def test_neighbours_become_one_run_and_long_runs_are_cut() -> None:
    vg = vg_of([256, 256])
    lv = LvRecord("vol0", "22" * 16, allocate(vg, None, Wanted(128)))
    layout = Layout(build_map(vg, lv))
    base = 1 << 20
    assert layout.plan_reads([(n * 4096, 4096) for n in range(16)]).runs == {0: [(base, 65536)]}
    [[run]] = layout.plan_writes([(n * 4096, bytes(4096)) for n in range(16)]).values()
    assert (run.offset_bytes, len(run.buffers)) == (base, 16)
    long = layout.plan_reads([(4096, 5 << 20)]).runs[0]
    assert [size for _, size in long] == [RUN_BYTES_MAX] * 5
    assert len(layout.plan_writes([(4096, bytes(5 << 20))])[0]) == 5


def test_stripes_spread_over_servers_first() -> None:
    vg = vg_of([10, 5, 9, 8])
    [segment] = allocate(vg, None, Wanted(4, 2))
    assert [stripe[0].pv for stripe in segment.stripes] == ["s0/d0", "s3/d3"]


def test_all_of_free_space_with_stripes() -> None:
    vg = vg_of([10, 7])
    assert allocatable_extents(vg, Wanted(17 // 2 * 2, 2)) == 14
    with pytest.raises(StackError, match="Insufficient suitable"):
        allocate(vg, None, Wanted(16, 2))
    with pytest.raises(StackError, match="insufficient free space"):
        allocate(vg, None, Wanted(18, 1))


def test_linear_volumes_continue_behind_their_end() -> None:
    vg = vg_of([10, 10])
    lv = LvRecord("vol0", "22" * 16, allocate(vg, None, Wanted(4)))
    vg = msgspec.structs.replace(vg, lvs=(lv,))
    segments = allocate(vg, lv, Wanted(8))
    assert [(one.start_extent, one.extent_count) for one in segments] == [(0, 10), (10, 2)]
    assert free_ranges(vg)["s0/d0"] == [(4, 6)]


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": 1 << 20},
        {"segments": ()},
        {"segments": (Segment(0, 8192, 4096, (Stripe((Leg("a", ServerId(129), "a", 0),)),) * 2),)},
        {"segments": (Segment(0, 8192, 0, (Stripe((Leg("a", ServerId(129), "a", 0),)),)),)},
        {"segments": (Segment(4096, 8192, 4096, (Stripe((Leg("a", ServerId(129), "a", 0),)),)),)},
        {"segments": (Segment(0, 8192, 4096, ()),)},
        {"segments": (Segment(0, 8192, 4096, (Stripe(()),)),)},
    ],
)
def test_senseless_maps_are_refused(change) -> None:
    leg = Leg("a", ServerId(129), "a", 0)
    good = VolumeMap("v", "", "g", 1, 8192, (Segment(0, 8192, 4096, (Stripe((leg,)),)),))
    assert decode_map_untrusted(msgspec.to_builtins(good)) == good
    with pytest.raises(CorruptionError):
        decode_map_untrusted(msgspec.to_builtins(msgspec.structs.replace(good, **change)))


def test_nonsense_is_no_map() -> None:
    with pytest.raises(CorruptionError):
        decode_map_untrusted({"name": 1})
