"""The kinds of fence methods (`fencing/settings.py`) as clusterd carries them out."""

from __future__ import annotations

from collections.abc import Callable

import trio

from cluster.errors import NotFoundError
from cluster.state import NodeInfo, member_of
from fencing.agent_io import Agent
from fencing.block_pr_io import fence_disks
from fencing.methods import Outcome, Verdict
from fencing.records import FenceRecord, Key, key_of
from fencing.run_io import Perform
from fencing.settings import TIMEOUT_MS, FencingConfig
from node.clusterd_io import Clusterd

ANSWER_BEFORE = 0.9
"""Share of an attempt's time after which it says what it still waits for."""


class Methods:
    """One attempt of one method. What waits for an operator is kept here."""

    def __init__(self, daemon: Clusterd) -> None:
        self._daemon = daemon
        self._asked: set[Key] = set()
        self._confirmed: set[Key] = set()

    def confirm(self, info: NodeInfo) -> None:
        """The operator's word for every life of a node that waits for it. Raises NotFoundError."""
        waiting = {key for key in self._asked if key[0] == info.id}
        if not waiting:
            raise NotFoundError(
                f"nothing waits here for a confirmation of {info.name}",
                hint="ask on the lowest member, which tries the methods: clusterctl nodes",
            )
        self._confirmed |= waiting
        self._daemon.signal()

    def of(self, config: FencingConfig, record: FenceRecord) -> Perform:
        """What tries the methods of a configuration against one life."""

        async def perform(name: str) -> Outcome:
            method = config.method(name)
            timeout_s = (method.timeout_ms or TIMEOUT_MS[method.kind]) / 1000 * ANSWER_BEFORE
            match method.kind:
                case "servers":
                    return await self._wait(timeout_s, lambda: self._servers(record))
                case "self":
                    return await self._wait(timeout_s, lambda: self._self(record))
                case "manual":
                    return await self._manual(timeout_s, record)
            if (back := self._back(record)) is not None:
                return Outcome(
                    Verdict.FAILED, f"{record.name} is back as life {back}: it is not touched"
                )
            if method.kind == "agent":
                return await Agent(method).fence(record.name)
            me = (self._daemon.me, self._daemon.incarnation)
            return await trio.to_thread.run_sync(
                fence_disks, method.devices, me, key_of(record), abandon_on_cancel=True
            )

        return perform

    async def _wait(self, timeout_s: float, look: Callable[[], Outcome]) -> Outcome:
        """Until it is known; at the end what is known then."""
        outcome = look()
        with trio.move_on_after(timeout_s):
            while outcome.verdict is Verdict.UNKNOWN:
                await self._daemon.wait_changed()
                outcome = look()
        return outcome

    def _servers(self, record: FenceRecord) -> Outcome:
        """Rule R2: a server answers an install when nothing of whom it bars is in flight."""
        state, view = self._daemon.state, self._daemon.view
        if not state.servers:
            return Outcome(Verdict.FAILED, "the cluster has no block server that could bar it")
        missing = [s.name for s in state.servers if s.id not in view.installed]
        if missing or view.epoch < record.epoch:
            who = ", ".join(missing)
            return Outcome(Verdict.UNKNOWN, f"not installed view {view.epoch}: {who}")
        member = member_of(view.members, record.node)
        if member is not None and member.incarnation <= record.incarnation:
            return Outcome(Verdict.FAILED, f"view {view.epoch} admits life {member.incarnation}")
        who = ", ".join(server.name for server in state.servers)
        return Outcome(
            Verdict.PROVEN,
            f"{who} installed view {view.epoch}, which bars life {record.incarnation}, and "
            "drained its requests",
        )

    def _back(self, record: FenceRecord) -> int | None:
        """The later life that the node is known to run."""
        sighting = self._daemon.sighting
        lives = [int(p.incarnation) for p in sighting.peers if p.node == record.node and p.alive] \
            if sighting else []  # fmt: skip
        member = member_of(self._daemon.view.members, record.node)
        if member is not None:
            lives.append(int(member.incarnation))
        later = [life for life in lives if life > record.incarnation]
        return max(later) if later else None

    def _self(self, record: FenceRecord) -> Outcome:
        """A later life begins only after the guard of the earlier one has ended its mounts."""
        back = self._back(record)
        if back is None:
            return Outcome(Verdict.UNKNOWN, f"{record.name} is not heard in a later life")
        return Outcome(
            Verdict.PROVEN,
            f"{record.name} runs life {back}, begun after its guard had ended "
            f"life {record.incarnation}",
        )

    async def _manual(self, timeout_s: float, record: FenceRecord) -> Outcome:
        key = key_of(record)

        def look() -> Outcome:
            if key in self._confirmed:
                return Outcome(Verdict.PROVEN, "an operator has typed its name")
            return Outcome(Verdict.UNKNOWN, f"nobody has typed: fencectl confirm {record.name}")

        self._asked.add(key)
        try:
            return await self._wait(timeout_s, look)
        finally:
            self._asked.discard(key)
            self._confirmed.discard(key)
