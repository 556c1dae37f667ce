"""The durable state of a gnbd-server: bars, reservations, minimum sequence numbers, start count.

    offset size
    0      8    magic "CFSfence"
    8      4    version (1)
    12     4    payload length
    16     32   BLAKE2b-256 of bytes 0..16 and the payload
    48     n    payload: `ServerState` as msgpack

All integers little endian. The file is replaced as a whole (write beside it, fsync, rename, fsync
of the directory) before anything that follows from it is answered. A damaged file is an error that
stops the server: an empty table in its place would let barred instances in.
"""

from __future__ import annotations

import hashlib
import struct

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import CorruptionError
from fencing.admission import InstallRecord
from fencing.reservations import ReservationState

MAGIC = b"CFSfence"
VERSION = 1
HEADER = struct.Struct("<8sII32s")
STATE_BYTES_MAX = 16 << 20


class ExportState(msgspec.Struct, frozen=True):
    """What is stored per export. A nexus below `sequence_min` is refused."""

    reservations: ReservationState = ReservationState()
    sequence_min: int = 0


class ServerState(msgspec.Struct, frozen=True):
    """Everything that a gnbd-server must not forget. `start_count` rises at each start."""

    start_count: int = 0
    record: InstallRecord | None = None
    exports: dict[str, ExportState] = {}


_decoder = msgspec.msgpack.Decoder(ServerState)


def _digest(head: bytes, payload: bytes) -> bytes:
    return hashlib.blake2b(head + payload, digest_size=32).digest()


def encode_state(state: ServerState) -> bytes:
    """The file for a state."""
    payload = msgspec.msgpack.encode(state)
    assert len(payload) <= STATE_BYTES_MAX
    head = struct.pack("<8sII", MAGIC, VERSION, len(payload))
    return head + _digest(head, payload) + payload


def decode_state_untrusted(data: bytes) -> ServerState:
    """The inverse. Raises CorruptionError."""
    if len(data) < HEADER.size:
        raise CorruptionError("the file is too short")
    magic, version, length, digest = HEADER.unpack_from(data)
    if magic != MAGIC:
        raise CorruptionError("the file does not begin with its magic")
    if version != VERSION:
        raise CorruptionError(f"version {version} is not known to this program")
    payload = data[HEADER.size :]
    if len(payload) != length or _digest(data[:16], payload) != digest:
        raise CorruptionError("the checksum is wrong")
    try:
        return _decoder.decode(payload)
    except BROKEN as error:
        raise CorruptionError(f"the payload makes no sense: {error}") from error
