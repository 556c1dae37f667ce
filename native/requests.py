"""Requests of the FUSE kernel module as values, and the shared table of unanswered ones.

The table (a memfd) is written by the session extension of a mount process and may be mapped by
any other: guard reads from it which byte ranges hold pages locked behind an unanswered READ or
WRITE (an invalidation of those would wait; they hold no valid data).

| offset | table |
|---|---|
| 0 | u64 rows in use: all rows at and above this number are free |
| 8 | u64 number of unanswered requests |
| 16 | u64 rises before a message is read and again when it is listed: odd in between |
| 64 | rows of 64 bytes |

| offset | row |
|---|---|
| 0 | u64 unique; 0: free. Written last, cleared first; reread it after the row |
| 8 | u64 inode |
| 16 | u64 handle |
| 24 | u64 offset |
| 32 | u64 CLOCK_BOOTTIME ns when it was read |
| 40 | u32 size |
| 44 | u32 opcode |
| 48 | u32 operation flags |
| 52 | u32 thread id of the caller |
| 56 | u32 state: 1 interrupted, 2 its answer is kept by the closed gate |
| 60 | u32 0 |
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from typing import NamedTuple


class Opcode(enum.IntEnum):
    """Requests of the kernel (linux/fuse.h)."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


WRITE_CACHE = 1 << 0
"""`operation_flags` of a WRITE: laundered from the page cache; handle and caller mean nothing."""
WRITE_LOCKOWNER = 1 << 1
"""Of READ and WRITE: the caller's own buffer, past the page cache; what fills or changes pages (a
page fault, read-ahead, a buffered write) comes without, whatever the flags of its descriptor."""
WRITE_KILL_SUIDGID = 1 << 2
OPEN_KILL_SUIDGID = 1 << 0
SETATTR_MODE = 1 << 0
SETATTR_UID = 1 << 1
SETATTR_GID = 1 << 2
SETATTR_SIZE = 1 << 3
SETATTR_ATIME = 1 << 4
SETATTR_MTIME = 1 << 5
SETATTR_CTIME = 1 << 10
SETATTR_ATIME_NOW = 1 << 7
SETATTR_MTIME_NOW = 1 << 8
SETATTR_KILL_SUIDGID = 1 << 11
READ_LOCKOWNER = 1 << 1
RELEASE_FLUSH = 1 << 0
RELEASE_FLOCK_UNLOCK = 1 << 1
FSYNC_DATA_ONLY = 1 << 0
GETATTR_HANDLE = 1 << 0

PENDING_MAX = 65536
"""Rows of the table of unanswered requests; what does not fit is served but not listed."""


_KILL_SUIDGID: dict[int, int] = {
    Opcode.WRITE: WRITE_KILL_SUIDGID,
    Opcode.SETATTR: SETATTR_KILL_SUIDGID,
    Opcode.OPEN: OPEN_KILL_SUIDGID,
}


class Request(NamedTuple):
    """A request as the kernel sent it; fields that its operation does not have are 0."""

    unique: int
    inode: int
    handle: int
    offset: int
    lock_owner: int
    opcode: int
    size: int
    flags: int
    """Of READ, WRITE, OPEN, CREATE, RELEASE: the file's open flags now (O_APPEND, O_DSYNC, ...);
    of RENAME2 its flags."""
    operation_flags: int
    """write_flags, read_flags, release_flags, fsync_flags, getattr_flags, SETATTR's valid."""
    uid: int
    gid: int
    pid: int

    @property
    def laundered(self) -> bool:
        """A WRITE of dirty pages by the kernel itself: never fail it, never let it wait."""
        return self.opcode == Opcode.WRITE and bool(self.operation_flags & WRITE_CACHE)

    @property
    def past_cache(self) -> bool:
        """A READ or WRITE between the caller's buffer and this process: no page holds its bytes,
        and none is locked for it."""
        return bool(self.operation_flags & READ_LOCKOWNER)

    @property
    def kills_privileges(self) -> bool:
        """A WRITE, truncating SETATTR or OPEN of somebody who may not keep set-user-id and
        set-group-id bits (FUSE_HANDLE_KILLPRIV_V2)."""
        return bool(self.operation_flags & _KILL_SUIDGID.get(self.opcode, 0))

    @property
    def append(self) -> bool:
        """A WRITE that goes to the end of the file, wherever that is (not for laundered ones)."""
        return bool(self.flags & os.O_APPEND) and not self.laundered

    @property
    def data_sync(self) -> bool:
        """O_DSYNC or O_SYNC: durable before the answer."""
        return bool(self.flags & os.O_DSYNC)


class PendingRequest(NamedTuple):
    """A row of the table of unanswered requests."""

    unique: int
    inode: int
    handle: int
    offset: int
    start_ns: int
    """CLOCK_BOOTTIME when it was read."""
    size: int
    opcode: int
    operation_flags: int
    pid: int
    interrupted: bool
    answered: bool
    """Its answer is kept because the gate is closed."""

    @property
    def past_cache(self) -> bool:
        """As of `Request`; only for a READ or WRITE."""
        return bool(self.operation_flags & READ_LOCKOWNER)

    @property
    def laundered(self) -> bool:
        """As of `Request`."""
        return self.opcode == Opcode.WRITE and bool(self.operation_flags & WRITE_CACHE)


_ROW = struct.Struct("<5Q6I")
_UNIQUE = struct.Struct("<Q")
_HEADER_BYTES = 64
_INTERRUPTED = 1
_ANSWERED = 2
TABLE_BYTES = _HEADER_BYTES + PENDING_MAX * _ROW.size


class RequestTable:
    """A read-only view of a mount's unanswered requests, from any process."""

    def __init__(self, descriptor: int) -> None:
        """Map the table behind `descriptor` (which may be closed afterwards)."""
        self._map = mmap.mmap(descriptor, TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)

    def __len__(self) -> int:
        return int(_UNIQUE.unpack_from(self._map, 8)[0])

    def complete(self) -> bool:
        """Whether every message that this process has taken from the kernel is listed."""
        listed = int(_UNIQUE.unpack_from(self._map, 0)[0]) < PENDING_MAX
        return listed and not _UNIQUE.unpack_from(self._map, 16)[0] % 2

    def rows(self) -> list[PendingRequest]:
        """The requests that were unanswered all the time of this call, and some of the others."""
        result = []
        for index in range(_UNIQUE.unpack_from(self._map, 0)[0]):
            at = _HEADER_BYTES + index * _ROW.size
            row = _ROW.unpack_from(self._map, at)
            if row[0] and _UNIQUE.unpack_from(self._map, at)[0] == row[0]:
                state = int(row[9])
                values = (*row[:9], bool(state & _INTERRUPTED), bool(state & _ANSWERED))
                result.append(PendingRequest._make(values))
        return result

    def close(self) -> None:
        self._map.close()
