"""Blocks that several claim: metadata keeps them, of files the first one does."""

from __future__ import annotations

from cfs.attributes import BLOCK_BYTES
from cfs.fsck.inodes import BATCH_INODES, ExtentFilter, InodeWalk
from cfs.fsck.salvage import salvage_inode
from cfs.fsck.trees import TreeWalker
from cfs.nodes import InodeNode


class ConflictResolver:
    """Goes over all files a second time to see who has the blocks in question."""

    def __init__(self, walk: InodeWalk) -> None:
        self.walk = walk
        self.volume = walk.volume
        self._owners: dict[int, tuple[int, int]] = {}
        """Block -> (inode, logical block) of the first file that has it."""

    async def run(self) -> None:
        conflicts = self.volume.claims.conflicts
        if not conflicts:
            return
        files = sorted(ino for ino, record in self.walk.records.items() if not record.is_directory)
        for start in range(0, len(files), BATCH_INODES):
            part = files[start : start + BATCH_INODES]
            for ino, data in (await self.volume.read_blocks(part)).items():
                node, _ = salvage_inode(self.volume.fs, ino, data)
                if node.is_regular and node.root is not None:
                    await self._file(node)
            self.volume.session.show("blocks that several claim", start, len(files))

    async def _file(self, node: InodeNode) -> None:
        ino = node.block
        assert node.root is not None
        walker = TreeWalker(self.volume, ino, node.tree_kind, "")
        walked = await walker.walk(node.root, claim=False)
        conflicts = self.volume.claims.conflicts
        lost: list[int] = []
        shared: dict[int, list[int]] = {}
        for logical, extent in ExtentFilter(self.volume).keep(walked.entries):
            for block in range(extent.block, extent.block + extent.length):
                if block not in conflicts:
                    continue
                if conflicts[block]:
                    lost.append(block)
                    continue
                owner = self._owners.setdefault(block, (ino, logical))
                if owner != (ino, logical):
                    shared.setdefault(owner[0], []).append(block)
        await self._tell(ino, lost, shared)

    async def _tell(self, ino: int, lost: list[int], shared: dict[int, list[int]]) -> None:
        session = self.walk.session
        if lost:
            text = f"inode {ino} uses {_blocks(lost)}, which something else uses too: metadata"
            if await session.fix(text, "Take them out of the file", lossy=True):
                self.walk.fix_of(ino).holes.update(lost)
        for other, blocks in shared.items():
            text = (
                f"inode {ino} uses {_blocks(blocks)}, which something else uses too: inode {other}"
            )
            if await session.fix(text, "Give it copies", lossy=True):
                self.walk.fix_of(ino).clones.update(blocks)


def _blocks(blocks: list[int]) -> str:
    more = f" and {len(blocks) - 1} more blocks" if len(blocks) > 1 else ""
    size = len(blocks) * BLOCK_BYTES
    return f"block {blocks[0]}{more} ({size} bytes)"
