"""cfs-lab: a whole cluster on one machine.

Verbs are idempotent. Exit codes as in the whole stack; `exec` passes the program's own through.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from cluster.sizes import parse_size
from cluster.tool_cli import ToolGroup, need_root
from lab import cluster, hosts, network
from lab.topology import DEFAULT_DIR, NETWORKS, NODES_MAX, SERVERS_MAX, Lab, LabState

F = TypeVar("F", bound=Callable[..., Any])


def common(function: F) -> F:
    """The options that every verb has."""
    function = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(function)
    return click.option(
        "--dir",
        "directory",
        type=click.Path(path_type=Path),
        default=DEFAULT_DIR,
        show_default=True,
        envvar="CFS_LAB_DIR",
        help="Where the lab lives.",
    )(function)


def _size(_context: click.Context, _option: click.Parameter, text: str) -> str:
    parse_size(text)
    return text


disk_size_option = click.option(
    "--disk-size", default="4G", show_default=True, callback=_size, help="Size of each disk."
)


def done(as_json: bool, text: str, **data: Any) -> None:
    """Report success as a line or as JSON."""
    print(json.dumps({"done": text, **data}) if as_json else text)


@click.group(cls=ToolGroup, name="cfs-lab")
def main() -> None:
    """Run a whole cluster on this machine: namespaces as nodes, files as disks."""
    if not {"-h", "--help"} & set(sys.argv):
        need_root("cfs-lab", "it makes namespaces and mounts: use sudo")


@main.command()
@click.option("--nodes", type=click.IntRange(1, NODES_MAX), default=3, show_default=True,
              help="Nodes.")  # fmt: skip
@click.option("--storage", type=click.IntRange(1, SERVERS_MAX), default=2, show_default=True,
              help="Storage hosts.")  # fmt: skip
@disk_size_option
@click.option("--profile", type=click.Choice(["fast", "default"]), default="fast",
              show_default=True, help="How fast failures are noticed.")  # fmt: skip
@common
def up(
    nodes: int, storage: int, disk_size: str, profile: str, directory: Path, as_json: bool
) -> None:
    """Bring everything up: to a mounted, quorate cluster."""
    lab = cluster.create(directory, LabState(nodes, storage, disk_size, profile))
    cluster.up(
        lab, (lambda _text: None) if as_json else (lambda text: print(f"up: {text}", flush=True))
    )
    done(as_json, "the cluster is up", status=cluster.status(lab))


@main.command()
@common
def status(directory: Path, as_json: bool) -> None:
    """Show hosts, cables, processes, mounts."""
    data = cluster.status(Lab.load(directory))
    if as_json:
        print(json.dumps(data, indent=2))
        return
    print(f"lab in {data['directory']}, profile {data['profile']}")
    for row in data["hosts"]:
        nets = " ".join(f"{n}:{'up' if ok else 'cut'}" for n, ok in row["networks"].items())
        extra = ""
        if row["kind"] == "node":
            extra = f"  epoch {row['epoch']}  {'quorate' if row['quorate'] else 'not quorate'}"
            extra += "  mounted" if row["mounted"] else "  not mounted"
        paused = " (paused)" if row["paused"] else ""
        print(f"{row['name']:<4} {row['power']}{paused:<9} networks {nets}{extra}")


@main.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@common
def execute(node: str, command: tuple[str, ...], directory: Path, as_json: bool) -> None:
    """Run a command on a host; exit code and streams pass through."""
    lab = Lab.load(directory)
    host = lab.host(node)
    if as_json:
        result = hosts.run(lab, host, *command, check=False, timeout_s=3600)
        print(
            json.dumps(
                {"exit_code": result.returncode, "stdout": result.stdout, "stderr": result.stderr}
            )
        )
        sys.exit(result.returncode)
    argv = hosts.command_on(lab, host, command)
    sys.stdout.flush()
    os.execvpe(argv[0], argv, hosts.environment())


@main.command()
@click.argument("node")
@common
def shell(node: str, directory: Path, as_json: bool) -> None:
    """Open a shell on a host."""
    lab = Lab.load(directory)
    argv = hosts.command_on(lab, lab.host(node), ["bash"])
    os.execvpe(argv[0], argv, {**hosts.environment(), "PS1": f"[{node}] \\w# "})


def host_verb(name: str, help_text: str, action: Callable[[Lab, Any], None], text: str) -> None:
    """Make a verb that takes one host."""

    @main.command(name, help=help_text)
    @click.argument("node")
    @common
    def verb(node: str, directory: Path, as_json: bool) -> None:
        lab = Lab.load(directory)
        action(lab, lab.host(node))
        done(as_json, f"{node}: {text}", host=node)


host_verb(
    "kill", "Power cut: links gone, SIGKILL of all processes.", cluster.power_cut, "power cut"
)
host_verb("start", "Boot a host; a node rejoins and mounts.", cluster.start, "started")
host_verb(
    "pause",
    "Freeze all processes of a host.",
    lambda lab, host: hosts.freeze(lab, host, frozen=True),
    "paused",
)
host_verb(
    "resume",
    "Let a paused host go on.",
    lambda lab, host: hosts.freeze(lab, host, frozen=False),
    "resumed",
)


@main.command()
@click.argument("node")
@click.argument("part", type=click.Choice(sorted(cluster.CRASH_TARGETS)))
@common
def crash(node: str, part: str, directory: Path, as_json: bool) -> None:
    """SIGKILL one process of a node."""
    lab = Lab.load(directory)
    cluster.crash(lab, lab.node(node), part)
    done(as_json, f"{node}: {part} killed", host=node)


def cable_verb(name: str, help_text: str, up: bool) -> None:
    """Make `cut` or `heal`."""

    @main.command(name, help=help_text)
    @click.argument("node")
    @click.option("--network", "number", type=click.IntRange(1, 2), help="Only this network.")
    @common
    def verb(node: str, number: int | None, directory: Path, as_json: bool) -> None:
        lab = Lab.load(directory)
        for net in NETWORKS if number is None else (number,):
            network.set_cable(lab, lab.host(node), net, up=up)
        done(as_json, f"{node}: {'healed' if up else 'cut'}", host=node)


cable_verb("cut", "Pull the network cables of a host.", up=False)
cable_verb("heal", "Plug the network cables of a host in again.", up=True)


@main.command()
@click.argument("node")
@click.option("--lines", type=click.IntRange(1), default=50, show_default=True,
              help="How many of the newest.")  # fmt: skip
@common
def logs(node: str, lines: int, directory: Path, as_json: bool) -> None:
    """Show the end of a host's logs."""
    lab = Lab.load(directory)
    found = {}
    top = lab.host_directory(lab.host(node))
    for path in sorted([*(top / "log").glob("*.log"), *(top / "run" / "cfs").glob("*.log")]):
        found[path.name] = path.read_text(errors="replace").splitlines()[-lines:]
    if as_json:
        print(json.dumps(found))
        return
    for name, text in found.items():
        print(f"==> {name} <==", *text, sep="\n")


@main.command()
@common
def down(directory: Path, as_json: bool) -> None:
    """Remove everything the lab made; nothing else."""
    existed = cluster.down(directory)
    done(as_json, "the lab is gone" if existed else "there was no lab", existed=existed)


@main.command()
@disk_size_option
@click.option("--keep/--no-keep", default=True, help="Leave the cluster running at the end.")
@common
def demo(disk_size: str, keep: bool, directory: Path, as_json: bool) -> None:
    """The demonstration: a cluster at work, one node killed in the middle, nothing lost."""
    from lab import demo as demonstration

    sys.exit(demonstration.run(directory, disk_size, keep=keep, as_json=as_json))


if __name__ == "__main__":
    main()
