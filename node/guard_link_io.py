"""clusterd's end of the socket pair to clusterguard, and the watch over a stuck guard (R9).

clusterd holds a duplicate of every FUSE descriptor and of every lease page too. A mount whose
lease lapsed and which the guard has not even stopped within half the purge budget, or has stopped
and neither purged nor aborted within most of it, is aborted and purged from here. When the guard
dies, clusterd aborts and purges all mounts and ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import trio

from cluster.errors import StackError
from cluster.errors_wire import raise_failure
from cluster.ids import InstanceNo
from cluster.paths_io import boottime_ns
from native.gate import Gate, Word
from node.fuse_connection_io import abort, open_connections
from node.guard_messages import (
    PACKET_BYTES_MAX,
    Alive,
    Failed,
    FromGuard,
    LeaseChanged,
    MountAttached,
    MountDetached,
    Ready,
    Settings,
    ToGuard,
    decode_from_guard,
)
from node.guard_sweep_io import Sweep

QUEUE_MAX = 4096
READY_S = 20.0
SOCKET_BYTES = 1 << 20
MS = 1_000_000
LATE_POLL_NS = 5 * MS
PURGE_PERCENT = 75
"""Of the purge budget: the guard itself aborts earlier (node/guard.py)."""
LATE_LOOKS = 2
"""After a pause of the whole machine the guard gets a moment before we act in its place."""


@dataclass(slots=True)
class _Held:
    """What clusterd holds of a mount."""

    connection: int
    mountpoint: str
    fuse_fd: int
    table_fd: int
    gate: Gate
    aborted: bool = False
    late: int = 0
    lapsed_ns: int = 0
    """Since when its word is LAPSED, as the guard told or as it was seen."""
    sweeper: threading.Thread | None = None

    def close(self) -> None:
        """Give the descriptors back; a sweep has its own."""
        os.close(self.fuse_fd)
        os.close(self.table_fd)


class GuardLink:
    """Starts the guard and talks to it."""

    def __init__(self, settings: Settings, on_message: Callable[[FromGuard], None]) -> None:
        self._settings = settings
        self._on_message = on_message
        self._out: deque[bytes] = deque()
        self._wake = trio.Event()
        self._held: dict[InstanceNo, _Held] = {}
        self._connections = open_connections()
        self.lost = False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (ours, theirs):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        with theirs:
            descriptor = theirs.fileno()
            # `-X clusterguard` only makes the process recognisable in ps.
            self.process = subprocess.Popen(
                [
                    sys.executable, "-X", "clusterguard", "-m", "node.guard_io", str(descriptor)
                ],
                pass_fds=[descriptor],
                cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        ours.send(msgspec.msgpack.encode(settings))
        ours.setblocking(False)
        self._socket = ours

    def send(self, message: ToGuard) -> None:
        """Send one packet, in order, without waiting."""
        if self.lost:
            return
        data = msgspec.msgpack.encode(message)
        if not self._out:
            with contextlib.suppress(BlockingIOError):
                try:
                    self._socket.send(data)
                except (BrokenPipeError, ConnectionError):
                    self.lost = True
                return
        assert len(self._out) < QUEUE_MAX
        self._out.append(data)
        self._wake.set()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the link; raises StackError when the guard is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_loop)
            nursery.start_soon(self._alive_loop)
            nursery.start_soon(self._watch_loop)
            await self._read_loop(task_status)

    async def _read_loop(self, task_status: trio.TaskStatus[None]) -> None:
        ready = False
        while True:
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except trio.ClosedResourceError:
                return
            try:
                data, fds, _flags, _address = socket.recv_fds(self._socket, PACKET_BYTES_MAX, 4)
            except (BlockingIOError, ConnectionResetError):
                # Reset: the guard ended with packets of ours unread. The kernel tells that once,
                # ahead of what the guard said last, and then the end.
                continue
            except OSError:
                data, fds = b"", []
            if not data:
                self.lost = True
                self.abort_all()
                raise StackError("clusterguard has died", hint="see the log of clusterd")
            message = decode_from_guard(data)
            if isinstance(message, Failed):
                self.lost = True
                raise_failure(message.failure)
            if isinstance(message, Ready) and not ready:
                ready = True
                task_status.started()
            if isinstance(message, MountAttached):
                self._hold(message, fds)
            elif isinstance(message, LeaseChanged) and message.number in self._held:
                self._held[message.number].lapsed_ns = 0 if message.open else boottime_ns()
            elif isinstance(message, MountDetached):
                self.forget(message.number)
            self._on_message(message)

    def _hold(self, message: MountAttached, fds: list[int]) -> None:
        fuse_fd, lease_fd, table_fd = fds
        os.set_inheritable(fuse_fd, False)
        os.set_inheritable(table_fd, False)
        gate = Gate.map(lease_fd)
        os.close(lease_fd)
        self._held[message.instance.number] = _Held(
            message.connection, message.mountpoint, fuse_fd, table_fd, gate
        )

    def mountpoint(self, number: InstanceNo) -> str:
        """Where an instance is mounted; empty if it is no mount."""
        held = self._held.get(number)
        return held.mountpoint if held is not None else ""

    def connection(self, number: InstanceNo) -> int | None:
        """The FUSE connection of an instance; None if it is not mounted (yet)."""
        held = self._held.get(number)
        return held.connection if held is not None else None

    def forget(self, number: InstanceNo) -> None:
        """The instance is over: give back what we hold of it."""
        held = self._held.pop(number, None)
        if held is not None:
            held.close()

    def abort_all(self) -> None:
        """Abort and purge every mount of this node. Blocks, bounded: the guard is dead, and after
        us nobody is left to take back what the kernel caches."""
        for held in self._held.values():
            self._abort(held)
        end_s = time.monotonic() + READY_S
        for held in self._held.values():
            if held.sweeper is not None:
                held.sweeper.join(max(0.0, end_s - time.monotonic()))

    def _abort(self, held: _Held) -> None:
        held.aborted = True
        held.gate.set_word(Word.BARRED)
        with contextlib.suppress(OSError):
            abort(self._connections, held.connection, held.fuse_fd)
        sweep = Sweep(held.fuse_fd, held.table_fd)
        held.sweeper = threading.Thread(target=sweep.run, daemon=True, name="sweep")
        held.sweeper.start()

    async def _alive_loop(self) -> None:
        while True:
            self.send(Alive())
            await trio.sleep(self._settings.timing.heartbeat_ms / 1000)

    async def _watch_loop(self) -> None:
        half_ns = self._settings.timing.purge_ms * MS // 2
        poll_ns = half_ns
        while True:
            await trio.sleep(poll_ns / 1e9)
            poll_ns = half_ns
            for held in self._held.values():
                left_ns = self._left_ns(held, boottime_ns())
                if left_ns is None:
                    held.late = 0
                    continue
                held.late = held.late + 1 if left_ns < 0 else 0
                if held.late > LATE_LOOKS:
                    self._abort(held)
                poll_ns = min(poll_ns, max(left_ns, LATE_POLL_NS))

    def _left_ns(self, held: _Held, now_ns: int) -> int | None:
        """How long until the guard has had its time for what it does now; None: for nothing."""
        purge_ns = self._settings.timing.purge_ms * MS
        word = held.gate.word()
        if word is not Word.LAPSED:
            held.lapsed_ns = 0
        if held.aborted or word not in (Word.OPEN, Word.LAPSED):
            return None
        if word is Word.OPEN:
            return held.gate.lease_end() + purge_ns // 2 - now_ns
        held.lapsed_ns = held.lapsed_ns or now_ns
        return held.lapsed_ns + purge_ns * PURGE_PERCENT // 100 - now_ns

    async def _write_loop(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._out and not self.lost:
                try:
                    self._socket.send(self._out[0])
                    self._out.popleft()
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._socket)
                except OSError:
                    self.lost = True

    def end(self) -> None:
        """Outside trio, before a restart: wait for the guard's purge, then make sure it is gone."""
        self._socket.close()
        try:
            self.process.wait(READY_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    async def close(self) -> None:
        """End the guard after a clean leave: it purges what is left and exits by itself."""
        self.lost = True
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        with trio.move_on_after(READY_S):
            await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)
