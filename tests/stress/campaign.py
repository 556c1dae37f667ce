"""Judges of coherence on all nodes of a cluster while mounts and nodes die; counts stale reads.

Real mounts on this machine (`tests.fuse.cluster_mounts`), some judges on each. A fault hits one
node at a time: its writers are marked dead on the board first, then its mount is killed, stopped
until the others have put it out, or loses its clusterd and guard; then it mounts again and gets
fresh judges. Everything random comes from one seed.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lab.judge import EXIT_STALE, NODES_MAX, Board
from tests.fuse.cluster_mounts import cluster_mounts, harness, mount
from tests.fuse.mounting import scratch

FAULTS = ("kill mount", "stop mount", "kill node")
FIRST_FAULT_S = 1.0
FAULT_PAUSE_S = (4.0, 9.0)
END_S = 120.0
POLL_S = 0.05
SHORT_READS = 2000
"""A judge that has lost its mount near its end is not worth another one."""


@dataclass
class Plan:
    """What is asked for."""

    reads: int = 1_000_000
    nodes: int = 3
    workers: int = 2
    cells: int = 96
    seconds: float = 3600.0
    faults: bool = True
    seed: int = 1
    options: tuple[str, ...] = ()


@dataclass
class Report:
    """What was seen."""

    seed: int
    checks: Counter[str] = field(default_factory=Counter)
    writes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    torn: int = 0
    stale: int = 0
    examples: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, result: dict) -> None:
        """The result of one judge."""
        self.checks.update(result["checks"])
        self.writes.update(result["writes"])
        self.torn += result["torn"]
        self.stale += result["stale"]
        self.examples += result["examples"]

    def as_json(self) -> dict:
        return {
            "seed": self.seed,
            "reads": self.checks.total(),
            "stale": self.stale,
            "examples": self.examples,
            "torn_by_the_dead": self.torn,
            "writes_total": self.writes.total(),
            "faults": dict(self.faults),
            "seconds": round(self.seconds, 1),
            "checks": dict(sorted(self.checks.items())),
            "writes": dict(sorted(self.writes.items())),
        }


class Worker:
    """A judge process and what is left for it to do."""

    def __init__(self, campaign: Campaign, node: int, reads: int) -> None:
        self.node = node
        self.reads = reads
        self.writer = campaign.next_writer(node)
        words = [
            sys.executable, "-m", "lab.judge", campaign.top(node), "--board", campaign.board_path,
            "--writer", self.writer, "--cells", campaign.plan.cells, "--checks", reads,
            "--seconds", max(0.0, campaign.end - time.monotonic()), "--seed", campaign.plan.seed,
        ]  # fmt: skip
        self._output = campaign.board_path.with_name(f"judge-{self.writer}")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in words], cwd=harness.ROOT, stdout=output, stderr=output
            )

    def result(self) -> dict | None:
        """What it said last, in the end; None if it was killed before it could say a thing."""
        self.process.wait(END_S)
        lines = [line for line in self._output.read_text().splitlines() if line.startswith("{")]
        return json.loads(lines[-1]) if lines else None


class Campaign:
    """One run."""

    def __init__(self, base: Path, plan: Plan) -> None:
        self.plan = plan
        self.report = Report(plan.seed)
        self.board_path = base / "board"
        self.board = Board(self.board_path, plan.cells)
        self.end = time.monotonic() + plan.seconds
        self._base = base
        self._random = random.Random(plan.seed)
        self._lives: Counter[int] = Counter()
        self._workers: list[Worker] = []

    def next_writer(self, node: int) -> int:
        """A number that no writer had before."""
        life = self._lives[node]
        self._lives[node] += 1
        return node + NODES_MAX * life

    def top(self, node: int) -> Path:
        return self.mounts[node].path / "stress"

    def run(self) -> Report:
        """Do it all. Raises AssertionError when something other than a stale read goes wrong."""
        plan = self.plan
        with cluster_mounts(self._base, *plan.options, count=plan.nodes) as (cluster, mounts):
            self.cluster, self.mounts = cluster, mounts
            self._prepare()
            begin = time.monotonic()
            self.end = begin + plan.seconds
            share = -(-plan.reads // (plan.nodes * plan.workers))
            try:
                for node in mounts:
                    for _ in range(plan.workers):
                        self._workers.append(Worker(self, node, share))
                self._watch()
            finally:
                for worker in self._workers:
                    worker.process.kill()
                    worker.process.wait()
            self.report.seconds = time.monotonic() - begin
        return self.report

    def _prepare(self) -> None:
        words = [
            sys.executable, "-m", "lab.judge", self.top(1), "--board", self.board_path,
            "--cells", str(self.plan.cells), "--prepare",
        ]  # fmt: skip
        subprocess.run(words, cwd=harness.ROOT, check=True)

    def _watch(self) -> None:
        """Until every judge has done its share. The first fault comes early, in a short run too."""
        fault_at = time.monotonic() + FIRST_FAULT_S
        while self._workers:
            for worker in [w for w in self._workers if w.process.poll() is not None]:
                self._ended(worker)
            if self.plan.faults and time.monotonic() > fault_at and self._workers:
                self._fault()
                fault_at = self._next_fault()
            time.sleep(POLL_S)

    def _next_fault(self) -> float:
        return time.monotonic() + self._random.uniform(*FAULT_PAUSE_S)

    def _ended(self, worker: Worker) -> None:
        self._workers.remove(worker)
        result = worker.result()
        assert result is not None, f"a judge on n{worker.node} has died"
        self.report.add(result)
        assert worker.process.returncode in (0, EXIT_STALE), result

    def _fault(self) -> None:
        """Hit a node, bring it back, and let its judges go on."""
        node = self._random.choice(sorted({worker.node for worker in self._workers}))
        kind = self._random.choice(FAULTS)
        mounted = self.mounts[node]
        mine = [worker for worker in self._workers if worker.node == node]
        for worker in mine:
            self.board.mark_dead(worker.writer)
        if kind == "kill mount":
            mounted.process.kill()
        elif kind == "stop mount":
            mounted.process.send_signal(signal.SIGSTOP)
        else:
            self.cluster.node(node).kill()
        for worker in mine:
            self._lost(worker)
        if kind == "stop mount":
            mounted.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            mounted.process.wait(END_S)
        mounted.destroy()
        if kind == "kill node":
            self.cluster.node(node).start()
            self.cluster.wait_view(sorted(self.mounts))
        self.mounts[node] = mount(self.cluster.node(node), *self.plan.options)
        self.report.faults[kind] += 1
        for worker in mine:
            if worker.reads > SHORT_READS:
                self._workers.append(Worker(self, node, worker.reads))

    def _lost(self, worker: Worker) -> None:
        """A judge whose mount is dying: it gets an error, or a SIGBUS; it must not hang."""
        self._workers.remove(worker)
        result = worker.result()
        if result is not None:
            self.report.add(result)
            worker.reads -= result["total"]


def run(plan: Plan) -> Report:
    """A campaign in a scratch directory."""
    with scratch() as base:
        return Campaign(base, plan).run()
