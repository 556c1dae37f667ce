"""`mkfs.cfs`: make a file system on a volume (`vg/lv`) or in a file.

A volume is opened through clusterd as a registered instance of its own, in a mode that excludes
every other opener: so a file system that is mounted anywhere is never overwritten. What looks used
already (a file system, a partition table, a member of LVM or RAID) is refused without `--yes`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable

import click
import trio

from cfs import mkfs_plan
from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import SLOTS_MAX
from cfs.stage import read_superblock
from cfs.volume_io import with_device
from cluster.device import BlockDevice
from cluster.errors import RefusedError
from cluster.signatures_io import signature
from cluster.sizes import parse_size
from cluster.tool_cli import ToolCommand


async def _refuse_used(device: BlockDevice) -> None:
    try:
        label = (await read_superblock(device)).label
        what = "cfs file system" + (f" called {label!r}" if label else "")
    except CorruptionError:
        what = await signature(device)
    if what:
        raise RefusedError(f"there is something already: {what}")


def _maker(
    choices: mkfs_plan.Choices, *, yes: bool, quiet: bool
) -> Callable[[BlockDevice], Awaitable[None]]:
    async def make(device: BlockDevice) -> None:
        whole = mkfs_plan.plan(device.size_bytes // BLOCK_BYTES, choices)
        if not yes:
            await _refuse_used(device)
        await mkfs_plan.write_plan(device, whole)
        if not quiet:
            made = await read_superblock(device)
            click.echo(
                f"{made.total_blocks} blocks of 4 KiB, {made.group_count} groups, "
                f"{choices.journals} journals, uuid {made.uuid.hex()}"
            )

    return make


@click.command(cls=ToolCommand, name="mkfs.cfs")
@click.argument("target", metavar="VOLUME|FILE")
@click.option("-L", "--label", default="", help="Name of the file system.")
@click.option("-j", "--journals", type=click.IntRange(1, SLOTS_MAX), show_default=True,
              default=mkfs_plan.JOURNALS_DEFAULT,
              help="Journals to begin with; mounts make more.")  # fmt: skip
@click.option("-J", "--journal-size", default="", help="Size of a journal (default: 32M).")
@click.option("--group-blocks", type=click.IntRange(0), default=0, hidden=True)
@click.option("-y", "--yes", "--force", is_flag=True, help="Overwrite what is there.")
@click.option("--local", is_flag=True, help="TARGET is a file or device of this machine.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing when it worked.")
def main(
    target: str,
    label: str,
    journals: int,
    journal_size: str,
    group_blocks: int,
    yes: bool,
    local: bool,
    quiet: bool,
) -> None:
    """Make a cfs file system. Everything in it will be gone."""
    choices = mkfs_plan.Choices(
        uuid=os.urandom(16),
        hash_seed=os.urandom(16),
        now_ns=time.time_ns(),
        label=label,
        journals=journals,
        journal_bytes=parse_size(journal_size, "m") if journal_size else 0,
        group_blocks=group_blocks,
    )
    trio.run(with_device, target, local, "mkfs", _maker(choices, yes=yes, quiet=quiet))


if __name__ == "__main__":
    main()
