"""Messages of clusterd's control socket, shared by the daemon, the CLIs and the mount processes.

The socket is `RUN_DIR/clusterd.sock` (SOCK_STREAM, mode 0600, SO_PEERCRED checked). Each message
is one line of JSON, at most 4 MiB. It is symmetric: either side may call the other on a session.

| line | fields | meaning |
|---|---|---|
| call | `id`, `method`, `params` | wants exactly one reply with the same `id` |
| reply | `id`, `result` or `error` {message, hint, exit_code} | |
| event | `event`, `data` | needs no answer |

An instance (mount, mkfs, fsck, ...) keeps its session open for its whole life: the closing of the
session is its death, and clusterd has it barred at once (unless it said `instance.leave`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from cluster.decoding import decode_untrusted
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId, ServerId
from cluster.tls import TlsSection


class Call(msgspec.Struct, tag="call", tag_field="t"):
    id: int
    method: str
    params: dict[str, Any] = {}


class Failure(msgspec.Struct):
    message: str
    hint: str = ""
    exit_code: int = 1


class Reply(msgspec.Struct, tag="reply", tag_field="t"):
    id: int
    result: Any = None
    error: Failure | None = None


class Event(msgspec.Struct, tag="event", tag_field="t"):
    event: str
    data: Any = None


class ServerInfo(msgspec.Struct, frozen=True):
    """A block server as nodes reach it: one address per network, in the order of the networks."""

    id: ServerId
    name: str
    addresses: list[str]
    port: int = 10809


class MemberInfo(msgspec.Struct, frozen=True):
    """One line of a keep-list: admitted is `incarnation`, an instance in `live` or >= `next`."""

    node: NodeId
    incarnation: Incarnation
    live: list[InstanceNo]
    next: InstanceNo
    name: str = ""


class ViewInfo(msgspec.Struct, frozen=True):
    """Data of event `view`: pushed to every instance when the epoch, the set of servers that
    installed it, or the quorum changed. Data on server S is used in epoch E only when S is in
    `installed` of E (rule R3)."""

    epoch: Epoch
    members: list[MemberInfo]
    installed: list[ServerId]
    quorate: bool


class Timing(msgspec.Struct, frozen=True):
    """Derived from the profile (field notes, membership section 2.10), milliseconds."""

    heartbeat_ms: int
    link_down_ms: int
    lease_ms: int
    dead_ms: int
    stable_ms: int
    phase_ms: int
    purge_ms: int


class InstanceGranted(msgspec.Struct, frozen=True):
    """Result of `instance.register`. `secret` is HMAC(cluster key, instance), hex: the proof for
    LOGIN at the block servers. `guard_socket` is where the FUSE descriptor goes."""

    instance: Instance
    node_name: str
    cluster_id: str
    cluster_name: str
    secret: str
    timing: Timing
    servers: list[ServerInfo]
    view: ViewInfo
    guard_socket: str
    tls: TlsSection | None = None


class GroupMember(msgspec.Struct, frozen=True):
    """A member process of a group and where its mesh listens (one address per network)."""

    instance: Instance
    node_name: str
    addresses: list[str]
    port: int


class GroupEvent(msgspec.Struct, frozen=True):
    """Data of event `group`, delivered to all members in the same order (`epoch`, `seq`).

    kind `view`: the membership is now `members`; `joined`, `left` (cleanly) and `failed` say what
    changed. kind `silent`: `subject` is barred on every server of the view, and its caches are
    purged or its lease has ended (rule R8): its locks of non-write modes may go, its journal may be
    replayed. kind `released`: a survivor has replayed the journal of `subject` and said so with
    `group.released`: its write locks may go. `dead` lists the failed instances not yet released,
    `silent` those of them that are silent.
    """

    group: str
    epoch: Epoch
    seq: int
    kind: str
    members: list[GroupMember]
    joined: list[Instance] = []
    left: list[Instance] = []
    failed: list[Instance] = []
    subject: Instance | None = None
    dead: list[Instance] = []
    silent: list[Instance] = []
    mesh_key: str = ""


def encode_line(message: Call | Reply | Event) -> bytes:
    """One message as a line of JSON."""
    return msgspec.json.encode(message) + b"\n"


_Message = Call | Reply | Event
_decoder: msgspec.json.Decoder[_Message] = msgspec.json.Decoder(_Message)


def decode_line_untrusted(line: bytes) -> Call | Reply | Event:
    """The inverse of `encode_line`. Raises ProtocolError."""
    return decode_untrusted(_decoder, line, "control line")
