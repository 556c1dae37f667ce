"""Steps of the demonstration: power cuts of a node and of a storage host, the pause of a node."""

from __future__ import annotations

import itertools
import json
import subprocess
import threading
import time
from typing import Any

import msgspec

from cluster.errors import StackError
from lab import cluster, hosts, stale
from lab.demo_work import PROGRAM, WORK, Results, program
from lab.report import Reporter
from lab.topology import Host, Lab

WARM_RECORDS = 20
STALL_LIMIT_S = 60.0


class Writer:
    """A program on a node that reports what is durable; its reports are read here, so they outlive
    the node."""

    def __init__(self, lab: Lab, node: Host, verb: str, path: str, *options: str) -> None:
        self.node = node
        self.path = path
        self.times: list[float] = []
        self.errors: list[str] = []
        argv = [*PROGRAM, verb, path, "--writer", str(node.index), *options]
        self.process = hosts.popen(lab, node, *argv, stdout=subprocess.PIPE)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{") and line.endswith("}\n"):
                self.times.append(json.loads(line)["at"])
            else:
                self.errors.append(line)

    @property
    def last_index(self) -> int:
        """The last record whose fsync is known to have returned."""
        return len(self.times) - 1

    def wait_beyond(self, moment: float, records: int) -> None:
        """Wait until so many records were acknowledged after a moment."""

        def enough() -> bool:
            if self.process.poll() is not None:
                raise StackError(f"the writer of {self.node.name} ended: {''.join(self.errors)}")
            return sum(1 for t in self.times[-records:] if t > moment) >= records

        hosts.wait_for(enough, STALL_LIMIT_S, f"{self.node.name} writes on")

    def gap_around(self, moment: float) -> tuple[float, float]:
        """The two neighbouring acknowledgements farthest apart from the moment on."""
        first = max((i for i, t in enumerate(self.times) if t <= moment), default=0)
        pairs = itertools.pairwise(self.times[first:])
        return max(pairs, key=lambda pair: pair[1] - pair[0], default=(moment, moment))

    def stall_around(self, moment: float) -> float:
        """The longest time between two acknowledged records from the moment on, seconds."""
        before, after = self.gap_around(moment)
        return after - before

    def finish(self) -> None:
        """Let it end in its own time. Raises StackError when it complains."""
        self.process.terminate()
        self.process.wait(STALL_LIMIT_S)
        self._thread.join()
        if self.process.returncode or self.errors:
            raise StackError(f"the writer of {self.node.name} failed: {''.join(self.errors)}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self._thread.join()


class CutResult(msgspec.Struct):
    """What a power cut cost."""

    stall_s: float
    stalls: dict[str, float]
    acknowledged: int
    timeline: list[list[str]]


def start_writers(lab: Lab, name: str) -> list[Writer]:
    """A writer on each node, all of them warm; they share one file besides their own."""
    shared = f"{WORK}/{name}-shared"
    writers = [
        Writer(lab, node, "sync-writer", f"{WORK}/{name}-{node.name}", "--shared", shared)
        for node in lab.nodes
    ]
    for writer in writers:
        writer.wait_beyond(0.0, WARM_RECORDS)
    return writers


def check_writers(lab: Lab, reader: Host, writers: list[Writer]) -> None:
    """Every record whose fsync had returned is read back on another node."""
    for writer in writers:
        program(
            lab,
            reader,
            "check-sync",
            writer.path,
            "--writer",
            str(writer.node.index),
            "--last",
            str(writer.last_index),
        )


def cut_node(lab: Lab, victim: Host, name: str) -> CutResult:
    """Power cut of a node while all nodes write; what it cost."""
    writers = start_writers(lab, name)
    try:
        moment = time.monotonic()
        cluster.power_cut(lab, victim)
        survivors = [w for w in writers if w.node != victim]
        wait_recovered(lab, survivors[0].node, moment)
        recovered = time.monotonic()
        for writer in survivors:
            writer.wait_beyond(recovered, WARM_RECORDS)
    finally:
        for writer in writers:
            writer.stop()
    stalls = {w.node.name: round(w.stall_around(moment), 3) for w in survivors}
    dead = next(w for w in writers if w.node == victim)
    check_writers(lab, survivors[0].node, writers)
    rows = timeline(lab, survivors[0].node, survivors, moment)
    return CutResult(max(stalls.values()), stalls, dead.last_index + 1, rows)


def events_since(lab: Lab, node: Host, moment: float) -> list[tuple[float, dict[str, Any]]]:
    """The events of a node since a moment, each with the milliseconds after it."""
    output = hosts.run(lab, node, "clusterctl", "events", "--json", check=False).stdout
    events = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    after = [(event["at_ns"] / 1e6 - moment * 1e3, event) for event in events]
    return [(ms, event) for ms, event in after if ms >= 0]


def wait_recovered(lab: Lab, node: Host, moment: float) -> None:
    """Wait until a survivor has seen the journal of a dead mount replayed."""
    hosts.wait_for(
        lambda: any(e["event"] == "group.released" for _, e in events_since(lab, node, moment)),
        STALL_LIMIT_S,
        "the journal of the dead node is replayed",
    )


def timeline(lab: Lab, node: Host, survivors: list[Writer], moment: float) -> list[list[str]]:
    """What a survivor saw since the cut: [milliseconds after it, event, details]."""
    rows = [(ms, e["event"], e.get("text", "")) for ms, e in events_since(lab, node, moment)]
    for writer in survivors:
        before, after = writer.gap_around(moment)
        name = writer.node.name
        rows.append(((before - moment) * 1e3, "last I/O", f"{name}: last fsync before its stall"))
        rows.append(((after - moment) * 1e3, "first I/O", f"{name}: first fsync after its stall"))
    return [[f"{ms:.0f}", name, text[:100]] for ms, name, text in sorted(rows)]


def _node_cut(lab: Lab, report: Reporter) -> Results:
    victim = lab.nodes[1]
    report.say(f"all nodes write and fsync; power cut of {victim.name}")
    result = cut_node(lab, victim, "cut")
    report.table("n1 after the power cut of n2", ["ms", "event", "details"], result.timeline)
    report.say(f"{result.acknowledged} records that {victim.name} had fsynced: all read on n1")
    report.say(f"{victim.name} boots, rejoins, mounts")
    begin = time.monotonic()
    cluster.start(lab, victim)
    back = time.monotonic() - begin
    path = f"{WORK}/cut-{victim.name}"
    program(
        lab,
        victim,
        "check-sync",
        path,
        "--writer",
        str(victim.index),
        "--last",
        str(result.acknowledged - 1),
    )
    return [
        ("power cut of n2: longest stall of the survivors", f"{result.stall_s:.2f} s, no error"),
        ("records that n2 had fsynced, read on n1", f"{result.acknowledged}, none lost"),
        ("n2 boots, rejoins, mounts, sees everything", f"{back:.1f} s"),
    ]


def _server_cut(lab: Lab, report: Reporter) -> Results:
    server = lab.servers[0]
    report.say(f"all nodes write and fsync; power cut of {server.name}: a freeze")
    writers = start_writers(lab, "server-cut")
    try:
        moment = time.monotonic()
        cluster.power_cut(lab, server)
        hosts.wait_for(
            lambda: all(time.monotonic() - w.times[-1] > 1.0 for w in writers),
            STALL_LIMIT_S,
            "every writer is frozen",
        )
        report.say(f"{server.name} boots again")
        cluster.start(lab, server)
        back = time.monotonic()
        for writer in writers:
            writer.wait_beyond(back, WARM_RECORDS)
    finally:
        for writer in writers:
            writer.stop()
    for writer in writers:
        if writer.errors:
            raise StackError(f"{writer.node.name} saw an error: {writer.errors[0]}")
    for node in lab.nodes:
        check_writers(lab, node, writers)
    freeze = max(w.stall_around(moment) for w in writers)
    total = sum(w.last_index + 1 for w in writers)
    return [
        ("power cut and return of s1", f"frozen for {freeze:.1f} s, no error"),
        ("records fsynced around it, read on every node", f"{total}, none lost"),
    ]


def power_cuts(lab: Lab, report: Reporter) -> Results:
    """A node, then a storage host."""
    return [*_node_cut(lab, report), *_server_cut(lab, report)]


def pause_node(lab: Lab, report: Reporter) -> Results:
    """A whole node stands still beyond its lease, and goes on as if nothing had happened."""
    victim = lab.nodes[2]
    report.say(f"{victim.name} reads a block from its cache and writes; all of it is paused")
    writers = start_writers(lab, "pause")
    try:
        result = stale.pause(lab, victim, "paused-block")
        resumed = time.monotonic()
        for writer in writers:
            if writer.node != victim:
                writer.wait_beyond(resumed, WARM_RECORDS)
    finally:
        for writer in writers:
            writer.stop()
    check_writers(lab, victim, writers)
    report.say(f"its readers got: {', '.join(f'{k}: {v}' for k, v in result.outcomes.items())}")
    old = ", ".join(f"{how} {ms:.0f} ms" for how, ms in result.stale_ms.items())
    return [
        ("pause of n3 beyond its lease: old cached bytes after the resume", old),
        ("late writes of n3 that the servers refused", str(result.refused_writes)),
        ("n3 back as a new life, mounted again by itself", f"{result.back_s:.1f} s"),
    ]
