"""What the detector knows of one peer: its links, its newest heartbeat, whether it lives.

A link is up while something is heard on it within link_down; it comes back only after a hold-down
that doubles with every flap (0, 1, 2, 4 .. 60 s) and is forgiven after a quiet minute. The
hold-down concerns the choice of paths and events only: any packet on any link keeps a peer alive.
"""

from __future__ import annotations

from cluster.control import Timing
from cluster.messages import Heartbeat
from cluster.timing import MS

SECOND_NS = 1000 * MS
HOLD_NS_MAX = 60 * SECOND_NS


class Link:
    """One network to one peer."""

    def __init__(self) -> None:
        self.up = False
        self.heard_ns: int | None = None
        self.echo_ns: int | None = None
        self._flaps = 0
        self._hold_ns = 0
        self._down_ns = 0

    def update(self, now_ns: int, link_down_ns: int) -> bool:
        """Recompute `up`; True if it changed."""
        fresh = self.heard_ns is not None and now_ns - self.heard_ns < link_down_ns
        if self.up and not fresh:
            self.up = False
            if now_ns - self._down_ns > HOLD_NS_MAX:
                self._flaps = 0
            hold_ns = min(HOLD_NS_MAX, SECOND_NS << min(self._flaps - 1, 6)) if self._flaps else 0
            self._flaps += 1
            self._down_ns = now_ns
            self._hold_ns = now_ns + hold_ns
            return True
        if not self.up and fresh and now_ns >= self._hold_ns:
            self.up = True
            return True
        return False


class PeerRecord:
    """One node in one life."""

    def __init__(self, incarnation: int, networks: int) -> None:
        self.incarnation = incarnation
        self.links = [Link() for _ in range(networks)]
        self.newest: Heartbeat | None = None
        self.announced_dead = False

    def heard(self, now_ns: int, network: int, heartbeat: Heartbeat) -> None:
        """A heartbeat of this life."""
        self.links[network].heard_ns = now_ns
        if self.newest is None or heartbeat.sequence > self.newest.sequence:
            self.newest = heartbeat
        self.announced_dead = self.announced_dead or heartbeat.clusterd_dead

    def echoed(self, network: int, sent_ns: int) -> None:
        """It echoed our heartbeat that was sent at `sent_ns`: it hears us."""
        link = self.links[network]
        link.echo_ns = max(link.echo_ns or 0, sent_ns)

    def extend(self, late_ns: int) -> None:
        """We ourselves were late by so much: that is not the peer's fault."""
        for link in self.links:
            if link.heard_ns is not None:
                link.heard_ns += late_ns
            if link.echo_ns is not None:
                link.echo_ns += late_ns

    def is_heard(self, now_ns: int, timing: Timing) -> bool:
        """We hear it on some network."""
        return self._within(now_ns, timing, [link.heard_ns for link in self.links])

    def is_alive(self, now_ns: int, timing: Timing) -> bool:
        """We hear it and it hears us, each on some network, and nobody announced its death."""
        return (
            not self.announced_dead
            and self.is_heard(now_ns, timing)
            and self._within(now_ns, timing, [link.echo_ns for link in self.links])
        )

    def expires_ns(self, timing: Timing) -> int | None:
        """When it stops being alive if nothing more comes."""
        heard = [link.heard_ns for link in self.links if link.heard_ns is not None]
        echoed = [link.echo_ns for link in self.links if link.echo_ns is not None]
        if not heard or not echoed:
            return None
        return min(max(heard), max(echoed)) + timing.dead_ms * MS

    @staticmethod
    def _within(now_ns: int, timing: Timing, times: list[int | None]) -> bool:
        return any(time is not None and now_ns - time < timing.dead_ms * MS for time in times)
