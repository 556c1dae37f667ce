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

import msgspec

from cfs.errors import FsError

_IN = struct.Struct("<4QIIII")
_LOCK = struct.Struct("<2QII")
LK_FLOCK = 1 << 0


class LockRequest(msgspec.Struct, frozen=True, gc=False):
    """The body of GETLK, SETLK or SETLKW."""

    handle: int
    owner: int
    start: int
    end: int
    type: int
    pid: int
    flags: int

    @property
    def flock(self) -> bool:
        """A lock of the whole file as flock(2) has them."""
        return bool(self.flags & LK_FLOCK)

    @property
    def unlocks(self) -> bool:
        return self.type == fcntl.F_UNLCK


def parse_lock(body: bytes) -> LockRequest:
    """Raises FsError(EINVAL) for what no kernel sends."""
    if len(body) < _IN.size:
        raise FsError(errno.EINVAL)
    handle, owner, start, end, kind, pid, flags, _padding = _IN.unpack_from(body)
    if start > end or kind not in (fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK):
        raise FsError(errno.EINVAL)
    return LockRequest(handle, owner, start, end, kind, pid, flags)


def encode_lock(start: int, end: int, kind: int, pid: int) -> bytes:
    """The answer to GETLK."""
    return _LOCK.pack(start, end, kind, pid)
