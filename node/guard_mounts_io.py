"""guard.sock: how mounts hand their descriptors to the guard.

SOCK_SEQPACKET, JSON packets. The mount sends `{"attach": [node, incarnation, number],
"connection": fuse minor, "mountpoint": path}` with three descriptors: /dev/fuse of its session; a
memfd of u64: word 0 is the count of slots, then inode numbers that the kernel knows (0: free); the
memfd of the table of unanswered requests (native/requests.py).
The answer is `{"ok": true}` with the memfd of the lease page (native/gate.py), or
`{"error": text}`. Later `{"detach": true}` says that it has unmounted; the end of the connection
without it is the death of the mount process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

from cluster.errors import ProtocolError, StackError
from native.gate import Gate, create_gate_memory
from native.requests import RequestTable
from node.fuse_connection_io import abort, open_connections
from node.guard_messages import Attach, decode_attach_untrusted, is_detach_untrusted

PACKET_BYTES_MAX = 1 << 16
FDS = 3
WAITING_MAX = 64


class Mount:
    """One attached mount: everything the guard holds of it."""

    def __init__(self, sock: socket.socket, request: Attach, fds: list[int]) -> None:
        self.sock = sock
        self.instance = request.attach
        self.connection = request.connection
        self.mountpoint = request.mountpoint
        self.fuse_fd, self.table_fd, requests_fd = fds  # the last one only until it is mapped
        self.requests = RequestTable(requests_fd)
        self.lease_fd = create_gate_memory(f"lease-{request.attach.number}")
        self.gate = Gate.map(self.lease_fd)
        self.detached = False

    def retire(self) -> None:
        """Give the descriptors back; a sweep has its own."""
        for fd in (self.fuse_fd, self.table_fd, self.lease_fd):
            os.close(fd)


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
            request = decode_attach_untrusted(data)
            if len(fds) != FDS or len(self.waiting) >= WAITING_MAX:
                raise ProtocolError("an attach needs three descriptors")
            for fd in fds:
                os.set_inheritable(fd, False)
            mount = Mount(sock, request, fds)
            os.close(fds[2])
            return mount
        except (ProtocolError, OSError, ValueError) as error:
            for fd in fds:
                os.close(fd)
            self._answer(sock, {"error": f"bad attach: {error}"})
            return None

    def read(self, sock: socket.socket) -> bool | None:
        """A later packet: whether it is a detach. None at the end of the connection."""
        try:
            data = sock.recv(PACKET_BYTES_MAX)
            return is_detach_untrusted(data) if data else None
        except BlockingIOError:
            return False
        except (OSError, ProtocolError):
            return None

    def hung_up(self, mount: Mount) -> None:
        """A mount that waits to be attached has gone, or speaks out of turn: forget it."""
        self.waiting.remove(mount)
        mount.sock.close()
        mount.retire()

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
