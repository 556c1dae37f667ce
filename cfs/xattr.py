"""Extended attributes of inodes.

They are a B+tree by cookie, as names in a directory are (`cfs.directory`), whose root is in the
inode. A small value stands in its entry, a larger one in blocks of its own (`ValueNode`). All these
blocks are counted in the inode's `blocks` and freed with it.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cfs import tree
from cfs.attributes import XATTR_BYTES_MAX, XATTR_LIST_BYTES_MAX, XATTR_NAME_BYTES_MAX
from cfs.errors import CorruptionError, FsError
from cfs.format import HASH_SHIFT, Kind
from cfs.nodes import VALUE_BYTES, InodeNode, Tree, ValueNode, Xattr, XattrTree
from cfs.space import Space
from cfs.transaction import Reader, Tx

if TYPE_CHECKING:
    from cfs.cache import Covered

INLINE_BYTES_MAX = 1000
"""Name and value together: so that several entries fit into a block."""
CUT_BLOCKS_MAX = 64
CREATE = 1
REPLACE = 2
"""Flags of setxattr(2)."""
PREFIXES = (b"user.", b"trusted.", b"security.")
ACCESS_ACL = b"system.posix_acl_access"
DEFAULT_ACL = b"system.posix_acl_default"
CAPABILITY = b"security.capability"


def need_name(name: bytes) -> None:
    """Refuse what is no name of an attribute that is kept here."""
    if not name or len(name) > XATTR_NAME_BYTES_MAX:
        raise FsError(errno.ERANGE)
    if name in (ACCESS_ACL, DEFAULT_ACL):
        return
    if not name.startswith(PREFIXES):
        raise FsError(errno.EOPNOTSUPP)
    if name in PREFIXES:
        raise FsError(errno.EINVAL)


def find(
    reader: Reader, covered: Covered, inode: InodeNode, hashed: int, name: bytes
) -> tuple[int, Xattr] | None:
    """(cookie, entry) of the attribute called `name`, whose hash is `hashed`."""
    if inode.xattrs is None:
        return None
    for cookie, value in tree.items(reader, covered, XattrTree(inode), hashed << HASH_SHIFT):
        if cookie >> HASH_SHIFT != hashed:
            break
        assert isinstance(value, Xattr)
        if value.name == name:
            return cookie, value
    return None


def names(reader: Reader, covered: Covered, inode: InodeNode) -> list[bytes]:
    """The names of all attributes."""
    result: list[bytes] = []
    if inode.xattrs is not None:
        for _, value in tree.items(reader, covered, XattrTree(inode)):
            assert isinstance(value, Xattr)
            result.append(value.name)
    return result


def value_of(reader: Reader, covered: Covered, entry: Xattr) -> bytes:
    """The value of an entry."""
    if not entry.blocks:
        return entry.value
    parts = []
    for block in entry.blocks:
        node = reader.get(covered, block, Kind.XATTR_VALUE)
        assert isinstance(node, ValueNode)
        parts.append(node.data)
    return b"".join(parts)[: entry.size]


class XattrEditor:
    """Changes the attributes of one inode within one transaction."""

    def __init__(self, tx: Tx, covered: Covered, inode: InodeNode, space: Space) -> None:
        """`inode` is the transaction's own clone."""
        self.tx = tx
        self.covered = covered
        self.inode = inode
        self.superblock = space.superblock
        self.space = space.tree_space(tx, inode)

    def _editor(self) -> tree.TreeEditor:
        if self.inode.xattrs is None:
            self.inode.xattrs = Tree(0, [], [], 0)
        return tree.TreeEditor(self.tx, self.covered, XattrTree(self.inode), self.space)

    def get(self, name: bytes) -> bytes | None:
        """The value; None if there is no such attribute."""
        found = find(self.tx, self.covered, self.inode, self.superblock.name_hash(name), name)
        return None if found is None else value_of(self.tx, self.covered, found[1])

    def set(self, name: bytes, value: bytes, flags: int = 0) -> None:
        """Make or replace an attribute, as `flags` allow. Raises EEXIST, ENODATA, E2BIG, ENOSPC."""
        if len(value) > XATTR_BYTES_MAX:
            raise FsError(errno.E2BIG)
        hashed = self.superblock.name_hash(name)
        found = find(self.tx, self.covered, self.inode, hashed, name)
        if found is not None and flags & CREATE:
            raise FsError(errno.EEXIST)
        if found is None and flags & REPLACE:
            raise FsError(errno.ENODATA)
        if found is None and self._listed() + len(name) + 1 > XATTR_LIST_BYTES_MAX:
            raise FsError(errno.ENOSPC, "more names than listxattr() could give")
        before = () if found is None else found[1].blocks
        if len(name) + len(value) <= INLINE_BYTES_MAX:
            self._free(before)
            entry = Xattr(name, len(value), value)
        else:
            entry = Xattr(name, len(value), blocks=self._store(before, value))
        editor = self._editor()
        if found is not None:
            editor.replace(found[0], entry)
            return
        cookie = hashed << HASH_SHIFT
        for taken, _ in tree.items(self.tx, self.covered, editor.inode, cookie):
            if taken != cookie:
                break
            cookie += 1
        if cookie >> HASH_SHIFT != hashed:
            raise FsError(errno.ENOSPC, "too many attributes with one hash")
        editor.insert(cookie, entry)
        self.inode.listed_bytes += len(name) + 1

    def _listed(self) -> int:
        """How long the list of all names is, a zero byte behind each. Counted once."""
        inode = self.inode
        if inode.listed_bytes < 0:
            present = names(self.tx, self.covered, inode)
            inode.listed_bytes = sum(map(len, present)) + len(present)
        return inode.listed_bytes

    def remove(self, name: bytes) -> bool:
        """Take an attribute away; False if there is none."""
        found = find(self.tx, self.covered, self.inode, self.superblock.name_hash(name), name)
        if found is None:
            return False
        self._free(found[1].blocks)
        self._editor().remove(found[0])
        self._tidy()
        if self.inode.listed_bytes >= 0:
            self.inode.listed_bytes -= len(name) + 1
        return True

    def cut(self) -> bool:
        """Take attributes away, a bounded amount of work; True when none is left."""
        freed = 0
        self.inode.listed_bytes = -1
        while self.inode.xattrs is not None and freed < CUT_BLOCKS_MAX:
            last = tree.last(self.tx, self.covered, XattrTree(self.inode))
            assert last is not None
            assert isinstance(last[1], Xattr)
            freed += len(last[1].blocks) + 1
            self._free(last[1].blocks)
            self._editor().remove(last[0])
            self._tidy()
        return self.inode.xattrs is None

    def _tidy(self) -> None:
        if self.inode.xattrs is not None and not self.inode.xattrs.keys:
            self.inode.xattrs = None

    def _store(self, before: tuple[int, ...], value: bytes) -> tuple[int, ...]:
        """Put a value into blocks, those that it had first."""
        count = -(-len(value) // VALUE_BYTES)
        self._free(before[count:])
        blocks = list(before[:count])
        for index in range(count):
            part = value[index * VALUE_BYTES : (index + 1) * VALUE_BYTES].ljust(VALUE_BYTES, b"\0")
            if index < len(blocks):
                node = self.tx.edit(self.covered, blocks[index], Kind.XATTR_VALUE)
                assert isinstance(node, ValueNode)
                node.data = part
            else:
                block, generation = self.space.allocate()
                version = (generation, 0)
                self.tx.add(self.covered, ValueNode(block, self.inode.block, version, part))
                blocks.append(block)
        return tuple(blocks)

    def _free(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            self.tx.drop(self.covered, block)
            self.space.free(block)


def check_entry(cookie: int, hashed: int, entry: Xattr) -> None:
    """Raises CorruptionError if the entry contradicts itself."""
    if cookie >> HASH_SHIFT != hashed:
        raise CorruptionError(f"the cookie of attribute {entry.name!r} does not fit its hash")
    try:
        need_name(entry.name)
    except FsError:
        raise CorruptionError(f"the impossible attribute name {entry.name!r}") from None
