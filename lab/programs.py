"""Programs that run on the nodes of a lab, as separate client processes of the mount.

`python -m lab.programs VERB ...`; each prints JSON lines and exits with 1 when a byte is wrong.
A record is: magic, writer, index, body length, CRC of the body, body; bodies come from a seed, so a
reader can tell a whole record from a torn or a foreign one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import sqlite3
import struct
import sys
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import click

RECORD = struct.Struct("<8sIIII")
MAGIC = b"cfs-rec\n"
RECORD_BYTES_MAX = 1 << 20


def make_record(writer: int, index: int, total_bytes: int, seed: int) -> bytes:
    """A whole record of exactly `total_bytes`."""
    body = random.Random(f"{seed}/{writer}/{index}").randbytes(total_bytes - RECORD.size)
    return RECORD.pack(MAGIC, writer, index, len(body), zlib.crc32(body)) + body


def records(data: mmap.mmap | bytes) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (offset, writer, index, whole) of each record; stops at the first that is no record."""
    offset = 0
    while offset + RECORD.size <= len(data):
        magic, writer, index, length, check = RECORD.unpack_from(data, offset)
        end = offset + RECORD.size + length
        if magic != MAGIC or end > len(data):
            yield offset, 0, 0, False
            return
        yield offset, writer, index, zlib.crc32(data[offset + RECORD.size : end]) == check
        offset = end


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


@click.group()
def app() -> None:
    """Client programs of the demonstration and of the tests."""


@app.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--files", default=3000)
def pack(path: Path, files: int) -> None:
    """Pack a source tree of some thousand files (this Python's own) into a tar file."""
    import sysconfig

    roots = [Path(sysconfig.get_paths()[name]) for name in ("stdlib", "purelib")]
    found: list[tuple[str, Path]] = []
    for number, root in enumerate(roots):
        for item in sorted(root.rglob("*")):
            inside = item.relative_to(root)
            if number == 0 and "site-packages" in inside.parts:
                continue
            if item.is_file() and not item.is_symlink() and "__pycache__" not in inside.parts:
                found.append((f"tree/{root.name}{number}/{inside}", item))
    chosen = [pair for pair in found if pair[1].stat().st_size < 1 << 20][:files]
    with tarfile.open(path, "w") as tar:
        for name, item in chosen:
            tar.add(item, name, recursive=False)
    say(files=len(chosen), bytes=path.stat().st_size)


@app.command()
@click.argument("top", type=click.Path(path_type=Path))
def manifest(top: Path) -> None:
    """Print a digest of every name, size and content below a directory, sorted by name."""
    whole = hashlib.sha256()
    count = 0
    for directory, names, files in os.walk(top):
        names[:] = sorted(n for n in names if n != ".git")
        for name in sorted(files):
            item = Path(directory) / name
            content = hashlib.sha256(item.read_bytes()).hexdigest()
            whole.update(f"{item.relative_to(top)} {item.stat().st_size} {content}\n".encode())
            count += 1
    say(files=count, digest=whole.hexdigest())


@app.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--writer", type=int, required=True)
@click.option("--count", default=40)
@click.option("--seed", default=1)
def append(path: Path, writer: int, count: int, seed: int) -> None:
    """Append records of up to 1 MiB with O_APPEND, one write() each."""
    sizes = random.Random(f"{seed}/{writer}")
    buffer = mmap.mmap(-1, RECORD_BYTES_MAX)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for index in range(count):
        total = RECORD_BYTES_MAX if index % 7 == 0 else sizes.randrange(64, RECORD_BYTES_MAX)
        buffer[:total] = make_record(writer, index, total, seed)
        written = os.write(handle, memoryview(buffer)[:total])
        if written != total:
            say(error=f"record {index}: wrote {written} of {total}")
            sys.exit(1)
    os.close(handle)
    say(writer=writer, records=count)


@app.command("check-append")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--writers", type=int, required=True)
@click.option("--count", default=40)
def check_append(path: Path, writers: int, count: int) -> None:
    """Every record of every writer is present once, whole, and in its writer's order."""
    seen: dict[int, list[int]] = {}
    for offset, writer, index, whole in records(path.read_bytes()):
        if not whole:
            say(error=f"torn record at {offset}", size=path.stat().st_size)
            sys.exit(1)
        seen.setdefault(writer, []).append(index)
    good = seen == {w: list(range(count)) for w in range(1, writers + 1)}
    say(records={w: len(i) for w, i in seen.items()}, good=good, bytes=path.stat().st_size)
    sys.exit(0 if good else 1)


@app.command("big-write")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--mib", default=1024)
@click.option("--seed", default=1)
def big_write(path: Path, mib: int, seed: int) -> None:
    """Write a file of 1 MiB blocks, each with its number and checksum; fsync at the end."""
    body = random.Random(seed).randbytes((1 << 20) - 16)
    begin = time.monotonic()
    with path.open("wb", buffering=0) as file:
        for block in range(mib):
            head = struct.pack("<QQ", block, zlib.crc32(body, block))
            file.write(head + body)
        os.fsync(file.fileno())
    say(mib=mib, mib_per_s=round(mib / (time.monotonic() - begin), 1))


@app.command("big-read")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--mib", default=1024)
def big_read(path: Path, mib: int) -> None:
    """Read that file and check every block."""
    begin = time.monotonic()
    with path.open("rb", buffering=0) as file:
        for block in range(mib):
            data = file.read(1 << 20)
            number, check = struct.unpack_from("<QQ", data)
            if number != block or zlib.crc32(data[16:], block) != check:
                say(error=f"block {block} is wrong")
                sys.exit(1)
    say(mib=mib, mib_per_s=round(mib / (time.monotonic() - begin), 1))


@app.command("sync-writer")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--writer", type=int, required=True)
@click.option("--shared", type=click.Path(path_type=Path), help="A file that all writers use.")
@click.option("--seconds", default=3600.0)
@click.option("--seed", default=1)
def sync_writer(path: Path, writer: int, shared: Path | None, seconds: float, seed: int) -> None:
    """Write records of 4 KiB, fsync each, report each with the time at which fsync returned. Every
    eighth also goes to a block of the shared file, so its lock travels between the nodes."""
    end = time.monotonic() + seconds
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    common = os.open(shared, os.O_WRONLY | os.O_CREAT, 0o644) if shared else None
    index = 0
    while time.monotonic() < end:
        if common is not None and index % 8 == 0:
            os.pwrite(common, make_record(writer, index, 4096, seed), writer * 4096)
            os.fsync(common)
        os.pwrite(handle, make_record(writer, index, 4096, seed), index * 4096)
        os.fsync(handle)
        say(index=index, at=time.monotonic())
        index += 1
    os.close(handle)


@app.command("check-sync")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--writer", type=int, required=True)
@click.option("--last", type=int, required=True)
@click.option("--seed", default=1)
def check_sync(path: Path, writer: int, last: int, seed: int) -> None:
    """Every record up to `last`, whose fsync had returned, is there and right."""
    data = path.read_bytes()
    for index in range(last + 1):
        if data[index * 4096 : (index + 1) * 4096] != make_record(writer, index, 4096, seed):
            say(error=f"record {index} of writer {writer} is lost or wrong", size=len(data))
            sys.exit(1)
    say(writer=writer, records=last + 1, good=True)


COUNTER_TABLES = """
CREATE TABLE total (count INTEGER NOT NULL);
INSERT INTO total VALUES (0);
CREATE TABLE steps (writer INTEGER, step INTEGER, PRIMARY KEY (writer, step));
"""
DATABASE_BUSY_S = 120.0
DATABASE_PAUSE_S = 0.02
"""SQLite looks again and again whether a lock is free; without a pause who had it last wins."""


def open_database(path: Path) -> sqlite3.Connection:
    """What COMMIT acknowledged is durable. With a rollback journal and FULL it would not be: the
    name of the journal goes without an fsync of the directory, and who still finds it after a power
    cut rolls back (sqlite.org/pragma.html#pragma_synchronous)."""
    database = sqlite3.connect(path, timeout=DATABASE_BUSY_S, isolation_level=None)
    database.execute("PRAGMA journal_mode = DELETE")
    database.execute("PRAGMA synchronous = EXTRA")
    return database


@app.command("database-create")
@click.argument("path", type=click.Path(path_type=Path))
def database_create(path: Path) -> None:
    """Make an SQLite database with a counter."""
    database = open_database(path)
    database.executescript(COUNTER_TABLES)
    database.close()
    say(created=str(path))


@app.command("database-writer")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--writer", type=int, required=True)
def database_writer(path: Path, writer: int) -> None:
    """Add one to the counter and a row to the log, in one transaction, until SIGTERM; report each
    COMMIT with the time at which it had returned."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    database = open_database(path)
    step = 0
    while not stopped:
        database.execute("BEGIN IMMEDIATE")
        database.execute("UPDATE total SET count = count + 1")
        database.execute("INSERT INTO steps VALUES (?, ?)", (writer, step))
        database.execute("COMMIT")
        say(index=step, at=time.monotonic())
        step += 1
        time.sleep(DATABASE_PAUSE_S)
    database.close()


@app.command("database-check")
@click.argument("path", type=click.Path(path_type=Path))
def database_check(path: Path) -> None:
    """The counter, the steps of each writer, and whether the database is whole."""
    database = open_database(path)
    (total,) = database.execute("SELECT count FROM total").fetchone()
    steps = database.execute("SELECT writer, COUNT(*), MAX(step) FROM steps GROUP BY writer")
    writers = {str(writer): count for writer, count, last in steps if count == last + 1}
    (whole,) = database.execute("PRAGMA integrity_check").fetchone()
    good = whole == "ok" and total == sum(writers.values())
    say(total=total, writers=writers, integrity=whole, good=good)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    app()
