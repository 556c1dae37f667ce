"""Cut cables, with real networks: a namespace per node, two bridges in one more namespace."""

import contextlib
import itertools
import os
import subprocess
import sys

import pytest
from node_harness import ROOT, Cluster, Node, wait_until

_serial = itertools.count()
JUDGED_S = 150.0
"""A judge that is late on a loaded machine begins anew."""


def run(*words):
    subprocess.run(words, check=True, capture_output=True)


class Wires:
    """Namespaces and veth pairs; a cable is pulled at the switch."""

    def __init__(self, count):
        tag = f"cfsnt{os.getpid() % 10000}-{next(_serial)}"
        self.switch = f"{tag}-sw"
        self.hosts = {number: f"{tag}-n{number}" for number in range(1, count + 1)}
        self.made = []

    def build(self):
        for name in (self.switch, *self.hosts.values()):
            run("ip", "netns", "add", name)
            self.made.append(name)
        for net in (0, 1):
            self._switch("link", "add", f"br{net}", "type", "bridge")
            self._switch("link", "set", f"br{net}", "up")
        for number, host in self.hosts.items():
            run("ip", "-n", host, "link", "set", "lo", "up")
            for net in (0, 1):
                port = f"p{number}-{net}"
                self._switch(
                    "link", "add", port, "type", "veth", "peer", "name", f"eth{net}", "netns", host
                )
                self._switch("link", "set", port, "master", f"br{net}", "up")
                address = f"10.99.{net}.{number}/24"
                run("ip", "-n", host, "addr", "add", address, "dev", f"eth{net}")
                run("ip", "-n", host, "link", "set", f"eth{net}", "up")

    def _switch(self, *words):
        run("ip", "-n", self.switch, *words)

    def cable(self, number, net, state):
        self._switch("link", "set", f"p{number}-{net}", state)

    def tcp(self, number, other, works, port=None):
        """Whether TCP packets leave a node for another one, or for one port there; datagrams always
        do."""
        only = () if port is None else ("dport", str(port))
        for net in (0, 1):
            rule = ("ipproto", "tcp", *only, "to", f"10.99.{net}.{other}", "blackhole")
            verb = "del" if works else "add"
            run("ip", "-n", self.hosts[number], "rule", verb, "pref", "10", *rule)

    def close(self):
        for name in self.made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


class WiredNode(Node):
    def __init__(self, cluster, number):
        super().__init__(cluster, number)
        self.addresses = [f"10.99.{net}.{number}" for net in (0, 1)]

    def command(self):
        host = self.cluster.wires.hosts[self.number]
        return ["ip", "netns", "exec", host, sys.executable, "-m", "node.daemon"]


class WiredCluster(Cluster):
    def __init__(self, base, wires):
        super().__init__(base)
        self.wires = wires

    def node(self, number):
        return self.nodes.setdefault(number, WiredNode(self, number))


@pytest.fixture
def wired(tmp_path):
    wires = Wires(3)
    cluster = WiredCluster(tmp_path, wires)
    with contextlib.ExitStack() as stack:
        stack.callback(wires.close)
        stack.callback(cluster.close)
        wires.build()
        yield cluster


def control(watcher, number):
    return watcher.status()["nodes"][number - 1]["control"]


def test_cut_networks(wired):
    first, second, _third = wired.up(3)
    cable = wired.wires.cable
    epoch = first.status()["epoch"]
    cable(2, 0, "down")
    wait_until(lambda: control(first, 2) == [1], "control goes over the second network")
    wait_until(
        lambda: first.status()["nodes"][1]["networks"] == ["down", "up"], "the status shows it"
    )
    second.call("cluster.voter", {"action": "add", "name": "n2"})
    assert first.status()["epoch"] == epoch
    cable(2, 0, "up")
    wait_until(lambda: control(first, 2) == [0, 1], "and comes back")
    assert first.status()["epoch"] == epoch

    for number, rest in ((2, [1, 3]), (1, [2, 3])):
        for net in (0, 1):
            cable(number, net, "down")
        wired.wait_view(rest)
        cut = wired.node(number)
        wait_until(lambda cut=cut: not cut.status()["quorate"], "the cut node is not quorate")
        for net in (0, 1):
            cable(number, net, "up")
        wired.wait_view([1, 2, 3])


def test_a_broken_circuit_puts_one_end_out(wired):
    """Two nodes hear each other but no connection between them works (a firewall): they do not stay
    in one view. The one that was put out is let in again only when the circuit works."""
    first, second, third = wired.up(3)
    wired.wires.tcp(2, 1, False)
    wait_until(lambda: len(third.members()) == 2, "one of them is out")
    assert third.members() in ([1, 3], [2, 3])
    kept, out = (first, second) if third.members() == [1, 3] else (second, first)
    wait_until(lambda: out.status()["node"]["incarnation"] > 1, "it has come back")
    row = out.number - 1
    wait_until(lambda: "up" in kept.status()["nodes"][row]["networks"], "it is heard")
    assert out.number not in kept.members()
    wired.wires.tcp(2, 1, True)
    wired.wait_view([1, 2, 3])


class Member:
    """A process with a real mesh on a node."""

    def __init__(self, node):
        self.node = node
        self.output = node.base / "member"
        script = ROOT / "tests/node/mesh_member.py"
        host = node.cluster.wires.hosts[node.number]
        words = ["ip", "netns", "exec", host, sys.executable, str(script), *node.addresses]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(words, env=node.environment, cwd=ROOT, stdout=output)
        node.cluster.started.append(self.process)
        wait_until(self.lines, "it has joined")
        self.port = int(self.lines()[0])

    def lines(self):
        return self.output.read_text().splitlines()

    def unreached(self):
        (row,) = self.node.call("dlm.circuits")
        return row["result"]["unreached"]


def test_a_broken_circuit_between_two_mounts_puts_one_of_them_out(wired):
    """All that a node says comes through, but nothing for the mesh of one mount: one of two stays,
    no node goes, and whoever reaches both is not concerned."""
    nodes = wired.up(3)
    members = [Member(node) for node in nodes]
    for one in members:
        wait_until(lambda one=one: one.unreached() == [], "everybody is reached")
    lowest, middle, greatest = members
    wired.wires.tcp(2, 1, False, port=lowest.port)
    wait_until(lambda: len(middle.lines()) > 1, "one end is put out", JUDGED_S)
    assert "no circuit leads to n1.1." in middle.lines()[1]
    assert middle.process.wait(60) == 0
    for one in (lowest, greatest):
        wait_until(lambda one=one: one.unreached() == [], "the others reach each other")
        assert one.process.poll() is None
        assert len(one.lines()) == 1
    assert sorted(nodes[0].members()) == [1, 2, 3]
    lives = {m["incarnation"] for m in nodes[0].status()["members"]}
    assert lives == {1}
    wired.wires.tcp(2, 1, True, port=lowest.port)
    again = Member(nodes[1])
    wait_until(lambda: again.unreached() == [], "it may come again")
