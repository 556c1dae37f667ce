"""Inodes without a name, and files being cut in several steps.

Each slot has a list on the disk. An inode stands in it from the transaction that takes its last
name (or begins a long cut) to the one that frees it (or ends the cut). The list is processed by
whoever has the slot; after a crash by who replays the journal (`adopt`).

An inode is freed under its open lock in EX: then nobody anywhere has it open.
"""

from __future__ import annotations

import errno
from collections import deque

from cfs.attributes import BLOCK_BYTES
from cfs.cache import Covered, InodeState
from cfs.core import Core
from cfs.errors import CorruptionError, FsError
from cfs.files import Files
from cfs.format import Kind, open_block_untrusted
from cfs.journal_format import HEADER_BLOCKS, ORPHAN_BLOCKS
from cfs.lock_names import inode_lock_name, open_lock_name
from cfs.nodes import (
    ORPHANS_PER_BLOCK,
    InodeNode,
    OrphanNode,
    Xattr,
    decode_node_untrusted,
)
from cfs.transaction import Tx
from cfs.xattr import XattrEditor
from cluster.errors import BarredError
from cluster.locks import CachedLock, Mode

REAPERS_MAX = 64
DROPS_MAX = 16384


class Orphans:
    """The list of this mount's slot."""

    def __init__(self, core: Core, files: Files, slot: int, first_block: int) -> None:
        self.core = core
        self.files = files
        self.first = first_block + HEADER_BLOCKS
        self.covered = Covered(slot, None)
        self.where: dict[int, tuple[int, int]] = {}
        self._free: list[tuple[int, int]] = []
        self._waiting: deque[int] = deque()
        self._active: set[int] = set()
        self._drops: deque[int] = deque()
        self._dropping = False
        self.stopped = False

    async def load(self) -> None:
        """Read the list; what stands in it is processed in the background."""
        nodes = await read_orphans(self.core, self.covered.number, self.first)
        for node in nodes:
            self.covered.nodes[node.block] = node
            for index, ino in enumerate(node.inos):
                if ino:
                    self.where[ino] = (node.block, index)
                else:
                    self._free.append((node.block, index))
        self._free.reverse()

    # -- the list --------------------------------------------------------------------------------

    def add(self, tx: Tx, ino: int) -> None:
        """Put an inode into the list, as part of a transaction; nothing if it is there."""
        self.add_many(tx, [ino])

    def add_many(self, tx: Tx, inos: list[int]) -> None:
        inos = [ino for ino in inos if ino not in self.where]
        if len(inos) > len(self._free):
            raise FsError(errno.ENOSPC, "too many open files without a name")
        places = self._free[len(self._free) - len(inos) :]
        for ino, (block, index) in zip(inos, places, strict=True):
            node = tx.edit(self.covered, block, Kind.ORPHANS)
            assert isinstance(node, OrphanNode)
            assert not node.inos[index]
            node.inos[index] = ino

        def done() -> None:
            del self._free[len(self._free) - len(places) :]
            self.where.update(zip(inos, places, strict=True))

        if inos:
            tx.after(done)

    def remove(self, tx: Tx, ino: int) -> None:
        place = self.where.get(ino)
        if place is None:
            return
        node = tx.edit(self.covered, place[0], Kind.ORPHANS)
        assert isinstance(node, OrphanNode)
        assert node.inos[place[1]] == ino
        node.inos[place[1]] = 0

        def done() -> None:
            del self.where[ino]
            self._free.append(place)

        tx.after(done)

    # -- the end of an inode ---------------------------------------------------------------------

    def bury(self, tx: Tx, state: InodeState, inode: InodeNode, *, alone: bool) -> None:
        """The transaction's clone lost its last name. `alone`: its open lock is held in EX, so it
        is freed at once if that is little work."""
        little = all(root is None or not root.level for root in (inode.root, inode.xattrs))
        little = little and not self._must_wait(inode)
        if alone and little and self._empty(tx, state, inode):
            self.free_inode(tx, inode)
            return
        self.add(tx, inode.block)
        tx.after(lambda: self.reap_soon(inode.block))

    def _empty(self, tx: Tx, state: InodeState, inode: InodeNode) -> bool:
        """Free blocks of the inode, a bounded number; True if it has none left but its own."""
        if inode.is_regular and not self.files.cut(tx, state, inode, 0):
            return False
        return inode.xattrs is None or XattrEditor(tx, state, inode, self.core.space).cut()

    def _must_wait(self, inode: InodeNode) -> bool:
        """Some of its blocks cannot be given back while their group is damaged: the inode stays in
        the list until that is repaired."""
        space = self.core.space
        length = space.superblock.group_blocks
        blocks = [inode.block]
        if inode.root is not None and not inode.is_directory:
            blocks += [value[0] for value in inode.root.values if isinstance(value, tuple)]
        if inode.xattrs is not None:
            for value in inode.xattrs.values:
                blocks += value.blocks if isinstance(value, Xattr) else ()
        return any(space.groups[block // length].damaged for block in blocks)

    def free_inode(self, tx: Tx, inode: InodeNode) -> None:
        """The inode has no blocks left but its own."""
        self.core.space.free(tx, inode.block, 1)
        self.remove(tx, inode.block)
        inode.mode = inode.nlink = 0
        inode.data = b""
        inode.root = inode.xattrs = None
        inode.flags = 0
        inode.blocks = inode.size = 0
        tx.after(lambda: self.drop_soon(inode.block))

    def reap_soon(self, ino: int) -> None:
        """Free an orphan as soon as nobody has it open."""
        if self.stopped or ino in self._active or ino not in self.where:
            return
        if len(self._active) >= REAPERS_MAX:
            self._waiting.append(ino)
            return
        self._active.add(ino)
        self.core.runtime.spawn(lambda: self._reap_task(ino), "orphan")

    def reap_all(self) -> None:
        for ino in list(self.where):
            self.reap_soon(ino)

    async def _reap_task(self, ino: int) -> None:
        try:
            await self._reap(ino)
        except (FsError, BarredError):
            pass  # It stays in the list; the next mount or fsck meets it again.
        finally:
            self._active.discard(ino)
            while self._waiting and len(self._active) < REAPERS_MAX:
                self.reap_soon(self._waiting.popleft())

    async def _reap(self, ino: int) -> None:
        core = self.core
        state = core.table.get(ino)
        lock = core.locks.get(open_lock_name(ino), core)
        while not state.open_count:  # The last close_ref comes here again.
            # Until every other mount has closed it. Not kept while the inode's lock is waited for:
            # a mount that has it open takes this lock before it gives that one.
            await lock.hold(Mode.EX)
            lock.release(Mode.EX)
            await state.hold(Mode.EX)
            try:
                if await self._reap_alone(state, lock):
                    return
            finally:
                state.release(Mode.EX)

    async def _reap_alone(self, state: InodeState, lock: CachedLock) -> bool:
        """The inode's lock is held in EX. False: another mount has it open after all."""
        core = self.core
        if await core.locks.try_lock(lock.name, Mode.EX) is None:
            return False
        try:
            while not await core.run(lambda tx: self._reap_step(tx, state)):
                pass
        except FsError as error:
            if error.errno == errno.ESTALE:
                await core.run(lambda tx: self.remove(tx, state.ino))
            raise
        finally:
            lock.release(Mode.EX)
        return True

    def _reap_step(self, tx: Tx, state: InodeState) -> bool:
        """One bounded step; True when the inode is gone (or has a name and its cut is complete, or
        was opened meanwhile)."""
        seen = tx.inode(state)
        if state.open_count and not seen.nlink:
            return True
        inode = tx.edit_inode(state)
        if seen.nlink:
            first = -(-inode.size // BLOCK_BYTES)
            done = not inode.is_regular or self.files.cut(tx, state, inode, first)
            if done:
                self.remove(tx, inode.block)
            return done
        if not self._empty(tx, state, inode):
            return False
        self.free_inode(tx, inode)
        return True

    # -- locks of inodes that are gone -----------------------------------------------------------

    def drop_soon(self, ino: int) -> None:
        """Give the locks of a freed inode back later, so that another mount may use the block."""
        if len(self._drops) < DROPS_MAX:
            self._drops.append(ino)

    def drop_freed(self) -> None:
        """Start giving locks back. Only of inodes whose last image is in its place: until then the
        block is of no use to anyone, and giving the lock up would force a checkpoint."""
        if self._drops and not self._dropping:
            self._dropping = True
            self.core.runtime.spawn(self._drop_task, "drop locks")

    async def _drop_task(self) -> None:
        core = self.core
        try:
            for _ in range(len(self._drops)):
                if self.stopped:
                    return
                ino = self._drops.popleft()
                state = core.table.find(ino)
                if core.journal.is_dirty(ino):
                    self._drops.append(ino)
                elif state is None or state.idle:
                    await core.locks.drop(open_lock_name(ino))
                    await core.locks.drop(inode_lock_name(ino))
        except BarredError:
            pass
        finally:
            self._dropping = False


async def read_orphans(core: Core, slot: int, first: int) -> list[OrphanNode]:
    """The orphan blocks of a slot as they are on the disk. A damaged one is left out: what stands
    in it takes space until fsck has seen it, and nothing else suffers."""
    data = await core.device.read(first * BLOCK_BYTES, ORPHAN_BLOCKS * BLOCK_BYTES)
    result = []
    for index in range(ORPHAN_BLOCKS):
        block = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
        try:
            header = open_block_untrusted(core.fs, first + index, block)
            node = decode_node_untrusted(header, block)
            if not isinstance(node, OrphanNode) or node.owner != slot:
                raise CorruptionError(f"block {first + index} holds something else")
            result.append(node)
        except CorruptionError as error:
            core.damaged(error, first + index, f"the list of unlinked files of journal {slot}")
    return result


async def adopt(core: Core, orphans: Orphans, slot: int, first_block: int) -> int:
    """Move the entries of a slot that nobody uses into our own list; how many. The other slot's
    blocks are on the disk when this returns."""
    if slot == orphans.covered.number:
        return 0
    covered = Covered(slot, None)
    moved: list[int] = []
    nodes = await read_orphans(core, slot, first_block + HEADER_BLOCKS)
    for node in nodes:
        covered.nodes[node.block] = node
        inos = [ino for ino in node.inos if ino]
        if not inos:
            continue

        def move(tx: Tx, block: int = node.block, inos: list[int] = inos) -> None:
            twin = tx.edit(covered, block, Kind.ORPHANS)
            assert isinstance(twin, OrphanNode)
            twin.inos = [0] * ORPHANS_PER_BLOCK
            orphans.add_many(tx, inos)

        await core.run(move)
        moved += inos
    if moved:
        await core.journal.checkpoint()
        for ino in moved:
            orphans.reap_soon(ino)
    return len(moved)
