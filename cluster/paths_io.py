"""Where the stack keeps its files, and durable small files.

`CFS_RUN_DIR` (default /run/cfs) holds sockets, `CFS_STATE_DIR` (default /var/lib/cfs) what must
survive a reboot. A durable file is replaced atomically (write beside, fsync, rename, fsync of the
directory) and carries a checksum, so a reader sees the old or the new content or a clear error.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from cluster.errors import CorruptionError

RUN_DIR_DEFAULT = "/run/cfs"
STATE_DIR_DEFAULT = "/var/lib/cfs"
_DIGEST_BYTES = 16
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


def write_durable(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` by `data`; on return it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = path.with_name(path.name + ".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(beside, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_store(path: Path, payload: bytes) -> None:
    """`write_durable` with a magic and a checksum in front."""
    digest = hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest()
    write_durable(path, _STORE_MAGIC + digest + payload)


def read_store(path: Path) -> bytes | None:
    """The payload of `write_store`; None if the file does not exist. Raises CorruptionError."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    head = len(_STORE_MAGIC)
    payload = data[head + _DIGEST_BYTES :]
    digest = hashlib.blake2b(payload, digest_size=_DIGEST_BYTES).digest()
    if data[:head] != _STORE_MAGIC or data[head : head + _DIGEST_BYTES] != digest:
        raise CorruptionError(
            f"{path} is damaged",
            hint="this voter lost its store: clusterctl voter replace, then remove the file",
        )
    return payload
