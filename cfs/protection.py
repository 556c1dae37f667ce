"""What the flags of an inode (chattr(1)) forbid to everybody, root too.

| | immutable | append only |
|---|---|---|
| bytes | none change | only more at the end |
| mode, owner, times, extended attributes | stay | stay (touch(1) may set the present time) |
| the inode's own names | stay, no new ones | stay, no new ones |
| names in a directory | stay, no new ones | new ones only |

A page that the kernel writes back is never refused: it was stored before.
"""

from __future__ import annotations

import errno

from cfs.attributes import FLAG_APPEND, FLAG_IMMUTABLE
from cfs.errors import FsError
from cfs.nodes import InodeNode

PROTECTED = FLAG_IMMUTABLE | FLAG_APPEND


def need_mutable(inode: InodeNode) -> None:
    """Whatever an immutable inode forbids and one for appending allows."""
    if inode.flags & FLAG_IMMUTABLE:
        raise FsError(errno.EPERM, "immutable")


def need_unprotected(inode: InodeNode) -> None:
    """Whatever both forbid: other attributes, names of the inode, names leaving a directory."""
    if inode.flags & PROTECTED:
        raise FsError(errno.EPERM, "immutable or append only")


def need_openable(flags: int, *, writes: bool, appends: bool) -> None:
    """open(2) of an inode with `flags`. `appends`: with O_APPEND and without O_TRUNC."""
    if writes and (flags & FLAG_IMMUTABLE or (flags & FLAG_APPEND and not appends)):
        raise FsError(errno.EPERM, "immutable or append only")


def clear_privileges(inode: InodeNode) -> None:
    """A file that is written or given away loses set-user-id and, if executable, set-group-id."""
    if inode.mode & 0o4000:
        inode.mode &= ~0o4000
    if inode.mode & 0o2010 == 0o2010:
        inode.mode &= ~0o2000
