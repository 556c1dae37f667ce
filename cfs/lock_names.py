"""Names of the cluster locks: a letter and 16 hex digits.

| lock | name | modes | protects |
|---|---|---|---|
| inode | `I` ino | PR, EX | the inode, its tree, its data |
| open | `O` ino | PR where open without `I`; EX by who frees | the life of an inode without names |
| group | `A` n | EX | the group's block; LVB: free and freeing blocks |
| space | `S` | PR while maps are not in place; EX by who finds no space | `cfs.demand` |
| control | `C` | EX | superblock, slot table, choice of a slot |
| rename | `R` | EX | moves of directories between directories |
| mount | `M` | PR by mounts | a mount begins when the dead are recovered |
| flock | `K` ino | PR, EX | flock(2): a lock per open file, not cached; NL keeps the master |
| ranges | `P` ino | EX | who holds it keeps the byte ranges of fcntl(2), `dlm/range_locks.py` |

Order: `R`, then inodes by number, then groups by number. `O` is taken alone or tried. `C` is taken
with nothing but groups after it. The demote hook of `I` takes `O` in PR if the inode is open here;
no other demote hook waits for a lock.
"""

from __future__ import annotations

INODE = b"I"
OPEN = b"O"
GROUP = b"A"
CONTROL_LOCK = b"C"
RENAME_LOCK = b"R"
MOUNT_LOCK = b"M"
SPACE_LOCK = b"S"
FLOCK = b"K"


NEIGHBOURS = 16
"""Inodes whose lock names differ in the last byte only: their locks have one directory member."""


def inode_lock_name(ino: int) -> bytes:
    return b"I%016x" % ino


def open_lock_name(ino: int) -> bytes:
    return b"O%016x" % ino


def group_lock_name(group: int) -> bytes:
    return b"A%016x" % group


def range_lock_name(ino: int) -> bytes:
    return b"P%016x" % ino


def flock_lock_name(ino: int) -> bytes:
    return b"K%016x" % ino


def number_of(name: bytes) -> int:
    """The number in a lock's name."""
    return int(name[1:], 16)
