"""The world: time, one event heap, one random generator, the network, and hosts that can fail.

Reusable for any core: a `Host` has an id; what runs on it are closures put on the heap with
`host.at` (they die with a crash and wait during a pause). Messages are bytes: every component
encodes and decodes on the way. Nothing here knows a protocol.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable

MS = 1_000_000
SECOND = 1000 * MS
TRACE_MAX = 200_000
NETWORKS = 2


class Violation(AssertionError):
    """An invariant does not hold."""


class LivenessFailure(AssertionError):
    """Something did not happen although all faults have stopped."""


class World:
    """Time in ns since the start of the simulation."""

    def __init__(self, seed: int, trace: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now = 0
        self.hosts: dict[int, Host] = {}
        self.network = Network(self)
        self.lines: list[str] = []
        self.events = 0
        self._trace = trace
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._count = 0
        self._hash = hashlib.blake2b(digest_size=8)

    def at(self, delay: int, action: Callable[[], None]) -> None:
        """Run `action` after `delay` ns."""
        self._count += 1
        heapq.heappush(self._heap, (self.now + max(delay, 0), self._count, action))

    def run(self, until: int, stop: Callable[[], bool] | None = None) -> bool:
        """Run up to a time, or until `stop` says so (True)."""
        while self._heap and self._heap[0][0] <= until:
            self.now, _, action = heapq.heappop(self._heap)
            self.events += 1
            action()
            if stop is not None and stop():
                return True
        self.now = max(self.now, until)
        return stop is not None and stop()

    def log(self, who: str, text: str) -> None:
        """One line of the trace; it also goes into the hash of the run."""
        line = f"{self.now / SECOND:10.6f} {who:6} {text}"
        self._hash.update(line.encode())
        if self._trace and len(self.lines) < TRACE_MAX:
            self.lines.append(line)

    @property
    def digest(self) -> str:
        """Hash of everything that was logged: equal seeds give equal digests."""
        return self._hash.hexdigest()


class Host:
    """One machine. Its clock has its own offset and rate."""

    def __init__(self, world: World, host_id: int, drift_ppm: int = 3000) -> None:
        self.world = world
        self.id = host_id
        self.life = 0
        self.up = False
        self.paused = False
        self._held: list[Callable[[], None]] = []
        self._offset = world.rng.randrange(1, 1000) * SECOND
        self._rate_ppm = world.rng.randrange(-drift_ppm, drift_ppm + 1)
        world.hosts[host_id] = self

    @property
    def clock(self) -> int:
        """CLOCK_BOOTTIME of this host."""
        now = self.world.now
        return self._offset + now + now * self._rate_ppm // 1_000_000

    def at(self, delay: int, action: Callable[[], None]) -> None:
        """Run on this host, in this life, not while it is paused. `delay` on the host's clock."""
        life = self.life
        scaled = delay - delay * self._rate_ppm // 1_000_000

        def fire() -> None:
            if self.life != life or not self.up:
                return
            if self.paused:
                self._held.append(fire)
            else:
                action()

        self.world.at(scaled, fire)

    def boot(self) -> None:
        """Start a new life."""
        assert not self.up
        self.life += 1
        self.up = True
        self.paused = False
        self._held = []
        self.world.log(str(self.id), f"boots life {self.life}")
        self.started()

    def crash(self) -> None:
        """End this life; what was not durable is gone."""
        if not self.up:
            return
        self.up = False
        self.paused = False
        self._held = []
        self.world.log(str(self.id), "crashes")
        self.stopped()

    def pause(self) -> None:
        """Freeze: nothing runs, messages wait."""
        if self.up and not self.paused:
            self.paused = True
            self.world.log(str(self.id), "is paused")

    def resume(self) -> None:
        """Go on with what has waited."""
        if not self.up or not self.paused:
            return
        self.paused = False
        self.world.log(str(self.id), "goes on")
        held, self._held = self._held, []
        for action in held:
            action()

    def started(self) -> None:
        """A life begins (for subclasses)."""

    def stopped(self) -> None:
        """A life has ended (for subclasses)."""

    def receive(self, source: int, channel: str, data: bytes) -> None:
        """A message has come in (for subclasses)."""


class Network:
    """Loses, doubles, delays, reorders, and can be cut per direction and network."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cuts: set[tuple[int, int, int]] = set()
        self.broken: set[tuple[int, int]] = set()
        """Pairs without sessions although datagrams pass (a firewall, a stuck stack)."""
        self.muted: set[int] = set()
        """Hosts whose datagrams do not come out (a starved guard); their sessions work."""
        self.loss = 0.01
        self.duplicate = 0.01
        self.late = 0.004
        self.late_max = 600 * MS
        self.sent = 0

    def heal(self) -> None:
        """All links work."""
        self.cuts.clear()
        self.broken.clear()
        self.muted.clear()
        self.loss = 0.0
        self.late = 0.0

    def cut(self, sources: list[int], targets: list[int], networks: list[int]) -> None:
        """Cut from each source to each target (one way)."""
        for source in sources:
            for target in targets:
                for network in networks:
                    if source != target:
                        self.cuts.add((source, target, network))

    def is_cut(self, source: int, target: int) -> bool:
        """Whether no network leads from source to target."""
        return all((source, target, network) in self.cuts for network in range(NETWORKS))

    def is_broken(self, source: int, target: int) -> bool:
        """Whether no session can be between two hosts."""
        return (source, target) in self.broken or (target, source) in self.broken

    def datagram(self, source: int, target: int, network: int, channel: str, data: bytes) -> None:
        """One packet on one network."""
        if (source, target, network) not in self.cuts and source not in self.muted:
            self._deliver(source, target, channel, data)

    def session(self, source: int, target: int, channel: str, data: bytes) -> None:
        """A message over whatever network leads there; lost if none does (the session breaks)."""
        if not self.is_cut(source, target) and not self.is_broken(source, target):
            self._deliver(source, target, channel, data)

    def _deliver(self, source: int, target: int, channel: str, data: bytes) -> None:
        rng = self.world.rng
        self.sent += 1
        copies = 1
        if source != target:
            if rng.random() < self.loss:
                return
            if rng.random() < self.duplicate:
                copies = 2
        for _ in range(copies):
            delay = 100_000 + int(rng.expovariate(1 / 400_000))
            if rng.random() < self.late:
                delay += rng.randrange(self.late_max)
            self.world.at(delay, lambda: self._arrive(source, target, channel, data))

    def _arrive(self, source: int, target: int, channel: str, data: bytes) -> None:
        host = self.world.hosts.get(target)
        if host is not None and host.up:
            host.at(0, lambda: host.receive(source, channel, data))
