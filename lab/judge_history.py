"""Files of the judge whose whole content is known: every kind of change, from all nodes by turns.

Who changes such a file holds a lock of the mount (flock, fcntl or OFD), and writes into its
*history*, a file outside of the mount, what the content will be, before and after the call:

    images    the content that is durable, then that after each change since, the newest last
    makers    the writer of each image (0 for the durable one)
    pending   the newest change has not returned
    named     the first image of the file that has the name now

Who reads holds the lock shared and must find the newest image, byte by byte, by every way of
reading. If a maker is dead on the board, or a change has not returned, its unsynced bytes may be
lost, or a part of them: then each byte must be that of one of the images, and the size between
their sizes; what is found is made durable and is the first image from then on. What another node
has seen is durable.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from gnbd.server.backends_io import fallocate
from lab.submitted import PARTS_MAX, read_many, write_many

NODES_MAX = 16
BLOCK_BYTES = 4096
SIZE_MAX = 32 * BLOCK_BYTES
IMAGES_MAX = 5
READS_MAX = 3
CHANGES_MAX = 4
BUSY_BYTES = 4 * BLOCK_BYTES
"""Half of all changes begin before this place."""
LOOK_FIRST_SHARE = 0.4
DURABLE_SHARE = 0.25
_OFD_LOCK = struct.Struct("hhqqi4x")
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

Action = Callable[[], None]


class History(msgspec.Struct):
    """See the module."""

    images: list[bytes]
    makers: list[int]
    pending: bool = False
    named: int = 0


class Change(NamedTuple):
    """A change that is to be made: the content after it, and the call. `durable_bytes`: of the
    image, these are durable when the call has returned."""

    image: bytes
    make: Action
    durable_bytes: range = range(0)


class WrongContentError(Exception):
    """What was read cannot be."""


class PutOutError(Exception):
    """The writer is dead on the board: its node goes on, but nothing that it does counts."""


def _patched(image: bytes, offset: int, data: bytes) -> bytes:
    """An image with some bytes replaced; a gap before them reads as zeroes."""
    return image[:offset].ljust(offset, b"\0") + data + image[offset + len(data) :]


def _difference(found: bytes, image: bytes) -> str:
    """Where two contents differ, for people."""
    size = min(len(found), len(image))
    wrong = [at for at in range(size) if found[at] != image[at]]
    text = f"size {len(found)}, not {len(image)}"
    if wrong:
        text += f"; {len(wrong)} bytes differ in {wrong[0]}..{wrong[-1]}: "
        text += f"{found[wrong[0] : wrong[0] + 8].hex()} not {image[wrong[0] : wrong[0] + 8].hex()}"
    return text


def possible(found: bytes, images: list[bytes]) -> bool:
    """Whether a death may have left this content."""
    sizes = [len(image) for image in images]
    if not min(sizes) <= len(found) <= max(sizes):
        return False
    padded = [image.ljust(len(found), b"\0") for image in images]
    newest = padded[-1]
    for start in range(0, len(found), BLOCK_BYTES):
        end = min(start + BLOCK_BYTES, len(found))
        if found[start:end] == newest[start:end]:
            continue
        if any(found[at] not in {image[at] for image in padded} for at in range(start, end)):
            return False
    return True


class Ledger:
    """One file and its history, as one writer sees it. `dead`: whether a writer is dead on the
    board. `shared`: the file is also opened for reading and writing, and stored to by mappings."""

    def __init__(
        self, top: Path, side: Path, number: int, writer: int, dead: Callable[[int], bool]
    ) -> None:
        self.number = number
        self._top = top
        self._path = top / f"history-{number}"
        self._side = side
        self._writer = writer
        self._dead = dead
        self._shared = number % 2 == 1
        self._random = random.Random()
        self._kind = ("flock", "fcntl", "ofd")[number % 3]
        self._lock = os.open(top / f"history-lock-{number}", os.O_RDWR | os.O_CREAT, 0o644)
        self._guard = os.open(f"{side}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        self._open: dict[int, int] = {}
        self._maps: dict[tuple[int, int], mmap.mmap] = {}
        self._inode = 0
        self.reads = ["pieces", "direct", "mapped", "private", "submit", "sendfile", "holes"]
        self.writes = [
            "pwrite", "pwrite", "direct", "direct", "submit", "append", "append direct", "dsync",
            "direct dsync", "flag dsync", "truncate", "truncate", "open truncate", "allocate",
            "keep size", "punch", "zero range", "copy", "rename",
        ]  # fmt: skip
        if self._shared:
            self.reads += ["stored", "direct mapped"]
            self.writes += ["store", "store", "update"]

    def begin(self, seed: str, *, uring: bool) -> None:
        """What is random from now on. Only who is never killed alone may use io_uring."""
        self._random = random.Random(f"{seed}/{self.number}")
        if uring:
            self.reads.append("uring")
            self.writes.append("uring")

    # -- the history and the lock ----------------------------------------------------------------

    def prepare(self) -> None:
        """Make an empty file and its history."""
        self._descriptor(os.O_WRONLY)
        self._sync(everything=True)
        self._replace(History([b""], [0]))

    def _load(self) -> History:
        return msgspec.msgpack.decode(self._side.read_bytes(), type=History)

    def _replace(self, history: History) -> None:
        fresh = self._side.with_name(f"{self._side.name}-{self._writer}")
        fresh.write_bytes(msgspec.msgpack.encode(history))
        fresh.replace(self._side)

    def _store(self, history: History) -> None:
        """Raises PutOutError: a node that was put out holds its lock no longer, and does not know
        it."""
        fcntl.flock(self._guard, fcntl.LOCK_EX)
        try:
            if self._dead(self._writer):
                raise PutOutError
            self._replace(history)
        finally:
            fcntl.flock(self._guard, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def _locked(self, *, exclusive: bool) -> Iterator[None]:
        self._take(fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._take(fcntl.LOCK_UN)

    def _take(self, mode: int) -> None:
        if self._kind == "flock":
            fcntl.flock(self._lock, mode)
        elif self._kind == "fcntl":
            fcntl.lockf(self._lock, mode, 1, self.number)
        else:
            names = {fcntl.LOCK_EX: fcntl.F_WRLCK, fcntl.LOCK_SH: fcntl.F_RDLCK}
            kind = names.get(mode, fcntl.F_UNLCK)
            fcntl.fcntl(self._lock, fcntl.F_OFD_SETLKW, _OFD_LOCK.pack(kind, 0, 7, 9, 0))

    # -- descriptors -----------------------------------------------------------------------------

    def _descriptor(self, flags: int) -> int:
        if flags not in self._open:
            self._open[flags] = os.open(self._path, flags | os.O_CREAT, 0o644)
        return self._open[flags]

    def _mapping(self, flags: int, kind: int, size: int) -> mmap.mmap:
        """A mapping of at least so many bytes; it may have been made when the file was longer."""
        key = flags, kind
        if key not in self._maps or len(self._maps[key]) < size:
            protection = mmap.PROT_READ
            if flags & os.O_RDWR:
                protection |= mmap.PROT_WRITE
            self._maps[key] = mmap.mmap(self._descriptor(flags), size, kind, protection)
        return self._maps[key]

    def _renew(self) -> None:
        """Let go of a file that was replaced."""
        inode = os.stat(self._path).st_ino
        if inode != self._inode:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()
            self._maps.clear()
            self._inode = inode

    # -- reading ---------------------------------------------------------------------------------

    def _pieces(self, size: int, step_max: int) -> list[tuple[int, int]]:
        """(offset, size) pieces of a file, in any order."""
        result, at = [], 0
        while at < size:
            step = min(self._random.randint(1, step_max), size - at)
            result.append((at, step))
            at += step
        self._random.shuffle(result)
        return result

    def _content(self, how: str) -> bytes:
        """All bytes of the file. Raises WrongContentError if sizes disagree."""
        size = os.stat(self._path).st_size
        if how in ("mapped", "private", "stored", "direct mapped"):
            return self._mapped(how, size)
        if how == "sendfile":
            return self._sent(size)
        if how == "holes":
            self._check_holes(size)
        data = bytearray(size)
        direct = self._descriptor(os.O_RDONLY | os.O_DIRECT)
        if how in ("submit", "uring"):
            pieces = self._pieces(size, SIZE_MAX // 2)
            for first in range(0, len(pieces), PARTS_MAX):
                some = pieces[first : first + PARTS_MAX]
                for (at, step), part in zip(some, read_many(how, direct, some), strict=True):
                    data[at : at + step] = part
        else:
            reader = direct if how == "direct" else self._descriptor(os.O_RDONLY)
            for at, step in self._pieces(size, SIZE_MAX // 4):
                data[at : at + step] = os.pread(reader, step, at)
            if behind := os.pread(reader, BLOCK_BYTES, size):
                raise WrongContentError(f"{len(behind)} bytes behind the end at {size}")
        return bytes(data)

    def _mapped(self, how: str, size: int) -> bytes:
        if not size:
            return b""
        flags, kind = {
            "mapped": (os.O_RDONLY, mmap.MAP_SHARED),
            "private": (os.O_RDONLY, mmap.MAP_PRIVATE),
            "stored": (os.O_RDWR, mmap.MAP_SHARED),
            "direct mapped": (os.O_RDONLY | os.O_DIRECT, mmap.MAP_SHARED),
        }[how]
        return self._mapping(flags, kind, size)[:size]

    def _sent(self, size: int) -> bytes:
        target = os.memfd_create("sent")
        try:
            at = 0
            while at < size:
                count = os.sendfile(target, self._descriptor(os.O_RDONLY), at, size - at)
                if not count:
                    break
                at += count
            return os.pread(target, size, 0)
        finally:
            os.close(target)

    def _check_holes(self, size: int) -> None:
        """What lseek calls a hole reads as zeroes."""
        reader, at = self._descriptor(os.O_RDONLY), 0
        while at < size:
            hole = os.lseek(reader, at, os.SEEK_HOLE)
            try:
                at = os.lseek(reader, hole, os.SEEK_DATA) if hole < size else size
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                at = size
            if any(os.pread(reader, at - hole, hole)):
                raise WrongContentError(f"bytes in the hole {hole}..{at}")

    def read(self) -> str:
        """Read in some way and compare; the way. Raises WrongContentError."""
        how = self._random.choice(self.reads)
        with self._locked(exclusive=False):
            self._renew()
            history = self._load()
            if not self._unsure(history):
                for _ in range(self._random.randint(1, READS_MAX)):
                    found = self._content(how)
                    if found != history.images[-1]:
                        raise WrongContentError(self._complaint(how, found, history))
                return how
        with self._locked(exclusive=True):
            self._renew()
            self._agreed()
        return how

    def _unsure(self, history: History) -> bool:
        return history.pending or any(self._dead(maker) for maker in history.makers)

    def _complaint(self, how: str, found: bytes, history: History) -> str:
        older = [n for n, image in enumerate(history.images) if image == found]
        return (
            f"history {self.number} by {how}: {_difference(found, history.images[-1])}; "
            f"makers {history.makers}, pending {history.pending}, equal to image {older}"
        )

    def _agreed(self) -> History:
        """The history, with what the file holds as its newest image, under the exclusive lock."""
        history = self._load()
        how = self._random.choice(self.reads)
        found = self._content(how)
        newest, maker = history.images[-1], history.makers[-1]
        if self._unsure(history):
            if not possible(found, history.images):
                raise WrongContentError(self._complaint(f"{how}, after a death", found, history))
            self._sync(everything=True)
            history = History([found], [0])
            self._store(history)
        elif found != newest:
            raise WrongContentError(self._complaint(how, found, history))
        elif maker % NODES_MAX != self._writer % NODES_MAX:
            history = History([found], [0])
        return history

    # -- changing --------------------------------------------------------------------------------

    def _sync(self, *, everything: bool = False) -> None:
        """Make all durable; the name, too, where somebody may have changed it."""
        flags = self._random.choice(list(self._open) or [os.O_WRONLY])
        call = os.fsync if everything else self._random.choice((os.fsync, os.fdatasync))
        call(self._descriptor(flags))
        directory = os.open(self._top, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def write(self) -> list[str]:
        """Change it, once or several times; the ways. Looking at it first, by whatever way, would
        hide what one kind of change does to another. Raises WrongContentError."""
        with self._locked(exclusive=True):
            self._renew()
            history = self._load()
            if self._unsure(history) or self._random.random() < LOOK_FIRST_SHARE:
                history = self._agreed()
            hows = self._random.choices(self.writes, k=self._random.randint(1, CHANGES_MAX))
            for how in hows:
                history = self._change(how, history)
        return hows

    def _change(self, how: str, history: History) -> History:
        """Make one change; the history after it."""
        change = self._plan(how, history.images[-1])
        durable = len(history.images) >= IMAGES_MAX or self._random.random() < DURABLE_SHARE
        history.images.append(change.image)
        history.makers.append(self._writer)
        history.pending = True
        self._store(history)
        change.make()
        history.pending = False
        if durable:
            self._store(history)
            self._sync()
            history = History([change.image], [0])
        else:
            if how == "rename":
                history.named = len(history.images) - 1
            self._keep(history, change.durable_bytes)
        self._store(history)
        return history

    def _keep(self, history: History, span: range) -> None:
        """These bytes of the newest image are durable in the file that has the name now."""
        if span:
            data = history.images[-1][span.start : span.stop]
            later = [_patched(i, span.start, data) for i in history.images[history.named :]]
            history.images[history.named :] = later

    def _place(self, size_max: int) -> tuple[int, int]:
        """An offset and a size, both odd, or in blocks, or in parts of them."""
        unit = self._random.choice((1, 1, 512, BLOCK_BYTES, BLOCK_BYTES))
        limit = max(1, self._random.choice((BLOCK_BYTES, 5 * BLOCK_BYTES, SIZE_MAX)) // unit)
        begin_max = min(size_max, self._random.choice((BUSY_BYTES, SIZE_MAX)))
        offset = self._random.randrange(max(1, (begin_max - 1) // unit)) * unit
        size = min(self._random.randint(1, limit) * unit, size_max - offset)
        return offset, size

    def _inside(self, image: bytes) -> tuple[int, int]:
        """The same within the content, of which there is some."""
        offset, size = self._place(max(1, len(image)))
        return offset, min(size, len(image) - offset)

    def _plan(self, how: str, old: bytes) -> Change:
        """A change of that kind, or of one that an empty file allows."""
        if how in ("submit", "uring", "store", "punch", "copy") and len(old) < 2:
            how = "pwrite"
        if how.startswith("append") and len(old) > SIZE_MAX - BLOCK_BYTES:
            how = "open truncate"
        makers: dict[str, Callable[[str, bytes], Change]] = {
            "submit": self._many, "uring": self._many,
            "append": self._append, "append direct": self._append,
            "truncate": self._truncate, "open truncate": self._truncate,
            "allocate": self._allocate, "keep size": self._allocate, "punch": self._allocate,
            "zero range": self._allocate,
            "store": self._mapped_store, "copy": self._copy, "rename": self._rename,
        }  # fmt: skip
        return makers.get(how, self._single)(how, old)

    def _whole(self, done: int, size: int) -> None:
        """A call does all of it, unless its mount ends meanwhile."""
        if done != size:
            raise WrongContentError(f"history {self.number}: {done} of {size} bytes were done")

    def _single(self, how: str, old: bytes) -> Change:
        flags, call = {
            "pwrite": (os.O_WRONLY, 0),
            "update": (os.O_RDWR, 0),
            "direct": (os.O_WRONLY | os.O_DIRECT, 0),
            "dsync": (os.O_WRONLY | os.O_DSYNC, 0),
            "direct dsync": (os.O_WRONLY | os.O_DIRECT | os.O_DSYNC, 0),
            "flag dsync": (os.O_WRONLY, os.RWF_DSYNC),
        }[how]
        offset, size = self._place(SIZE_MAX)
        data = self._random.randbytes(size)
        durable = range(offset, offset + size) if "dsync" in how else range(0)

        def make() -> None:
            self._whole(os.pwritev(self._descriptor(flags), [data], offset, call), size)

        return Change(_patched(old, offset, data), make, durable)

    def _many(self, how: str, old: bytes) -> Change:
        """Several writes at once that do not touch each other, within the file."""
        unit = BLOCK_BYTES if len(old) >= 2 * BLOCK_BYTES and self._random.random() < 0.6 else 1
        ends, count = len(old) // unit + 1, 2 * self._random.randint(1, 6)
        marks = sorted({self._random.randrange(ends) * unit for _ in range(count)})
        parts, image = [], old
        for start, end in list(zip(marks[::2], marks[1::2], strict=False)) or [(0, len(old))]:
            data = self._random.randbytes(end - start)
            parts.append((start, data))
            image = _patched(image, start, data)
        direct = self._random.random() < 0.7
        flags = os.O_WRONLY | (os.O_DIRECT if direct else 0)
        return Change(image, lambda: write_many(how, self._descriptor(flags), parts))

    def _append(self, how: str, old: bytes) -> Change:
        data = self._random.randbytes(self._random.randint(1, BLOCK_BYTES))
        flags = os.O_WRONLY | os.O_APPEND | (os.O_DIRECT if "direct" in how else 0)
        return Change(
            old + data, lambda: self._whole(os.write(self._descriptor(flags), data), len(data))
        )

    def _truncate(self, how: str, old: bytes) -> Change:
        size = 0 if how == "open truncate" else sum(self._place(SIZE_MAX))

        def make() -> None:
            if how == "open truncate":
                os.close(os.open(self._path, os.O_WRONLY | os.O_TRUNC))
            elif self._random.random() < 0.5:
                os.truncate(self._path, size)
            else:
                os.ftruncate(self._descriptor(os.O_WRONLY), size)

        return Change(old[:size].ljust(size, b"\0"), make)

    def _allocate(self, how: str, old: bytes) -> Change:
        offset, size = self._place(SIZE_MAX)
        keep = _KEEP_SIZE if self._random.random() < 0.5 else 0
        mode = {
            "allocate": 0,
            "keep size": _KEEP_SIZE,
            "punch": _PUNCH_HOLE | _KEEP_SIZE,
            "zero range": _ZERO_RANGE | keep,
        }[how]
        image = old if mode & _KEEP_SIZE else old.ljust(offset + size, b"\0")
        if mode & (_PUNCH_HOLE | _ZERO_RANGE):
            end = min(offset + size, len(image))
            image = _patched(image, offset, bytes(end - offset)) if offset < end else image
        return Change(image, lambda: fallocate(self._descriptor(os.O_WRONLY), mode, offset, size))

    def _mapped_store(self, _how: str, old: bytes) -> Change:
        offset, size = self._inside(old)
        data = self._random.randbytes(size)
        synced = self._random.random() < 0.3

        def make() -> None:
            view = self._mapping(os.O_RDWR, mmap.MAP_SHARED, len(old))
            view[offset : offset + size] = data
            if synced:
                first = offset & -BLOCK_BYTES
                view.flush(first, offset + size - first)

        durable = range(offset, offset + size) if synced else range(0)
        return Change(_patched(old, offset, data), make, durable)

    def _copy(self, _how: str, old: bytes) -> Change:
        """copy_file_range from the first part of the file into the second."""
        middle = self._random.randrange(1, len(old))
        start, end = self._random.randrange(middle), self._random.randrange(middle, len(old))
        size = min(self._random.randint(1, len(old)), middle - start, len(old) - end)

        def make() -> None:
            source, target = self._descriptor(os.O_RDONLY), self._descriptor(os.O_WRONLY)
            done = 0
            while done < size:
                count = os.copy_file_range(source, target, size - done, start + done, end + done)
                done += count
                if not count:
                    self._whole(done, size)

        return Change(_patched(old, end, old[start : start + size]), make)

    def _rename(self, _how: str, _old: bytes) -> Change:
        """A new file in the place of the old one."""
        data = self._random.randbytes(self._random.randint(0, self._random.choice((300, SIZE_MAX))))

        def make() -> None:
            fresh = self._top / f"history-new-{self._writer}"
            handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._whole(os.write(handle, data), len(data))
            os.fsync(handle)
            os.close(handle)
            os.rename(fresh, self._path)
            self._renew()

        return Change(data, make)
