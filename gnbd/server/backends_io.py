"""Where the bytes of an export are: a back end, and the regular file.

A completed `write` is visible to every later read on any connection; it is durable after `flush`
(or with `fua`). All calls block, may run in several threads at once, and raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path

from cluster.errors import (
    BusyError,
    ConfigError,
    NoSpaceError,
    NotFoundError,
    StackError,
    os_failure,
)
from cluster.holders_io import lock_file
from cluster.paths_io import make_directory, sync_names
from gnbd.exports import SECTOR_BYTES, Export
from native.integrity import BLOCK_BYTES, Area

FALLOC_KEEP_SIZE = 1
FALLOC_PUNCH_HOLE = 2
FALLOC_ZERO_RANGE = 0x10
EXTENTS_MAX = 4096
"""In one answer to BLOCK_STATUS."""
COMPARED_BYTES_MAX = 1 << 30
"""Of holes with their sums, in one such answer: nobody waits long for it."""
_NO_PATH = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
ALIGNMENTS = (512, 4096)
"""That O_DIRECT may want."""
_ZERO_CHUNK = bytes(1 << 20)
_RWF_DSYNC = os.RWF_DSYNC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def open_failure(path: Path, error: OSError) -> StackError:
    """Why a disk cannot be opened."""
    if error.errno == errno.EBUSY:
        return BusyError(f"{path} is mounted or in use on this machine", hint="see: lsblk")
    return os_failure(error, f"cannot open {path}")


def check_served(exports: Sequence[Export], served: Collection[str]) -> None:
    """Refuse to make disks anew that were here before (`served`: names): a file system that is not
    mounted would give its clients zeroes for what they wrote. Raises NotFoundError."""
    for export in exports:
        if export.name in served and not os.path.exists(export.path):
            raise NotFoundError(
                f"export {export.name!r} was served before, and {export.path} is not there",
                hint="is its file system mounted? For an empty disk in its place: "
                f"truncate -s {export.size_bytes} {export.path}",
            )


def check_disks(exports: Sequence[Export]) -> None:
    """Refuse disks that cannot be exported, before anything is made. Raises StackError."""
    seen: dict[str, str] = {}
    for export in exports:
        disk = f"export {export.name!r}: {export.path}"
        real = os.path.realpath(export.path)
        if real in seen:
            raise ConfigError(f"{disk} is the same disk as that of export {seen[real]!r}")
        seen[real] = export.name
        try:
            found = os.stat(export.path)
        except FileNotFoundError:
            if export.size is None or export.read_only:
                hint = 'with size = "4G" it is made, sparse'
                raise ConfigError(f"{disk} does not exist", hint=hint) from None
            continue
        except OSError as error:
            if error.errno in _NO_PATH:
                raise ConfigError(f"{disk}: {error.strerror}", hint="correct its path") from error
            raise open_failure(Path(export.path), error) from error
        if stat.S_ISDIR(found.st_mode):
            raise ConfigError(f"{disk} is a directory")
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise ConfigError(f"{disk} is neither a file nor a block device")
        if export.size is None and stat.S_ISREG(found.st_mode) and found.st_size < SECTOR_BYTES:
            what = f"has {found.st_size} bytes only" if found.st_size else "is empty"
            raise NoSpaceError(f"{disk} {what}", hint='size = "4G" makes it large enough')


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _libc.fallocate(fd, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def read_exactly(fd: int, offset: int, view: memoryview) -> None:
    """Fill `view` from the file; past its end reads zeroes."""
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            view[:] = bytes(len(view))
            return
        if count == len(view):
            return
        view = view[count:]
        offset += count


def write_exactly(fd: int, offset: int, view: memoryview, flags: int = 0) -> None:
    """Write all of `view`."""
    while view:
        count = os.pwritev(fd, [view], offset, flags)
        if count == len(view):
            return
        view = view[count:]
        offset += count


def _seek(fd: int, offset: int, end: int, whence: int) -> int:
    """Where data or a hole begins, `end` at most; where that cannot be told all is data."""
    try:
        return min(os.lseek(fd, offset, whence), end)
    except OSError as error:
        return offset if error.errno == errno.EINVAL and whence == os.SEEK_DATA else end


class Backend:
    """The bytes of one export. The caller has checked ranges: `size_bytes`, `alignment`."""

    size_bytes: int
    read_only = False
    alignment = 1
    """Offsets and lengths are multiples of it."""

    def read_into(self, offset: int, view: memoryview) -> None:
        raise NotImplementedError

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        raise NotImplementedError

    def trim(self, offset: int, length: int) -> None:
        raise NotImplementedError

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        """`fast`: only if that costs less than writing zeroes, else ENOTSUP."""
        raise NotImplementedError

    def cache(self, offset: int, length: int) -> None:
        """The range will be read soon; a hint."""

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """(length, is a hole) in order; as much as is known cheaply."""
        return [(length, False)]

    def loses_reply(self, operation: str, offset: int, length: int) -> bool:
        """Whether a filter keeps this request from being answered."""
        return False

    def owed_s(self, operation: str) -> float:
        """So long a connection has to rest after such a request."""
        return 0.0

    def resize(self, size_bytes: int) -> None:
        """Grow. Raises StackError."""
        raise NotImplementedError

    def close(self) -> None:
        """Give up the file; unflushed bytes of a volatile filter are gone."""


class FileBackend(Backend):
    """A regular file or a block device, through the page cache or past it (`direct`)."""

    def __init__(
        self, path: Path, size_bytes: int | None, read_only: bool = False, *, direct: bool = False
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.area: Area | None = None
        """Checks what is read, and keeps the sums of what is written."""
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        self.made = made = size_bytes is not None and not read_only and not path.exists()
        if made:
            flags |= os.O_CREAT
            make_directory(path.parent)
        if path.is_block_device():
            flags |= os.O_EXCL  # fails for a disk that is mounted or in use by md, LVM, ...
        try:
            self.fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise open_failure(path, error) from error
        try:
            # One server to a disk: another one would know nothing of our bars.
            lock_file(self.fd, str(path), shared=read_only)
            present = self._grow_to(size_bytes)
        except OSError as error:
            os.close(self.fd)
            if made:
                path.unlink()
            raise os_failure(error, self._length(size_bytes)) from error
        except BusyError:
            os.close(self.fd)
            raise
        self.size_bytes = present if size_bytes is None else min(size_bytes, present)
        try:
            if direct:
                self._go_direct()
            self._flush_fd = self.reopen(os.O_RDONLY)
            self.drop_refused()  # in an earlier life: whoever was told may be dead
            if not read_only:
                sync_names(path)  # also of a disk whose maker was killed before it had
        except (StackError, OSError):
            os.close(self.fd)
            raise

    def reopen(self, flags: int) -> int:
        """The same disk as another open file, the caller's to close. The kernel tells each of them
        once that a write-back has failed: whoever must not miss it asks through one that nobody
        else makes anything durable through. Raises OSError."""
        direct = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_DIRECT
        return os.open(f"/proc/self/fd/{self.fd}", flags | direct | os.O_CLOEXEC)

    def _go_direct(self) -> None:
        """O_DIRECT from now on, with the smallest alignment that works."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_SETFL, fcntl.fcntl(self.fd, fcntl.F_GETFL) | os.O_DIRECT)
            self.alignment = next(a for a in ALIGNMENTS if self._reads_at(a))
        except (OSError, StopIteration) as error:
            raise ConfigError(f"{self.path} cannot be read with O_DIRECT") from error
        if self.size_bytes % self.alignment:
            raise ConfigError(f"{self.path}: its size is not a multiple of {self.alignment}")

    def _reads_at(self, offset: int) -> bool:
        with mmap.mmap(-1, ALIGNMENTS[-1]) as memory, memoryview(memory) as view:
            try:
                return os.preadv(self.fd, [view[:offset]], offset) >= 0
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
                raise

    def _grow_to(self, size_bytes: int | None) -> int:
        if stat.S_ISBLK(os.fstat(self.fd).st_mode):
            return os.lseek(self.fd, 0, os.SEEK_END)
        present = os.fstat(self.fd).st_size
        if size_bytes is not None and present < size_bytes and not self.read_only:
            os.ftruncate(self.fd, size_bytes)
            os.fsync(self.fd)
            return size_bytes
        return present

    def _length(self, size_bytes: int | None) -> str:
        return f"cannot make {self.path} {size_bytes} bytes long"

    def read_into(self, offset: int, view: memoryview) -> None:
        if self.alignment == 1 or not view:
            self._read(offset, view)
            return
        with mmap.mmap(-1, len(view)) as memory, memoryview(memory) as aligned:
            self._read(offset, aligned)
            view[:] = aligned

    def _read(self, offset: int, view: memoryview) -> None:
        if (area := self.area) is not None:
            area.read(self.fd, offset, view)
        else:
            read_exactly(self.fd, offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        if not fua:
            self._write(self.fd, offset, view, 0)
            return
        fd = self.reopen(os.O_RDWR)
        try:
            self._write(fd, offset, view, _RWF_DSYNC)
        finally:
            os.close(fd)

    def _write(self, fd: int, offset: int, view: memoryview, flags: int) -> None:
        if self.alignment == 1 or not view:
            self._write_aligned(fd, offset, view, flags)
            return
        with mmap.mmap(-1, len(view)) as memory, memoryview(memory) as aligned:
            aligned[:] = view
            self._write_aligned(fd, offset, aligned, flags)

    def _write_aligned(self, fd: int, offset: int, view: memoryview, flags: int) -> None:
        if (area := self.area) is not None:
            area.write(fd, offset, view, flags)
        else:
            write_exactly(fd, offset, view, flags)

    def flush(self) -> None:
        try:
            os.fdatasync(self._flush_fd)
        except OSError:
            self.drop_refused()
            raise

    def drop_refused(self) -> None:
        """The disk has refused something. The kernel keeps it in its cache as if it was written: it
        would be read until memory runs short, and the next fdatasync says that all is well."""
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def trim(self, offset: int, length: int) -> None:
        self._make_zeroes(FALLOC_PUNCH_HOLE, offset, length)

    def _make_zeroes(self, mode: int, offset: int, length: int) -> bool:
        """False: the file system cannot do that."""
        area = self.area
        with area.zeroing(self.fd, offset, length) if area is not None else nullcontext() as change:
            try:
                fallocate(self.fd, mode | FALLOC_KEEP_SIZE, offset, length)
                return True
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            if change is not None:
                change.done = False
            return False

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        if self._make_zeroes(FALLOC_ZERO_RANGE if no_hole else FALLOC_PUNCH_HOLE, offset, length):
            return
        if fast:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        end = offset + length
        while offset < end:
            chunk = memoryview(_ZERO_CHUNK)[: end - offset]
            self.write(offset, chunk, False)
            offset += len(chunk)

    def cache(self, offset: int, length: int) -> None:
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_WILLNEED)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        end = offset + (length if self.area is None else min(length, COMPARED_BYTES_MAX))
        while offset < end and len(found) < EXTENTS_MAX:
            data = _seek(self.fd, offset, end, os.SEEK_DATA)
            if data > offset:
                found.append((data - offset, self._is_hole(offset, data - offset)))
                offset = data
            if offset < end and data == offset:
                hole = _seek(self.fd, offset, end, os.SEEK_HOLE)
                hole = hole if hole > offset else end  # it has become one in between
                found.append((hole - offset, False))
                offset = hole
        return found

    def _is_hole(self, offset: int, length: int) -> bool:
        """With an integrity area its blocks must have been zeroes: what was lost is read, and
        found."""
        if (area := self.area) is None:
            return True
        return not (offset | length) % BLOCK_BYTES and area.is_zero(offset, length)

    def resize(self, size_bytes: int) -> None:
        try:
            present = self._grow_to(size_bytes)
        except OSError as error:
            raise os_failure(error, self._length(size_bytes)) from error
        if present < size_bytes:
            why = "has only" if not self.read_only else "is read-only and has"
            raise NoSpaceError(f"{self.path} {why} {present} bytes")
        self.size_bytes = size_bytes

    def close(self) -> None:
        for fd in (self._flush_fd, self.fd):
            os.close(fd)
        self._flush_fd = self.fd = -1
