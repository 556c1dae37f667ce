"""What goes in and out of `core.ClusterCore` (clusterd), beside messages, `Tick` and `Sighting`.

Requests carry a `request` number that the runner chooses; exactly one `Reply` with it follows.
"""

from __future__ import annotations

import msgspec

from cluster.control import GroupEvent, GroupMember, ViewInfo
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId, ServerId
from cluster.state import Change, ClusterState

# --- in


class InstanceStarted(msgspec.Struct, frozen=True):
    """`instance.register`: numbers rise by one from 1. No decision is needed."""

    number: InstanceNo


class InstanceEnded(msgspec.Struct, frozen=True):
    """The instance's session closed. Unclean: it is decided out, at once."""

    number: InstanceNo
    clean: bool
    reason: str = ""


class InstancesPurged(msgspec.Struct, frozen=True):
    """The local guard reports PURGED for these instances of this life."""

    numbers: list[InstanceNo]


class ServerUp(msgspec.Struct, frozen=True):
    """A control session to a server has come up: install there now."""

    server: ServerId


class ServerDown(msgspec.Struct, frozen=True):
    """The last control session to a server has closed: it may have restarted."""

    server: ServerId


class Circuits(msgspec.Struct, frozen=True):
    """The other nodes to which a circuit of the control mesh leads now, and their lives; all of
    them, whenever that changes."""

    up: list[tuple[NodeId, Incarnation]]


class Command(msgspec.Struct, frozen=True):
    """Change the register. Reply: the `ClusterState` that has the change, or the error that
    forbids it; NotQuorateError after `timeout_ms` (it may still happen then: read again)."""

    request: int
    change: Change
    timeout_ms: int = 10_000


class ReadState(msgspec.Struct, frozen=True):
    """Linearizable read. Reply: the `ClusterState`."""

    request: int
    timeout_ms: int = 10_000


class Leave(msgspec.Struct, frozen=True):
    """Clean leave of this node: no instances run any more. Reply when decided (stop then)."""

    request: int


class Stay(msgspec.Struct, frozen=True):
    """Nobody waits for the leave any more: it is not tried again. If it is decided all the same,
    this life has been put out like any other."""


class GroupJoin(msgspec.Struct, frozen=True):
    """A registered local instance enters a group. Reply when sequenced; its first GroupEvent is
    the `view` that contains it."""

    request: int
    group: str
    member: GroupMember


class GroupLeave(msgspec.Struct, frozen=True):
    """It leaves cleanly."""

    request: int
    group: str
    instance: Instance


class GroupReleased(msgspec.Struct, frozen=True):
    """Local member `by` has replayed the journal of `subject`."""

    request: int
    group: str
    subject: Instance
    by: Instance


# --- out (in Notify); also `guard_events.Facts` for the guard


class StateChanged(msgspec.Struct, frozen=True):
    """The decided value, the set of installed servers or the quorum changed: push `view` to the
    instances as event `view`; connect to nodes and servers of `state`."""

    state: ClusterState
    view: ViewInfo
    admitted: bool


class Barred(msgspec.Struct, frozen=True):
    """Local instances are barred for ever (0: this whole life). Guard: abort, purge, report."""

    numbers: list[InstanceNo]
    reason: str


class TakeIncarnation(msgspec.Struct, frozen=True):
    """The register knows our incarnation or a higher one: persist this one and build the cores
    anew with it (no instance can have been registered yet)."""

    incarnation: Incarnation


class GroupDelivery(msgspec.Struct, frozen=True):
    """Pass `event` to the local instance `to` (`mesh_key` is left for the runner to fill in)."""

    to: InstanceNo
    event: GroupEvent


class Report(msgspec.Struct, frozen=True):
    """For the event log: suspicion, decision, install, recovery, with plain data."""

    kind: str
    data: dict[str, object]
