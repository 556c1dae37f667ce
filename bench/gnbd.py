"""`python -m bench.gnbd`: our block server beside nbdkit and qemu-nbd, same file, in turns.

All three serve one file of the page cache over Unix sockets. Every job runs ROUNDS times against
each server, one after the other; the table has medians, the spread (smallest to largest) and the
ratio to the better of the other two.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import trio

from bench.gnbd_client import rate
from bench.gnbd_cost import costs, percent
from bench.gnbd_faults import CONNECTIONS, CUTS, FENCES, PATH_MS, WRITES, fences, path_cuts
from bench.gnbd_integrity import cost as integrity_cost
from bench.gnbd_peers import JOBS, RUNTIME_S, SIZE_MIB, Peer, Samples, compare, fio, foreign
from gnbd.client.retained import RETAINED_BYTES_MAX
from lab.block_server import GnbdServer, export_toml, instance, member, opened


def our_client(server: GnbdServer, plain: str, rounds: int) -> Samples:
    """Our client on a cluster export beside fio's engine on a plain one, same server. Ours may not
    write for long without a FLUSH (gnbd.client.retained); fio is measured with as many and with
    none."""
    found: Samples = {}

    async def measured(kind: str, size_bytes: int, depth: int) -> float:
        async with opened(server, instance(1), "own") as device:
            return await rate(device, kind, size_bytes, depth, RUNTIME_S)

    for _ in range(rounds):
        for job in list(JOBS)[2:]:
            rw, size, depth, _aim = JOBS[job]
            pair = found.setdefault(job, {"ours": [], "fio": []})
            size_bytes = (1 << 20) if size == "1M" else 4096
            value = trio.run(measured, rw, size_bytes, depth)
            pair["ours"].append(value if size == "1M" else value * (1 << 20) / 4096)
            pair["fio"].append(fio(plain, rw, size, depth)[0])
            if "write" in rw:
                pair = found.setdefault(f"{job}, as many flushes", {"ours": [], "fio": []})
                pair["ours"].append(found[job]["ours"][-1])
                often = RETAINED_BYTES_MAX // 2 // size_bytes
                pair["fio"].append(fio(plain, rw, size, depth, often)[0])
    return found


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


def _tail(sorted_ms: list[float]) -> str:
    p99 = sorted_ms[math.ceil(0.99 * len(sorted_ms)) - 1]
    return f"p50 {statistics.median(sorted_ms):.1f} ms, p99 {p99:.1f} ms"


def cost_table(found: dict[str, dict[str, list[float]]]) -> str:
    """What LOGIN and a reservation cost, in the server's processor time."""
    lines = [
        [job, *(_spread(pair[name]) for name in ("with", "without")), f"{percent(pair):+.1f} %",
         "≤ 2 %"]
        for job, pair in found.items()
    ]  # fmt: skip
    head = ["server's µs of processor per request", "login, reservation", "neither", "cost", "aim"]
    return table(head, lines)


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
            rates, processor = compare(peers, rounds)
        lines = [row(job, by, JOBS[job][3] if job in JOBS else 1.0) for job, by in rates.items()]
        lines += [row(job, by, 0.7, less=True) for job, by in processor.items()]
        text = table(["figure", *peers, "ratio to the better", "aim"], lines)
        say("client")
        server.install(1, member(1, (1, 2), 3))
        tcp = f"{server.uri}/disk"
        ours = our_client(server, tcp, rounds)
        lines = [row(job, by, 1.0) for job, by in ours.items()]
        columns = ["figure over TCP", "our client", "fio's nbd engine", "ratio", "aim"]
        text += "\n\n" + table(columns, lines)
        say("cost")
        text += "\n\n" + cost_table(costs(server, "disk", "own", SIZE_MIB << 20, rounds, 3))
        say("fence")
        took = fences(server, "own", 10)
        text += f"\n\nFence of a node with {WRITES} writes under way on {CONNECTIONS} connections "
        text += f"({FENCES} times): {_tail(took)}; aim p99 ≤ 20 ms."
    finally:
        server.stop()
    say("paths")
    cuts = path_cuts(directory / "paths")
    text += f"\n\nLongest write of a client when one of two networks goes silent ({CUTS} times, "
    text += f"path_ms {PATH_MS}, no error): {_tail(cuts)}; aim ≤ 300 ms.\n\n"
    say("integrity")
    text += integrity_cost(directory / "integrity", rounds) + "\n\n"
    return text + "From end to end, through a mount: `python -m bench --only throughput`."


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
def main(rounds: int) -> None:
    """Measure, print the tables."""
    with tempfile.TemporaryDirectory(prefix="gnbd-bench-", dir="/var/tmp") as directory:
        print(measure(Path(directory), rounds, lambda what: print(what, file=sys.stderr)))


if __name__ == "__main__":
    main()
