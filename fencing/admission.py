"""Who may touch the exports of this server: installs, bars and the right to serve (R2, R3).

A pure state machine. A decided view is *installed* on a server as an epoch and a keep-list; who is
not admitted by the list is barred for ever. Invariants, asserted by `check`:

- the epoch never goes down, and one epoch carries one keep-list;
- per incarnation the admitted set (`live` and everything >= `next`) only shrinks;
- a node that was removed leaves a tombstone: no incarnation <= it is admitted ever again;
- nobody is served before a current member has installed an epoch in this life of the server, nor
  after `dead_ms` without an authenticated message from a member of the installed epoch.

The order of one install, driven by the shell: `InstallRequested` -> `Persist` (durable) ->
`Persisted` -> `Revoke` (access words stored, then drain, then flush of the back ends) -> `Drained`
-> `Answer`. The answer therefore means: nothing of a barred instance is in flight or volatile.
"""

from __future__ import annotations

import enum

import msgspec

from cluster.control import MemberInfo
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId

DEAD_MS_DEFAULT = 10_000
MEMBERS_MAX = 64
LIVE_MAX = 4096


class Verdict(enum.Enum):
    """What a keep-list says about an instance."""

    ADMITTED = "admitted"
    BARRED = "barred"
    """Final: this instance never comes back."""
    UNKNOWN = "unknown"
    """Not admitted by what is installed here, but a later view may admit it: wait."""


class InstallRecord(msgspec.Struct, frozen=True):
    """The durable part. `members` and `carried_tombstones` are as the install carried them;
    `tombstones` also holds what this server concluded itself from nodes that disappeared."""

    epoch: Epoch
    members: list[MemberInfo]
    carried_tombstones: dict[NodeId, Incarnation]
    tombstones: dict[NodeId, Incarnation]
    dead_ms: int = DEAD_MS_DEFAULT


class InstallRequested(msgspec.Struct, frozen=True):
    """An authenticated install from `sender`."""

    sender: NodeId
    sender_incarnation: Incarnation
    epoch: Epoch
    members: list[MemberInfo]
    tombstones: dict[NodeId, Incarnation]
    dead_ms: int = DEAD_MS_DEFAULT


class Persisted(msgspec.Struct, frozen=True):
    """`Persist` is durable."""

    record: InstallRecord


class Drained(msgspec.Struct, frozen=True):
    """Nothing revoked is in flight any more and the back ends are flushed."""

    epoch: Epoch


class Heard(msgspec.Struct, frozen=True):
    """Any authenticated message."""

    node: NodeId
    incarnation: Incarnation


class Tick(msgspec.Struct, frozen=True):
    """The deadline may have passed."""


Event = InstallRequested | Persisted | Drained | Heard | Tick


class Refuse(msgspec.Struct, frozen=True):
    """The install is not accepted; `epoch` is the one installed here."""

    reason: str
    epoch: Epoch


class Persist(msgspec.Struct, frozen=True):
    """Make the record durable, then give `Persisted`."""

    record: InstallRecord


class Revoke(msgspec.Struct, frozen=True):
    """Store the access words anew, drain what lost access, flush, then give `Drained`."""

    epoch: Epoch


class Answer(msgspec.Struct, frozen=True):
    """The install of this epoch is done."""

    epoch: Epoch


class StopServing(msgspec.Struct, frozen=True):
    """Store the access words anew: nobody is served until the next install."""


Action = Refuse | Persist | Revoke | Answer | StopServing


def admits(member: MemberInfo, incarnation: Incarnation, number: InstanceNo) -> bool:
    """Whether one line of a keep-list admits an instance of its node."""
    return member.incarnation == incarnation and (number >= member.next or number in member.live)


def verdict_of(record: InstallRecord | None, instance: Instance) -> Verdict:
    """What the installed keep-list says about an instance."""
    if record is None:
        return Verdict.UNKNOWN
    if instance.incarnation <= record.tombstones.get(instance.node, 0):
        return Verdict.BARRED
    for member in record.members:
        if member.node == instance.node:
            if admits(member, instance.incarnation, instance.number):
                return Verdict.ADMITTED
            later = instance.incarnation > member.incarnation
            return Verdict.UNKNOWN if later else Verdict.BARRED
    return Verdict.UNKNOWN


def _shrinks(old: MemberInfo, new: MemberInfo) -> bool:
    """Same incarnation: is everyone that `new` admits admitted by `old`?"""
    if new.next < old.next:
        between = range(new.next, old.next)
        if any(number not in old.live for number in between):
            return False
    return all(number in old.live or number >= old.next for number in new.live)


def _normal(members: list[MemberInfo]) -> list[MemberInfo]:
    """The same keep-list in one spelling, so that two copies compare equal."""
    return [
        MemberInfo(m.node, m.incarnation, sorted(set(m.live)), m.next, m.name)
        for m in sorted(members, key=lambda m: m.node)
    ]


def _essence(members: list[MemberInfo]) -> list[tuple[int, int, tuple[int, ...], int]]:
    return [(m.node, m.incarnation, tuple(m.live), m.next) for m in members]


class Admission:
    """Installed epoch, bars and the right to serve of one gnbd-server."""

    def __init__(self, record: InstallRecord | None, now_ns: int) -> None:
        self.record = record
        self.serving = False
        self.drained_epoch = Epoch(0)
        self.heard_ns = now_ns

    @property
    def epoch(self) -> Epoch:
        return self.record.epoch if self.record else Epoch(0)

    def verdict(self, instance: Instance) -> Verdict:
        """What is known about an instance; serving or not is a separate question."""
        return verdict_of(self.record, instance)

    def deadline(self) -> int | None:
        """When `Tick` must come."""
        if not self.serving or self.record is None:
            return None
        return self.heard_ns + self.record.dead_ms * 1_000_000

    def step(self, now_ns: int, event: Event) -> list[Action]:
        match event:
            case InstallRequested():
                return [self._requested(now_ns, event)]
            case Persisted(record):
                assert self.record is None or record.epoch >= self.record.epoch
                self.record = record
                return [Revoke(record.epoch)]
            case Drained(epoch):
                # A later epoch may have been recorded meanwhile; its own answer opens the door.
                if self.record is not None and epoch == self.record.epoch:
                    self.serving = True
                    self.drained_epoch = epoch
                    self.heard_ns = max(self.heard_ns, now_ns)
                return [Answer(epoch)]
            case Heard(node, incarnation):
                if self.is_member(node, incarnation):
                    self.heard_ns = max(self.heard_ns, now_ns)
                return []
            case Tick():
                deadline = self.deadline()
                if deadline is None or now_ns < deadline:
                    return []
                self.serving = False
                return [StopServing()]

    def is_member(self, node: NodeId, incarnation: Incarnation) -> bool:
        """Whether the node, in this incarnation, stands in the installed keep-list."""
        members = self.record.members if self.record else []
        return any(m.node == node and m.incarnation == incarnation for m in members)

    def is_in_force(
        self, sender: NodeId, incarnation: Incarnation, epoch: Epoch, members: list[MemberInfo]
    ) -> bool:
        """Whether exactly this was installed, drained and answered in this life of the server."""
        record = self.record
        return (
            self.serving
            and record is not None
            and epoch == record.epoch == self.drained_epoch
            and self.is_member(sender, incarnation)
            and _essence(_normal(members)) == _essence(record.members)
        )

    def _requested(self, now_ns: int, event: InstallRequested) -> Refuse | Persist:
        members = _normal(event.members)
        reason = self._objection(event, members)
        if reason:
            return Refuse(reason, self.epoch)
        tombstones = dict(event.tombstones)
        old = self.record
        if old is not None:
            kept = {m.node for m in members}
            for member in old.members:
                if member.node not in kept:
                    known = tombstones.get(member.node, Incarnation(0))
                    tombstones[member.node] = max(known, member.incarnation)
            for node, incarnation in old.tombstones.items():
                tombstones[node] = max(tombstones.get(node, Incarnation(0)), incarnation)
        self.heard_ns = max(self.heard_ns, now_ns)
        return Persist(
            InstallRecord(event.epoch, members, dict(event.tombstones), tombstones, event.dead_ms)
        )

    def _objection(self, event: InstallRequested, members: list[MemberInfo]) -> str:
        """Why this install must not be taken, or an empty text."""
        if event.epoch < 1 or event.dead_ms < 1 or len(members) > MEMBERS_MAX:
            return "malformed install"
        if len({m.node for m in members}) != len(members):
            return "a node stands in the keep-list twice"
        if any(len(m.live) > LIVE_MAX for m in members):
            return "too many instances in the keep-list"
        if not any(
            m.node == event.sender and m.incarnation == event.sender_incarnation for m in members
        ):
            return f"the sender n{event.sender} is not in the keep-list it carries"
        old = self.record
        if old is None:
            return ""
        if event.epoch < old.epoch:
            return f"epoch {event.epoch} is older than the installed epoch {old.epoch}"
        if event.epoch == old.epoch:
            same = _essence(members) == _essence(old.members)
            if not same or event.tombstones != old.carried_tombstones:
                return f"epoch {event.epoch} is installed with another keep-list"
            return ""
        return self._regression(old, members)

    @staticmethod
    def _regression(old: InstallRecord, members: list[MemberInfo]) -> str:
        known = {m.node: m for m in old.members}
        for member in members:
            if member.incarnation <= old.tombstones.get(member.node, 0):
                return f"n{member.node} incarnation {member.incarnation} is barred for ever"
            before = known.get(member.node)
            if before is None or member.incarnation > before.incarnation:
                continue
            if member.incarnation < before.incarnation:
                return f"n{member.node} goes back to incarnation {member.incarnation}"
            if not _shrinks(before, member):
                return f"n{member.node} would admit an instance that is barred"
        return ""

    def check(self) -> None:
        """Assert the invariants that can be seen in one state."""
        assert not self.serving or self.record is not None
        if self.record is not None:
            for member in self.record.members:
                assert member.incarnation > self.record.tombstones.get(member.node, 0)
