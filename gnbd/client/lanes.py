"""What a client has under way: requests, and the connections that carry them. Without I/O.

A *path* is one network to the server; its *lanes* are its connections, all of one generation.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from cluster.device import Buffer
from cluster.errors import StackError
from gnbd import protocol as p
from gnbd.client.path_choice import HEADER_COST_BYTES, LARGE_BYTES, SAMPLE_NS, Health
from native.link import Sums

LANE_REQUESTS_MAX = 256
LANE_BYTES_MAX = 16 << 20
FLUSH_COST_BYTES = 8 << 20
"""A connection executes in order: what can go elsewhere does not wait behind a FLUSH."""

WITH_DATA = frozenset({p.CMD_READ, p.CMD_PING})
"""Whose answers bring `length` bytes."""
_CARRIES = WITH_DATA | {p.CMD_WRITE, p.CMD_COMPARE_AND_WRITE}


class Waiter(Protocol):
    """Who waits for requests."""

    def done(self, error: StackError | None) -> None: ...


class Request:
    """One NBD request on its way. `into` receives a READ; `result` is what was read."""

    __slots__ = ("cookie", "data", "flags", "into", "is_part", "kind", "length", "mark", "offset",
                 "order", "parts", "place", "result", "round", "sums", "waiter",
                 "wanted")  # fmt: skip

    def __init__(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        data: Buffer | None = None,
        flags: int = 0,
        waiter: Waiter | None = None,
    ) -> None:
        self.kind = kind
        self.offset = offset
        self.length = length
        self.data = data
        self.flags = flags
        self.waiter = waiter
        self.into: memoryview | None = None
        self.result: bytes = b""
        self.mark = 0
        self.cookie = 0
        self.place = 0
        """Of the transport, while it is in flight."""
        self.wanted: Sums | None = None
        """Where the caller wants the checksums of its data."""
        self.sums: Sums | None = None
        """The checksums that travel with its data, while it is in flight."""
        self.order = 0
        """Rises with each `submit`."""
        self.round = 0
        """Not 0: sends retained bytes again, in that round."""
        self.parts: list[Request] = []
        """The requests that this one stands for (`gnbd.client.merging`)."""
        self.is_part = False
        """It was sent as a part of another one; from now on it goes alone."""

    def cost_bytes(self) -> int:
        """What it costs a connection, in bytes that it could carry in that time."""
        if self.kind == p.CMD_FLUSH:
            return FLUSH_COST_BYTES
        return HEADER_COST_BYTES + (self.length if self.kind in _CARRIES else 0)

    def finish(self, error: StackError | None) -> None:
        start = 0
        for part in self.parts:
            if part.kind == p.CMD_READ and error is None:
                part.take(self.result[start : start + part.length])
            start += part.length
            part.finish(error)
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter.done(error)

    def take(self, data: bytes) -> None:
        """What it has read."""
        if self.into is None:
            self.result = data
        else:
            self.into[:] = data


class Lane:
    """One connection in transmission."""

    def __init__(self, path: Path, index: int) -> None:
        self.path = path
        self.index = index
        self.generation = path.generation
        self.in_flight: dict[int, Request] = {}
        self.bytes_in_flight = 0
        self.flushes = 0
        self.answered = 0
        self.measured: Request | None = None
        self._sent_ns = 0
        self._cost_bytes = 0

    @property
    def health(self) -> Health:
        return self.path.health

    def is_measured(self) -> bool:
        return self.measured is not None

    def measure(self, request: Request, now_ns: int) -> bool:
        """This one has just been placed: take its time, unless one is under way or was lately."""
        if self.measured is not None or now_ns - self._sent_ns < SAMPLE_NS:
            return False
        self.measured = request
        self._sent_ns = now_ns
        self._cost_bytes = self.bytes_in_flight
        return True

    def measured_done(self, number: int, now_ns: int) -> None:
        """Its answer is here."""
        assert self.measured is not None
        large = self.measured.length >= LARGE_BYTES
        self.measured = None
        if number:
            self.health.failed(large, now_ns)
        else:
            self.health.sample(large, self._cost_bytes, now_ns - self._sent_ns, now_ns)

    def is_overdue(self, now_ns: int) -> bool:
        """Whether it takes longer than was known. Asked now and then."""
        if self.measured is None:
            return False
        large = self.measured.length >= LARGE_BYTES
        return self.health.overdue(large, self._cost_bytes, now_ns - self._sent_ns)

    def has_room(self) -> bool:
        limit = LANE_BYTES_MAX + self.flushes * FLUSH_COST_BYTES
        return len(self.in_flight) < LANE_REQUESTS_MAX and self.bytes_in_flight < limit


class Stranded(msgspec.Struct):
    """Requests of a lost generation of a path, waiting for the confirmation of its drain."""

    generation: int
    requests: list[Request]
    asked: bool = False


class Path:
    """One network to the server."""

    def __init__(self, index: int, generation: int) -> None:
        self.index = index
        self.generation = generation
        self.lanes: list[Lane] = []
        self.stranded: list[Stranded] = []
        self.health = Health()
        self.repeated = 0
        """Requests that were lost with it and are sent again."""


class Drain(msgspec.Struct, frozen=True):
    """Send DRAIN for a path over `lane`, and give `drained` when it succeeded."""

    lane: Lane
    path: Path
    generation: int
