"""What clusterd and clusterguard say to each other over their socket pair (msgpack, one packet
per message). Descriptors that travel with a packet are named in its struct."""

from __future__ import annotations

import msgspec

from cluster.control import Failure, Timing
from cluster.decoding import decode_untrusted
from cluster.guard_events import Facts, Sighting, Vouch, Vouched
from cluster.ids import Instance, InstanceNo, NodeId


class Settings(msgspec.Struct, frozen=True, tag="settings"):
    """First packet to the guard: who we are."""

    node: NodeId
    incarnation: int
    cluster_id: str
    key: str
    addresses: list[str]
    port: int
    run_dir: str
    timing: Timing


class Peers(msgspec.Struct, frozen=True, tag="peers"):
    """The addresses of all nodes and servers by id."""

    addresses: dict[int, list[str]]


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """clusterd makes progress; sent each heartbeat."""


class BarLocal(msgspec.Struct, frozen=True, tag="bar"):
    """These local instances are dead or barred: abort, purge, report PurgedLocal."""

    numbers: list[InstanceNo]
    reason: str


class Ended(msgspec.Struct, frozen=True, tag="ended"):
    """The instance ended cleanly."""

    number: InstanceNo


ToGuard = Settings | Peers | Alive | BarLocal | Ended | Facts | Vouch


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The sockets are bound, guard.sock is served."""


class MountAttached(msgspec.Struct, frozen=True, tag="attached"):
    """A mount has attached. With it duplicates of three descriptors: FUSE, the lease page, the
    inode table."""

    instance: Instance
    connection: int
    mountpoint: str


class PurgedLocal(msgspec.Struct, frozen=True, tag="purged"):
    """Aborted (if it was mounted) and purged."""

    number: InstanceNo
    reason: str


class LeaseChanged(msgspec.Struct, frozen=True, tag="lease"):
    """A mount's lease lapsed or came back."""

    number: InstanceNo
    open: bool


class MountLost(msgspec.Struct, frozen=True, tag="lost"):
    """The guard aborts a mount on its own (its process died, or a purge took too long)."""

    number: InstanceNo
    reason: str


class MountDetached(msgspec.Struct, frozen=True, tag="detached"):
    """It unmounted, or it is over: its connection's number may belong to another mount soon, so
    nobody aborts it any more."""

    number: InstanceNo


class WrongKey(msgspec.Struct, frozen=True, tag="wrong_key"):
    """A peer's datagrams, from one of its addresses, carry another key than ours. Repeated every
    `WRONG_KEY_REPEAT_S` while it lasts."""

    peer: int


WRONG_KEY_REPEAT_S = 2


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Instead of `Ready`: the guard cannot start and ends."""

    failure: Failure


FromGuard = (
    Ready
    | Failed
    | MountAttached
    | MountDetached
    | PurgedLocal
    | LeaseChanged
    | MountLost
    | Sighting
    | Vouched
    | WrongKey
)


class Attach(msgspec.Struct, frozen=True):
    """First packet of a mount on guard.sock (JSON; see node/guard_mounts_io.py)."""

    attach: Instance
    connection: int
    mountpoint: str


PACKET_BYTES_MAX = 1 << 18
_attach = msgspec.json.Decoder(Attach)
_json: msgspec.json.Decoder[object] = msgspec.json.Decoder()


def decode_attach_untrusted(data: bytes) -> Attach:
    """The first packet of a mount. Raises ProtocolError."""
    return decode_untrusted(_attach, data, "attach")


def is_detach_untrusted(data: bytes) -> bool:
    """Whether a later packet of a mount says that it has unmounted. Raises ProtocolError when it is
    no packet at all."""
    message = decode_untrusted(_json, data, "packet of a mount")
    return isinstance(message, dict) and bool(message.get("detach"))


_to_guard: msgspec.msgpack.Decoder[ToGuard] = msgspec.msgpack.Decoder(ToGuard)
_from_guard: msgspec.msgpack.Decoder[FromGuard] = msgspec.msgpack.Decoder(FromGuard)


def decode_to_guard(data: bytes) -> ToGuard:
    """A packet for the guard."""
    return _to_guard.decode(data)


def decode_from_guard(data: bytes) -> FromGuard:
    """A packet of the guard."""
    return _from_guard.decode(data)
