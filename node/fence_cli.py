"""fencectl: who was put out of the cluster, how that is known, and putting out by hand."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from cluster import control_client_io
from cluster.errors import RefusedError
from cluster.tool_cli import ToolGroup
from node.fence_screen import (
    explain_text,
    fence_status_text,
    history_text,
    keys_text,
    reservation_text,
)

WAIT_S_MAX = 600
MARGIN_S = 30.0
EXIT_NOT_PROVEN = 1
EXIT_NOT_INSTALLED = 3

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _show(result: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    click.echo(json.dumps(result) if as_json else text(result))


@click.group(cls=ToolGroup, name="fencectl")
def main() -> None:
    """Fencing: nodes and instances that were put out."""


@main.command()
@_json_option
def status(as_json: bool) -> None:
    """Whether every server has installed the newest view. Exit code 3 if not."""
    result = control_client_io.call("fence.status")
    _show(result, as_json, fence_status_text)
    sys.exit(EXIT_NOT_INSTALLED if result["missing"] else 0)


@main.command()
@_json_option
def history(as_json: bool) -> None:
    """Who was put out, oldest first."""
    _show(control_client_io.call("fence.history"), as_json, history_text)


@main.command()
@click.argument("node")
@_json_option
def explain(node: str, as_json: bool) -> None:
    """Why NODE was put out last: what was seen, who asked, what was tried, how it is known."""
    _show(control_client_io.call("fence.explain", {"name": node}), as_json, explain_text)


@main.command()
@click.option("--export", default="", help="Of this export alone.")
@_json_option
def keys(export: str, as_json: bool) -> None:
    """Who is registered on the exports of the servers."""
    _show(control_client_io.call("fence.keys", {"export": export}), as_json, keys_text)


@main.command()
@click.option("--export", default="", help="Of this export alone.")
@_json_option
def reservation(export: str, as_json: bool) -> None:
    """What is reserved on the exports of the servers."""
    _show(control_client_io.call("fence.keys", {"export": export}), as_json, reservation_text)


@main.command()
@click.argument("node")
@click.option("--reason", default="", help="Kept in the history.")
@click.option(
    "--wait",
    "wait_s",
    type=click.IntRange(0, WAIT_S_MAX),
    default=60,
    help="Seconds to wait for the proof.",
)
@click.option("--yes", is_flag=True, help="Really put it out.")
@_json_option
def fence(node: str, reason: str, wait_s: int, yes: bool, as_json: bool) -> None:
    """Put NODE out and keep it out until `fencectl unfence`. Exit code 1 without a proof."""
    if not yes:
        raise RefusedError(f"this ends every mount on {node}", hint="say --yes")
    params = {"name": node, "reason": reason, "wait_s": wait_s}
    result = control_client_io.call("fence.fence", params, timeout_s=wait_s + MARGIN_S)
    if result["life"] is None:
        text = f"{result['name']} was no member; it is held out from now on"
        _show(result, as_json, lambda _: text)
        return
    proven = result["verdict"] == "proven"
    if proven:
        text = f"{result['name']} is fenced: {result['record']['attempts'][-1]['text']}"
    elif result["verdict"]:
        text = f"{result['name']} is out of the view, but no level of methods was proven"
    else:
        text = f"{result['name']} is out of the view, but no verdict of the methods is known yet"
    more = "" if proven else f"; see: fencectl explain {result['name']}"
    _show(result, as_json, lambda _: text + more)
    sys.exit(0 if proven else EXIT_NOT_PROVEN)


@main.command()
@click.argument("node")
@_json_option
def unfence(node: str, as_json: bool) -> None:
    """Let NODE come back; agents that switch nodes off switch it on. Exit code 1 if one fails."""
    result = control_client_io.call("fence.unfence", {"name": node}, timeout_s=600.0)
    failed = [f"{name}: {text}" for name, text in result["switched"].items() if text]
    was = "may come back" if result["was_held"] else "was not held out"
    _show(result, as_json, lambda _: "\n".join([f"{result['name']} {was}", *failed]))
    sys.exit(EXIT_NOT_PROVEN if failed else 0)


@main.command()
@click.argument("node")
@click.option("--typed", help="The node's name, typed by hand (else it is asked for).")
@_json_option
def confirm(node: str, typed: str | None, as_json: bool) -> None:
    """Your word that NODE is off, for a method of kind manual. If it lives, data may be lost."""
    if typed is None:
        typed = click.prompt(f"is {node} off, and does it stay off? Type its name", type=str)
    result = control_client_io.call("fence.confirm", {"name": node, "typed": typed})
    _show(result, as_json, lambda _: f"{result['name']} is confirmed as off")


if __name__ == "__main__":
    main()
