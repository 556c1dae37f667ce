"""`fsck.cfs`: check and repair a file system that is not mounted.

Exit codes as e2fsck: 0 clean, 1 all errors repaired, 4 errors left, 8 the check could not be done,
16 usage, 32 interrupted. Without an option that allows repairs nothing is ever written.
"""

from __future__ import annotations

import sys
from functools import partial

import click
import msgspec
import trio

from cfs.fsck.checker import check, repair
from cfs.fsck.progress_cli import ProgressShow
from cfs.fsck.report import Report
from cfs.fsck.session import Consent, NeedsHumanError, Session
from cfs.volume_io import with_device
from cluster.device import BlockDevice
from cluster.errors import StackError, UsageError
from cluster.tool_cli import ToolCommand

EXIT_REPAIRED = 1
EXIT_ERRORS_LEFT = 4
EXIT_FAILED = 8
EXIT_USAGE = 16
EXIT_INTERRUPTED = 32


class FsckCommand(ToolCommand):
    """Exit codes of e2fsck."""

    usage_exit = EXIT_USAGE
    failed_exit = EXIT_FAILED

    def code_of(self, error: StackError) -> int:
        if isinstance(error, NeedsHumanError):
            return EXIT_ERRORS_LEFT
        return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


def consent_of(*, no: bool, preen: bool, yes: bool, ask: bool) -> Consent:
    """What the options allow. Raises UsageError if they contradict each other."""
    if no + preen + yes > 1 or (no and ask):
        raise UsageError("-n, -p and -y (and -n and --repair) exclude each other")
    if preen:
        return Consent.SAFE
    if yes:
        return Consent.ALL
    if ask:
        if not sys.stdin.isatty():
            raise UsageError(
                "--repair asks questions, and there is no terminal to ask on",
                hint="say -p (repair what loses nothing) or -y (yes to everything)",
            )
        return Consent.ASK
    return Consent.NOTHING


def show(report: Report, *, quiet: bool) -> None:
    """Errors, notes, and one line that sums up."""
    for text in report.errors:
        click.echo(text)
    if report.error_count > len(report.errors):
        click.echo(f"and {report.error_count - len(report.errors)} more errors")
    if quiet:
        return
    for text in report.notes:
        click.echo(text)
    verdict = "clean"
    if report.error_count:
        verdict = f"{report.error_count} errors"
        if report.fixed_count:
            verdict += f", {report.fixed_count} repaired, {report.left_count} left"
        else:
            verdict += f" ({report.lossy_count} of them cost something to repair)"
    if report.reconnected and report.fixed_count:
        verdict += f", {report.reconnected} inodes put into /lost+found"
    click.echo(
        f"{verdict}: {report.inodes} inodes, {report.directories} directories, {report.names} "
        f"names, {report.data_blocks} blocks of data, {report.free_blocks} of "
        f"{report.total_blocks} blocks free"
    )


def code_for(report: Report) -> int:
    if report.unusable:
        return EXIT_FAILED
    if report.left_count:
        return EXIT_ERRORS_LEFT
    return EXIT_REPAIRED if report.fixed_count else 0


async def _ask(progress: ProgressShow, question: str) -> bool:
    progress.pause()
    return await trio.to_thread.run_sync(partial(click.confirm, question, default=True, err=True))


@click.command(cls=FsckCommand, name="fsck.cfs")
@click.argument("target", metavar="VOLUME|FILE")
@click.option("-n", "no", is_flag=True, help="Change nothing: so it is without any option.")
@click.option("--repair", "ask", is_flag=True, help="Repair; ask before something is lost.")
@click.option("-p", "-a", "preen", is_flag=True, help="Repair what loses nothing, else give up.")
@click.option("-y", "yes", is_flag=True, help="Repair everything without asking.")
@click.option("-f", "force", is_flag=True, help="Check even if it looks clean (always so).")
@click.option("-C", "--progress", "lines", is_flag=True, help="Progress without a terminal too.")
@click.option("-q", "--quiet", is_flag=True, help="Show errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--local", is_flag=True, help="TARGET is a file or device of this machine.")
def main(
    target: str,
    no: bool,
    ask: bool,
    preen: bool,
    yes: bool,
    force: bool,
    lines: bool,
    quiet: bool,
    as_json: bool,
    local: bool,
) -> None:
    """Check a cfs file system that is mounted nowhere: every structure. Repair it if asked to.

    A repair is written when all of it is known, in an order that makes an interruption harmless:
    run it again and it goes on.
    """
    consent = consent_of(no=no, preen=preen, yes=yes, ask=ask)
    report = Report()
    with ProgressShow(always=lines, never=quiet) as progress:
        session = Session(report, consent, partial(_ask, progress), progress)

        async def work(device: BlockDevice) -> None:
            await (repair if session.repairing else check)(device, session)

        try:
            trio.run(partial(with_device, writing=session.repairing), target, local, "fsck", work)
        except* (KeyboardInterrupt, click.Abort):
            click.echo("fsck.cfs: interrupted; what was begun goes on with the next run", err=True)
            sys.exit(EXIT_INTERRUPTED)
    if as_json:
        click.echo(msgspec.json.encode(report).decode())
    else:
        show(report, quiet=quiet)
    sys.exit(code_for(report))


if __name__ == "__main__":
    main()
