"""Who has what we want: a port, a locked file. One sentence that names the holder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from cluster.errors import BusyError, ConfigError, NotPermittedError, StackError

_TABLES = {"TCP": ("tcp", "tcp6"), "UDP": ("udp", "udp6")}
_LISTENING = {"TCP": "0A", "UDP": "07"}
_KINDS = {socket.SOCK_STREAM: "TCP", socket.SOCK_DGRAM: "UDP"}


def bind(sock: socket.socket, address: str, port: int) -> None:
    """Bind, and close the socket when that fails. Raises BusyError that names the holder of the
    port, ConfigError for an address that is not on this machine."""
    try:
        sock.bind((address, port))
    except OSError as error:
        kind = _KINDS[socket.SocketKind(sock.type)]
        sock.close()
        raise _failure(error, kind, address, port) from error


def _failure(error: OSError, kind: str, address: str, port: int) -> StackError:
    where = f"cannot listen on {kind} {address}:{port}"
    if error.errno == errno.EADDRINUSE:
        who = holder(kind, port)
        return BusyError(
            f"{where}: the port is in use by {who or 'another process'}",
            hint="stop that process, or choose another port or address",
        )
    if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL):
        return ConfigError(
            f"{where}: {address} is not an address of this machine",
            hint="see: ip address; then correct the configuration",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(f"{where}: {error.strerror}")
    return StackError(f"{where}: {error.strerror}")


def holder(kind: str, port: int) -> str:
    """ "NAME (pid N)" of a process that listens on a port; empty if it cannot be seen."""
    sockets = set()
    for table in _TABLES[kind]:
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING[kind] and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    return _process_with(sockets)


def _process_with(links: set[str]) -> str:
    """ "NAME (pid N)" of a process with an open descriptor of that name."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) in links:
                    return _name(process.name)
        except OSError:
            continue  # it has ended meanwhile, or is not ours to look at
    return ""


def _name(pid: str) -> str:
    return f"{Path('/proc', pid, 'comm').read_text().strip()} (pid {pid})"


def lock_file(descriptor: int, path: str, *, shared: bool = False) -> None:
    """flock(2) without waiting. Raises BusyError that names the holder."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        who = _lock_holder(os.fstat(descriptor).st_ino) or "another process"
        raise BusyError(f"{path} is in use by {who}", hint="stop or unmount that first") from None


def _lock_holder(inode: int) -> str:
    try:
        for fields in map(str.split, Path("/proc/locks").read_text().splitlines()):
            if fields[1] == "FLOCK" and fields[-3].endswith(f":{inode}"):
                return _name(fields[-4])
    except OSError:
        pass
    return ""
