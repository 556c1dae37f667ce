"""clusterguard's core: heartbeats, echoes, failure detection, leases, vouching. See GuardCore."""

from __future__ import annotations

from cluster.actions import Action, Tick
from cluster.control import Timing
from cluster.guard_events import (
    ClusterdDied,
    Facts,
    Heard,
    LocalPurged,
    Progress,
    Vouch,
)
from cluster.ids import Incarnation, NodeId

GuardEvent = Tick | Facts | Vouch | Heard | Progress | LocalPurged | ClusterdDied


class GuardCore:
    """Actions: `Datagram`; `Notify` of LeaseEnd, Sighting, Vouched. Built once per life of the
    guard; `start_ns` is now. Sends nothing before the first `Facts`, vouches for nobody before the
    first `Vouch`."""

    def __init__(
        self, me: NodeId, incarnation: Incarnation, timing: Timing, start_ns: int,
        networks: int = 2,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def step(self, now_ns: int, event: GuardEvent) -> list[Action]:
        raise NotImplementedError

    def deadline(self) -> int | None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError
