"""clusterctl: make, join, watch and change the cluster. A blocking client; imports no trio."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
import msgspec

from cluster import control_client_io
from cluster.config import (
    SERVER_PORT,
    NodeConfig,
    decode_token_untrusted,
)
from cluster.errors import ConfigError, RefusedError, UsageError
from cluster.events import EVENTS_MAX
from cluster.ids import NODE_ID_MAX, SERVER_ID_MAX, SERVER_ID_MIN, NodeId
from cluster.register import birth_record
from cluster.state import NodeInfo, initial_state
from cluster.timing import PROFILES, timing_of
from cluster.tool_cli import ToolGroup
from node.files_io import NodeFiles
from node.screen import events_line, mounts_text, nodes_text, status_text

F = TypeVar("F", bound=Callable[..., None])
LONG_S = 180.0
NODE_ID = click.IntRange(1, NODE_ID_MAX)
SERVER_ID = click.IntRange(SERVER_ID_MIN, SERVER_ID_MAX)


def _json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)


def _show(value: Any, as_json: bool, text: str) -> None:
    click.echo(json.dumps(value, indent=None) if as_json else text)


@click.group(cls=ToolGroup, name="clusterctl")
def main() -> None:
    """Make, join, watch and change a cluster."""


@main.command()
@click.option("--name", required=True, help="Name of the cluster.")
@click.option("--node", required=True, help="Name of this node.")
@click.option("--id", "number", type=NODE_ID, required=True, help="Id of this node, 1..64.")
@click.option("--address", "addresses", multiple=True, required=True, help="One per network.")
@click.option("--profile", type=click.Choice(PROFILES), default="default", show_default=True,
              help="How fast failures are noticed.")  # fmt: skip
@_json_option
def init(
    name: str, node: str, number: int, addresses: tuple[str, ...], profile: str, as_json: bool
) -> None:
    """Found a cluster on this node: its only node, its only voter."""
    timing_of(profile)
    cluster_id, key = secrets.token_hex(16), secrets.token_hex(32)
    config = _checked(
        {
            "cluster": {"id": cluster_id, "name": name, "key": key, "profile": profile},
            "node": {"id": number, "name": node, "addresses": list(addresses)},
        }
    )
    state = initial_state(
        cluster_id, name, profile, NodeInfo(NodeId(number), node, list(addresses))
    )
    files = NodeFiles()
    files.create(config, state, birth_record(state))
    _show(
        {"cluster_id": cluster_id, "directory": str(files.directory)},
        as_json,
        f"cluster {name} founded in {files.directory}; now start clusterd",
    )


def _checked(values: Any) -> NodeConfig:
    """The same checks as for node.toml."""
    try:
        return msgspec.convert(values, NodeConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from error


@main.command()
@click.argument("name")
@click.option("--id", "number", type=NODE_ID, required=True, help="Id of the new node, 1..64.")
@click.option("--address", "addresses", multiple=True, required=True, help="One per network.")
@_json_option
def invite(name: str, number: int, addresses: tuple[str, ...], as_json: bool) -> None:
    """Configure node NAME and print the token with which it joins. The token holds the cluster's
    key: hand it over in secret."""
    params = {"name": name, "id": number, "addresses": list(addresses)}
    result = control_client_io.call("cluster.invite", params)
    _show(result, as_json, result["token"])


@main.command()
@click.argument("token")
@_json_option
def join(token: str, as_json: bool) -> None:
    """Store the invitation TOKEN on this node ("-": read it from stdin); then start clusterd."""
    found = decode_token_untrusted(sys.stdin.read() if token == "-" else token)
    _checked(msgspec.to_builtins(found.config))
    files = NodeFiles()
    files.create(found.config, found.known, None)
    name = found.config.node.name
    _show(
        {"cluster": found.config.cluster.name, "node": name},
        as_json,
        f"this is now node {name} of cluster {found.config.cluster.name}; now start clusterd",
    )


@main.command()
@click.option("--force", is_flag=True, help="Also with mounts: their unsynced data is lost.")
@_json_option
def leave(force: bool, as_json: bool) -> None:
    """Leave cleanly; clusterd ends. It comes back when clusterd is started again. When too few
    voters would stay to decide anything, it gives up its vote, and that of one who is away."""
    result = control_client_io.call("cluster.leave", {"force": force}, timeout_s=LONG_S)
    text = "left; clusterd ends"
    if result["votes_dropped"]:
        text += f"; votes given up: {', '.join(result['votes_dropped'])} (clusterctl voter add)"
    _show(result, as_json, text)


@main.command()
@_json_option
def status(as_json: bool) -> None:
    """The cluster on one screen. Exit code 3 when it is not quorate."""
    result = control_client_io.call("cluster.status")
    _show(result, as_json, status_text(result, color=sys.stdout.isatty()))
    if not result["quorate"]:
        sys.exit(3)


@main.command()
@_json_option
def nodes(as_json: bool) -> None:
    """One line per node."""
    result = control_client_io.call("cluster.nodes")
    _show(result, as_json, nodes_text(result))


@main.command()
@click.option("--forget", metavar="DIRECTORY", help="Do not mount this one again.")
@_json_option
def mounts(forget: str | None, as_json: bool) -> None:
    """The mounts that this node remembers: they come back after a failure or a power cut. A clean
    unmount forgets a mount."""
    if forget is not None:
        parent, name = os.path.split(os.path.abspath(forget))
        place = os.path.join(os.path.realpath(parent), name)  # a dead mount is not to be touched
        if not control_client_io.call("mounts.forget", {"mountpoint": place})["forgotten"]:
            raise UsageError(f"no mount at {place} is remembered", hint="see: clusterctl mounts")
    rows = control_client_io.call("mounts.list")
    _show(rows, as_json, mounts_text(rows))


@main.command()
@click.option("--follow", "-f", is_flag=True, help="Go on until interrupted.")
@click.option("--lines", "-n", type=click.IntRange(1, EVENTS_MAX), default=1000, show_default=True,
              help="How many of the newest.")  # fmt: skip
@_json_option
def events(follow: bool, lines: int, as_json: bool) -> None:
    """What happened, one line each."""
    params = {"limit": lines, "follow": follow}
    found: Iterable[Any]
    if follow:
        found = (event.data for event in control_client_io.follow("cluster.events", params))
    else:
        found = control_client_io.call("cluster.events", params)
    try:
        for record in found:
            click.echo(json.dumps(record) if as_json else events_line(record))
    except KeyboardInterrupt:
        sys.exit(0)


@main.group()
def voter() -> None:
    """Who decides the register: nodes and servers with a vote."""


def _voter(action: str, name: str, as_json: bool) -> None:
    params = {"action": action, "name": name}
    result = control_client_io.call("cluster.voter", params, timeout_s=LONG_S)
    count = len(result["voters"])
    _show(result, as_json, f"{count} voters: {', '.join(str(v) for v in result['voters'])}")


@voter.command("add")
@click.argument("name")
@_json_option
def voter_add(name: str, as_json: bool) -> None:
    """Give node or server NAME a vote (waits until it is there)."""
    _voter("add", name, as_json)


@voter.command("remove")
@click.argument("name")
@_json_option
def voter_remove(name: str, as_json: bool) -> None:
    """Take the vote of NAME away."""
    _voter("remove", name, as_json)


@voter.command("replace")
@click.argument("name")
@_json_option
def voter_replace(name: str, as_json: bool) -> None:
    """Voter NAME has lost its store: take its vote away and give it anew."""
    _voter("replace", name, as_json)


@main.group()
def server() -> None:
    """The block servers of the cluster."""


@server.command("add")
@click.argument("name")
@click.option("--id", "number", type=SERVER_ID, required=True, help="Id of the server, 129..192.")
@click.option("--address", "addresses", multiple=True, required=True, help="One per network.")
@click.option("--port", type=click.IntRange(1, 65535), default=SERVER_PORT, show_default=True,
              help="TCP port of gnbd-server.")  # fmt: skip
@_json_option
def server_add(
    name: str, number: int, addresses: tuple[str, ...], port: int, as_json: bool
) -> None:
    """Configure server NAME and print the token for `gnbd-server --join`."""
    params = {
        "action": "add", "name": name, "id": number, "addresses": list(addresses), "port": port,
    }  # fmt: skip
    result = control_client_io.call("cluster.server", params)
    _show(result, as_json, result["token"])


@server.command("remove")
@click.argument("name")
@click.option("--force", is_flag=True, help="Also if volumes have their bytes there.")
@_json_option
def server_remove(name: str, force: bool, as_json: bool) -> None:
    """Take server NAME out of the configuration."""
    params = {"action": "remove", "name": name, "force": force}
    result = control_client_io.call("cluster.server", params)
    _show(result, as_json, f"server {name} removed")


@main.command()
@click.argument("name")
@_json_option
def forget(name: str, as_json: bool) -> None:
    """Take node NAME (no member, no voter) out of the configuration."""
    result = control_client_io.call("cluster.forget", {"name": name})
    _show(result, as_json, f"node {name} forgotten")


@main.command()
@click.argument("cluster_name")
@click.option("--voters", required=True, help="The new voters, separated by commas.")
@click.option("--yes", is_flag=True, help="I know that the old voters never come back.")
@_json_option
def recover(cluster_name: str, voters: str, yes: bool, as_json: bool) -> None:
    """The majority of the voters is lost for ever: go on with these. Type the cluster's name.
    If the lost ones live on somewhere, the cluster splits in two."""
    if not yes:
        raise RefusedError("this may split the cluster if the lost voters live on")
    params = {"name": cluster_name, "voters": [v for v in voters.split(",") if v]}
    result = control_client_io.call("cluster.recover", params)
    _show(result, as_json, f"recovered: epoch {result['epoch']}; clusterd starts anew")


if __name__ == "__main__":
    main()
