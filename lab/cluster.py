"""The cluster of a lab: from nothing to a mounted, quorate cluster, and every fault in between.

Each function is idempotent: it looks at what is there and does what is missing. The commands used
are those that an admin types on real machines.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import StackError, UsageError
from lab import hosts, network
from lab.topology import (
    MOUNT_POINT,
    NETWORKS,
    NODES_MAX,
    SERVERS_MAX,
    STATE_FILE,
    VOLUME,
    Host,
    Lab,
    LabState,
)

START_TIMEOUT_S = 120.0
CRASH_TARGETS = {"mount": "mount.cfs", "clusterd": "clusterd", "guard": "clusterguard"}
Say = Callable[[str], None]

_EXPORTS = """\
state_dir = "/var/lib/cfs"

[[exports]]
name = "disk0"
path = "/srv/disk0.img"
size = "{size}"
access = "cluster"
filters = {filters}

[[exports]]
name = "scratch"
path = "/srv/scratch.img"
size = "{scratch}"
access = "plain"
"""


def _quiet(_text: str) -> None:
    """Say nothing."""


def member_status(lab: Lab, node: Host) -> dict[str, Any] | None:
    """What `clusterctl status` says on a node, or None while clusterd does not answer."""
    if hosts.holder_pid(lab, node) is None or hosts.is_frozen(lab, node):
        return None
    result = hosts.run(lab, node, "clusterctl", "status", "--json", check=False)
    if not result.stdout.startswith("{"):
        return None
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def _member_names(status: dict[str, Any] | None) -> list[str]:
    return [] if status is None else sorted(m["name"] for m in status["members"])


def _is_member(lab: Lab, node: Host) -> bool:
    status = member_status(lab, node)
    return bool(status and status["quorate"] and node.name in _member_names(status))


def _start_clusterd(lab: Lab, node: Host) -> None:
    if not hosts.find(lab, node, "clusterd"):
        hosts.daemon(lab, node, "clusterd", "clusterd")


def _addresses(host: Host) -> list[str]:
    return [word for net in NETWORKS for word in ("--address", host.address(net))]


def _state_file(lab: Lab, host: Host, name: str) -> Path:
    return lab.host_directory(host) / "state" / name


def _start_first_node(lab: Lab) -> None:
    first = lab.nodes[0]
    if not _state_file(lab, first, "node.toml").exists():
        hosts.run(
            lab,
            first,
            "clusterctl",
            "init",
            "--name",
            "lab",
            "--node",
            first.name,
            "--id",
            str(first.cluster_id_number),
            *_addresses(first),
            "--profile",
            lab.state.profile,
        )
    _start_clusterd(lab, first)


def _join_node(lab: Lab, node: Host) -> None:
    if not _state_file(lab, node, "node.toml").exists():
        token = hosts.run(
            lab,
            lab.nodes[0],
            "clusterctl",
            "invite",
            node.name,
            "--id",
            str(node.cluster_id_number),
            *_addresses(node),
        ).stdout
        hosts.run(lab, node, "clusterctl", "join", token.split()[-1])
    _start_clusterd(lab, node)


def _start_server(lab: Lab, server: Host) -> None:
    exports = _state_file(lab, server, "exports.toml")
    if not exports.exists():
        filters = '["volatile"]' if lab.state.volatile else "[]"
        text = _EXPORTS.format(size=lab.state.disk_size, scratch="1G", filters=filters)
        exports.write_text(text)
    if not _state_file(lab, server, "server.toml").exists():
        token = hosts.run(
            lab,
            lab.nodes[0],
            "clusterctl",
            "server",
            "add",
            server.name,
            "--id",
            str(server.cluster_id_number),
            *_addresses(server),
        ).stdout
        hosts.run(
            lab, server, "gnbd-server", "--join", token.split()[-1], "/var/lib/cfs/exports.toml"
        )
    if not hosts.find(lab, server, "gnbd-server"):
        hosts.daemon(lab, server, "gnbd-server", "gnbd-server", "/var/lib/cfs/exports.toml")


def _wait_member(lab: Lab, node: Host) -> None:
    hosts.wait_for(lambda: _is_member(lab, node), START_TIMEOUT_S, f"{node.name} is a member")


def _wait_servers(lab: Lab) -> None:
    wanted = {s.cluster_id_number for s in lab.servers}

    def installed() -> bool:
        status = member_status(lab, lab.nodes[0])
        return status is not None and wanted <= set(status["installed"])

    hosts.wait_for(installed, START_TIMEOUT_S, "every block server has installed the view")


def _add_voters(lab: Lab) -> None:
    """Node majority; two nodes get the first server as the third voter."""
    voters = [n.name for n in lab.nodes[1:]]
    if len(lab.nodes) == 2:
        voters.append(lab.servers[0].name)
    status = member_status(lab, lab.nodes[0])
    assert status is not None
    present = {v["name"] for v in status["voters"]}
    for name in voters:
        if name not in present:
            hosts.run(lab, lab.nodes[0], "clusterctl", "voter", "add", name)


def _make_volume(lab: Lab) -> None:
    if lab.state.formatted:
        return
    first = lab.nodes[0]
    volumes = [f"{s.name}/disk0" for s in lab.servers]
    for volume in volumes:
        hosts.run(lab, first, "cvmctl", "pvcreate", "--yes", volume)
    hosts.run(lab, first, "cvmctl", "vgcreate", "vg0", *volumes)
    hosts.run(
        lab,
        first,
        "cvmctl",
        "lvcreate",
        "-n",
        "vol0",
        "-i",
        str(len(volumes)),
        "-I",
        "64k",
        "-l",
        "75%FREE",
        "vg0",
    )
    hosts.run(lab, first, "mkfs.cfs", "--yes", VOLUME)
    lab.state.formatted = True
    lab.save()


def is_mounted(lab: Lab, node: Host) -> bool:
    """True when the file system is mounted on a node and answers."""
    if not hosts.mount_point_in_use(lab, node):
        return False
    # The type, too: a dead mount may go in between, and the directory below it answers.
    words = ("stat", "-f", "-c", "%T", MOUNT_POINT)
    answer = hosts.run(lab, node, *words, check=False, timeout_s=60)
    return answer.returncode == 0 and answer.stdout.startswith("fuse")


def is_remembered(lab: Lab, node: Host) -> bool:
    """True when clusterd of a node mounts the file system by itself."""
    status = member_status(lab, node)
    return status is not None and any(m["mountpoint"] == MOUNT_POINT for m in status["mounts"])


def mount(lab: Lab, node: Host) -> None:
    """Mount the file system on a node; one that was lost comes back by itself."""
    if is_remembered(lab, node):
        wait_mounted(lab, node)
    elif not is_mounted(lab, node):
        hosts.run(lab, node, "mount.cfs", VOLUME, MOUNT_POINT)


def wait_mounted(lab: Lab, node: Host) -> float:
    """Wait until a node has mounted the file system by itself; the seconds it took."""
    return hosts.wait_for(
        lambda: is_mounted(lab, node), START_TIMEOUT_S, f"{node.name} has mounted again"
    )


def unmount(lab: Lab, node: Host) -> None:
    """Unmount cleanly and wait until the mount process has ended."""
    if hosts.mount_point_in_use(lab, node):
        hosts.run(lab, node, "umount", MOUNT_POINT)
    hosts.wait_for(
        lambda: not hosts.find(lab, node, "mount.cfs"),
        START_TIMEOUT_S,
        f"the mount process of {node.name} has ended",
    )


def up(lab: Lab, say: Say = _quiet) -> None:
    """From whatever is there to a mounted, quorate cluster."""
    say("networks and hosts")
    network.build(lab)
    for host in lab.hosts:
        hosts.freeze(lab, host, frozen=False)
        hosts.boot(lab, host)
        for net in NETWORKS:
            network.set_cable(lab, host, net, up=True)
    say("clusterd on the nodes")
    _start_first_node(lab)
    fresh = not all(_state_file(lab, h, "node.toml").exists() for h in lab.nodes)
    if fresh:
        _wait_member(lab, lab.nodes[0])
    for node in lab.nodes[1:]:
        _join_node(lab, node)
    for node in lab.nodes:
        _wait_member(lab, node)
    say("block servers")
    for server in lab.servers:
        _start_server(lab, server)
    _wait_servers(lab)
    _add_voters(lab)
    say("volume and file system")
    _make_volume(lab)
    say("mounts")
    for node in lab.nodes:
        mount(lab, node)


def start(lab: Lab, host: Host) -> None:
    """Boot a host after a power cut or a crash: it rejoins, and a node mounts again."""
    hosts.freeze(lab, host, frozen=False)
    for net in NETWORKS:
        network.set_cable(lab, host, net, up=True)
    hosts.boot(lab, host)
    if host.kind == "server":
        _start_server(lab, host)
        return
    _start_clusterd(lab, host)
    _wait_member(lab, host)
    mount(lab, host)


def power_cut(lab: Lab, host: Host) -> None:
    """Links gone, then SIGKILL of all processes: nothing that the host did last gets out."""
    for net in NETWORKS:
        network.set_cable(lab, host, net, up=False)
    hosts.kill_all(hosts.host_cgroup(lab, host))
    lab.state.holders.pop(host.name, None)
    lab.save()


def crash(lab: Lab, node: Host, part: str) -> None:
    """SIGKILL one process of a node."""
    pids = hosts.find(lab, node, CRASH_TARGETS[part])
    if not pids:
        raise StackError(f"no {part} runs on {node.name}")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def create(directory: Path, state: LabState) -> Lab:
    """Take a directory for a new lab, or go on with the one that lives there."""
    if (directory / STATE_FILE).exists():
        return Lab.load(directory)
    if directory.exists() and any(directory.iterdir()):
        raise UsageError(f"{directory} is not empty and holds no lab", hint="name another --dir")
    if not 1 <= state.nodes <= NODES_MAX or not 1 <= state.servers <= SERVERS_MAX:
        raise UsageError(f"a lab has 1..{NODES_MAX} nodes and 1..{SERVERS_MAX} storage hosts")
    directory.mkdir(parents=True, exist_ok=True)
    lab = Lab(directory, state)
    lab.save()
    return lab


def down(directory: Path) -> bool:
    """Remove a lab: processes, mounts, namespaces, directory. False when there was none."""
    lab = Lab(directory, LabState(0, 0, "", ""))
    existed = bool((directory / STATE_FILE).exists() or network.namespaces(lab.tag))
    try:
        hosts.remove_group(lab.tag)
    finally:  # what is left of a lab must not keep the rest of it
        network.destroy(lab.tag)
    if (directory / STATE_FILE).exists():
        shutil.rmtree(directory)
    return existed


def status(lab: Lab) -> dict[str, Any]:
    """Hosts, cables, processes and mounts of a lab as plain data."""
    rows = []
    for host in lab.hosts:
        on = hosts.holder_pid(lab, host) is not None
        frozen = on and hosts.is_frozen(lab, host)
        row: dict[str, Any] = {
            "name": host.name,
            "kind": host.kind,
            "power": "on" if on else "off",
            "paused": frozen,
            "networks": network.cables(lab, host),
            "processes": len(hosts.processes(lab, host)) if on else 0,
        }
        if host.kind == "node":
            row["mounted"] = on and hosts.mount_point_in_use(lab, host)
            answer = member_status(lab, host)
            row["quorate"] = bool(answer and answer["quorate"])
            row["epoch"] = answer["epoch"] if answer else None
        rows.append(row)
    return {"directory": str(lab.directory), "profile": lab.state.profile, "hosts": rows}
