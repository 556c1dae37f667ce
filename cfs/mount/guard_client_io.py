"""A mount's side of clusterguard (rules G1-G4): it lends its FUSE descriptor and the table of the
inodes that the kernel knows, and gets the page with its lease.

The guard can so take everything out of the kernel's caches, or end the mount, whether this process
runs or not. Packets: see `node.guard_mounts_io`.
"""

from __future__ import annotations

import array
import json
import mmap
import os
import socket

import trio

from cluster.errors import StackError, UnreachableError
from cluster.ids import Instance
from native.gate import Gate
from native.notify import InodeSweep

SLOTS_FIRST = 1 << 20
SLOTS_MAX = 1 << 26
WORD_BYTES = 8
PACKET_BYTES_MAX = 1 << 16


class SharedInodeTable:
    """The inodes that the kernel knows, in shared memory.

    | word | meaning |
    |---|---|
    | 0 | how many words after this one may be in use |
    | n | a node id, or 0: free |

    It only ever grows. A reader may see a node id that has just been removed: harmless.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("inodes", os.MFD_CLOEXEC)
        self._slots = SLOTS_FIRST
        os.ftruncate(self.descriptor, (1 + self._slots) * WORD_BYTES)
        self._map = mmap.mmap(self.descriptor, (1 + self._slots) * WORD_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._free: list[int] = []
        self._used = 0

    def add(self, node: int) -> int:
        """List a node; returns its slot."""
        if self._free:
            slot = self._free.pop()
        else:
            if self._used == self._slots:
                self._grow()
            self._used += 1
            slot = self._used
            self._words[0] = slot
        self._words[slot] = node
        return slot

    def sweep(self, fuse_fd: int) -> None:
        """Drop the pages of every node, after an abort: then nothing can hold it up."""
        InodeSweep(fuse_fd, self._words[1 : 1 + self._used]).run()

    def remove(self, slot: int) -> None:
        """The kernel knows it no more."""
        self._words[slot] = 0
        self._free.append(slot)

    def _grow(self) -> None:
        if self._slots >= SLOTS_MAX:
            raise StackError("the kernel knows too many inodes")
        self._words.release()
        self._slots *= 2
        self._map.resize((1 + self._slots) * WORD_BYTES)
        self._words = memoryview(self._map).cast("Q")


class GuardSession:
    """The connection to the guard, open for the life of the mount."""

    def __init__(self, sock: trio.socket.SocketType, gate: Gate) -> None:
        self._socket = sock
        self.gate = gate

    async def detach(self) -> None:
        """The kernel has let go of the mount; without this the end of the connection means that
        the mount process died."""
        await self._socket.send(b'{"detach": true}')

    async def wait_closed(self) -> None:
        """Return when the guard has gone."""
        while True:
            try:
                if not await self._socket.recv(PACKET_BYTES_MAX):
                    return
            except OSError:
                return

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


async def attach(
    path: str, instance: Instance, connection: int, mountpoint: str, fds: tuple[int, int, int]
) -> GuardSession:
    """Put a mount under guard. `fds`: /dev/fuse of the session, the inode table, the table of
    unanswered requests."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        await sock.connect(path)
        request = {
            "attach": [instance.node, instance.incarnation, instance.number],
            "connection": connection,
            "mountpoint": mountpoint,
        }
        rights = array.array("i", fds)
        await sock.sendmsg(
            [json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        )
        data, ancillary, _flags, _address = await sock.recvmsg(
            PACKET_BYTES_MAX, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
        )
        lease = array.array("i")
        for level, kind, body in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                lease.frombytes(body[: len(body) - len(body) % 4])
        answer = json.loads(data) if data else {"error": "the guard hung up"}
        if "error" in answer or not lease:
            raise StackError(f"the guard refuses this mount: {answer.get('error', 'no lease')}")
        gate = Gate.map(lease[0])
        os.close(lease[0])
        return GuardSession(sock, gate)
    except OSError as error:
        sock.close()
        raise UnreachableError(f"cannot reach the guard at {path}: {error.strerror}") from error
    except BaseException:
        sock.close()
        raise
