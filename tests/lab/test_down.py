"""The lab removes what it made, and only that."""

from __future__ import annotations

import sys
from pathlib import Path

from lab import cluster, hosts, network
from lab.topology import Host, Lab, LabState

KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=1)
except ConnectionRefusedError:
    sys.exit(0)
except OSError:
    sys.exit(1)
"""


def reaches(lab: Lab, host: Host, address: str) -> bool:
    """True when a closed port of the address refuses a connection: packets go both ways."""
    return hosts.run(lab, host, sys.executable, "-c", KNOCK, address, check=False).returncode == 0


def test_down_leaves_nothing_even_after_the_lab_died(tmp_path: Path) -> None:
    """Namespaces, processes, control groups and the directory are gone; a second down is quiet."""
    directory = tmp_path / "lab"
    lab = cluster.create(directory, LabState(2, 1, "64M", "fast"))
    try:
        network.build(lab)
        for host in lab.hosts:
            hosts.boot(lab, host)
        hosts.daemon(lab, lab.nodes[0], "sleep", "sleep", "1000")
        assert network.namespaces(lab.tag)
    finally:
        assert cluster.down(directory)
    assert not network.namespaces(lab.tag)
    assert not hosts.lab_cgroup(lab.tag).exists()
    assert not directory.exists()
    assert not cluster.down(directory)


def test_hosts_are_apart_and_cables_can_be_pulled(tmp_path: Path) -> None:
    """Each host has its own name, /run and addresses; a cut takes one network only."""
    directory = tmp_path / "lab"
    lab = cluster.create(directory, LabState(2, 1, "64M", "fast"))
    try:
        network.build(lab)
        for host in lab.hosts:
            hosts.boot(lab, host)
        first, second = lab.nodes
        assert hosts.run(lab, first, "hostname").stdout == "n1\n"
        hosts.run(lab, first, "touch", "/run/cfs/mine")
        assert hosts.run(lab, second, "ls", "/run/cfs").stdout == ""
        network.set_cable(lab, second, 1, up=False)
        assert not reaches(lab, first, second.address(1))
        assert reaches(lab, first, second.address(2))
        assert network.cables(lab, second) == {1: False, 2: True}
    finally:
        cluster.down(directory)


def test_a_power_cut_kills_everything_and_keeps_the_state(tmp_path: Path) -> None:
    """After a power cut no process is left; the state directory survives, /run does not."""
    directory = tmp_path / "lab"
    lab = cluster.create(directory, LabState(1, 1, "64M", "fast"))
    try:
        network.build(lab)
        node = lab.nodes[0]
        hosts.boot(lab, node)
        hosts.run(lab, node, "touch", "/run/cfs/gone", "/var/lib/cfs/kept")
        hosts.daemon(lab, node, "sleep", "sleep", "1000")
        cluster.power_cut(lab, node)
        assert hosts.processes(lab, node) == {}
        assert hosts.holder_pid(Lab.load(directory), node) is None
        hosts.boot(lab, node)
        listing = hosts.run(lab, node, "ls", "/run/cfs", "/var/lib/cfs").stdout
        assert "kept" in listing
        assert "gone" not in listing
    finally:
        cluster.down(directory)
