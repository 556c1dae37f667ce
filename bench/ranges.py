"""Byte-range locks handed round between processes, as ping_pong of ctdb does: on one mount, on two,
on three; and with a counter behind each byte that is checked."""

from __future__ import annotations

from bench.clients import on_all
from lab import hosts
from lab.topology import MOUNT_POINT, Host, Lab

SECONDS = 5
AIM = 3000


def run(lab: Lab) -> dict:
    """Locks that were taken from somebody else, per second and in all; what was lost."""
    first, second, third = lab.nodes[:3]
    places = {
        "one mount, two processes": [first, first],
        "two mounts": [first, second],
        "three mounts": [first, second, third],
    }
    result = {name: _ping_pong(lab, nodes, "locks") for name, nodes in places.items()}
    result["two mounts, data behind the locks"] = _ping_pong(lab, [first, second], "data")
    return result


def _ping_pong(lab: Lab, nodes: list[Host], what: str) -> dict:
    path = f"{MOUNT_POINT}/bench-ping-pong"
    count = len(nodes)
    hosts.run(lab, nodes[0], "truncate", "-s", str(8 * (count + 1)), path)
    words = ["pingpong", path, str(count), str(SECONDS), what]
    found = on_all(lab, [(node, words) for node in nodes])
    data = hosts.run(lab, nodes[-1], "od", "-An", "-v", "-tx8", "-w8", path).stdout.split()
    written = sum(int(one, 16) for one in data[: count + 1])
    hosts.run(lab, nodes[0], "rm", path)
    taken = sum(one["count"] for one in found)
    return {
        "rate": sum(one["rate"] for one in found),
        "count": taken,
        "wrong": sum(one["wrong"] for one in found) + (taken - written if what == "data" else 0),
    }


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["ping-pong of byte ranges", "hand-overs/s", "of one mount", "wrong", "aim"]
    alone = result["one mount, two processes"]["rate"]
    table = []
    for name, found in result.items():
        aim = f">= {AIM}" if name == "two mounts" else ""
        ratio = f"{found['rate'] / alone:.3f}"
        table.append([name, f"{found['rate']:.0f}", ratio, str(found["wrong"]), aim])
    return columns, table
