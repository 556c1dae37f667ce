"""The methods of fencectl: `fence.*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from cluster.control_io import Handler
from cluster.errors import NotFoundError, RefusedError, StackError, UsageError
from cluster.events import EventName
from cluster.state import WHOLE_NODE, HoldNode, NodeInfo, member_of
from fencing.agent_io import Agent
from fencing.records import FenceRecord, key_of
from fencing.reservations import ReservationType
from gnbd.control.client_io import Control
from node.clusterd_io import Clusterd
from node.fencer_io import CLEAN, Fencing
from node.status import fence_rows

REASON_MAX = 200
WAIT_S_MAX = 600.0


class FenceAdmin:
    """The methods `fence.*` of one clusterd."""

    def __init__(self, daemon: Clusterd, fencing: Fencing) -> None:
        self._daemon = daemon
        self._fencing = fencing

    def handlers(self) -> Mapping[str, Handler]:
        """The methods of fencectl."""
        return {
            "fence.status": self._status,
            "fence.history": self._history,
            "fence.explain": self._explain,
            "fence.keys": self._keys,
            "fence.fence": self._fence,
            "fence.unfence": self._unfence,
            "fence.confirm": self._confirm,
        }

    async def _status(self, _params: dict[str, Any]) -> dict[str, Any]:
        daemon, fencing = self._daemon, self._fencing
        names = {node.id: node.name for node in daemon.state.nodes}
        return {
            "epoch": daemon.view.epoch,
            "installed": list(daemon.view.installed),
            "missing": [s.name for s in daemon.state.servers if s.id not in daemon.view.installed],
            "held": [names.get(node, str(node)) for node in daemon.state.held],
            "levels": fencing.settings().levels,
            "under_way": [one.name for one in fencing.book.open() if fencing.is_recent(one)],
            "last": fence_rows(daemon.state, 1),
        }

    async def _history(self, _params: dict[str, Any]) -> list[dict[str, Any]]:
        """The entries of the register, with what is known here of the methods; before them what
        the register has forgotten."""
        rows = fence_rows(self._daemon.state, len(self._daemon.state.fences) or 1)
        whole = {(row["node"], row["incarnation"]) for row in rows if row["instance"] is None}
        older = [
            {
                "epoch": record.epoch, "node": record.node, "name": record.name,
                "incarnation": record.incarnation, "instance": None, "reason": record.reason,
            }
            for record in self._fencing.book.records()
            if key_of(record) not in whole
        ]  # fmt: skip
        found = sorted([*older, *rows], key=lambda row: int(row["epoch"]))
        for row in found:
            record = self._fencing.book.find((row["node"], row["incarnation"]))
            known = record is not None and row["instance"] is None
            row["verdict"] = record.verdict if known and record is not None else ""
            row["level"] = record.level if known and record is not None else 0
        return found

    async def _explain(self, params: dict[str, Any]) -> dict[str, Any]:
        info = self._find(str(params["name"]))
        record = self._fencing.book.newest(info.id)
        if record is None:
            raise NotFoundError(
                f"no fence of {info.name} is remembered here", hint="see: fencectl history"
            )
        member = member_of(self._daemon.view.members, info.id)
        return {
            **msgspec.to_builtins(record),
            "held": info.id in self._daemon.state.held,
            "now": None if member is None else member.incarnation,
        }

    async def _keys(self, params: dict[str, Any]) -> list[dict[str, Any]]:
        """Registrations and reservation of every export of every server."""
        wanted = str(params.get("export", ""))
        rows: list[dict[str, Any]] = []

        async def ask(control: Control) -> list[dict[str, Any]]:
            found = []
            for export in await control.exports():
                if wanted in ("", export.name) and export.access == "cluster":
                    report = await control.persistent_reserve_in(export.name)
                    table = msgspec.to_builtins(report)
                    del table["t"]
                    table["called"] = ReservationType(report.type).name.replace("_", " ").lower()
                    found.append({"export": export.name, **table})
            return found

        for server in self._daemon.state.servers:
            try:
                tables = await self._daemon.servers.ask(server.id, ask, "about reservations")
            except StackError as error:
                rows.append({"server": server.name, "problem": error.message})
                continue
            rows += [{"server": server.name, "problem": "", **table} for table in tables]
        if wanted and not any("export" in row or row["problem"] for row in rows):
            raise NotFoundError(f"no server has an export {wanted}", hint="see: fencectl keys")
        return rows

    async def _fence(self, params: dict[str, Any]) -> dict[str, Any]:
        """Out, and held out. Waits for the verdict on its last life, whoever put that out; without
        one in time it is empty. `life` None: it has no life that would have to be proven over."""
        daemon, info = self._daemon, self._find(str(params["name"]))
        if info.id == daemon.me:
            raise RefusedError(f"this is {info.name} itself", hint="ask another node to fence it")
        text = str(params.get("reason", "")).strip()[:REASON_MAX]
        reason = f"operator on {daemon.config.node.name}" + (f": {text}" if text else "")
        state = await daemon.command(HoldNode(info.id, hold=True, reason=reason))
        out = [f for f in state.fences if f.node == info.id and f.number == WHOLE_NODE]
        last = out[-1] if out and out[-1].reason != CLEAN else None
        answer: dict[str, Any] = {"name": info.name, "life": None, "verdict": "", "record": None}
        if last is None:
            return answer
        answer["life"] = last.incarnation
        with trio.move_on_after(min(float(params.get("wait_s", 60.0)), WAIT_S_MAX)):
            while (record := self._verdict_of(info, last.incarnation)) is None:
                await daemon.wait_changed()
            answer |= {"verdict": record.verdict, "record": msgspec.to_builtins(record)}
        return answer

    def _verdict_of(self, info: NodeInfo, incarnation: int) -> FenceRecord | None:
        record = self._fencing.book.newest(info.id)
        done = record is not None and record.incarnation >= incarnation and record.verdict
        return record if done else None

    async def _unfence(self, params: dict[str, Any]) -> dict[str, Any]:
        """It may come back; agents that switched it off switch it on."""
        daemon, info = self._daemon, self._find(str(params["name"]))
        held = info.id in (await daemon.read_state()).held
        await daemon.command(HoldNode(info.id, hold=False))
        config, switched = self._fencing.settings(), {}
        for name in dict.fromkeys(name for level in config.levels for name in level):
            method = config.method(name)
            if held and method.kind == "agent":
                try:
                    switched[name] = await Agent(method).unfence(info.name)
                except StackError as error:
                    switched[name] = error.message
        daemon.note(EventName.NOTE, f"{info.name} may come back", victim=int(info.id))
        return {"name": info.name, "was_held": held, "switched": switched}

    async def _confirm(self, params: dict[str, Any]) -> dict[str, Any]:
        """The operator says that a node is off, and has typed its name."""
        info = self._find(str(params["name"]))
        if str(params.get("typed", "")) != info.name:
            raise UsageError(
                f"the name that was typed is not {info.name}", hint=f"type {info.name}"
            )
        self._fencing.methods.confirm(info)
        return {"name": info.name}

    def _find(self, name: str) -> NodeInfo:
        for info in self._daemon.state.nodes:
            if name in (info.name, str(info.id)):
                return info
        raise NotFoundError(f"no node is called {name}", hint="see: clusterctl nodes")
