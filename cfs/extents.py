"""Which blocks hold a file's bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cfs import tree
from cfs.errors import CorruptionError
from cfs.nodes import InodeNode
from cfs.transaction import Reader

if TYPE_CHECKING:
    from cfs.cache import Covered

EXTENT_BLOCKS_MAX = 0xFFFF_FFFF
Piece = tuple[int, int, int]
"""First logical block, first physical block (0: a hole), count."""


def pieces(
    reader: Reader, covered: Covered, inode: InodeNode, first: int, count: int
) -> list[Piece]:
    """The range [first, first + count) as extents and holes, in order, without gaps."""
    end = first + count
    if inode.root is None:
        return [(first, 0, count)]
    result: list[Piece] = []
    at = first
    before = tree.floor(reader, covered, inode, first)
    start = first if before is None else before[0]
    for logical, value in tree.items(reader, covered, inode, start):
        if logical >= end:
            break
        assert isinstance(value, tuple)
        physical, length = value[0], value[1]
        skip = max(at - logical, 0)
        if skip >= length:
            continue
        if logical > at:
            result.append((at, 0, logical - at))
            at = logical
        size = min(length - skip, end - at)
        result.append((at, physical + skip, size))
        at += size
        if at >= end:
            return result
    if at < end:
        result.append((at, 0, end - at))
    return result


def goal_for(reader: Reader, covered: Covered, inode: InodeNode, logical: int) -> int:
    """Where a block should be so that it continues its neighbour's extent; 0: anywhere."""
    if inode.root is None:
        return 0
    before = tree.floor(reader, covered, inode, logical)
    if before is None:
        return 0
    start, value = before
    assert isinstance(value, tuple)
    return value[0] + (logical - start)


def insert(editor: tree.TreeEditor, logical: int, physical: int, count: int) -> None:
    """Fill a hole, joined with the neighbours that it continues."""
    reader, covered, inode = editor.tx, editor.covered, editor.inode
    after = tree.find(reader, covered, inode, logical + count)
    if isinstance(after, tuple) and after[0] == physical + count:
        editor.remove(logical + count)
        count += after[1]
    before = tree.floor(reader, covered, inode, logical)
    if before is not None:
        start, value = before
        assert isinstance(value, tuple)
        assert len(value) == 2
        length = value[1]
        if start + length > logical:
            raise CorruptionError(f"extents of inode {inode.block} overlap", block=inode.block)
        if start + length == logical and value[0] + length == physical:
            editor.replace(start, (value[0], length + count))
            return
    editor.insert(logical, (physical, count))


def cut(
    editor: tree.TreeEditor, first: int, limit: int, free: Callable[[int, int], None]
) -> tuple[int, bool]:
    """Take away what lies at or beyond `first`, from the end, at most `limit` extents.

    Returns (data blocks freed, all done). A caller that is not done comes again in another
    transaction: the file is consistent in between, only longer than it should be.
    """
    freed = 0
    for _ in range(limit):
        found = tree.last(editor.tx, editor.covered, editor.inode)
        if found is None:
            return freed, True
        start, value = found
        assert isinstance(value, tuple)
        assert len(value) == 2
        physical, count = value
        if start + count <= first:
            return freed, True
        keep = max(first - start, 0)
        if keep:
            editor.replace(start, (physical, keep))
        else:
            editor.remove(start)
        free(physical + keep, count - keep)
        freed += count - keep
    found = tree.last(editor.tx, editor.covered, editor.inode)
    if found is None:
        return freed, True
    start, value = found
    assert isinstance(value, tuple)
    assert len(value) == 2
    return freed, start + value[1] <= first
