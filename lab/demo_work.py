"""Steps of the demonstration: the cluster at work."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from cluster.errors import StackError
from lab import cluster, hosts
from lab.report import Reporter
from lab.topology import MOUNT_POINT, VOLUME, Host, Lab

Results = list[tuple[str, str]]
PROGRAM = [sys.executable, "-m", "lab.programs"]
WORK = f"{MOUNT_POINT}/demo"
APPEND_RECORDS = 40
BIG_FILE_MIB = 1024
GIT = (
    "git",
    "-c",
    "user.name=demo",
    "-c",
    "user.email=demo@example.org",
    "-c",
    "gc.auto=0",
    "-c",
    "safe.directory=*",
    "-C",
    f"{WORK}/tree",
)


def last_json(output: str) -> dict[str, Any]:
    """The last JSON line that a program printed."""
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise StackError(f"no JSON in: {output[-500:]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def program(lab: Lab, host: Host, *argv: str, timeout_s: float = 600) -> dict[str, Any]:
    """Run one of our client programs on a node; raises StackError when it fails."""
    result = hosts.run(lab, host, *PROGRAM, *argv, timeout_s=timeout_s)
    return last_json(result.stdout)


def all_at_once(
    lab: Lab, commands: Sequence[tuple[Host, list[str]]], timeout_s: float
) -> list[str]:
    """Start commands on several hosts together; returns their outputs. Raises when one fails."""
    running = [
        (host, argv, hosts.popen(lab, host, *argv, stdout=subprocess.PIPE))
        for host, argv in commands
    ]
    deadline = time.monotonic() + timeout_s
    outputs = []
    try:
        for host, argv, process in running:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            if process.returncode != 0:
                text = f"{host.name}: {' '.join(argv)[:120]}: exit {process.returncode}: "
                raise StackError(text + output[-1500:])
            outputs.append(output)
    except subprocess.TimeoutExpired as error:
        raise StackError(f"did not end within {timeout_s:.0f} s: {error.cmd}") from None
    finally:
        for _host, _argv, process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    return outputs


def free_and_size(lab: Lab, node: Host) -> tuple[int, int]:
    """(size, free) of the file system in bytes as `df` sees them on a node."""
    result = hosts.run(lab, node, "df", "-B1", "--output=size,avail", MOUNT_POINT)
    size, free = result.stdout.splitlines()[1].split()
    return int(size), int(free)


def bring_up(lab: Lab, report: Reporter) -> Results:
    """Step 1."""
    begin = time.monotonic()
    cluster.up(lab, report.say)
    seconds = time.monotonic() - begin
    first = lab.nodes[0]
    for argv in (("clusterctl", "status"), ("cvmctl", "status")):
        report.text(f"{first.name}: {' '.join(argv)}", hosts.run(lab, first, *argv).stdout)
    for node in lab.nodes:
        report.text(f"{node.name}: df -h", hosts.run(lab, node, "df", "-h", MOUNT_POINT).stdout)
    hosts.run(lab, first, "rm", "-rf", WORK, timeout_s=300)
    hosts.run(lab, first, "mkdir", WORK)
    return [
        (f"{len(lab.nodes)} nodes, {len(lab.servers)} storage hosts, mounted", f"{seconds:.1f} s")
    ]


def real_work(lab: Lab, report: Reporter) -> Results:
    """Step 2."""
    return [*_tree(lab, report), *_git(lab, report), *_append(lab, report), *_big(lab, report)]


def _tree(lab: Lab, report: Reporter) -> Results:
    first, *others = lab.nodes
    tar = "/var/lib/cfs/tree.tar"
    packed = program(lab, first, "pack", tar)
    report.say(f"{first.name} unpacks a source tree of {packed['files']} files")
    begin = time.monotonic()
    hosts.run(lab, first, "tar", "-C", WORK, "-xf", tar, timeout_s=600)
    seconds = time.monotonic() - begin
    hosts.run(lab, first, "sh", "-c", f"mkdir -p /run/ref && tar -C /run/ref -xf {tar}")
    wanted = program(lab, first, "manifest", "/run/ref/tree")
    hosts.run(lab, first, "rm", "-rf", "/run/ref")
    report.say(f"{', '.join(n.name for n in others)} compare it file by file")
    commands = [(node, [*PROGRAM, "manifest", f"{WORK}/tree"]) for node in others]
    for output in all_at_once(lab, commands, 600):
        if last_json(output) != wanted:
            raise StackError(f"the tree differs: {last_json(output)}, not {wanted}")
    rate = packed["files"] / seconds
    return [(f"{packed['files']} files unpacked on n1, equal on n2 and n3", f"{rate:.0f} files/s")]


def _git(lab: Lab, report: Reporter) -> Results:
    second, third = lab.nodes[1], lab.nodes[2]
    report.say(f"{second.name} commits the tree with git; {third.name} checks it")
    begin = time.monotonic()
    for argv in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "the tree")):
        hosts.run(lab, second, *GIT, *argv, timeout_s=900)
    seconds = time.monotonic() - begin
    hosts.run(lab, third, *GIT, "fsck", "--full", "--strict", timeout_s=600)
    status = hosts.run(lab, third, *GIT, "status", "--porcelain", timeout_s=600)
    if status.stdout.strip():
        raise StackError(f"git status on {third.name} is not clean: {status.stdout[:500]}")
    return [("git init, add, commit on n2; fsck and status on n3", f"clean, {seconds:.0f} s")]


def _append(lab: Lab, report: Reporter) -> Results:
    path = f"{WORK}/appended"
    report.say("all nodes append records of up to 1 MiB to one file")
    count = str(APPEND_RECORDS)
    commands = [
        (node, [*PROGRAM, "append", path, "--writer", str(node.index), "--count", count])
        for node in lab.nodes
    ]
    all_at_once(lab, commands, 300)
    check = ["check-append", path, "--writers", str(len(lab.nodes)), "--count", count]
    for node in lab.nodes:
        program(lab, node, *check)
    total = APPEND_RECORDS * len(lab.nodes)
    return [("O_APPEND from all nodes at once", f"{total} of {total} records whole")]


def _big(lab: Lab, report: Reporter) -> Results:
    path = f"{WORK}/big"
    report.say(f"n1 writes a file of {BIG_FILE_MIB} MiB with checksums; the others read it")
    write = program(lab, lab.nodes[0], "big-write", path, "--mib", str(BIG_FILE_MIB))
    commands = [
        (node, [*PROGRAM, "big-read", path, "--mib", str(BIG_FILE_MIB)]) for node in lab.nodes[1:]
    ]
    rates = [last_json(output)["mib_per_s"] for output in all_at_once(lab, commands, 600)]
    hosts.run(lab, lab.nodes[0], "rm", path)
    text = f"written {write['mib_per_s']} MiB/s, read {' and '.join(map(str, rates))} MiB/s"
    return [(f"{BIG_FILE_MIB} MiB file, every block right", text)]


FIO_COMMON = [
    "fio",
    "--output-format=json",
    "--ioengine=psync",
    "--end_fsync=1",
    "--verify=crc32c",
    "--verify_fatal=1",
    "--randrepeat=1",
    "--verify_state_save=0",
    "--allrandrepeat=1",
]
FIO_JOBS = {
    "1M sequential write": ["--rw=write", "--bs=1M", "--size=128M", "--do_verify=0"],
    "4k random write": ["--rw=randwrite", "--bs=4k", "--size=16M", "--do_verify=0"],
}
FIO_CHECKS = {
    "1M sequential read": ["--rw=write", "--bs=1M", "--size=128M", "--verify_only=1"],
    "4k random read": ["--rw=randwrite", "--bs=4k", "--size=16M", "--verify_only=1"],
}


def _fio(lab: Lab, name: str, options: list[str], shift: int) -> list[list[str]]:
    """One job on every node at once; node i works on the file of node i + shift."""
    kind = "seq" if "1M" in name else "rand"
    commands = []
    for node in lab.nodes:
        owner = lab.nodes[(node.index - 1 + shift) % len(lab.nodes)]
        file = f"--filename={WORK}/fio-{kind}-{owner.name}"
        commands.append((node, [*FIO_COMMON, f"--name={kind}", file, *options]))
    rows = []
    for node, output in zip(lab.nodes, all_at_once(lab, commands, 600), strict=True):
        job = json.loads(output[output.index("{") :])["jobs"][0]
        side = job["read"] if "read" in name else job["write"]
        mib = side["bw_bytes"] / (1 << 20)
        latency = side["clat_ns"]["mean"] / 1e6
        rows.append([name, node.name, f"{mib:.1f}", f"{side['iops']:.0f}", f"{latency:.2f}"])
    return rows


def fio_everywhere(lab: Lab, report: Reporter) -> Results:
    """Step 3."""
    rows: list[list[str]] = []
    for name, options in FIO_JOBS.items():
        report.say(f"fio on every node: {name}")
        rows += _fio(lab, name, options, shift=0)
    for name, options in FIO_CHECKS.items():
        report.say(f"fio: every node reads and verifies what another wrote: {name}")
        rows += _fio(lab, name, options, shift=1)
    report.table("fio, all nodes at once", ["job", "node", "MiB/s", "IOPS", "mean ms"], rows)
    return [("fio with verify=crc32c on all mounts, cross-checked", "no error")]


def grow(lab: Lab, report: Reporter) -> Results:
    """Step 4."""
    before = free_and_size(lab, lab.nodes[0])[0]
    running = []
    for node in lab.nodes:
        argv = [
            *FIO_COMMON,
            "--name=during",
            "--rw=randwrite",
            "--bs=16k",
            "--size=16M",
            "--time_based",
            "--runtime=8",
            f"--filename={WORK}/during-{node.name}",
        ]
        running.append((node, argv))
    report.say("fio runs on every node; the volume and the file system grow under it")
    processes = [hosts.popen(lab, n, *argv, stdout=subprocess.PIPE) for n, argv in running]
    try:
        extended = hosts.run(lab, lab.nodes[1], "cvmctl", "lvextend", "-L", "+512M", VOLUME)
        report.text(f"n2: cvmctl lvextend -L +512M {VOLUME}", extended.stdout)
        hosts.run(lab, lab.nodes[2], "cfsctl", "grow", MOUNT_POINT)
        sizes = {}
        for node in lab.nodes:
            hosts.wait_for(
                lambda node=node: free_and_size(lab, node)[0] > before,  # type: ignore[misc]
                20.0,
                f"df on {node.name} shows the new size",
            )
            sizes[node.name] = free_and_size(lab, node)[0]
        for (node, _argv), process in zip(running, processes, strict=True):
            output, _ = process.communicate(timeout=120)
            if process.returncode != 0:
                raise StackError(f"fio on {node.name} failed while growing: {output[-800:]}")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    if len(set(sizes.values())) != 1:
        raise StackError(f"the nodes disagree about the size: {sizes}")
    gained = (next(iter(sizes.values())) - before) >> 20
    return [
        ("volume and file system grown while mounted, fio goes on", f"+{gained} MiB on all nodes")
    ]


def check_and_remount(lab: Lab, report: Reporter) -> Results:
    """What all nodes wrote is whole."""
    for node in lab.nodes:
        cluster.unmount(lab, node)
    checked = hosts.run(lab, lab.nodes[0], "fsck.cfs", VOLUME, check=False, timeout_s=600)
    report.text(f"n1: fsck.cfs {VOLUME}", checked.stdout + checked.stderr)
    if checked.returncode != 0:
        raise StackError(f"fsck.cfs found something: exit {checked.returncode}")
    for node in lab.nodes:
        cluster.mount(lab, node)
    hosts.run(lab, lab.nodes[2], "ls", WORK)
    return [("unmounted, fsck.cfs, mounted again", "clean")]
