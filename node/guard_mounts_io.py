"""guard.sock: how mounts hand their descriptors to the guard, and the sweep of kernel caches.

SOCK_SEQPACKET, JSON packets. The mount sends `{"attach": [node, incarnation, number],
"connection": fuse minor, "mountpoint": path}` with two descriptors: /dev/fuse of its session, and
a memfd of u64: word 0 is the count of slots, then inode numbers that the kernel knows (0: free).
The answer is `{"ok": true}` with the memfd of the lease page (native/gate.py), or
`{"error": text}`. Later `{"detach": true}` says that it has unmounted; the end of the connection
without it is the death of the mount process.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import StackError
from cluster.ids import Instance
from native.gate import Gate, create_gate_memory
from native.notify import InodeSweep, increment_epoch
from node.fuse_connection_io import abort, open_connections

PACKET_BYTES_MAX = 1 << 16
SWEEP_THREADS = 4
WAITING_MAX = 64


class Mount:
    """One attached mount: everything the guard holds of it."""

    def __init__(self, sock: socket.socket, request: _Attach, fuse_fd: int, table_fd: int) -> None:
        self.sock = sock
        self.instance = request.attach
        self.connection = request.connection
        self.mountpoint = request.mountpoint
        self.fuse_fd = fuse_fd
        self.table_fd = table_fd
        self.lease_fd = create_gate_memory(f"lease-{request.attach.number}")
        self.gate = Gate.map(self.lease_fd)
        self.sweeping = False
        self.detached = False
        self._retired = False

    def retire(self) -> None:
        """Give the descriptors back, but not under a sweep: their numbers could be used anew."""
        self._retired = True
        if not self.sweeping:
            self._close()

    def swept(self) -> None:
        """The sweep has ended."""
        self.sweeping = False
        if self._retired:
            self._close()

    def _close(self) -> None:
        for fd in (self.fuse_fd, self.table_fd, self.lease_fd):
            os.close(fd)


class _Attach(msgspec.Struct, frozen=True):
    attach: Instance
    connection: int
    mountpoint: str


class MountSocket:
    """The listening end of guard.sock."""

    def __init__(self, path: Path) -> None:
        self.waiting: list[Mount] = []
        self._connections = open_connections()
        path.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mask = os.umask(0o177)
        try:
            self.listener.bind(str(path))
        except OSError as error:
            raise StackError(f"cannot listen on {path}: {error.strerror}") from error
        finally:
            os.umask(mask)
        self.listener.listen(64)
        self.listener.setblocking(False)

    def accept(self) -> socket.socket | None:
        """The next mount's connection; None for a stranger."""
        try:
            sock, _address = self.listener.accept()
        except OSError:
            return None
        data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", data)[1] not in (0, os.geteuid()):
            sock.close()
            return None
        sock.setblocking(False)
        return sock

    def read_attach(self, sock: socket.socket) -> Mount | None:
        """The attach packet of a new connection; None if it is none."""
        try:
            data, fds, _flags, _address = socket.recv_fds(sock, PACKET_BYTES_MAX, 4)
        except OSError:
            return None
        try:
            request = msgspec.json.decode(data, type=_Attach)
            if len(fds) != 2 or len(self.waiting) >= WAITING_MAX:
                raise ValueError("an attach needs two descriptors")
            for fd in fds:
                os.set_inheritable(fd, False)
            return Mount(sock, request, *fds)
        except (ValueError, msgspec.DecodeError) as error:
            for fd in fds:
                os.close(fd)
            self._answer(sock, {"error": f"bad attach: {error}"})
            return None

    def read(self, sock: socket.socket) -> dict[str, Any] | None:
        """A later packet; None at the end of the connection."""
        try:
            data = sock.recv(PACKET_BYTES_MAX)
            message = json.loads(data) if data else None
        except BlockingIOError:
            return {}
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def welcome(self, mount: Mount) -> None:
        """Answer an attach with the lease page."""
        with contextlib.suppress(OSError):
            socket.send_fds(mount.sock, [b'{"ok": true}'], [mount.lease_fd])

    def refuse(self, mount: Mount, reason: str) -> None:
        """Answer an attach with an error and forget it."""
        self.waiting.remove(mount)
        self._answer(mount.sock, {"error": reason})
        mount.sock.close()
        mount.retire()

    def _answer(self, sock: socket.socket, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            sock.send(json.dumps(message).encode())

    def abort(self, mount: Mount) -> None:
        """Abort the FUSE connection of a mount."""
        with contextlib.suppress(OSError):
            abort(self._connections, mount.connection, mount.fuse_fd)


def sweep(fuse_fd: int, table_fd: int) -> bool:
    """Invalidate every inode of the table, in several threads. True if the connection is gone."""
    size = os.fstat(table_fd).st_size // 8 * 8
    increment_epoch(fuse_fd)
    if size <= 8:
        return False
    table = mmap.mmap(table_fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    used = min(int.from_bytes(table[:8], "little"), size // 8 - 1)
    if used == 0:
        return False
    job = InodeSweep(fuse_fd, memoryview(table)[8 : 8 + 8 * used])
    failed: list[int] = []

    def work() -> None:
        error = job.run()
        if error:
            failed.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(SWEEP_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return bool(failed)
