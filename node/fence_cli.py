"""fencectl: who was put out of the cluster, and whether all servers know it."""

from __future__ import annotations

import json
import sys

import click

from cluster import control_client_io
from cluster.tool_cli import ToolGroup
from node.screen import fences_text


@click.group(cls=ToolGroup, name="fencectl")
def main() -> None:
    """Fencing: nodes and instances that were put out."""


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Whether every server has installed the newest view. Exit code 3 if not."""
    result = control_client_io.call("fence.status")
    if as_json:
        click.echo(json.dumps(result))
    else:
        missing = ", ".join(result["missing"]) or "none"
        click.echo(f"epoch {result['epoch']}; servers that have not installed it: {missing}")
        click.echo(fences_text(result["last"]))
    sys.exit(3 if result["missing"] else 0)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def history(as_json: bool) -> None:
    """Who was put out, oldest first."""
    result = control_client_io.call("fence.history")
    click.echo(json.dumps(result) if as_json else fences_text(result))


if __name__ == "__main__":
    main()
