"""Does a block that is whole make sense? The second half of verifying what was read.

A checksum shows that a block is as it was written, not that what was written is right: damage that
went through memory, a fault of ours, or somebody with a disk editor. What passes here cannot make a
mount crash, loop or touch blocks that are not the file's; `cfs.nodes` has parsed it already.
"""

from __future__ import annotations

import itertools
import stat
from collections.abc import Iterable

from cfs.attributes import FILE_BYTES_MAX, SYMLINK_BYTES_MAX
from cfs.errors import CorruptionError
from cfs.format import COOKIE_FIRST, FIRST_GROUP_BLOCK, Superblock
from cfs.journal_format import JOURNAL_BLOCKS_MIN
from cfs.nodes import (
    BlockState,
    Extent,
    GroupNode,
    InodeNode,
    Node,
    SlotsNode,
    Tree,
    TreeNode,
    Xattr,
)

COUNTER_MAX = 1 << 62
"""No honest counter or time stamp comes near: what is higher would overflow in a later change."""
FILE_BLOCKS_MAX = FILE_BYTES_MAX // 4096
COOKIE_END = 1 << 63
INO_END = 1 << 48
TYPES = frozenset(
    kind >> 12
    for kind in (
        stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
        stat.S_IFBLK,
    )
)  # fmt: skip


def check_node_untrusted(node: Node, superblock: Superblock) -> None:
    """Raises CorruptionError, naming block and fault, if a parsed node makes no sense in this file
    system. A file system that has grown needs its new superblock first."""
    if node.generation >= COUNTER_MAX or node.change >= COUNTER_MAX:
        raise CorruptionError(f"block {node.block} has an impossible version")
    fault = ""
    if isinstance(node, InodeNode):
        fault = _inode_fault(node, superblock)
    elif isinstance(node, TreeNode):
        fault = "an empty tree block" if not node.tree.keys else tree_fault(node.tree, superblock)
    elif isinstance(node, GroupNode):
        fault = _group_fault(node, superblock)
    elif isinstance(node, SlotsNode):
        fault = slots_fault(node.journals, superblock)
    if fault:
        raise CorruptionError(f"block {node.block} makes no sense: {fault}")


def _inode_fault(node: InodeNode, superblock: Superblock) -> str:
    mode = node.mode
    if not mode:
        return ""
    if mode >> 12 not in TYPES:
        return "an unknown type of inode"
    if node.size > FILE_BYTES_MAX or node.blocks > superblock.total_blocks * 2:
        return "the size of an inode"
    if node.counter >= COUNTER_MAX:
        return "the change counter of an inode"
    times = (node.atime_ns, node.mtime_ns, node.ctime_ns, node.birth_ns)
    if not all(-COUNTER_MAX < each < COUNTER_MAX for each in times):
        return "the times of an inode"
    root = node.root
    if node.is_directory:
        if root is None:
            return "a directory without names"
        if not 0 < node.parent < INO_END:
            return "the parent of a directory"
    elif root is not None and not node.is_regular:
        return "an inode of this type has no extents"
    elif root is None and len(node.data) > node.size:
        return "more bytes than the size of the file"
    elif stat.S_ISLNK(mode) and not 0 < len(node.data) == node.size <= SYMLINK_BYTES_MAX:
        return "the length of a symbolic link"
    for tree in (root, node.xattrs):
        fault = "" if tree is None else tree_fault(tree, superblock)
        if fault:
            return fault
    return ""


def tree_fault(tree: Tree, superblock: Superblock) -> str:
    """What is wrong with the entries of a node; "" if nothing."""
    if any(a >= b for a, b in itertools.pairwise(tree.keys)):
        return "keys out of order"
    if not tree.keys:
        return "an index without children" if tree.level else ""
    first = tree.values[0]
    if isinstance(first, int):
        return _blocks_fault([child for child in tree.values if isinstance(child, int)], superblock)
    if isinstance(first, Xattr):
        return _xattrs_fault(tree, superblock)
    if isinstance(first, Extent):
        return _extents_fault(tree, superblock)
    return _names_fault(tree)


def _blocks_fault(blocks: Iterable[int], superblock: Superblock) -> str:
    for block in blocks:
        if not FIRST_GROUP_BLOCK < block < superblock.total_blocks:
            return f"it points to block {block}"
    return ""


def _xattrs_fault(tree: Tree, superblock: Superblock) -> str:
    for value in tree.values:
        assert isinstance(value, Xattr)
        fault = _blocks_fault(value.blocks, superblock)
        if fault:
            return fault
        if b"\0" in value.name:
            return f"the impossible attribute name {value.name!r}"
    return ""


def _extents_fault(tree: Tree, superblock: Superblock) -> str:
    total, length = superblock.total_blocks, superblock.group_blocks
    end = 0
    for logical, value in zip(tree.keys, tree.values, strict=True):
        assert isinstance(value, Extent)
        physical, count = value.block, value.length
        if logical < end:
            return "extents that overlap"
        end = logical + count
        if not count or end > FILE_BLOCKS_MAX:
            return "an extent of impossible length"
        last = physical + count - 1
        inside = physical > FIRST_GROUP_BLOCK and last < total
        if not inside or physical // length != last // length:
            return f"an extent at blocks {physical}+{count}"
    return ""


def _names_fault(tree: Tree) -> str:
    if tree.keys[0] < COOKIE_FIRST or tree.keys[-1] >= COOKIE_END:
        return "an impossible cookie"
    for value in tree.values:
        assert isinstance(value, tuple)
        assert not isinstance(value, Extent)
        fault = name_fault(value[2])
        if fault:
            return fault
        if not 0 < value[0] < INO_END or value[1] not in TYPES:
            return f"what the name {value[2]!r} points to"
    return ""


def name_fault(name: bytes) -> str:
    """What is wrong with a name (of 1 to 255 bytes)."""
    if b"/" in name or b"\0" in name or name in (b".", b".."):
        return f"the impossible name {name!r}"
    return ""


def _group_fault(node: GroupNode, superblock: Superblock) -> str:
    if node.owner >= superblock.group_count or superblock.group_block(node.owner) != node.block:
        return "a group that does not exist"
    if len(node.states) > superblock.group_length(node.owner):
        return "the map of a group is too long"
    own = node.block % superblock.group_blocks
    if own >= len(node.states) or node.states[own] != BlockState.META:
        return "the map of a group says that its own block is free"
    if node.last_generation >= COUNTER_MAX:
        return "the generation of a group"
    return ""


def slots_fault(journals: list[tuple[int, int]], superblock: Superblock) -> str:
    """What is wrong with a slot table; "" if nothing."""
    size = superblock.group_blocks
    end = FIRST_GROUP_BLOCK + 1
    for first, length in sorted(journals):
        if first < end or not first % size or length < JOURNAL_BLOCKS_MIN:
            return f"a journal at blocks {first}+{length}"
        end = first + length
        if end > superblock.total_blocks or first // size != (end - 1) // size:
            return f"a journal at blocks {first}+{length}"
    return "" if journals else "no journals"
