"""Where the stack keeps its files, and durable small files.

`CFS_RUN_DIR` (default /run/cfs) holds sockets, `CFS_STATE_DIR` (default /var/lib/cfs) what must
survive a reboot. A durable file is replaced atomically (write beside, fsync, rename, fsync of the
directory) and carries a checksum, so a reader sees the old or the new content or a clear error.
Who was killed between rename and fsync has left a name that only the kernel's cache has. So what
is decided by such a file is read with `read_durable`: a power cut takes back nothing of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from pathlib import Path

from cluster.errors import BusyError, ConfigError, CorruptionError, os_failure

RUN_DIR_DEFAULT = "/run/cfs"
STATE_DIR_DEFAULT = "/var/lib/cfs"
_DIGEST_BYTES = 16
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EINVAL)
"""Directories that somebody else has made, and file systems that cannot."""
_STORE_MAGIC = b"CFSstor1"


def run_dir(given: Path | str | None = None) -> Path:
    """The directory of the sockets."""
    return Path(given or os.environ.get("CFS_RUN_DIR") or RUN_DIR_DEFAULT)


def state_dir(given: Path | str | None = None) -> Path:
    """The directory of what survives a reboot."""
    return Path(given or os.environ.get("CFS_STATE_DIR") or STATE_DIR_DEFAULT)


def control_socket(given: Path | str | None = None) -> Path:
    """clusterd's control socket."""
    return run_dir(given) / "clusterd.sock"


def guard_socket(given: Path | str | None = None) -> Path:
    """Where mounts attach to clusterguard."""
    return run_dir(given) / "guard.sock"


def boottime_ns() -> int:
    """The clock of every protocol: it goes on during suspend and never jumps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def make_directory(path: Path) -> None:
    """Make a directory (mode 0700), and its name durable, if it is not there. Raises ConfigError,
    NotPermittedError..."""
    try:
        present = path.is_dir()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not present:
            sync_names(path)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{path} is not a directory") from error
    except OSError as error:
        raise os_failure(error, f"cannot make the directory {path}") from error


def lock_directory(path: Path, program: str) -> int:
    """Only one process may use a state directory, and a killed one holds it until its last system
    call has ended. The descriptor is the lock. Raises BusyError that names the holder."""
    make_directory(path)
    sync_names(path)  # whoever made it may have been killed before it had
    fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(fd, 64).decode(errors="replace").strip() or "another process"
        os.close(fd)
        raise BusyError(f"{holder} uses {path}", hint="stop it, or use another directory") from None
    os.truncate(fd, 0)
    with contextlib.suppress(OSError):  # a full disk: the lock holds, only its holder has no name
        os.write(fd, f"{program} (pid {os.getpid()})\n".encode())
    return fd


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(fd)


def sync_names(path: Path) -> None:
    """Make durable the name of `path` and those of the directories above, within its file system.
    Raises OSError."""
    above = Path(os.path.realpath(path)).parents
    device = os.stat(above[0]).st_dev
    for directory in above:
        if os.stat(directory).st_dev != device:
            return
        try:
            sync_directory(directory)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise


def write_durable(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`; on return it is on disk. Raises OSError: then a start finds the
    old content or this."""
    make_directory(path.parent)
    beside = path.with_name(path.name + ".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError as error:
        beside.unlink(missing_ok=True)  # on a full disk it would keep the space from what mends it
        error.filename = str(path)
        raise
    finally:
        os.close(fd)
    os.replace(beside, path)
    sync_directory(path.parent)


def read_durable(path: Path) -> bytes | None:
    """What `path` holds, None if it does not exist. On return it is on disk: whoever wrote it may
    have been killed before it was, or have been an administrator. Raises OSError."""
    try:
        with open(path, "rb") as file:
            data = file.read()
            os.fsync(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        error.filename = str(path)
        raise
    sync_directory(path.parent)
    return data


def encode_store(payload: bytes) -> bytes:
    """A store: magic (8), BLAKE2b-128 of the payload (16), payload."""
    return _STORE_MAGIC + hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest() + payload


def decode_store_untrusted(data: bytes, name: str) -> bytes:
    """The payload of a store. Raises CorruptionError."""
    payload = data[len(_STORE_MAGIC) + _DIGEST_BYTES :]
    if data != encode_store(payload):
        raise CorruptionError(
            f"{name} is damaged",
            hint="this voter lost its store: clusterctl voter replace, then remove the file",
        )
    return payload


def write_store(path: Path, payload: bytes) -> None:
    """`write_durable` with a magic and a checksum in front."""
    write_durable(path, encode_store(payload))


def read_store(path: Path) -> bytes | None:
    """The payload of `write_store`, durable as `read_durable` has it; None if the file does not
    exist. Raises CorruptionError."""
    data = read_durable(path)
    return None if data is None else decode_store_untrusted(data, str(path))
