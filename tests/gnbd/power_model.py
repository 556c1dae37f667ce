"""A machine that can lose its power, and processes on it that can be killed at any call.

Files are real ones in a directory: that is the kernel's cache, and what a process leaves there the
next one sees. Beside it `Machine` knows what is durable: content by fsync, fdatasync, O_DSYNC and
RWF_DSYNC, names by fsync of their directory. `cut_power` makes the files what a disk may hold then:
of all else each name and each sector, or none of it, is lost.

It stands in for `os` in the modules under test, and makes nothing durable in truth. What C code
writes it does not see: such files are `prompt`, durable as they are written, their names not.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECTOR_BYTES = 512
CALLS_MAX = 200
COUNTED = (
    "open", "write", "pwrite", "pwritev", "fchmod", "ftruncate", "posix_fallocate", "replace",
    "fsync", "fdatasync", "close",
)  # fmt: skip
Key = tuple[int, int]


class Killed(BaseException):
    """The process is no more."""


class Inode:
    """A file or directory, which keeps its number as long as we look at it."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.is_directory = stat.S_ISDIR(os.fstat(self.fd).st_mode)
        self.data = b""
        self.names: dict[str, Key] = {}
        self.refused = range(0)
        """What the disk has refused: seen, and no fsync knows of it."""

    def visible(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)


class Machine:
    """`place` is where all files are. `life` runs a process; see the module."""

    def __init__(self, place: Path, seed: int, prompt: str = "/") -> None:
        """`prompt`: how the names of files end that only C code writes."""
        self.place = place
        self.prompt = prompt
        self.rng = random.Random(seed)
        self.inodes: dict[Key, Inode] = {}
        self._left: int | None = None
        self._dead = False
        self._accepts: int | None = None
        """So many durable writes more; then one fails."""
        self._open: set[int] = set()
        self._dsync: set[int] = set()
        self._settle(place)

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "eventfd":
            return self._make_event
        if name not in COUNTED:
            return real

        def counted(*args: Any) -> Any:
            if name == "close":
                return None if self._dead else self._close(args[0])
            self._point()
            if name == "open":
                return self._open_file(*args)
            if name in ("fsync", "fdatasync"):
                return self._make_durable(args[0])
            if name in ("write", "pwrite", "pwritev"):
                return self._write(real, *args)
            return real(*args)

        return counted

    # --- lives

    def life(self, work: Callable[[], Any], kill_at: int | None = None) -> Any:
        """What `work` gives, or `Killed` right before its call `kill_at` (from 0), where a durable
        write is two: what it wrote is seen before it is durable."""
        self._left = kill_at
        try:
            return work()
        except Killed:
            return Killed
        finally:
            self._left = None

    def refuse(self, number: int) -> None:
        """The disk refuses the durable write of this number (from 0), and takes what comes then."""
        self._accepts = number

    def has_refused(self) -> bool:
        accepts, self._accepts = self._accepts, None
        return accepts is not None and accepts < 0

    def end(self) -> None:
        """The files of the last life are closed, as the kernel does it."""
        for fd in self._open:
            os.close(fd)
        self._open.clear()
        self._dead = False

    def _point(self) -> None:
        if self._dead:
            raise Killed
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                self._dead = True
                raise Killed

    def _open_file(self, path: Any, flags: int, *mode: int) -> int:
        fd = os.open(path, flags & ~os.O_DSYNC, *mode)
        self._open.add(fd)
        (self._dsync.add if flags & os.O_DSYNC else self._dsync.discard)(fd)
        if Path(os.readlink(f"/proc/self/fd/{fd}")).is_relative_to(self.place):
            self._inode(f"/proc/self/fd/{fd}")
        return fd

    def _make_event(self, count: int, flags: int) -> int:
        fd = os.eventfd(count, flags)
        self._open.add(fd)
        return fd

    def _close(self, fd: int) -> None:
        if fd in self._open:  # else of a life that has ended: the number may be another file's
            self._open.discard(fd)
            os.close(fd)

    def _write(
        self, real: Callable[..., int], fd: int, data: Any, at: int | None = None, flags: int = 0
    ) -> int:
        if at is None:
            count, at = real(fd, data), os.lseek(fd, 0, os.SEEK_CUR)
            at -= count
        else:
            count = real(fd, data, at)
        if fd in self._dsync or flags & os.RWF_DSYNC:
            self._point()
            if self._accepts is not None:
                self._accepts -= 1
            if self._accepts == -1:
                self._of(fd).refused = range(at, at + count)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._patch(fd, at, count)
        return count

    # --- what is durable

    def _inode(self, path: str) -> Key:
        found = os.stat(path)
        key = (found.st_dev, found.st_ino)
        if key not in self.inodes:
            self.inodes[key] = Inode(path)
        return key

    def _of(self, fd: int) -> Inode:
        return self.inodes[self._inode(f"/proc/self/fd/{fd}")]

    def _names(self, directory: Inode) -> dict[str, Key]:
        path = f"/proc/self/fd/{directory.fd}"
        return {
            name: self._inode(f"{path}/{name}")
            for name in os.listdir(path)
            if not stat.S_ISSOCK(os.stat(f"{path}/{name}").st_mode)
        }

    def _make_durable(self, fd: int) -> None:
        found = os.fstat(fd)
        inode = self.inodes.get((found.st_dev, found.st_ino))
        if inode is None:
            return  # above `place`
        if inode.is_directory:
            inode.names = self._names(inode)
        else:
            inode.data = self._taken(inode)

    @staticmethod
    def _taken(inode: Inode) -> bytes:
        """What is seen, but for what the disk has refused."""
        start, data = inode.refused.start, bytearray(inode.visible())
        kept = inode.data[start : inode.refused.stop]
        data[start : start + len(kept)] = kept
        return bytes(data)

    def _patch(self, fd: int, offset: int, length: int) -> None:
        inode = self._of(fd)
        if offset <= inode.refused.start and inode.refused.stop <= offset + length:
            inode.refused = range(0)
        self._put(inode, offset, inode.visible()[offset : offset + length])

    @staticmethod
    def _put(inode: Inode, offset: int, piece: bytes) -> None:
        data = bytearray(inode.data.ljust(offset + len(piece), b"\0"))
        data[offset : offset + len(piece)] = piece
        inode.data = bytes(data)

    def _settle(self, place: Path) -> Key:
        """All of it is durable."""
        key = self._inode(str(place))
        inode = self.inodes[key]
        self._make_durable(inode.fd)
        for name in inode.names:
            self._settle(place / name)
        return key

    # --- the cut

    def cut_power(self, *, all_lost: bool) -> None:
        """Everything that is not durable is gone (`all_lost`), or any part of it."""
        self.end()
        beside = self.place.with_name(self.place.name + ".cut")
        self._rebuild(self._inode(str(self.place)), beside, all_lost)
        shutil.rmtree(self.place)
        beside.rename(self.place)
        self._forget()
        self._settle(self.place)

    def dispose(self) -> None:
        """Nobody looks at it any more."""
        self.end()
        self._forget()

    def _forget(self) -> None:
        for inode in self.inodes.values():
            os.close(inode.fd)
        self.inodes.clear()

    def _rebuild(self, key: Key, path: Path, all_lost: bool) -> None:
        inode = self.inodes[key]
        if not inode.is_directory:
            kept = inode.visible() if path.name.endswith(self.prompt) else None
            path.write_bytes(self._content(inode, all_lost) if kept is None else kept)
            return
        path.mkdir(mode=0o700)
        visible = self._names(inode)
        for name in sorted(inode.names.keys() | visible.keys()):
            old = inode.names.get(name)
            found = old if all_lost or self.rng.random() < 0.5 else visible.get(name)
            if found is not None:
                self._rebuild(found, path / name, all_lost)

    def _content(self, inode: Inode, all_lost: bool) -> bytes:
        if all_lost:
            return inode.data
        now = self._taken(inode)
        length = self.rng.choice((len(now), len(inode.data)))
        return b"".join(
            self.rng.choice((now, inode.data))[at : at + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0")
            for at in range(0, length, SECTOR_BYTES)
        )[:length]


def kill_everywhere(
    place: Path,
    seed: int,
    story: Callable[[Machine, int, bool], bool],
    prompt: str = "/",
    cuts: int = 1,
) -> None:
    """`story(machine, point, all_lost)` for each call `point` at which its process can be killed,
    until it says that its process came to its end; once with all lost, `cuts` times with parts."""
    for point in range(CALLS_MAX):
        ended = False
        for all_lost in (True, *[False] * cuts):
            seed += 1
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            machine = Machine(place, seed, prompt)
            try:
                ended = story(machine, point, all_lost)
            finally:
                machine.dispose()
        if ended:
            assert point > 0, "no call was counted"
            return
    raise AssertionError(f"more than {CALLS_MAX} calls")
