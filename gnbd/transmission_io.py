"""The data loop of one connection: many requests per receive, many replies per send.

This is the only module on the server's hot path; its thread runs without the GIL wherever the
time goes (recv, preadv, pwritev, sendmsg). Requests of one connection execute in order, one batch
at a time under the gate of the nexus (R5): counted in, then the word is looked at before each
request, so that a revocation waits for one request and not for a batch.

Buffers: requests are parsed where they were received; a WRITE whose payload does not fit into the
receive buffer gets a buffer of its own. READs fill an arena that is sent from without a copy.
"""

from __future__ import annotations

import socket
from collections.abc import Callable

from gnbd import gates_io as g
from gnbd import protocol as p
from gnbd.export_io import Connection, ExportRuntime
from gnbd.service_io import Service

RECEIVE_BYTES = 2 << 20
ARENA_BYTES = 4 << 20
SEND_PARTS_MAX = 512
SEND_BYTES_MAX = 4 << 20

_WIRE_ERRORS = {p.EPERM, p.EIO, p.ENOMEM, p.EINVAL, p.ENOSPC, p.EOVERFLOW, p.ENOTSUP, p.ESHUTDOWN}
_PLAIN_FLAGS = p.CMD_FLAG_FUA
_ZERO_FLAGS = p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE
_PRIVATE = {p.CMD_DRAIN, p.CMD_SEQUENCE, p.CMD_PING, p.CMD_LOGOUT}


class _Ended(Exception):
    """The connection is over; not an error."""


class Transmission:
    """One connection after the handshake."""

    def __init__(self, service: Service, connection: Connection, export: ExportRuntime) -> None:
        self._service = service
        self._connection = connection
        self._export = export
        self._sock = connection.sock
        self._nexus = connection.session.instance if connection.session else None
        self._gate = service.gate(export, self._nexus)
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._arena = memoryview(bytearray(ARENA_BYTES))
        self._arena_used = 0
        self._out: list[bytes | memoryview] = []
        self._out_bytes = 0
        self._word = 0
        self._entered = False
        self._flush_lost = False

    def run(self, first: bytes) -> None:
        """Serve until the client goes or the connection is shut."""
        assert len(first) <= RECEIVE_BYTES
        self._view[: len(first)] = first
        self._end = len(first)
        try:
            while True:
                self._batch()
                self._receive()
        except (_Ended, OSError):
            pass
        finally:
            self._leave()

    # -- input -----------------------------------------------------------------------------

    def _receive(self) -> None:
        """Answer what is done, make room, wait for more bytes."""
        self._send()
        if self._start == self._end or self._end == RECEIVE_BYTES:
            self._compact()
        count = self._sock.recv_into(self._view[self._end :])
        if count == 0:
            raise _Ended
        self._end += count

    def _compact(self) -> None:
        rest = self._end - self._start
        if rest and self._start:
            self._view[:rest] = self._view[self._start : self._end]
        self._start, self._end = 0, rest

    def _batch(self) -> None:
        """Execute every whole request in the buffer."""
        unpack = p.REQUEST.unpack_from
        while self._end - self._start >= p.REQUEST.size:
            magic, flags, kind, cookie, offset, length = unpack(self._buffer, self._start)
            if magic != p.REQUEST_MAGIC:
                raise _Ended
            if kind == p.CMD_WRITE:
                end = self._start + p.REQUEST.size + length
                if end > self._end:
                    if p.REQUEST.size + length > RECEIVE_BYTES:
                        self._long_write(flags, cookie, offset, length)
                        continue
                    if end > RECEIVE_BYTES:
                        self._send()
                        self._compact()
                    return
                payload = self._view[self._start + p.REQUEST.size : end]
                self._start = end
                self._write(flags, cookie, offset, payload)
            else:
                self._start += p.REQUEST.size
                self._other(flags, kind, cookie, offset, length)

    def _long_write(self, flags: int, cookie: int, offset: int, length: int) -> None:
        """A WRITE that is longer than the receive buffer."""
        if length > p.PAYLOAD_BYTES_MAX:
            raise _Ended
        self._send()
        payload = memoryview(bytearray(length))
        have = self._end - self._start - p.REQUEST.size
        payload[:have] = self._view[self._start + p.REQUEST.size : self._end]
        self._start = self._end = 0
        while have < length:
            count = self._sock.recv_into(payload[have:])
            if count == 0:
                raise _Ended
            have += count
        self._write(flags, cookie, offset, payload)

    # -- the gate --------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._entered:
            self._entered = False
            self._gate.leave()

    def _may(self, wanted: int) -> int:
        """0 if the nexus may do it now, else an NBD error; ends the connection of the barred."""
        while True:
            if self._connection.closing:
                raise _Ended
            if not self._entered:
                self._word = self._gate.enter()
                self._entered = True
            word = self._gate.word
            if word & g.CLOSED:
                self._leave()
                self._gate = self._service.gate(self._export, self._nexus)
                continue
            if word == g.NOBODY and self._nexus is not None:
                raise _Ended
            if word & g.STALE:
                return p.ESTALE
            return 0 if word & wanted else p.EPERM

    # -- requests --------------------------------------------------------------------------

    def _write(self, flags: int, cookie: int, offset: int, payload: memoryview) -> None:
        export = self._export
        backend = export.backend
        error = self._may(g.WRITE)
        if error == 0:
            if flags & ~_PLAIN_FLAGS:
                error = p.EINVAL
            elif backend.read_only:
                error = p.EPERM
            elif offset + len(payload) > backend.size_bytes:
                error = p.ENOSPC
            else:
                try:
                    backend.write(offset, payload, bool(flags & p.CMD_FLAG_FUA))
                    counters = export.counters
                    counters["writes"] += 1
                    counters["written_bytes"] += len(payload)
                except OSError as problem:
                    error = _wire_error(problem)
                    if flags & p.CMD_FLAG_FUA:
                        export.flushes.write_failed()
                        self._service.flush_failed(export, self._connection)
                        self._flush_lost = True
        self._reply(cookie, error)

    def _other(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> None:
        if kind == p.CMD_READ:
            self._read(flags, cookie, offset, length)
        elif kind == p.CMD_DISC:
            self._send()
            raise _Ended
        elif kind == p.CMD_FLUSH:
            self._change(flags, cookie, _PLAIN_FLAGS, 0, 0, None)
            self._export.counters["flushes"] += 1
        elif kind == p.CMD_TRIM:
            backend = self._export.backend
            self._change(
                flags, cookie, _PLAIN_FLAGS, offset, length, lambda: backend.trim(offset, length)
            )
        elif kind == p.CMD_WRITE_ZEROES:
            backend = self._export.backend
            no_hole = bool(flags & p.CMD_FLAG_NO_HOLE)
            self._change(
                flags, cookie, _ZERO_FLAGS, offset, length,
                lambda: backend.zero(offset, length, no_hole),
            )  # fmt: skip
        elif kind in _PRIVATE and self._connection.session is not None:
            self._private(kind, cookie, offset, length)
        else:
            self._reply(cookie, p.EINVAL)

    def _read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        export = self._export
        error = self._may(g.READ)
        if error == 0 and (
            flags & ~_PLAIN_FLAGS
            or length > p.PAYLOAD_BYTES_MAX
            or offset + length > export.backend.size_bytes
        ):
            error = p.EINVAL
        if error:
            self._reply(cookie, error)
            return
        if length > ARENA_BYTES:
            view = memoryview(bytearray(length))
        else:
            if self._arena_used + length > ARENA_BYTES:
                self._send()
                if self._may(g.READ):
                    self._reply(cookie, p.EPERM)
                    return
            view = self._arena[self._arena_used : self._arena_used + length]
            self._arena_used += length
        try:
            export.backend.read_into(offset, view)
        except OSError as problem:
            self._reply(cookie, _wire_error(problem))
            return
        export.counters["reads"] += 1
        export.counters["read_bytes"] += length
        self._out.append(p.REPLY.pack(p.REPLY_MAGIC, 0, cookie))
        self._out.append(view)
        self._out_bytes += length
        if len(self._out) >= SEND_PARTS_MAX or self._out_bytes >= SEND_BYTES_MAX:
            self._send()

    def _change(
        self, flags: int, cookie: int, known: int, offset: int, length: int,
        action: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        """FLUSH, TRIM, WRITE_ZEROES: all of the write class, FUA means a flush behind. No action:
        FLUSH."""
        backend = self._export.backend
        error = self._may(g.WRITE)
        flushes = action is None
        if error == 0:
            if flags & ~known:
                error = p.EINVAL
            elif backend.read_only and not flushes:
                error = p.EPERM
            elif offset + length > backend.size_bytes:
                error = p.EINVAL if known == _PLAIN_FLAGS else p.ENOSPC
            else:
                try:
                    if action is not None:
                        action()
                        flushes = bool(flags & p.CMD_FLAG_FUA)
                    if flushes and not backend.read_only:
                        self._service.flush(self._export, self._connection)
                except OSError as problem:
                    error = _wire_error(problem)
                    self._flush_lost = flushes
        self._reply(cookie, error)

    def _private(self, kind: int, cookie: int, offset: int, length: int) -> None:
        """What was agreed at LOGIN. These may wait for other connections: not inside the gate."""
        session = self._connection.session
        assert session is not None
        self._leave()
        if kind == p.CMD_DRAIN:
            self._send()
            if not self._service.drain_path(self._connection, length, offset):
                self._reply(cookie, p.EINVAL)
                return
        elif kind == p.CMD_SEQUENCE:
            self._service.set_sequence(session, offset)
        elif kind == p.CMD_LOGOUT:
            self._service.logout(session)
        self._reply(cookie, 0)

    # -- output ----------------------------------------------------------------------------

    def _reply(self, cookie: int, error: int) -> None:
        self._out.append(p.REPLY.pack(p.REPLY_MAGIC, error, cookie))
        if len(self._out) >= SEND_PARTS_MAX or self._flush_lost:
            self._send()
        if self._flush_lost:
            # Everybody else was cut off before; we had to be told first.
            self._connection.shut()

    def _send(self) -> None:
        """All replies so far, in one call if the socket takes it. Never inside the gate: a client
        that does not read must not keep a revocation waiting."""
        self._leave()
        parts = self._out
        if parts:
            send_all(self._sock, parts)
            self._out = []
            self._out_bytes = 0
        self._arena_used = 0


def send_all(sock: socket.socket, parts: list[bytes | memoryview]) -> None:
    """sendmsg until everything is out."""
    total = sum(map(len, parts))
    sent = sock.sendmsg(parts)
    while sent < total:
        total -= sent
        index = 0
        while sent >= len(parts[index]):
            sent -= len(parts[index])
            index += 1
        parts = parts[index:]
        if sent:
            parts[0] = memoryview(parts[0])[sent:]
        sent = sock.sendmsg(parts)


def _wire_error(problem: OSError) -> int:
    number = problem.errno or p.EIO
    return number if number in _WIRE_ERRORS else p.EIO
