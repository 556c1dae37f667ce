"""The campaign in a lab: also cables, storage hosts and power, and files with a history.

One fault at a time, or two on different hosts, with a random time between strike and mending
(`tests.stress.faults`). Where a fault may lose what was not durable, the judges of its node are
marked dead on the board first, and fresh ones begin when the node has mounted again. In the end
everything is unmounted and checked.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import StackError
from lab import cluster, hosts
from lab.topology import MOUNT_POINT, VOLUME, Host, LabState
from tests.stress.campaign import (
    END_S,
    FIRST_FAULT_S,
    POLL_S,
    SHORT_READS,
    Campaign,
    Plan,
    Report,
    Worker,
)
from tests.stress.faults import FAULTS, Fault, killed_alone

TOP = f"{MOUNT_POINT}/stress"
PAUSE_S = (1.0, 5.0)
STRUCK_S = (0.0, 4.0)
SECOND_FAULT_SHARE = 0.4
SETTLED_S = 2.0
EXAMINE_S = 10.0


@dataclass
class LabPlan(Plan):
    """`only`: the names of the faults; none: all of them. `logs`: where to leave the logs of all
    hosts, and what they wait for, when something is wrong."""

    histories: int = 12
    only: tuple[str, ...] = ()
    logs: Path | None = None


class LabWorker(Worker):
    """A judge process on a node of the lab."""

    def __init__(self, campaign: LabCampaign, node: int, reads: int) -> None:
        plan = campaign.plan
        self.node = node
        self.reads = reads
        self.writer = campaign.next_writer(node)
        words = [
            *campaign.judge, "--writer", self.writer, "--checks", reads, "--seed", plan.seed,
            "--seconds", max(0.0, campaign.end - time.monotonic()),
            "--no-uring" if killed_alone(self.writer) else "--uring",
        ]  # fmt: skip
        self._output = campaign.board_path.with_name(f"judge-{self.writer}")
        with self._output.open("wb") as output:
            self.process = hosts.popen(
                campaign.lab, campaign.host(node), *map(str, words), stdout=output.fileno()
            )


class LabCampaign(Campaign):
    """One run."""

    plan: LabPlan

    def __init__(self, base: Path, plan: LabPlan) -> None:
        super().__init__(base, plan)
        # A storage host that loses power loses what was not flushed, or runs at full speed.
        volatile = self._random.random() < 0.5
        state = LabState(plan.nodes, 2, "600M", "fast", volatile=volatile)
        self.lab = cluster.create(base / "lab", state)
        self.judge = [
            sys.executable, "-m", "lab.judge", TOP, "--board", self.board_path,
            "--cells", plan.cells, "--histories", plan.histories,
        ]  # fmt: skip
        self._faults = [fault for fault in FAULTS if not plan.only or fault.name in plan.only]

    def host(self, node: int) -> Host:
        return self.lab.nodes[node - 1]

    def run(self) -> Report:
        """Do it all. Raises AssertionError when something other than a wrong byte goes wrong."""
        plan = self.plan
        try:
            self._begin()
            begin = time.monotonic()
            self.end = begin + plan.seconds
            share = -(-plan.reads // (plan.nodes * plan.workers))
            for node in range(1, plan.nodes + 1):
                for _ in range(plan.workers):
                    self._workers.append(LabWorker(self, node, share))
            self._watch()
            self.report.seconds = time.monotonic() - begin
            self._check()
        except BaseException:
            self._keep_logs()
            raise
        finally:
            cluster.down(self.lab.directory)
            for worker in self._workers:
                worker.process.wait()
        if self.report.stale:
            self._keep_logs()
        return self.report

    def _begin(self) -> None:
        """Everything mounted, and the files made."""
        lab = self.lab
        cluster.up(lab)
        if self.plan.options:
            for node in lab.nodes:
                cluster.unmount(lab, node)
                words = ("-o", ",".join(self.plan.options))
                hosts.run(lab, node, "mount.cfs", VOLUME, MOUNT_POINT, *words)
        hosts.run(lab, lab.nodes[0], *map(str, self.judge), "--prepare")

    def _check(self) -> None:
        for node in self.lab.nodes:
            cluster.unmount(self.lab, node)
        done = hosts.run(self.lab, self.lab.nodes[0], "fsck.cfs", "-n", VOLUME, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def _watch(self) -> None:
        """Until every judge has done its share. The first fault comes early, in a short run too."""
        fault_at = time.monotonic() + FIRST_FAULT_S
        while self._workers:
            self._look()
            if self.plan.faults and time.monotonic() > fault_at and self._workers:
                self._fault()
                fault_at = time.monotonic() + self._random.uniform(*PAUSE_S)
            assert time.monotonic() < self.end + END_S, "a judge hangs"
            time.sleep(POLL_S)

    def _look(self) -> None:
        """Take leave of the judges that have ended."""
        for worker in [w for w in self._workers if w.process.poll() is not None]:
            self._ended(worker)

    def _wait(self, span: tuple[float, float]) -> None:
        """Let the judges work for a random time."""
        until = time.monotonic() + self._random.uniform(*span)
        while time.monotonic() < until:
            self._look()
            time.sleep(POLL_S)

    # -- faults ----------------------------------------------------------------------------------

    def _choose(self) -> list[tuple[Fault, Host]]:
        """One fault, or two on different hosts."""
        chosen: list[tuple[Fault, Host]] = []
        for _ in range(2 if self._random.random() < SECOND_FAULT_SHARE else 1):
            fault = self._random.choice(self._faults)
            host = self._random.choice([h for h in self.lab.hosts if h.kind == fault.kind])
            if host not in [other for _, other in chosen]:
                chosen.append((fault, host))
        return chosen

    def _fault(self) -> None:
        """Strike, mend, and let new judges take the place of those that are lost."""
        chosen = self._choose()
        print(f"{time.monotonic():.1f}", [(f.name, h.name) for f, h in chosen], flush=True)
        before = {host: self._life(host) for fault, host in chosen if fault.loses}
        mine: list[Worker] = []
        for fault, host in chosen:
            if fault.loses:
                mine += self._give_up(host)
            fault.strike(self.lab, host)
            self._wait(STRUCK_S)
        for fault, host in self._random.sample(chosen, len(chosen)):
            fault.mend(self.lab, host)
            self.report.faults[fault.name] += 1
        for worker in mine:
            self.board.mark_over(worker.writer)
        for worker in mine:
            if (result := worker.result()) is not None:
                self.report.add(result)
                worker.reads -= result["total"]
        for host, life in before.items():
            self._settle(host, life)
        for worker in mine:
            if worker.reads > SHORT_READS:
                self._workers.append(LabWorker(self, worker.node, worker.reads))

    def _give_up(self, node: Host) -> list[Worker]:
        """The judges of a node, which are dead from now on."""
        lost = [worker for worker in self._workers if worker.node == node.index]
        for worker in lost:
            self._workers.remove(worker)
            self.board.mark_dead(worker.writer)
        return lost

    def _life(self, node: Host) -> tuple[int, list[int]] | None:
        """The incarnation of a member that all others see, too, and the pids of its mount."""
        seen = set()
        for host in self.lab.nodes:
            status = cluster.member_status(self.lab, host)
            if status is None or not status["quorate"]:
                return None
            seen |= {
                (status["epoch"], m["incarnation"])
                for m in status["members"]
                if m["name"] == node.name
            }
        if len(seen) != 1 or not cluster.is_mounted(self.lab, node):
            return None
        return seen.pop()[1], hosts.find(self.lab, node, "mount.cfs")

    def _settle(self, node: Host, before: tuple[int, list[int]] | None) -> None:
        """Until a node is a member and mounted, and stays so. A new life has another mount."""
        since, last = time.monotonic(), None

        def settled() -> bool:
            nonlocal since, last
            self._look()
            life = self._life(node)
            old = life and before and life[0] != before[0] and life[1] == before[1]
            if life is None or old or life != last:
                since, last = time.monotonic(), life
            return life is not None and time.monotonic() > since + SETTLED_S

        hosts.wait_for(settled, END_S, f"{node.name} is back")

    # -- what is left for people -----------------------------------------------------------------

    def _keep_logs(self) -> None:
        if self.plan.logs is None:
            return
        for node in self.lab.nodes:
            self._examine(node, self.plan.logs)
        for host in self.lab.hosts:
            source, target = self.lab.host_directory(host), self.plan.logs / host.name
            for path in [*source.glob("log/*.log"), *source.glob("run/cfs/*.log")]:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        for path in self.board_path.parent.glob("judge-*"):
            shutil.copy(path, self.plan.logs)

    def _examine(self, node: Host, target: Path) -> None:
        """What a node waits for: locks, the tasks of its mount (in its log), calls of judges."""
        commands = (
            ("dlmctl", "waiters"), ("cfsctl", "waiting", MOUNT_POINT), ("dlmctl", "dump"),
        )  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        with (target / f"{node.name}-waits").open("w") as file:
            for words in commands:
                with contextlib.suppress(StackError, subprocess.TimeoutExpired):
                    done = hosts.run(self.lab, node, *words, check=False, timeout_s=EXAMINE_S)
                    print(words, done.stdout, done.stderr, file=file)
            for pid, words in hosts.processes(self.lab, node).items():
                if "lab.judge" in words:
                    with contextlib.suppress(OSError):
                        print(words, Path(f"/proc/{pid}/stack").read_text(), file=file)
        for pid in hosts.find(self.lab, node, "mount.cfs"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR2)
