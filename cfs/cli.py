"""`cfsctl`: a mounted file system from the command line.

A blocking client of clusterd's control socket, which passes the calls on to the mount process of
this node. MOUNT is a mount point or the volume (`vg/lv`). Exit codes: docs/exit-codes.md.
"""

from __future__ import annotations

import os
from typing import Any

import click
import msgspec

from cfs.mount.system_io import fuse_mounts
from cluster.control_client_io import call
from cluster.errors import RefusedError, UsageError
from cluster.tool_cli import ToolGroup

TIMEOUT_S = 120.0
OFFSET_MAX = (1 << 63) - 1
_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def ask(verb: str, mount: str, **params: int) -> Any:
    """One query of the mount process."""
    where = os.path.abspath(mount) if mount.startswith((".", "/")) else mount
    return call(f"cfs.{verb}", {"mountpoint": where, **params}, timeout_s=TIMEOUT_S)


def show_json(found: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


def size(count: int) -> str:
    """Bytes for people."""
    value = count / 1024
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{value:.1f} {unit}"


def table(titles: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        click.echo("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


def show_totals(mount: str, totals: dict[str, int]) -> None:
    unit = totals["block_bytes"]
    all_bytes, free = totals["blocks"] * unit, totals["free_blocks"] * unit
    used = all_bytes - free
    share = f"{100 * used / all_bytes:.0f}%" if all_bytes else "-"
    table(
        ["mount", "size", "used", "free", "use"],
        [[mount, size(all_bytes), size(used), size(free), share]],
    )


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
mount_argument = click.argument("mount", metavar="MOUNT")


@click.group(cls=ToolGroup, name="cfsctl")
def main() -> None:
    """Look at and change a mounted cfs file system."""


@main.command()
@mount_argument
@json_option
def df(mount: str, as_json: bool) -> None:
    """Show how full the file system is, as of now on the disk."""
    found = ask("df", mount)
    if as_json:
        show_json(found)
    else:
        show_totals(mount, found)


@main.command()
@mount_argument
@json_option
def journals(mount: str, as_json: bool) -> None:
    """Show the journals and who uses them."""
    found = ask("journals", mount)
    if as_json:
        show_json(found)
        return
    rows = [
        [
            str(row["slot"]),
            row["state"] + (" (this mount)" if row["mine"] else ""),
            row["owner"],
            size(row["blocks"] * 4096),
            str(row["sequence"]),
        ]
        for row in found
    ]
    table(["slot", "state", "owner", "size", "sequence"], rows)


@main.command()
@mount_argument
@json_option
def grow(mount: str, as_json: bool) -> None:
    """Use all of the volume after it became larger. Every mount sees it by itself."""
    found = ask("grow", mount)
    if as_json:
        show_json(found)
    else:
        show_totals(mount, found)


@main.command()
@mount_argument
def sync(mount: str) -> None:
    """Make everything that was written on this node durable: sync(2) does not reach the mount."""
    ask("sync", mount)


@main.command()
@mount_argument
@json_option
def stats(mount: str, as_json: bool) -> None:
    """Show the counters of this node's mount process."""
    found = ask("counters", mount)
    if as_json:
        show_json(found)
    else:
        table(["counter", "value"], [[key, str(value)] for key, value in sorted(found.items())])


def show_losses(lost: dict[str, Any]) -> None:
    for file in lost["files"]:
        click.echo(f"unwritten: inode {file['ino']}: {size(file['bytes'])}")
    click.echo(
        f"{len(lost['files'])} files with unwritten data, "
        f"{lost['metadata_blocks']} changed metadata blocks not yet durable"
    )


@main.command()
@mount_argument
@json_option
def waiting(mount: str, as_json: bool) -> None:
    """Show the requests of programs that wait in this node's mount, and what is unwritten."""
    found = {"requests": ask("waiting", mount), "losses": ask("losses", mount)}
    if as_json:
        show_json(found)
        return
    rows = [
        [row["operation"], str(row["ino"]), str(row["thread"]), f"{row['waited_ms'] / 1000:.1f} s"]
        for row in found["requests"]
    ]
    table(["operation", "inode", "thread", "waits"], rows)
    show_losses(found["losses"])


def lock_row(lock: dict[str, Any]) -> list[str]:
    """One line about a lock of a file."""
    if lock["kind"] == "flock":
        mode, span = {"PR": "shared", "EX": "exclusive"}.get(lock["mode"], "-"), "whole file"
    else:
        last = "end" if lock["end"] == OFFSET_MAX else str(lock["end"])
        mode, span = lock["mode"], f"{lock['start']}-{last}"
    state = "waits" if lock["waits"] else "holds"
    return [lock["kind"], mode, span, state, lock["node"], str(lock["pid"])]


@main.command()
@click.argument("file", metavar="FILE", type=click.Path())
@json_option
def locks(file: str, as_json: bool) -> None:
    """Show who holds and who waits for locks of FILE, on all nodes."""
    status = os.stat(file)
    minor = os.minor(status.st_dev)
    places = [place for _source, place, other in fuse_mounts() if other == minor]
    if os.major(status.st_dev) or not places:
        raise UsageError(f"{file} is on no FUSE mount of this node")
    found = ask("locks", places[0], ino=status.st_ino)
    if as_json:
        show_json({"file": file, "ino": status.st_ino, **found})
        return
    rows = [lock_row(lock) for lock in found["locks"]]
    table(["lock", "mode", "bytes", "state", "node", "pid"], rows)
    for instance in found["no_answer"]:
        click.echo(f"{instance} does not answer")


@main.command()
@mount_argument
@click.option("--yes", is_flag=True, help="Discard what is listed, and end the mount.")
def abandon(mount: str, yes: bool) -> None:
    """End this node's mount without writing: list what is lost, with --yes lose it. Programs that
    use the mount get ENOTCONN; what they had synced is safe."""
    if not yes:
        show_losses(ask("losses", mount))
        raise RefusedError(f"{mount} was not abandoned", hint="add --yes to lose what is listed")
    show_losses(ask("abandon", mount))


@main.command()
@click.argument("target", metavar="VOLUME|FILE")
@click.argument("output", type=click.Path(dir_okay=False))
@click.option("--hash-names", is_flag=True, help="Names become hashes; nobody can turn them back.")
@click.option("--local", is_flag=True, help="TARGET is a file or device of this machine.")
def metadump(target: str, output: str, hash_names: bool, local: bool) -> None:
    """Write the metadata of a file system that is mounted nowhere to OUTPUT, for support.

    No content of files, no targets of symbolic links, no values of attributes.
    """
    from cfs.metadump_cli import write_dump

    blocks = write_dump(target, output, hash_names=hash_names, local=local)
    click.echo(f"{blocks} blocks of metadata in {output}")


@main.command()
@click.argument("dump", type=click.Path(exists=True, dir_okay=False))
@click.argument("image", type=click.Path(dir_okay=False))
def metarestore(dump: str, image: str) -> None:
    """Make a sparse IMAGE from a DUMP. fsck.cfs can check it; it cannot be mounted."""
    from cfs.metadump_cli import restore_dump

    click.echo(f"{restore_dump(dump, image)} blocks of metadata in {image}")


if __name__ == "__main__":
    main()
