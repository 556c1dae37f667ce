"""Checks inodes and what hangs on them: trees, names, attributes, link counts."""

from __future__ import annotations

import stat
from collections import deque

from cfs.attributes import BLOCK_BYTES, NAME_BYTES_MAX
from cfs.errors import CorruptionError
from cfs.format import COOKIE_FIRST, HASH_SHIFT, Kind, Superblock, open_block_untrusted
from cfs.fsck.claims import Claims
from cfs.fsck.report import Report
from cfs.nodes import (
    CONTENT_BYTES_MAX,
    BlockState,
    Extent,
    InodeNode,
    Tree,
    TreeNode,
    Value,
    ValueNode,
    Xattr,
    XattrTree,
    decode_node_untrusted,
)
from cfs.tree import Rooted
from cfs.xattr import check_entry
from cluster.device import BlockDevice

READ_MANY_MAX = 128
KINDS = (
    stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR,
    stat.S_IFBLK,
)  # fmt: skip


class InodeChecker:
    """Walks from the root and from the orphans."""

    def __init__(
        self, device: BlockDevice, superblock: Superblock, report: Report, claims: Claims
    ) -> None:
        self.device = device
        self.superblock = superblock
        self.report = report
        self.claims = claims
        self.inodes: dict[int, InodeNode] = {}
        self.links: dict[int, int] = {}
        self.subdirectories: dict[int, int] = {}
        self.types: dict[int, int] = {}
        self.parents: dict[int, int] = {}
        self.orphans: set[int] = set()

    async def walk(self, orphans: list[int]) -> None:
        root = self.superblock.root_ino
        self.orphans = set(orphans)
        if len(self.orphans) != len(orphans):
            self.report.error("an inode stands in the orphan lists twice")
        self.links[root] = 0
        self.parents[root] = root
        self.types[root] = stat.S_IFDIR >> 12
        queue = deque([root])
        await self._walk(queue)
        queue.extend(ino for ino in orphans if ino not in self.inodes)
        await self._walk(queue)
        for ino, inode in self.inodes.items():
            self._check_links(ino, inode)

    async def _walk(self, queue: deque[int]) -> None:
        while queue:
            batch = [queue.popleft() for _ in range(min(len(queue), READ_MANY_MAX))]
            batch = [ino for ino in dict.fromkeys(batch) if ino not in self.inodes]
            good = [ino for ino in batch if 0 < ino < self.superblock.total_blocks]
            for ino in set(batch) - set(good):
                self.report.error(f"inode {ino} does not exist")
            ranges = [(ino * BLOCK_BYTES, BLOCK_BYTES) for ino in good]
            for ino, data in zip(good, await self.device.read_many(ranges), strict=True):
                inode = self._decode(ino, data)
                if inode is not None:
                    self.inodes[ino] = inode
                    queue.extend(await self._check(ino, inode))

    def _decode(self, ino: int, data: bytes) -> InodeNode | None:
        try:
            header = open_block_untrusted(self.superblock.fs, ino, data)
            node = decode_node_untrusted(header, data)
        except CorruptionError as error:
            self.report.error(f"inode {ino}: {error}")
            return None
        if not isinstance(node, InodeNode) or header.owner != ino:
            self.report.error(f"block {ino} holds no inode")
            return None
        if not node.mode:
            self.report.error(f"inode {ino} is dead but still referred to")
            return None
        return node

    async def _check(self, ino: int, inode: InodeNode) -> list[int]:
        """One inode; the inodes that it names."""
        self.report.inodes += 1
        self.claims.claim(ino, 1, BlockState.META, f"inode {ino}")
        if stat.S_IFMT(inode.mode) not in KINDS:
            self.report.error(f"inode {ino} has an unknown type")
        entries: list[tuple[int, Value]] = []
        blocks = 0
        if inode.root is not None:
            entries, blocks = await self._tree(ino, inode)
        elif inode.is_directory:
            self.report.error(f"directory {ino} has no tree")
        elif len(inode.data) > CONTENT_BYTES_MAX or len(inode.data) > inode.size:
            self.report.error(f"inode {ino} holds more bytes than its size says")
        if inode.is_directory:
            children = self._names(ino, entries)
        else:
            children = []
            blocks += self._extents(ino, inode, entries)
        if inode.xattrs is not None:
            blocks += await self._xattrs(ino, inode)
        if blocks != inode.blocks:
            self.report.error(f"inode {ino} counts {inode.blocks} blocks but has {blocks}")
        return children

    # -- trees -----------------------------------------------------------------------------------

    async def _tree(self, ino: int, inode: Rooted) -> tuple[list[tuple[int, Value]], int]:
        """All entries of a tree in order, and the number of its blocks."""
        assert inode.root is not None
        entries: list[tuple[int, Value]] = []
        count = 0
        stack: list[tuple[Tree, int, int]] = [(inode.root, 0, 1 << 63)]
        while stack:
            tree, low, high = stack.pop()
            if tree.keys and not (low <= tree.keys[0] and tree.keys[-1] < high):
                self.report.error(f"a tree block of inode {ino} has keys that belong elsewhere")
            if not tree.level:
                entries += zip(tree.keys, tree.values, strict=True)
                continue
            if not tree.keys:
                self.report.error(f"inode {ino} has an index without children")
            for position in range(len(tree.keys) - 1, -1, -1):
                child = tree.values[position]
                assert isinstance(child, int)
                count += 1
                found = await self._tree_block(ino, inode.tree_kind, child, tree.level - 1)
                if found is not None:
                    lowest = tree.keys[position] if position else low
                    highest = tree.keys[position + 1] if position + 1 < len(tree.keys) else high
                    stack.append((found, lowest, highest))
        return entries, count

    async def _tree_block(self, ino: int, kind: Kind, block: int, level: int) -> Tree | None:
        if not self.claims.claim(block, 1, BlockState.META, f"the tree of inode {ino}"):
            return None
        data = await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        try:
            header = open_block_untrusted(self.superblock.fs, block, data)
            node = decode_node_untrusted(header, data)
        except CorruptionError as error:
            self.report.error(f"tree of inode {ino}: {error}")
            return None
        if not isinstance(node, TreeNode) or node.kind != kind or node.owner != ino:
            self.report.error(f"block {block} is no tree block of inode {ino}")
            return None
        if node.tree.level != level or not node.tree.keys:
            self.report.error(f"tree block {block} of inode {ino} is empty or at a wrong level")
            return None
        return node.tree

    def _extents(self, ino: int, inode: InodeNode, entries: list[tuple[int, Value]]) -> int:
        end = written_end = 0
        blocks = 0
        length = self.superblock.group_blocks
        for logical, value in entries:
            if not isinstance(value, Extent) or not inode.is_regular:
                self.report.error(f"inode {ino} has an entry that is no extent")
                continue
            physical, count, unwritten = value
            if logical < end:
                self.report.error(f"extents of inode {ino} overlap at block {logical}")
            end = logical + count
            if not unwritten:
                written_end = end
            blocks += count
            if self.claims.claim(physical, count, BlockState.DATA, f"inode {ino}"):
                self.report.data_blocks += count
            if physical // length != (physical + count - 1) // length:
                self.report.error(f"an extent of inode {ino} crosses a group")
        if written_end > -(-inode.size // BLOCK_BYTES) and ino not in self.orphans:
            self.report.error(f"inode {ino} has blocks beyond its end")
        return blocks

    # -- extended attributes ---------------------------------------------------------------------

    async def _xattrs(self, ino: int, inode: InodeNode) -> int:
        """Check all attributes; the number of their blocks."""
        entries, count = await self._tree(ino, XattrTree(inode))
        seen: set[bytes] = set()
        for cookie, entry in entries:
            if not isinstance(entry, Xattr):
                self.report.error(f"inode {ino} has an entry that is no attribute")
                continue
            try:
                check_entry(cookie, self.superblock.name_hash(entry.name), entry)
            except CorruptionError as error:
                self.report.error(f"inode {ino} has {error.message}")
            if entry.name in seen:
                self.report.error(f"inode {ino} has the attribute {entry.name!r} twice")
            seen.add(entry.name)
            for block in entry.blocks:
                count += 1
                await self._value_block(ino, block)
        return count

    async def _value_block(self, ino: int, block: int) -> None:
        if not self.claims.claim(block, 1, BlockState.META, f"an attribute of inode {ino}"):
            return
        data = await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        try:
            node = decode_node_untrusted(
                open_block_untrusted(self.superblock.fs, block, data), data
            )
        except CorruptionError as error:
            self.report.error(f"attribute of inode {ino}: {error}")
            return
        if not isinstance(node, ValueNode) or node.owner != ino:
            self.report.error(f"block {block} is no attribute value of inode {ino}")

    # -- names -----------------------------------------------------------------------------------

    def _names(self, ino: int, entries: list[tuple[int, Value]]) -> list[int]:
        self.report.directories += 1
        children = []
        seen: set[bytes] = set()
        for cookie, value in entries:
            if not isinstance(value, tuple) or isinstance(value, Extent):
                self.report.error(f"directory {ino} has an entry that is no name")
                continue
            child, kind, name = value
            self.report.names += 1
            self._check_name(ino, cookie, name)
            if name in seen:
                self.report.error(f"directory {ino} has {name!r} twice")
            seen.add(name)
            self.links[child] = self.links.get(child, 0) + 1
            if self.types.setdefault(child, kind) != kind:
                self.report.error(f"names of inode {child} disagree about its type")
            if kind == stat.S_IFDIR >> 12:
                self.subdirectories[ino] = self.subdirectories.get(ino, 0) + 1
                self.parents.setdefault(child, ino)
            children.append(child)
        return children

    def _check_name(self, ino: int, cookie: int, name: bytes) -> None:
        hashed = self.superblock.name_hash(name)
        if cookie < COOKIE_FIRST or cookie >> HASH_SHIFT != hashed:
            self.report.error(f"directory {ino}: the cookie of {name!r} does not fit its hash")
        if len(name) > NAME_BYTES_MAX or b"/" in name or b"\0" in name or name in (b".", b".."):
            self.report.error(f"directory {ino} has the impossible name {name!r}")

    def _check_links(self, ino: int, inode: InodeNode) -> None:
        named = self.links.get(ino, 0)
        root = ino == self.superblock.root_ino
        if ino in self.types and self.types[ino] != inode.mode >> 12:
            self.report.error(f"inode {ino} is of another type than its name says")
        if not inode.is_directory:
            if inode.nlink != named:
                self.report.error(f"inode {ino} counts {inode.nlink} names but has {named}")
            if not named and ino not in self.orphans:
                self.report.error(f"inode {ino} has no name and is in no orphan list")
            return
        if named != (0 if root or not inode.nlink else 1):
            self.report.error(f"directory {ino} has {named} names")
        expected = 2 + self.subdirectories.get(ino, 0) if inode.nlink else 0
        if inode.nlink != expected:
            self.report.error(f"directory {ino} counts {inode.nlink} links but has {expected}")
        if inode.nlink and inode.parent != self.parents.get(ino):
            self.report.error(f"directory {ino} names {inode.parent} as its parent, wrongly")
