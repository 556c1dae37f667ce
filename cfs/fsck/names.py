"""Names under check: each entry of each directory against the inode it leads to.

Comes after all inodes are known. What is to be dropped or corrected is noted in the directory's
`Fixes`; links and homes are counted as they will be then.
"""

from __future__ import annotations

from cfs.format import COOKIE_FIRST
from cfs.fsck.inodes import BATCH_INODES, InodeWalk
from cfs.fsck.salvage import is_name, salvage_inode
from cfs.fsck.trees import TreeWalker
from cfs.nodes import InodeNode
from cfs.sanity import name_fault

LOST_FOUND = b"lost+found"
Where = tuple[int, int, bytes]
"""Directory, cookie, name."""


class NameWalk:
    """Walks all directories."""

    def __init__(self, walk: InodeWalk) -> None:
        self.walk = walk
        self.volume = walk.volume
        self.session = walk.session
        self.records = walk.records
        self.links: dict[int, int] = {}
        self.subdirectories: dict[int, int] = {}
        self.home: dict[int, Where] = {}
        """Where the one name of each directory stands."""
        self.lost_found = 0

    async def run(self) -> None:
        inos = sorted(ino for ino, record in self.records.items() if record.is_directory)
        for start in range(0, len(inos), BATCH_INODES):
            part = inos[start : start + BATCH_INODES]
            nodes = []
            for ino, data in (await self.volume.read_blocks(part)).items():
                nodes.append(salvage_inode(self.volume.fs, ino, data)[0])
            ahead = [
                child
                for node in nodes
                if node.root is not None and node.root.level
                for child in node.root.values
                if isinstance(child, int)
            ]
            await self.volume.read_ahead(ahead)
            for node in nodes:
                await self._directory(node)
            await self.volume.read_ahead(())
            self.session.show("checking names", start + len(part), len(inos))

    async def _directory(self, node: InodeNode) -> None:
        if node.root is None:
            return
        ino = node.block
        walker = TreeWalker(self.volume, ino, node.tree_kind, "")
        seen: dict[bytes, int] = {}
        for key, value in (await walker.walk(node.root, claim=False)).entries:
            if not is_name(value):
                continue
            child, kind, name = value
            self.session.report.names += 1
            await self._entry((ino, key, name), child, kind, seen)

    # -- one name --------------------------------------------------------------------------------

    async def _entry(self, where: Where, child: int, kind: int, seen: dict[bytes, int]) -> None:
        ino, key, name = where
        record = self.records.get(child)
        if record is None:
            if self.walk.gone.get(child, False):
                self._drop(where)
            return
        fault, lossy = self._fault(ino, name, child, seen)
        text = f"directory {ino} {fault}"
        if fault and await self.session.fix(text, "Drop the name", lossy=lossy):
            self._drop(where)
            return
        seen[name] = child
        if key < COOKIE_FIRST or not self.volume.cookie_fits(key, name):
            text = f"directory {ino}: the cookie of {name!r} does not fit its hash"
            if await self.session.fix(text, "Put the name where it belongs"):
                self.walk.fix_of(ino).rebuild = True
        if kind != record.mode >> 12:
            text = f"inode {child} is of another type than its name {name!r} says"
            if await self.session.fix(text, "Correct the type in the name"):
                self.walk.fix_of(ino).types[key, name] = record.mode >> 12
        if record.is_directory and not await self._is_home(where, child):
            return
        self.links[child] = self.links.get(child, 0) + 1
        if record.is_directory:
            self.subdirectories[ino] = self.subdirectories.get(ino, 0) + 1
            if ino == self.volume.superblock.root_ino and name == LOST_FOUND:
                self.lost_found = child

    def _fault(self, ino: int, name: bytes, child: int, seen: dict[bytes, int]) -> tuple[str, bool]:
        """Why a name cannot stay, and whether something is lost with it."""
        fault = name_fault(name)
        if fault:
            return f"has {fault}", True
        if name in seen and not self.volume.names_hashed:
            return f"has {name!r} twice", seen[name] != child
        if child in (ino, self.volume.superblock.root_ino):
            return f"has a name {name!r} for itself or for the root", False
        return "", False

    def _drop(self, where: Where) -> None:
        ino, key, name = where
        self.walk.fix_of(ino).drop_names.add((key, name))

    async def _is_home(self, where: Where, child: int) -> bool:
        """A directory has one name; with several, the one where it says that its parent is."""
        other = self.home.get(child)
        if other is None:
            self.home[child] = where
            return True
        parent = self.records[child].parent
        moves = where[0] == parent != other[0]
        loser = other if moves else where
        text = f"directory {child} has a second name: {loser[2]!r} in directory {loser[0]}"
        if not await self.session.fix(text, "Drop that name"):
            return True
        self._drop(loser)
        if not moves:
            return False
        self.home[child] = where
        self.links[child] -= 1
        self.subdirectories[other[0]] -= 1
        return True

    # -- directories that nothing leads to -------------------------------------------------------

    def lose(self, child: int) -> None:
        """Take the name of a directory away that stands in a circle."""
        where = self.home.pop(child)
        self._drop(where)
        self.links[child] -= 1
        self.subdirectories[where[0]] -= 1

    def circles(self) -> list[int]:
        """One directory of each circle of directories that contain each other."""
        root = self.volume.superblock.root_ino
        good: set[int] = {root}
        found: list[int] = []
        for start in self.home:
            path: list[int] = []
            here: set[int] = set()
            at = start
            while at not in good and at not in here and at in self.home:
                path.append(at)
                here.add(at)
                at = self.home[at][0]
            if at in here:
                found.append(min(path[path.index(at) :]))
            good |= here
            good.add(at)
        return found
