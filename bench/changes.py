"""How soon another node sees a change: from the return of the write on one node until the first
read of another, which is told at that moment, has returned with it."""

from __future__ import annotations

import os

from bench.clients import on_all
from lab import hosts
from lab.topology import MOUNT_POINT, Lab

CHANGES = 300
WAYS = {"data": "read", "size": "stat", "name": "stat"}


def run(lab: Lab) -> dict:
    """Microseconds: p50, p99, max; by what was changed."""
    first, second = lab.nodes[0], lab.nodes[1]
    result = {}
    for way in WAYS:
        fifos = [lab.directory / name for name in ("bench-fifo", "bench-fifo-back")]
        for fifo in fifos:
            os.mkfifo(fifo)
        path = f"{MOUNT_POINT}/bench-change-{way}"
        try:
            words = [path, str(CHANGES), str(fifos[0]), way]
            result[way] = on_all(lab, [(first, ["change", *words]), (second, ["watch", *words])])[1]
        finally:
            for fifo in fifos:
                fifo.unlink()
        hosts.run(lab, first, "sh", "-c", f"rm -f {path}*")
    return result


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["change seen by another node", "p50 ms", "p99 ms", "max ms", "aim"]
    table = []
    for way, found in result.items():
        figures = [f"{found[key] / 1000:.2f}" for key in ("p50_us", "p99_us", "max_us")]
        table.append([f"{way} ({WAYS[way]})", *figures, "p50 <= 2, p99 <= 20"])
    return columns, table
