"""Inodes under check: everything that a name or an orphan list leads to, with all its blocks.

Goes from inode to inode in large batches. What is wrong with an inode by itself is told here and
noted in `Fixes`; it is written when all blocks in use are known (`cfs.fsck.rewrite`).
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

import msgspec

from cfs.attributes import BLOCK_BYTES, FILE_BYTES_MAX, FLAG_CUTTING, FLAG_LINKABLE, FLAGS_SETTABLE
from cfs.errors import CorruptionError
from cfs.fsck.attributes import AttributeChecker
from cfs.fsck.salvage import is_name, salvage_inode
from cfs.fsck.trees import Entry, TreeWalker, Walked
from cfs.fsck.volume import Step, Volume
from cfs.mkfs_plan import root_inode
from cfs.nodes import BlockState, Extent, InodeNode, Tree
from cfs.sanity import COUNTER_MAX, FILE_BLOCKS_MAX, TYPES

BATCH_INODES = 512
AHEAD_BLOCKS_MAX = 4096
Piece = tuple[int, Extent]
"""First logical block, extent."""


class Record(msgspec.Struct, gc=False):
    """What is remembered of a good inode."""

    mode: int
    nlink: int
    parent: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Fixes(msgspec.Struct):
    """What is to be changed in an inode."""

    values: dict[str, int] = {}
    rebuild: bool = False
    """The tree of names or extents."""
    rebuild_xattrs: bool = False
    drop_content: bool = False
    holes: set[int] = set()
    """Physical blocks to take out of a file."""
    clones: set[int] = set()
    """Physical blocks of which a file gets a copy."""
    drop_names: set[tuple[int, bytes]] = set()
    """(cookie, name) of entries to drop."""
    types: dict[tuple[int, bytes], int] = {}
    """(cookie, name) -> right type."""
    new_names: list[tuple[bytes, int, int]] = []
    """(name, inode, type) to add."""


class InodeWalk:
    """Walks all inodes of a volume."""

    def __init__(self, volume: Volume, orphans: Iterable[int]) -> None:
        self.volume = volume
        self.session = volume.session
        self.report = volume.session.report
        self.orphans = set(orphans)
        self.records: dict[int, Record] = {}
        self.gone: dict[int, bool] = {}
        """Inodes that something leads to and that are none; whether their names go."""
        self.fixes: dict[int, Fixes] = {}
        self._done = 0

    def fix_of(self, ino: int) -> Fixes:
        return self.fixes.setdefault(ino, Fixes())

    # -- the walk --------------------------------------------------------------------------------

    async def walk(self, starts: Iterable[int]) -> None:
        """These inodes and all that they lead to."""
        frontier = self._new(starts)
        while frontier:
            children: list[int] = []
            for start in range(0, len(frontier), BATCH_INODES):
                children += await self._batch(frontier[start : start + BATCH_INODES])
            frontier = self._new(children)

    def _new(self, inos: Iterable[int]) -> list[int]:
        fresh = {ino for ino in inos if ino not in self.records and ino not in self.gone}
        return sorted(fresh)

    async def _batch(self, inos: list[int]) -> list[int]:
        data = await self.volume.read_blocks(ino for ino in inos if self.volume.exists(ino))
        nodes: list[tuple[InodeNode, bool]] = []
        for ino in inos:
            found = await self._open(ino, data.get(ino))
            if found is not None:
                nodes.append(found)
        ahead = [
            child
            for node, _ in nodes
            for root in (node.root, node.xattrs)
            if root is not None and root.level
            for child in root.values
            if isinstance(child, int)
        ]
        await self.volume.read_ahead(ahead[:AHEAD_BLOCKS_MAX])
        children: list[int] = []
        for node, whole in nodes:
            children += await self._check(node, whole=whole)
        await self.volume.read_ahead(())
        self._done += len(inos)
        self.session.show("checking inodes", self._done, 0)
        return children

    async def _open(self, ino: int, data: bytes | None) -> tuple[InodeNode, bool] | None:
        """The inode, if it is one; else it is told, and what becomes of its names is decided."""
        text = ""
        lossy = True
        if data is None:
            text, lossy = f"inode {ino} does not exist", False
        else:
            try:
                node, whole = salvage_inode(self.volume.fs, ino, data)
                if not node.mode:
                    text, lossy = f"inode {ino} is dead but still referred to", False
                elif node.mode >> 12 not in TYPES:
                    text = f"inode {ino} has an unknown type"
                elif node.generation >= COUNTER_MAX or node.change >= COUNTER_MAX:
                    text = f"inode {ino} has an impossible version"
            except CorruptionError as error:
                text = f"inode {ino}: {error}"
        if not text:
            return node, whole
        if ino == self.volume.superblock.root_ino:
            if await self.session.fix(text, "Make a new root directory", lossy=True):
                return self._new_root(), True
            self.gone[ino] = False
            return None
        self.gone[ino] = await self.session.fix(text, "Remove what refers to it", lossy=lossy)
        return None

    def _new_root(self) -> InodeNode:
        volume = self.volume
        node = root_inode(volume.superblock.created_ns)
        node.block = node.owner = node.parent = volume.superblock.root_ino
        node.generation = volume.next_generation(volume.superblock.group_of(node.block))
        volume.put(node.clone(), Step.PLACE)
        node.change += 1
        return node

    # -- one inode -------------------------------------------------------------------------------

    async def _check(self, node: InodeNode, *, whole: bool) -> list[int]:
        """One inode; the inodes that it names."""
        ino = node.block
        self.report.inodes += 1
        self.volume.claims.claim(ino, 1, BlockState.META)
        self.volume.saw(ino, node.generation)
        self.records[ino] = Record(node.mode, node.nlink, node.parent)
        if not whole:
            await self._content(ino, "its content is longer than an inode", lossy=True)
        children: list[int] = []
        blocks = 0
        if node.is_directory:
            children, blocks = await self._directory(node)
        elif node.is_regular:
            blocks = await self._file(node)
        else:
            await self._special(node)
        if node.xattrs is not None:
            blocks += await AttributeChecker(self.volume, self.fix_of).check(node, node.xattrs)
        await self._numbers(node, blocks)
        return children

    async def _content(self, ino: int, fault: str, *, lossy: bool) -> None:
        text = f"inode {ino}: {fault}"
        if await self.session.fix(text, "Keep what can be read", lossy=lossy):
            self.fix_of(ino).rebuild = True

    async def _tree(self, node: InodeNode, root: Tree) -> Walked:
        """Walk the tree of names or extents; tell what is wrong with its shape."""
        ino = node.block
        what = f"the tree of inode {ino}"
        walked = await TreeWalker(self.volume, ino, node.tree_kind, what).walk(root, claim=True)
        for text, lossy in walked.faults:
            if await self.session.fix(text, "Make the tree anew from what is left", lossy=lossy):
                self.fix_of(ino).rebuild = True
        return walked

    async def _directory(self, node: InodeNode) -> tuple[list[int], int]:
        ino = node.block
        self.report.directories += 1
        if node.root is None:
            text = f"directory {ino} has no tree"
            if await self.session.fix(text, "Make it empty", lossy=True):
                self.fix_of(ino).drop_content = True
            return [], 0
        walked = await self._tree(node, node.root)
        children = [value[0] for leaf in walked.leaves for value in leaf.values if is_name(value)]
        return children, len(walked.blocks)

    async def _special(self, node: InodeNode) -> None:
        """Symbolic links, devices, pipes, sockets."""
        ino = node.block
        link = stat.S_ISLNK(node.mode)
        if (node.root is not None or (node.data and not link)) and await self.session.fix(
            f"inode {ino} has content that its type has not", "Drop it"
        ):
            self.fix_of(ino).drop_content = True
        if link and node.size != len(node.data):
            text = f"inode {ino} is a symbolic link of {len(node.data)} bytes, not {node.size}"
            await self._correct(ino, text, "size", len(node.data))

    async def _file(self, node: InodeNode) -> int:
        ino = node.block
        if node.root is None:
            if len(node.data) > node.size:
                text = f"inode {ino} holds more bytes than its size says"
                await self._correct(ino, text, "size", len(node.data))
            return 0
        walked = await self._tree(node, node.root)
        extents = ExtentFilter(self.volume)
        kept = extents.keep(walked.entries)
        for fault in extents.faults:
            text = f"inode {ino} {fault}"
            if await self.session.fix(text, "Drop that part of the file", lossy=True):
                self.fix_of(ino).rebuild = True
        blocks = len(walked.blocks)
        for _, extent in kept:
            blocks += extent.length
            self.report.data_blocks += extent.length
            self.volume.claims.claim(extent.block, extent.length, BlockState.DATA)
        await self._end(node, kept)
        return blocks

    async def _end(self, node: InodeNode, kept: list[Piece]) -> None:
        """Size and extents must agree; a file in the orphan list may be in the middle of a cut."""
        ino = node.block
        end = extents_end(kept)
        if node.size > FILE_BYTES_MAX:
            text = f"inode {ino} has the impossible size {node.size}"
            await self._correct(ino, text, "size", end * BLOCK_BYTES)
        elif end > -(-node.size // BLOCK_BYTES) and ino not in self.orphans:
            text = f"inode {ino} has blocks beyond its end"
            if await self.session.fix(text, "Free them"):
                self.fix_of(ino).rebuild = True

    async def _numbers(self, node: InodeNode, blocks: int) -> None:
        ino = node.block
        fixes = self.fixes.get(ino)
        if blocks != node.blocks and not (fixes and (fixes.rebuild or fixes.rebuild_xattrs)):
            text = f"inode {ino} counts {node.blocks} blocks but has {blocks}"
            await self._correct(ino, text, "blocks", blocks)
        for name in ("atime_ns", "mtime_ns", "ctime_ns", "birth_ns"):
            if not -COUNTER_MAX < getattr(node, name) < COUNTER_MAX:
                await self._correct(ino, f"inode {ino} has an impossible {name}", name, 0)
        if node.counter >= COUNTER_MAX:
            await self._correct(ino, f"inode {ino} has an impossible counter", "counter", 0)
        unknown = node.flags & ~(FLAGS_SETTABLE | FLAG_LINKABLE | FLAG_CUTTING)
        if unknown:
            text = f"inode {ino} has unknown flags {unknown:#x}"
            await self._correct(ino, text, "flags", node.flags & ~unknown)

    async def _correct(
        self, ino: int, text: str, name: str, value: int, *, lossy: bool = False
    ) -> None:
        """Report a wrong number and set it right."""
        if await self.session.fix(text, f"Set it to {value}", lossy=lossy):
            self.fix_of(ino).values[name] = value


class ExtentFilter:
    """Which extents of a file can be."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self.faults: list[str] = []

    def keep(self, entries: list[Entry]) -> list[Piece]:
        """Those that can be, in order and without overlaps."""
        result: list[Piece] = []
        end = 0
        size = self._volume.superblock.group_blocks
        for logical, value in sorted(entries, key=lambda entry: entry[0]):
            if not isinstance(value, Extent):
                self.faults.append("has an entry that is no extent")
                continue
            physical, count, _ = value
            if not self._volume.claims.exist(physical, count):
                self.faults.append(f"uses blocks {physical}+{count}, which do not exist")
            elif physical // size != (physical + count - 1) // size:
                self.faults.append(f"has an extent that crosses a group, {physical}+{count}")
            elif logical < end or logical + count > FILE_BLOCKS_MAX:
                self.faults.append(f"has extents that overlap at block {logical}")
            else:
                result.append((logical, value))
                end = logical + count
        return result


def extents_end(pieces: list[Piece]) -> int:
    """The block after the last one that must be inside the file: unwritten ones may lie behind."""
    return max((at + extent.length for at, extent in pieces if not extent.unwritten), default=0)
