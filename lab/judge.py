"""The judge of coherence: counts stale reads on a mounted cluster.

Claim under test: what a call on one node returned is visible to a call that starts later on any
node. Cells hold a version; a shared *board* outside the file system (all lab nodes are processes of
one machine) tells which version must be visible at least:

    started    highest version that a writer began to write
    committed  highest version whose call has returned
    by         the node that committed it
    durable    highest version whose fsync has returned

A reader loads the bound from the board, then reads the cell: a version below the bound, or below
one that it has seen itself, is stale; one above `started` is invented. When a node is to be
killed, it is marked dead on the board first: what it had committed but not fsynced may be lost, so
the bound of its cells is `durable`.

Kinds of cells: a 4-KiB block of a file, written by pwrite, read by pread, by O_DIRECT and through a
mapping; a size, written by ftruncate, read by stat; a name, changed by rename, read by listdir.
Writers of one cell take turns by a lock on the board, so that versions rise.
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
import zlib
from collections.abc import Callable
from pathlib import Path

import click

CELL = struct.Struct("<QQQQ")
DEAD_BYTES = 256
BLOCK_BYTES = 4096
BLOCKS_PER_FILE = 8
READERS = ("pread", "direct", "mapped", "stat", "listdir")
TEAR_RETRIES_MAX = 50
FEW_CELLS = 4
BURST_MAX = 120


class Board:
    """The shared board, a file outside of the mount, mapped by every judge."""

    def __init__(self, path: Path, cells: int) -> None:
        self.cells = cells
        size = DEAD_BYTES + cells * CELL.size
        self.handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if os.fstat(self.handle).st_size < size:
            os.ftruncate(self.handle, size)
        self.map = mmap.mmap(self.handle, size)

    def get(self, cell: int) -> tuple[int, int, int, int]:
        started, committed, by, durable = CELL.unpack_from(self.map, DEAD_BYTES + cell * CELL.size)
        return started, committed, by, durable

    def put(self, cell: int, started: int, committed: int, by: int, durable: int) -> None:
        CELL.pack_into(self.map, DEAD_BYTES + cell * CELL.size, started, committed, by, durable)

    def bound(self, cell: int) -> int:
        """The least version that a read starting now must see."""
        _started, committed, by, durable = self.get(cell)
        return durable if by and self.map[by] else committed

    def mark_dead(self, node: int, *, dead: bool = True) -> None:
        self.map[node] = int(dead)

    def lock(self, cell: int, *, wait: bool) -> bool:
        """Take a cell for writing; the death of the holder releases it."""
        operation = fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)
        try:
            fcntl.lockf(self.handle, operation, CELL.size, DEAD_BYTES + cell * CELL.size)
        except BlockingIOError:
            return False
        return True

    def unlock(self, cell: int) -> None:
        fcntl.lockf(self.handle, fcntl.LOCK_UN, CELL.size, DEAD_BYTES + cell * CELL.size)


class Block:
    """A 4-KiB block: version, cell, CRC of the rest."""

    def __init__(self, top: Path, cell: int) -> None:
        self.cell = cell
        self.path = top / f"blocks-{cell // BLOCKS_PER_FILE}"
        self.offset = cell % BLOCKS_PER_FILE * BLOCK_BYTES
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self.direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        self.buffer = mmap.mmap(-1, BLOCK_BYTES)
        self.mapping: mmap.mmap | None = None

    def write(self, version: int, *, durable: bool) -> None:
        body = random.Random(f"{self.cell}/{version}").randbytes(BLOCK_BYTES - 20)
        head = struct.pack("<QQI", version, self.cell, zlib.crc32(body))
        os.pwrite(self.handle, head + body, self.offset)
        if durable:
            os.fsync(self.handle)

    def _check(self, data: bytes) -> int | None:
        version, cell, check = struct.unpack_from("<QQI", data)
        if not any(data):
            return 0
        if cell != self.cell or zlib.crc32(data[20:]) != check:
            return None
        return int(version)

    def read(self, how: str) -> int | None:
        """The version, or None for a block that is not whole (a local write was under way)."""
        if how == "pread":
            return self._check(os.pread(self.handle, BLOCK_BYTES, self.offset))
        if how == "direct":
            os.preadv(self.direct, [self.buffer], self.offset)
            return self._check(self.buffer[:])
        if self.mapping is None:
            length = BLOCK_BYTES * BLOCKS_PER_FILE
            self.mapping = mmap.mmap(self.handle, length, mmap.MAP_SHARED, mmap.PROT_READ)
        return int(struct.unpack_from("<Q", self.mapping, self.offset)[0])


class Size:
    """A file whose size is the version."""

    def __init__(self, top: Path, cell: int) -> None:
        self.path = top / f"size-{cell}"
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)

    def write(self, version: int, *, durable: bool) -> None:
        os.ftruncate(self.handle, version)
        if durable:
            os.fsync(self.handle)

    def read(self, _how: str) -> int | None:
        return self.path.stat().st_size


class Name:
    """A directory with one entry, whose name is the version."""

    def __init__(self, top: Path, cell: int) -> None:
        self.path = top / f"name-{cell}"
        self.path.mkdir(exist_ok=True)

    def write(self, version: int, *, durable: bool) -> None:
        (old,) = os.listdir(self.path)
        os.rename(self.path / old, self.path / str(version))
        if durable:
            handle = os.open(self.path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def read(self, _how: str) -> int | None:
        names = os.listdir(self.path)
        return int(names[0]) if len(names) == 1 else None


Cell = Block | Size | Name


def open_cells(top: Path, count: int) -> list[Cell]:
    """Half of the cells are blocks, a quarter sizes, a quarter names."""
    half, quarter = count // 2, count // 4
    cells: list[Cell] = [Block(top, i) for i in range(half)]
    cells += [Size(top, i) for i in range(half, half + quarter)]
    cells += [Name(top, i) for i in range(half + quarter, count)]
    return cells


def prepare(top: Path, count: int) -> None:
    """Make the files of all cells at version 0."""
    top.mkdir(exist_ok=True)
    for cell in open_cells(top, count):
        if isinstance(cell, Block):
            os.ftruncate(cell.handle, BLOCK_BYTES * BLOCKS_PER_FILE)
            os.fsync(cell.handle)
        elif isinstance(cell, Name) and not os.listdir(cell.path):
            (cell.path / "0").touch()


class Judge:
    """One process on one node that reads, checks and now and then writes."""

    def __init__(self, board: Board, cells: list[Cell], node: int, seed: int) -> None:
        self.board = board
        self.cells = cells
        self.node = node
        self.random = random.Random(f"{seed}/{node}")
        self.seen = [0] * len(cells)
        self.checks = dict.fromkeys(READERS, 0)
        self.writes = 0
        self.stale: list[str] = []

    def kinds(self, cell: Cell) -> tuple[str, ...]:
        if isinstance(cell, Block):
            return ("pread", "direct", "mapped")
        return ("stat",) if isinstance(cell, Size) else ("listdir",)

    def write(self, index: int) -> None:
        if not self.board.lock(index, wait=False):
            return
        try:
            started, committed, by, durable = self.board.get(index)
            version = started + 1
            self.board.put(index, version, committed, by, durable)
            sync = self.random.random() < 0.25
            self.cells[index].write(version, durable=sync)
            kept = version if sync else durable
            self.board.put(index, version, version, self.node, kept)
            self.writes += 1
        finally:
            self.board.unlock(index)

    def check(self, index: int) -> None:
        cell = self.cells[index]
        how = self.random.choice(self.kinds(cell))
        bound = max(self.board.bound(index), 0)
        version: int | None = None
        for _ in range(TEAR_RETRIES_MAX):
            version = cell.read(how)
            if version is not None:
                break
        started = self.board.get(index)[0]
        self.checks[how] += 1
        if version is None:
            self.stale.append(f"cell {index} by {how}: never whole")
        elif version < bound or version < self.seen[index] or version > started:
            self.stale.append(
                f"cell {index} by {how}: read {version}, bound {bound}, "
                f"seen {self.seen[index]}, started {started}"
            )
        else:
            self.seen[index] = version


def run_judge(judge: Judge, checks: int, write_share: float, stop: Callable[[], bool]) -> None:
    """Read and write at random until so many checks were made. Reads come in bursts on a few cells:
    most are answered from this node's caches, just where a stale byte would be."""
    done = 0
    while done < checks and not stop():
        index = judge.random.randrange(len(judge.cells))
        if judge.random.random() < write_share:
            judge.write(index)
        few = judge.random.sample(range(len(judge.cells)), k=FEW_CELLS)
        for _ in range(judge.random.randrange(1, BURST_MAX)):
            judge.check(judge.random.choice(few))
            done += 1


@click.command()
@click.argument("top", type=click.Path(path_type=Path))
@click.option("--board", type=click.Path(path_type=Path), required=True)
@click.option("--node", type=int, required=True)
@click.option("--cells", default=48)
@click.option("--checks", default=40_000)
@click.option("--write-share", default=0.5)
@click.option("--seconds", default=120.0)
@click.option("--seed", default=1)
@click.option("--prepare", "only_prepare", is_flag=True, help="Make the cells and end.")
def main(
    top: Path,
    board: Path,
    node: int,
    cells: int,
    checks: int,
    write_share: float,
    seconds: float,
    seed: int,
    only_prepare: bool,
) -> None:
    """Judge the coherence of the files below TOP."""
    if only_prepare:
        prepare(top, cells)
        Board(board, cells)
        return
    judge = Judge(Board(board, cells), open_cells(top, cells), node, seed)
    end = time.monotonic() + seconds
    print("started", flush=True)
    run_judge(judge, checks, write_share, lambda: time.monotonic() > end)
    print(
        json.dumps(
            {
                "node": node,
                "seed": seed,
                "checks": judge.checks,
                "writes": judge.writes,
                "total": sum(judge.checks.values()),
                "stale": len(judge.stale),
                "examples": judge.stale[:5],
            }
        ),
        flush=True,
    )
    sys.exit(1 if judge.stale else 0)


if __name__ == "__main__":
    main()
