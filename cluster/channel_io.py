"""An authenticated connection: frames of cluster/wire.py over a non-blocking TCP socket.

Handshake: each side sends one frame under the long-lived key, with a fresh nonce before its body;
the acceptor repeats the dialer's nonce. Both derive a session key from both nonces, and every
later frame is sealed with it and numbered, so a recorded stream is worth nothing. The dialer ends
the handshake with an empty frame; only then does the acceptor believe it.

`push` sends at once when the socket takes it (no task switch on the fast path) and queues the
rest, bounded; a peer that does not read is cut off.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Awaitable, Callable

import msgspec
import trio

from cluster.errors import ProtocolError
from cluster.holders_io import bind
from cluster.identity import Identity
from cluster.ids import Epoch, Incarnation
from cluster.wire import (
    HEADER_BYTES,
    KIND_STREAM,
    MAC_BYTES,
    PAYLOAD_BYTES_MAX,
    Frame,
    Keys,
    derived_key,
    frame_bytes_untrusted,
    seal,
    unseal_untrusted,
)

NONCE_BYTES = 16
HANDSHAKE_S = 5.0
CONNECT_S = 2.0
BACKLOG_BYTES_MAX = 256 << 20
STRANGER_FRAME_BYTES_MAX = 64 << 10
"""Until the first authenticated frame: hellos are short."""
_READ_BYTES = 1 << 16


class Channel:
    """One connection after (or during) its handshake."""

    def __init__(self, sock: socket.socket, identity: Identity) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._identity = identity
        self._keys = identity.keys
        self._sent = 0
        self._seen = 0
        self._buffer = bytearray()
        self._drained = False
        self._frame_bytes_max = STRANGER_FRAME_BYTES_MAX
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._wake = trio.Event()
        self.closed = False
        self.peer_sender = 0
        self.peer_incarnation = Incarnation(0)
        self.last_received = trio.current_time()

    def close(self) -> None:
        """Close the socket; `receive` and `write_loop` end."""
        if not self.closed:
            self.closed = True
            self._wake.set()
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def peer_address(self) -> str:
        """The address of the other end; empty if it is gone already."""
        try:
            return str(self._socket.getpeername()[0])
        except OSError:
            return ""

    def push(self, payload: bytes, epoch: int = 0, config_epoch: int = 0) -> None:
        """Send one frame, now or from the backlog. To a closed channel it vanishes."""
        if self.closed:
            return
        self._sent += 1
        frame = Frame(
            sender=self._identity.sender,
            cluster_id=self._identity.cluster_id,
            incarnation=self._identity.incarnation,
            epoch=Epoch(epoch),
            config_epoch=config_epoch,
            sequence=self._sent,
            payload=payload,
            kind=KIND_STREAM,
        )
        view = memoryview(seal(self._keys, frame))
        if not self._out:
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
        if view:
            self._out.append(view)
            self._out_bytes += len(view)
            self._wake.set()
            if self._out_bytes > BACKLOG_BYTES_MAX:
                self.close()

    async def write_loop(self) -> None:
        """Send the backlog for ever; returns when the channel is closed."""
        while not self.closed:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._out and not self.closed:
                try:
                    view = self._out[0]
                    count = self._socket.send(view)
                    self._out_bytes -= count
                    if count == len(view):
                        self._out.popleft()
                    else:
                        self._out[0] = view[count:]
                except BlockingIOError:
                    try:
                        await trio.lowlevel.wait_writable(self._socket)
                    except trio.ClosedResourceError:
                        return
                except OSError:
                    self.close()

    async def receive(self) -> Frame | None:
        """The next frame; None when the connection is closed. Raises ProtocolError."""
        while True:
            if len(self._buffer) >= HEADER_BYTES:
                need = frame_bytes_untrusted(self._buffer)
                if need > self._frame_bytes_max:
                    raise ProtocolError(f"a stranger announces a frame of {need} bytes")
                if len(self._buffer) >= need:
                    data = bytes(memoryview(self._buffer)[:need])
                    del self._buffer[:need]
                    return self._open(data)
            if self.closed:  # what the last frame brought about found the connection broken
                return None
            try:
                if self._drained:
                    await trio.lowlevel.wait_readable(self._socket)
                    self._drained = False
                piece = self._socket.recv(_READ_BYTES)
            except BlockingIOError:
                self._drained = True
                continue
            except (OSError, trio.ClosedResourceError):
                return None
            if not piece:
                return None
            self._drained = len(piece) < _READ_BYTES
            self.last_received = trio.current_time()
            self._buffer += piece

    def _open(self, data: bytes) -> Frame:
        frame = unseal_untrusted(self._keys, self._identity.cluster_id, data)
        self._seen += 1
        if frame.kind != KIND_STREAM or frame.sequence != self._seen:
            raise ProtocolError("stream frame out of order")
        if self.peer_sender and frame.sender != self.peer_sender:
            raise ProtocolError("the sender changed within a stream")
        return frame

    async def _expect(self) -> Frame:
        frame = await self.receive()
        if frame is None:
            raise ProtocolError("the connection closed during the handshake")
        return frame

    async def dial(self, body: bytes, epoch: int = 0, config_epoch: int = 0) -> Frame:
        """Do the dialer's half; returns the acceptor's hello (payload = its body)."""
        nonce = os.urandom(NONCE_BYTES)
        with trio.fail_after(HANDSHAKE_S):
            self.push(nonce + body, epoch, config_epoch)
            frame = await self._expect()
        theirs, echo = frame.payload[:NONCE_BYTES], frame.payload[NONCE_BYTES : 2 * NONCE_BYTES]
        if echo != nonce:
            raise ProtocolError("the acceptor answers somebody else's hello")
        self._adopt(frame, nonce, theirs)
        self.push(b"", epoch, config_epoch)
        return msgspec.structs.replace(frame, payload=frame.payload[2 * NONCE_BYTES :])

    async def accept(self, answer: Callable[[Frame], Awaitable[bytes]]) -> Frame:
        """Do the acceptor's half. `answer` may wait (parking); it gets the dialer's hello and
        returns the body of ours, or raises ProtocolError to refuse."""
        with trio.fail_after(HANDSHAKE_S):
            frame = await self._expect()
        theirs = frame.payload[:NONCE_BYTES]
        hello = msgspec.structs.replace(frame, payload=frame.payload[NONCE_BYTES:])
        body = await answer(hello)
        nonce = os.urandom(NONCE_BYTES)
        with trio.fail_after(HANDSHAKE_S):
            self.push(nonce + theirs + body)
            self._adopt(frame, theirs, nonce)
            if (await self._expect()).payload:
                raise ProtocolError("the handshake does not end as it should")
        return hello

    def _adopt(self, frame: Frame, dialer: bytes, acceptor: bytes) -> None:
        if len(dialer) != NONCE_BYTES or len(acceptor) != NONCE_BYTES:
            raise ProtocolError("short nonce")
        self._frame_bytes_max = HEADER_BYTES + PAYLOAD_BYTES_MAX + MAC_BYTES
        self.peer_sender = frame.sender
        self.peer_incarnation = frame.incarnation
        keys = self._identity.keys
        purpose = f"session|{dialer.hex()}|{acceptor.hex()}"
        session = derived_key(keys.by_id[keys.current], purpose)
        self._keys = Keys(0, {0: session})


def tune(sock: socket.socket | trio.socket.SocketType, dead_ms: int) -> None:
    """No delay for small frames; a dead peer is noticed even while we are silent."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, dead_ms)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


async def connect(address: str, port: int, source: str | None, dead_ms: int) -> socket.socket:
    """Open a TCP connection from the local address `source`. Raises OSError."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        sock.setblocking(False)
        if source is not None:
            sock.bind((source, 0))
        tune(sock, dead_ms)
        try:
            sock.connect((address, port))
        except BlockingIOError:
            with trio.move_on_after(CONNECT_S) as scope:
                await trio.lowlevel.wait_writable(sock)
            if scope.cancelled_caught:
                raise TimeoutError(f"no answer from {address}:{port}") from None
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None
        return sock
    except BaseException:
        sock.close()
        raise


def listen(address: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises BusyError, ConfigError as `holders_io.bind`."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bind(sock, address, port)
    sock.listen(256)
    sock.setblocking(False)
    return sock


async def accept_one(listener: socket.socket, dead_ms: int) -> socket.socket:
    """Wait for the next connection."""
    while True:
        try:
            sock, _address = listener.accept()
        except BlockingIOError:
            await trio.lowlevel.wait_readable(listener)
        except ConnectionError:
            continue
        else:
            tune(sock, dead_ms)
            return sock
