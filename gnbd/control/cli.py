"""`gnbdctl`. It imports nothing of the server."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import click
import msgspec

from cluster.config import SERVER_PORT, NodeConfig, decode_config, read_config_text
from cluster.control_client_io import call
from cluster.errors import ConfigError, CorruptionError, NotFoundError, UsageError
from cluster.ids import Incarnation
from cluster.paths_io import state_dir
from cluster.sizes import parse_size
from cluster.tool_cli import ToolGroup
from cluster.wire import Keys
from gnbd import messages as m
from gnbd.control.blocking_io import BlockingControl, open_blocking
from gnbd.control.session import Peer
from gnbd.exports import Export, check_export, parse_filter
from gnbd.identity import LOCAL_IDENTITY, LOCAL_SOCKET


class Target(msgspec.Struct):
    """Where gnbdctl speaks to."""

    address: list[str]
    port: int
    keys: Keys
    peer: Peer


def _target(server: str, config_path: str | None) -> Target:
    if "/" in server:
        peer = Peer(0, LOCAL_IDENTITY.cluster_id_bytes)
        return Target([os.path.abspath(server)], 0, LOCAL_IDENTITY.keys, peer)
    path = Path(config_path) if config_path else state_dir() / "node.toml"
    try:
        config = decode_config(read_config_text(path), NodeConfig, str(path))
    except ConfigError as error:
        error.hint = error.hint or "run this on a node, or name a socket: -s DIR/gnbd.sock"
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
    "--server",
    "-s",
    default=lambda: str(state_dir() / LOCAL_SOCKET),
    metavar="NAME|ADDRESS[:PORT]|SOCKET",
    help="The gnbd-server; a path is its gnbd.sock. Default: that of this machine.",
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
    if isinstance(plain, dict):
        plain.pop("t", None)  # what tells messages apart is nothing for people or programs
    print(json.dumps(plain, indent=2) if as_json else text(plain))


def _table(rows: list[list[object]]) -> str:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _integrity_of(counters: dict[str, int]) -> str:
    if not counters:
        return "-"
    if counters["mismatches"]:
        return f"crc32c, {counters['mismatches']} mismatches"
    left = counters["unsettled_regions"]
    return f"crc32c, {left} regions to go" if left else "crc32c"


@control_main.command()
@click.pass_context
def exports(context: click.Context) -> None:
    """List the exports with sizes."""

    def text(plain: object) -> str:
        assert isinstance(plain, list)
        rows: list[list[object]] = [
            ["NAME", "SIZE", "ACCESS", "CONNECTIONS", "INTEGRITY", "FILTERS"]
        ]
        for e in plain:
            filters = " ".join(e["filters"]) or "-"
            rows.append(
                [e["name"], e["size_bytes"], e["access"], e["connections"],
                 _integrity_of(e["integrity"]), filters]
            )  # fmt: skip
        return _table(rows)

    _with_control(context, lambda c: c.ask(m.ExportsRequest(), m.ExportsReport).exports, text)


@control_main.command()
@click.argument("name")
@click.argument("path")
@click.option("--size", help="Made sparse if it does not exist; needed for that.")
@click.option(
    "--access",
    type=click.Choice(["plain", "cluster"]),
    default="plain",
    help="For anyone, or for logged-in instances.",
)
@click.option("--description", default="", help="Shown by LIST and INFO.")
@click.option("--read-only", is_flag=True, help="Nobody writes.")
@click.option(
    "--integrity",
    type=click.Choice(["crc32c", "none", "kept"]),
    default="kept",
    help="Check every read. kept: if the disk had it before.",
)
@click.option(
    "--filter", "filters", multiple=True, metavar="KIND[:KEY=VALUE,...]", help="Bottom up."
)
@click.pass_context
def add(context: click.Context, /, name: str, path: str, **more: Any) -> None:
    """Export PATH as NAME until the server ends; the exports file stays as it is."""
    more |= {"name": name, "path": os.path.abspath(path), "filters": list(more["filters"])}
    try:
        export = msgspec.convert(more, Export)
    except msgspec.ValidationError as error:
        raise UsageError(f"export {name[:64]!r}: {error}") from error
    check_export(export, f"export {name!r}")
    _with_control(context, lambda c: c.ask(m.ExportAdd(export), m.Done), lambda _: "added")


@control_main.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Cut its clients off.")
@click.pass_context
def remove(context: click.Context, name: str, force: bool) -> None:
    """Serve an export no more. What was acknowledged is durable at the return."""
    request = m.ExportRemove(name, force)
    _with_control(context, lambda c: c.ask(request, m.Done), lambda _: "removed")


@control_main.command()
@click.argument("name")
@click.argument("size")
@click.pass_context
def resize(context: click.Context, name: str, size: str) -> None:
    """Grow an export to SIZE, or by it (+1G), while it is served."""

    def work(control: BlockingControl) -> object:
        wanted = parse_size(size.removeprefix("+"))
        if size.startswith("+"):
            found = control.ask(m.ExportsRequest(), m.ExportsReport).exports
            wanted += next((e.size_bytes for e in found if e.name == name), 0)
        return control.ask(m.ExportResize(name, wanted), m.Done)

    _with_control(context, work, lambda _: "resized")


@control_main.command()
@click.pass_context
def reload(context: click.Context) -> None:
    """Let the server read its exports file again, as SIGHUP does."""

    def text(plain: object) -> str:
        assert isinstance(plain, dict)
        return str(plain["message"])

    _with_control(context, lambda c: c.ask(m.Reload(), m.Done), text)


def _rows_of(head: list[str], keys: list[str], nothing: str) -> Callable[[object], str]:
    def text(plain: object) -> str:
        assert isinstance(plain, list)
        rows: list[list[object]] = [[row[key] or "-" for key in keys] for row in plain]
        return _table([[*head], *rows]) if rows else nothing

    return text


@control_main.command()
@click.pass_context
def connections(context: click.Context) -> None:
    """Who is connected to what."""
    head = ["EXPORT", "PEER", "INSTANCE", "PATH", "GENERATION", "AGE_S", "STATE", "CERTIFICATE"]
    _with_control(
        context,
        lambda c: c.ask(m.ConnectionsRequest(), m.ConnectionsReport).connections,
        _rows_of(head, [name.lower() for name in head], "no connections"),
    )


@control_main.command()
@click.pass_context
def paths(context: click.Context) -> None:
    """Each network of each logged-in instance to each export."""
    head = ["EXPORT", "INSTANCE", "PATH", "GENERATION", "CONNECTIONS"]
    _with_control(
        context,
        lambda c: c.ask(m.PathsRequest(), m.PathsReport).paths,
        _rows_of(head, [name.lower() for name in head], "no paths"),
    )


@control_main.command()
@click.option("--watch", is_flag=True, help="What is added each second, until interrupted.")
@click.option("--count", type=click.IntRange(1, 1 << 31), help="So many seconds.")
@click.pass_context
def stats(context: click.Context, watch: bool, count: int | None) -> None:
    """Counters per export, and what its filters report."""
    if watch:
        _watch(context, count)
        return

    def text(plain: object) -> str:
        assert isinstance(plain, list)
        if not plain:
            return "no exports"
        names = list(plain[0]["counters"])
        rows: list[list[object]] = [["NAME", *names]]
        rows += [[e["name"], *(e["counters"][name] for name in names)] for e in plain]
        lines = [_table(rows)]
        for e in plain:
            for kind, report in e["filter_reports"].items():
                values = " ".join(f"{key}={value}" for key, value in report.items())
                lines.append(f"{e['name']} {kind}: {values}")
        return "\n".join(lines)

    _with_control(context, lambda c: c.ask(m.ExportsRequest(), m.ExportsReport).exports, text)


def _watch(context: click.Context, count: int | None) -> None:
    server, config, as_json = context.obj
    target = _target(server, config)
    before: dict[str, dict[str, int]] = {}
    with open_blocking(target.address, target.port, target.keys, target.peer) as control:
        for turn in itertools.count():
            reports = control.ask(m.ExportsRequest(), m.ExportsReport).exports
            now = {e.name: e.counters for e in reports}
            rows = [
                {"name": name, **{key: value - before[name][key] for key, value in new.items()}}
                for name, new in now.items()
                if name in before
            ]
            if turn and as_json:
                print(json.dumps(rows), flush=True)
            elif turn and rows:
                print(_table([[*rows[0]], *([*row.values()] for row in rows)]), flush=True)
            before = now
            if turn == count:
                return
            time.sleep(1)


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


@control_main.command()
@click.argument("export")
@click.argument("state", type=click.Choice(["on", "off"]))
@click.pass_context
def integrity(context: click.Context, export: str, state: str) -> None:
    """Keep checksums of an export's blocks from now on, or no more, while it is used. A restart
    does not forget it."""

    def text(plain: object) -> str:
        assert isinstance(plain, dict)
        return str(plain["message"])

    request = m.IntegrityCommand(export, state == "on")
    _with_control(context, lambda c: c.ask(request, m.Done), text)


def _scrub_text(report: m.ScrubReport) -> str:
    share = 100 * report.checked_bytes // max(report.size_bytes, 1)
    lines = [
        f"{report.export}: {report.state}, {report.checked_bytes} of {report.size_bytes} bytes"
        f" ({share} %) in {report.seconds:.1f} s, {report.mismatches} mismatches"
    ]
    lines += [f"mismatch at {address}" for address in report.addresses]
    if report.unreadable:
        lines.append(f"{report.unreadable} blocks could not be read")
    if report.skipped:
        lines.append(f"{report.skipped} blocks were left out: their sums are being computed")
    return "\n".join(lines)


@control_main.command()
@click.argument("export")
@click.argument("action", type=click.Choice(["start", "stop", "status"]), default="start")
@click.option("--rate", default="100M", help="Bytes a second, at most; 0: no limit.")
@click.option("--wait", is_flag=True, help="Until it has ended; tells how far it is.")
@click.pass_context
def scrub(context: click.Context, export: str, action: str, rate: str, wait: bool) -> None:
    """Read all of an export and compare it with its checksums, without holding up its clients."""
    server, config, as_json = context.obj
    target = _target(server, config)
    request = m.ScrubCommand(export, action, parse_size(rate))
    with open_blocking(target.address, target.port, target.keys, target.peer) as control:
        report = control.ask(request, m.ScrubReport)
        while wait and report.state == "running":
            if not as_json:
                print(_scrub_text(report).partition("\n")[0], file=sys.stderr)
            time.sleep(1)
            report = control.ask(m.ScrubCommand(export, "status"), m.ScrubReport)
    plain = msgspec.to_builtins(report)
    print(json.dumps(plain, indent=2) if as_json else _scrub_text(report))
    if report.mismatches or report.unreadable:
        raise CorruptionError(f"export {export!r} is damaged", hint="see the log of the server")


if __name__ == "__main__":
    control_main()
