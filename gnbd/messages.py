"""Messages of the private options LOGIN and CONTROL, msgpack.

LOGIN (R6): `LoginHello` -> `LoginNonce` -> `LoginProof` -> `LoginResult`, each request one option,
each answer a CFS reply and an ACK. The proof is `cluster.wire.login_proof` over the server's nonce;
the server proves itself over the client's nonce in the same way.

CONTROL: `ControlHello` -> `ControlWelcome` in the clear, giving two nonces; both ends derive the
keys of the session from the cluster key and these nonces, so that no frame of another session is
believed. Everything after that is one sealed `cluster.wire` frame each way, payload one of
`Request` and one of `Answer`; sequence numbers rise by one and are checked.
"""

from __future__ import annotations

import msgspec

from cluster.control import MemberInfo
from cluster.decoding import decode_untrusted
from cluster.errors import (
    BusyError,
    CorruptionError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    StackError,
    UsageError,
)
from cluster.ids import Epoch, Incarnation, Instance, NodeId, ServerId
from cluster.wire import Keys, derived_key
from fencing.reservations import Capabilities, FullStatus
from gnbd.exports import Export

NONCE_BYTES = 32

LOGIN_OK = "ok"
LOGIN_BARRED = "barred"
LOGIN_UNKNOWN = "unknown"
LOGIN_NOT_SERVING = "not serving"
LOGIN_OLD_GENERATION = "old generation"
LOGIN_NO_EXPORT = "no export"
LOGIN_REFUSED = "refused"


class LoginHello(msgspec.Struct, frozen=True, tag_field="t", tag="hello"):
    """`path` names one network of this instance to this export; `generation` rises per reconnect.
    `sequence` is the volume sequence number the instance works with (0: none)."""

    instance: Instance
    export: str
    path: int
    generation: int
    nonce: bytes
    sequence: int = 0


class LoginNonce(msgspec.Struct, frozen=True, tag_field="t", tag="nonce"):
    nonce: bytes


class LoginProof(msgspec.Struct, frozen=True, tag_field="t", tag="proof"):
    proof: bytes


class LoginResult(msgspec.Struct, frozen=True, tag_field="t", tag="result"):
    """`epoch` is the installed one. `generation` is the least that the server accepts on this path.
    `cache_generation` changes whenever acknowledged unflushed writes may have been lost (R7)."""

    status: str
    message: str = ""
    epoch: Epoch = Epoch(0)
    generation: int = 0
    cache_generation: int = 0
    proof: bytes = b""
    checksums: bool = False
    """The export has an integrity area: READ_CHECKED and WRITE_CHECKED are worth what they cost."""


class ControlHello(msgspec.Struct, frozen=True, tag_field="t", tag="control"):
    nonce: bytes


class ControlWelcome(msgspec.Struct, frozen=True, tag_field="t", tag="welcome"):
    nonce: bytes
    server_id: ServerId
    name: str


Opening = LoginHello | LoginProof | ControlHello
_opening: msgspec.msgpack.Decoder[Opening] = msgspec.msgpack.Decoder(Opening)


def decode_opening_untrusted(data: bytes) -> Opening:
    """A clear-text private request. Raises ProtocolError."""
    return decode_untrusted(_opening, data, "login or control opening")


class Ping(msgspec.Struct, frozen=True, tag_field="t", tag="ping"):
    """Only says that a member is there (R3)."""


class Install(msgspec.Struct, frozen=True, tag_field="t", tag="install"):
    """Rule R2; the answer comes after drain and flush. `dead_ms`: T_dead for R3's second line."""

    epoch: Epoch
    members: list[MemberInfo]
    tombstones: dict[NodeId, Incarnation] = {}
    dead_ms: int = 10_000


class ClusterCall(msgspec.Struct, frozen=True, tag_field="t", tag="cluster"):
    """One `cluster.messages` message: for the register's acceptor in this server, or an Install."""

    payload: bytes


class ReserveOut(msgspec.Struct, frozen=True, tag_field="t", tag="pr out"):
    """PERSISTENT RESERVE OUT for a nexus on an export; numbers as SPC. `target` and `unregister`
    belong to REGISTER AND MOVE."""

    export: str
    nexus: Instance
    action: int
    key: int = 0
    service_key: int = 0
    type: int = 0
    scope: int = 0
    aptpl: bool = True
    target: Instance | None = None
    unregister: bool = False


class ReserveIn(msgspec.Struct, frozen=True, tag_field="t", tag="pr in"):
    """PERSISTENT RESERVE IN: everything that its service actions tell of an export."""

    export: str


class StatusRequest(msgspec.Struct, frozen=True, tag_field="t", tag="status"):
    pass


class ExportsRequest(msgspec.Struct, frozen=True, tag_field="t", tag="exports"):
    pass


class ExportAdd(msgspec.Struct, frozen=True, tag_field="t", tag="export add"):
    """Until the server ends; the file is not changed."""

    export: Export


class ExportRemove(msgspec.Struct, frozen=True, tag_field="t", tag="export remove"):
    """Answered when nothing of it executes any more and all is durable. Clients are cut off only
    with `force`."""

    name: str
    force: bool = False


class Reload(msgspec.Struct, frozen=True, tag_field="t", tag="reload"):
    """Read the exports file again; as SIGHUP."""


class ConnectionsRequest(msgspec.Struct, frozen=True, tag_field="t", tag="connections"):
    pass


class PathsRequest(msgspec.Struct, frozen=True, tag_field="t", tag="paths"):
    pass


class ExportResize(msgspec.Struct, frozen=True, tag_field="t", tag="export resize"):
    """Only grows."""

    name: str
    size_bytes: int


class FilterCommand(msgspec.Struct, frozen=True, tag_field="t", tag="filter"):
    """`action`: add, set or remove; the filter is on top of the export's stack."""

    export: str
    action: str
    kind: str
    parameters: dict[str, int | str] = {}


class IntegrityCommand(msgspec.Struct, frozen=True, tag_field="t", tag="integrity"):
    """Give an export an integrity area, or take it away; answered when it is in force. The sums of
    what is there are computed afterwards."""

    export: str
    on: bool


class ScrubCommand(msgspec.Struct, frozen=True, tag_field="t", tag="scrub"):
    """`action`: start, stop or status; `rate_bytes_s` 0: as fast as it goes."""

    export: str
    action: str
    rate_bytes_s: int = 0


class SequenceMinimum(msgspec.Struct, frozen=True, tag_field="t", tag="minimum"):
    """Refuse every nexus that works with a lower volume sequence number; the answer comes after
    the requests of those have been drained. Never goes down."""

    export: str
    sequence: int


class Leave(msgspec.Struct, frozen=True, tag_field="t", tag="leave"):
    """The instance has ended cleanly: its registrations go."""

    instance: Instance


Request = (
    Ping
    | Install
    | ClusterCall
    | ReserveOut
    | ReserveIn
    | StatusRequest
    | ExportsRequest
    | ExportAdd
    | ExportRemove
    | ExportResize
    | Reload
    | ConnectionsRequest
    | PathsRequest
    | FilterCommand
    | IntegrityCommand
    | ScrubCommand
    | SequenceMinimum
    | Leave
)


LOCAL_REQUESTS = (
    Ping, ReserveIn, StatusRequest, ExportsRequest, ExportAdd, ExportRemove, ExportResize, Reload,
    ConnectionsRequest, PathsRequest, FilterCommand, IntegrityCommand, ScrubCommand,
)  # fmt: skip
"""What may be asked through the Unix socket in the state directory, whose permissions are all the
authentication it has: nothing that decides for the cluster."""


class Done(msgspec.Struct, frozen=True, tag_field="t", tag="done"):
    """Success; `epoch` is the installed one. `damaged`, in the answer to a Ping: blocks (export,
    address in bytes) that were found to be wrong since the Ping before in this session."""

    epoch: Epoch = Epoch(0)
    message: str = ""
    damaged: list[tuple[str, int]] = []


REFUSALS: dict[str, type[StackError]] = {
    "usage": UsageError, "busy": BusyError, "not found": NotFoundError, "no space": NoSpaceError,
    "not permitted": NotPermittedError, "damaged": CorruptionError,
}  # fmt: skip


class Refused(msgspec.Struct, frozen=True, tag_field="t", tag="refused"):
    """`kind`: `epoch` (an install that is too old or different), one of `REFUSALS`, or
    `barred`, `failed`."""

    kind: str
    message: str
    epoch: Epoch = Epoch(0)
    hint: str = ""


class ClusterAnswer(msgspec.Struct, frozen=True, tag_field="t", tag="cluster answer"):
    """The `cluster.messages` messages that answer, none to several."""

    payloads: list[bytes]


class ReserveResult(msgspec.Struct, frozen=True, tag_field="t", tag="pr result"):
    """`sense` is ASC << 8 | ASCQ when the status is CHECK CONDITION."""

    status: int
    sense: int
    generation: int


class ReserveReport(msgspec.Struct, frozen=True, tag_field="t", tag="pr report"):
    """`type` 0: no reservation. `key` is 0 when all registrants hold it. `registrations` is READ
    FULL STATUS, `capabilities` REPORT CAPABILITIES."""

    generation: int
    registrations: list[FullStatus]
    type: int
    key: int
    capabilities: Capabilities


class ExportReport(msgspec.Struct, frozen=True):
    name: str
    size_bytes: int
    access: str
    filters: list[str]
    connections: int
    connections_max: int
    sequence_min: int
    cache_generation: int
    counters: dict[str, int]
    filter_reports: dict[str, dict[str, int]] = {}
    integrity: dict[str, int] = {}
    """Of its integrity area, `Area.counters`; empty: it has none."""


class ConnectionReport(msgspec.Struct, frozen=True):
    """`instance` is empty for a client without LOGIN, `certificate` for one without a name.
    `state`: open, resting (rate limit) or ending."""

    export: str
    peer: str
    instance: str
    path: int
    generation: int
    age_s: int
    state: str
    certificate: str = ""


class ConnectionsReport(msgspec.Struct, frozen=True, tag_field="t", tag="connections report"):
    connections: list[ConnectionReport]


class PathReport(msgspec.Struct, frozen=True):
    """One network of one instance to one export."""

    export: str
    instance: str
    path: int
    generation: int
    connections: int


class PathsReport(msgspec.Struct, frozen=True, tag_field="t", tag="paths report"):
    paths: list[PathReport]


class ExportsReport(msgspec.Struct, frozen=True, tag_field="t", tag="exports report"):
    exports: list[ExportReport]


class ScrubReport(msgspec.Struct, frozen=True, tag_field="t", tag="scrub report"):
    """`state`: never, running, stopped or done. `mismatches`, `unreadable` (the disk refused them)
    and `skipped` (their sums are still being computed) are blocks; `addresses` the first ones that
    do not match, in bytes."""

    export: str
    state: str
    size_bytes: int
    rate_bytes_s: int = 0
    checked_bytes: int = 0
    mismatches: int = 0
    addresses: list[int] = []
    unreadable: int = 0
    skipped: int = 0
    seconds: float = 0.0


class StatusReport(msgspec.Struct, frozen=True, tag_field="t", tag="status report"):
    server_id: ServerId
    name: str
    epoch: Epoch
    serving: bool
    members: list[MemberInfo]
    tombstones: dict[NodeId, Incarnation]
    start_count: int
    voter: bool
    attentions: list[tuple[Instance, str, int]]


Answer = (
    Done
    | Refused
    | ClusterAnswer
    | ReserveResult
    | ReserveReport
    | ExportsReport
    | ConnectionsReport
    | PathsReport
    | ScrubReport
    | StatusReport
)
_request: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answer: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def decode_request_untrusted(data: bytes) -> Request:
    """Payload of a request frame. Raises ProtocolError."""
    return decode_untrusted(_request, data, "control request")


def decode_answer_untrusted(data: bytes) -> Answer:
    """Payload of an answer frame. Raises ProtocolError."""
    return decode_untrusted(_answer, data, "control answer")


def session_keys(keys: Keys, client_nonce: bytes, server_nonce: bytes) -> Keys:
    """The keys of one CONTROL session."""
    purpose = f"gnbd control|{client_nonce.hex()}|{server_nonce.hex()}"
    return Keys(keys.current, {i: derived_key(key, purpose) for i, key in keys.by_id.items()})
