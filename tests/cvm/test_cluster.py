"""Real clusterds and gnbd-servers: an open volume changes while nodes and servers die."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.gnbd.certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("cvm_harness", ROOT / "tests/node/harness.py")
assert _spec is not None
assert _spec.loader is not None
harness = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(harness)
wait_until = harness.wait_until


@pytest.fixture
def cluster(tmp_path):
    made = harness.Cluster(tmp_path)
    try:
        yield made
    finally:
        made.close()


class Worker:
    """tests/cvm/volume_worker.py on a node."""

    def __init__(self, node, volume: str) -> None:
        self.log = node.base / "worker.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests/cvm/volume_worker.py"), volume],
                env=node.environment, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        node.cluster.started.append(self.process)
        self.lines: list[dict] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.progress()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.lines.append(json.loads(line))

    def last(self, key: str) -> int:
        return next((line[key] for line in reversed(self.lines) if key in line), 0)

    def progress(self) -> None:
        """Return when more requests were completed than until now."""
        before = self.last("count")
        wait_until(lambda: self.last("count") > before, "the worker gets on")

    def gates(self) -> int:
        return sum(1 for line in self.lines if line.get("gate") == "closed")

    def finish(self) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._reader.join(60)
        assert self.process.wait(60) == 0, self.log.read_text()
        return self.lines[-1]


def prepared(cluster, head=""):
    first, second = cluster.up(2, voters=False)
    servers = [harness.Server(cluster, number) for number in (1, 2)]
    for server in servers:
        server.configure("512M", head=head.format(server.name))
        server.start()
    first.tool("cvm.cli", "vgcreate", "vg0", "s1/disk0", "s2/disk0")
    second.tool("cvm.cli", "lvcreate", "-n", "vol0", "-i", "2", "-L", "96m", "vg0")
    return first, second, servers


def group(node) -> dict:
    return node.call("cvm.status")["rows"][0]


def start_extend(node):
    code = "from cvm.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "lvextend", "-l", "+2", "vg0/vol0"],
        env=node.environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    node.cluster.started.append(process)
    return process


def test_a_node_that_changes_an_open_volume_may_die_at_any_moment(cluster) -> None:
    """Killed when the change is noted, when gates are closed, when it is committed: the survivor's
    requests go on without an error and the change is either done or undone."""
    first, second, _ = prepared(cluster)
    worker = Worker(first, "vg0/vol0")
    for moment in ("noted", "closed", "committed"):
        before, gates = group(first), worker.gates()
        command = start_extend(second)
        reached = {
            "noted": lambda before=before: (
                group(first)["change"] or group(first)["vg_seqno"] > before["vg_seqno"]
            ),
            "closed": lambda gates=gates: worker.gates() > gates,
            "committed": lambda before=before: group(first)["vg_seqno"] > before["vg_seqno"],
        }[moment]
        wait_until(reached, moment)
        second.kill()
        command.wait()
        worker.progress()
        wait_until(lambda: not group(first)["change"], "the change is settled")
        worker.progress()
        after = group(first)
        assert after["vg_seqno"] - before["vg_seqno"] in (0, 1)
        grown = after["lvs"][0]["lv_size"] - before["lvs"][0]["lv_size"]
        assert grown == (after["vg_seqno"] - before["vg_seqno"]) * (8 << 20)
        second.start()
        cluster.wait_view([1, 2])
    second.tool("cvm.cli", "lvextend", "-l", "+2", "vg0/vol0")
    size = group(second)["lvs"][0]["lv_size"]
    worker.progress()
    verdict = worker.finish()
    assert verdict["verdict"] == "ok"
    assert verdict["sizes"][-1] == size


def test_changes_with_two_workers_and_a_power_cut_of_a_server(cluster) -> None:
    """Two nodes work while the volume grows; a server loses what was not flushed and comes back: no
    acknowledged byte is missing for those who live."""
    first, second, servers = prepared(cluster)
    workers = [Worker(node, "vg0/vol0") for node in (first, second)]
    for node in (first, second, first):
        node.tool("cvm.cli", "lvextend", "-L", "+8m", "vg0/vol0")
        for worker in workers:
            worker.progress()
    servers[0].kill()
    wait_until(lambda: not first.status()["servers"][0]["up"], "s1 is seen down")
    assert group(first)["state"] == "DEGRADED"
    with contextlib.suppress(AssertionError):
        second.tool("cvm.cli", "lvextend", "-L", "+8m", "vg0/vol0")
        raise RuntimeError("a change without one of its disks")
    servers[0].start()
    for worker in workers:
        worker.progress()
    second.tool("cvm.cli", "lvextend", "-L", "+8m", "vg0/vol0")
    verdicts = [worker.finish() for worker in workers]
    assert [one["verdict"] for one in verdicts] == ["ok", "ok"]
    assert group(first)["lvs"][0]["lv_size"] == 128 << 20
    first.tool("cvm.cli", "lvremove", "-y", "vg0/vol0")


def test_a_cluster_whose_servers_demand_tls(cluster, tmp_path) -> None:
    """Volume manager and mounts come in with the node's certificate; a server that is killed and
    a volume that grows change nothing about that."""
    authority = Authority(tmp_path / "authority")
    for name, kind in (("s1", "server"), ("s2", "server"), ("n1", "client"), ("n2", "client")):
        authority.issue(name, kind)
    place = authority.directory
    for number in (1, 2):
        cluster.node(number).more_config = (
            f'\n[tls]\ncertificate = "{place}/n{number}/client-cert.pem"\n'
            f'key = "{place}/n{number}/client-key.pem"\n'
            f'authority = "{authority.certificate}"\nrequired = true\n'
        )
    head = (
        f'tls = {{{{certificate = "{place}/{{0}}/server-cert.pem", '
        f'key = "{place}/{{0}}/server-key.pem", authority = "{authority.certificate}", '
        "required = true}}\n"
    )
    first, second, servers = prepared(cluster, head)
    workers = [Worker(node, "vg0/vol0") for node in (first, second)]
    servers[0].kill()
    servers[0].start()
    second.tool("cvm.cli", "lvextend", "-l", "+2", "vg0/vol0")
    for worker in workers:
        worker.progress()
    for worker in workers:
        assert worker.finish()["verdict"] == "ok"
