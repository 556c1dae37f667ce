"""The event stream: what happened, with stable names, for people and for programs.

Bounded: the newest `EVENTS_MAX` stay in memory, older ones are gone. A follower that asks for
what is after sequence S gets what is left of it. One event is one line of JSON; names are only
ever added.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Any

import msgspec

EVENTS_MAX = 4096


class EventName(enum.StrEnum):
    """Every event there is."""

    NODE_STARTED = "node.started"
    NODE_JOINED = "node.joined"
    NODE_LEFT = "node.left"
    NODE_SUSPECTED = "node.suspected"
    NODE_SEEN = "node.seen"
    NODE_EXPELLED = "node.expelled"
    LINK_UP = "link.up"
    LINK_DOWN = "link.down"
    GUARD_LOST = "guard.lost"
    VIEW_DECIDED = "view.decided"
    VIEW_INSTALLED = "view.installed"
    QUORUM_LOST = "quorum.lost"
    QUORUM_GAINED = "quorum.gained"
    VOTER_CHANGED = "voter.changed"
    SERVER_ADDED = "server.added"
    SERVER_REMOVED = "server.removed"
    SERVER_UP = "server.up"
    SERVER_DOWN = "server.down"
    SERVER_INSTALLED = "server.installed"
    INSTANCE_STARTED = "instance.started"
    INSTANCE_LEFT = "instance.left"
    INSTANCE_DIED = "instance.died"
    INSTANCE_PURGED = "instance.purged"
    INSTANCE_SILENT = "instance.silent"
    LEASE_LAPSED = "lease.lapsed"
    LEASE_RENEWED = "lease.renewed"
    GROUP_VIEW = "group.view"
    GROUP_SILENT = "group.silent"
    GROUP_RELEASED = "group.released"
    LOCKS_RECOVERED = "locks.recovered"
    JOURNAL_REPLAYED = "journal.replayed"
    JOURNAL_DAMAGED = "journal.damaged"
    FS_DAMAGED = "fs.damaged"
    DISK_DAMAGED = "disk.damaged"
    VOLUME_CHANGED = "volume.changed"
    VOLUME_SUSPENDED = "volume.suspended"
    VOLUME_RESUMED = "volume.resumed"
    MOUNT_BACK = "mount.back"
    MOUNT_FAILED = "mount.failed"
    FENCED = "fence.done"
    FENCE_FAILED = "fence.failed"
    BARRED = "node.barred"
    NOTE = "note"


class EventRecord(msgspec.Struct, frozen=True, rename={"name": "event"}):
    """One event; its name is `event` in JSON. `wall_ms` is for people only;
    `at_ns` is the node's boot-time clock."""

    sequence: int
    wall_ms: int
    at_ns: int
    node: str
    name: str
    text: str
    epoch: int = 0
    fields: dict[str, Any] = {}


class EventLog:
    """A ring of the newest events."""

    def __init__(self, node: str, limit: int = EVENTS_MAX) -> None:
        self._node = node
        self._records: deque[EventRecord] = deque(maxlen=limit)
        self._sequence = 0

    def add(
        self, clock: tuple[int, int], name: str, text: str, epoch: int, fields: dict[str, Any]
    ) -> EventRecord:
        """Append an event; `clock` is (boot-time ns, wall ms)."""
        self._sequence += 1
        record = EventRecord(
            self._sequence, clock[1], clock[0], self._node, str(name), text, epoch, fields
        )
        self._records.append(record)
        return record

    def after(self, sequence: int, limit: int = EVENTS_MAX) -> list[EventRecord]:
        """The newest `limit` events with a higher sequence number, oldest first."""
        found = [record for record in self._records if record.sequence > sequence]
        return found[-limit:]


def encode_event(record: EventRecord) -> bytes:
    """One event as a line of JSON."""
    return msgspec.json.encode(record) + b"\n"
