"""One export of a running server: back end, reservations, gates and connections."""

from __future__ import annotations

import itertools
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from cluster.errors import BusyError, UsageError
from cluster.ids import Instance
from cluster.paths_io import boottime_ns
from fencing.reservations import Reservations
from gnbd import protocol as p
from gnbd.exports import Export, parse_filter
from gnbd.server.backends_io import Backend, FileBackend
from gnbd.server.damages_io import Damages
from gnbd.server.filters.stack_io import stack_filter
from gnbd.server.flushes_io import Flushes
from gnbd.server.handshake import Offer
from gnbd.server.integrity_io import Integrity, check_area, open_area
from gnbd.server.keeper_io import Keeper
from gnbd.server.scrub_io import Scrub
from gnbd.tls_io import TlsLink
from native import nbd as g

CACHE_GENERATION_ERRORS = 1 << 16
CLUSTERD = 0
WAIT_STEP_S = 0.05
_lives = itertools.count(1)


class Session(msgspec.Struct, frozen=True):
    """What LOGIN bound a connection to."""

    instance: Instance
    export: str
    path: int
    generation: int


class Connection:
    """One socket and its thread. `closing` is looked at before each request; `finished` is set
    when nothing of this connection executes any more."""

    def __init__(self, sock: socket.socket, peer: str, *, local: bool = False) -> None:
        """`local`: through the Unix socket of the state directory."""
        self.sock = sock
        self.peer = peer
        self.local = local
        self.since_ns = boottime_ns()
        self.resting = False
        self.tls: TlsLink | None = None
        self.session: Session | None = None
        self.export: ExportRuntime | None = None
        self._closing = threading.Event()
        self._hurry = threading.Event()
        self.barred = False
        self.transmission: g.Connection | None = None
        self.finished = threading.Event()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    @property
    def client(self) -> str:
        """The name in its certificate."""
        return self.tls.peer if self.tls is not None else ""

    def start_tls(self, context: ssl.SSLContext, timeout_s: float) -> None:
        """From now on `sock` is behind TLS. Raises OSError."""
        self.tls = TlsLink(self.sock, context, timeout_s)
        self.sock = self.tls.inner

    def rest(self, seconds: float) -> None:
        """Until then, or until the connection comes to its end."""
        self.resting = True
        self._hurry.wait(seconds)
        self.resting = False

    def finish(self) -> None:
        """End in order: what has been received is executed and answered."""
        self._hurry.set()
        try:
            self.sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the peer was faster

    def shut(self) -> None:
        """Stop it: requests not begun are discarded, blocked calls return."""
        self._closing.set()
        self._hurry.set()
        if self.transmission is not None:
            self.transmission.close()
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    def refuse(self) -> None:
        """As `shut`, for good: the peer is barred. A node that was paused as a whole does not know
        that yet, and sends what it had in mind: that is read, counted and never executed (R2)."""
        self.barred = True
        self._closing.set()
        self._hurry.set()
        if self.transmission is not None:
            self.transmission.close()
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the peer was faster


class NexusPath(msgspec.Struct):
    """One path of one nexus to one export: the least generation that is accepted, and its
    connections."""

    generation: int = 0
    connections: set[Connection] = set()

    def shut(self, least: int) -> list[Connection]:
        """Cut off and give those of generations below `least`."""
        victims = [c for c in self.connections if c.session and c.session.generation < least]
        for victim in victims:
            victim.shut()
        return victims


def wait_finished(victims: list[Connection], own: Connection) -> bool:
    """Wait until nothing of the victims executes. False if `own` was shut meanwhile: two
    connections that wait for each other must not wait for ever."""
    for victim in victims:
        while not victim.finished.wait(WAIT_STEP_S):
            if own.closing:
                return False
    return not own.closing


class ExportRuntime:
    """State of one export. The service guards all but the back end and `flushes`."""

    def __init__(
        self,
        config: Export,
        reservations: Reservations,
        sequence_min: int,
        state_dir: Path,
        size_bytes: int | None = None,
    ) -> None:
        """`state_dir`: of the server; `size_bytes`: more than in the configuration, because it has
        been grown. Raises StackError, OSError."""
        self.config = config
        self.name = config.name
        self.access = config.access
        self.life = next(_lives)
        size_bytes = config.size_bytes if size_bytes is None else size_bytes
        header = check_area(config, state_dir)
        self.disk = FileBackend(
            Path(config.path), size_bytes, config.read_only, direct=config.direct
        )
        self._upkeep = threading.Lock()
        self.integrity: Integrity | None = None
        self.keeper: Keeper | None = None
        self.scrub: Scrub | None = None
        backend: Backend = self.disk
        try:
            for text in config.filters:
                backend = stack_filter(backend, parse_filter(text))
            integrity = open_area(config, header, self.disk, state_dir)
        except BaseException:
            backend.close()
            raise
        self.shared = g.Export()
        self.size_bytes = backend.size_bytes
        """That clients may use; the back end may be longer already."""
        self.use(backend)
        self.use_integrity(integrity)
        self.reservations = reservations
        self.sequence_min = sequence_min
        self.sequences: dict[Instance, int] = {}
        self.gates: dict[Instance | None, g.Access] = {}
        self.connections: set[Connection] = set()
        self.cache_generation = 0
        self.flushes = Flushes()

    def use(self, backend: Backend, size_bytes: int = 0) -> None:
        """From the next request on; `size_bytes`: more than before. A bare file is read and written
        without Python."""
        self.backend = backend
        self.size_bytes = max(self.size_bytes, size_bytes)
        descriptor = backend.fd if isinstance(backend, FileBackend) else -1
        self.shared.set(
            descriptor, self.size_bytes, read_only=backend.read_only, alignment=backend.alignment
        )

    def use_integrity(self, integrity: Integrity | None) -> None:
        """From the next request on; the one before is the caller's to close, after
        `stop_upkeep`."""
        with self._upkeep:
            self.integrity = integrity
        self.disk.area = integrity.area if integrity is not None else None
        self.shared.protect(self.disk.area)

    def keep(self, flush: Callable[[], None], damages: Damages) -> None:
        """Begin the upkeep of the integrity area, if there is one. `flush` makes all data
        durable; what is found to be wrong goes to `damages`."""
        with self._upkeep:
            if self.integrity is not None:
                nothing = self.backend.read_only
                self.keeper = Keeper(
                    self.name, self.integrity, self.disk.fd, damages,
                    (lambda: None) if nothing else flush,
                )  # fmt: skip

    def start_scrub(self, rate_bytes_s: int) -> Scrub:
        """Raises UsageError, BusyError."""
        with self._upkeep:
            if self.integrity is None:
                hint = f"gnbdctl integrity {self.name} on"
                raise UsageError(f"export {self.name!r} has no integrity area", hint=hint)
            if self.scrub is not None and self.scrub.is_running:
                hint = f"see: gnbdctl scrub {self.name} status"
                raise BusyError(f"a scrub of {self.name!r} is running", hint=hint)
            self.scrub = Scrub(self.name, self.integrity, self.disk, rate_bytes_s)
            return self.scrub

    def stop_upkeep(self) -> None:
        """No thread works on an integrity area any more that is not `integrity`."""
        with self._upkeep:
            threads = self.scrub, self.keeper
            self.scrub = self.keeper = None
        for thread in threads:
            if thread is not None:
                thread.stop()

    def end(self) -> None:
        """Make everything durable, and close. Nothing executes any more. Raises OSError when it
        could not be; it is closed all the same."""
        flushed = False
        with self._upkeep:
            integrity, self.integrity = self.integrity, None
        self.stop_upkeep()
        try:
            if not self.backend.read_only:
                self.backend.flush()
            flushed = True
        finally:
            try:
                if integrity is not None:
                    integrity.close(flushed)
            finally:
                self.backend.close()

    def grow(self, size_bytes: int) -> None:
        """The disk is longer at the return; `use` tells clients. Raises StackError, OSError."""
        self.backend.resize(size_bytes)
        if (integrity := self.integrity) is not None:
            integrity.grow(self.disk.fd, size_bytes)
        if (keeper := self.keeper) is not None:
            keeper.wake()

    def integrity_counters(self) -> dict[str, int]:
        """`Area.counters`; empty: it has no integrity area."""
        return integrity.area.counters() if (integrity := self.integrity) is not None else {}

    def counters(self) -> dict[str, int]:
        """Totals of all clients."""
        found = self.integrity_counters().get("mismatches", 0)
        return self.shared.counters() | {"checksum_mismatches": found}

    def offer(self) -> Offer:
        """What INFO and GO say."""
        return Offer(
            self.name, self.size_bytes, self.flags, self.config.description, self.life,
            self.backend.alignment, self.config.tls, tuple(self.config.clients),
        )  # fmt: skip

    @property
    def is_full(self) -> bool:
        """No more connections."""
        return len(self.connections) >= self.config.connections_max

    @property
    def flags(self) -> int:
        flags = p.FLAG_HAS_FLAGS | p.FLAG_SEND_FLUSH | p.FLAG_SEND_FUA | p.FLAG_CAN_MULTI_CONN
        flags |= p.FLAG_SEND_CACHE
        if self.backend.read_only:
            return flags | p.FLAG_READ_ONLY
        return flags | p.FLAG_SEND_TRIM | p.FLAG_SEND_WRITE_ZEROES | p.FLAG_SEND_FAST_ZERO

    def is_stale(self, nexus: Instance) -> bool:
        """Whether the nexus works with an older volume map than this export allows. clusterd
        itself (instance 0) touches metadata only, under the volume group's lock."""
        if nexus.number == CLUSTERD:
            return False
        return self.sequences.get(nexus, 0) < self.sequence_min
