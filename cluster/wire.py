"""Authenticated frames: what clusterd, clusterguard and gnbd-server say to each other.

    offset size
    0      4    magic "CFSw"
    4      1    version (1)
    5      1    kind: 0 datagram, 1 stream frame
    6      2    key id (two keys live at once during rotation)
    8      4    payload length, <= 4 MiB
    12     4    sender (NodeId or ServerId)
    16     16   cluster id
    32     8    incarnation of the sender
    40     8    epoch that the sender has installed
    48     8    config epoch of the sender
    56     8    sequence number, rising per (sender, incarnation, peer, link)
    64     n    payload (msgpack)
    64+n   16   keyed BLAKE2b-128 of everything before

All integers little endian. The code is checked before anything but the fixed header is looked at.
A replayed datagram is refused by its sequence number (the receiver's business); a replayed stream
frame by the session nonce that both ends mix into their key (`session_key`).
"""

from __future__ import annotations

import hashlib
import hmac
import struct

import msgspec

from cluster.errors import AuthenticationError, ProtocolError
from cluster.ids import Epoch, Incarnation, Instance

MAGIC = 0x7753_4643
VERSION = 1
KIND_DATAGRAM = 0
KIND_STREAM = 1
HEADER = struct.Struct("<IBBHII16sQQQQ")
HEADER_BYTES = HEADER.size
MAC_BYTES = 16
PAYLOAD_BYTES_MAX = 4 << 20
KEY_BYTES = 32
KEY_ID = 1
"""The key id until the first rotation."""

assert HEADER_BYTES == 64


class Frame(msgspec.Struct, frozen=True, gc=False):
    """The header fields of one frame and its payload."""

    sender: int
    cluster_id: bytes
    incarnation: Incarnation
    epoch: Epoch
    config_epoch: int
    sequence: int
    payload: bytes
    kind: int = KIND_DATAGRAM


class Keys(msgspec.Struct, frozen=True):
    """The live keys by id; `current` is the one to send with."""

    current: int
    by_id: dict[int, bytes]


def _mac(key: bytes, data: bytes | memoryview) -> bytes:
    return hashlib.blake2b(data, key=key, digest_size=MAC_BYTES).digest()


def seal(keys: Keys, frame: Frame) -> bytes:
    """Encode and authenticate one frame."""
    assert len(frame.cluster_id) == 16
    assert len(frame.payload) <= PAYLOAD_BYTES_MAX
    header = HEADER.pack(
        MAGIC, VERSION, frame.kind, keys.current, len(frame.payload), frame.sender,
        frame.cluster_id, frame.incarnation, frame.epoch, frame.config_epoch, frame.sequence,
    )  # fmt: skip
    body = header + frame.payload
    return body + _mac(keys.by_id[keys.current], body)


def frame_bytes_untrusted(header: bytes | bytearray | memoryview) -> int:
    """Whole length of the frame whose first 64 bytes are given. Raises ProtocolError."""
    magic, version, _kind, _key, length = HEADER.unpack_from(header)[:5]
    if magic != MAGIC or version != VERSION:
        raise ProtocolError("not a frame of this cluster stack")
    if length > PAYLOAD_BYTES_MAX:
        raise ProtocolError(f"frame of {length} bytes is too long")
    return int(HEADER_BYTES + length + MAC_BYTES)


def unseal_untrusted(keys: Keys, cluster_id: bytes, data: bytes | bytearray | memoryview) -> Frame:
    """Check and decode one whole frame. Raises AuthenticationError or ProtocolError."""
    if len(data) < HEADER_BYTES + MAC_BYTES or len(data) != frame_bytes_untrusted(data):
        raise ProtocolError("truncated frame")
    view = memoryview(data)
    fields = HEADER.unpack_from(view)
    key = keys.by_id.get(fields[3])
    if key is None:
        raise AuthenticationError(f"unknown key id {fields[3]}")
    if not hmac.compare_digest(_mac(key, view[:-MAC_BYTES]), bytes(view[-MAC_BYTES:])):
        claimed = fields[5] if fields[6] == cluster_id else 0
        raise AuthenticationError("wrong authentication code", claimed_sender=claimed)
    if fields[6] != cluster_id:
        raise AuthenticationError("frame of another cluster")
    return Frame(
        kind=fields[2], sender=fields[5], cluster_id=fields[6], incarnation=fields[7],
        epoch=fields[8], config_epoch=fields[9], sequence=fields[10],
        payload=bytes(view[HEADER_BYTES:-MAC_BYTES]),
    )  # fmt: skip


def instance_secret(cluster_key: bytes, cluster_id: bytes, instance: Instance) -> bytes:
    """What clusterd hands to an instance so that it can prove itself to the block servers."""
    text = f"instance|{instance.node}|{instance.incarnation}|{instance.number}".encode()
    return hmac.digest(cluster_key, cluster_id + text, "sha256")


def derived_key(cluster_key: bytes, purpose: str) -> bytes:
    """A key for one purpose (a group's mesh, a session) that does not give the cluster key away."""
    return hmac.digest(cluster_key, b"derived|" + purpose.encode(), "sha256")


def login_proof(secret: bytes, nonce: bytes, path_id: int, generation: int) -> bytes:
    """The answer of an instance to a server's nonce at LOGIN (design, tokens)."""
    return hmac.digest(secret, nonce + struct.pack("<QQ", path_id, generation), "sha256")
