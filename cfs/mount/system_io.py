"""What a mount process asks of the machine: daemon, memory, read-ahead, unmounting by force.

The process forks only before it starts anything (threads, trio); afterwards never. Its working
directory is `/`, and it never touches a path below its own mount: that would wait for itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from native.process import keep_memory, lock_memory, set_io_flusher

log = logging.getLogger("cfs.mount")

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
SWITCH_INTERVAL_S = 0.0005
FREE_BYTES_KEPT = 64 << 20
"""Of memory that data was moved through."""
GC_THRESHOLDS = (100_000, 50, 100)
OPEN_FILES = 65536

_libc = ctypes.CDLL(None, use_errno=True)
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


class StatusPipe:
    """How the daemon tells the command that started it how the mount went."""

    def __init__(self, descriptor: int = -1) -> None:
        self._descriptor = descriptor

    def take(self) -> int:
        """The descriptor, for another one to report on."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def report(self, exit_code: int, message: str = "") -> None:
        """Say it, once."""
        if self._descriptor >= 0:
            os.write(self._descriptor, f"{exit_code} {message}".encode())
            os.close(self._descriptor)
            self._descriptor = -1


def daemonise(wait: Callable[[int, str], int]) -> StatusPipe:
    """Go on in a new session in the background; the calling process ends with what `wait` makes
    of the reported exit code and message."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            word, _, message = file.read().decode(errors="replace").partition(" ")
        code = int(word) if word.isdecimal() else -1
        sys.exit(wait(code, message))
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    return StatusPipe(writer)


def redirect_output(path: Path | None) -> None:
    """Messages go to a file (None: nowhere) from now on; standard input is empty."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    if path is None:
        os.dup2(null, 2)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        os.dup2(file, 2)
        os.close(file)
    os.close(null)


def settle_process() -> None:
    """Before the first thread: reclaim must never wait for this process to reclaim."""
    os.chdir("/")
    os.umask(0)
    set_io_flusher()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_memory(FREE_BYTES_KEPT)
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def settle_memory() -> None:
    """After everything is imported and set up: keep it in memory, and out of the collector."""
    try:
        lock_memory()
    except OSError as error:
        log.warning("memory is not locked: %s", error)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def set_read_ahead(minor: int, kilobytes: int) -> None:
    """Let the kernel read far ahead: its default of 128 KiB makes small requests."""
    try:
        Path(f"/sys/class/bdi/0:{minor}/read_ahead_kb").write_text(str(kilobytes))
    except OSError as error:
        log.warning("read-ahead stays as it is: %s", error)


def unmount(mountpoint: str, flags: int = 0) -> int:
    """umount2(2), without the GIL; an errno. Call it from a thread while the mount is served:
    it may write dirty pages back."""
    code = _libc.umount2(os.fsencode(mountpoint), flags | UMOUNT_NOFOLLOW)
    return ctypes.get_errno() if code else 0


def abort_mount(mountpoint: str, minor: int) -> None:
    """End every request and every future one with an error, and take the mount out of the tree.
    Only if it is still ours: something else may have been mounted there meanwhile."""
    if mounted_minor(mountpoint) == minor:
        unmount(mountpoint, MNT_FORCE | MNT_DETACH)
        if mounted_minor(mountpoint) == minor:
            unmount(mountpoint, MNT_DETACH)


def note_process(directory: Path, minor: int) -> Path:
    """Leave this process's number where umount.fuse.cfs looks for it."""
    path = directory / "mounts" / str(minor)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(os.getpid()))
    return path


def _mounts() -> Iterator[tuple[str, int, str, str]]:
    """(mount point, device minor, type, source) of every mount that this process sees, in their
    order. Reads only /proc, never a mount."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields, _, rest = line.partition(b" - ")
            words = fields.split(b" ")
            kind, source = rest.split(b" ")[:2]
            minor = int(words[2].split(b":")[1])
            yield _plain(words[4]), minor, kind.decode(), _plain(source)


def _plain(field: bytes) -> str:
    return os.fsdecode(field.decode("unicode_escape").encode("latin-1"))


def fuse_mounts() -> list[tuple[str, str, int]]:
    """(source, mount point, device minor) of every FUSE mount."""
    return [
        (source, place, minor)
        for place, minor, kind, source in _mounts()
        if kind.startswith("fuse")
    ]


def _mount_on_top(mountpoint: str) -> tuple[int, str, str]:
    """Device minor, type and source of what is mounted last at a place; (-1, "", "") if nothing
    is."""
    found = -1, "", ""
    for place, minor, kind, source in _mounts():
        if place == mountpoint:
            found = minor, kind, source
    return found


def seen_by(minor: int) -> int:
    """A process in whose mount namespace a FUSE mount is; 0 if no process sees it."""
    for path in Path("/proc").glob("[0-9]*/mountinfo"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f" 0:{minor} ".encode() in path.read_bytes():
                return int(path.parent.name)
    return 0


def noted_process(directory: Path, minor: int) -> int:
    """The mount process that left `note_process` for a mount of this node; 0 if it is gone."""
    try:
        pid = int((directory / "mounts" / str(minor)).read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else pid  # killed, whether its parent has asked or not


def mounted_minor(mountpoint: str) -> int:
    """The device minor of the FUSE mount on top of `mountpoint`; -1 if there is none. Reads only
    /proc, never the mount."""
    minor, kind, _source = _mount_on_top(mountpoint)
    return minor if kind.startswith("fuse") else -1


def mount_source(mountpoint: str) -> tuple[str, str]:
    """Type and source of what is mounted on top of a place, ("", "") if nothing is. Reads only
    /proc, never the mount."""
    return _mount_on_top(mountpoint)[1:]
