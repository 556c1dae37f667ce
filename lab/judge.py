"""The judge of coherence: counts stale reads on a mounted cluster.

Claim under test: what a call on one node returned is visible to a call that starts later on any
node. Cells (`lab.judge_cells`) hold a version; a shared *board* outside the file system (all nodes
are processes of one machine) tells which version must be visible at least:

    started    highest version that a writer began to write, and who
    committed  highest version whose call has returned, and by whom
    durable    highest version whose fsync has returned

A reader loads the bound from the board, then reads the cell: a version below the bound is stale;
so is one below what it has seen itself, unless a writer of its own node was at work then (a local
reader may see a write that still waits for its lock); one above `started` is invented. A writer is
a process in one life of its node. When it is to be killed, it is marked dead on the board first:
what it had committed but not made durable may be lost, so the bound of its cells is `durable`, and
what it was writing may be torn. Writers of one cell take turns by a lock on the board.

Besides there are files whose whole content is known (`lab.judge_history`).
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from lab.judge_cells import Cell, open_cells
from lab.judge_history import NODES_MAX, Ledger, PutOutError, WrongContentError

ENTRY = struct.Struct("<QQQQQ")
WRITERS_MAX = 4096
TORN_S = 30.0
TORN_LOOKS = 20
FEW_CELLS = 4
BURST_MAX = 400
HISTORY_STEPS_MAX = 30
HISTORY_WRITE_SHARE = 0.4
DURABLE_SHARE = 0.25
EXAMPLES_MAX = 5
SAY_EVERY = 5000
EXIT_STALE = 1
EXIT_LOST = 3
"""The mount has gone; so far nothing was stale."""


class Entry(NamedTuple):
    """What the board says about a cell."""

    started: int
    starter: int
    committed: int
    by: int
    durable: int


class Board:
    """The shared board, a file outside of the mount, mapped by every judge."""

    def __init__(self, path: Path, cells: int) -> None:
        self.cells = cells
        size = WRITERS_MAX + cells * ENTRY.size
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(self.handle).st_size < size:
            os.ftruncate(self.handle, size)
        self.map = mmap.mmap(self.handle, size)

    def get(self, cell: int) -> Entry:
        return Entry._make(ENTRY.unpack_from(self.map, WRITERS_MAX + cell * ENTRY.size))

    def put(self, cell: int, entry: Entry) -> None:
        ENTRY.pack_into(self.map, WRITERS_MAX + cell * ENTRY.size, *entry)

    def is_dead(self, writer: int) -> bool:
        return bool(self.map[writer])

    def mark_dead(self, writer: int) -> None:
        """For good; a new life has a new number."""
        self.map[writer] = 1

    def is_over(self, writer: int) -> bool:
        return self.map[writer] == 2

    def mark_over(self, writer: int) -> None:
        """It is dead here, but its node may have survived: it is to end."""
        self.map[writer] = 2

    def bound(self, cell: int) -> int:
        """The least version that a read starting now must see."""
        entry = self.get(cell)
        return entry.durable if self.is_dead(entry.by) else entry.committed

    def may_be_torn(self, cell: int) -> bool:
        """Whether a writer died while it wrote it, or before that was durable."""
        entry = self.get(cell)
        unfinished = self.is_dead(entry.starter) and entry.started != entry.committed
        return unfinished or (self.is_dead(entry.by) and entry.committed != entry.durable)

    def lock(self, cell: int) -> bool:
        """Take a cell for writing; the death of the holder releases it. False: it is taken."""
        try:
            place = ENTRY.size, WRITERS_MAX + cell * ENTRY.size
            fcntl.lockf(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB, *place)
        except BlockingIOError:
            return False
        return True

    def unlock(self, cell: int) -> None:
        place = ENTRY.size, WRITERS_MAX + cell * ENTRY.size
        fcntl.lockf(self.handle, fcntl.LOCK_UN, *place)


class Judge:
    """One process on one node that reads, checks and now and then writes."""

    def __init__(
        self, board: Board, cells: list[Cell], ledgers: list[Ledger], writer: int, seed: int
    ) -> None:
        self.board = board
        self.cells = cells
        self.ledgers = ledgers
        self.writer = writer
        self.random = random.Random(f"{seed}/{writer}")
        self.seen = [0] * len(cells)
        self.checks: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        self.torn = 0
        self.stale: list[str] = []

    def write(self, index: int) -> None:
        """Write the next version of a cell, unless somebody else does just that."""
        board, cell = self.board, self.cells[index]
        if not board.lock(index):
            return
        try:
            entry = board.get(index)
            version, durable = entry.started + 1, self.random.random() < DURABLE_SHARE
            how = self.random.choice(cell.writes)
            board.put(index, entry._replace(started=version, starter=self.writer))
            cell.write(version, how, durable=durable)
            kept = version if durable else entry.durable
            board.put(index, Entry(version, self.writer, version, self.writer, kept))
            self.writes[_label(cell, how)] += 1
        finally:
            board.unlock(index)

    def check(self, index: int) -> None:
        """Read a cell and judge."""
        cell = self.cells[index]
        how = self.random.choice(cell.ways)
        bound = self.board.bound(index)
        found = self._whole(index, how)
        entry = self.board.get(index)
        self.checks[_label(cell, how)] += 1
        if found is None and self.board.may_be_torn(index):
            self.torn += 1
        elif found is None or not self._agrees(index, found, bound, entry.started):
            self.stale.append(
                f"cell {index}, {_label(cell, how)}: read {found}, bound {bound}, "
                f"seen {self.seen[index]}, {entry}"
            )
        elif not cell.parity and not self._local_write(entry, found):
            self.seen[index] = found

    def turn(self) -> None:
        """Read or change a file with a history, and judge."""
        ledger = self.random.choice(self.ledgers)
        try:
            if self.random.random() < HISTORY_WRITE_SHARE:
                self.writes.update(f"history {how}" for how in ledger.write())
            else:
                self.checks[f"history {ledger.read()}"] += 1
        except WrongContentError as error:
            if self.board.is_dead(self.writer):  # what it has locked may be others' by now
                self.ledgers.clear()
            else:
                self.stale.append(str(error))
                self.ledgers.remove(ledger)
        except PutOutError:
            self.ledgers.clear()

    def _whole(self, index: int, how: str) -> int | None:
        """What a read gives, once it is not torn by a write that is under way."""
        end = time.monotonic() + TORN_S
        looks = 0
        while (found := self.cells[index].read(how)) is None and time.monotonic() < end:
            looks += 1
            if looks > TORN_LOOKS:
                if self.board.may_be_torn(index):
                    break
                time.sleep(0.001)
        return found

    def _agrees(self, index: int, found: int, bound: int, started: int) -> bool:
        if self.cells[index].parity:
            return started > bound or found == started % 2
        return max(bound, self.seen[index]) <= found <= started

    def _local_write(self, entry: Entry, found: int) -> bool:
        return found > entry.committed and entry.starter % NODES_MAX == self.writer % NODES_MAX

    def result(self) -> dict[str, object]:
        return {
            "writer": self.writer,
            "checks": dict(self.checks),
            "writes": dict(self.writes),
            "total": self.checks.total(),
            "torn": self.torn,
            "stale": len(self.stale),
            "examples": self.stale[:EXAMPLES_MAX],
        }


def _label(cell: Cell, how: str) -> str:
    return f"{type(cell).__name__.lower()} {how}"


def run_judge(
    judge: Judge, checks: int, write_share: float, stop: Callable[[], bool], say: Callable[[], None]
) -> None:
    """Read and write at random until so many checks were made. Reads come in bursts on a few cells:
    most are answered from this node's caches, just where a stale byte would be. `say` is called
    now and then: a SIGBUS may end all."""
    done = said = stale = 0
    while done < checks and not stop():
        if done >= said + SAY_EVERY or len(judge.stale) > stale:
            say()
            said, stale = done, len(judge.stale)
        index = judge.random.randrange(len(judge.cells))
        if judge.random.random() < write_share:
            judge.write(index)
        few = judge.random.sample(range(len(judge.cells)), k=FEW_CELLS)
        for _ in range(judge.random.randrange(1, BURST_MAX)):
            judge.check(judge.random.choice(few))
            done += 1
        for _ in range(judge.random.randrange(HISTORY_STEPS_MAX)):
            if judge.ledgers:
                judge.turn()


def open_ledgers(top: Path, board: Path, count: int, writer: int) -> list[Ledger]:
    """The files with a history, whose histories lie beside the board."""
    dead = Board(board, 0).is_dead
    sides = [board.with_name(f"{board.name}-history-{number}") for number in range(count)]
    return [Ledger(top, side, number, writer, dead) for number, side in enumerate(sides)]


def prepare(top: Path, board: Path, cells: int, histories: int) -> None:
    """Make the files of all cells at version 0, the files with a history, and the board."""
    top.mkdir(exist_ok=True)
    for cell in open_cells(top, cells):
        cell.prepare()
    Board(board, cells)
    for ledger in open_ledgers(top, board, histories, 0):
        ledger.prepare()


@click.command()
@click.argument("top", type=click.Path(path_type=Path))
@click.option("--board", type=click.Path(path_type=Path), required=True)
@click.option("--writer", type=click.IntRange(1, WRITERS_MAX - 1), default=1,
              help=f"Node + {NODES_MAX} * life.")  # fmt: skip
@click.option("--cells", default=64)
@click.option("--histories", default=0, help="Files with a history besides.")
@click.option("--uring/--no-uring", default=True, help="Change them by io_uring, too.")
@click.option("--checks", default=40_000)
@click.option("--write-share", default=0.5)
@click.option("--seconds", default=120.0)
@click.option("--seed", default=1)
@click.option("--prepare", "only_prepare", is_flag=True, help="Make the cells and end.")
def main(
    top: Path,
    board: Path,
    writer: int,
    cells: int,
    histories: int,
    uring: bool,
    checks: int,
    write_share: float,
    seconds: float,
    seed: int,
    only_prepare: bool,
) -> None:
    """Judge the coherence of the files below TOP. The last line printed is the result. Exit code 1:
    something was stale; 3: the mount has gone."""
    if only_prepare:
        prepare(top, board, cells, histories)
        return
    ledgers = open_ledgers(top, board, histories, writer)
    for ledger in ledgers:
        ledger.begin(f"{seed}/{writer}", uring=uring)
    judge = Judge(Board(board, cells), open_cells(top, cells), ledgers, writer, seed)
    end = time.monotonic() + seconds
    print("started", flush=True)

    def over() -> bool:
        return time.monotonic() > end or judge.board.is_over(writer)

    def say(lost: str = "") -> None:
        print(json.dumps({**judge.result(), "lost": lost}), flush=True)

    lost = ""
    try:
        run_judge(judge, checks, write_share, over, say)
    except OSError as error:
        lost = str(error)
    say(lost)
    sys.exit(EXIT_STALE if judge.stale else EXIT_LOST if lost else 0)


if __name__ == "__main__":
    main()
