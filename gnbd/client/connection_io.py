"""One connection of our client before transmission: TCP or a Unix socket, with TLS or without."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import trio

from cluster.errors import ForeignError, UnreachableError
from cluster.tls import TlsSection
from gnbd.tls_io import TlsLink, secure
from gnbd.unix_paths_io import unix_address


class Connection:
    """`sock` carries plain bytes; what is on the wire is `wire`'s."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = self.wire = sock
        self.checked = False
        """Data goes with checksums."""
        self._tls: TlsLink | None = None

    async def start_tls(
        self, tls: TlsSection, server: str, timeout_ms: int, *, is_host: bool = False
    ) -> None:
        """From now on `sock` is behind TLS. `server`: whom its certificate must name. Raises
        ConfigError, ForeignError, OSError."""

        def handshake() -> None:
            link = secure(self.sock, tls, server, timeout_ms / 1000, is_host=is_host)
            link.inner.setblocking(False)
            self._tls, self.sock, self.wire = link, link.inner, link.wire

        await trio.to_thread.run_sync(handshake)

    def stream(self) -> trio.SocketStream:
        """For a dialogue; closing it leaves the connection open."""
        return trio.SocketStream(trio.socket.from_stdlib_socket(self.sock.dup()))

    def raise_alert(self) -> None:
        """The server hung up. With TLS 1.3 that is how it refuses our certificate."""
        if self._tls is not None and "alert" in self._tls.problem.lower():
            raise ForeignError(
                f"the server does not believe our certificate: {self._tls.problem}",
                hint="see [tls] in node.toml, and authority in [tls] of the server",
            )

    def patient(self) -> None:
        """Negotiation is over. The timeout would also break a window that a slow server keeps
        closed, again and again before its first answer."""
        if self.wire.family != socket.AF_UNIX:
            self.wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)

    def close(self) -> None:
        if self._tls is not None:
            self._tls.abandon()
        self.sock.close()


async def connect(address: str, port: int, timeout_ms: int) -> Connection:
    """To an IP address, or to the Unix socket at an absolute path. Raises UnreachableError,
    OSError."""
    if address.startswith("/"):
        return Connection(_connect_unix(address))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        with trio.fail_after(timeout_ms / 1000):
            await sock.connect((address, port))
    except trio.TooSlowError as error:
        sock.close()
        raise UnreachableError(f"{address} does not answer") from error
    except BaseException:
        sock.close()
        raise
    plain = socket.socket(fileno=os.dup(sock.fileno()))
    sock.close()
    plain.setblocking(False)
    return Connection(plain)


def _connect_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with unix_address(Path(path)) as short:
            sock.connect(short)
    except BaseException:
        sock.close()
        raise
    return sock
