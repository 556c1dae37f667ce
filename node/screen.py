"""Plain-text screens of clusterctl: columns that fit their content; colour only on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from node.waiting import waiting_lines

_GOOD = ("member", "up", "yes", "quorate")
_BAD = ("down", "suspect", "no", "NOT quorate")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Left-aligned columns, two spaces apart."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [
        max(len(line[column]) for line in ([*header], *texts)) for column in range(len(header))
    ]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in ([*header], *texts)
    ]


def _paint(text: str, color: bool) -> str:
    if not color:
        return text
    for words, code in ((_BAD, "31"), (_GOOD, "32")):
        if text in words:
            return f"\x1b[{code}m{text}\x1b[0m"
    return text


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def nodes_text(rows: Sequence[dict[str, Any]]) -> str:
    """clusterctl nodes."""
    cells = [
        (
            row["id"],
            row["name"] + (" *" if row["local"] else ""),
            row["state"],
            _yes(row["voter"]),
            row["incarnation"] if row["incarnation"] is not None else "-",
            len(row["instances"]),
            "  ".join(
                f"{address} {state}"
                for address, state in zip(row["addresses"], row["networks"], strict=False)
            ),
        )
        for row in rows
    ]
    header = ("ID", "NODE", "STATE", "VOTER", "LIFE", "INSTANCES", "NETWORKS")
    return "\n".join(table(header, cells))


def status_text(status: dict[str, Any], *, color: bool) -> str:
    """clusterctl status: one screen."""
    cluster, node = status["cluster"], status["node"]
    quorum = _paint("quorate" if status["quorate"] else "NOT quorate", color)
    voters = status["voters"]
    heard = sum(1 for voter in voters if voter["heard"])
    lines = [
        f"cluster {cluster['name']} ({cluster['profile']})   {quorum}, "
        f"{heard} of {len(voters)} voters   view {status['epoch']}, "
        f"{len(status['members'])} of {len(status['nodes'])} nodes",
        f"this is {node['name']}, life {node['incarnation']}, "
        + ("a member" if node["admitted"] else "NOT a member"),
        "",
        nodes_text(status["nodes"]),
    ]
    if status["problems"]:
        lines += ["", *(f"PROBLEM: {text}" for text in status["problems"])]
    if status["servers"]:
        rows = [
            (
                server["id"], server["name"], "up" if server["up"] else "down",
                _yes(server["installed"]), _yes(server["voter"]),
                " ".join(server["addresses"]), server["problem"],
            )
            for server in status["servers"]
        ]  # fmt: skip
        header = ("ID", "SERVER", "STATE", "INSTALLED", "VOTER", "ADDRESSES", "")
        lines += ["", *table(header, rows)]
    if status["instances"]:
        instances = [
            (one["number"], one["kind"], one["title"], one["mountpoint"], " ".join(one["volumes"]))
            for one in status["instances"]
        ]
        lines += ["", *table(("NO", "INSTANCE", "TITLE", "MOUNTPOINT", "VOLUMES"), instances)]
    lost = [row for row in status["mounts"] if row["instance"] is None]
    if lost:
        missing = [(row["mountpoint"], row["volume"], row["problem"] or "soon") for row in lost]
        lines += ["", *table(("NOT MOUNTED", "VOLUME", "WHY"), missing)]
    if status["waiting"]:
        lines += ["", *waiting_lines(status["waiting"])]
    if status["volume_groups"]:
        names = ", ".join(f"{vg['name']} ({vg['sequence']})" for vg in status["volume_groups"])
        lines += ["", f"volume groups: {names}"]
    if status["fences"]:
        lines += ["", fences_text(status["fences"][-3:])]
    return "\n".join(lines)


def mounts_text(rows: Sequence[dict[str, Any]]) -> str:
    """clusterctl mounts."""
    if not rows:
        return "no mounts are remembered on this node"
    cells = [
        (
            row["mountpoint"], row["volume"], ",".join(row["options"]) or "-",
            "lost" if row["instance"] is None else "mounted", row["problem"],
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join(table(("MOUNTPOINT", "VOLUME", "OPTIONS", "STATE", ""), cells))


def fences_text(rows: Sequence[dict[str, Any]]) -> str:
    """Who was put out (clusterctl status)."""
    if not rows:
        return "nobody was put out"
    cells = [
        (
            row["epoch"], row["name"], row["incarnation"],
            "whole node" if row["instance"] is None else f"instance {row['instance']}",
            row["reason"],
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join(table(("VIEW", "PUT OUT", "LIFE", "WHAT", "WHY"), cells))


def events_line(record: dict[str, Any]) -> str:
    """One event for people."""
    wall_ms = record["wall_ms"]
    clock = f"{datetime.fromtimestamp(wall_ms / 1000):%H:%M:%S}"
    fields = " ".join(f"{key}={value}" for key, value in record["fields"].items())
    return f"{clock}.{wall_ms % 1000:03d} {record['event']:<18} {record['text']}  {fields}".rstrip()
