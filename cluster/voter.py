"""The echo half of a voter that is not a node: what a gnbd-server with a vote runs (rule R8).

`VoterEcho` answers heartbeats; `register.Acceptor` beside it gets its `Vouched` answers from it.
"""

from __future__ import annotations

from cluster.control import Timing
from cluster.guard_events import Vouch, Vouched
from cluster.messages import Echo, Heartbeat


class VoterEcho:
    """`me` is the server's id; `start_ns` the start of this process on CLOCK_BOOTTIME."""

    def __init__(self, me: int, timing: Timing, start_ns: int) -> None:
        raise NotImplementedError

    def vouch(self, now_ns: int, vouch: Vouch) -> Vouched:
        """The acceptor accepted a value: stop echoing whom it bars, tell the ages."""
        raise NotImplementedError

    def heartbeat(self, now_ns: int, heartbeat: Heartbeat) -> Echo:
        """The answer to an authenticated heartbeat, to be sent back on the same network."""
        raise NotImplementedError
