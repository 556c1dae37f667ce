"""Where a gnbd-server takes connections: TCP, Unix sockets, sockets of systemd."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from cluster.errors import BusyError, ConfigError, os_failure
from cluster.holders_io import bind
from gnbd.exports import ServerConfig
from gnbd.unix_paths_io import unix_address

BACKLOG = 128


def listen_tcp(address: str, port: int) -> socket.socket:
    """One address. Raises StackError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # "::" beside "0.0.0.0"
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    bind(sock, address, port)
    sock.listen(BACKLOG)
    return sock


def listen_unix(path: Path, mode: int) -> socket.socket:
    """A Unix socket; one that nobody serves any more is replaced. Raises StackError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = os.umask(0o777 & ~mode)  # never wider than wanted, not for a moment
        try:
            with unix_address(path) as short:
                sock.bind(short)
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            if not path.is_socket():
                raise ConfigError(f"cannot listen on {path}: it is there, and no socket") from error
            raise BusyError(f"cannot listen on {path}: somebody serves it") from error
        raise os_failure(error, f"cannot listen on {path}") from error
    return sock


def _clear(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            with unix_address(path) as short:
                probe.connect(short)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)


def listen_all(config: ServerConfig) -> list[socket.socket]:
    """What the configuration names. Raises StackError, and then nothing stays open."""
    found: list[socket.socket] = []
    try:
        for address in config.addresses:
            found.append(listen_tcp(address, config.port))
        for path in config.unix_sockets:
            found.append(listen_unix(Path(path), int(config.unix_mode, 8)))
    except BaseException:
        close_all(found)
        raise
    return found


def close_all(listeners: list[socket.socket]) -> None:
    """Take no more; the paths of Unix sockets go."""
    for listener in listeners:
        if listener.family == socket.AF_UNIX:
            path = listener.getsockname()
            if isinstance(path, str) and path:
                Path(path).unlink(missing_ok=True)
        # Not close alone: a thread may be inside accept.
        try:
            listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        listener.close()


def place_of(listener: socket.socket) -> str:
    """For people."""
    name = listener.getsockname()
    return f"port {name[1]}" if isinstance(name, tuple) else str(name)


def peer_of(sock: socket.socket, address: object) -> str:
    """Who has connected, for people."""
    if not isinstance(address, tuple):
        return "unix"
    host = f"[{address[0]}]" if sock.family == socket.AF_INET6 else address[0]
    return f"{host}:{address[1]}"
