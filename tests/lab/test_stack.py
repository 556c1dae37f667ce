"""The whole stack under faults, with real processes in namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from cluster.timing import timing_of
from lab import cluster, demo_faults, hosts, network
from lab.demo_work import PROGRAM, program
from lab.topology import MOUNT_POINT, NETWORKS, VOLUME, Host, Lab


def status(lab: Lab, node: Host) -> dict:
    return json.loads(hosts.run(lab, node, "clusterctl", "status", "--json", check=False).stdout)


def test_every_node_sees_what_one_wrote(ready: Lab) -> None:
    """Content, names, sizes and links agree on all nodes."""
    first, *others = ready.nodes
    script = (
        f"rm -rf {MOUNT_POINT}/t1; mkdir {MOUNT_POINT}/t1; cd {MOUNT_POINT}/t1;"
        "for i in $(seq 50); do echo $i > f$i; done; ln f1 hard; ln -s f2 soft; mv f3 g3; rm f4;"
        "mkdir -p a/b/c; echo deep > a/b/c/d"
    )
    hosts.run(ready, first, "sh", "-c", script)
    look = f"cd {MOUNT_POINT}/t1; find . | sort; cat f1 hard soft g3 a/b/c/d; "
    look += "stat -c '%h %s %n' f* | sort"
    wanted = hosts.run(ready, first, "sh", "-c", look).stdout
    assert "deep" in wanted
    for node in others:
        assert hosts.run(ready, node, "sh", "-c", look).stdout == wanted


def test_power_cut_of_a_node_loses_nothing_that_was_fsynced(ready: Lab) -> None:
    """The survivors stall but see no error; every acknowledged record is there."""
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    for victim in (ready.nodes[1], ready.nodes[0]):
        result = demo_faults.cut_node(ready, victim, f"test-{victim.name}")
        assert result.acknowledged > 0
        cluster.start(ready, victim)
        assert cluster.is_mounted(ready, victim)


@pytest.mark.parametrize("part", ["mount", "clusterd", "guard"])
def test_crash_of_one_process_leaves_the_others_at_work(ready: Lab, part: str) -> None:
    """The survivors go on; the node comes back after a start."""
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    victim = ready.nodes[2]
    writers = demo_faults.start_writers(ready, f"crash-{part}")
    try:
        moment = time.monotonic()
        cluster.crash(ready, victim, part)
        for writer in writers:
            if writer.node != victim:
                writer.wait_beyond(moment + 0.1, 20)
    finally:
        for writer in writers:
            writer.stop()
    demo_faults.check_writers(ready, ready.nodes[0], writers)
    cluster.start(ready, victim)
    assert cluster.is_mounted(ready, victim)


def test_power_cut_of_a_storage_host_is_a_freeze(ready: Lab) -> None:
    """What was not flushed there is lost, nothing fsynced is; no caller sees an error."""
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    server = ready.servers[1]
    writers = demo_faults.start_writers(ready, "server")
    try:
        cluster.power_cut(ready, server)
        cluster.start(ready, server)
        back = time.monotonic()
        for writer in writers:
            writer.wait_beyond(back, 20)
    finally:
        for writer in writers:
            writer.stop()
    assert not [error for writer in writers for error in writer.errors]
    for node in ready.nodes:
        demo_faults.check_writers(ready, node, writers)


def lonely_times(lab: Lab, server: Host) -> int:
    """How often a server has stopped serving because it heard of no member."""
    logs = list((lab.directory / "hosts" / server.name / "log").glob("*.log"))
    assert logs
    return sum(path.read_text().count("no member was heard") for path in logs)


def test_one_network_of_a_node_and_of_a_server_may_fail(ready: Lab) -> None:
    """With one of two cables pulled everything goes on, nobody is put out, and the server goes on
    hearing of its members (it would serve nobody else)."""
    node, server = ready.nodes[1], ready.servers[0]
    lives = [(m["name"], m["incarnation"]) for m in status(ready, ready.nodes[0])["members"]]
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    dead_s = timing_of("fast").dead_ms / 1000
    before = lonely_times(ready, server)
    writers = demo_faults.start_writers(ready, "cable")
    try:
        for host, net in ((server, 1), (node, 1)):
            network.set_cable(ready, host, net, up=False)
            moment = time.monotonic()
            for writer in writers:
                writer.wait_beyond(moment + dead_s * 2, 20)
            network.set_cable(ready, host, net, up=True)
    finally:
        for writer in writers:
            writer.stop()
    demo_faults.check_writers(ready, ready.nodes[2], writers)
    members = status(ready, ready.nodes[0])["members"]
    assert [(m["name"], m["incarnation"]) for m in members] == lives
    assert lonely_times(ready, server) == before
    assert not [error for writer in writers for error in writer.errors]


def test_a_node_cut_off_freezes_and_the_majority_goes_on(ready: Lab) -> None:
    """The minority is put out; what it wrote after that never lands; it comes back on start."""
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    victim = ready.nodes[2]
    writers = demo_faults.start_writers(ready, "partition")
    try:
        moment = time.monotonic()
        for net in NETWORKS:
            network.set_cable(ready, victim, net, up=False)
        for writer in writers:
            if writer.node != victim:
                writer.wait_beyond(moment + 0.5, 20)
        hosts.wait_for(
            lambda: [m["name"] for m in status(ready, ready.nodes[0])["members"]] == ["n1", "n2"],
            90,
            "the majority has put n3 out",
        )
        for net in NETWORKS:
            network.set_cable(ready, victim, net, up=True)
    finally:
        for writer in writers:
            writer.stop()
    demo_faults.check_writers(ready, ready.nodes[0], writers)
    cluster.power_cut(ready, victim)
    cluster.start(ready, victim)
    assert cluster.is_mounted(ready, victim)


def test_mount_by_type(ready: Lab) -> None:
    """`mount -t fuse.cfs`, as a line of fstab would do it."""
    node = ready.nodes[1]
    cluster.unmount(ready, node)
    hosts.run(ready, node, "mount", "-t", "fuse.cfs", VOLUME, MOUNT_POINT)
    assert cluster.is_mounted(ready, node)


def test_append_from_all_nodes(ready: Lab) -> None:
    """Records of up to 1 MiB appended by all nodes at once are all present and whole."""
    path = f"{MOUNT_POINT}/appended-test"
    running = [
        hosts.popen(ready, n, *PROGRAM, "append", path, "--writer", str(n.index), "--count", "20")
        for n in ready.nodes
    ]
    for process in running:
        assert process.wait(timeout=120) == 0
    checked = program(
        ready, ready.nodes[1], "check-append", path, "--writers", "3", "--count", "20"
    )
    assert checked["good"]


def test_whole_cluster_power_cut_and_cold_start(ready: Lab) -> None:
    """All hosts lose power; after the boot everything fsynced is there and fsck is clean."""
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", demo_faults.WORK)
    writers = demo_faults.start_writers(ready, "cold")
    for host in ready.hosts:
        cluster.power_cut(ready, host)
    for writer in writers:
        writer.stop()
    cluster.up(ready)
    demo_faults.check_writers(ready, ready.nodes[1], writers)
    for node in ready.nodes:
        cluster.unmount(ready, node)
    checked = hosts.run(ready, ready.nodes[0], "fsck.cfs", VOLUME, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for node in ready.nodes:
        cluster.mount(ready, node)


READER = """
import os, sys, time
handle = os.open(sys.argv[1], os.O_RDONLY)
os.pread(handle, 4096, 0)
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        os.pread(handle, 4096, 0)
    except OSError:
        sys.exit(0)
sys.exit(1)
"""


def test_open_files_lose_their_pages_when_guard_and_clusterd_die_together(ready: Lab) -> None:
    """The mount process is alone then: it aborts, and drops what the kernel had cached."""
    victim = ready.nodes[2]
    path = f"{MOUNT_POINT}/cached"
    hosts.run(ready, ready.nodes[0], "sh", "-c", f"head -c 4096 /dev/zero > {path}")
    reader = hosts.popen(ready, victim, sys.executable, "-c", READER, path, stdout=subprocess.PIPE)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
        for part in ("guard", "clusterd"):
            cluster.crash(ready, victim, part)
        assert reader.wait(timeout=60) == 0
    finally:
        reader.kill()
        reader.wait()
    cluster.start(ready, victim)
    assert cluster.is_mounted(ready, victim)
