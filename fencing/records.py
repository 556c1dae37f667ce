"""What is remembered of each node that was put out: what was seen, who asked, what was tried.

One record per life that was put out as a whole. Every member keeps its own: `seen_by` and `links`
are its own view; attempts and verdict come from the member that tried the methods. At most
`RECORDS_MAX`, oldest first out.

The file `fences` in the state directory is a store (`cluster/paths_io.py`) whose payload is the
list of records as msgpack.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.decoding import decode_untrusted
from cluster.guard_events import Sighting
from cluster.ids import Epoch, Incarnation, NodeId
from cluster.state import WHOLE_NODE, ClusterState, Fence, node_of
from fencing.methods import Attempt

RECORDS_MAX = 64
TEXT_MAX = 400
MS = 1_000_000


class LinkSeen(msgspec.Struct, frozen=True):
    """One network to a node: whether its heartbeats came, and since when that is so."""

    network: int
    up: bool
    since_ms: int


class FenceRecord(msgspec.Struct, frozen=True):
    """One life of a node that was put out.

    `epoch` decided it, `proposed_by` proposed it, `reason` says why or who asked. `alive`: it was
    heard when that became known here. `lease_ms`: from then on until it can show no cached page any
    more, None if not known here. `verdict` is empty while methods are tried; `took_ms` counts from
    the decision.
    """

    epoch: Epoch
    node: NodeId
    name: str
    incarnation: Incarnation
    reason: str
    proposed_by: str
    wall_ms: int
    seen_by: str
    alive: bool = False
    links: list[LinkSeen] = []
    lease_ms: int | None = None
    tried_by: str = ""
    attempts: list[Attempt] = []
    verdict: str = ""
    level: int = 0
    took_ms: int = 0


Key = tuple[NodeId, Incarnation]


def key_of(record: FenceRecord) -> Key:
    """Which life a record is about."""
    return record.node, record.incarnation


class LinkBook:
    """Since when heartbeats of each node come, or do not come, on each network."""

    def __init__(self) -> None:
        self._since: dict[int, list[tuple[bool, int]]] = {}

    def note(self, now_ns: int, sighting: Sighting) -> None:
        """What the guard hears now. Nodes that it does not list are silent."""
        heard = {int(peer.node): peer.links for peer in sighting.peers}
        for node, row in self._since.items():
            heard.setdefault(node, [False] * len(row))
        for node, links in heard.items():
            before = self._since.get(node, [])
            self._since[node] = [
                before[i] if i < len(before) and before[i][0] == up else (up, now_ns)
                for i, up in enumerate(links)
            ]

    def seen(self, now_ns: int, node: int) -> list[LinkSeen]:
        """The links to a node, networks counted from 1."""
        return [
            LinkSeen(number, up, (now_ns - since_ns) // MS)
            for number, (up, since_ns) in enumerate(self._since.get(node, []), 1)
        ]


def record_of(
    state: ClusterState, fence: Fence, wall_ms: int, seen_by: str, **seen: Any
) -> FenceRecord:
    """A new record for an entry of the register's history."""
    assert fence.number == WHOLE_NODE
    info = node_of(state, fence.node)
    proposer = state.writer.split(".")[0].removeprefix("n")
    by = node_of(state, int(proposer)) if proposer.isdigit() else None
    return FenceRecord(
        epoch=fence.epoch, node=fence.node, name=info.name if info else str(fence.node),
        incarnation=fence.incarnation, reason=fence.reason[:TEXT_MAX],
        proposed_by=by.name if by and state.epoch == fence.epoch else "",
        wall_ms=wall_ms, seen_by=seen_by, **seen,
    )  # fmt: skip


class FenceBook:
    """The newest records of one member."""

    def __init__(self, records: list[FenceRecord] | None = None) -> None:
        self._records = {key_of(record): record for record in (records or [])[-RECORDS_MAX:]}

    def records(self) -> list[FenceRecord]:
        """All, oldest first."""
        return list(self._records.values())

    def find(self, key: Key) -> FenceRecord | None:
        """The record of a life."""
        return self._records.get(key)

    def newest(self, node: int) -> FenceRecord | None:
        """The record of the newest life of a node that was put out."""
        found = [record for record in self._records.values() if record.node == node]
        return max(found, key=lambda record: record.incarnation) if found else None

    def open(self) -> list[FenceRecord]:
        """Those without a verdict."""
        return [record for record in self._records.values() if not record.verdict]

    def put(self, record: FenceRecord) -> None:
        """A new record, or a newer state of one. The oldest view goes first, as in the register's
        history: no life that stands there is missing here, and is taken for a new one."""
        self._records[key_of(record)] = record
        if len(self._records) > RECORDS_MAX:
            oldest = min(self._records.values(), key=lambda one: (one.epoch, one.node))
            del self._records[key_of(oldest)]

    def reported(self, told: FenceRecord) -> bool:
        """Another member tells how it went. What was seen here stays. True if that is news."""
        mine = self._records.get(key_of(told))
        if mine is not None and mine.verdict:
            return False
        if mine is not None:
            told = msgspec.structs.replace(
                told, seen_by=mine.seen_by, alive=mine.alive, links=mine.links,
                lease_ms=mine.lease_ms, wall_ms=mine.wall_ms,
            )  # fmt: skip
        self.put(told)
        return True

    def encode(self) -> bytes:
        """The payload of the file."""
        return msgspec.msgpack.encode(self.records())


_book = msgspec.msgpack.Decoder(list[FenceRecord])
_one = msgspec.msgpack.Decoder(FenceRecord)


def decode_book_untrusted(data: bytes) -> FenceBook:
    """The inverse of `FenceBook.encode`. Raises ProtocolError."""
    return FenceBook(decode_untrusted(_book, data, "history of fences"))


def decode_record_untrusted(data: bytes) -> FenceRecord:
    """One record of a `FenceReport`. Raises ProtocolError."""
    return decode_untrusted(_one, data, "record of a fence")
