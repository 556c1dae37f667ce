"""clusterguard: heartbeats, echoes, leases and the purge of kernel caches, in a process of its own.

Small on purpose: no trio, a few thousand objects, collected once and frozen, locked in memory, at
real-time priority where that is allowed; so its heartbeats are late by milliseconds at most, while
the daemons beside it collect garbage or compute. One thread runs the loop; sweeps of kernel caches
run in threads of their own, in C, and end as an event of the loop.

It decides nothing: `GuardCore` (heartbeats, leases) and `MountGuard` (mounts) do. It outlives
clusterd just long enough to announce that death and to purge every mount (rule G4).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import selectors
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.actions import Datagram, Notify
from cluster.actions import Tick as CoreTick
from cluster.control import Timing
from cluster.detector import GuardCore
from cluster.errors import EXIT_USAGE, BusyError, StackError
from cluster.errors_wire import failure_of
from cluster.guard_events import (
    ClusterdDied,
    Facts,
    LeaseEnd,
    LocalPurged,
    Progress,
    Sighting,
    Vouch,
    Vouched,
)
from cluster.heartbeat_io import Datagrams
from cluster.identity import Identity
from cluster.ids import Incarnation, InstanceNo
from cluster.messages import Heartbeat
from cluster.paths_io import boottime_ns
from cluster.wire import KEY_ID, Keys
from node import guard
from node.guard_messages import (
    PACKET_BYTES_MAX,
    WRONG_KEY_REPEAT_S,
    Alive,
    BarLocal,
    Ended,
    Failed,
    FromGuard,
    LeaseChanged,
    MountAttached,
    MountDetached,
    MountLost,
    Peers,
    PurgedLocal,
    Ready,
    Settings,
    WrongKey,
    decode_to_guard,
)
from node.guard_mounts_io import Mount, MountSocket
from node.guard_sweep_io import Sweep

MS = 1_000_000
QUEUE_MAX = 4096
LAST_WORDS_BEATS = 5
STUCK_EXIT_FACTOR = 4
END_S = 6.0
"""From there until the process has given everything back, on a machine under load."""
CLUSTERD = InstanceNo(0)


class Guard:
    """The process: two cores and their sockets."""

    def __init__(self, settings: Settings, pipe: socket.socket) -> None:
        self._settings = settings
        self._pipe = pipe
        self._timing = settings.timing
        key = bytes.fromhex(settings.key)
        self._datagrams = Datagrams(
            Identity(
                settings.node,
                bytes.fromhex(settings.cluster_id),
                Incarnation(settings.incarnation),
                Keys(KEY_ID, {KEY_ID: key}),
            ),
            settings.addresses,
            settings.port,
            self._wrong_key,
        )
        self._wrong_keys: dict[int, int] = {}
        self._core = GuardCore(
            settings.node, Incarnation(settings.incarnation), settings.timing, boottime_ns(),
            len(settings.addresses),
        )  # fmt: skip
        self._guard = guard.MountGuard(settings.timing)
        self._mounts: dict[InstanceNo, Mount] = {}
        self._facts: Facts | None = None
        self._alive_ns = boottime_ns()
        self._progress_due_ns = 0
        self._died_ns: int | None = None
        self._out: deque[tuple[FromGuard, tuple[int, ...]]] = deque()
        self._results: deque[tuple[InstanceNo, Mount, bool]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._door = MountSocket(Path(settings.run_dir) / "guard.sock")

    # --- the loop

    def run(self) -> None:
        """Serve until clusterd is dead and everything is purged."""
        select = self._selector
        select.register(self._pipe, selectors.EVENT_READ, self._read_pipe)
        select.register(self._wake, selectors.EVENT_READ, self._read_results)
        select.register(self._door.listener, selectors.EVENT_READ, self._accept)
        for network, sock in enumerate(self._datagrams.sockets):
            select.register(sock, selectors.EVENT_READ, self._reader(network))
        self._tell(Ready())
        while not self._finished():
            now = boottime_ns()
            # Lapses first: after a pause nothing may be served before they are seen.
            self._tick(now)
            for key, events in select.select(self._wait_s()):
                if events & selectors.EVENT_READ:
                    key.data()
            self._flush()

    def close(self) -> None:
        """Give back what the next guard needs; the end of the interpreter takes its time."""
        self._datagrams.close()
        self._door.listener.close()

    def _reader(self, network: int) -> Callable[[], None]:
        return lambda: self._read_datagrams(network)

    def _wait_s(self) -> float:
        times = [self._progress_due_ns]
        for due in (self._core.deadline(), self._guard.deadline()):
            if due is not None:
                times.append(due)
        wait_ns = max(0, min(times) - boottime_ns())
        if self._guard.draining():
            wait_ns = max(wait_ns, guard.DRAIN_POLL_NS)
        return wait_ns / 1e9

    def _tick(self, now: int) -> None:
        in_flight = {n: self._mounts[n].gate.in_flight() for n in self._guard.draining()}
        self._guard_step(guard.Tick(in_flight))
        if now >= self._progress_due_ns:
            self._progress_due_ns = now + self._timing.heartbeat_ms * MS
            self._progress(now)
        self._core_step(CoreTick())

    def _progress(self, now: int) -> None:
        ages = [(CLUSTERD, (now - self._alive_ns) // MS)]
        for number, mount in self._mounts.items():
            stamp = mount.gate.progress()
            ages.append((number, max(0, now - stamp) // MS if stamp else 0))
        self._core_step(Progress(ages))

    def _finished(self) -> bool:
        if self._died_ns is None:
            return False
        since_ns = boottime_ns() - self._died_ns
        if since_ns > stuck_exit_ns(self._timing):
            return True
        said = since_ns > LAST_WORDS_BEATS * self._timing.heartbeat_ms * MS
        return said and self._guard.settled()

    # --- cores

    def _core_step(self, event: Any) -> None:
        for action in self._core.step(boottime_ns(), event):
            if isinstance(action, Datagram):
                config_epoch = self._facts.config_epoch if self._facts else 0
                self._datagrams.send(action.to, action.network, action.message, config_epoch)
            elif isinstance(action, Notify):
                self._core_notice(action.event)

    def _core_notice(self, event: object) -> None:
        if isinstance(event, LeaseEnd):
            self._guard_step(guard.LeaseMoved(event.number, event.end_ns))
        elif isinstance(event, Sighting | Vouched):
            self._tell(event)

    def _guard_step(self, event: guard.GuardEvent) -> None:
        for action in self._guard.step(boottime_ns(), event):
            self._perform(action)

    def _perform(self, action: guard.GuardAction) -> None:
        number = action.number
        mount = self._mounts.get(number)
        if isinstance(action, guard.Purged):
            self._tell(PurgedLocal(number, action.reason))
            self._core_step(LocalPurged([number]))
            return
        if mount is None:
            return
        match action:
            case guard.StoreLease(_, end_ns):
                mount.gate.set_lease_end(end_ns)
            case guard.StoreWord(_, word):
                mount.gate.set_word(word)
            case guard.Sweep():
                self._start_sweep(number, mount)
            case guard.Abort(_, reason):
                if reason:
                    self._tell(MountLost(number, reason))
                self._door.abort(mount)
            case guard.Lapsed() | guard.Renewed():
                self._tell(LeaseChanged(number, isinstance(action, guard.Renewed)))
            case guard.Forget():
                del self._mounts[number]
                self._tell(MountDetached(number))
                self._hang_up(mount)
                mount.retire()

    def _hang_up(self, mount: Mount) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(mount.sock)
        mount.sock.close()

    def _start_sweep(self, number: InstanceNo, mount: Mount) -> None:
        one = Sweep(mount.fuse_fd, mount.table_fd, mount.requests)

        def work() -> None:
            gone = one.run()
            self._results.append((number, mount, gone))
            os.eventfd_write(self._wake, 1)

        threading.Thread(target=work, daemon=True, name=f"sweep-{number}").start()

    # --- input

    def _read_results(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._results:
            number, mount, gone = self._results.popleft()
            if self._mounts.get(number) is mount:
                self._guard_step(guard.Swept(number, gone))

    def _read_datagrams(self, network: int) -> None:
        for heard in self._datagrams.receive(network):
            if isinstance(heard.message, Heartbeat) and heard.message.node != heard.source:
                continue
            self._core_step(heard)

    def _wrong_key(self, peer: int) -> None:
        now = boottime_ns()
        if now >= self._wrong_keys.get(peer, 0):
            self._wrong_keys[peer] = now + WRONG_KEY_REPEAT_S * 1000 * MS
            self._tell(WrongKey(peer))

    def _read_pipe(self) -> None:
        while True:
            try:
                data = self._pipe.recv(PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._clusterd_died()
                return
            self._take(decode_to_guard(data))

    def _take(self, message: object) -> None:
        match message:
            case Alive():
                self._alive_ns = boottime_ns()
            case Facts():
                self._facts = message
                self._core_step(message)
                self._attach_waiting()
            case Vouch():
                self._core_step(message)
            case Peers(addresses):
                self._datagrams.set_peers(addresses)
            case BarLocal(numbers, reason):
                for number in numbers:
                    self._guard_step(guard.Bar(number, reason))
            case Ended(number):
                self._guard_step(guard.Detached(number))

    def _clusterd_died(self) -> None:
        self._selector.unregister(self._pipe)
        self._died_ns = boottime_ns()
        self._out.clear()
        self._core_step(ClusterdDied())
        for number in list(self._mounts):
            self._guard_step(guard.Bar(number, "clusterd died"))

    # --- mounts

    def _accept(self) -> None:
        sock = self._door.accept()
        if sock is not None:
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._greet(sock))

    def _greet(self, sock: socket.socket) -> None:
        """The first packet of a mount: its descriptors."""
        self._selector.unregister(sock)
        mount = self._door.read_attach(sock)
        if mount is None:
            sock.close()
        else:
            self._door.waiting.append(mount)
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._waiting_spoke(mount))
            self._attach_waiting()

    def _waiting_spoke(self, mount: Mount) -> None:
        """Before the attach is answered a mount has nothing to say: it has ended."""
        if mount not in self._door.waiting:
            return  # it was attached or refused since select() returned
        self._selector.unregister(mount.sock)
        self._door.hung_up(mount)

    def _attach_waiting(self) -> None:
        """Attach the mounts whose instance clusterd has told us of; refuse impossible ones."""
        for mount in list(self._door.waiting):
            number = mount.instance.number
            mine = (self._settings.node, self._settings.incarnation)
            known = self._facts is not None and number in self._facts.instances
            if (mount.instance.node, mount.instance.incarnation) != mine or self._died_ns:
                self._refuse(mount, "this instance is not of this life of this node")
            elif number in self._mounts:
                self._refuse(mount, "this instance is attached already")
            elif self._guard.is_barred(number):
                self._refuse(mount, "this instance was put out of the cluster")
            elif known:
                self._door.waiting.remove(mount)
                self._selector.unregister(mount.sock)
                self._attach(mount)

    def _refuse(self, mount: Mount, reason: str) -> None:
        self._selector.unregister(mount.sock)
        self._door.refuse(mount, reason)

    def _attach(self, mount: Mount) -> None:
        number = mount.instance.number
        self._mounts[number] = mount
        self._selector.register(
            mount.sock, selectors.EVENT_READ, lambda: self._mount_spoke(number, mount)
        )
        self._guard_step(guard.Attached(number))
        told = MountAttached(mount.instance, mount.connection, mount.mountpoint)
        self._tell(told, tuple(map(os.dup, (mount.fuse_fd, mount.lease_fd, mount.table_fd))))
        self._door.welcome(mount)

    def _mount_spoke(self, number: InstanceNo, mount: Mount) -> None:
        """A packet after the attach: `detach`, or the end of the process."""
        detach = self._door.read(mount.sock)
        if self._mounts.get(number) is not mount:
            return
        if detach:
            # We hang up when the sweep is over (`Forget`): the mount keeps its locks until then.
            mount.detached = True
            self._guard_step(guard.Left(number))
        elif detach is None:
            self._hang_up(mount)
            if not mount.detached:
                self._guard_step(guard.Bar(number, "the mount process died"))

    # --- output

    def _tell(self, message: FromGuard, fds: tuple[int, ...] = ()) -> None:
        if self._died_ns is not None:
            for fd in fds:
                os.close(fd)
            return
        if isinstance(message, Sighting):
            # Only the newest picture counts; a slow clusterd does not fill the queue.
            stale = [item for item in self._out if isinstance(item[0], Sighting)]
            for item in stale:
                self._out.remove(item)
        assert len(self._out) < QUEUE_MAX
        self._out.append((message, fds))
        self._flush()

    def _flush(self) -> None:
        while self._out:
            message, fds = self._out[0]
            try:
                socket.send_fds(self._pipe, [msgspec.msgpack.encode(message)], list(fds))
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                return
            self._out.popleft()
            for fd in fds:
                os.close(fd)


def _prefer_this_process() -> None:
    """Memory that is never paged out, first in line for the processor, no collector pauses."""
    libc = ctypes.CDLL(None, use_errno=True)
    mcl_current, mcl_future, mcl_onfault = 1, 2, 4
    libc.mlockall(mcl_current | mcl_future | mcl_onfault)
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-950")
    gc.collect()
    gc.freeze()


def stuck_exit_ns(timing: Timing) -> int:
    """How long after the death of clusterd a guard ends whose purge does not."""
    return STUCK_EXIT_FACTOR * timing.dead_ms * MS


def lock_wait_s(timing: Timing) -> float:
    """How long to wait for the end of the guard of an earlier clusterd."""
    return stuck_exit_ns(timing) / 1e9 + END_S


def _take_lock(run_dir: Path, timing: Timing) -> int:
    """Wait for the guard of an earlier clusterd to finish its purge. Raises StackError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(run_dir / "guard.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + lock_wait_s(timing)
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise BusyError(
                    f"another clusterguard is running with {run_dir}",
                    hint="stop it, then start clusterd",
                ) from None
            time.sleep(0.02)
        else:
            return fd


def main() -> None:
    """Entry of the process: the last argument is the number of the socket pair's descriptor."""
    try:
        pipe = socket.socket(fileno=int(sys.argv[-1]))
        settings = decode_to_guard(pipe.recv(PACKET_BYTES_MAX))
        assert isinstance(settings, Settings)
    except (ValueError, OSError, msgspec.DecodeError, AssertionError):
        asked = {"-h", "--help"} & set(sys.argv)
        print("clusterguard: only clusterd starts it; see: clusterd --help", file=sys.stderr)
        sys.exit(0 if asked else EXIT_USAGE)
    try:
        lock = _take_lock(Path(settings.run_dir), settings.timing)
        process = Guard(settings, pipe)
    except StackError as error:
        pipe.send(msgspec.msgpack.encode(Failed(failure_of(error))))
        sys.exit(error.exit_code)
    pipe.setblocking(False)
    _prefer_this_process()
    process.run()
    process.close()
    os.close(lock)  # who gets it now binds the same ports at once


if __name__ == "__main__":
    main()
