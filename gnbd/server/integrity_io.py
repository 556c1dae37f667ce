"""The file of an integrity area: STATE_DIR/integrity/EXPORT.sums.

It is beside the state and not at the end of the disk: disks keep their size and content, can be
whole block devices, and are converted while they are in use. Its space is allocated when it is
made, so that a full file system of the state cannot fail a write to a disk.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import quote

import msgspec

from cluster.errors import CorruptionError, NotFoundError, os_failure
from cluster.paths_io import make_directory, sync_directory, sync_names
from gnbd.exports import Export
from gnbd.server.backends_io import FileBackend
from gnbd.server.integrity import HEADER_BYTES, Header, encode_header, file_bytes, newest_untrusted
from native.integrity import BITS_AT, REGION_BYTES, Area

_NAME_BYTES_MAX = 200


def area_path(state_dir: Path, name: str) -> Path:
    """Where the area of an export is."""
    text = quote(name, safe=" ")
    if len(text) > _NAME_BYTES_MAX or text.startswith("."):
        text = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    return state_dir / "integrity" / f"{text}.sums"


def read_header(path: Path) -> Header | None:
    """None: there is no such file. Raises StackError."""
    try:
        with open(path, "rb") as file:
            copies = [file.read(HEADER_BYTES) for _ in range(2)]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise os_failure(error, f"cannot read {path}") from error
    try:
        return newest_untrusted(copies)
    except CorruptionError as error:
        hint = "remove the file: the sums are then computed from what is on the disk"
        raise CorruptionError(f"{path}: {error.message}", hint=hint) from error


def remove_area(path: Path) -> None:
    """It is gone for good at the return; whoever has it open may go on. Raises OSError."""
    path.unlink(missing_ok=True)
    if path.parent.exists():
        sync_directory(path.parent)


def check_area(config: Export, state_dir: Path) -> Header | None:
    """The header of the area that counts for an export, before anything is made or changed. Raises
    StackError."""
    size_bytes = config.size_bytes or 0
    if config.integrity == "crc32c":
        encode_header(Header(config.name, config.path, size_bytes))
    if config.integrity == "none":
        return None
    path = area_path(state_dir, config.name)
    header = read_header(path)
    if header is None or (header.name, header.path) != (config.name, config.path):
        return None
    if not os.path.exists(config.path):
        raise NotFoundError(
            f"export {config.name!r}: {config.path} is gone, and {path} remembers what was on it",
            hint="is it mounted? Remove the integrity area if the disk shall be made anew",
        )
    return header


def open_area(
    config: Export, header: Header | None, disk: FileBackend, state_dir: Path
) -> Integrity | None:
    """What protects an export whose disk has been opened; `header`: of `check_area`. An area that
    does not count is removed: nobody keeps its sums up. Raises StackError, OSError."""
    path = area_path(state_dir, config.name)
    if header is None:
        remove_area(path)
        if config.integrity != "crc32c":
            return None
        header = Header(config.name, config.path, disk.size_bytes)
        make_area(path, header, settled=disk.made)
    return open_grown(path, header, disk.fd, disk.size_bytes)


def open_grown(path: Path, header: Header, descriptor: int, size_bytes: int) -> Integrity:
    """An area, for a disk that may have become longer. Raises StackError, OSError."""
    integrity = Integrity(path, header)
    try:
        integrity.grow(descriptor, size_bytes)
    except BaseException:
        integrity.close(False)
        raise
    return integrity


def make_area(path: Path, header: Header, *, settled: bool) -> None:
    """Make the file. `settled`: the disk is nothing but zeroes, else its sums have to be computed
    before they are believed. Raises StackError."""
    data = encode_header(header)
    make_directory(path.parent)
    beside = path.with_name(path.name + ".new")
    try:
        fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, file_bytes(header.size_bytes))
            os.pwrite(fd, data * 2, 0)
            if not settled:
                regions = -(-header.size_bytes // REGION_BYTES)
                os.pwrite(fd, ((1 << regions) - 1).to_bytes(-(-regions // 8), "little"), BITS_AT)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise os_failure(error, f"cannot make {path}") from error


class Integrity:
    """An open area."""

    def __init__(self, path: Path, header: Header) -> None:
        """Raises StackError."""
        self.path = path
        self._header = header
        self.events = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Written to at each mismatch."""
        self._fd = self._sync_fd = -1
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            # Bits are made durable through the other one, which the kernel may tell of lost sums.
            self._sync_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            sync_names(path)  # of an area whose maker was killed before it had
            self.area = Area(self._fd, header.size_bytes, self.events)
        except OSError as error:
            self._close_files()
            raise os_failure(error, f"cannot open {path}") from error

    @property
    def size_bytes(self) -> int:
        """Of the disk as far as it has sums."""
        return self._header.size_bytes

    def grow(self, descriptor: int, size_bytes: int) -> None:
        """The disk is longer: its sums are computed by and by. Raises StackError, OSError."""
        if size_bytes <= self.size_bytes:
            return
        changes = {"size_bytes": size_bytes, "generation": self._header.generation + 1}
        header = msgspec.structs.replace(self._header, **changes)
        data = encode_header(header)
        os.posix_fallocate(self._fd, 0, file_bytes(size_bytes))
        self.area.grow(descriptor, size_bytes)
        os.fsync(self._fd)
        for offset in (0, HEADER_BYTES):
            os.pwrite(self._fd, data, offset)
            os.fdatasync(self._fd)
        self._header = header

    def sync(self) -> None:
        """Make the sums durable. Raises OSError; then those in flux have to be settled anew: some
        may be lost, while the kernel has them in its cache, and the next call succeeds."""
        try:
            os.fdatasync(self._sync_fd)
        except OSError:
            self.area.doubt(every=False)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            raise

    def close(self, flushed: bool) -> None:
        """Nobody reads or writes any more. `flushed`: all data is durable, so that the next start
        believes every sum."""
        try:
            if flushed:
                self.area.pick(every=True)
                self.sync()
                self.area.clear(durable=True)
                self.sync()
        finally:
            self.area.free()
            self._close_files()

    def _close_files(self) -> None:
        for fd in (self._fd, self._sync_fd, self.events):
            if fd >= 0:
                os.close(fd)
