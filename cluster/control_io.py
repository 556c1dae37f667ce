"""The control socket under trio: one symmetric session class for both ends, and the server.

A session has one reader and one writer task. Events are handed out synchronously and in the
order of the stream; each incoming call runs in a task of its own (at most `CALLS_MAX` at once),
so a handler may call back over the same session. File descriptors travel as SCM_RIGHTS with the
first byte of their line; the line says in `params["fds"]` how many belong to it.

When the peer goes away every pending call raises UnreachableError and `closed` is set: a mount
takes that as the death of its node, clusterd as the death of the instance.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from cluster.control import Call, Event, Failure, Reply, decode_line_untrusted, encode_line
from cluster.errors import (
    BusyError,
    ProtocolError,
    StackError,
    UnreachableError,
    UsageError,
    connect_failure,
)
from cluster.errors_wire import failure_of, raise_failure
from cluster.paths_io import control_socket

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
EventSink = Callable[[str, Any], None]

LINE_BYTES_MAX = 4 << 20
CALLS_MAX = 256
PENDING_BYTES_MAX = 64 << 20
FDS_MAX = 8
_READ_BYTES = 1 << 16


def unwrap_group(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The single exception inside nested groups, or the group itself if there are several."""
    inner: BaseException = group
    while isinstance(inner, BaseExceptionGroup) and len(inner.exceptions) == 1:
        inner = inner.exceptions[0]
    return inner


async def run_all(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run all at once and wait for all; an error cancels the others and is raised as itself."""

    async def one(call: Callable[[], Awaitable[None]]) -> None:
        await call()

    try:
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(one, call)
    except BaseExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise found from None


class Session:
    """One end of a control connection. `attributes` is free for the owner (peer's instance)."""

    def __init__(
        self, sock: trio.socket.SocketType, handlers: Mapping[str, Handler], on_event: EventSink
    ) -> None:
        self._socket = sock
        self.handlers: Mapping[str, Handler] = handlers
        self._on_event = on_event
        self._replies: dict[int, tuple[trio.Event, list[Reply]]] = {}
        self._next_id = 1
        self._out: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._out_bytes = 0
        self._wake = trio.Event()
        self._fds: deque[int] = deque()
        self._running = 0
        self.closed = trio.Event()
        self.attributes: dict[str, Any] = {}

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the session until the peer closes it. Never raises for what the peer did."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_loop)
                task_status.started()
                await self._read_loop(nursery)
                nursery.cancel_scope.cancel()
        except* (OSError, StackError, trio.ClosedResourceError):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection; pending calls end with UnreachableError."""
        self.closed.set()
        self._wake.set()
        self._socket.close()
        for done, _slot in self._replies.values():
            done.set()
        while self._fds:
            os.close(self._fds.popleft())
        while self._out:
            for fd in self._out.popleft()[1]:
                os.close(fd)

    async def call(self, method: str, params: Mapping[str, Any] | None = None) -> Any:
        """Call the peer and wait for its answer. Raises what the peer's handler raised."""
        return await self._call(method, dict(params or {}), ())

    async def send_fds(self, method: str, params: Mapping[str, Any], fds: Sequence[int]) -> Any:
        """As `call`, with file descriptors; the peer gets duplicates, ours stay open."""
        assert len(fds) <= FDS_MAX
        body = {**params, "fds": len(fds)}
        return await self._call(method, body, tuple(os.dup(fd) for fd in fds))

    async def _call(self, method: str, params: dict[str, Any], fds: tuple[int, ...]) -> Any:
        number = self._next_id
        self._next_id += 1
        slot: tuple[trio.Event, list[Reply]] = (trio.Event(), [])
        self._replies[number] = slot
        try:
            self._push(encode_line(Call(number, method, params)), fds)
            await slot[0].wait()
        finally:
            del self._replies[number]
        if not slot[1]:
            raise UnreachableError(f"the connection closed during {method}")
        reply = slot[1][0]
        if reply.error is not None:
            raise_failure(reply.error)
        return reply.result

    def event(self, event: str, data: Any) -> None:
        """Queue an event for the peer. A peer that does not read is cut off."""
        if not self.closed.is_set():
            self._push(encode_line(Event(event, msgspec.to_builtins(data))), ())

    def _push(self, line: bytes, fds: tuple[int, ...]) -> None:
        if self.closed.is_set():
            for fd in fds:
                os.close(fd)
            raise UnreachableError("the control connection is closed")
        self._out.append((line, fds))
        self._out_bytes += len(line)
        if self._out_bytes > PENDING_BYTES_MAX:
            self.close()
        self._wake.set()

    async def _write_loop(self) -> None:
        while not self.closed.is_set():
            await self._wake.wait()
            self._wake = trio.Event()
            while self._out:
                data, fds = self._out.popleft()
                if not fds:
                    while self._out and not self._out[0][1] and len(data) < _READ_BYTES:
                        data += self._out.popleft()[0]
                await self._send(data, fds)
                self._out_bytes -= len(data)

    async def _send(self, data: bytes, fds: tuple[int, ...]) -> None:
        view = memoryview(data)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            while view:
                sent = await self._socket.sendmsg([view], rights)
                view, rights = view[sent:], []
        finally:
            for fd in fds:
                os.close(fd)

    async def _read_loop(self, nursery: trio.Nursery) -> None:
        buffer = bytearray()
        space = socket.CMSG_SPACE(FDS_MAX * 4)
        while True:
            data, ancillary, _flags, _address = await self._socket.recvmsg(
                _READ_BYTES, space, socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, body in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    fds = array.array("i")
                    fds.frombytes(body[: len(body) - len(body) % 4])
                    self._fds.extend(fds)
            if not data:
                return
            start = len(buffer)
            buffer += data
            while (end := buffer.find(b"\n", start)) >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                start = 0
                self._take(line, nursery)
            if len(buffer) > LINE_BYTES_MAX:
                raise ProtocolError("control line is too long")

    def _take(self, line: bytes, nursery: trio.Nursery) -> None:
        message = decode_line_untrusted(line)
        if isinstance(message, Event):
            self._on_event(message.event, message.data)
        elif isinstance(message, Reply):
            slot = self._replies.get(message.id)
            if slot is not None:
                slot[1].append(message)
                slot[0].set()
        elif self._running >= CALLS_MAX:
            busy = Failure("too many calls at once on this session", exit_code=BusyError.exit_code)
            self._push(encode_line(Reply(message.id, error=busy)), ())
        else:
            self._running += 1
            nursery.start_soon(self._answer, message, self._claim_fds(message))

    def _claim_fds(self, message: Call) -> list[int]:
        count = message.params.get("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise ProtocolError("a control line claims descriptors that did not come")
        return [self._fds.popleft() for _ in range(count)]

    async def _answer(self, call: Call, fds: list[int]) -> None:
        """Run one handler. Descriptors that the handler leaves in `params["fds"]` are closed."""
        params = call.params
        params["fds"] = fds
        try:
            handler = self.handlers.get(call.method)
            if handler is None:
                raise UsageError(f"no such method: {call.method}")
            reply = Reply(call.id, result=msgspec.to_builtins(await handler(params)))
        except StackError as error:
            reply = Reply(call.id, error=failure_of(error))
        except (KeyError, ValueError) as error:
            text = f"{call.method}: bad parameters: {type(error).__name__}: {error}"
            reply = Reply(call.id, error=Failure(text, exit_code=UsageError.exit_code))
        except Exception as error:
            # A bug in one command must not be the death of the node: tell the caller and the log.
            inner = unwrap_group(error) if isinstance(error, BaseExceptionGroup) else error
            if isinstance(inner, StackError):
                reply = Reply(call.id, error=failure_of(inner))
            else:
                traceback.print_exception(error)
                text = f"{call.method}: {type(inner).__name__}: {inner}"
                reply = Reply(call.id, error=Failure(text))
        finally:
            self._running -= 1
            for fd in fds:
                os.close(fd)
        if not self.closed.is_set():
            self._push(encode_line(reply), ())


async def connect_session(
    path: Path, handlers: Mapping[str, Handler], on_event: EventSink
) -> Session:
    """Connect to the socket at `path`; the caller must run `session.run` in a nursery."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        await sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise connect_failure(error, path) from error
    return Session(sock, handlers, on_event)


@contextlib.asynccontextmanager
async def open_session(
    run_dir: Path | str | None, handlers: Mapping[str, Handler], on_event: EventSink
) -> AsyncIterator[Session]:
    """A session with the local clusterd for the life of the block."""
    session = await connect_session(control_socket(run_dir), handlers, on_event)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(session.run)
            try:
                yield session
            finally:
                session.close()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        inner = unwrap_group(group)
        if inner is group:
            raise
        raise inner from None


def peer_uid(sock: trio.socket.SocketType | socket.socket) -> int:
    """The user id of the process at the other end."""
    size = struct.calcsize("3i")
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", data)[1])


def bind_unix(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    """A listening Unix socket of mode 0600 that replaces a stale one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, kind)
    mask = os.umask(0o177)
    try:
        sock.bind(str(path))
    except OSError as error:
        raise StackError(f"cannot listen on {path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    sock.listen(128)
    return sock


async def serve_sessions(
    path: Path,
    attach: Callable[[Session], Mapping[str, Handler]],
    detach: Callable[[Session], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept sessions for ever. `attach` gives the handlers of a new session, `detach` is called
    synchronously when it has closed, whatever the reason."""
    listener = trio.socket.from_stdlib_socket(bind_unix(path))

    async def serve_one(sock: trio.socket.SocketType) -> None:
        session = Session(sock, {}, lambda _event, _data: None)
        session.handlers = attach(session)
        try:
            await session.run()
        finally:
            detach(session)

    with listener:
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                sock, _address = await listener.accept()
                if peer_uid(sock) not in (0, os.geteuid()):
                    sock.close()
                    continue
                nursery.start_soon(serve_one, sock)
