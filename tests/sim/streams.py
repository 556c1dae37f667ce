"""Connections of the simulation: bytes in order, late, and on their way long after the end.

A `Pipe` is one TCP connection. Each direction delivers in order. What is sent while its network is
cut arrives when it heals, also if the sender has closed meanwhile: the kernel goes on alone. An end
that closes may take a part of what it had sent with it (a reset), and an end that vanishes (a power
cut) says nothing until somebody sends to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

from tests.sim.world import MS, World

CLOSE = object()
"""The last message of a direction."""
LATE = 0.05
LATE_MS = 120


class Streams:
    """All connections, and which networks are cut. A cut is any name that pipes know as theirs."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cuts: set[Hashable] = set()
        self.pipes: list[Pipe] = []

    def cut(self, name: Hashable) -> None:
        self.cuts.add(name)

    def heal(self, *names: Hashable) -> None:
        """What has waited goes on."""
        self.cuts.difference_update(names)
        for pipe in self.pipes:
            pipe.go_on()
        self.pipes = [pipe for pipe in self.pipes if not pipe.is_over]


class Direction:
    """One half of a pipe."""

    def __init__(self, streams: Streams, names: frozenset[Hashable]) -> None:
        self.streams = streams
        self.names = names
        self.queue: deque[tuple[int, Any]] = deque()
        self.receiver: Callable[[Any], None] | None = None
        self.ended = False

    @property
    def is_cut(self) -> bool:
        return not self.names.isdisjoint(self.streams.cuts)

    @property
    def is_over(self) -> bool:
        return self.ended and not self.queue

    def send(self, message: Any) -> None:
        """To the other end, unless this one has ended."""
        if self.ended:
            return
        self.ended = message is CLOSE
        world = self.streams.world
        delay = int(world.rng.expovariate(2) * MS) + MS // 10
        if world.rng.random() < LATE:
            delay += world.rng.randrange(LATE_MS * MS)
        ready = max(world.now + delay, self.queue[-1][0] if self.queue else 0)
        self.queue.append((ready, message))
        world.at(ready - world.now, self.pump)

    def pump(self) -> None:
        """Deliver what is due."""
        while self.queue and not self.is_cut and self.queue[0][0] <= self.streams.world.now:
            _, message = self.queue.popleft()
            if self.receiver is not None:
                self.receiver(message)

    def lose_some(self) -> None:
        """A reset: only a part of what is on its way arrives."""
        keep = self.streams.world.rng.randrange(len(self.queue) + 1)
        while len(self.queue) > keep:
            self.queue.pop()


class Pipe:
    """One connection. Either end gets messages and at last `CLOSE`."""

    def __init__(self, streams: Streams, names: frozenset[Hashable], server_name: Hashable) -> None:
        """`names`: cuts of both directions are `name` with "up" or "down" behind."""
        self.streams = streams
        self.server_name = server_name
        self.up = Direction(streams, frozenset((name, "up") for name in names))
        self.down = Direction(streams, frozenset((name, "down") for name in names))
        self.dead_server = False
        self.silent_ns: int | None = None
        """Since when nothing has come through."""
        streams.pipes.append(self)

    @property
    def is_cut(self) -> bool:
        return self.up.is_cut or self.down.is_cut

    @property
    def is_over(self) -> bool:
        return self.up.is_over and self.down.is_over

    def silence_ms(self) -> float:
        """For how long it has been cut off, as far as one has looked."""
        now = self.streams.world.now
        if not (self.is_cut or self.dead_server):
            self.silent_ns = None
        elif self.silent_ns is None:
            self.silent_ns = now
        return 0.0 if self.silent_ns is None else (now - self.silent_ns) / MS

    def go_on(self) -> None:
        """A network has healed."""
        self.up.pump()
        self.down.pump()

    def client_closes(self) -> None:
        """Nothing more is taken here; what was sent may still arrive."""
        self.down.receiver = None
        if self.streams.world.rng.random() < 0.3:
            self.up.lose_some()
        self.up.send(CLOSE)

    def server_closes(self) -> None:
        """The server ends this connection; answers that were sent still arrive."""
        self.up.receiver = None
        self.down.send(CLOSE)

    def server_dies(self, silently: bool) -> None:
        """Its process is killed, or its host loses power (`silently`)."""
        self.up.receiver = None
        if self.streams.world.rng.random() < 0.5:
            self.down.lose_some()
        if silently:
            self.dead_server = True
        else:
            self.down.send(CLOSE)

    def server_is_back(self) -> None:
        """The host answers again, and what it does not know it resets."""
        if self.dead_server:
            self.dead_server = False
            self.down.send(CLOSE)
