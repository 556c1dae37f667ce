"""Real clusterds on addresses of 127/8: one state and run directory per node, no namespaces."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster import control_client_io
from cluster.errors import StackError

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 40.0


def wait_until(condition, what, timeout_s=WAIT_S):
    """Poll until `condition` is true; its last value is returned."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(StackError):
            value = condition()
            if value:
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_s} s: {what}")
        time.sleep(0.02)


def children(pid):
    """Pids of the children of a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


class Node:
    """One node: its directories and its clusterd."""

    def __init__(self, cluster, number):
        self.cluster = cluster
        self.number = number
        self.name = f"n{number}"
        self.base = cluster.base / self.name
        self.run_dir = self.base / "run"
        self.addresses = [f"127.{cluster.octet}.{number}.{net}" for net in (1, 2)]
        self.process = None
        self.guard = None

    @property
    def environment(self):
        return {
            **os.environ,
            "CFS_RUN_DIR": str(self.run_dir),
            "CFS_STATE_DIR": str(self.base / "state"),
            "PYTHONPATH": str(ROOT),
        }

    def ctl(self, *args, check=True):
        """Run clusterctl; gives its output."""
        done = subprocess.run(
            [sys.executable, "-m", "node.cli", *args],
            env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"clusterctl {args}: {done.stderr}\n{self.logs()}")
        return done

    def start(self):
        """Start clusterd; returns when its socket answers."""
        self.base.mkdir(parents=True, exist_ok=True)
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "node.daemon"],
                env=self.environment, cwd=ROOT, stderr=log, stdout=log,
            )  # fmt: skip
        self.cluster.started.append(self.process)
        wait_until(lambda: self.call("cluster.status"), f"{self.name} answers\n{self.logs()}")
        self.guard = next(iter(children(self.process.pid)))

    def call(self, method, params=None, timeout_s=30.0):
        return control_client_io.call(method, params or {}, self.run_dir, timeout_s)

    def status(self):
        return self.call("cluster.status")

    def members(self):
        """Node ids of a quorate view, or an empty list."""
        status = self.status()
        return [m["id"] for m in status["members"]] if status["quorate"] else []

    def events(self, name=None):
        found = self.call("cluster.events")
        return [e for e in found if name is None or e["event"] == name]

    def kill(self):
        """A power cut: clusterd and guard at once."""
        for pid in (self.guard, self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def logs(self):
        path = self.base / "log"
        return path.read_text() if path.exists() else ""


class Cluster:
    """Some nodes; everything that was started is killed at the end."""

    def __init__(self, base):
        self.base = base
        self.octet = random.SystemRandom().randrange(40, 250)
        self.nodes = {}
        self.started = []

    def node(self, number):
        return self.nodes.setdefault(number, Node(self, number))

    def found(self):
        """The first node, running and quorate."""
        node = self.node(1)
        node.ctl(
            "init", "--name", "test", "--node", "n1", "--id", "1", "--profile", "fast",
            *_addresses(node),
        )  # fmt: skip
        node.start()
        wait_until(lambda: node.members() == [1], "the founder is quorate")
        return node

    def join(self, number):
        """Invite and start one more node; returns when it is a member everywhere."""
        first, node = self.node(1), self.node(number)
        token = first.ctl("invite", node.name, "--id", str(number), *_addresses(node)).stdout
        node.ctl("join", token.strip())
        node.start()
        wait_until(lambda: number in node.members(), f"{node.name} is a member")
        return node

    def up(self, count, voters=True):
        """`count` nodes in one view, all of them voters."""
        self.found()
        for number in range(2, count + 1):
            self.join(number)
            if voters:
                self.node(1).ctl("voter", "add", f"n{number}")
        self.wait_view(range(1, count + 1))
        return [self.node(n) for n in range(1, count + 1)]

    def wait_view(self, numbers, timeout_s=WAIT_S):
        """All named nodes have a quorate view of exactly these."""
        wanted = sorted(numbers)
        for number in wanted:
            node = self.node(number)
            wait_until(
                lambda node=node: sorted(node.members()) == wanted,
                f"{node.name} has view {wanted}", timeout_s,
            )  # fmt: skip

    def close(self):
        for process in self.started:
            for pid in [*children(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def _addresses(node):
    return [word for address in node.addresses for word in ("--address", address)]


def dump(value):
    return json.dumps(value, indent=1)
