"""Looks at the circuits between members of groups, for `node.circuits`.

Members answer the call `dlm.circuits` of their clusterd with `{"unreached": [[instance, count]]}`,
and it answers `instances.circuits` of the others with `[[instance, [[instance, count]]], ...]`. Who
does not know the call, or does not answer in time, has no row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from cluster.errors import StackError
from cluster.ids import Instance, NodeId
from cluster.paths_io import boottime_ns
from node.circuits import Circuits, Row, look_ns
from node.clusterd_io import Clusterd
from node.instances import LocalInstance

ANSWER_PART = 4
"""A member answers within this part of a look; a node within twice as long."""


class CircuitWatch:
    """Puts out the local end of a circuit that stays down, when it is the one to go."""

    def __init__(self, daemon: Clusterd) -> None:
        self._daemon = daemon
        self._circuits = Circuits(daemon.timing)
        self._look_s = look_ns(daemon.timing) / 1e9
        daemon.transport.methods["instances.circuits"] = self._asked

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await self._look()
            await trio.sleep(self._look_s)

    def _works(self) -> bool:
        return self._daemon.admitted and self._daemon.view.quorate

    async def _look(self) -> None:
        daemon = self._daemon
        begun_ns = boottime_ns()
        mine = await self._rows()
        rows = dict(mine)
        missed = {peer.node for row in mine.values() for peer in row} - {daemon.me}

        async def ask(node: NodeId) -> None:
            rows.update(await self._ask(node))

        async with trio.open_nursery() as nursery:
            for member in daemon.view.members:
                if member.node in missed:
                    nursery.start_soon(ask, member.node)
        doomed = self._circuits.look(begun_ns, boottime_ns(), self._works(), mine, rows)
        for local in daemon.instances.live():
            peer = doomed.get(daemon.instance(local.number))
            if peer is not None:
                daemon.put_out(local, f"no circuit leads to {peer}, although both are heard")

    async def _rows(self) -> dict[Instance, Row]:
        """The rows of the members that run here."""
        rows: dict[Instance, Row] = {}

        async def ask(local: LocalInstance) -> None:
            with contextlib.suppress(StackError, msgspec.ValidationError, KeyError, TypeError):
                with trio.move_on_after(self._look_s / ANSWER_PART):
                    answer = await local.session.call("dlm.circuits", {})
                    row = msgspec.convert(answer["unreached"], list[tuple[Instance, int]])
                    rows[self._daemon.instance(local.number)] = dict(row)

        async with trio.open_nursery() as nursery:
            for local in self._daemon.instances.live():
                if local.groups and not local.leaving:
                    nursery.start_soon(ask, local)
        return rows

    async def _asked(self, _source: NodeId, _params: Mapping[str, Any]) -> Any:
        return [[one, sorted(row.items())] for one, row in (await self._rows()).items()]

    async def _ask(self, node: NodeId) -> dict[Instance, Row]:
        wait_s = 2 * self._look_s / ANSWER_PART
        with contextlib.suppress(StackError, msgspec.ValidationError):
            answer = await self._daemon.transport.call(node, "instances.circuits", {}, wait_s)
            found = msgspec.convert(answer, list[tuple[Instance, list[tuple[Instance, int]]]])
            return {one: dict(row) for one, row in found if one.node == node}
        return {}
