"""What nothing leads to: lost inodes, and counts of links, once all names are known."""

from __future__ import annotations

import stat

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import Kind
from cfs.fsck.inodes import InodeWalk, Record
from cfs.fsck.names import LOST_FOUND, NameWalk
from cfs.fsck.salvage import salvage_inode
from cfs.fsck.tables import OrphanLists
from cfs.fsck.volume import NoRoomError, Step, Volume
from cfs.nodes import BlockState, Extent, InodeNode, Tree
from cfs.sanity import TYPES

SCAN_BLOCKS = 4096
_INODE = int(Kind.INODE).to_bytes(2, "little")


class LostInodes:
    """Inodes in blocks that hold metadata by their maps but that nothing has led to."""

    def __init__(self, volume: Volume, walk: InodeWalk) -> None:
        self.volume = volume
        self.walk = walk
        self.untrusted: set[int] = set()
        """Found without a map: a file's content may only look like an inode."""

    async def find(self) -> None:
        """Walk them all."""
        groups = range(len(self.volume.maps))
        for damaged in (False, True):
            for group in groups:
                if (self.volume.maps[group] is None) == damaged:
                    await self._group(group, damaged=damaged)
                self.volume.session.show("looking for lost inodes", group, len(groups))

    async def _group(self, group: int, *, damaged: bool) -> None:
        volume = self.volume
        base = group * volume.superblock.group_blocks
        node = volume.maps[group]
        claimed = volume.claims.of_group(group)
        states = bytes((BlockState.META,)) * len(claimed) if node is None else bytes(node.states)
        found = [
            base + index
            for index, state in enumerate(states)
            if state == BlockState.META and not claimed[index]
        ]
        starts: list[int] = []
        for start in range(0, len(found), SCAN_BLOCKS):
            data = await volume.read_blocks(found[start : start + SCAN_BLOCKS])
            for block in sorted(data):
                if self._is_alive(block, data[block], damaged=damaged):
                    starts.append(block)
        if damaged:
            self.untrusted.update(starts)
        await self.walk.walk(starts)

    def _is_alive(self, block: int, data: bytes, *, damaged: bool) -> bool:
        if data[4:6] != _INODE:
            return False
        try:
            node, _ = salvage_inode(self.volume.fs, block, data)
        except CorruptionError:
            return False
        if not node.nlink or node.mode >> 12 not in TYPES:
            return False
        return not damaged or self._is_free(node)

    def _is_free(self, node: InodeNode) -> bool:
        """Nobody else has the blocks of an inode: else it is what was left of a deleted one."""
        claims = self.volume.claims
        if node.root is None or node.root.level:
            return True
        for value in node.root.values:
            if isinstance(value, Extent):
                first, count, _ = value
                if not claims.exist(first, count) or any(claims.states[first : first + count]):
                    return False
        return True


class Connector:
    """Gives names to what has none, and counts links."""

    def __init__(self, names: NameWalk, orphans: OrphanLists, untrusted: set[int]) -> None:
        self.names = names
        self.walk = names.walk
        self.volume = names.volume
        self.session = names.session
        self.orphans = orphans
        self.untrusted = untrusted

    async def run(self) -> None:
        await self._strike_orphans()
        for ino in self.names.circles():
            text = f"directory {ino} is in a circle of directories"
            if await self.session.fix(text, "Break the circle"):
                self.names.lose(ino)
        for ino in sorted(self.walk.records):
            if self._is_lost(ino):
                await self._reconnect(ino)
        for ino in sorted(self.walk.records):
            await self._count(ino)

    async def _strike_orphans(self) -> None:
        """What the lists name must be inodes."""
        for ino in list(self.orphans.inos):
            if self.walk.gone.get(ino, False):
                self.orphans.strike(ino)

    def _is_lost(self, ino: int) -> bool:
        record = self.walk.records[ino]
        if self.names.links.get(ino, 0) or ino == self.volume.superblock.root_ino:
            return False
        return bool(record.nlink) or ino not in self.orphans.inos

    async def _reconnect(self, ino: int) -> None:
        names, record = self.names, self.walk.records[ino]
        text = f"inode {ino} has no name and is in no orphan list"
        if not await self.session.fix(text, "Put it into /lost+found"):
            return
        try:
            holder = names.lost_found or self._make_lost_found()
        except NoRoomError:
            self.session.give_up("there is no room for /lost+found")
            return
        name = b"#%d" % ino
        fixes = self.walk.fix_of(holder)
        fixes.new_names.append((name, ino, record.mode >> 12))
        names.links[ino] = 1
        self.session.report.reconnected += 1
        if record.is_directory:
            names.home[ino] = (holder, 0, name)
            names.subdirectories[holder] = names.subdirectories.get(holder, 0) + 1
            self._one_more(holder)
        if ino in self.untrusted:
            values = self.walk.fix_of(ino).values
            values["uid"] = values["gid"] = 0
            values["mode"] = stat.S_IFMT(record.mode) | 0o600

    def _make_lost_found(self) -> int:
        """An empty directory in the root. Raises NoRoomError."""
        volume, names = self.volume, self.names
        block, generation = volume.allocate(BlockState.META)
        root = volume.superblock.root_ino
        node = InodeNode(block, generation)
        node.mode, node.nlink, node.parent = stat.S_IFDIR | 0o700, 2, root
        node.size, node.root = BLOCK_BYTES, Tree(0, [], [], 0)
        times = volume.superblock.created_ns
        node.atime_ns = node.mtime_ns = node.ctime_ns = node.birth_ns = times
        volume.put(node, Step.FRESH)
        self.walk.records[block] = Record(node.mode, 2, root)
        self.walk.fix_of(root).new_names.append((LOST_FOUND, block, stat.S_IFDIR >> 12))
        names.links[block] = 1
        names.home[block] = (root, 0, LOST_FOUND)
        names.subdirectories[root] = names.subdirectories.get(root, 0) + 1
        names.lost_found = block
        self._one_more(root)
        return block

    def _one_more(self, holder: int) -> None:
        """The repair itself puts a directory into another one: no error of its count."""
        record = self.walk.records[holder]
        record.nlink += 1
        self.walk.fix_of(holder).values["nlink"] = record.nlink

    # -- counts ----------------------------------------------------------------------------------

    async def _count(self, ino: int) -> None:
        record = self.walk.records[ino]
        named = self.names.links.get(ino, 0)
        root = ino == self.volume.superblock.root_ino
        if not record.is_directory:
            if record.nlink != named:
                text = f"inode {ino} counts {record.nlink} names but has {named}"
                if await self.session.fix(text, "Correct the count"):
                    self.walk.fix_of(ino).values["nlink"] = named
            return
        expected = 2 + self.names.subdirectories.get(ino, 0) if named or root else 0
        if record.nlink != expected:
            text = f"directory {ino} counts {record.nlink} links but has {expected}"
            if await self.session.fix(text, "Correct the count"):
                self.walk.fix_of(ino).values["nlink"] = expected
        parent = ino if root else self.names.home.get(ino, (record.parent, 0, b""))[0]
        if record.parent != parent:
            text = f"directory {ino} names {record.parent} as its parent, wrongly"
            if await self.session.fix(text, "Correct it"):
                self.walk.fix_of(ino).values["parent"] = parent
