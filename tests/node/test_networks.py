"""Cut cables, with real networks: a namespace per node, two bridges in one more namespace."""

import contextlib
import itertools
import os
import subprocess
import sys

import pytest
from node_harness import Cluster, Node, wait_until

_serial = itertools.count()


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

    def tcp(self, number, other, works):
        """Whether TCP packets leave a node for another one; datagrams always do."""
        for net in (0, 1):
            rule = ("ipproto", "tcp", "to", f"10.99.{net}.{other}", "blackhole")
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
