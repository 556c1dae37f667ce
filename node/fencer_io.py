"""Putting nodes out on behalf of the cluster: who tries the methods, what is remembered.

The register decides who is out (`cluster.state`), and the installs on the block servers are what
the data rests on (rules R2 to R4): recovery waits for them and for nothing here. What is done here
comes on top: the lowest member tries the site's levels of methods (`fencing.toml`) for each life
that was put out, and tells all members how it went. If that member dies too, the next one begins
again; methods can be repeated.
"""

from __future__ import annotations

import time
from typing import Any

import msgspec
import trio

from cluster.errors import ConfigError, CorruptionError, ProtocolError
from cluster.events import EventName
from cluster.ids import Epoch, Instance, InstanceNo
from cluster.messages import FenceReport, encode_message
from cluster.paths_io import boottime_ns
from cluster.state import WHOLE_NODE
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
from fencing.run_io import carry_out
from fencing.settings import FencingConfig
from node.clusterd_io import Clusterd
from node.fence_methods_io import Methods

CLEAN = "left"
"""The reason of a clean leave: there is nothing to fence."""


class Fencing:
    """The fence methods of one clusterd and its history."""

    def __init__(self, daemon: Clusterd) -> None:
        self._daemon = daemon
        self._since: Epoch | None = None
        """The view that admitted this life: what was put out before is not ours to fence."""
        self._running: set[Key] = set()
        self._unsaved = False
        self.methods = Methods(daemon)
        try:
            self.book = daemon.files.fences()
        except (CorruptionError, ProtocolError, OSError) as error:
            daemon.problem("fences", f"{error}; the history of fences begins anew")
            self.book = FenceBook()
        daemon.on_fence_report = self._reported

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

    def settings(self) -> FencingConfig:
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
            if key_of(record) not in self._running and self.is_recent(record):
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
        config = self.settings()
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
        config = self.settings()
        fencer = Fencer(config.plan(), config.rounds, config.pause_ms)
        try:
            done = await carry_out(fencer, self.methods.of(config, record))
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
        self._daemon.note(name, f"{text}: {last}", victim=int(record.node), took_ms=record.took_ms)
        self._changed()

    def _changed(self) -> None:
        self._unsaved = True
        self._daemon.signal()

    def is_recent(self, record: FenceRecord) -> bool:
        """Whether it was put out since this life was admitted."""
        return self._since is not None and record.epoch >= self._since
