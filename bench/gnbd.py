"""`python -m bench.gnbd`: our block server beside nbdkit and qemu-nbd, same file, in turns.

All three serve one file of the page cache over Unix sockets. Every job runs ROUNDS times against
each server, one after the other; the table has medians, the spread (smallest to largest) and the
ratio to the better of the other two.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import trio

from bench.gnbd_client import rate
from gnbd import protocol as p
from tests.gnbd.harness import GnbdServer, export_toml, instance, member
from tests.gnbd.raw import RawClient
from tests.gnbd.test_client_io import opened

SIZE_MIB = 512
RUNTIME_S = 1.2
FENCES = 50
WRITES, CONNECTIONS = 64, 8
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


def fio(uri: str, rw: str, size: str, depth: int) -> tuple[float, int]:
    """Rate (IOPS, or MiB/s for large requests), and how many requests there were."""
    done = subprocess.run(
        ["fio", "--output-format=json", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--rw={rw}",
         f"--bs={size}", f"--iodepth={depth}", f"--size={SIZE_MIB}M", "--time_based",
         f"--runtime={RUNTIME_S}", "--norandommap", "--randrepeat=0"],
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


def our_client(server: GnbdServer, plain: str, rounds: int) -> Samples:
    """Our client on a cluster export beside fio's engine on a plain one, same server."""
    found: Samples = {}

    async def measured(kind: str, size_bytes: int, depth: int) -> float:
        async with opened(server, export="own") as device:
            return await rate(device, kind, size_bytes, depth, RUNTIME_S)

    for _ in range(rounds):
        for job in list(JOBS)[2:]:
            rw, size, depth, _aim = JOBS[job]
            pair = found.setdefault(job, {"ours": [], "fio": []})
            size_bytes = (1 << 20) if size == "1M" else 4096
            value = trio.run(measured, rw, size_bytes, depth)
            pair["ours"].append(value if size == "1M" else value * (1 << 20) / 4096)
            pair["fio"].append(fio(plain, rw, size, depth)[0])
    return found


def fences(server: GnbdServer) -> list[float]:
    """Milliseconds from asking until the victim's writes can no longer happen: it has 64 under way
    on 8 connections."""
    found = []
    os.sync()  # what the jobs before have left is not the victim's
    for number in range(10, FENCES + 10):
        victim = instance(number)
        keeper = member(2, (1,), 2)
        server.install(2 * number + 10, member(1, (number,), number + 1), keeper, node=2)
        with ExitStack() as stack:
            clients = []
            for path in range(CONNECTIONS):
                client = stack.enter_context(RawClient(server))
                assert client.login(victim, "own", path=path).status == "ok"
                client.go("own")
                clients.append(client)
            for client in clients:
                for index in range(WRITES // CONNECTIONS):
                    client.send(p.CMD_WRITE, index * 4096, bytes(4096))
            begin = time.monotonic()
            server.install(2 * number + 11, member(1, (), number + 1), keeper, node=2)
            found.append((time.monotonic() - begin) * 1000)
    return sorted(found)


def row(name: str, by: dict[str, list[float]], aim: float, less: bool = False) -> list[str]:
    """One line: medians with spread, and our ratio to the best of the others."""
    medians = {key: statistics.median(values) for key, values in by.items()}
    ours = medians.pop("ours")
    best = min(medians.values()) if less else max(medians.values())
    cells = [_spread(values) for values in by.values()]
    return [name, *cells, f"{ours / best:.2f}", f"{'≤' if less else '≥'} {aim}"]


def _spread(values: list[float]) -> str:
    digits = 1 if max(values) < 100 else 0
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({least:.{digits}f}-{most:.{digits}f})"


def table(columns: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def measure(directory: Path, rounds: int, say: Callable[[str], None]) -> str:
    """All of it, as text."""
    disk = directory / "disk"
    disk.write_bytes(os.urandom(1 << 20) * SIZE_MIB)
    sockets = {name: directory / f"{name}.sock" for name in ("ours", "nbdkit", "qemu")}
    server = GnbdServer(
        directory,
        export_toml("disk", disk, size=f"{SIZE_MIB}M")
        + export_toml("own", directory / "own", access="cluster", size=f"{SIZE_MIB}M"),
    )
    (directory / "own").write_bytes(disk.read_bytes())
    server.head = f'unix_sockets = ["{sockets["ours"]}"]\n'
    server.join()
    server.start()
    assert server.process is not None
    try:
        with (
            foreign(["nbdkit", "-f", "-U", str(sockets["nbdkit"]), "file", str(disk)],
                    sockets["nbdkit"]) as nbdkit,
            foreign(["qemu-nbd", "-t", "-e", "16", "-k", str(sockets["qemu"]), "--image-opts",
                     f"driver=raw,file.driver=file,file.locking=off,file.filename={disk}"],
                    sockets["qemu"]) as qemu,
        ):  # fmt: skip
            plain = f"nbd+unix:///disk?socket={sockets['ours']}"
            peers = {"ours": Peer(plain, server.process.pid), "nbdkit": nbdkit, "qemu-nbd": qemu}
            say("servers")
            rates, costs = compare(peers, rounds)
        lines = [row(job, by, JOBS[job][3] if job in JOBS else 1.0) for job, by in rates.items()]
        lines += [row(job, by, 0.7, less=True) for job, by in costs.items()]
        text = table(["figure", *peers, "ratio to the better", "aim"], lines)
        say("client")
        server.install(1, member(1, (1, 2), 3))
        tcp = f"{server.uri}/disk"
        ours = our_client(server, tcp, rounds)
        lines = [row(job, by, 1.0) for job, by in ours.items()]
        columns = ["figure over TCP", "our client", "fio's nbd engine", "ratio", "aim"]
        text += "\n\n" + table(columns, lines)
        say("fence")
        took = fences(server)
        text += f"\n\nFence of a node with {WRITES} writes under way on {CONNECTIONS} connections "
        text += f"({FENCES} times): p50 {statistics.median(took):.1f} ms, p99 "
        return text + f"{took[math.ceil(0.99 * len(took)) - 1]:.1f} ms; aim p99 ≤ 20 ms."
    finally:
        server.stop()


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(rounds: int) -> None:
    """Measure, print the tables."""
    with tempfile.TemporaryDirectory(prefix="gnbd-bench-", dir="/var/tmp") as directory:
        print(measure(Path(directory), rounds, lambda what: print(what, file=sys.stderr)))


if __name__ == "__main__":
    main()
