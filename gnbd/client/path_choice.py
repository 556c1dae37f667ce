"""Which connection takes a request, and which path is not to be relied on. No I/O, no clock.

Service time: of one request at a time per connection it is measured how long it took, divided by
the bytes that were in flight there when it was sent, its own among them. Paths are compared by the
moving average of that *pace*, for small and large requests apart. Only a path that is `SLOW` times
slower than the best one counts as slow, so that equal paths are used as if nothing was measured:
the least loaded connection, small requests together on the first one. A slow path takes a request
when the others would need longer for it, and one now and then so that it is measured again.

Hold-down: a path that was lost `LOSSES` times within `WINDOW_NS` is put back in service, but on
*standby* for a while that doubles with each further loss: it is used only if no other path is up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

SPREAD_BYTES = 256 << 10
"""A later connection is taken only when an earlier one has this much more in flight: small requests
stay together and share system calls."""
HEADER_COST_BYTES = 512
LARGE_BYTES = 64 << 10
"""From here on a request is large."""
SLOW = 3.0
WEIGHT = 1 / 8
"""Of a new measurement in the average."""
SAMPLE_NS = 1_000_000
"""So much time is between two measurements of a connection."""
PROBE_NS = 1_000_000_000
"""A path that is slow, or not known, gets a request in that time, if there are any."""
LOSSES = 3
WINDOW_NS = 60_000_000_000
STANDBY_FIRST_NS = 1_000_000_000
STANDBY_MAX_NS = 30_000_000_000
FAR_NS = 1 << 63


class Health:
    """What is known of one path."""

    def __init__(self) -> None:
        self._pace = [0.0, 0.0]
        """Nanoseconds per byte of small and of large requests; 0: not known."""
        self._sampled_ns = [0, 0]
        self._losses: deque[int] = deque(maxlen=LOSSES + 5)
        self.standby_until_ns = 0

    def pace(self, large: bool) -> float:
        return self._pace[large]

    def sampled_ns(self, large: bool) -> int:
        """When an answer came for which the time was taken."""
        return self._sampled_ns[large]

    def sample(self, large: bool, cost_bytes: int, elapsed_ns: int, now_ns: int) -> None:
        """A request took that long, with so much in flight."""
        pace = elapsed_ns / cost_bytes
        old = self._pace[large]
        # What was slow and is not any more is believed at once: it has been asked rarely.
        if old and pace * SLOW > old:
            pace = old + (pace - old) * WEIGHT
        self._pace[large] = pace
        self._sampled_ns[large] = now_ns

    def failed(self, large: bool, now_ns: int) -> None:
        """The answer was an error, which says nothing about the path."""
        self._sampled_ns[large] = now_ns

    def overdue(self, large: bool, cost_bytes: int, elapsed_ns: int) -> bool:
        """A request is not answered yet after so long. Whether that is news."""
        pace = elapsed_ns / cost_bytes
        if self._pace[large] and pace > self._pace[large] * SLOW:
            self._pace[large] = pace
            return True
        return False

    def lost(self, now_ns: int) -> None:
        """The path was up and is lost."""
        self._losses.append(now_ns)

    def up(self, now_ns: int) -> None:
        """The path is up again."""
        while self._losses and self._losses[0] <= now_ns - WINDOW_NS:
            self._losses.popleft()
        surplus = len(self._losses) - LOSSES
        if surplus >= 0:
            self.standby_until_ns = now_ns + min(STANDBY_FIRST_NS << surplus, STANDBY_MAX_NS)


class Carrier(Protocol):
    """What is needed of a connection."""

    bytes_in_flight: int

    @property
    def health(self) -> Health: ...

    def is_measured(self) -> bool:
        """Whether one of its requests is being measured."""
        ...

    def has_room(self) -> bool: ...


C = TypeVar("C", bound=Carrier)


class Ranking(Generic[C]):
    """The connections in the order in which requests of one size take them. True until `until_ns`
    unless something is measured, or a connection comes or goes."""

    def __init__(self, carriers: Sequence[C], large: bool, now_ns: int) -> None:
        self.until_ns = FAR_NS
        self.probe: C | None = None
        """Takes the next request, to be measured."""
        in_service = [c for c in carriers if c.health.standby_until_ns <= now_ns]
        if len(in_service) < len(carriers):
            ends = [c.health.standby_until_ns for c in carriers]
            self.until_ns = min(e for e in ends if e > now_ns)
        paces = [(c, c.health.pace(large)) for c in in_service or carriers]
        best = min((pace for _, pace in paces if pace), default=0.0)
        fast, slow = [], []
        for carrier, pace in paces:
            if pace > best * SLOW:
                slow.append((carrier, pace / best))
                self._ask_again(carrier, large, now_ns)
            else:
                fast.append((carrier, 1.0))
                if best and not pace:
                    self._ask_again(carrier, large, now_ns)
        self._order: list[tuple[C, float]] = fast + sorted(slow, key=lambda pair: pair[1])

    def _ask_again(self, carrier: C, large: bool, now_ns: int) -> None:
        due_ns = carrier.health.sampled_ns(large) + PROBE_NS
        if now_ns < due_ns:
            self.until_ns = min(self.until_ns, due_ns)
        elif not carrier.is_measured() and self.probe is None:
            self.probe = carrier

    def first(self) -> C:
        """The one that takes small requests."""
        return self._order[0][0]

    def choose(self, length_bytes: int) -> C | None:
        """The one that will be done with the request first. None: that one has no room yet."""
        if self.probe is not None and self.probe.has_room():
            return self.probe
        own = length_bytes + HEADER_COST_BYTES
        best = roomy = None
        best_cost = roomy_cost = 0.0
        for rank, (carrier, slowness) in enumerate(self._order):
            cost = (carrier.bytes_in_flight + own) * slowness + rank * SPREAD_BYTES
            if best is None or cost < best_cost:
                best, best_cost = carrier, cost
            candidate = slowness == 1.0 or best is carrier
            if candidate and carrier.has_room() and (roomy is None or cost < roomy_cost):
                roomy, roomy_cost = carrier, cost
        return roomy
