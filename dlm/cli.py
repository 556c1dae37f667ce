"""`dlmctl`: who holds what, who waits for whom. A blocking client; imports no trio."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from cluster.control_client_io import call
from cluster.errors import StackError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
all_option = click.option("--all", "everywhere", is_flag=True, help="On every node.")


def ask(verb: str, everywhere: bool, **params: Any) -> list[Any]:
    """The rows of every lockspace member that answers, flattened."""
    found = call(f"dlm.{verb}", {**params, **({"all": True} if everywhere else {})})
    rows: list[Any] = []
    for member in found:
        if "error" in member:
            print(f"{member['node']}: {member['error']['message']}", file=sys.stderr)
            continue
        result = member["result"]
        rows += result if isinstance(result, list) else [result]
    return rows


def show(rows: list[Any], as_json: bool, columns: list[str]) -> None:
    """A table whose columns fit, or JSON."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = [[column.upper() for column in columns]]
    for row in rows:
        values = (row[column] for column in columns)
        table.append([" ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values])
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def app() -> None:
    """Look into the distributed lock manager."""


@app.command()
@all_option
@json_option
def spaces(everywhere: bool, as_json: bool) -> None:
    """The lockspaces of this node, their members and the state of recovery."""
    columns = ["space", "member", "view", "recovery", "locks", "mastered", "members", "dead"]
    show(ask("spaces", everywhere), as_json, columns)


@app.command()
@all_option
@json_option
def locks(everywhere: bool, as_json: bool) -> None:
    """The locks that mounts of this node hold."""
    columns = ["name", "granted", "wanted", "master", "waited_ms"]
    show(ask("locks", everywhere), as_json, columns)


@app.command()
@all_option
@json_option
def waiters(everywhere: bool, as_json: bool) -> None:
    """The locks that mounts of this node wait for, longest first."""
    columns = ["name", "granted", "wanted", "master", "waited_ms"]
    rows = sorted(ask("waiters", everywhere), key=lambda row: -int(row["waited_ms"]))
    show(rows, as_json, columns)


@app.command()
@json_option
def dump(as_json: bool) -> None:
    """Everything that this node knows, always as JSON."""
    print(json.dumps(ask("dump", False), indent=None if as_json else 2))


@app.command()
@click.argument("name")
@json_option
def why(name: str, as_json: bool) -> None:
    """Who holds resource NAME, who waits for it, and what they wait for."""
    rows = ask("why", False, name=name)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    mastered = [row for row in rows if row["resource"] is not None]
    if not mastered:
        print(f"no member masters {name}: nobody has used it, or recovery is under way")
    for row in mastered:
        print(f"{name}, mastered by {row['member']}")
        for lock in row["resource"]["locks"]:
            print("  " + explain(lock))
    for row in rows:
        if row["recovery"] != "idle":
            print(f"{row['member']}: recovery, {row['recovery']}")


def explain(lock: dict[str, Any]) -> str:
    """One lock of a queue as a sentence."""
    if lock["phantom"]:
        return (
            f"{lock['owner']} is dead and may have held {lock['granted']}: waits for its recovery"
        )
    if lock["queue"] == "granted":
        dead = ", dead: waits for its recovery" if lock["dead"] else ""
        asked = ", asked to give way" if lock["told"] else ""
        return f"{lock['owner']} holds {lock['granted']}{dead}{asked}"
    if lock["queue"] == "converting":
        return f"{lock['owner']} holds {lock['granted']} and waits for {lock['requested']}"
    return f"{lock['owner']} waits for {lock['requested']}"


def main() -> None:
    """Entry point of dlmctl."""
    try:
        app(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except StackError as error:
        print(f"dlmctl: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)
