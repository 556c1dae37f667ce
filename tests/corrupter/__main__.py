"""python -m tests.corrupter [--seeds N] [--seed S] [--cuts N] [--only CLASS] [--list]

The whole campaign: random damage from many seeds, and the repair of every class of the table cut
after each of its writes. Prints the seed of what fails; exit code 1 then.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback

import trio

from tests.corrupter import blocks, content, names, tables
from tests.corrupter.campaign import cut_repairs, random_damage
from tests.corrupter.table import TABLE
from tests.corrupter.world import build

TABLES = (blocks, content, names, tables)
RUN_S = 120


async def campaign(arguments: argparse.Namespace) -> int:
    world = await build()
    failed = 0
    begin = time.monotonic()
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        try:
            with trio.fail_after(RUN_S):
                await random_damage(world, seed)
        except Exception:
            failed += 1
            print(f"seed {seed}:\n{traceback.format_exc()[-arguments.tail :]}", flush=True)
    print(f"{arguments.seeds} seeds, {failed} failed, {time.monotonic() - begin:.0f} s", flush=True)
    cuts = 0
    names = [name for name in TABLE if arguments.only in name] if arguments.cuts else []
    for name in names:
        try:
            cuts += await cut_repairs(world, TABLE[name], arguments.seed, arguments.cuts)
        except Exception:
            failed += 1
            print(f"cut of {name!r}:\n{traceback.format_exc()[-arguments.tail :]}", flush=True)
    print(f"{len(names)} classes, {cuts} cuts; {failed} failed in all", flush=True)
    return 1 if failed else 0


def show_table() -> int:
    """Each class: what a mount does, whether the repair asks because something is lost."""
    for damage in TABLE.values():
        answer = "goes on"
        if damage.refused:
            answer = "refuses to begin"
        elif damage.fails or damage.may_fail:
            answer = "EIO, goes on"
        elif damage.differs:
            answer = "cannot know"
        repair = "asks" if damage.lossy else "loses nothing"
        print(f"{damage.name:45} mount: {answer:18} repair: {repair}")
    print(f"{len(TABLE)} classes")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.corrupter")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--cuts", type=int, default=1000, help="at most so many per class")
    parser.add_argument("--only", default="", help="cut only classes whose name has this")
    parser.add_argument("--list", action="store_true", help="print the table of classes")
    parser.add_argument("--tail", type=int, default=1500, help="characters of each traceback")
    arguments = parser.parse_args()
    if arguments.list:
        return show_table()
    return trio.run(campaign, arguments)


if __name__ == "__main__":
    sys.exit(main())
