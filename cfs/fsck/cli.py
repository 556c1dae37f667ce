"""`fsck.cfs`: check a file system that is not mounted.

Exit codes as e2fsck: 0 clean, 4 errors left, 8 the check could not be done, 16 usage.
"""

from __future__ import annotations

import sys

import click
import msgspec
import trio

from cfs.fsck.checker import check
from cfs.fsck.report import Report
from cfs.volume_io import with_device
from cluster.device import BlockDevice
from cluster.errors import StackError, UsageError
from cluster.tool_cli import ToolCommand

EXIT_ERRORS_LEFT = 4
EXIT_FAILED = 8
EXIT_USAGE = 16


class FsckCommand(ToolCommand):
    """Exit codes of e2fsck."""

    usage_exit = EXIT_USAGE
    failed_exit = EXIT_FAILED

    def code_of(self, error: StackError) -> int:
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def show(report: Report, *, quiet: bool) -> None:
    for text in report.errors:
        click.echo(text)
    if report.error_count > len(report.errors):
        click.echo(f"and {report.error_count - len(report.errors)} more errors")
    if quiet:
        return
    for text in report.notes:
        click.echo(text)
    click.echo(
        f"{'clean' if report.clean else f'{report.error_count} errors'}: {report.inodes} inodes, "
        f"{report.directories} directories, {report.names} names, {report.data_blocks} blocks of "
        f"data, {report.free_blocks} of {report.total_blocks} blocks free"
    )


@click.command(cls=FsckCommand, name="fsck.cfs")
@click.argument("target", metavar="VOLUME|FILE")
@click.option("-n", "no", is_flag=True, help="Change nothing (always so at present).")
@click.option("-f", "force", is_flag=True, help="Check even if it looks clean (always so).")
@click.option("-q", "--quiet", is_flag=True, help="Show errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--local", is_flag=True, help="TARGET is a file or device of this machine.")
def main(target: str, no: bool, force: bool, quiet: bool, as_json: bool, local: bool) -> None:
    """Check a cfs file system: every structure, read-only."""
    found: list[Report] = []

    async def work(device: BlockDevice) -> None:
        found.append(await check(device))

    trio.run(with_device, target, local, "fsck", work)
    (report,) = found
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        show(report, quiet=quiet)
    sys.exit(0 if report.clean else EXIT_ERRORS_LEFT)


if __name__ == "__main__":
    main()
