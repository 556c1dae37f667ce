"""The transmission phase of an NBD connection in C: one thread per connection, without the GIL.

`Connection.run` receives, executes and answers until something is for Python: a request that is
not READ or WRITE, any request of an export whose bytes are behind Python (`Export.set` with
descriptor -1), an access word that was replaced, the end. Requests execute in order; each looks at
the access word as it executes (rule R5). Replies are gathered and sent in one call, outside.

Simple replies; structured ones for READ when negotiated (holes travel as holes unless DF); with
extended headers every reply is structured, and lengths have 64 bits.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

from native._native import ffi, lib
from native.integrity import Area

NOBODY = 0
READ = 1
WRITE = 2
STALE = 4
"""The nexus works with too low a volume sequence number."""
CLOSED = 8
"""This access was replaced: look up the new one."""

SIMPLE, STRUCTURED, EXTENDED = range(3)
"""Style of the headers."""

_REQUEST = struct.Struct("<QQQIHH")


class Access:
    """The access word of one nexus on one export, and how many are inside.

    Revoking closes an access and puts a new one in its place, so that the count of the old one
    only falls: waiting for it ends even when the nexus keeps the right to read."""

    __slots__ = ("_access",)

    def __init__(self, word: int) -> None:
        self._access = ffi.new("struct native_access *")
        lib.native_access_set(self._access, word)

    @property
    def word(self) -> int:
        return int(lib.native_access_word(self._access))

    def close(self) -> None:
        """Store the word: nothing more executes under this access."""
        lib.native_access_set(self._access, CLOSED)

    def wait_idle(self) -> None:
        """Return when nothing is inside. It must be closed."""
        assert self.word == CLOSED
        lib.native_access_wait_idle(self._access)

    def is_idle(self) -> bool:
        return not lib.native_access_in_flight(self._access)


class Export:
    """What the connections of one export share: where its bytes are, and counters."""

    __slots__ = ("_export",)

    def __init__(self) -> None:
        self._export = ffi.new("struct native_nbd_export *")
        lib.native_nbd_export_init(self._export)
        lib.native_nbd_export_set(self._export, -1, 0, 1, 1)

    def set(self, descriptor: int, size_bytes: int, *, read_only: bool, alignment: int = 1) -> None:
        """From the next request on; -1: every READ and WRITE goes to Python. `alignment` (a power
        of two up to 4096) of offsets, lengths and memory."""
        lib.native_nbd_export_set(self._export, descriptor, size_bytes, read_only, alignment)

    def protect(self, area: Area | None) -> None:
        """From the next request on READ and WRITE of a bare file go through this area, which lives
        until nothing that began before another call executes any more."""
        lib.native_nbd_export_protect(self._export, area.raw if area is not None else ffi.NULL)

    def counters(self) -> dict[str, int]:
        """Totals of all connections."""
        names = ("reads", "writes", "flushes", "read_bytes", "written_bytes", "refused",
                 "refused_writes")  # fmt: skip
        out = ffi.new("uint64_t[]", len(names))
        lib.native_nbd_counters(self._export, out)
        return dict(zip(names, out, strict=True))


class Event(enum.IntEnum):
    """Why `run` returned."""

    ENDED = 0
    ACCESS = 1
    """The access was closed: give the new one."""
    REQUEST = 2
    """Execute `request`, then `done`. READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS
    and COMPARE AND WRITE are inside the access, which allows them; ranges of READ, WRITE and
    COMPARE AND WRITE are checked. The last one is alone on its export until `done` or `leave`."""
    FAILED = 3
    """A WRITE with FUA has failed with `request.error`; then `done`."""


class Request(NamedTuple):
    cookie: int
    offset: int
    length: int
    error: int
    kind: int
    flags: int


def set_memory_max(size_bytes: int, wait_ms: int = 10_000) -> None:
    """For the requests of all connections that do not fit into their buffers. One that has waited
    so long is answered ENOMEM."""
    lib.native_nbd_set_memory_max(size_bytes, wait_ms)


def memory_used() -> int:
    """How much of it is taken."""
    return int(lib.native_nbd_memory_used())


class Connection:
    """One socket in transmission. Everything but `close` belongs to its thread."""

    def __init__(
        self, descriptor: int, export: Export, first: bytes, *, logged_in: bool, style: int
    ) -> None:
        """`first`: what was received behind the handshake. Raises MemoryError."""
        self._export = export
        self._access: Access | None = None
        self._nbd = lib.native_nbd_open(
            descriptor, export._export, logged_in, style, first, len(first)
        )
        if not self._nbd:
            raise MemoryError

    def run(self, access: Access) -> Event:
        """Serve until something is for Python."""
        if access is not self._access:
            lib.native_nbd_set_access(self._nbd, access._access)
            self._access = access
        return Event(lib.native_nbd_run(self._nbd))

    def count_late(self, seconds: int) -> None:
        """After the end of a connection whose peer is barred: count what it still sends as
        `refused`, until it closes or is silent for so long. Nothing of it is executed."""
        lib.native_nbd_count_late(self._nbd, seconds)

    @property
    def request(self) -> Request:
        """The request that `run` returned for."""
        raw = ffi.buffer(lib.native_nbd_request_of(self._nbd), _REQUEST.size)
        return Request._make(_REQUEST.unpack(raw))

    def data(self, length: int) -> memoryview:
        """The payload of a WRITE, or what a READ has to fill; until the next `run`."""
        return memoryview(ffi.buffer(lib.native_nbd_data_of(self._nbd), length))

    def done(self, error: int = 0, why: str = "") -> None:
        """Answer the request: 0, or an NBD error; `why` for those who can be told."""
        if error and why:
            lib.native_nbd_why(self._nbd, why.encode("ascii", "replace"))
        lib.native_nbd_done(self._nbd, error)

    def chunk(self, kind: int, data: bytes, *, last: bool) -> None:
        """One chunk of a structured or extended answer."""
        lib.native_nbd_chunk(self._nbd, kind, last, data, len(data))

    def put(self, data: bytes) -> None:
        """Answer with bytes of one's own."""
        lib.native_nbd_put(self._nbd, data, len(data))

    def leave(self) -> None:
        """Go out of the access: what follows may wait for others."""
        lib.native_nbd_leave(self._nbd)

    def send(self) -> None:
        """Send what has been answered, outside of the access."""
        lib.native_nbd_send(self._nbd)

    def close(self) -> None:
        """No further request is executed. From any thread, until `free`."""
        if self._nbd:
            lib.native_nbd_close(self._nbd)

    def free(self) -> None:
        """Give everything back; also leaves the access."""
        nbd, self._nbd = self._nbd, ffi.NULL
        lib.native_nbd_free(nbd)
