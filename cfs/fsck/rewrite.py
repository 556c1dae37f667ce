"""Writes the inodes that have `Fixes`, with the trees that hang on them.

By now all blocks in use are known, so new blocks can be taken. A leaf in which nothing is wrong
stays where it is; one that loses entries is written in its place; only what does not fit any more
is written into new blocks.
"""

from __future__ import annotations

from cfs.attributes import BLOCK_BYTES
from cfs.format import COOKIE_FIRST, HASH_SHIFT, Kind
from cfs.fsck.attributes import AttributeFilter
from cfs.fsck.inodes import ExtentFilter, Fixes, InodeWalk, Piece
from cfs.fsck.salvage import Salvaged, is_name, salvage_inode
from cfs.fsck.trees import Entry, Leaf, TreeWalker, TreeWriter, Walked
from cfs.fsck.volume import NoRoomError, Step, Volume
from cfs.nodes import (
    CONTENT_BYTES_MAX,
    XATTR_ROOT_BYTES_MAX,
    BlockState,
    Extent,
    InodeNode,
    Tree,
    Value,
)

COPY_BLOCKS_MAX = 256


class Rewriter:
    """Applies the fixes of all inodes."""

    def __init__(self, volume: Volume, walk: InodeWalk) -> None:
        self.volume = volume
        self.walk = walk

    async def run(self) -> None:
        inos = sorted(self.walk.fixes)
        for done, ino in enumerate(inos):
            if ino in self.walk.records:
                try:
                    await self._inode(ino, self.walk.fixes[ino])
                except NoRoomError:
                    self.volume.session.give_up(f"there is no room to repair inode {ino}")
            self.volume.session.show("repairing inodes", done, len(inos))

    async def _inode(self, ino: int, fixes: Fixes) -> None:
        node, _ = salvage_inode(self.volume.fs, ino, await self.volume.read(ino))
        if _would_lose(node, fixes):
            self.volume.session.give_up(f"inode {ino} cannot be written without a loss")
            return
        for name, value in fixes.values.items():
            setattr(node, name, value)
        if fixes.drop_content:
            node.data = b""
            node.root = Tree(0, [], [], 0) if node.is_directory else None
        unused: set[int] = set()
        blocks = 0
        if node.root is not None:
            rebuilt = _Rebuilt(self.volume, node, fixes, in_cut=ino in self.walk.orphans)
            node.root, blocks = await rebuilt.main_tree(node.root)
            unused |= rebuilt.unused
        if node.xattrs is not None:
            rebuilt = _Rebuilt(self.volume, node, fixes, in_cut=False)
            node.xattrs, more = await rebuilt.attributes(node.xattrs)
            blocks += more
            unused |= rebuilt.unused
        touched = fixes.rebuild or fixes.rebuild_xattrs or unused or fixes.new_names
        if touched or fixes.holes or fixes.clones or "blocks" in fixes.values:
            node.blocks = blocks
        self.volume.release(unused)
        self.volume.put(node, Step.PLACE)


def _would_lose(node: InodeNode, fixes: Fixes) -> bool:
    """The inode has a root that cannot be read to its end, and that may not be cut there."""
    main, xattrs = (isinstance(root, Salvaged) and root.cut for root in (node.root, node.xattrs))
    return (main and not fixes.rebuild) or (xattrs and not fixes.rebuild_xattrs)


class _Rebuilt:
    """The trees of one inode, as they shall be."""

    def __init__(self, volume: Volume, node: InodeNode, fixes: Fixes, *, in_cut: bool) -> None:
        self.volume = volume
        self.node = node
        self.fixes = fixes
        self.in_cut = in_cut
        self.unused: set[int] = set()

    async def _walked(self, kind: Kind, root: Tree) -> Walked:
        return await TreeWalker(self.volume, self.node.block, kind, "").walk(root, claim=False)

    def _write(
        self, kind: Kind, limit: int, walked: Walked, leaves: list[Leaf]
    ) -> tuple[Tree, int]:
        """The new root, and the number of its blocks."""
        writer = TreeWriter(self.volume, self.node.block, kind, limit)
        root = writer.write(leaves)
        self.unused |= set(walked.blocks) - writer.kept
        return root, len(writer.kept)

    async def main_tree(self, root: Tree) -> tuple[Tree, int]:
        """Names or extents: (root, blocks of tree and data)."""
        kind = self.node.tree_kind
        walked = await self._walked(kind, root)
        if self.node.is_directory:
            leaves = self._names(walked)
            if leaves is None:
                return root, len(walked.blocks)
            return self._write(kind, CONTENT_BYTES_MAX, walked, leaves)
        entries = walked.entries
        kept = await self._extents(entries) if self._touches_extents else entries
        data = sum(value.length for _, value in kept if isinstance(value, Extent))
        if not self._touches_extents:
            return root, len(walked.blocks) + data
        leaves = walked.leaves if kept == entries else [_leaf_of(kept)]
        new, blocks = self._write(kind, CONTENT_BYTES_MAX, walked, leaves)
        return new, blocks + data

    # -- names -----------------------------------------------------------------------------------

    def _names(self, walked: Walked) -> list[Leaf] | None:
        """Leaves with the right names; None if nothing is to be changed."""
        fixes = self.fixes
        if not (fixes.rebuild or fixes.drop_names or fixes.types or fixes.new_names):
            return None
        moved: list[tuple[bytes, int, int]] = list(fixes.new_names)
        for leaf in walked.leaves:
            keys: list[int] = []
            values: list[Value] = []
            for key, value in zip(leaf.keys, leaf.values, strict=True):
                if not is_name(value):
                    continue
                child, kind, name = value
                if (key, name) in fixes.drop_names:
                    continue
                right = fixes.types.get((key, name), kind)
                if fixes.rebuild and not self._fits(key, name):
                    moved.append((name, child, right))
                    continue
                keys.append(key)
                values.append((child, right, name))
            leaf.changed |= values != leaf.values or keys != leaf.keys
            leaf.keys, leaf.values = keys, values
        return [_leaf_of(self._with(walked.entries, moved))] if moved else walked.leaves

    def _fits(self, key: int, name: bytes) -> bool:
        return key >= COOKIE_FIRST and self.volume.cookie_fits(key, name)

    def _with(self, entries: list[Entry], moved: list[tuple[bytes, int, int]]) -> list[Entry]:
        """Entries and names that get new cookies."""
        result = dict(entries)
        present = {value[-1] for value in result.values() if isinstance(value, tuple)}
        for name, child, kind in moved:
            if name in present:
                continue
            cookie = max(self.volume.superblock.name_hash(name) << HASH_SHIFT, COOKIE_FIRST)
            while cookie in result:
                cookie += 1
            result[cookie] = (child, kind, name)
            present.add(name)
        return sorted(result.items(), key=lambda entry: entry[0])

    # -- extents ---------------------------------------------------------------------------------

    @property
    def _touches_extents(self) -> bool:
        return bool(self.fixes.rebuild or self.fixes.holes or self.fixes.clones)

    async def _extents(self, entries: list[Entry]) -> list[Entry]:
        """Extents that can be, inside the file, without what belongs to others."""
        result: list[Entry] = []
        end = -(-self.node.size // BLOCK_BYTES)
        for logical, extent in ExtentFilter(self.volume).keep(entries):
            inside = extent.length
            if not (extent.unwritten or self.in_cut):
                inside = min(max(end - logical, 0), inside)
            self.unused.update(range(extent.block + inside, extent.block + extent.length))
            result += await self._pieces(logical, extent._replace(length=inside))
        return result

    async def _pieces(self, logical: int, extent: Extent) -> list[Piece]:
        """One extent without its holes, with copies of what it shares."""
        holes, clones = self.fixes.holes, self.fixes.clones
        blocks = range(extent.block, extent.block + extent.length)
        if extent.length and holes.isdisjoint(blocks) and clones.isdisjoint(blocks):
            return [(logical, extent)]
        result: list[Piece] = []
        for step, block in enumerate(blocks):
            if block in holes:
                continue
            at = logical + step
            place = await self._copy(block) if block in clones else block
            if result and _continues(result[-1], at, place):
                start, last = result[-1]
                result[-1] = (start, last._replace(length=last.length + 1))
            else:
                result.append((at, Extent(place, 1, extent.unwritten)))
        return result

    async def _copy(self, block: int) -> int:
        """A copy of a block of data. Nothing refers to it yet, so it may go to the disk at once."""
        data = await self.volume.read(block)
        copy, _ = self.volume.allocate(BlockState.DATA)
        if self.volume.session.repairing:
            await self.volume.base.write(copy * BLOCK_BYTES, data)
        return copy

    # -- attributes ------------------------------------------------------------------------------

    async def attributes(self, root: Tree) -> tuple[Tree | None, int]:
        """(root, blocks of tree and values)."""
        walked = await self._walked(Kind.XATTR_TREE, root)
        chosen = AttributeFilter(self.volume, self.node)
        kept = await chosen.keep(walked)
        values = len(chosen.value_blocks)
        if not self.fixes.rebuild_xattrs:
            return root, len(walked.blocks) + values
        leaves = walked.leaves
        if chosen.faults:
            entries: dict[int, Value] = {}
            for hashed, entry in kept:
                cookie = hashed << HASH_SHIFT
                while cookie in entries:
                    cookie += 1
                entries[cookie] = entry
            leaves = [_leaf_of(sorted(entries.items(), key=lambda each: each[0]))]
        new, blocks = self._write(Kind.XATTR_TREE, XATTR_ROOT_BYTES_MAX, walked, leaves)
        return (new if new.keys else None), blocks + values


def _leaf_of(entries: list[Entry]) -> Leaf:
    return Leaf(None, [key for key, _ in entries], [value for _, value in entries])


def _continues(piece: Piece, logical: int, block: int) -> bool:
    start, extent = piece
    return (start + extent.length, extent.block + extent.length) == (logical, block)
