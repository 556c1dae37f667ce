"""Plain-text screens of fencectl."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from node.screen import fences_text, table

_VERDICTS = {"proven": "proven", "failed": "FAILED", "unknown": "NOT KNOWN", "": "-"}


def fence_status_text(status: dict[str, Any]) -> str:
    """fencectl status."""
    missing = ", ".join(status["missing"]) or "none"
    levels = "; ".join(
        f"{number}: {' and '.join(level)}" for number, level in enumerate(status["levels"], 1)
    )
    lines = [
        f"epoch {status['epoch']}; servers that have not installed it: {missing}",
        f"levels of methods: {levels}",
    ]
    if status["under_way"]:
        lines.append(f"being fenced: {', '.join(status['under_way'])}")
    if status["held"]:
        lines.append(f"held out by an operator (fencectl unfence): {', '.join(status['held'])}")
    return "\n".join([*lines, fences_text(status["last"])])


def history_text(rows: Sequence[dict[str, Any]]) -> str:
    """fencectl history."""
    if not rows:
        return "nobody was put out"
    cells = [
        (
            row["epoch"], row["name"], row["incarnation"],
            "whole node" if row["instance"] is None else f"instance {row['instance']}",
            _VERDICTS[row["verdict"]] + (f" (level {row['level']})" if row["level"] else ""),
            row["reason"],
        )
        for row in rows
    ]  # fmt: skip
    return "\n".join(table(("VIEW", "PUT OUT", "LIFE", "WHAT", "METHODS", "WHY"), cells))


def keys_text(rows: Sequence[dict[str, Any]]) -> str:
    """fencectl keys: who is registered where."""
    cells: list[tuple[Any, ...]] = []
    for row in rows:
        if row["problem"]:
            cells.append((row["server"], "-", "-", "-", row["problem"]))
            continue
        found = [
            (row["server"], row["export"], "n{}.{}.{}".format(*one[0]), f"{one[1]:#x}",
             "holds" if one[2] else "")
            for one in row["registrations"]
        ]  # fmt: skip
        cells += found or [(row["server"], row["export"], "-", "-", "nobody is registered")]
    return "\n".join(table(("SERVER", "EXPORT", "WHO", "KEY", ""), cells))


def reservation_text(rows: Sequence[dict[str, Any]]) -> str:
    """fencectl reservation: what is held where."""
    cells: list[tuple[Any, ...]] = []
    for row in rows:
        if row["problem"]:
            cells.append((row["server"], "-", "-", "-", row["problem"]))
            continue
        held = f"{row['type']} {row['called']}"
        cells.append(
            (row["server"], row["export"], held, len(row["registrations"]),
             f"generation {row['generation']}")
        )  # fmt: skip
    return "\n".join(table(("SERVER", "EXPORT", "RESERVATION", "REGISTERED", ""), cells))


def explain_text(record: dict[str, Any]) -> str:
    """fencectl explain: everything about one fence on one screen."""
    clock = f"{datetime.fromtimestamp(record['wall_ms'] / 1000):%Y-%m-%d %H:%M:%S}"
    by = f", proposed by {record['proposed_by']}" if record["proposed_by"] else ""
    lines = [
        f"{record['name']} life {record['incarnation']} was put out by view {record['epoch']}"
        f" at {clock}: {record['reason'] or 'no reason was given'}{by}",
        "",
        f"what {record['seen_by']} saw:",
    ]
    for link in record["links"]:
        heard = "heartbeats came" if link["up"] else "NO heartbeats"
        lines.append(f"  network {link['network']}: {heard} for {_seconds(link['since_ms'])}")
    if not record["links"]:
        lines.append("  it was never heard in this life of clusterd")
    alive = "alive" if record["alive"] else "dead"
    lines.append(f"  in all it counted as {alive}")
    lines.append(f"  lease: {_lease(record['lease_ms'])}")
    lines += ["", *_methods(record), "", f"now: {_now(record)}"]
    return "\n".join(lines)


def _methods(record: dict[str, Any]) -> list[str]:
    if not record["verdict"]:
        return ["methods: being tried, or nobody has told how it went"]
    verdict = _VERDICTS[record["verdict"]]
    level = f" by level {record['level']}" if record["level"] else ""
    head = (
        f"methods, tried by {record['tried_by']}: {verdict}{level} after "
        f"{_seconds(record['took_ms'])}"
    )
    cells = [
        (
            one["level"], one["method"], one["number"], _seconds(one["began_ms"]),
            _seconds(one["took_ms"]), _VERDICTS[one["verdict"]], one["text"],
        )
        for one in record["attempts"]
    ]  # fmt: skip
    header = ("LEVEL", "METHOD", "TRY", "BEGAN", "TOOK", "", "HOW IT IS KNOWN")
    return [head, *("  " + line for line in table(header, cells))]


def _lease(lease_ms: int | None) -> str:
    if lease_ms is None:
        return "not known here"
    if lease_ms == 0:
        return "over, or its caches purged, when the view was decided"
    return f"no cached page of it could be shown later than {_seconds(lease_ms)} after the decision"


def _now(record: dict[str, Any]) -> str:
    if record["held"]:
        return f"held out until: fencectl unfence {record['name']}"
    if record["now"] is None:
        return "not a member"
    return f"a member again, life {record['now']}"


def _seconds(ms: int) -> str:
    return f"{ms} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
