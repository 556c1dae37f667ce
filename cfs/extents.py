"""Which blocks hold a file's bytes.

The range of a file is made of holes, of *written* extents, and of *unwritten* ones, whose blocks
belong to the file but read as zeroes. A write turns the part that it covers into written; the
transaction that says so becomes durable after the data (`DirtyPages.seal`), so that what is called
written has been written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from cfs import tree
from cfs.errors import CorruptionError
from cfs.nodes import Extent, InodeNode
from cfs.transaction import Reader

if TYPE_CHECKING:
    from cfs.cache import Covered

Piece = tuple[int, int, int, bool]
"""First logical block, first physical block (0: a hole), count, unwritten."""
Mapped = tuple[int, Extent]
"""First logical block and what is there."""


def from_block(reader: Reader, covered: Covered, inode: InodeNode, first: int) -> Iterator[Mapped]:
    """The extents that end beyond `first`, in order."""
    before = tree.floor(reader, covered, inode, first)
    start = first if before is None else before[0]
    for logical, value in tree.items(reader, covered, inode, start):
        assert isinstance(value, Extent)
        if logical + value.length > first:
            yield logical, value


def pieces(
    reader: Reader, covered: Covered, inode: InodeNode, first: int, count: int
) -> list[Piece]:
    """The range [first, first + count) as extents and holes, in order, without gaps."""
    end = first + count
    if inode.root is None:
        return [(first, 0, count, False)]
    result: list[Piece] = []
    at = first
    for logical, (block, length, unwritten) in from_block(reader, covered, inode, first):
        if logical >= end:
            break
        if logical > at:
            result.append((at, 0, logical - at, False))
            at = logical
        skip = at - logical
        size = min(length - skip, end - at)
        result.append((at, block + skip, size, unwritten))
        at += size
        if at >= end:
            return result
    if at < end:
        result.append((at, 0, end - at, False))
    return result


def boundary(
    reader: Reader,
    covered: Covered,
    inode: InodeNode,
    first: int,
    *,
    unwritten_is_data: bool,
    limit: int,
) -> tuple[bool, int]:
    """Whether block `first` holds data, and the first block after it of which the opposite may be
    true (a hole may go on to the end of the file: then that is `1 << 63`). Looks at no more than
    `limit` extents, so the caller has to ask again at the block that it got."""
    at = first
    data: bool | None = None
    for logical, (_, length, unwritten) in from_block(reader, covered, inode, first):
        if logical > at:
            if data:
                return True, at
            data = False
        is_data = unwritten_is_data or not unwritten
        if data is not None and data != is_data:
            return data, logical
        data = is_data
        at = logical + length
        limit -= 1
        if not limit:
            return data, at
    return (True, at) if data else (False, 1 << 63)


def goal_for(reader: Reader, covered: Covered, inode: InodeNode, logical: int) -> int:
    """Where a block should be so that it continues its neighbour's extent; 0: anywhere."""
    if inode.root is None:
        return 0
    before = tree.floor(reader, covered, inode, logical)
    if before is None:
        return 0
    start, value = before
    assert isinstance(value, Extent)
    return value.block + (logical - start)


def insert(editor: tree.TreeEditor, logical: int, extent: Extent) -> None:
    """Fill a hole, joined with the neighbours that it continues."""
    reader, covered, inode = editor.tx, editor.covered, editor.inode
    block, count, unwritten = extent
    after = tree.find(reader, covered, inode, logical + count)
    if after is not None and _continues(extent, after):
        assert isinstance(after, Extent)
        editor.remove(logical + count)
        count += after.length
    before = tree.floor(reader, covered, inode, logical)
    if before is not None:
        start, value = before
        assert isinstance(value, Extent)
        if start + value.length > logical:
            raise CorruptionError(f"extents of inode {inode.block} overlap", block=inode.block)
        if start + value.length == logical and _continues(value, extent):
            editor.replace(start, Extent(value.block, value.length + count, unwritten))
            return
    editor.insert(logical, Extent(block, count, unwritten))


def _continues(extent: Extent, other: object) -> bool:
    return (
        isinstance(other, Extent)
        and other.block == extent.block + extent.length
        and other.unwritten == extent.unwritten
    )


def _join(editor: tree.TreeEditor, logical: int, extent: Extent) -> None:
    """The extent at `logical` may continue its neighbours now."""
    reader, covered, inode = editor.tx, editor.covered, editor.inode
    after = tree.find(reader, covered, inode, logical + extent.length)
    if after is not None and _continues(extent, after):
        assert isinstance(after, Extent)
        editor.remove(logical + extent.length)
        extent = extent._replace(length=extent.length + after.length)
        editor.replace(logical, extent)
    before = tree.floor(reader, covered, inode, logical - 1) if logical else None
    if before is not None:
        start, value = before
        assert isinstance(value, Extent)
        if start + value.length == logical and _continues(value, extent):
            editor.remove(logical)
            editor.replace(start, value._replace(length=value.length + extent.length))


def overlapping(
    reader: Reader, covered: Covered, inode: InodeNode, first: int, end: int, limit: int
) -> list[Mapped]:
    """The first `limit` extents that have blocks in [first, end), whole."""
    result: list[Mapped] = []
    for logical, extent in from_block(reader, covered, inode, first):
        if logical >= end or len(result) == limit:
            break
        result.append((logical, extent))
    return result


def convert(editor: tree.TreeEditor, mapped: Mapped, first: int, end: int) -> Extent:
    """Turn the part in [first, end) of an extent from unwritten to written or back; that part. An
    extent that is turned as a whole needs no space; one that is split may need a tree block."""
    logical, extent = mapped
    low, high = max(first, logical), min(end, logical + extent.length)
    part = Extent(extent.block + low - logical, high - low, not extent.unwritten)
    _keep_right(editor, mapped, high)
    if low > logical:
        editor.replace(logical, extent._replace(length=low - logical))
        insert(editor, low, part)
    else:
        editor.replace(logical, part)
        _join(editor, logical, part)
    return part


def take_away(editor: tree.TreeEditor, mapped: Mapped, first: int, end: int) -> Extent:
    """Make a hole of the part in [first, end) of an extent; that part. Only a hole in the middle of
    an extent may need space, for a tree block."""
    logical, extent = mapped
    low, high = max(first, logical), min(end, logical + extent.length)
    _keep_right(editor, mapped, high)
    if low > logical:
        editor.replace(logical, extent._replace(length=low - logical))
    else:
        editor.remove(logical)
    return extent._replace(block=extent.block + low - logical, length=high - low)


def _keep_right(editor: tree.TreeEditor, mapped: Mapped, high: int) -> None:
    """What lies beyond `high` becomes an extent of its own; its old place is changed next."""
    logical, extent = mapped
    skip = high - logical
    if skip < extent.length:
        rest = Extent(extent.block + skip, extent.length - skip, extent.unwritten)
        editor.insert(high, rest)


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
        assert isinstance(value, Extent)
        if start + value.length <= first:
            return freed, True
        keep = max(first - start, 0)
        if keep:
            editor.replace(start, value._replace(length=keep))
        else:
            editor.remove(start)
        free(value.block + keep, value.length - keep)
        freed += value.length - keep
    found = tree.last(editor.tx, editor.covered, editor.inode)
    if found is None:
        return freed, True
    start, value = found
    assert isinstance(value, Extent)
    return freed, start + value.length <= first
