"""Locks of files as FUSE carries them (GETLK, SETLK, SETLKW): the bytes, and their meaning.

| struct | fields |
|---|---|
| fuse_lk_in | u64 handle, u64 owner, lock, u32 flags, u32 padding |
| fuse_lk_out | lock |
| lock (fuse_file_lock) | u64 first, u64 last byte, u32 type (F_RDLCK, F_WRLCK, F_UNLCK), u32 pid |

`owner` is the kernel's name for the open files of a process (fcntl locks) or for one open file (OFD
locks, flock). Both kinds of fcntl locks look alike; those of a process go when it closes the file
(FLUSH tells the owner), those of an open file when that is released.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import NamedTuple

import msgspec

from cfs.errors import FsError
from dlm.flocks import Flocks
from dlm.range_file import UNLOCK
from dlm.range_locks import RangeLocks
from dlm.ranges import READ, WRITE

_IN = struct.Struct("<4QIIII")
_LOCK = struct.Struct("<2QII")
LK_FLOCK = 1 << 0
_KINDS = {fcntl.F_RDLCK: READ, fcntl.F_WRLCK: WRITE, fcntl.F_UNLCK: UNLOCK}
_TYPES = {READ: fcntl.F_RDLCK, WRITE: fcntl.F_WRLCK}


class FileLocks(NamedTuple):
    """Locks of files that hold in the whole cluster."""

    flocks: Flocks
    ranges: RangeLocks


class LockRequest(msgspec.Struct, frozen=True, gc=False):
    """The body of GETLK, SETLK or SETLKW."""

    handle: int
    owner: int
    start: int
    end: int
    kind: int
    pid: int
    flags: int

    @property
    def flock(self) -> bool:
        """A lock of the whole file as flock(2) has them."""
        return bool(self.flags & LK_FLOCK)

    @property
    def unlocks(self) -> bool:
        return self.kind == UNLOCK


def parse_lock(body: bytes) -> LockRequest:
    """Raises FsError(EINVAL) for what no kernel sends."""
    if len(body) < _IN.size:
        raise FsError(errno.EINVAL)
    handle, owner, start, end, kind, pid, flags, _padding = _IN.unpack_from(body)
    if start > end or kind not in _KINDS:
        raise FsError(errno.EINVAL)
    return LockRequest(handle, owner, start, end, _KINDS[kind], pid, flags)


FREE = _LOCK.pack(0, 0, fcntl.F_UNLCK, 0)
"""The answer to GETLK when nothing is in the way."""


def encode_lock(start: int, end: int, kind: int, pid: int) -> bytes:
    """The answer to GETLK. The kernel knows only its own processes: of a lock of another node it
    is told pid 0."""
    return _LOCK.pack(start, end, _TYPES[kind], pid)
