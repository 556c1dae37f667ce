"""The echo half of a voter that is not a node: what a gnbd-server with a vote runs (rule R8).

`VoterEcho` answers heartbeats; `register.Acceptor` beside it gets its `Vouched` answers from it.
"""

from __future__ import annotations

from cluster.control import Timing
from cluster.guard_events import Vouch, Vouched
from cluster.lease import VouchBook
from cluster.messages import Echo, Heartbeat
from cluster.timing import MS


class VoterEcho:
    """`me` is the server's id; `start_ns` the start of this process on CLOCK_BOOTTIME."""

    def __init__(self, me: int, timing: Timing, start_ns: int) -> None:
        self.me = me
        self._dead_ns = timing.dead_ms * MS
        self._book = VouchBook(timing, start_ns)
        self._heard: dict[int, tuple[int, int]] = {}

    def vouch(self, now_ns: int, vouch: Vouch) -> Vouched:
        """The acceptor accepted a value: stop echoing whom it bars, tell the ages."""
        return self._book.vouch(now_ns, vouch)

    def heartbeat(self, now_ns: int, heartbeat: Heartbeat) -> Echo:
        """The answer to an authenticated heartbeat, to be sent back on the same network."""
        incarnation, _ = self._heard.get(heartbeat.node, (0, 0))
        if heartbeat.incarnation >= incarnation and not heartbeat.clusterd_dead:
            self._heard[heartbeat.node] = (heartbeat.incarnation, now_ns)
        hears = [
            (node, life)
            for node, (life, heard_ns) in sorted(self._heard.items())
            if now_ns - heard_ns < self._dead_ns
        ]
        return Echo(
            sender=self.me, sequence=heartbeat.sequence, incarnation=heartbeat.incarnation,
            config_epoch=heartbeat.config_epoch, voter=True,
            vouched=self._book.echo(now_ns, heartbeat), hears=hears,
        )  # fmt: skip
