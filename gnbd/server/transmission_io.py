"""The transmission phase of one connection: `native.nbd` serves it, this executes the rest.

READ and WRITE of a bare file never come here. FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS,
COMPARE AND WRITE, what else was agreed at LOGIN, and every request of an export with filters do,
one at a time, in order, inside the access of the nexus (R5) that has been checked for it.
"""

from __future__ import annotations

import struct

from fencing.reservations import WRITE
from gnbd import protocol as p
from gnbd.server.export_io import Connection, ExportRuntime
from gnbd.server.handshake import Enter
from gnbd.server.service_io import Service
from native import nbd
from native.integrity import ChecksumError
from native.nbd import Event, Request

LATE_S = 300
"""So long a barred connection without a word is kept."""

_WIRE_ERRORS = {p.EPERM, p.EIO, p.ENOMEM, p.EINVAL, p.ENOSPC, p.EOVERFLOW, p.ENOTSUP, p.ESHUTDOWN}
_PLAIN_FLAGS = p.CMD_FLAG_FUA
_ZERO_FLAGS = p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE | p.CMD_FLAG_FAST_ZERO
_FLAGS = {
    p.CMD_FLUSH: _PLAIN_FLAGS, p.CMD_TRIM: _PLAIN_FLAGS, p.CMD_CACHE: _PLAIN_FLAGS,
    p.CMD_WRITE_ZEROES: _ZERO_FLAGS, p.CMD_BLOCK_STATUS: p.CMD_FLAG_FUA | p.CMD_FLAG_REQ_ONE,
}  # fmt: skip
"""That each command may have."""
_CHECKED_IN_C = {p.CMD_READ, p.CMD_WRITE, p.CMD_COMPARE_AND_WRITE}
_PRIVATE = {p.CMD_DRAIN, p.CMD_SEQUENCE, p.CMD_PING, p.CMD_LOGOUT}
_OPERATIONS = {
    p.CMD_READ: "read", p.CMD_WRITE: "write", p.CMD_FLUSH: "flush", p.CMD_TRIM: "trim",
    p.CMD_WRITE_ZEROES: "zero", p.CMD_CACHE: "cache", p.CMD_BLOCK_STATUS: "status",
    p.CMD_COMPARE_AND_WRITE: "write",
}  # fmt: skip
"""As the filters call them."""
_EXTENT = struct.Struct(">II")
_CONTEXT = struct.Struct(">I")
_EXTENT_EXT = struct.Struct(">QQ")
_CONTEXT_EXT = struct.Struct(">II")
_ERROR_HEAD = struct.Struct(">IH")


class Transmission:
    """One connection after the handshake."""

    def __init__(
        self, service: Service, connection: Connection, export: ExportRuntime, entered: Enter
    ) -> None:
        self._service = service
        self._connection = connection
        self._export = export
        self._contexts = entered.contexts
        self._style = entered.style
        self._generation = export.cache_generation
        self._flush_lost = False
        self._durable_write = False
        self._differs_at: int | None = None
        self._why = ""
        self._nexus = connection.session.instance if connection.session else None
        self._native = nbd.Connection(
            connection.sock.fileno(),
            export.shared,
            entered.rest,
            logged_in=self._nexus is not None,
            style=entered.style,
        )

    def run(self) -> None:
        """Serve until the client goes or the connection is shut."""
        native = self._native
        self._connection.transmission = native
        if self._connection.closing:  # it was shut before it could be told
            native.close()
        access = self._service.gate(self._export, self._nexus)
        try:
            while True:
                match native.run(access):
                    case Event.ENDED:
                        if self._connection.barred:
                            native.count_late(LATE_S)
                        return
                    case Event.ACCESS:
                        access = self._service.gate(self._export, self._nexus)
                    case Event.REQUEST:
                        self._execute(native.request)
                    case Event.FAILED:
                        self._durable_write_failed(native.request.error)
        finally:
            self._connection.transmission = None
            native.free()

    def _execute(self, request: Request) -> None:
        """One request, and its answer."""
        kind = request.kind
        if kind in _PRIVATE or (kind == p.CMD_COMPARE_AND_WRITE and self._nexus is None):
            self._private(request)
            return
        operation = _OPERATIONS.get(kind, "")
        backend = self._export.backend
        length = request.length // 2 if kind == p.CMD_COMPARE_AND_WRITE else request.length
        lost = backend.loses_reply(operation, request.offset, length)
        self._why = ""
        self._durable_write = False
        self._differs_at = None
        try:
            error = self._checked(request)
            if not error:
                error = self._deed(request, lost)
        except OSError as problem:
            error = self._no(_wire_error(problem), problem.strerror or "")
            nothing_done = isinstance(problem, ChecksumError)
            if self._durable_write and not nothing_done:
                self._durable_write_failed(error)
                return
            if self._flush_lost:
                self._answer_last(error)
                return
        if lost:
            self._native.leave()
        elif self._differs_at is not None:
            self._miscompare(self._differs_at)
        elif kind != p.CMD_BLOCK_STATUS or error:
            self._native.done(error, self._why)
        if owed_s := backend.owed_s(operation):
            self._native.send()
            self._connection.rest(owed_s)

    def _checked(self, request: Request) -> int:
        """What the request may not ask, as an NBD error."""
        if request.kind in _CHECKED_IN_C:
            return 0
        known = _FLAGS.get(request.kind)
        if known is None:
            return self._no(p.EINVAL, "unknown command")
        if request.flags & ~known:
            return self._no(p.EINVAL, "unknown flags")
        if request.kind == p.CMD_FLUSH:
            return 0
        backend = self._export.backend
        if backend.read_only and request.kind in (p.CMD_TRIM, p.CMD_WRITE_ZEROES):
            return self._no(p.EPERM, "the export is read-only")
        if request.offset % backend.alignment or request.length % backend.alignment:
            return self._no(p.EINVAL, "not a multiple of the minimum block size")
        if request.offset + request.length > self._export.size_bytes:
            number = p.ENOSPC if request.kind == p.CMD_WRITE_ZEROES else p.EINVAL
            return self._no(number, "beyond the end of the export")
        if request.kind == p.CMD_BLOCK_STATUS and not (request.length and self._contexts):
            why = "no length" if self._contexts else "no metadata context was agreed on"
            return self._no(p.EINVAL, why)
        return 0

    def _no(self, number: int, why: str) -> int:
        self._why = why
        return number

    def _deed(self, request: Request, lost: bool) -> int:
        """Execute; raises OSError."""
        backend = self._export.backend
        offset, length, flags = request.offset, request.length, request.flags
        durable = bool(flags & p.CMD_FLAG_FUA)
        match request.kind:
            case p.CMD_READ:
                backend.read_into(offset, self._native.data(length))
                return 0
            case p.CMD_WRITE:
                self._write(offset, self._native.data(length), durable)
                return 0
            case p.CMD_COMPARE_AND_WRITE:
                self._compare_and_write(offset, self._native.data(length), durable)
                return 0
            case p.CMD_TRIM:
                backend.trim(offset, length)
            case p.CMD_WRITE_ZEROES:
                no_hole, fast = flags & p.CMD_FLAG_NO_HOLE, flags & p.CMD_FLAG_FAST_ZERO
                backend.zero(offset, length, bool(no_hole), bool(fast))
            case p.CMD_CACHE:
                backend.cache(offset, length)
                return 0
            case p.CMD_BLOCK_STATUS:
                if not lost:
                    self._status(request)
                return 0
            case _:
                durable = True
        if durable and not backend.read_only:
            self._flush_lost = True
            self._service.flush(self._export, self._connection)
            if self._export.cache_generation != self._generation:  # another client was told
                raise OSError(p.EIO, "what was written before may be lost")
            self._flush_lost = False
        return 0

    def _write(self, offset: int, data: memoryview, durable: bool) -> None:
        self._durable_write = durable
        self._export.backend.write(offset, data, durable)
        self._durable_write = False

    def _compare_and_write(self, offset: int, data: memoryview, durable: bool) -> None:
        """`data`: what must be there, and as much to write. Nobody else executes anything."""
        expected, new = data[: len(data) // 2], data[len(data) // 2 :]
        found = bytearray(len(expected))
        self._export.backend.read_into(offset, memoryview(found))
        position = first_difference(bytes(expected), bytes(found))
        if position is None:
            self._write(offset, new, durable)
        else:
            self._differs_at = offset + position

    def _miscompare(self, offset: int) -> None:
        """In the client's style. A simple reply with an error has no data: this one has."""
        if self._style == nbd.SIMPLE:
            self._native.done(p.EMISCOMPARE)
            self._native.put(p.SIZE.pack(offset))
            return
        why = f"the byte at {offset} differs".encode()
        body = _ERROR_HEAD.pack(p.EMISCOMPARE, len(why)) + why + p.SIZE.pack(offset)
        self._native.chunk(p.CHUNK_ERROR_OFFSET, body, last=True)
        self._native.leave()

    def _status(self, request: Request) -> None:
        """One chunk for each agreed context."""
        one = bool(request.flags & p.CMD_FLAG_REQ_ONE)
        for index, name in enumerate(self._contexts):
            if name == p.CONTEXT_ALLOCATION:
                extents = self._export.backend.extents(request.offset, request.length)
                hole = p.STATE_HOLE | p.STATE_ZERO
                rows = [(length, hole if is_hole else 0) for length, is_hole in extents]
            else:
                rows = [(request.length, self._reservation_state())]
            rows = rows[:1] if one else rows
            kind, head, extent = p.CHUNK_BLOCK_STATUS, _CONTEXT.pack(p.CONTEXT_IDS[name]), _EXTENT
            if self._style == nbd.EXTENDED:
                kind, extent = p.CHUNK_BLOCK_STATUS_EXT, _EXTENT_EXT
                head = _CONTEXT_EXT.pack(p.CONTEXT_IDS[name], len(rows))
            body = head + b"".join(extent.pack(*row) for row in rows)
            self._native.chunk(kind, body, last=index == len(self._contexts) - 1)

    def _reservation_state(self) -> int:
        table = self._export.reservations
        state = (p.STATE_RESERVED if table.type else 0) | int(table.type) << 4
        if self._service.gate(self._export, self._nexus).word & WRITE:
            state |= p.STATE_WRITABLE
        return state | (table.generation & 0xFFFFFF) << 8

    def _private(self, request: Request) -> None:
        """What was agreed at LOGIN. These may wait for other connections: not inside the access."""
        session = self._connection.session
        native = self._native
        if session is None:
            native.done(p.EINVAL, "only after LOGIN")
            return
        native.leave()
        error = 0
        if request.kind == p.CMD_DRAIN:
            native.send()
            if not self._service.drain_path(self._connection, request.length, request.offset):
                error = p.EINVAL
        elif request.kind == p.CMD_SEQUENCE:
            self._service.set_sequence(session, request.offset)
        elif request.kind == p.CMD_LOGOUT:
            self._service.logout(self._connection)
        elif request.kind == p.CMD_PING and (request.length != p.SIZE.size or self._style):
            error = p.EINVAL
        native.done(error, "it makes no sense here")
        if request.kind == p.CMD_PING and not error:
            native.put(p.SIZE.pack(self._export.size_bytes))

    def _durable_write_failed(self, error: int) -> None:
        export, own = self._export, self._connection

        def take_error() -> None:
            export.disk.flush()
            export.disk.drop_refused()

        export.flushes.write_failed(take_error, lambda: self._service.flush_failed(export, own))
        self._answer_last(error)

    def _answer_last(self, error: int) -> None:
        """What others wrote may be lost with it, and they will know; we had to be told first."""
        self._native.done(error, self._why)
        self._native.send()
        self._connection.shut()


def first_difference(one: bytes, other: bytes) -> int | None:
    """Index of the first byte that differs between two of one length."""
    if one == other:
        return None
    differing = int.from_bytes(one) ^ int.from_bytes(other)
    return len(one) - (differing.bit_length() + 7) // 8


def _wire_error(problem: OSError) -> int:
    number = problem.errno or p.EIO
    return number if number in _WIRE_ERRORS else p.EIO
