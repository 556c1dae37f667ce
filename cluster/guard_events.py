"""What goes in and out of `detector.GuardCore` (clusterguard), beside datagrams.

clusterd and clusterguard pass `Facts`, `Vouch`, `Vouched`, `Sighting` over their pipe; they are
plain structs without a tag: wrap them as you like.
"""

from __future__ import annotations

import msgspec

from cluster.control import MemberInfo
from cluster.ids import Epoch, Incarnation, InstanceNo, NodeId, ServerId, VoterId
from cluster.messages import EchoAge

# --- in


class Facts(msgspec.Struct, frozen=True, tag="facts"):
    """From clusterd's `ClusterCore` (a Notify): what heartbeats say and to whom they go. Leases
    exist for `instances` only; 0 (clusterd itself) is always among them. `members` is the
    keep-list as clusterd knows it: leases are counted for whom it admits. `cut` are nodes that this
    one does not reach whatever the heartbeats say (rule R9)."""

    epoch: Epoch
    version: int
    config_epoch: int
    electorates: list[list[VoterId]]
    nodes: list[NodeId]
    reached_servers: list[ServerId]
    instances: list[InstanceNo]
    members: list[MemberInfo]
    cut: list[NodeId] = []


class Vouch(msgspec.Struct, frozen=True, tag="vouch"):
    """From clusterd's `Acceptor` (a Notify): the newest accepted value. From now on echo nobody
    that `members` bars and no heartbeat of a lower config_epoch; then answer `Vouched`. A voter
    echoes nothing before the first one."""

    token: int
    config_epoch: int
    members: list[MemberInfo]


class Heard(msgspec.Struct, frozen=True):
    """An authenticated datagram (Heartbeat or Echo) came in. `incarnation` is from its frame."""

    network: int
    source: int
    incarnation: Incarnation
    message: object


class Progress(msgspec.Struct, frozen=True):
    """Ages of the progress stamps of the local instances, read from shared memory (0: clusterd)."""

    ages_ms: list[tuple[InstanceNo, int]]


class LocalPurged(msgspec.Struct, frozen=True):
    """The guard has aborted and purged these local instances (rule G4)."""

    numbers: list[InstanceNo]


class ClusterdDied(msgspec.Struct, frozen=True):
    """The pipe to clusterd has closed: announce it; every instance of this life is over."""


# --- out (in Notify)


class LeaseEnd(msgspec.Struct, frozen=True):
    """The lease of a local instance lasts until `end_ns`; never goes back. Write it to the page."""

    number: InstanceNo
    end_ns: int


class Peer(msgspec.Struct, frozen=True):
    """One node as the guard sees it. `alive`: heard, and hears us, on some network within dead_ms.
    `reach` are the nodes that it says are alive for it; `links` one bool per network."""

    node: NodeId
    incarnation: Incarnation
    alive: bool
    epoch: Epoch
    version: int
    config_epoch: int
    reach: list[int]
    servers: list[int]
    running: list[InstanceNo]
    stalled: list[InstanceNo]
    purged: list[InstanceNo]
    links: list[bool]


class Sighting(msgspec.Struct, frozen=True, tag="sighting"):
    """The guard's picture, after every tick that changed it. `voters` echoed us within dead_ms;
    `witnessed` are lives that some voter or peer hears; `stalled` our own instances (R9)."""

    peers: list[Peer]
    voters: list[int]
    witnessed: list[tuple[int, int]]
    stalled: list[InstanceNo]
    late_ms: int


class Vouched(msgspec.Struct, frozen=True, tag="vouched"):
    """Answer to `Vouch` (give it to the Acceptor): ages of the last echoes of barred instances,
    and the age of this voter's start, which counts for all others."""

    token: int
    ages: list[EchoAge]
    start_age_ns: int
