"""Servers beside each other, and what fio and nbdcopy get out of them."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE_MIB = 512
RUNTIME_S = 1.2
JOBS = {
    "4 KiB random read QD1, IOPS": ("randread", "4k", 1, 1.0),
    "4 KiB random write QD1, IOPS": ("randwrite", "4k", 1, 1.0),
    "4 KiB random read QD32, IOPS": ("randread", "4k", 32, 1.2),
    "4 KiB random write QD32, IOPS": ("randwrite", "4k", 32, 1.2),
    "1 MiB read QD8, MiB/s": ("read", "1M", 8, 1.2),
    "1 MiB write QD8, MiB/s": ("write", "1M", 8, 1.2),
}
Samples = dict[str, dict[str, list[float]]]


class Peer:
    """One server process: where it listens, and the processor time it has used."""

    def __init__(self, uri: str, pid: int) -> None:
        self.uri = uri
        self.pid = pid

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def foreign(command: list[str], path: Path) -> Iterator[Peer]:
    """Somebody else's server on a Unix socket."""
    process = subprocess.Popen(command)
    try:
        while not path.exists():
            assert process.poll() is None, command
            time.sleep(0.01)
        yield Peer(f"nbd+unix:///?socket={path}", process.pid)
    finally:
        process.terminate()
        process.wait()


def fio(uri: str, rw: str, size: str, depth: int, writes_per_flush: int = 0) -> tuple[float, int]:
    """Rate (IOPS, or MiB/s for large requests), and how many requests there were."""
    done = subprocess.run(
        ["fio", "--output-format=json", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}",
         f"--bs={size}", f"--iodepth={depth}", f"--size={SIZE_MIB}M", "--time_based",
         f"--runtime={RUNTIME_S}", "--norandommap", "--randrepeat=0",
         f"--fsync={writes_per_flush}"],
        check=True, capture_output=True, text=True, cwd=tempfile.gettempdir(),
    )  # fmt: skip
    side = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = side["read" if "read" in rw else "write"]
    return side["bw_bytes"] / (1 << 20) if size == "1M" else side["iops"], side["total_ios"]


def compare(peers: dict[str, Peer], rounds: int) -> tuple[Samples, Samples]:
    """Rates of the jobs, and processor time per request of those with QD32."""
    rates: Samples = {job: {name: [] for name in peers} for job in JOBS}
    costs: Samples = {}
    copies: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(rounds):
        for job, (rw, size, depth, _aim) in JOBS.items():
            for name, peer in peers.items():
                before = peer.cpu_s()
                value, requests = fio(peer.uri, rw, size, depth)
                rates[job][name].append(value)
                if depth == 32:
                    cost = (peer.cpu_s() - before) / requests * 1e6
                    key = f"server's µs of processor per request, {rw} QD32"
                    costs.setdefault(key, {n: [] for n in peers})[name].append(cost)
        for name, peer in peers.items():
            begin = time.monotonic()
            copy = ["nbdcopy", "--connections=4", "--requests=64", peer.uri, "null:"]
            subprocess.run(copy, check=True)
            copies[name].append(SIZE_MIB / (time.monotonic() - begin))
    rates["nbdcopy, 4 connections, MiB/s"] = copies
    return rates, costs
