"""Loss of quorum and a whole-node pause: what waits, what goes on, what comes back."""

from __future__ import annotations

import json
import re
import time

from lab import cluster, demo_faults, hosts
from lab.topology import Host, Lab


def test_loss_of_quorum_is_a_freeze_that_ends(ready: Lab) -> None:
    """The last node of three waits without an error, and goes on when a second one is back."""
    first, *others = ready.nodes
    hosts.run(ready, first, "mkdir", "-p", demo_faults.WORK)
    writers = demo_faults.start_writers(ready, "quorum")
    survivor = writers[0]
    try:
        for node in others:
            cluster.power_cut(ready, node)

        def frozen() -> bool:
            answer = hosts.run(ready, first, "clusterctl", "status", "--json", check=False)
            return '"quorate": false' in answer.stdout

        hosts.wait_for(frozen, 90, "n1 is not quorate")
        for node in others:
            cluster.start(ready, node)
        back = time.monotonic()
        survivor.wait_beyond(back, 20)
    finally:
        for writer in writers:
            writer.stop()
    assert not survivor.errors
    for node in ready.nodes:
        demo_faults.check_writers(ready, node, writers)


def test_a_node_paused_past_its_lease_is_put_out_and_comes_back(ready: Lab) -> None:
    """The others go on; nothing that the paused node does after its resume reaches the disks. It
    becomes a member again, in a new life, and mounts again, all by itself."""
    victim = ready.nodes[2]
    before, lines = life(ready, victim), len(mount_log(ready, victim))
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    writers = demo_faults.start_writers(ready, "pause")
    try:
        moment = time.monotonic()
        hosts.freeze(ready, victim, frozen=True)
        demo_faults.wait_recovered(ready, ready.nodes[0], moment)
        recovered = time.monotonic()
        for writer in writers:
            if writer.node != victim:
                writer.wait_beyond(recovered, 20)
        # What it had acknowledged before it was put out is the last that may count.
        paused = next(w for w in writers if w.node == victim)
        counted = paused.last_index
        resumed = time.monotonic()
        hosts.freeze(ready, victim, frozen=False)
        paused.process.wait(60)
        cluster.wait_mounted(ready, victim)
        for writer in writers:
            if writer.node != victim:
                writer.wait_beyond(resumed, 20)
    finally:
        hosts.freeze(ready, victim, frozen=False)
        for writer in writers:
            writer.stop()
    # A call that was under way at the abort gets ECONNABORTED, every later one ENOTCONN.
    assert re.search("not connected|connection abort", "".join(paused.errors))
    # One fsync may have returned on the disks just before the pause and been told after it.
    assert paused.last_index <= counted + 1
    assert life(ready, victim) > before
    for node in ready.nodes:
        demo_faults.check_writers(ready, node, writers)
    log = mount_log(ready, victim)[lines:]
    said = [line for line in log if "cfs.mount ERROR" in line]
    assert len(said) == 1, "\n".join(log)
    assert "put out of the cluster" in said[0], "\n".join(log)
    assert [e["event"] for _, e in demo_faults.events_since(ready, victim, resumed)].count(
        "mount.back"
    ) == 1


def life(lab: Lab, node: Host) -> int:
    """The incarnation of a node that is a member."""
    output = hosts.run(lab, node, "clusterctl", "status", "--json").stdout
    return int(json.loads(output)["node"]["incarnation"])


def mount_log(lab: Lab, node: Host) -> list[str]:
    """The lines of the log of a node's mounts."""
    path = lab.host_directory(node) / "run/cfs/mount-mnt-cfs.log"
    return path.read_text().splitlines()
