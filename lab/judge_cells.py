"""The cells of the judge of coherence: something with a version that can be written and read.

A cell is written by one writer at a time (a lock on the board), each version once and in rising
order; it is read by anybody at any time, in every way that the system calls offer. What is read
names a version, or proves to be torn (`None`: a write was under way, look again).

| cell | the version is | written by | read by |
|---|---|---|---|
| Block | in a sealed 4-KiB block | pwrite, O_DIRECT, stores | pread, O_DIRECT, mappings |
| Scrap | in 700 sealed bytes across pages | pwrite, stores | pread, mappings |
| Size | the size of a file | ftruncate, O_APPEND | stat, fstat, SEEK_END, read |
| Shrunk | what a file lacks to its first size | ftruncate | stat, fstat, read |
| Log | in the last record of a file | O_APPEND | read |
| Name | the only name in a directory | rename | listdir, scandir |
| Commit | the content of a file that is replaced | write, rename | open and read, stat |
| Stamp | the mtime of a file | utimensat | stat, fstat |
| Presence | odd if a file exists | create, unlink | stat, open |

Sealed bytes carry the version, the number of the cell, and a CRC.
"""

from __future__ import annotations

import mmap
import os
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

BLOCK_BYTES = 4096
BLOCKS_PER_FILE = 8
SCRAP_BYTES = 700
SCRAP_EVERY = 900
SCRAPS_PER_FILE = 4
SHRINK_FROM = 1 << 30
RECORD = struct.Struct("<QQI")
TAIL_BYTES = 3 * BLOCK_BYTES


class Cell(Protocol):
    """See the module."""

    @property
    def ways(self) -> Sequence[str]:
        """How it can be read."""
        ...

    @property
    def writes(self) -> Sequence[str]:
        """How it can be written."""
        ...

    @property
    def parity(self) -> bool:
        """Whether what is read is only the lowest bit of the version."""
        ...

    def prepare(self) -> None:
        """Make version 0, once, before anything else."""
        ...

    def write(self, version: int, how: str, *, durable: bool) -> None:
        """Make `version` the content. On return it is visible to everybody."""
        ...

    def read(self, how: str) -> int | None: ...


def sealed(cell: int, version: int, size: int) -> bytes:
    """A body of so many bytes that only this version of this cell has."""
    body = random.Random(f"{cell}/{version}").randbytes(size - RECORD.size)
    return RECORD.pack(version, cell, zlib.crc32(body)) + body


def opened(cell: int, data: bytes) -> int | None:
    """The version of a sealed body; 0 for nothing but zeros; None if it is torn."""
    if len(data) < RECORD.size:
        return None
    version, owner, check = RECORD.unpack_from(data)
    if not any(data):
        return 0
    if owner != cell or zlib.crc32(data[RECORD.size :]) != check:
        return None
    return int(version)


class Versioned:
    """What most cells have in common."""

    parity = False

    def prepare(self) -> None:
        """Nothing is version 0."""


class Region:
    """Bytes of a file that several cells share, and every way to get at them. The descriptors are
    opened when they are first used: one for reading and writing changes how pages are cached."""

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        self._length = length
        self._open: dict[int, int] = {}
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._aligned = mmap.mmap(-1, BLOCK_BYTES)
        self.descriptor(os.O_WRONLY)

    def prepare(self) -> None:
        """Give the file its length."""
        os.ftruncate(self.descriptor(os.O_WRONLY), self._length)

    def descriptor(self, flags: int) -> int:
        """A descriptor with these flags, for good."""
        if flags not in self._open:
            self._open[flags] = os.open(self._path, flags | os.O_CREAT, 0o644)
        return self._open[flags]

    def mapping(self, flags: int, kind: int) -> mmap.mmap:
        """A mapping of a descriptor with these flags, for good."""
        key = flags, kind
        if key not in self._maps:
            protection = mmap.PROT_READ
            if flags & os.O_RDWR and kind == mmap.MAP_SHARED:
                protection |= mmap.PROT_WRITE
            self._maps[key] = mmap.mmap(self.descriptor(flags), self._length, kind, protection)
        return self._maps[key]

    def read(self, how: str, offset: int, size: int) -> bytes:
        if how == "pread":
            return os.pread(self.descriptor(os.O_RDONLY), size, offset)
        if how == "direct":
            os.preadv(self.descriptor(os.O_RDONLY | os.O_DIRECT), [self._aligned], offset)
            return self._aligned[:size]
        if how == "append":  # its descriptor never goes through the page cache
            return os.pread(self.descriptor(os.O_RDWR | os.O_APPEND), size, offset)
        flags, kind = {
            "mapped": (os.O_RDONLY, mmap.MAP_SHARED),
            "stored": (os.O_RDWR, mmap.MAP_SHARED),
            "private": (os.O_RDONLY, mmap.MAP_PRIVATE),
            "direct-mapped": (os.O_RDONLY | os.O_DIRECT, mmap.MAP_SHARED),
        }[how]
        return self.mapping(flags, kind)[offset : offset + size]

    def write(self, how: str, offset: int, data: bytes, *, durable: bool) -> None:
        if how == "store":
            view = self.mapping(os.O_RDWR, mmap.MAP_SHARED)
            view[offset : offset + len(data)] = data
            if durable:
                first = offset & -BLOCK_BYTES
                view.flush(first, offset + len(data) - first)
            return
        flags = {
            "pwrite": os.O_WRONLY,
            "update": os.O_RDWR,
            "direct": os.O_WRONLY | os.O_DIRECT,
            "dsync": os.O_WRONLY | os.O_DSYNC,
        }[how]
        if how == "direct":
            self._aligned[:] = data
            os.pwritev(self.descriptor(flags), [self._aligned], offset)
        else:
            os.pwrite(self.descriptor(flags), data, offset)
        if durable and how != "dsync":
            os.fsync(self.descriptor(flags))


class Block(Versioned):
    """A 4-KiB block; even regions are never opened for reading and writing, so their pages are
    cached by many nodes at once, odd ones by every means."""

    def __init__(self, region: Region, cell: int, *, shared: bool) -> None:
        self._region = region
        self._cell = cell
        self._offset = cell % BLOCKS_PER_FILE * BLOCK_BYTES
        # One read in many goes to the disks, so that it does not take all the time.
        self.ways = ["pread", "mapped", "private", "direct-mapped"] * 4 + ["direct"]
        self.writes = ["pwrite", "direct", "dsync"]
        if shared:
            self.ways += ["stored"] * 4 + ["append"]
            self.writes += ["store", "store", "update"]

    def prepare(self) -> None:
        self._region.prepare()

    def write(self, version: int, how: str, *, durable: bool) -> None:
        data = sealed(self._cell, version, BLOCK_BYTES)
        self._region.write(how, self._offset, data, durable=durable)

    def read(self, how: str) -> int | None:
        return opened(self._cell, self._region.read(how, self._offset, BLOCK_BYTES))


class Scrap(Versioned):
    """Bytes that begin and end within pages, side by side with those of other writers."""

    def __init__(self, region: Region, cell: int, *, shared: bool) -> None:
        self._region = region
        self._cell = cell
        self._offset = cell % SCRAPS_PER_FILE * SCRAP_EVERY
        self.ways = ["pread", "mapped", "private"] * 4
        self.writes = ["pwrite", "dsync"]
        if shared:
            self.ways += ["stored"] * 4 + ["append"]
            self.writes += ["store", "update"]

    def prepare(self) -> None:
        self._region.prepare()

    def write(self, version: int, how: str, *, durable: bool) -> None:
        data = sealed(self._cell, version, SCRAP_BYTES)
        self._region.write(how, self._offset, data, durable=durable)

    def read(self, how: str) -> int | None:
        return opened(self._cell, self._region.read(how, self._offset, SCRAP_BYTES))


class _File(Versioned):
    """A cell with a file of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._reader = os.open(path, os.O_RDONLY)

    def _keep(self, *, durable: bool) -> None:
        if durable:
            os.fsync(self._handle)

    def _size(self, how: str, near: int) -> int:
        if how == "stat":
            return self._path.stat().st_size
        if how == "fstat":
            return os.fstat(self._reader).st_size
        if how == "seek":
            return os.lseek(self._reader, 0, os.SEEK_END)
        at = max(0, near - TAIL_BYTES // 2) & -BLOCK_BYTES
        found = len(os.pread(self._reader, TAIL_BYTES, at))
        return at + found if 0 < found < TAIL_BYTES else os.fstat(self._reader).st_size


class Size(_File):
    """A file that grows byte by byte."""

    ways = ("stat", "fstat", "seek", "end")
    writes = ("truncate", "append")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._append = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._seen = 0

    def write(self, version: int, how: str, *, durable: bool) -> None:
        missing = version - os.fstat(self._handle).st_size
        if how == "append" and missing > 0:
            os.write(self._append, bytes(missing))
        else:
            os.ftruncate(self._handle, version)
        self._keep(durable=durable)

    def read(self, how: str) -> int | None:
        found = self._size(how, self._seen)
        self._seen = max(self._seen, found)
        return found


class Shrunk(_File):
    """A sparse file that is cut byte by byte."""

    ways = ("stat", "fstat", "end")
    writes = ("truncate",)

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._seen = SHRINK_FROM

    def prepare(self) -> None:
        os.ftruncate(self._handle, SHRINK_FROM)

    def write(self, version: int, _how: str, *, durable: bool) -> None:
        os.ftruncate(self._handle, SHRINK_FROM - version)
        self._keep(durable=durable)

    def read(self, how: str) -> int | None:
        found = self._size(how, self._seen)
        self._seen = min(self._seen, found)
        return SHRINK_FROM - found


class Log(_File):
    """Sealed records behind one another."""

    ways = ("pread",)
    writes = ("append",)
    RECORD_BYTES = 300

    def __init__(self, path: Path, cell: int) -> None:
        super().__init__(path)
        self._cell = cell
        self._append = os.open(path, os.O_WRONLY | os.O_APPEND)

    def prepare(self) -> None:
        self.write(0, "append", durable=False)

    def write(self, version: int, _how: str, *, durable: bool) -> None:
        os.write(self._append, sealed(self._cell, version, self.RECORD_BYTES))
        self._keep(durable=durable)

    def read(self, _how: str) -> int | None:
        size = os.fstat(self._reader).st_size
        if size == 0 or size % self.RECORD_BYTES:
            return None
        data = os.pread(self._reader, self.RECORD_BYTES, size - self.RECORD_BYTES)
        return opened(self._cell, data)


class Name(Versioned):
    """A directory with one entry."""

    ways = ("listdir", "scandir")
    writes = ("rename",)

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.mkdir(exist_ok=True)

    def prepare(self) -> None:
        if not os.listdir(self._path):
            (self._path / "0").touch()

    def write(self, version: int, _how: str, *, durable: bool) -> None:
        (old,) = os.listdir(self._path)
        os.rename(self._path / old, self._path / str(version))
        if durable:
            _sync_directory(self._path)

    def read(self, how: str) -> int | None:
        if how == "listdir":
            names = os.listdir(self._path)
        else:
            with os.scandir(self._path) as entries:
                names = [entry.name for entry in entries if entry.is_file()]
        return int(names[0]) if len(names) == 1 else None


class Commit(Versioned):
    """A file that is replaced by a rename."""

    ways = ("open", "stat")
    writes = ("replace",)

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.mkdir(exist_ok=True)
        self._current = path / "current"

    def prepare(self) -> None:
        if not self._current.exists():
            self.write(0, "replace", durable=False)

    def write(self, version: int, _how: str, *, durable: bool) -> None:
        fresh = self._path / f"new-{os.getpid()}"
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.write(handle, b"%d" % version)
        os.utime(handle, ns=(0, version * 1000))
        if durable:
            os.fsync(handle)
        os.close(handle)
        os.rename(fresh, self._current)
        if durable:
            _sync_directory(self._path)

    def read(self, how: str) -> int | None:
        if how == "stat":
            return self._current.stat().st_mtime_ns // 1000
        return int(self._current.read_bytes())


class Stamp(_File):
    """A file whose time of change is set."""

    ways = ("stat", "fstat")
    writes = ("utime",)

    def prepare(self) -> None:
        os.utime(self._handle, ns=(0, 0))

    def write(self, version: int, _how: str, *, durable: bool) -> None:
        os.utime(self._handle, ns=(0, version * 1000))
        self._keep(durable=durable)

    def read(self, how: str) -> int | None:
        found = os.fstat(self._reader) if how == "fstat" else self._path.stat()
        return found.st_mtime_ns // 1000


class Presence(Versioned):
    """A name that comes and goes."""

    ways = ("stat", "open")
    writes = ("toggle",)
    parity = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._path.mkdir(exist_ok=True)
        self._name = path / "here"

    def write(self, version: int, _how: str, *, durable: bool) -> None:
        # A version may be skipped when its writer was killed.
        if version % 2:
            os.close(os.open(self._name, os.O_WRONLY | os.O_CREAT, 0o644))
        else:
            self._name.unlink(missing_ok=True)
        if durable:
            _sync_directory(self._path)

    def read(self, how: str) -> int | None:
        if how == "stat":
            return int(os.path.exists(self._name))
        try:
            os.close(os.open(self._name, os.O_RDONLY))
        except FileNotFoundError:
            return 0
        return 1


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def open_cells(top: Path, count: int) -> list[Cell]:
    """Three eighths of the cells are blocks, one eighth scraps, the others take turns."""
    blocks, scraps = count * 3 // 8, count // 8
    regions: dict[str, Region] = {}

    def region(name: str, length: int) -> Region:
        if name not in regions:
            regions[name] = Region(top / name, length)
        return regions[name]

    cells: list[Cell] = []
    for cell in range(blocks):
        number = cell // BLOCKS_PER_FILE
        there = region(f"blocks-{number}", BLOCKS_PER_FILE * BLOCK_BYTES)
        cells.append(Block(there, cell, shared=number % 2 == 1))
    for cell in range(scraps):
        number = cell // SCRAPS_PER_FILE
        there = region(f"scraps-{number}", SCRAPS_PER_FILE * SCRAP_EVERY)
        cells.append(Scrap(there, cell, shared=number % 2 == 1))
    makers: tuple[Callable[[int], Cell], ...] = (
        lambda at: Size(top / f"size-{at}"),
        lambda at: Shrunk(top / f"shrunk-{at}"),
        lambda at: Log(top / f"log-{at}", at),
        lambda at: Name(top / f"name-{at}"),
        lambda at: Commit(top / f"commit-{at}"),
        lambda at: Stamp(top / f"stamp-{at}"),
        lambda at: Presence(top / f"presence-{at}"),
    )
    cells += [makers[at % len(makers)](at) for at in range(len(cells), count)]
    return cells
