"""Names in a directory: a tree by cookie.

The cookie of a name is its 47-bit hash followed by 16 bits that tell names with the same hash
apart. It is stored, so it stays the same as long as the name exists, on every node.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cfs import tree
from cfs.errors import FsError
from cfs.format import COOKIE_FIRST, HASH_SHIFT
from cfs.nodes import Extent, InodeNode
from cfs.transaction import Reader

if TYPE_CHECKING:
    from cfs.cache import Covered

Found = tuple[int, int, int]
"""Cookie, inode, type (S_IFMT >> 12)."""


def find(
    reader: Reader, covered: Covered, inode: InodeNode, hashed: int, name: bytes
) -> Found | None:
    """The entry called `name`, whose hash is `hashed`."""
    for cookie, value in tree.items(reader, covered, inode, hashed << HASH_SHIFT):
        if cookie >> HASH_SHIFT != hashed:
            break
        assert isinstance(value, tuple)
        assert not isinstance(value, Extent)
        if value[2] == name:
            return cookie, value[0], value[1]
    return None


def insert(editor: tree.TreeEditor, hashed: int, name: bytes, ino: int, kind: int) -> int:
    """Add a name that is not there; its cookie."""
    cookie = max(hashed << HASH_SHIFT, COOKIE_FIRST)
    for taken, _ in tree.items(editor.tx, editor.covered, editor.inode, cookie):
        if taken != cookie:
            break
        cookie += 1
    if cookie >> HASH_SHIFT != hashed:
        raise FsError(errno.ENOSPC, "too many names with one hash")
    editor.insert(cookie, (ino, kind, name))
    return cookie


def entries(
    reader: Reader, covered: Covered, inode: InodeNode, cookie: int, limit: int
) -> list[tuple[int, int, int, bytes]]:
    """(cookie, inode, type, name) with cookies above `cookie`, at most `limit`."""
    result: list[tuple[int, int, int, bytes]] = []
    for key, value in tree.items(reader, covered, inode, cookie + 1):
        if len(result) >= limit:
            break
        assert isinstance(value, tuple)
        assert not isinstance(value, Extent)
        result.append((key, value[0], value[1], value[2]))
    return result


def is_empty(inode: InodeNode) -> bool:
    return inode.root is None or not inode.root.keys
