"""The write logs of the block servers as one history of one volume.

Each server's filter `log` records what it executes (`gnbd/server/filters/log_io.py`). Here the logs
are merged by time (all servers and clients read the same clock) and translated from disks to the
volume.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import msgspec

from cluster.ids import ServerId
from cvm.layout import VolumeMap
from cvm.metadata import (
    LABEL_BYTES,
    SLOT_BYTES,
    SLOT_COUNT,
    SLOT_OFFSET_BYTES,
    build_map,
    decode_label_untrusted,
    decode_slot_untrusted,
    decode_text_untrusted,
)
from gnbd.server.filters.log_io import (
    LOG_ENTRY,
    LOG_FLUSH,
    LOG_MAGIC,
    LOG_OPEN,
    LOG_WRITE,
)

HEAD_BYTES = SLOT_OFFSET_BYTES + SLOT_COUNT * SLOT_BYTES
Piece = tuple[int, bytes]
"""(offset in the volume, bytes)"""


class Entry(msgspec.Struct, gc=False):
    """One request as a server executed it; `pieces` of a write are what hit the volume."""

    at_ns: int
    server: int
    operation: int
    fua: bool
    arrived_ns: int
    pieces: list[Piece]


def read_log(path: Path) -> Iterator[tuple[int, bool, int, bytes, int]]:
    """(operation, FUA, offset, data, time). A torn entry at the end was never answered."""
    data = memoryview(path.read_bytes())
    position = 0
    while position + LOG_ENTRY.size <= len(data):
        magic, operation, flags, _, offset, length, at_ns = LOG_ENTRY.unpack_from(data, position)
        assert magic == LOG_MAGIC, f"{path}: no entry at byte {position}"
        position += LOG_ENTRY.size
        if operation == LOG_WRITE:
            if position + length > len(data):
                return
            body = bytes(data[position : position + length])
            position += length
        else:
            body = bytes(length)  # a trim reads as zeroes, as our servers do it
        yield operation, bool(flags & 1), offset, body, at_ns


def read_map(log: Path, volume: str) -> VolumeMap:
    """The layout of a volume, from the metadata that the log of a server puts on its disk."""
    head = bytearray(HEAD_BYTES)
    for operation, _, offset, body, _ in read_log(log):
        if operation not in (LOG_FLUSH, LOG_OPEN) and offset < len(head):
            body = body[: len(head) - offset]
            head[offset : offset + len(body)] = body
    return map_in(bytes(head), volume)


def map_in(head: bytes, volume: str) -> VolumeMap:
    """The layout of a volume, from the first `HEAD_BYTES` of one of its disks."""
    assert decode_label_untrusted(head[:LABEL_BYTES]) is not None, "not a PV"
    slots = []
    for number in range(SLOT_COUNT):
        start = SLOT_OFFSET_BYTES + number * SLOT_BYTES
        slot = decode_slot_untrusted(head[start : start + SLOT_BYTES], start)
        if slot is not None:
            slots.append(slot)
    newest = max(slots, key=lambda slot: slot.sequence)
    group = decode_text_untrusted(newest.text)
    record = group.lv(volume.partition("/")[2])
    assert record is not None, f"no volume {volume}"
    return build_map(group, record)


class Translator:
    """From a byte of a server's disk to a byte of the volume."""

    def __init__(self, volume_map: VolumeMap) -> None:
        self.size_bytes = volume_map.size_bytes
        self._legs: dict[ServerId, list[tuple[int, int, int, int, int, int]]] = {}
        for segment in volume_map.segments:
            count = len(segment.stripes)
            unit = segment.length_bytes if count == 1 else segment.stripe_bytes
            length = segment.length_bytes // count
            for number, stripe in enumerate(segment.stripes):
                (leg,) = stripe.legs
                row = (leg.offset_bytes, length, segment.start_bytes, unit, count, number)
                self._legs.setdefault(leg.server, []).append(row)

    def pieces(self, server: int, offset: int, data: bytes) -> list[Piece]:
        """What of a write lies in the volume."""
        found: list[Piece] = []
        for begin, length, start, unit, count, number in self._legs.get(ServerId(server), []):
            at = max(offset, begin)
            end = min(offset + len(data), begin + length)
            while at < end:
                line, within = divmod(at - begin, unit)
                size = min(unit - within, end - at)
                place = start + (line * count + number) * unit + within
                found.append((place, data[at - offset : at - offset + size]))
                at += size
        return found


def merged(logs: dict[int, list[Path]], translator: Translator) -> list[Entry]:
    """All entries of all servers (id: the logs of its lives) in the order of their times."""

    def entries(server: int, lives: list[Path]) -> Iterator[Entry]:
        for operation, fua, offset, body, at_ns in chain.from_iterable(map(read_log, lives)):
            if operation in (LOG_FLUSH, LOG_OPEN):
                yield Entry(at_ns, server, operation, False, offset, [])
            else:
                pieces = translator.pieces(server, offset, body)
                yield Entry(at_ns, server, LOG_WRITE, fua, at_ns, pieces)

    streams = [entries(server, lives) for server, lives in logs.items()]
    return list(heapq.merge(*streams, key=lambda entry: entry.at_ns))
