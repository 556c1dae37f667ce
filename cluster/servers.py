"""Installing the view on every block server, and knowing which servers have it (rules R2, R3).

Every member node installs on every server by itself: a coordinator that dies leaves nothing undone.
An install is repeated until it is answered, and afterwards as the sign of life that a server needs.
A server is *reached* while it answered within T_dead; one that does not is *away* and holds nothing
up: whoever uses data there waits for it (rule R3 is enforced in the client).
"""

from __future__ import annotations

from cluster.actions import Action, Send
from cluster.control import Timing
from cluster.ids import Epoch, Incarnation, NodeId, ServerId
from cluster.messages import Install, Installed
from cluster.state import ClusterState
from cluster.timing import MS

ALIVE_DIVISOR = 4
RETRY_DIVISOR = 4


class ServerRecord:
    """One block server."""

    def __init__(self, now_ns: int) -> None:
        self.since_ns = now_ns
        self.answered_ns: int | None = None
        self.installed = Epoch(-1)
        self.next_ns = now_ns


class Servers:
    """See the module."""

    def __init__(self, me: NodeId, incarnation: Incarnation, timing: Timing) -> None:
        self._me = me
        self._incarnation = incarnation
        self._dead_ns = timing.dead_ms * MS
        self._retry_ns = timing.phase_ms * MS // RETRY_DIVISOR
        self._alive_ns = timing.dead_ms * MS // ALIVE_DIVISOR
        self._records: dict[int, ServerRecord] = {}
        self._serial = 0

    def configure(self, now_ns: int, state: ClusterState) -> None:
        """A newer value: new servers, a new epoch to install."""
        wanted = [int(server.id) for server in state.servers]
        for server in list(self._records):
            if server not in wanted:
                del self._records[server]
        for server in wanted:
            record = self._records.setdefault(server, ServerRecord(now_ns))
            if record.installed < state.epoch:
                record.next_ns = now_ns

    def up(self, now_ns: int, server: int) -> None:
        """Its session came up: install at once (it may have restarted and serves nobody)."""
        record = self._records.get(server)
        if record is not None:
            record.next_ns = now_ns

    def down(self, server: int) -> None:
        """Its session closed: away until it answers again."""
        record = self._records.get(server)
        if record is not None:
            record.answered_ns = None
            record.since_ns = -self._dead_ns

    def answered(self, now_ns: int, server: int, message: Installed, epoch: Epoch) -> bool:
        """An answer to an install. True if the server knows a newer epoch than we (`epoch`)."""
        record = self._records.get(server)
        if record is None:
            return False
        record.answered_ns = now_ns
        if message.epoch > epoch:
            return True
        if not message.reason:
            # Also if it was asked again meanwhile: a slow server must be believed some time.
            record.installed = max(record.installed, message.epoch)
            if message.epoch == epoch:
                record.next_ns = now_ns + self._alive_ns
        return False

    def due(self, now_ns: int, state: ClusterState) -> list[Action]:
        """The installs to send now."""
        actions: list[Action] = []
        for server, record in sorted(self._records.items()):
            if now_ns < record.next_ns:
                continue
            self._serial += 1
            record.next_ns = now_ns + self._retry_ns
            install = Install(
                request=self._serial, sender=self._me, incarnation=self._incarnation,
                epoch=state.epoch, members=state.members, tombstones=state.tombstones,
                dead_ms=self._dead_ns // MS,
            )  # fmt: skip
            actions.append(Send(server, install))
        return actions

    def installed(self, epoch: Epoch) -> list[ServerId]:
        """Servers known to have installed this epoch."""
        return [
            ServerId(s) for s, record in sorted(self._records.items()) if record.installed == epoch
        ]

    def reached(self, now_ns: int) -> list[ServerId]:
        """Servers that answered within T_dead."""
        return [
            ServerId(server)
            for server, record in sorted(self._records.items())
            if record.answered_ns is not None and now_ns - record.answered_ns < self._dead_ns
        ]

    def settled(self, now_ns: int, epoch: Epoch) -> bool:
        """Every server has installed `epoch`, or is away."""
        reached = self.reached(now_ns)
        for server, record in self._records.items():
            fresh = now_ns - record.since_ns < self._dead_ns
            if record.installed != epoch and (fresh or server in reached):
                return False
        return True

    def deadline(self) -> int | None:
        """When the next install is due."""
        return min((record.next_ns for record in self._records.values()), default=None)
