"""Every message that the cores of this package send each other, and their encoding.

Control messages go over the authenticated TCP sessions, `Heartbeat` and `Echo` in datagrams of at
most `DATAGRAM_BYTES_MAX`. The encoding is msgpack, a map with the tag in field `t`.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.control import GroupMember, MemberInfo
from cluster.decoding import decode_untrusted
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from cluster.state import ClusterState, Tombstone

DATAGRAM_BYTES_MAX = 1400


class Message(msgspec.Struct, frozen=True, tag_field="t"):
    """Base of all messages."""


# --- register


class Ballot(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Order of proposals; unique because an incarnation is never used twice."""

    counter: int
    node: int
    incarnation: int


ZERO_BALLOT = Ballot(0, 0, 0)


class Prepare(Message, frozen=True, tag="prepare"):
    """Phase 1. `config_epoch` is the newest that the proposer knows."""

    request: int
    ballot: Ballot
    config_epoch: int


class Accept(Message, frozen=True, tag="accept"):
    """Phase 2."""

    request: int
    ballot: Ballot
    config_epoch: int
    value: ClusterState


class Query(Message, frozen=True, tag="query"):
    """Quorum read: what have you accepted?"""

    request: int


class Initialise(Message, frozen=True, tag="initialise"):
    """Make an empty store on a voter that is being added; `boot` is from its `Uninitialised`."""

    request: int
    boot: int


class Promised(Message, frozen=True, tag="promised"):
    request: int
    ballot: Ballot
    accepted: Ballot
    value: ClusterState | None


class EchoAge(msgspec.Struct, frozen=True, array_like=True):
    """How long ago a voter last echoed a now barred instance (rule R8)."""

    instance: Instance
    age_ns: int


class Accepted(Message, frozen=True, tag="accepted"):
    """`ages` of the instances that the value bars and this voter has echoed; for every other one
    the age is `start_age_ns`, that of the voter's start."""

    request: int
    ballot: Ballot
    ages: list[EchoAge]
    start_age_ns: int


class Refused(Message, frozen=True, tag="refused"):
    """A higher ballot was promised, or the request's config_epoch is too low."""

    request: int
    promised: Ballot
    accepted: Ballot
    value: ClusterState | None


class Uninitialised(Message, frozen=True, tag="uninitialised"):
    """This voter has no store: it counts for nothing."""

    request: int
    boot: int


class Current(Message, frozen=True, tag="current"):
    """Answer to `Query`."""

    request: int
    accepted: Ballot
    value: ClusterState | None


# --- heartbeats


class Beat(msgspec.Struct, frozen=True, array_like=True):
    """One instance of the sender: its number and the age of its progress stamp."""

    number: InstanceNo
    stamp_age_ms: int


class Heartbeat(Message, frozen=True, tag="hb"):
    """From clusterguard to every node and every voter, over every network, each heartbeat_ms."""

    node: NodeId
    incarnation: Incarnation
    sequence: int
    epoch: Epoch
    version: int
    config_epoch: int
    instances: list[Beat]
    purged: list[InstanceNo]
    reach: int
    servers: int
    late_ms: int
    clusterd_dead: bool = False


class Echo(Message, frozen=True, tag="echo"):
    """Answer to a heartbeat. `vouched` only from voters; `hears` are the lives that the sender has
    heard within dead_ms (servers: so that a joining node knows whom it must not expel)."""

    sender: int
    sequence: int
    incarnation: Incarnation
    config_epoch: int
    voter: bool
    vouched: list[InstanceNo]
    hears: list[tuple[int, int]] = []


# --- membership


class DecidedNotice(Message, frozen=True, tag="decided"):
    """The register was decided; a hint that saves a read. When this was sent the youngest echo
    among the voters that accepted was `ages` old, `rest_age_ns` for any other barred instance."""

    state: ClusterState
    ages: list[EchoAge] = []
    rest_age_ns: int = 0


class Install(Message, frozen=True, tag="install"):
    """To a server: this epoch with this keep-list counts now. Idempotent, repeated for ever (it is
    also the sign of life that the server needs by rule R3). `sender` must be in the keep-list."""

    request: int
    sender: NodeId
    incarnation: Incarnation
    epoch: Epoch
    members: list[MemberInfo]
    tombstones: list[Tombstone] = []
    dead_ms: int = 0


class Installed(Message, frozen=True, tag="installed"):
    """The server has `epoch` durable, drained and bars everyone else. `epoch` above the asked one:
    the asker is behind; below: the install was refused (`reason`)."""

    request: int
    epoch: Epoch
    reason: str = ""


class PurgedNotice(Message, frozen=True, tag="purged"):
    """Instances whose mounts are aborted and whose kernel caches are empty (rule G4)."""

    instances: list[Instance]


class FenceReport(Message, frozen=True, tag="fence"):
    """How putting a node out went: a record of `fencing.records`, encoded. For people only."""

    record: bytes


class DeathReport(Message, frozen=True, tag="death"):
    """An instance of the sender died; any member may decide it out."""

    instance: Instance
    running: list[InstanceNo]


# --- process groups


class JoinOp(msgspec.Struct, frozen=True, tag="join"):
    group: str
    member: GroupMember


class LeaveOp(msgspec.Struct, frozen=True, tag="leave"):
    group: str
    instance: Instance


class SilentOp(msgspec.Struct, frozen=True, tag="silent"):
    instance: Instance


class ReleasedOp(msgspec.Struct, frozen=True, tag="released"):
    group: str
    subject: Instance
    by: Instance


class ViewOp(msgspec.Struct, frozen=True, tag="view"):
    """Sequenced first in an epoch, by the flush."""

    members: list[MemberInfo]


GroupOp = JoinOp | LeaveOp | SilentOp | ReleasedOp | ViewOp


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One sequenced operation. `node`, `incarnation`, `number` name the request it came from."""

    epoch: Epoch
    seq: int
    node: int
    incarnation: int
    number: int
    op: GroupOp


class GroupState(msgspec.Struct, frozen=True):
    """One process group as every node has it after the same entries."""

    name: str
    members: list[GroupMember]
    dead: list[Instance] = []
    silent: list[Instance] = []


class GroupsSnapshot(msgspec.Struct, frozen=True):
    """All groups after entry (`epoch`, `seq`); `requests` the newest done request per life (node,
    incarnation, number); `admitted` the keep-list of the newest sequenced view."""

    epoch: Epoch
    seq: int
    groups: list[GroupState]
    requests: list[tuple[int, int, int]]
    admitted: list[MemberInfo]


class GroupRequest(Message, frozen=True, tag="g_request"):
    """Node -> sequencer: sequence this. Sent again until it has come back."""

    epoch: Epoch
    number: int
    op: GroupOp


class GroupOrder(Message, frozen=True, tag="g_order"):
    """Sequencer -> all: keep this entry and acknowledge it; everything up to `committed` is
    acknowledged by all and may be delivered."""

    epoch: Epoch
    entries: list[Entry]
    committed: int


class GroupAck(Message, frozen=True, tag="g_ack"):
    """Node -> sequencer: has all entries up to `seq`, has delivered up to `delivered`."""

    epoch: Epoch
    seq: int
    delivered: int


class GroupFlush(Message, frozen=True, tag="g_flush"):
    """Node -> new sequencer: what I have applied (None: I am new), and what came after it."""

    epoch: Epoch
    snapshot: GroupsSnapshot | None
    pending: list[Entry]


class GroupSync(Message, frozen=True, tag="g_sync"):
    """New sequencer -> all: the flushed order. Take `snapshot` if you have nothing older than it,
    apply `entries` after what you have; the last one is the ViewOp of `epoch`."""

    epoch: Epoch
    snapshot: GroupsSnapshot
    entries: list[Entry]


AnyMessage = (
    Prepare | Accept | Query | Initialise | Promised | Accepted | Refused | Uninitialised | Current
    | Heartbeat | Echo | DecidedNotice | Install | Installed | PurgedNotice | DeathReport
    | GroupRequest | GroupOrder | GroupAck | GroupFlush | GroupSync | FenceReport
)  # fmt: skip

ACCEPTOR_MESSAGES = (Prepare, Accept, Query, Initialise)
"""To `register.Acceptor`; everything else on a control session goes to `core.ClusterCore`."""

_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode_message(message: Message) -> bytes:
    """One message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode_message_untrusted(data: bytes | memoryview) -> Message:
    """The inverse of `encode_message`. Raises ProtocolError."""
    result = decode_untrusted(_decoder, data, "cluster message")
    assert isinstance(result, Message)
    return result
