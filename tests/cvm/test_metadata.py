"""Labels and slots: whole or refused."""

from __future__ import annotations

import random

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import CorruptionError, StackError, UsageError
from cvm.metadata import (
    ARCHIVE_CELL_BYTES,
    LABEL_BYTES,
    SLOT_BYTES,
    PvLabel,
    SlotContent,
    archive_offset,
    check_name,
    decode_label_untrusted,
    decode_slot_untrusted,
    decode_text_untrusted,
    encode_label,
    encode_slot,
    encode_text,
    slot_offset,
)
from tests.cvm.fakes import Cluster
from tests.cvm.test_layout import volumes
from tests.cvm.test_manager import make_volume

UUIDS = st.binary(min_size=16, max_size=16).map(bytes.hex)


@given(UUIDS, UUIDS, st.integers(0, 2**63), st.text(max_size=40))
def test_label_round_trip(uuid, cluster_id, size, name) -> None:
    label = PvLabel(uuid, cluster_id, size, 4 << 20, name)
    data = encode_label(label)
    assert len(data) == LABEL_BYTES
    assert decode_label_untrusted(data) == label


@given(st.integers(0, LABEL_BYTES * 8 - 1))
def test_a_flipped_bit_in_a_label_is_seen(bit) -> None:
    data = bytearray(encode_label(PvLabel("ab" * 16, "cd" * 16, 1 << 30, 4 << 20, "s1/disk0")))
    data[bit // 8] ^= 1 << bit % 8
    if bit < 64:
        assert decode_label_untrusted(bytes(data)) is None
    else:
        with pytest.raises(CorruptionError):
            decode_label_untrusted(bytes(data))


@given(st.integers(0, 2**63), st.binary(max_size=3000), UUIDS, UUIDS)
def test_slot_round_trip(sequence, text, pv_uuid, vg_uuid) -> None:
    content = SlotContent(sequence, pv_uuid, vg_uuid, text)
    offset = slot_offset(sequence)
    data = encode_slot(content, offset)
    assert len(data) % 4096 == 0
    assert decode_slot_untrusted(data, offset) == content


@given(st.data())
@settings(max_examples=200)
def test_damaged_slots_are_refused(data) -> None:
    """Any flipped bit in header or body, any torn tail, any other place."""
    text = b"some text of metadata " * 300
    whole = encode_slot(SlotContent(7, "ab" * 16, "cd" * 16, text), slot_offset(7))
    used = 512 + len(text)
    bit = data.draw(st.sampled_from([*range(64, 512 * 8), *range(512 * 8, used * 8, 97)]))
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptionError):
        decode_slot_untrusted(bytes(damaged), slot_offset(7))
    cut = data.draw(st.integers(1, used // 512)) * 512
    with pytest.raises(CorruptionError):
        decode_slot_untrusted(whole[:cut] + bytes(len(whole) - cut), slot_offset(7))
    with pytest.raises(CorruptionError):
        decode_slot_untrusted(whole, slot_offset(8))
    assert decode_slot_untrusted(bytes(len(whole)), slot_offset(7)) is None


def test_long_texts_are_compressed_or_refused() -> None:
    text = b'{"name": "x"}' * 20000
    data = encode_slot(SlotContent(1, "ab" * 16, "cd" * 16, text), 0, ARCHIVE_CELL_BYTES)
    assert len(data) <= ARCHIVE_CELL_BYTES
    found = decode_slot_untrusted(data, 0)
    assert found is not None
    assert found.text == text
    noise = random.Random(1).randbytes(SLOT_BYTES * 2)
    with pytest.raises(StackError, match="does not fit"):
        encode_slot(SlotContent(1, "ab" * 16, "cd" * 16, noise), 0)


@given(volumes())
@settings(max_examples=50, deadline=None)
def test_text_round_trip(made) -> None:
    assert decode_text_untrusted(encode_text(made[0])) == made[0]


@given(st.binary(max_size=200))
def test_nonsense_text_is_refused(text) -> None:
    with pytest.raises(CorruptionError):
        decode_text_untrusted(text)


def test_overlapping_extents_are_refused() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        manager = cluster.manager()
        vg = await manager._store.load(cluster.entries()["vg0"])
        twin = msgspec.structs.replace(vg.lvs[0], name="twin")
        with pytest.raises(CorruptionError, match="used twice"):
            decode_text_untrusted(encode_text(msgspec.structs.replace(vg, lvs=(*vg.lvs, twin))))

    trio.run(scenario)


def test_the_register_says_which_slot_counts() -> None:
    """A newer slot of a change that was never committed is not believed; a damaged copy on one PV
    is read from another; when none is left the error names every PV."""

    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        entry = cluster.entries()["vg0"]
        vg = await cluster.manager()._store.load(entry)
        rogue = msgspec.structs.replace(vg, sequence=vg.sequence + 1, lvs=())
        same = msgspec.structs.replace(vg, lvs=())
        disk = cluster.disks["s1/disk0"]
        for record in (rogue, same):
            content = SlotContent(record.sequence, vg.pvs[0].uuid, vg.uuid, encode_text(record))
            offset = slot_offset(record.sequence)
            await disk.write(offset, encode_slot(content, offset))
        assert await cluster.manager(2)._store.load(entry) == vg
        await cluster.disks["s2/disk0"].write(slot_offset(vg.sequence) + 512, b"?" * 512)
        assert await cluster.manager(2)._store.load(entry) == vg, "the archive has it too"
        for disk in cluster.disks.values():
            await disk.write_zeroes(archive_offset(vg.sequence), 4096)
        with pytest.raises(StackError, match=r"s1/disk0.*given up.*s2/disk0.*torn"):
            await cluster.manager(2)._store.load(entry)

    trio.run(scenario)


@pytest.mark.parametrize("name", ["", "-a", "a b", ".", "..", "a/b", "x" * 128, "snapshot1", "ä"])
def test_bad_names(name) -> None:
    with pytest.raises(UsageError):
        check_name("Logical volume", name)
