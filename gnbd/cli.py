"""`gnbd-server` and `gnbdctl`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import click
import msgspec
import structlog

from cluster.config import SERVER_PORT, NodeConfig, decode_config, read_config_text
from cluster.control_client_io import call
from cluster.errors import ConfigError, NotFoundError, UsageError
from cluster.ids import Incarnation
from cluster.paths_io import state_dir
from cluster.tool_cli import ToolCommand, ToolGroup
from cluster.wire import Keys
from gnbd import messages as m
from gnbd.control_blocking_io import BlockingControl, open_blocking
from gnbd.control_session import Peer
from gnbd.exports import decode_exports, parse_filter
from gnbd.identity import decode_server_token_untrusted
from gnbd.server_io import Server, join_cluster


def _configure_log() -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "event"]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )


@click.command(cls=ToolCommand, name="gnbd-server")
@click.option("--join", "token", metavar="TOKEN", help="Store the identity given by the cluster.")
@click.argument("exports", type=click.Path(dir_okay=False))
def server_main(token: str | None, exports: str) -> None:
    """Serve the exports of the file EXPORTS over NBD; with --join only store the token, once."""

    config = decode_exports(read_config_text(Path(exports)), exports)
    if token is not None:
        identity = decode_server_token_untrusted(token)
        new = join_cluster(Path(config.state_dir), identity)
        words = "joined" if new else "is already in"
        print(f"server {identity.name} {words} cluster {identity.cluster_name}")
        return
    _configure_log()
    Server(config).run()


class Target(msgspec.Struct):
    """Where gnbdctl speaks to."""

    address: list[str]
    port: int
    keys: Keys
    peer: Peer


def _target(server: str, config_path: str | None) -> Target:
    path = Path(config_path) if config_path else state_dir() / "node.toml"
    try:
        config = decode_config(read_config_text(path), NodeConfig, str(path))
    except ConfigError as error:
        error.hint = error.hint or "run this on a node of the cluster"
        raise
    addresses, port = _addresses(server)
    keys = Keys(1, {1: bytes.fromhex(config.cluster.key)})
    peer = Peer(config.node.id, bytes.fromhex(config.cluster.id), Incarnation(0))
    return Target(addresses, port, keys, peer)


def _addresses(server: str) -> tuple[list[str], int]:
    """ADDRESS, ADDRESS:PORT, [ADDRESS]:PORT, or the name of a server that clusterd knows."""
    if server.count(":") > 1 and not server.startswith("["):
        host, port = server, ""
    else:
        host, _, port = server.removeprefix("[").replace("]", "").rpartition(":")
        host, port = (host, port) if host else (port, "")
    if port or _is_address(host):
        if not (port or str(SERVER_PORT)).isdecimal() or not 1 <= int(port or SERVER_PORT) <= 65535:
            raise UsageError(f"{server}: {port} is not a port", hint="a port is 1 to 65535")
        return [host], int(port or SERVER_PORT)
    rows = call("cluster.status")["servers"]
    for row in rows:
        if row["name"] == server:
            return list(row["addresses"]), int(row["port"])
    names = ", ".join(sorted(row["name"] for row in rows)) or "none"
    raise NotFoundError(f"no server is called {server}", hint=f"servers of this cluster: {names}")


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


@click.group(cls=ToolGroup, name="gnbdctl")
@click.option(
    "--server", "-s", required=True, metavar="NAME|ADDRESS[:PORT]", help="The gnbd-server."
)
@click.option("--config", metavar="FILE", help="node.toml with the cluster key.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def control_main(context: click.Context, server: str, config: str | None, as_json: bool) -> None:
    """Look at a gnbd-server and steer it."""
    context.obj = (server, config, as_json)


def _with_control(
    context: click.Context, work: Callable[[BlockingControl], object], text: Callable[[object], str]
) -> None:
    server, config, as_json = context.obj

    target = _target(server, config)
    with open_blocking(target.address, target.port, target.keys, target.peer) as control:
        result = work(control)
    plain = msgspec.to_builtins(result)
    print(json.dumps(plain, indent=2) if as_json else text(plain))


def _table(rows: list[list[object]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


@control_main.command()
@click.pass_context
def exports(context: click.Context) -> None:
    """List the exports with sizes."""

    def text(plain: object) -> str:
        assert isinstance(plain, list)
        rows: list[list[object]] = [["NAME", "SIZE", "ACCESS", "CONNECTIONS", "FILTERS"]]
        for e in plain:
            filters = " ".join(e["filters"]) or "-"
            rows.append([e["name"], e["size_bytes"], e["access"], e["connections"], filters])
        return _table(rows)

    _with_control(context, lambda c: c.ask(m.ExportsRequest(), m.ExportsReport).exports, text)


@control_main.command()
@click.pass_context
def stats(context: click.Context) -> None:
    """Counters per export."""

    def text(plain: object) -> str:
        assert isinstance(plain, list)
        if not plain:
            return "no exports"
        names = list(plain[0]["counters"])
        rows: list[list[object]] = [["NAME", *names]]
        rows += [[e["name"], *(e["counters"][name] for name in names)] for e in plain]
        return _table(rows)

    _with_control(context, lambda c: c.ask(m.ExportsRequest(), m.ExportsReport).exports, text)


@control_main.command()
@click.pass_context
def status(context: click.Context) -> None:
    """Installed epoch, members, bars."""

    def text(plain: object) -> str:
        assert isinstance(plain, dict)
        return "\n".join(f"{key}: {json.dumps(value)}" for key, value in plain.items())

    _with_control(context, lambda c: c.ask(m.StatusRequest(), m.StatusReport), text)


@control_main.command()
@click.argument("export")
@click.pass_context
def keys(context: click.Context, export: str) -> None:
    """Registrations and reservation of an export."""

    def text(plain: object) -> str:
        assert isinstance(plain, dict)
        lines = [f"generation {plain['generation']}, reservation type {plain['type']}"]
        for (node, incarnation, number), key, holder, _ in plain["registrations"]:
            held = "  holds the reservation" if holder else ""
            lines.append(f"n{node}.{incarnation}.{number}  key {key:#x}{held}")
        return "\n".join(lines)

    _with_control(context, lambda c: c.ask(m.ReserveIn(export), m.ReserveReport), text)


@control_main.command("filter")
@click.argument("export")
@click.argument("action", type=click.Choice(["add", "set", "remove"]))
@click.argument("spec", metavar="KIND[:KEY=VALUE,...]")
@click.pass_context
def filter_command(context: click.Context, export: str, action: str, spec: str) -> None:
    """Put a filter on an export, change it, or take it away."""

    parsed = parse_filter(spec, whole=action == "add")

    def work(control: BlockingControl) -> object:
        request = m.FilterCommand(export, action, parsed.kind, parsed.parameters)
        return control.ask(request, m.Done)

    _with_control(context, work, lambda _plain: "done")


if __name__ == "__main__":
    server_main()
