"""What is fuzzed: every decoder of bytes from a disk, a socket or a person.

A target is a function of bytes that may raise the errors it names and nothing else, with a few good
inputs to start from. `seal` mends the checksum of a changed input, so that what lies behind it is
reached too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import msgspec

from cluster import wire
from cluster.config import (
    ClusterSection,
    NodeConfig,
    NodeSection,
    Token,
    decode_config,
    decode_token_untrusted,
    encode_token,
)
from cluster.control import Call, Event, GroupMember, Reply, decode_line_untrusted, encode_line
from cluster.decoding import decode_untrusted
from cluster.errors import ConfigError, CorruptionError, ProtocolError
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId, ServerId
from cluster.mesh import Batch, Hello, Link, Marker
from cluster.messages import Accept, Ballot, Prepare, decode_message_untrusted, encode_message
from cluster.paths_io import decode_store_untrusted, encode_store
from cluster.register import birth_record, decode_record_untrusted
from cluster.state import NodeInfo, decode_state_untrusted, encode_state, initial_state
from cvm import metadata
from dlm import messages as dlm
from dlm.messages import decode_untrusted as decode_batch_untrusted
from dlm.messages import encode as encode_batch
from fencing import store
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.exports import decode_exports
from gnbd.identity import ServerIdentity, decode_server_token_untrusted, encode_server_token
from gnbd.server.handshake import (
    Denied,
    Enter,
    Handshake,
    Offer,
    Private,
    StartTls,
    parse_go_untrusted,
)
from gnbd.server.integrity import Header, decode_header_untrusted, encode_header
from native import crc32c
from node.guard_messages import decode_attach_untrusted, is_detach_untrusted

ID, KEY = "ab" * 16, "cd" * 32
NODE = NodeInfo(NodeId(1), "n1", ["127.0.0.1"])
STATE = initial_state(ID, "prod", "default", NODE)
ME = Instance(NodeId(1), Incarnation(7), InstanceNo(1))
KEYS = wire.Keys(1, {1: bytes.fromhex(KEY)})
PATH = "x"


class Target(msgspec.Struct, frozen=True):
    """One decoder."""

    run: Callable[[bytes], object]
    seeds: list[bytes]
    allowed: tuple[type[Exception], ...] = (ProtocolError, CorruptionError)
    seal: Callable[[bytes], bytes] | None = None


def _frame(payload: bytes) -> bytes:
    return wire.seal(
        KEYS,
        wire.Frame(1, bytes.fromhex(ID), Incarnation(7), Epoch(3), 1, 9, payload),
    )


def _unseal(data: bytes) -> object:
    return decode_message_untrusted(wire.unseal_untrusted(KEYS, bytes.fromhex(ID), data).payload)


def _seal_frame(data: bytes) -> bytes:
    """A frame of the right length with the right code around a changed payload."""
    return _frame(data[wire.HEADER_BYTES : -wire.MAC_BYTES or None])


class _Directory:
    def names(self) -> list[tuple[str, str]]:
        return [("disk0", "")]

    def find(self, name: str) -> Offer | Denied:
        if name == "disk0":
            return Offer(name, 1 << 20, 1)
        return Denied(p.REP_ERR_UNKNOWN, "no")


def _handshake(data: bytes) -> None:
    """In pieces, as a socket would give it; nothing may grow without end."""
    handshake = Handshake(_Directory(), tls=True)
    at = 0
    while not handshake.ended:
        action = handshake.next()
        if action is None:
            wanted = min(handshake.wanted_bytes(), 1 + len(data) // 3)
            if at >= len(data):
                return
            handshake.feed(data[at : at + wanted])
            at += wanted
        elif isinstance(action, Private):
            handshake.private_reply(action.option, b"")
        elif isinstance(action, StartTls):
            handshake.secured("n1")
        elif isinstance(action, Enter):
            handshake.entry_bytes()


def _crc_at_8(data: bytes, length: int) -> bytes:
    if len(data) < 12:
        return data
    head = data[:8] + bytes(4) + data[12:length]
    return data[:8] + struct.pack("<I", crc32c(head)) + data[12:]


def _seal_record(data: bytes) -> bytes:
    return data[:8] + struct.pack("<I", zlib.crc32(data[12:])) + data[12:]


def _seal_header(data: bytes) -> bytes:
    return data[:-4] + struct.pack("<I", crc32c(data[:-4]))


def _seal_slot(data: bytes) -> bytes:
    """Both checksums of a metadata slot."""
    head = metadata._SLOT_HEADER_BYTES
    if len(data) < head:
        return data
    fields = list(metadata._SLOT.unpack_from(data))
    fields[8] = min(fields[8], len(data) - head)
    fields[9] = crc32c(data[head : head + fields[8]])
    made = bytearray(data)
    metadata._SLOT.pack_into(made, 0, *fields)
    return _crc_at_8(bytes(made), head)


def _seal_state(data: bytes) -> bytes:
    made = bytearray(data)
    for at in range(0, len(made) - store.SECTOR_BYTES + 1, store.SECTOR_BYTES):
        crc_at, data_at = at + store.HEADER.size, at + store.DATA_OFFSET
        crc = crc32c(made[data_at : at + store.SECTOR_BYTES], crc32c(made[at:crc_at]))
        struct.pack_into("<I", made, crc_at, crc)
    return bytes(made)


def _state_file() -> bytes:
    payload = store.encode_state(store.ServerState(3, None, {"disk0": store.ExportState()}))
    slot_bytes = store.SECTORS_MIN * store.SECTOR_BYTES
    slots = [store.encode_slot(payload, store.Place(n, slot_bytes, 5 + n)) for n in range(2)]
    return b"".join(slot for slot in slots if slot is not None)


def _slot(data: bytes) -> object:
    found = metadata.decode_slot_untrusted(data, metadata.SLOT_OFFSET_BYTES)
    return metadata.decode_text_untrusted(found.text) if found is not None else None


def _volume_group() -> bytes:
    pv = metadata.PvRecord("s1/disk0", "11" * 16, ServerId(129), "disk0", 1 << 30, 4 << 20, 200)
    leg = metadata.LegRecord("s1/disk0", 0)
    segment = metadata.SegmentRecord(0, 4, 65536, ((leg,),))
    lv = metadata.LvRecord("vol0", "22" * 16, (segment,))
    return metadata.encode_text(metadata.VgRecord("vg0", "33" * 16, 2, 4 << 20, (pv,), (lv,)))


def _slots() -> list[bytes]:
    text = _volume_group().replace(b"{", b"{" + b" " * 4096, 1)  # compressed in a small room
    content = metadata.SlotContent(2, "11" * 16, "33" * 16, text)
    offset = metadata.SLOT_OFFSET_BYTES
    return [metadata.encode_slot(content, offset, room) for room in (1 << 20, 4500)]


_NODE_TOML = (
    f'[cluster]\nid = "{ID}"\nname = "prod"\nkey = "{KEY}"\n'
    '[node]\nid = 1\nname = "n1"\naddresses = ["127.0.0.1"]\n'
)
_EXPORTS = (
    'state_dir = "/x"\n[[exports]]\nname = "disk0"\npath = "/x/disk0"\nsize = "1M"\n'
    'filters = ["delay:read_ms=1"]\n'
)
_CONFIG = NodeConfig(ClusterSection(ID, "prod", KEY), NodeSection(NodeId(2), "n2", ["127.0.0.2"]))
_HELLO = m.LoginHello(ME, "disk0", 0, 1, bytes(32), 0)
_MESSAGES = [
    encode_message(Prepare(1, Ballot(3, 1, 7), 1)),
    encode_message(Accept(1, Ballot(3, 1, 7), 1, STATE)),
]
_LABEL = metadata.encode_label(
    metadata.PvLabel("11" * 16, ID, 1 << 30, metadata.DATA_OFFSET_BYTES, "s1/disk0")
)
_BATCHES = [
    encode_batch(dlm.Batch(1, 2, [dlm.Query(1, b"I01"), dlm.Answer(1, b"who"), dlm.LeaveAck(3)])),
    encode_batch(dlm.Batch(1, 2, [])),
]
_HELLOS, _MESH_BATCHES = msgspec.msgpack.Decoder(Hello), msgspec.msgpack.Decoder(Batch)
_PEER = Instance(NodeId(2), Incarnation(1), InstanceNo(1))
_MESH_HELLO = msgspec.msgpack.encode(Hello("fs-vg0-vol0", ME, _PEER, 9, 0, b"", 0))
_MESH_BATCH = msgspec.msgpack.encode(Batch(1, 1, [b"item", Marker(1, 2)]))


def _mesh_batch(data: bytes) -> None:
    """Decoded, and taken by a link that has sent something: its numbers stay in order."""
    batch = decode_untrusted(_MESH_BATCHES, data, "batch")
    link = Link(GroupMember(_PEER, "n2", [], 1), 1)
    link.push(b"sent")
    link.path_up(0, 0)
    link.flush(0)
    link.held.extend(link.take(batch))
    link.flush(1)
    link.check()


_OPTIONS = p.option(p.OPT_LIST) + p.option(p.OPT_GO, p.go_data("disk0"))
_LOGIN = p.option(p.OPT_LOGIN, msgspec.msgpack.encode(_HELLO))

TARGETS: dict[str, Target] = {
    "frame": Target(_unseal, [_frame(one) for one in _MESSAGES], seal=_seal_frame),
    "message": Target(decode_message_untrusted, _MESSAGES),
    "control-line": Target(
        decode_line_untrusted,
        [encode_line(Call(1, "cluster.status", {"a": [1, {"b": None}]})), encode_line(Reply(1)),
         encode_line(Event("view", {"epoch": 1}))],
    ),
    "state": Target(decode_state_untrusted, [encode_state(STATE)]),
    "store": Target(lambda data: decode_store_untrusted(data, PATH), [encode_store(b"payload")]),
    "record": Target(decode_record_untrusted, [birth_record(STATE)], seal=_seal_record),
    "fencing-state": Target(store.decode_file_untrusted, [_state_file()], seal=_seal_state),
    "integrity": Target(
        decode_header_untrusted,
        [encode_header(Header("disk0", "/srv/disk0.img", 1 << 30))],
        seal=_seal_header,
    ),
    "opening": Target(
        m.decode_opening_untrusted,
        [msgspec.msgpack.encode(one) for one in (_HELLO, m.LoginProof(bytes(32)),
                                                 m.ControlHello(bytes(32)))],
    ),
    "request": Target(
        m.decode_request_untrusted,
        [msgspec.msgpack.encode(one) for one in (m.Ping(), m.ReserveIn("disk0"),
                                                 m.ClusterCall(_MESSAGES[0]))],
    ),
    "answer": Target(m.decode_answer_untrusted, [msgspec.msgpack.encode(m.Done(Epoch(3)))]),
    "attach": Target(
        decode_attach_untrusted,
        [b'{"attach": [1, 7, 1], "connection": 55, "mountpoint": "/mnt/cfs"}'],
    ),
    "detach": Target(is_detach_untrusted, [b'{"detach": true}', b"[[1], {}]"]),
    "mesh-hello": Target(lambda data: decode_untrusted(_HELLOS, data, "hello"), [_MESH_HELLO]),
    "mesh-batch": Target(_mesh_batch, [_MESH_BATCH]),
    "handshake": Target(
        _handshake, [b"\0\0\0\3" + _OPTIONS, b"\0\0\0\3" + _LOGIN, b"\0\0\0\0" + _LOGIN + _OPTIONS]
    ),
    "go": Target(parse_go_untrusted, [p.go_data("disk0")]),
    "dlm": Target(decode_batch_untrusted, _BATCHES),
    "pv-label": Target(
        metadata.decode_label_untrusted, [_LABEL], seal=lambda data: _crc_at_8(data, 4096)
    ),
    "vg-slot": Target(_slot, _slots(), seal=_seal_slot),
    "vg-text": Target(metadata.decode_text_untrusted, [_volume_group()]),
    "invitation": Target(
        lambda data: decode_token_untrusted(data.decode("latin-1")),
        [encode_token(Token(_CONFIG, STATE)).encode()], (ConfigError,),
    ),
    "server-token": Target(
        lambda data: decode_server_token_untrusted(data.decode("latin-1")),
        [encode_server_token(ServerIdentity(ID, "prod", KEY, ServerId(129), "s1")).encode()],
        (ConfigError,),
    ),
    "node.toml": Target(
        lambda data: decode_config(data, NodeConfig, PATH), [_NODE_TOML.encode()], (ConfigError,)
    ),
    "exports.toml": Target(lambda data: decode_exports(data, PATH), [_EXPORTS.encode()],
                           (ConfigError,)),
}  # fmt: skip
