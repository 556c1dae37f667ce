"""The NBD protocol, fixed newstyle: constants and fixed-size codecs.

Request (28 bytes, big endian): magic u32, flags u16, type u16, cookie u64, offset u64, length u32.
Simple reply (16 bytes): magic u32, error u32, cookie u64; the data of a READ follows.
Chunk of a structured reply (20 bytes): magic u32, flags u16, type u16, cookie u64, length u32.
With extended headers (32 bytes each): request: magic u32, flags u16, type u16, cookie u64, offset
u64, length u64; chunk: magic u32, flags u16, type u16, cookie u64, offset of the request u64,
length u64.
Option (16 bytes): magic u64, option u32, length u32; data follows.
Option reply (20 bytes): magic u64, option u32, type u32, length u32; data follows.

Private parts, known only to our own client and refused politely by every other server:

| what | number | meaning |
|---|---|---|
| option LOGIN | 0x43465301 | binds this connection to an instance and a path (gnbd.messages) |
| option CONTROL | 0x43465302 | one authenticated request and its answer (gnbd.messages) |
| reply CFS | 0x43465301 | the answer of either; an ACK follows |
| command DRAIN | 0x4301 | offset = generation, length = path: every connection of that path up to that generation is closed and drained before the reply, and none comes back |
| command SEQUENCE | 0x4302 | offset = the volume sequence number that this nexus works with |
| command PING | 0x4303 | length = 8; answered at once, with the size of the export (u64) |
| command LOGOUT | 0x4304 | the nexus is done with this export: its registration goes |
| command WRITE_CHECKED | 0x4305 | as WRITE; the trailer follows the data. What does not fit is EBADMSG and not written |
| command READ_CHECKED | 0x4306 | as READ; the trailer follows the data |
| command COMPARE_AND_WRITE | 0x4307 | data: what must be there, then as much to write; length = of both; FUA. Alone on the export; EMISCOMPARE with the offset of the first byte that differs, and nothing is written |

Private commands are accepted only on a connection that has logged in.

The trailer: the CRC-32C (u32) of each piece of the data, which is cut at multiples of 4096 of the
offset in the export (`trailer`); a length of 0 has none. `LoginResult.checksums` says that the
export has an integrity area; the commands work without one, too. Replies must be simple. With an integrity area what is stored is what
the client sent, and the trailer of a READ is what is stored.
"""  # noqa: E501

from __future__ import annotations

import struct

from native.checksum import Buffer, crc32c, crc32c_blocks

INIT_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698

CHUNK_MAGIC = 0x668E33EF
CHUNK_DONE = 1
CHUNK_BLOCK_STATUS = 5
CHUNK_BLOCK_STATUS_EXT = 6
CHUNK_ERROR_OFFSET = 0x8002

EXTENDED_REQUEST_MAGIC = 0x21E41C71
EXTENDED_CHUNK_MAGIC = 0x6E8A278C

GREETING = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
EXTENDED_REQUEST = struct.Struct(">IHHQQQ")
EXTENDED_CHUNK = struct.Struct(">IHHQQQ")
SIZE = struct.Struct(">Q")
EXPORT_INFO = struct.Struct(">HQH")
BLOCK_SIZE_INFO = struct.Struct(">HIII")

FLAG_FIXED_NEWSTYLE = 1
FLAG_NO_ZEROES = 2

OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11
OPT_LOGIN = 0x43465301
OPT_CONTROL = 0x43465302

REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_CFS = 0x43465301
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_INVALID = REP_ERROR + 3
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7
REP_ERR_TOO_BIG = REP_ERROR + 9
REP_ERR_EXT_HEADER_REQD = REP_ERROR + 10

INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_SEND_DF = 1 << 7
FLAG_CAN_MULTI_CONN = 1 << 8
FLAG_SEND_CACHE = 1 << 10
FLAG_SEND_FAST_ZERO = 1 << 11

CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7
CMD_DRAIN = 0x4301
CMD_SEQUENCE = 0x4302
CMD_PING = 0x4303
CMD_LOGOUT = 0x4304
CMD_WRITE_CHECKED = 0x4305
CMD_READ_CHECKED = 0x4306
CMD_COMPARE_AND_WRITE = 0x4307

CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4
CMD_FLAG_PAYLOAD_LEN = 1 << 5

CONTEXT_ALLOCATION = "base:allocation"
CONTEXT_RESERVATION = "x-cfs:reservation"
CONTEXT_IDS = {CONTEXT_ALLOCATION: 1, CONTEXT_RESERVATION: 2}
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1
STATE_RESERVED = 1 << 0
STATE_WRITABLE = 1 << 1
"""Of `x-cfs:reservation`: bit 0 reserved, bit 1 writable by this client, bits 4-7 the type, from
bit 8 on the lower bits of the generation."""

EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EBADMSG = 74
"""Private: the trailer of a WRITE_CHECKED does not fit its data."""
EOVERFLOW = 75
EMISCOMPARE = 84
"""Private: COMPARE AND WRITE has found something else. (EILSEQ, as the kernel's targets say it.)"""
ENOTSUP = 95
ESHUTDOWN = 108
ESTALE = 116
"""Private: the nexus works with a volume sequence number below the minimum of the export."""

NAME_BYTES_MAX = 4096
OPTION_BYTES_MAX = 5 << 20
STRANGER_OPTION_BYTES_MAX = 64 << 10
"""Of a client that has not proved that it belongs to the cluster."""
LIST_MAX = 4096
PAYLOAD_BYTES_MAX = 64 << 20
COMPARE_BYTES_MAX = 64 << 10
BLOCK_BYTES_PREFERRED = 4096
ZERO_PADDING_BYTES = 124
CHECKED_BYTES = 4096
SEQUENCE_MAX = (1 << 64) - 1


def trailer(offset: int, data: Buffer) -> bytes:
    """The checksums of a WRITE_CHECKED or READ_CHECKED."""
    view = memoryview(data)
    head = min(-offset % CHECKED_BYTES, len(view))
    sums = [crc32c(view[:head])] if head else []
    sums += crc32c_blocks(view[head:], CHECKED_BYTES)
    return struct.pack(f">{len(sums)}I", *sums)


def option(number: int, data: bytes = b"") -> bytes:
    """One option as a client sends it."""
    return OPTION.pack(OPTION_MAGIC, number, len(data)) + data


def option_reply(number: int, kind: int, data: bytes = b"") -> bytes:
    """One reply to an option as a server sends it."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, number, kind, len(data)) + data


def go_data(name: str, infos: tuple[int, ...] = ()) -> bytes:
    """The data of INFO and GO."""
    raw = name.encode()
    head = struct.pack(">I", len(raw)) + raw + struct.pack(">H", len(infos))
    return head + b"".join(struct.pack(">H", info) for info in infos)
