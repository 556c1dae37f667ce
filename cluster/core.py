"""clusterd's core: proposer, membership and groups behind one `step`. See ClusterCore."""

from __future__ import annotations

from cluster.actions import Action, Received, Tick
from cluster.control import Timing
from cluster.core_events import (
    Command,
    GroupJoin,
    GroupLeave,
    GroupReleased,
    InstanceEnded,
    InstancesPurged,
    InstanceStarted,
    Leave,
    ReadState,
    ServerDown,
    ServerUp,
)
from cluster.guard_events import Sighting
from cluster.ids import Incarnation, NodeId
from cluster.state import ClusterState

CoreEvent = (
    Tick | Received | Sighting | InstanceStarted | InstanceEnded | InstancesPurged | ServerUp
    | ServerDown | Command | ReadState | Leave | GroupJoin | GroupLeave | GroupReleased
)  # fmt: skip


class ClusterCore:
    """Everything that clusterd decides. Built once per life.

    `known` is the newest value of the register that this node has ever seen (kept in the state
    directory, or from the join token with at least cluster_id, voters, nodes, servers and
    config_epoch right): it says where the voters are, nothing more. Store `StateChanged.state` for
    the next start.

    Actions: `Send` (messages to nodes; register messages to voters, nodes or servers; `Install` to
    servers), `Notify` of StateChanged, Facts (for the guard), Barred, TakeIncarnation,
    GroupDelivery, Report; `Reply`. No Persist. A `Send` to a voter that is this node itself goes to
    the local Acceptor.
    """

    def __init__(
        self, me: NodeId, incarnation: Incarnation, timing: Timing, known: ClusterState,
        start_ns: int,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def step(self, now_ns: int, event: CoreEvent) -> list[Action]:
        raise NotImplementedError

    def deadline(self) -> int | None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError
