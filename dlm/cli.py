"""dlmctl: what the lock manager does at the moment, and why something waits.

The local clusterd passes a question on to its instances (with `--all` to those of all nodes); each
answers for itself. `why` needs only one: that one asks all members of its lockspace.
Exit codes: docs/exit-codes.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from cluster import control_client_io
from cluster.errors import EXIT_FAILED, NotFoundError
from cluster.tool_cli import ToolGroup

Row = dict[str, Any]


def _ask(verb: str, params: Row) -> list[Row]:
    """The answers of the instances: a row per instance with `result` or `error`."""
    answer = control_client_io.call(f"dlm.{verb}", params)
    if isinstance(answer, list) and all(_is_row(row) for row in answer):
        return answer
    return [{"result": answer, "node": "", "title": ""}]


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and ("result" in row or "error" in row)


def _columns(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _options(function: Callable[..., None]) -> Callable[..., None]:
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
    return click.option("--all", "everywhere", is_flag=True, help="Ask the members on all nodes.")(
        function
    )


def _show(verb: str, params: Row, as_json: bool, text: Callable[[Sequence[Row]], str]) -> None:
    _print(_ask(verb, params), as_json, text)


def _print(rows: list[Row], as_json: bool, text: Callable[[Sequence[Row]], str]) -> None:
    if as_json:
        click.echo(json.dumps(rows))
    else:
        good = [row for row in rows if "result" in row]
        click.echo(text(good) if good else "no lockspace on this node")
    failed = [row for row in rows if "error" in row]
    for row in failed:
        click.echo(f"error: {row.get('node', '')} {row['error']['message']}", err=True)
    if failed:
        sys.exit(EXIT_FAILED)


@click.group(cls=ToolGroup, name="dlmctl")
def main() -> None:
    """The distributed lock manager."""


@main.command()
@_options
def spaces(everywhere: bool, as_json: bool) -> None:
    """Lockspaces and their members."""
    _show("spaces", {"all": everywhere}, as_json, spaces_text)


def spaces_text(rows: Sequence[Row]) -> str:
    """A line per member."""
    header = ("SPACE", "MEMBER", "NODE", "OF", "VIEW", "STATE", "CACHED", "MASTER OF", "DEAD")
    lines = []
    for row in rows:
        one = row["result"]
        state = "ok" if one["recovery"] == "idle" else f"recovering ({one['recovery']})"
        lines.append(
            (
                one["space"], one["instance"], row["node"], len(one["members"]),
                "/".join(str(part) for part in one["view"]),
                "leaving" if one["leaving"] else state,
                one["cached"], one["mastered"], " ".join(one["dead"]) or "-",
            )
        )  # fmt: skip
    return _columns(header, lines)


@main.command()
@_options
def locks(everywhere: bool, as_json: bool) -> None:
    """The locks that are cached here."""
    _show("locks", {"all": everywhere}, as_json, locks_text)


def locks_text(rows: Sequence[Row]) -> str:
    """A line per lock."""
    header = ("NODE", "NAME", "MODE", "IN USE", "WAITING HERE", "WANTED BY", "MASTER")
    lines = [
        (
            row["node"], one["name"], one["mode"], one["holders"], " ".join(one["waiters"]) or "-",
            " ".join(one["wanted_by"]) or "-", one["master"] or "?",
        )
        for row in rows
        for one in row["result"]
    ]  # fmt: skip
    return _columns(header, lines)


@main.command()
@_options
def waiters(everywhere: bool, as_json: bool) -> None:
    """Who waits: at the resources mastered here, and this node for others."""
    _show("waiters", {"all": everywhere}, as_json, waiters_text)


def waiters_text(rows: Sequence[Row]) -> str:
    """A line per waiting lock."""
    header = ("NODE", "NAME", "WHO", "WANTS", "HAS", "MS", "IN THE WAY")
    lines = []
    for row in rows:
        for one in row["result"]["mastered"]:
            holders = " ".join(f"{lock['owner']}:{lock['mode']}" for lock in one["granted"])
            for lock in (*one["converting"], *one["waiting"]):
                lines.append(
                    (
                        row["node"], one["name"], lock["owner"], lock["wants"],
                        lock["mode"] or "-", lock["waited_ms"], holders or "-",
                    )
                )  # fmt: skip
        for name in row["result"]["waiting_for"]:
            lines.append((row["node"], name, "this member", "", "", "", "see: dlmctl why"))
    return _columns(header, lines) if lines else "nobody waits"


@main.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def why(name: str, as_json: bool) -> None:
    """Who holds NAME, who waits for it, and what the holders wait for themselves."""
    rows = _ask("why", {"name": name})
    if not rows:
        raise NotFoundError("no lockspace on this node", hint="mount a file system first")
    _print(rows, as_json, why_text)


def why_text(rows: Sequence[Row]) -> str:
    """The wait chain, indented one step per link. All members of a lockspace say the same, so the
    first that knows the name is shown."""
    best = max(rows, key=lambda row: sum(len(link["lines"]) for link in row["result"]))
    lines = []
    for depth, link in enumerate(best["result"]):
        pad = "  " * depth
        master = f"master {link['master']}" if link["master"] else "no master known"
        lines.append(f"{pad}{link['name']}  ({master})")
        lines += [f"{pad}  {line}" for line in link["lines"]]
        if not link["lines"]:
            lines.append(f"{pad}  nobody holds it or waits for it")
    return "\n".join(lines)


@main.command()
@_options
def dump(everywhere: bool, as_json: bool) -> None:
    """Everything that the lock manager knows, as JSON."""
    del as_json
    _show("dump", {"all": everywhere}, True, locks_text)


if __name__ == "__main__":
    main()
