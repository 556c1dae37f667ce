"""`cvmctl`: the volume manager from the command line, with LVM's verbs and argument conventions.

A blocking client of clusterd's control socket. Exit codes as LVM: 0 done, 3 bad command line, 5
failed; 6 when clusterd cannot be reached. What destroys data asks on a terminal and needs `--yes`
elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec

from cluster.control_client_io import call
from cluster.errors import (
    EXIT_UNREACHABLE,
    RefusedError,
    StackError,
    UnreachableError,
    UsageError,
)
from cluster.tool_cli import ToolGroup
from cvm.layout import STRIPES_MAX
from cvm.report import (
    REPORTS,
    Style,
    choose_fields,
    help_fields,
    render,
    render_json,
    render_status,
    sort_rows,
)

EXIT_BAD_ARGUMENTS = 3
EXIT_FAILED = 5
TEST_MODE = "  TEST MODE: Metadata will NOT be updated and volumes will not be (de)activated."

F = TypeVar("F", bound=Callable[..., Any])


def ask(verb: str, params: dict[str, Any]) -> Any:
    """One call of the local clusterd."""
    return call(f"cvm.{verb}", params)


class LvmGroup(ToolGroup):
    """A group whose errors and exit codes are LVM's."""

    usage_exit = EXIT_BAD_ARGUMENTS
    failed_exit = EXIT_FAILED

    def code_of(self, error: StackError) -> int:
        if isinstance(error, UnreachableError):
            return EXIT_UNREACHABLE
        return EXIT_BAD_ARGUMENTS if isinstance(error, UsageError) else EXIT_FAILED

    def complain(self, message: str, hint: str) -> None:
        click.echo(f"  {message}", err=True)
        if hint:
            click.echo(f"  ({hint})", err=True)


@click.group(cls=LvmGroup, name="cvmctl")
def main() -> None:
    """Volumes of the cluster: physical volumes, volume groups, logical volumes.

    Physical volumes are named SERVER/EXPORT and volumes VG/LV, the same on every node.

    \b
    Examples:
      cvmctl pvcreate s1/disk0
      cvmctl vgcreate vg0 s1/disk0 s2/disk0
      cvmctl lvcreate -n vol0 -i 2 -I 64k -L 3G vg0
      cvmctl lvextend -L +1G vg0/vol0
      cvmctl lvs -o +devices
    """


def change_options(function: F) -> F:
    """`--yes`, `--dry-run`, `--json` of every verb that changes something."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Answer as JSON."),
        click.option("-q", "--quiet", is_flag=True, help="No output when it worked."),
        click.option("-t", "--dry-run", "--test", is_flag=True, help="Say what would be done."),
        click.option("-y", "--yes", is_flag=True, help="Do not ask; also destroys data."),
        click.option("-f", "--force", is_flag=True, help="The same as --yes."),
    ):
        function = option(function)
    return function


class Change(msgspec.Struct, frozen=True):
    """The common options of a changing verb."""

    yes: bool
    dry_run: bool
    quiet: bool
    as_json: bool


def common(options: dict[str, Any]) -> Change:
    """Take the common options out of a command's keyword arguments."""
    yes = bool(options.pop("yes")) | bool(options.pop("force"))
    return Change(
        yes, bool(options.pop("dry_run")), bool(options.pop("quiet")), bool(options.pop("as_json"))
    )


def perform(verb: str, params: dict[str, Any], change: Change, *, asks: bool = False) -> None:
    """Carry a verb out; on a terminal ask before what the daemon refuses without `--yes`."""
    if change.dry_run and not change.as_json:
        click.echo(TEST_MODE)
    params["dry_run"] = change.dry_run
    if asks:
        params["yes"] = change.yes
    try:
        answer = ask(verb, params)
    except RefusedError as error:
        if change.yes or not asks or not sys.stdin.isatty():
            raise
        click.echo(f"  {error.message}", err=True)
        if not click.confirm("  Really do it?", default=False, err=True):
            raise
        answer = ask(verb, {**params, "yes": True})
    if change.as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())
    elif not change.quiet:
        for message in answer["messages"]:
            click.echo(f"  {message}")


# --- PVs and VGs -------------------------------------------------------------------------------


@main.command()
@click.argument("pvs", nargs=-1, required=True, metavar="PV...")
@change_options
def pvcreate(pvs: tuple[str, ...], **options: Any) -> None:
    """Make exports (SERVER/EXPORT) physical volumes."""
    perform("pvcreate", {"pvs": pvs}, common(options), asks=True)


@main.command()
@click.argument("pvs", nargs=-1, required=True, metavar="PV...")
@change_options
def pvremove(pvs: tuple[str, ...], **options: Any) -> None:
    """Wipe the labels of physical volumes that are in no group."""
    perform("pvremove", {"pvs": pvs}, common(options), asks=True)


@main.command()
@click.option("-s", "--physicalextentsize", default="", metavar="SIZE", help="Extent size (4m).")
@click.argument("vg")
@click.argument("pvs", nargs=-1, required=True, metavar="PV...")
@change_options
def vgcreate(vg: str, pvs: tuple[str, ...], physicalextentsize: str, **options: Any) -> None:
    """Make a volume group of physical volumes."""
    params = {"vg": vg, "pvs": pvs, "extent_size": physicalextentsize}
    perform("vgcreate", params, common(options), asks=True)


@main.command()
@click.argument("vg")
@click.argument("pvs", nargs=-1, required=True, metavar="PV...")
@change_options
def vgextend(vg: str, pvs: tuple[str, ...], **options: Any) -> None:
    """Add physical volumes to a volume group."""
    perform("vgextend", {"vg": vg, "pvs": pvs}, common(options), asks=True)


@main.command()
@click.argument("vgs", nargs=-1, required=True, metavar="VG...")
@change_options
def vgremove(vgs: tuple[str, ...], **options: Any) -> None:
    """Remove volume groups, with their volumes if --yes."""
    perform("vgremove", {"vgs": vgs}, common(options), asks=True)


# --- LVs ---------------------------------------------------------------------------------------


def size_options(function: F) -> F:
    """`-L`, `-l`, `-i`, `-I` as in LVM."""
    for option in (
        click.option("-L", "--size", default="", metavar="[+]SIZE", help="10G, +1G, 512m."),
        click.option(
            "-l", "--extents", default="", metavar="[+]N[%WHAT]", help="100, 100%FREE, 50%VG."
        ),
        click.option(
            "-i",
            "--stripes",
            type=click.IntRange(1, STRIPES_MAX),
            metavar="N",
            help=f"Number of stripes, 1 to {STRIPES_MAX}.",
        ),
        click.option("-I", "--stripesize", default="", metavar="SIZE", help="Stripe unit (64k)."),
    ):
        function = option(function)
    return function


@main.command()
@click.option("-n", "--name", default="", help="Name (lvolN).")
@click.option("--type", "kind", type=click.Choice(["linear", "striped"]), default=None,
              help="How it lies on its PVs.")  # fmt: skip
@size_options
@click.argument("vg")
@click.argument("pvs", nargs=-1, metavar="[PV...]")
@change_options
def lvcreate(vg: str, pvs: tuple[str, ...], name: str, kind: str | None, **options: Any) -> None:
    """Make a logical volume in VG, linear or with -i stripes."""
    change = common(options)
    stripes = int(options["stripes"] or 0)
    if kind == "linear" and stripes > 1:
        raise UsageError("A linear volume has no stripes.", hint="leave --type or -i out")
    if kind == "striped" and stripes == 0:
        stripes = 2
    vg = vg.removeprefix("/dev/")
    if "/" in vg:
        raise UsageError(f'"{vg}" is not a group.', hint="lvcreate -n NAME -L SIZE VG")
    params = {
        "vg": vg,
        "name": name.removeprefix(f"{vg}/"),
        "size": options["size"],
        "extents": options["extents"],
        "stripes": stripes,
        "stripe_size": options["stripesize"],
        "pvs": pvs,
    }
    perform("lvcreate", params, change)


@main.command()
@size_options
@click.argument("volume", metavar="VG/LV")
@click.argument("pvs", nargs=-1, metavar="[PV...]")
@change_options
def lvextend(volume: str, pvs: tuple[str, ...], **options: Any) -> None:
    """Make a volume larger; all nodes that have it open see the new size at once."""
    change = common(options)
    params = {
        "volume": volume,
        "size": options["size"],
        "extents": options["extents"],
        "stripes": int(options["stripes"] or 0),
        "stripe_size": options["stripesize"],
        "pvs": pvs,
    }
    perform("lvextend", params, change)


@main.command()
@click.argument("volumes", nargs=-1, required=True, metavar="VG[/LV]...")
@change_options
def lvremove(volumes: tuple[str, ...], **options: Any) -> None:
    """Remove volumes that nobody has open; VG alone means all of its volumes."""
    perform("lvremove", {"volumes": volumes}, common(options), asks=True)


@main.command()
@click.option("--mode", default="sharedwrite", show_default=True, help="Mode of the activation.")
@click.argument("volume", metavar="VG/LV")
@change_options
def activate(volume: str, mode: str, **options: Any) -> None:
    """Hold a volume on this node in a mode: sharedread, sharedwrite, readonly, exclusivewrite,
    exclusive. (A mount opens its volume by itself.)"""
    perform("activate", {"volume": volume, "mode": mode}, common(options))


@main.command()
@click.argument("volume", metavar="VG/LV")
@change_options
def deactivate(volume: str, **options: Any) -> None:
    """Let go of a volume that was activated on this node."""
    perform("deactivate", {"volume": volume}, common(options))


# --- listings ----------------------------------------------------------------------------------


def listing_options(function: F) -> F:
    """The options of LVM's reporting commands."""
    for option in (
        click.option("-o", "--options", multiple=True, metavar="[+|-]FIELD,...", help="Columns."),
        click.option("-O", "--sort", default="", metavar="[-]FIELD,...", help="Order."),
        click.option("--units", default="r", metavar="hrbskmgtpe", help="Units of sizes."),
        click.option("--nosuffix", is_flag=True, help="No unit behind sizes."),
        click.option("--noheadings", is_flag=True, help="No line of headings."),
        click.option("--unquoted", is_flag=True, hidden=True),
        click.option("--unbuffered", is_flag=True, hidden=True),
        click.option("--noaligned", is_flag=True, help="Columns are not aligned."),
        click.option("--separator", default="", help="What stands between columns."),
        click.option("--json", "as_json", is_flag=True, help="LVM's JSON."),
        click.option(
            "--reportformat", type=click.Choice(["basic", "json"]), default="basic", hidden=True
        ),
        click.argument("names", nargs=-1),
    ):
        function = option(function)
    return function


def listing(verb: str, names: tuple[str, ...], options: dict[str, Any]) -> None:
    """Print one of the listings."""
    report = REPORTS[verb]
    chosen = tuple(options["options"])
    if any("help" in one.split(",") for one in chosen):
        click.echo("\n".join(help_fields(report)))
        return
    fields = choose_fields(report, chosen)
    style = Style(
        units=options["units"],
        suffix=not options["nosuffix"],
        headings=not options["noheadings"],
        separator=options["separator"],
        aligned=not options["noaligned"],
    )
    rows = sort_rows(report, ask(verb, {"names": names})["rows"], options["sort"])
    if options["as_json"] or options["reportformat"] == "json":
        click.echo(render_json(report, fields, rows, style))
        return
    for line in render(fields, rows, style):
        click.echo(line)


@main.command()
@listing_options
def pvs(names: tuple[str, ...], **options: Any) -> None:
    """List physical volumes."""
    listing("pvs", names, options)


@main.command()
@listing_options
def vgs(names: tuple[str, ...], **options: Any) -> None:
    """List volume groups."""
    listing("vgs", names, options)


@main.command()
@listing_options
def lvs(names: tuple[str, ...], **options: Any) -> None:
    """List logical volumes."""
    listing("lvs", names, options)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Typed JSON, sizes in bytes.")
@click.argument("names", nargs=-1, metavar="[VG...]")
def status(names: tuple[str, ...], as_json: bool) -> None:
    """Show groups, volumes, their legs and servers, and who has them open."""
    rows = ask("status", {"names": names})["rows"]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"groups": rows}), indent=2).decode())
        return
    for line in render_status(rows):
        click.echo(line)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Whole texts as JSON.")
@click.argument("vg")
def history(vg: str, as_json: bool) -> None:
    """List the archived versions of a group's metadata."""
    versions = ask("history", {"vg": vg})["versions"]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(versions), indent=2).decode())
        return
    for one in versions:
        click.echo(f"  {one['sequence']:>6}  {one['written_on']:<12} {one['description']}")


if __name__ == "__main__":
    main()
