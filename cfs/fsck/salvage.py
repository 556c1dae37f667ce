"""Reading damaged structures for what can be saved.

`cfs.nodes` refuses a block in which anything is wrong. Here as much is taken as can be read, and
what is wrong is told.
"""

from __future__ import annotations

import struct
from typing import TypeGuard

from cfs.attributes import XATTR_BYTES_MAX
from cfs.errors import CorruptionError
from cfs.format import HEADER_BYTES, Header, Kind, open_block_untrusted
from cfs.nodes import (
    CONTENT_BYTES_MAX,
    CONTENT_OFFSET,
    EXTENT_ENTRY,
    GROUP,
    GROUP_MAP_OFFSET,
    INDEX_ENTRY,
    INODE,
    LEVELS_MAX,
    NAME_ENTRY,
    TREE,
    TREE_OFFSET,
    VALUE_BYTES,
    XATTR_ENTRY,
    XATTR_ROOM_BYTES,
    XATTR_ROOT,
    Extent,
    GroupNode,
    InodeNode,
    Name,
    Tree,
    TreeNode,
    Value,
    decode_tree_untrusted,
    unpack_map,
    value_bytes,
)

Entries = tuple[list[int], list[Value]]
TREES = (Kind.DIRECTORY_TREE, Kind.EXTENT_TREE, Kind.XATTR_TREE)


class Salvaged(Tree):
    """A node of a tree of which something may be missing."""

    __slots__ = ("cut",)

    def __init__(self, level: int, keys: list[int], values: list[Value], *, cut: bool) -> None:
        super().__init__(level, keys, values, sum(value_bytes(value) for value in values))
        self.cut = cut
        """Entries could not be read."""

    @property
    def in_order(self) -> bool:
        return all(a < b for a, b in zip(self.keys, self.keys[1:], strict=False))


def salvage_tree(kind: Kind, level: int, count: int, data: bytes) -> Salvaged:
    """The entries of a tree's node up to the first that cannot be read."""
    try:
        tree = decode_tree_untrusted(kind, level, count, data)
        return Salvaged(level, tree.keys, tree.values, cut=False)
    except CorruptionError:
        pass
    if level >= LEVELS_MAX:
        return Salvaged(0, [], [], cut=True)
    keys: list[int] = []
    values: list[Value] = []
    offset = 0
    try:
        for _ in range(count):
            key, value = _entry(kind, level, data, offset)
            offset += value_bytes(value)
            keys.append(key)
            values.append(value)
    except (struct.error, CorruptionError):
        return Salvaged(level, keys, values, cut=True)
    return Salvaged(level, keys, values, cut=False)


def _entry(kind: Kind, level: int, data: bytes, offset: int) -> tuple[int, Value]:
    """One entry by itself. Raises struct.error or CorruptionError."""
    if level:
        size = INDEX_ENTRY.size
    elif kind == Kind.EXTENT_TREE:
        size = EXTENT_ENTRY.size
    elif kind == Kind.XATTR_TREE:
        _, name_bytes, blocks, length = XATTR_ENTRY.unpack_from(data, offset)
        if length > XATTR_BYTES_MAX or (blocks and blocks != -(-length // VALUE_BYTES)):
            raise CorruptionError("an extended attribute makes no sense")
        size = XATTR_ENTRY.size + name_bytes + (8 * blocks if blocks else length)
    else:
        size = NAME_ENTRY.size + NAME_ENTRY.unpack_from(data, offset)[3]
    entry = data[offset : offset + size]
    if len(entry) != size:
        raise CorruptionError("an entry is cut short")
    tree = decode_tree_untrusted(kind, level, 1, entry)
    return tree.keys[0], tree.values[0]


def salvage_inode(fs: int, number: int, block: bytes) -> tuple[InodeNode, bool]:
    """An inode, and whether all of its content could be read. Its roots are `Salvaged`. Raises
    CorruptionError if the block is no inode at all."""
    header = open_block_untrusted(fs, number, block)
    if header.kind != Kind.INODE or header.owner != number:
        raise CorruptionError(f"block {number} holds no inode")
    node = InodeNode(number, header.generation, header.change)
    (
        node.mode, node.nlink, node.uid, node.gid, node.rdev, node.flags, node.size, node.blocks,
        node.atime_ns, node.mtime_ns, node.ctime_ns, node.birth_ns, node.parent, node.counter,
        is_tree, level, count, content_bytes, xattr_bytes,
    ) = INODE.unpack_from(block, HEADER_BYTES)  # fmt: skip
    whole = content_bytes <= CONTENT_BYTES_MAX and xattr_bytes <= XATTR_ROOM_BYTES
    content_bytes = min(content_bytes, CONTENT_BYTES_MAX)
    end = CONTENT_OFFSET + content_bytes
    if is_tree:
        node.root = salvage_tree(node.tree_kind, level, count, block[CONTENT_OFFSET:end])
    else:
        node.data = block[CONTENT_OFFSET:end]
    if xattr_bytes:
        data = block[end : end + min(xattr_bytes, XATTR_ROOM_BYTES)]
        node.xattrs = Salvaged(0, [], [], cut=True)
        if len(data) >= XATTR_ROOT.size:
            level, count = XATTR_ROOT.unpack_from(data)
            node.xattrs = salvage_tree(Kind.XATTR_TREE, level, count, data[XATTR_ROOT.size :])
    return node, whole


def salvage_tree_block(header: Header, block: bytes) -> TreeNode:
    """A tree block whose header was checked."""
    level, count, _, _ = TREE.unpack_from(block, HEADER_BYTES)
    kind = Kind(header.kind)
    tree = salvage_tree(kind, level, count, block[TREE_OFFSET:])
    return TreeNode(header.block, header.owner, (header.generation, header.change), kind, tree)


def salvage_group(fs: int, number: int, group: int, length: int, block: bytes) -> GroupNode | None:
    """The map of a group; its counts are those of the map, whatever was written. None if the block
    is not this group's."""
    try:
        header = open_block_untrusted(fs, number, block)
    except CorruptionError:
        return None
    owner, generation, blocks, _, _ = GROUP.unpack_from(block, HEADER_BYTES)
    if (header.kind, header.owner, owner) != (Kind.GROUP, group, group) or blocks > length:
        return None
    states = unpack_map(block[GROUP_MAP_OFFSET:], blocks)
    return GroupNode(number, group, header.change, generation, states)


def is_name(value: Value) -> TypeGuard[Name]:
    return isinstance(value, tuple) and not isinstance(value, Extent)
