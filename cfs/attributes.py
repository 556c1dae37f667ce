"""Values that cross the door of the file system: attributes, directory entries, totals, options."""

from __future__ import annotations

import stat

import msgspec

BLOCK_BYTES = 4096
NAME_BYTES_MAX = 255
SYMLINK_BYTES_MAX = 3584
FILE_BYTES_MAX = 1 << 62
LINKS_MAX = 0xFFFF_FFF0
ROOT_COOKIE_SELF = 1
ROOT_COOKIE_PARENT = 2

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

XATTR_BYTES_MAX = 65536
XATTR_NAME_BYTES_MAX = 255
XATTR_LIST_BYTES_MAX = 65536
"""All names of one inode, each with a zero byte: what listxattr() can give."""

FLAG_IMMUTABLE = 0x10
FLAG_APPEND = 0x20
FLAG_NODUMP = 0x40
FLAG_NOATIME = 0x80
FLAGS_SETTABLE = FLAG_IMMUTABLE | FLAG_APPEND | FLAG_NODUMP | FLAG_NOATIME
"""Inode flags have the values of FS_IOC_GETFLAGS (linux/fs.h), on the disk too."""
FLAG_LINKABLE = 0x8000_0000
"""Not for callers: made by O_TMPFILE without O_EXCL, may still get its first name."""
FLAG_CUTTING = 0x4000_0000
"""Not for callers: blocks beyond the end hold what was cut off; they go before the file grows."""


class Attributes(msgspec.Struct, frozen=True, gc=False):
    """What stat() shows. `blocks` counts 512-byte units; times are nanoseconds of the wall clock.

    `generation` tells two lives of one inode number apart. `change` rises with every change of the
    inode (data or attributes), on all nodes. `flags` are `FLAG_...` bits.
    """

    ino: int
    generation: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    change: int
    birth_ns: int
    flags: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_regular(self) -> bool:
        return stat.S_ISREG(self.mode)


NOW = -1
"""In `SetAttributes` times: the file system's own clock (utimensat's UTIME_NOW)."""


class SetAttributes(msgspec.Struct, frozen=True, gc=False):
    """What setattr() changes; None leaves a field alone. `mode` holds permission bits only.

    `kill_privileges`: a new size takes set-user-id and set-group-id away, as the caller may not
    keep them. `generation` is that of the inode that is meant: ESTALE if its number is another's
    by now.
    """

    size: int | None = None
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    ctime_ns: int | None = None
    kill_privileges: bool = True
    generation: int | None = None


class DirEntry(msgspec.Struct, frozen=True, gc=False):
    """One name. `cookie` is unique in its directory, the same on all nodes, and stays the same as
    long as the name exists; `type` is the S_IFMT part of the mode. "." and ".." come first."""

    cookie: int
    name: bytes
    ino: int
    type: int


class Totals(msgspec.Struct, frozen=True):
    """What statfs() shows, in blocks of 4096 bytes. `freeing_blocks`: free, not yet for use."""

    blocks: int
    free_blocks: int
    freeing_blocks: int
    name_bytes_max: int = NAME_BYTES_MAX
    block_bytes: int = BLOCK_BYTES


class MountOptions(msgspec.Struct, frozen=True):
    """Choices of one mount. `background` off: nothing runs by itself (tests call commit).
    `access_times`: reading moves the access time if it is older than the last change or a day."""

    commit_interval_ms: int = 1000
    checkpoint_interval_ms: int = 5000
    dirty_bytes_max: int = 96 << 20
    dirty_bytes_start: int = 16 << 20
    inodes_cached_max: int = 65536
    inode_pool: int = 64
    background: bool = True
    read_only: bool = False
    access_times: bool = False
