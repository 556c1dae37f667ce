"""4 KiB write + fsync, one after another: over blocks that the file has, and at its end."""

from __future__ import annotations

from bench import empty, xfs
from bench.clients import here, on
from lab import hosts
from lab.topology import MOUNT_POINT, Lab

COUNT = 1000
WAYS = ("overwrite", "append")


def run(lab: Lab) -> dict:
    """Pairs a second, and how long one takes in microseconds."""
    node = lab.nodes[0]
    result: dict = {"one node": {}, "empty pyfuse3": {}, "xfs": {}}
    for way in WAYS:
        path = f"{MOUNT_POINT}/bench-sync-{way}"
        result["one node"][way] = on(lab, node, "fsync", path, str(COUNT), way)
        hosts.run(lab, node, "rm", path)
    with empty.mounted(lab, node) as top:
        result["empty pyfuse3"]["overwrite"] = on(
            lab, node, "fsync", f"{top}/f", str(COUNT), "overwrite"
        )
    with xfs.mounted(lab) as top:
        for way in WAYS:
            result["xfs"][way] = here(lab, "fsync", f"{top}/{way}", str(COUNT), way)
    return result


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["4 KiB write + fsync", "per second", "p50 µs", "p99 µs", "aim"]
    table = []
    for target, ways in result.items():
        for way, found in ways.items():
            aim = ">= 800" if target == "one node" else ""
            figures = [str(round(found[key])) for key in ("rate", "p50_us", "p99_us")]
            table.append([f"{target}, {way}", *figures, aim])
    return columns, table
