"""No old byte after a survivor's write was acknowledged, whatever happens to a node (G1-G4).

On the victim one program reads a cached block by pread, another through a mapping. They may get the
old version until the survivor's write returns, and then never again: an error, a SIGBUS, or nothing
until they are killed. Only a node that was paused as a whole may read on for the moment that its
guard needs after the resume."""

from __future__ import annotations

import json
import os
import signal

import pytest

from lab import cluster, hosts, network, stale
from lab.topology import MOUNT_POINT, NETWORKS, Host, Lab

PATH = f"{MOUNT_POINT}/stale/block"
GONE = ("not connected", "connection abort", "SIGBUS")


def send(lab: Lab, node: Host, number: signal.Signals, *parts: str) -> None:
    """A signal to some processes of a node."""
    for part in parts:
        pids = hosts.find(lab, node, cluster.CRASH_TARGETS[part])
        assert pids, part
        for pid in pids:
            os.kill(pid, number)


def write_on_a_survivor(lab: Lab, readers: list[stale.OldReader]) -> None:
    """Version 2; from then on nobody may read version 1."""
    acknowledged = stale.write_version(lab, lab.nodes[0], PATH, 2)
    for reader in readers:
        hosts.wait_for(
            lambda r=reader: r.process.poll() is not None or r.is_blocked(),  # type: ignore[misc]
            stale.END_S, f"the {reader.how} reader gets nothing old",
        )  # fmt: skip
        assert reader.last_begun_s <= acknowledged, reader.how


def check_gone(readers: list[stale.OldReader]) -> None:
    for reader in readers:
        outcome = reader.outcome()
        assert any(word in outcome for word in GONE), (reader.how, outcome)


def test_a_node_that_is_cut_off(ready: Lab) -> None:
    """Its guard takes the pages back at the end of the lease; readers wait, `kill -9` ends them;
    when the cables are back the dead mount gives errors and a new one is there."""
    victim = ready.nodes[2]
    readers = stale.start_readers(ready, victim, PATH)
    killed = stale.OldReader(ready, victim, PATH, "pread")
    try:
        hosts.wait_for(killed.is_warm, stale.END_S, "the third reader reads")
        for net in NETWORKS:
            network.set_cable(ready, victim, net, up=False)
        write_on_a_survivor(ready, readers)
        hosts.wait_for(killed.is_blocked, stale.END_S, "the third reader waits")
        killed.process.kill()
        killed.process.wait(stale.END_S)
        for net in NETWORKS:
            network.set_cable(ready, victim, net, up=True)
        check_gone(readers)
    finally:
        for reader in [*readers, killed]:
            reader.stop()
    cluster.wait_mounted(ready, victim)


def test_a_mount_process_that_is_stopped(ready: Lab) -> None:
    """It shows no progress, so it is put out; the guard aborts and drops its pages."""
    victim = ready.nodes[2]
    readers = stale.start_readers(ready, victim, PATH)
    try:
        send(ready, victim, signal.SIGSTOP, "mount")
        write_on_a_survivor(ready, readers)
        check_gone(readers)
    finally:
        send(ready, victim, signal.SIGCONT, "mount")
        for reader in readers:
            reader.stop()
    cluster.wait_mounted(ready, victim)


@pytest.mark.parametrize("parts", [("guard",), ("guard", "clusterd")])
def test_a_guard_that_is_stopped(ready: Lab, parts: tuple[str, ...]) -> None:
    """clusterd takes the pages back, or the mount process itself. The node is put out because it is
    silent."""
    first, victim = ready.nodes[0], ready.nodes[2]
    readers = stale.start_readers(ready, victim, PATH)
    try:
        send(ready, victim, signal.SIGSTOP, *parts)

        def is_out() -> bool:
            status = hosts.run(ready, first, "clusterctl", "status", "--json", check=False).stdout
            return victim.name not in [m["name"] for m in json.loads(status)["members"]]

        hosts.wait_for(is_out, stale.END_S, "the victim is out")
        if len(parts) == 1:
            write_on_a_survivor(ready, readers)
        check_gone(readers)
    finally:
        send(ready, victim, signal.SIGCONT, *parts)
        for reader in readers:
            reader.stop()
    cluster.wait_mounted(ready, victim)


def test_a_mount_process_that_is_killed(ready: Lab) -> None:
    """The guard aborts its connection and drops its pages."""
    victim = ready.nodes[2]
    readers = stale.start_readers(ready, victim, PATH)
    try:
        send(ready, victim, signal.SIGKILL, "mount")
        write_on_a_survivor(ready, readers)
        check_gone(readers)
    finally:
        for reader in readers:
            reader.stop()
    cluster.wait_mounted(ready, victim)


def test_a_node_that_is_paused_as_a_whole(ready: Lab) -> None:
    """After its resume it reads old bytes for a moment, measured in bench/pause.py, then errors; it
    comes back as a new life."""
    result = stale.pause(ready, ready.nodes[2], "paused")
    print(result)
    assert set(result.outcomes) == set(stale.WAYS)
    for outcome in result.outcomes.values():
        assert any(word in outcome for word in GONE), result
