"""Trees of inodes under check: walked for what can be read, written anew where that is needed."""

from __future__ import annotations

from dataclasses import dataclass, field

from cfs.errors import CorruptionError
from cfs.format import Kind, open_block_untrusted
from cfs.fsck.salvage import Salvaged, salvage_tree_block
from cfs.fsck.volume import Step, Volume
from cfs.nodes import (
    INDEX_ENTRY,
    TREE_BYTES_MAX,
    BlockState,
    Tree,
    TreeNode,
    Value,
    value_bytes,
)

KEY_END = 1 << 64
PACKED_BYTES = TREE_BYTES_MAX * 7 // 8
"""New nodes are not filled to the last byte."""
Entry = tuple[int, Value]


@dataclass
class Leaf:
    """A leaf as it was read; `node` None: it is the root."""

    node: TreeNode | None
    keys: list[int]
    values: list[Value]
    changed: bool = False

    @property
    def used(self) -> int:
        return sum(value_bytes(value) for value in self.values)


@dataclass
class Walked:
    """What a tree holds. `faults`: (text, whether something is lost)."""

    leaves: list[Leaf] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    faults: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def entries(self) -> list[Entry]:
        return [entry for leaf in self.leaves for entry in zip(leaf.keys, leaf.values, strict=True)]


Reach = tuple[Tree, TreeNode | None, int, int]
"""A node, its block, and the keys that belong into it: from, to before."""


class TreeWalker:
    """Walks one tree, level by level."""

    def __init__(self, volume: Volume, ino: int, kind: Kind, what: str) -> None:
        self.volume = volume
        self.ino = ino
        self.kind = kind
        self.what = what
        self.found = Walked()
        self._seen: set[int] = set()

    async def walk(self, root: Tree, *, claim: bool) -> Walked:
        """All leaves in the order of the index. `claim`: enter the blocks as in use."""
        level: list[Reach] = [(root, None, 0, KEY_END)]
        self._judge(root, f"the root of {self.what}", 0, KEY_END)
        while level and level[0][0].level:
            level = await self._below(level, claim=claim)
        for tree, node, _, _ in level:
            cut = isinstance(tree, Salvaged) and tree.cut
            self.found.leaves.append(Leaf(node, tree.keys, tree.values, changed=cut))
        return self.found

    def _fault(self, text: str, *, lossy: bool) -> None:
        self.found.faults.append((text, lossy))

    def _judge(self, tree: Tree, name: str, low: int, high: int) -> None:
        if isinstance(tree, Salvaged) and tree.cut:
            self._fault(f"{name} cannot be read to its end", lossy=True)
        if any(a >= b for a, b in zip(tree.keys, tree.keys[1:], strict=False)):
            self._fault(f"{name} has its keys out of order", lossy=False)
        elif tree.keys and not (low <= tree.keys[0] and tree.keys[-1] < high):
            self._fault(f"{name} has keys that belong elsewhere", lossy=False)
        if tree.level and not tree.keys:
            self._fault(f"{name} is an index without children", lossy=True)

    async def _below(self, level: list[Reach], *, claim: bool) -> list[Reach]:
        children: list[tuple[int, int, int]] = []
        for tree, _, low, high in level:
            keys = tree.keys
            for position, child in enumerate(tree.values):
                assert isinstance(child, int)
                lowest = keys[position] if position else low
                highest = keys[position + 1] if position + 1 < len(keys) else high
                children.append((child, lowest, highest))
        expected = level[0][0].level - 1
        data = await self.volume.read_blocks(
            block for block, _, _ in children if self.volume.exists(block)
        )
        result: list[Reach] = []
        for block, low, high in children:
            node = self._open(block, data.get(block), expected)
            if node is None:
                continue
            self._judge(node.tree, f"block {block} of {self.what}", low, high)
            self._seen.add(block)
            self.found.blocks.append(block)
            self.volume.saw(block, node.generation)
            if claim:
                self.volume.claims.claim(block, 1, BlockState.META)
            result.append((node.tree, node, low, high))
        return result

    def _open(self, block: int, data: bytes | None, level: int) -> TreeNode | None:
        """The node in a block, if it is one of this tree at this level."""
        name = f"block {block} of {self.what}"
        if data is None:
            self._fault(f"{name} does not exist", lossy=True)
            return None
        if block in self._seen:
            self._fault(f"{name} is referred to twice", lossy=False)
            return None
        try:
            header = open_block_untrusted(self.volume.fs, block, data)
        except CorruptionError as error:
            self._fault(f"{self.what}: {error}", lossy=True)
            return None
        if header.kind != self.kind or header.owner != self.ino:
            self._fault(f"{name} holds something else", lossy=True)
            return None
        node = salvage_tree_block(header, data)
        if node.tree.level != level or not node.tree.keys:
            self._fault(f"{name} is empty or at a wrong level", lossy=True)
            return None
        return node


class TreeWriter:
    """Writes a tree from its leaves: those that are in order stay where they are."""

    def __init__(self, volume: Volume, ino: int, kind: Kind, root_bytes_max: int) -> None:
        self.volume = volume
        self.ino = ino
        self.kind = kind
        self.root_bytes_max = root_bytes_max
        self.kept: set[int] = set()
        """Blocks of the new tree."""

    def write(self, leaves: list[Leaf]) -> Tree:
        """The new root. Blocks of the old tree that are not in `kept` are free afterwards. Raises
        NoRoomError."""
        leaves = [leaf for leaf in leaves if leaf.keys]
        if sum(leaf.used for leaf in leaves) <= self.root_bytes_max:
            return self._root(0, _merged(leaves))
        if not _can_stay(leaves):
            leaves = [Leaf(None, *part) for part in _packed(_merged(leaves), PACKED_BYTES)]
        children: list[Entry] = [(leaf.keys[0], self._leaf(leaf)) for leaf in leaves]
        level = 1
        while len(children) * INDEX_ENTRY.size > self.root_bytes_max:
            upper: list[Entry] = []
            for keys, values in _packed(children, PACKED_BYTES):
                upper.append((keys[0], self._store(level, keys, values)))
            children = upper
            level += 1
        return self._root(level, children)

    @staticmethod
    def _root(level: int, entries: list[Entry]) -> Tree:
        keys = [key for key, _ in entries]
        values = [value for _, value in entries]
        return Tree(level, keys, values, sum(value_bytes(value) for value in values))

    def _leaf(self, leaf: Leaf) -> int:
        """Where a leaf is; in its place if it has one."""
        node = leaf.node
        if node is None:
            return self._store(0, leaf.keys, leaf.values)
        self.kept.add(node.block)
        if leaf.changed:
            node.tree = Tree(0, leaf.keys, leaf.values, leaf.used)
            self.volume.put(node, Step.PLACE)
        return node.block

    def _store(self, level: int, keys: list[int], values: list[Value]) -> int:
        block, generation = self.volume.allocate(BlockState.META)
        used = sum(value_bytes(value) for value in values)
        tree = Tree(level, keys, values, used)
        self.volume.put(TreeNode(block, self.ino, (generation, 0), self.kind, tree), Step.FRESH)
        self.kept.add(block)
        return block


def _can_stay(leaves: list[Leaf]) -> bool:
    """The leaves are in blocks of their own, fit them, and follow one another."""
    end = -1
    for leaf in leaves:
        if leaf.node is None or leaf.used > TREE_BYTES_MAX:
            return False
        for key in leaf.keys:
            if key <= end:
                return False
            end = key
    return True


def _merged(leaves: list[Leaf]) -> list[Entry]:
    """All entries in order; of two with one key the first that was met stays."""
    entries: dict[int, Value] = {}
    for leaf in leaves:
        for key, value in zip(leaf.keys, leaf.values, strict=True):
            entries.setdefault(key, value)
    return sorted(entries.items(), key=lambda entry: entry[0])


def _packed(entries: list[Entry], limit: int) -> list[tuple[list[int], list[Value]]]:
    """Entries in groups that fit into nodes."""
    result: list[tuple[list[int], list[Value]]] = []
    used = limit
    for key, value in entries:
        size = value_bytes(value)
        if used + size > limit:
            result.append(([], []))
            used = 0
        result[-1][0].append(key)
        result[-1][1].append(value)
        used += size
    return result
