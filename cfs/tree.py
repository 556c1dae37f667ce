"""B+trees of names and extents.

The root is in the inode, the other nodes in blocks of their own. In an index, the key of a child is
a lower bound of the keys in it, except for the first child, which takes everything below the key of
the second one. Leaves never stand empty (except a leaf that is the root); nodes that are not full
are not merged. An append splits unevenly, so that a growing file leaves full leaves behind.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from cfs.errors import CorruptionError
from cfs.format import Kind
from cfs.nodes import TREE_BYTES_MAX, Tree, TreeNode, Value, value_bytes
from cfs.transaction import Reader, Tx

if TYPE_CHECKING:
    from cfs.cache import Covered


class Rooted(Protocol):
    """What a tree hangs on: an inode with its names or extents, or its extended attributes."""

    @property
    def block(self) -> int: ...

    @property
    def root(self) -> Tree | None: ...

    @property
    def tree_kind(self) -> Kind: ...

    @property
    def root_bytes_max(self) -> int: ...


class TreeSpace:
    """Where a tree gets its blocks: bound to one transaction and one inode by the allocator."""

    __slots__ = ("allocate", "free")

    def __init__(
        self, allocate: Callable[[], tuple[int, int]], free: Callable[[int], None]
    ) -> None:
        self.allocate = allocate
        self.free = free


def find(reader: Reader, covered: Covered, inode: Rooted, key: int) -> Value | None:
    """The value of exactly `key`."""
    tree = _leaf(reader, covered, inode, key)
    position = bisect_left(tree.keys, key)
    if position < len(tree.keys) and tree.keys[position] == key:
        return tree.values[position]
    return None


def _leaf(reader: Reader, covered: Covered, inode: Rooted, key: int) -> Tree:
    tree = inode.root
    assert tree is not None
    while tree.level:
        tree = _child(reader, covered, inode, tree, _position(tree, key))
    return tree


def _position(tree: Tree, key: int) -> int:
    return max(bisect_right(tree.keys, key) - 1, 0)


def _child(reader: Reader, covered: Covered, inode: Rooted, tree: Tree, position: int) -> Tree:
    block = tree.values[position]
    assert isinstance(block, int)
    child = reader.tree(covered, block, inode.tree_kind).tree
    if child.level != tree.level - 1 or not child.keys:
        raise CorruptionError(
            f"block {block} stands at a wrong level of inode {inode.block}", block=block
        )
    above, keys = tree.keys, child.keys
    if (position and keys[0] < above[position]) or (
        position + 1 < len(above) and keys[-1] >= above[position + 1]
    ):
        raise CorruptionError(
            f"block {block} of inode {inode.block} holds keys of another place", block=block
        )
    return child


def floor(reader: Reader, covered: Covered, inode: Rooted, key: int) -> tuple[int, Value] | None:
    """The entry with the greatest key that is not above `key`."""
    assert inode.root is not None
    return _floor(reader, covered, inode, inode.root, key)


def _floor(
    reader: Reader, covered: Covered, inode: Rooted, tree: Tree, key: int
) -> tuple[int, Value] | None:
    position = bisect_right(tree.keys, key) - 1
    if not tree.level:
        return None if position < 0 else (tree.keys[position], tree.values[position])
    position = max(position, 0)
    while position >= 0 and tree.keys:
        child = _child(reader, covered, inode, tree, position)
        found = _floor(reader, covered, inode, child, key)
        if found is not None:
            return found
        position -= 1
    return None


def items(
    reader: Reader, covered: Covered, inode: Rooted, key: int = 0
) -> Iterator[tuple[int, Value]]:
    """Entries with keys not below `key`, in order."""
    assert inode.root is not None
    yield from _items(reader, covered, inode, inode.root, key)


def _items(
    reader: Reader, covered: Covered, inode: Rooted, tree: Tree, key: int
) -> Iterator[tuple[int, Value]]:
    if not tree.level:
        start = bisect_left(tree.keys, key)
        yield from zip(tree.keys[start:], tree.values[start:], strict=True)
        return
    for position in range(_position(tree, key), len(tree.keys)):
        child = _child(reader, covered, inode, tree, position)
        yield from _items(reader, covered, inode, child, key)


def last(reader: Reader, covered: Covered, inode: Rooted) -> tuple[int, Value] | None:
    """The entry with the greatest key."""
    tree = inode.root
    assert tree is not None
    while tree.level:
        tree = _child(reader, covered, inode, tree, len(tree.keys) - 1)
    return (tree.keys[-1], tree.values[-1]) if tree.keys else None


class _Step:
    """One node on the way down: the block (None: the root) and the position of the child taken."""

    __slots__ = ("block", "position")

    def __init__(self, block: int | None, position: int) -> None:
        self.block = block
        self.position = position


class TreeEditor:
    """Changes one tree within one transaction. `inode` is the transaction's own clone."""

    def __init__(self, tx: Tx, covered: Covered, inode: Rooted, space: TreeSpace) -> None:
        self.tx = tx
        self.covered = covered
        self.inode = inode
        self.space = space
        self.kind: Kind = inode.tree_kind

    def _edit(self, block: int | None) -> Tree:
        if block is None:
            assert self.inode.root is not None
            return self.inode.root
        return self.tx.edit_tree(self.covered, block, self.kind).tree

    def _path(self, key: int) -> list[_Step]:
        """The way to the leaf of `key`; the last step is the leaf."""
        tree = self.inode.root
        assert tree is not None
        block: int | None = None
        path = []
        while tree.level:
            position = _position(tree, key)
            path.append(_Step(block, position))
            child = tree.values[position]
            assert isinstance(child, int)
            tree = _child(self.tx, self.covered, self.inode, tree, position)
            block = child
        path.append(_Step(block, 0))
        return path

    def insert(self, key: int, value: Value) -> None:
        """`key` must not be there."""
        path = self._path(key)
        tree = self._edit(path[-1].block)
        position = bisect_left(tree.keys, key)
        assert position == len(tree.keys) or tree.keys[position] != key
        tree.keys.insert(position, key)
        tree.values.insert(position, value)
        tree.used += value_bytes(value)
        self._split(path)

    def replace(self, key: int, value: Value) -> None:
        """`key` must be there."""
        path = self._path(key)
        tree = self._edit(path[-1].block)
        position = bisect_left(tree.keys, key)
        assert tree.keys[position] == key
        tree.used += value_bytes(value) - value_bytes(tree.values[position])
        tree.values[position] = value
        self._split(path)

    def _split(self, path: list[_Step]) -> None:
        """Make nodes on the path fit again, from the leaf up."""
        for depth in range(len(path) - 1, -1, -1):
            step = path[depth]
            tree = self._edit(step.block)
            limit = self.inode.root_bytes_max if step.block is None else TREE_BYTES_MAX
            if tree.used <= limit:
                return
            if step.block is None:
                self._grow(tree)
                return
            right = self._cut_off(tree)
            block = self._store(right)
            parent = self._edit(path[depth - 1].block)
            position = path[depth - 1].position + 1
            if position == 1:
                # The first child may have got keys below its own: those of the index must rise.
                parent.keys[0] = min(parent.keys[0], tree.keys[0])
            parent.keys.insert(position, right.keys[0])
            parent.values.insert(position, block)
            parent.used += value_bytes(block)

    def _cut_off(self, tree: Tree) -> Tree:
        """Take the right part of a full node away: the last entry alone if it was an append."""
        half = tree.used // 2
        cut = len(tree.keys)
        moved = 0
        if self.kind == Kind.EXTENT_TREE:
            cut -= max(1, len(tree.keys) // 16)
            moved = sum(value_bytes(value) for value in tree.values[cut:])
        else:
            while moved < half and cut > 1:
                cut -= 1
                moved += value_bytes(tree.values[cut])
        right = Tree(tree.level, tree.keys[cut:], tree.values[cut:], moved)
        del tree.keys[cut:]
        del tree.values[cut:]
        tree.used -= moved
        return right

    def _store(self, tree: Tree) -> int:
        block, generation = self.space.allocate()
        node = TreeNode(block, self.inode.block, (generation, 0), self.kind, tree)
        self.tx.add(self.covered, node)
        return block

    def _grow(self, root: Tree) -> None:
        """The root overflows: its entries move to two new blocks, to one if that is half empty."""
        parts = [root]
        if root.used > TREE_BYTES_MAX // 2:
            parts.append(self._cut_off(root))
        parts[0] = Tree(root.level, root.keys, root.values, root.used)
        keys = [part.keys[0] for part in parts]
        blocks = [self._store(part) for part in parts]
        root.level += 1
        root.keys = keys
        root.values = [*blocks]
        root.used = sum(value_bytes(block) for block in blocks)

    def remove(self, key: int) -> None:
        """`key` must be there."""
        path = self._path(key)
        tree = self._edit(path[-1].block)
        position = bisect_left(tree.keys, key)
        assert tree.keys[position] == key
        tree.used -= value_bytes(tree.values[position])
        del tree.keys[position]
        del tree.values[position]
        for depth in range(len(path) - 1, 0, -1):
            block = path[depth].block
            assert block is not None
            if self._edit(block).keys:
                break
            parent = self._edit(path[depth - 1].block)
            position = path[depth - 1].position
            parent.used -= value_bytes(block)
            del parent.keys[position]
            del parent.values[position]
            self.tx.drop(self.covered, block)
            self.space.free(block)
        self._shrink()

    def _shrink(self) -> None:
        """Lower the tree while the root has one child that fits into it (or none)."""
        root = self.inode.root
        assert root is not None
        while root.level and len(root.keys) <= 1:
            if not root.keys:
                root.level = 0
                root.used = 0
                return
            block = root.values[0]
            assert isinstance(block, int)
            child = _child(self.tx, self.covered, self.inode, root, 0)
            if child.used > self.inode.root_bytes_max:
                return
            root.level, root.used = child.level, child.used
            root.keys, root.values = child.keys.copy(), child.values.copy()
            self.tx.drop(self.covered, block)
            self.space.free(block)
