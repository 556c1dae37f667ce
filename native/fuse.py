"""The FUSE session extension: what pyfuse3 does not give, below an unmodified pyfuse3.

Import this module before pyfuse3, and only in mount processes (it refuses to load after pyfuse3).
It interposes `fuse_session_new` and gives the session its own read and write functions. So

- the INIT answer carries the bits and limits of `Settings`;
- every request is parsed once more as it is read: `current_request()` gives what pyfuse3 leaves
  out. pyfuse3 starts a handler in the same breath in which it reads the request, so the answer is
  right **until the first await** of the handler; take it in the first line;
- unanswered requests stand in a table in shared memory (`requests_fd`, `pending_requests`), which
  another process may read while this one hangs;
- `read` reads a message; requests named in `divert` are the caller's, and never reach libfuse:
  operations that it or pyfuse3 lack, or of which they lose arguments, or that shall be quick;
- an INTERRUPT of an unanswered request wakes `interrupt_fd()`; see `native.fuse_io.Interrupts`;
- once `set_gate` was called, an answer that may fill a kernel cache or grant a lock is sent inside
  `Gate.enter`/`leave` (rule G2): while the gate is closed it is kept, and sent by `gate_flush()` or
  by the next answer after the gate opened; when the word is BARRED it becomes ENOTCONN. Errors,
  answers to laundered WRITEs, FLUSH, RELEASE, FSYNC, and the like always pass.

Invalidations are in `native.notify`, which needs no session in this process.
A blocked read of /dev/fuse cannot happen: the descriptor is non-blocking and an empty read counts
as interrupted.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from native.gate import Gate
from native.requests import Opcode, PendingRequest, Request, RequestTable

if "pyfuse3" in sys.modules:
    raise ImportError("native.fuse must be imported before pyfuse3")

_FLAGS = sys.getdlopenflags()
sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
try:
    from native._fuse import ffi, lib
finally:
    sys.setdlopenflags(_FLAGS)


class Init(enum.IntFlag):
    """Bits of the INIT request (what the kernel can do) and of its answer (linux/fuse.h)."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    EXPORT_SUPPORT = 1 << 4
    BIG_WRITES = 1 << 5
    DONT_MASK = 1 << 6
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    ABORT_ERROR = 1 << 21
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    EXPLICIT_INVAL_DATA = 1 << 25
    SUBMOUNTS = 1 << 27
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    HAS_INODE_DAX = 1 << 33
    CREATE_SUPP_GROUP = 1 << 34
    HAS_EXPIRE_ONLY = 1 << 35
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    NO_EXPORT_SUPPORT = 1 << 38
    HAS_RESEND = 1 << 39
    ALLOW_IDMAP = 1 << 40
    OVER_IO_URING = 1 << 41
    REQUEST_TIMEOUT = 1 << 42


GATED_BYTES_MAX = 512 << 20
"""Answers kept while the gate is closed; what does not fit becomes EIO (admission is above)."""


class Settings(NamedTuple):
    """What the INIT answer says beside libfuse's choice. Bits the kernel lacks are left out."""

    set_bits: int = Init.EXPLICIT_INVAL_DATA
    clear_bits: int = Init.AUTO_INVAL_DATA | Init.WRITEBACK_CACHE
    max_background: int = 16384
    congestion_threshold: int = 12288
    max_readahead_bytes: int = 0
    """0: as the kernel offers (this can only lower it; raise it in /sys/class/bdi/M:m)."""
    time_granularity_ns: int = 1


class SessionInfo(NamedTuple):
    """The session as negotiated; zeros before the INIT request was answered."""

    offered_bits: int
    agreed_bits: int
    kernel_minor: int
    """Of the kernel's protocol 7: 38 has EXPIRE_ONLY, 44 INC_EPOCH, 45 PRUNE."""
    max_background: int
    congestion_threshold: int
    max_readahead_bytes: int
    max_write_bytes: int
    time_granularity_ns: int


class GateQueue(NamedTuple):
    """Answers kept by the closed gate, and totals since the session began."""

    answers: int
    bytes: int
    kept_total: int
    sent_total: int
    refused_total: int
    """Turned into an error: barred, interrupted or too many."""


_REQUEST = struct.Struct("<5Q7I")
_INFO = struct.Struct("<2Q6I")

_INTERRUPTS_PER_CALL = 256

_current = ffi.buffer(lib.native_fuse_current(), _REQUEST.size)
_gate: Gate | None = None


def configure(settings: Settings) -> None:
    """Set what the next session is to negotiate; call before `pyfuse3.init`."""
    lib.native_fuse_configure(
        settings.set_bits,
        settings.clear_bits,
        settings.max_background,
        settings.congestion_threshold,
        settings.max_readahead_bytes,
        settings.time_granularity_ns,
    )


def interposed() -> bool:
    """Whether `fuse_session_new` came to us; a mount refuses to start if not after pyfuse3.init."""
    return bool(lib.native_fuse_interposed())


def session_fd() -> int:
    """The /dev/fuse descriptor of the mounted session (-1: none). Never close it."""
    return int(lib.native_fuse_session_fd())


def session_info() -> SessionInfo:
    """What was negotiated."""
    raw = ffi.new("unsigned char[]", _INFO.size)
    lib.native_fuse_info(raw)
    return SessionInfo(*_INFO.unpack(bytes(raw)))


def connection_number(mountpoint: str) -> int:
    """N of /sys/fs/fuse/connections/N, without touching the mount (which would hang the daemon)."""
    parent, name = os.path.split(mountpoint.rstrip("/"))
    target = os.path.join(os.path.realpath(parent), name)
    found = -1
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            fields = line.split(" ")
            path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            if path == target and " - fuse" in line:
                found = int(fields[2].partition(":")[2])
    if found < 0:
        raise FileNotFoundError(f"no FUSE mount at {mountpoint}")
    return found


def current_request() -> Request:
    """The request that is being dispatched: call it before the first await of a handler."""
    return Request._make(_REQUEST.unpack_from(_current))


NEVER_DIVERTED = frozenset({Opcode.INIT, Opcode.DESTROY, Opcode.INTERRUPT})
UNANSWERED = frozenset({Opcode.FORGET, Opcode.BATCH_FORGET})
"""The kernel waits for no answer to these."""


def divert(opcodes: Iterable[Opcode]) -> None:
    """Keep these requests from libfuse: `read` brings them, `reply` answers them."""
    wanted = frozenset(opcodes)
    assert not wanted & NEVER_DIVERTED
    lib.native_fuse_divert(sum(1 << opcode for opcode in wanted))


PIECES_MAX = 64
NOTHING = -1
FOR_LIBFUSE = -2
MESSAGE_BYTES_MAX = (1 << 20) + 4096 - 40
"""Of the body of a message: the largest WRITE and what stands before its data."""

_message = memoryview(ffi.buffer(lib.native_fuse_message(), MESSAGE_BYTES_MAX))


def read() -> int:
    """Read the next message. NOTHING; FOR_LIBFUSE: its read takes it, and must come first; else it
    is a diverted one, with a body of so many bytes: `current_request()` and `body` say what."""
    return int(lib.native_fuse_read())


def body(length: int) -> memoryview:
    """What follows the header (as in linux/fuse.h) of the message that was read last, in place:
    good until the next `read`."""
    return _message[:length]


def reply(unique: int, error: int, data: bytes = b"") -> None:
    """Answer a diverted request with an errno, or with 0 and data. It passes the gate as any
    other answer. Does nothing if nobody waits any more. Raises OSError."""
    failed = lib.native_fuse_reply(unique, error, data, 0 if error else len(data))
    if failed not in (0, errno.ENOENT):
        raise OSError(failed, os.strerror(failed))


def reply_pieces(unique: int, pieces: Sequence[bytes | bytearray | memoryview]) -> None:
    """As `reply`, with data that lies in pieces."""
    if len(pieces) > PIECES_MAX:
        pieces = [b"".join(pieces)]
    views = [ffi.from_buffer(piece) for piece in pieces]
    sizes = [len(view) for view in views]
    failed = lib.native_fuse_reply_pieces(unique, views, sizes, len(views))
    if failed not in (0, errno.ENOENT):
        raise OSError(failed, os.strerror(failed))


def requests_fd() -> int:
    """The memfd of the table of unanswered requests, for `native.requests.RequestTable`."""
    return int(lib.native_fuse_table_fd())


def pending_requests() -> list[PendingRequest]:
    """The unanswered requests of this session."""
    table = RequestTable(requests_fd())
    try:
        return table.rows()
    finally:
        table.close()


def interrupt_fd() -> int:
    """An eventfd, readable while interrupts wait in `take_interrupts`. Never close it."""
    return int(lib.native_fuse_interrupt_fd())


def take_interrupts() -> list[int]:
    """The `unique` of each unanswered request interrupted since the last call; each comes once."""
    buffer = ffi.new("uint64_t[]", _INTERRUPTS_PER_CALL)
    result: list[int] = []
    while count := lib.native_fuse_take_interrupts(buffer, _INTERRUPTS_PER_CALL):
        result.extend(buffer[0:count])
    return result


def interrupted(unique: int) -> bool:
    """Whether this unanswered request was interrupted at any time."""
    return bool(lib.native_fuse_request_state(unique) & 1)


def kept(unique: int) -> bool:
    """Whether the answer to this request is kept by the closed gate."""
    return bool(lib.native_fuse_request_state(unique) & 2)


def caller(unique: int) -> int:
    """The thread id of the caller of this unanswered request; 0 if there is none."""
    return int(lib.native_fuse_request_pid(unique))


def set_gate(gate: Gate | None) -> None:
    """From now on answers that fill kernel caches pass this gate (None: all pass freely)."""
    global _gate
    lib.native_fuse_set_gate(ffi.NULL if gate is None else ffi.cast("void *", gate.address))
    _gate = gate  # keeps its memory mapped


def gate_flush() -> int:
    """Send the kept answers if the gate is open, refuse them if it is barred; how many remain.

    Call it when the gate opened or was barred, and with every progress stamp.
    """
    return int(lib.native_fuse_gate_flush())


def gate_abandon(unique: int, error: int) -> bool:
    """The caller is being killed: answer with `error` instead of the kept answer, or with the very
    answer where it counts something (lookups, a handle) that the kernel has to give back. False if
    none is kept."""
    return bool(lib.native_fuse_gate_abandon(unique, error))


def gate_queue() -> GateQueue:
    """What the closed gate keeps."""
    raw = ffi.new("uint64_t[]", 5)
    lib.native_fuse_gate_queue(raw)
    return GateQueue(*raw)
