"""Putting nodes out on behalf of the cluster: who tries the methods, what is remembered, fencectl.

The register decides who is out (`cluster.state`), and the installs on the block servers are what
the data rests on (rules R2 to R4): recovery waits for them and for nothing here. What is done here
comes on top: the lowest member tries the site's levels of methods (`fencing.toml`) for each life
that was put out, and tells all members how it went. If that member dies too, the next one begins
again; methods can be repeated.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from cluster.control_io import Handler
from cluster.errors import (
    ConfigError,
    CorruptionError,
    NotFoundError,
    ProtocolError,
    RefusedError,
    StackError,
    UsageError,
)
from cluster.events import EventName
from cluster.ids import Epoch, Instance, InstanceNo
from cluster.messages import FenceReport, encode_message
from cluster.paths_io import boottime_ns
from cluster.state import WHOLE_NODE, HoldNode, NodeInfo, member_of
from fencing.agent_io import Agent
from fencing.block_pr_io import register_on_disks
from fencing.methods import Fencer, Verdict
from fencing.records import (
    FenceBook,
    FenceRecord,
    Key,
    decode_record_untrusted,
    key_of,
    record_of,
)
from fencing.reservations import ReservationType
from fencing.run_io import carry_out
from fencing.settings import FencingConfig
from gnbd.control_client_io import Control
from node.clusterd_io import Clusterd
from node.fence_methods_io import Methods
from node.status import fence_rows

REASON_MAX = 200
WAIT_S_MAX = 600.0
CLEAN = "left"
"""The reason of a clean leave: there is nothing to fence."""


class Fencing:
    """The fence methods of one clusterd, its history, and the methods `fence.*`."""

    def __init__(self, daemon: Clusterd) -> None:
        self._daemon = daemon
        self._since: Epoch | None = None
        """The view that admitted this life: what was put out before is not ours to fence."""
        self._running: set[Key] = set()
        self._unsaved = False
        self._methods = Methods(daemon)
        try:
            self.book = daemon.files.fences()
        except (CorruptionError, ProtocolError, OSError) as error:
            daemon.problem("fences", f"{error}; the history of fences begins anew")
            self.book = FenceBook()
        daemon.on_fence_report = self._reported

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

    # --- life

    async def run(self) -> None:
        """Watch who is put out, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._save_loop)
            while True:
                self._look(nursery)
                await self._daemon.wait_changed()

    async def _save_loop(self) -> None:
        """Keep the history on disk. Nobody waits for that: it is for people."""
        while True:
            while not self._unsaved:
                await self._daemon.wait_changed()
            self._unsaved = False
            await self._daemon.store("fences file", self._daemon.files.save_fences, self.book)

    def _settings(self) -> FencingConfig:
        """fencing.toml as it is now; while it is wrong, the block servers alone."""
        try:
            config = self._daemon.files.fencing()
        except ConfigError as error:
            self._daemon.problem("fencing.toml", error.message)
            return FencingConfig()
        self._daemon.problem("fencing.toml", "")
        return config

    def _look(self, nursery: trio.Nursery) -> None:
        daemon = self._daemon
        name = daemon.config.node.name
        held = daemon.me in daemon.state.held
        text = f"an operator holds {name} out of the cluster until: fencectl unfence {name}"
        daemon.problem("held", text if held else "")
        if not daemon.admitted:
            return
        if self._since is None:
            self._since = daemon.view.epoch
            nursery.start_soon(self._register_disks)
        for fence in daemon.state.fences:
            key = (fence.node, fence.incarnation)
            ours = fence.epoch >= self._since and fence.number == WHOLE_NODE
            if ours and fence.reason != CLEAN and self.book.find(key) is None:
                seen = self._seen(key)
                wall_ms = time.time_ns() // 1_000_000
                self.book.put(record_of(daemon.state, fence, wall_ms, name, **seen))
                self._changed()
        if min(member.node for member in daemon.view.members) != daemon.me:
            return
        for record in self.book.open():
            if key_of(record) not in self._running and record.epoch >= self._since:
                self._running.add(key_of(record))
                nursery.start_soon(self._try, record)

    def _seen(self, key: Key) -> dict[str, Any]:
        """What this node sees of a life that is put out."""
        node, incarnation = key
        daemon, now_ns = self._daemon, boottime_ns()
        peers = daemon.sighting.peers if daemon.sighting else []
        alive = any((p.node, p.incarnation, p.alive) == (node, incarnation, True) for p in peers)
        silent_ns = daemon.core.silence.silent_ns(Instance(node, incarnation, InstanceNo(0)))
        lease_ms = None if silent_ns is None else max(0, silent_ns - now_ns) // 1_000_000
        return {"alive": alive, "links": daemon.links.seen(now_ns, node), "lease_ms": lease_ms}

    async def _register_disks(self) -> None:
        """This life's key on the disks of methods of kind reservation: who is not registered
        there cannot put anybody out."""
        config = self._settings()
        daemon = self._daemon
        for name, method in config.methods.items():
            if method.kind == "reservation":
                me = (daemon.me, daemon.incarnation)
                wrong = await trio.to_thread.run_sync(
                    register_on_disks, method.devices, me, abandon_on_cancel=True
                )
                daemon.problem(f"fence method {name}", wrong and f"fence method {name}: {wrong}")

    async def _try(self, record: FenceRecord) -> None:
        """All levels, then everybody hears how it went."""
        daemon, key, began_ns = self._daemon, key_of(record), boottime_ns()
        config = self._settings()
        fencer = Fencer(config.plan(), config.rounds, config.pause_ms)
        try:
            done = await carry_out(fencer, self._methods.of(config, record))
        finally:
            self._running.discard(key)
        current = self.book.find(key) or record
        record = msgspec.structs.replace(
            current, tried_by=daemon.config.node.name, attempts=fencer.history,
            verdict=str(done.verdict), level=done.level,
            took_ms=(boottime_ns() - began_ns) // 1_000_000,
        )  # fmt: skip
        self.book.put(record)
        self._told(record)
        report = encode_message(FenceReport(msgspec.msgpack.encode(record)))
        for info in daemon.state.nodes:
            if info.id != daemon.me:
                daemon.transport.send(info.id, report)

    def _reported(self, report: FenceReport) -> None:
        try:
            record = decode_record_untrusted(report.record)
        except ProtocolError:
            return
        if record.verdict and self.book.reported(record):
            self._told(record)

    def _told(self, record: FenceRecord) -> None:
        good = record.verdict == Verdict.PROVEN
        life = f"{record.name} life {record.incarnation}"
        text = f"{life} is fenced, level {record.level}" if good else f"{life} could not be fenced"
        last = record.attempts[-1].text if record.attempts else ""
        name = EventName.FENCED if good else EventName.FENCE_FAILED
        self._daemon.note(
            name, f"{text}: {last}", victim=int(record.node), took_ms=record.took_ms
        )
        self._changed()

    def _changed(self) -> None:
        self._unsaved = True
        self._daemon.signal()

    # --- fencectl

    async def _status(self, _params: dict[str, Any]) -> dict[str, Any]:
        daemon = self._daemon
        names = {node.id: node.name for node in daemon.state.nodes}
        return {
            "epoch": daemon.view.epoch,
            "installed": list(daemon.view.installed),
            "missing": [s.name for s in daemon.state.servers if s.id not in daemon.view.installed],
            "held": [names.get(node, str(node)) for node in daemon.state.held],
            "levels": self._settings().levels,
            "under_way": [record.name for record in self.book.open() if self._recent(record)],
            "last": fence_rows(daemon.state, 1),
        }

    def _recent(self, record: FenceRecord) -> bool:
        return self._since is not None and record.epoch >= self._since

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
            for record in self.book.records()
            if key_of(record) not in whole
        ]  # fmt: skip
        found = sorted([*older, *rows], key=lambda row: int(row["epoch"]))
        for row in found:
            record = self.book.find((row["node"], row["incarnation"]))
            known = record is not None and row["instance"] is None
            row["verdict"] = record.verdict if known and record is not None else ""
            row["level"] = record.level if known and record is not None else 0
        return found

    async def _explain(self, params: dict[str, Any]) -> dict[str, Any]:
        info = self._find(str(params["name"]))
        record = self.book.newest(info.id)
        if record is None:
            raise NotFoundError(
                f"no fence of {info.name} is remembered here", hint="see: fencectl history"
            )
        member = member_of(self._daemon.view.members, info.id)
        return {
            **msgspec.to_builtins(record),
            "here": self._daemon.config.node.name,
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
        record = self.book.newest(info.id)
        done = record is not None and record.incarnation >= incarnation and record.verdict
        return record if done else None

    async def _unfence(self, params: dict[str, Any]) -> dict[str, Any]:
        """It may come back; agents that switched it off switch it on."""
        daemon, info = self._daemon, self._find(str(params["name"]))
        held = info.id in (await daemon.read_state()).held
        await daemon.command(HoldNode(info.id, hold=False))
        config, switched = self._settings(), {}
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
        self._methods.confirm(info)
        return {"name": info.name}

    def _find(self, name: str) -> NodeInfo:
        for info in self._daemon.state.nodes:
            if name in (info.name, str(info.id)):
                return info
        raise NotFoundError(f"no node is called {name}", hint="see: clusterctl nodes")

