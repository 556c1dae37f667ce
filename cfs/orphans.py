"""Inodes without a name, and files being cut in several steps.

Each slot has a list on the disk. An inode stands in it from the transaction that takes its last
name (or begins a long cut) to the one that frees it (or ends the cut). The list is processed by
whoever has the slot; after a crash by who replays the journal (`adopt`).

An inode is freed under its open lock in EX: then nobody anywhere has it open.

Taking names away never fails for want of a place in the list. Who finds it full waits while inodes
are being freed; if all that stand in it are open somewhere, the inode goes into memory (`unlisted`)
and into the list as soon as there is room. A crash before that leaves an inode without a name,
which fsck frees.
"""

from __future__ import annotations

import errno
from collections import deque
from itertools import islice

from cfs.attributes import BLOCK_BYTES
from cfs.cache import Covered, InodeState
from cfs.core import Core
from cfs.errors import CorruptionError, FsError
from cfs.files import Files
from cfs.format import Kind, open_block_untrusted
from cfs.journal_format import HEADER_BLOCKS, ORPHAN_BLOCKS
from cfs.lock_names import inode_lock_name, open_lock_name
from cfs.nodes import (
    InodeNode,
    OrphanNode,
    Xattr,
    decode_node_untrusted,
)
from cfs.seams import Event
from cfs.transaction import NeedWait, Tx
from cfs.xattr import XattrEditor
from cluster.errors import BarredError
from cluster.locks import CachedLock, Mode

REAPERS_MAX = 64
TRY_FIRST_S, TRY_MAX_S = 0.01, 1.0
"""How long after each other it is tried whether others have closed a file; the longest time holds
for up to TRIES_MAX files."""
TRIES_MAX = 1000
DROPS_MAX = 16384


class Orphans:
    """The list of this mount's slot."""

    def __init__(self, core: Core, files: Files, slot: int, first_block: int) -> None:
        self.core = core
        self.files = files
        self.first = first_block + HEADER_BLOCKS
        self.covered = Covered(slot, None)
        self.where: dict[int, tuple[int, int]] = {}
        self.unlisted: dict[int, None] = {}
        """What should stand in the list and finds no room there."""
        self._free: list[tuple[int, int]] = []
        self._queue: deque[int] = deque()
        self._pending: set[int] = set()
        """In the queue, with a worker, or waited for until other mounts have closed it."""
        self._workers = 0
        self._trying = 0
        self._progress: Event | None = None
        self._listing = False
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

    def holds(self, ino: int) -> bool:
        """Whether the inode waits to be freed (or cut)."""
        return ino in self.where or ino in self.unlisted

    @property
    def room(self) -> int:
        """How many entries the list can take."""
        return len(self._free)

    def add(self, tx: Tx, ino: int) -> None:
        """Put an inode into the list, as part of a transaction; nothing if it is there."""
        if self.holds(ino):
            return
        if self._free:
            self.enter(tx, [ino])
        elif self._workers:
            raise NeedWait(self._wait_for_worker)
        else:
            tx.after(lambda: self.unlisted.setdefault(ino))

    def enter(self, tx: Tx, inos: list[int]) -> None:
        """Put inodes into the list, which has room for them and does not have them."""
        places = self._free[len(self._free) - len(inos) :]
        for ino, (block, index) in zip(inos, places, strict=True):
            node = tx.edit(self.covered, block, Kind.ORPHANS)
            assert isinstance(node, OrphanNode)
            assert not node.inos[index]
            node.inos[index] = ino

        def done() -> None:
            del self._free[len(self._free) - len(places) :]
            for ino, place in zip(inos, places, strict=True):
                self.where[ino] = place
                self.unlisted.pop(ino, None)

        tx.after(done)

    def remove(self, tx: Tx, ino: int) -> None:
        place = self.where.get(ino)
        if place is None:
            tx.after(lambda: self.unlisted.pop(ino, None))
            return
        node = tx.edit(self.covered, place[0], Kind.ORPHANS)
        assert isinstance(node, OrphanNode)
        assert node.inos[place[1]] == ino
        node.inos[place[1]] = 0

        def done() -> None:
            del self.where[ino]
            self._free.append(place)
            if self.unlisted and not self._listing:
                self._listing = True
                self.core.runtime.spawn(self._list_more, "orphans")

        tx.after(done)

    async def _list_more(self) -> None:
        """There is room for some of what is only in memory."""
        try:
            while self.unlisted and self._free:
                await self.core.run(
                    lambda tx: self.enter(tx, list(islice(self.unlisted, len(self._free))))
                )
        except (FsError, BarredError):
            pass
        finally:
            self._listing = False

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
        if self.stopped or ino in self._pending or not self.holds(ino):
            return
        self._pending.add(ino)
        self._queue.append(ino)
        if self._workers < REAPERS_MAX:
            self._workers += 1
            self.core.runtime.spawn(self._work, "orphans")

    def reap_all(self) -> None:
        for ino in list(self.where):
            self.reap_soon(ino)

    async def _work(self) -> None:
        try:
            while self._queue:
                await self._reap(self._queue.popleft())
                self._tell()
        finally:
            self._workers -= 1
            self._tell()

    def _tell(self) -> None:
        """A worker is done with an inode, or for good."""
        if self._progress is not None:
            self._progress.set()
            self._progress = None

    async def _wait_for_worker(self) -> None:
        if self._workers:
            event = self._progress = self._progress or self.core.runtime.event()
            await event.wait()

    async def stop(self) -> None:
        """Free what nobody has open, then nothing more; what stands in the list is met again by
        the next mount."""
        while self._workers:
            await self._wait_for_worker()
        self.stopped = True

    async def _reap(self, ino: int) -> None:
        """Free an orphan unless somebody has it open. It takes no lock that waits for the last
        close: a worker that did would keep others from being freed."""
        core = self.core
        state = core.table.get(ino)
        lock = core.locks.get(open_lock_name(ino), core)
        alone = again = True
        try:
            if not state.open_count:
                await state.hold(Mode.EX)
                try:
                    alone = await self._reap_alone(state, lock)
                finally:
                    state.release(Mode.EX)
        except (FsError, BarredError):
            again = False  # It stays in the list; the next mount or fsck meets it again.
        if not alone:
            core.runtime.spawn(lambda: self._wait_for_others(ino, lock), "orphan")
            return
        self._pending.discard(ino)
        if again and not state.open_count:  # else the last close_ref comes here again
            self.reap_soon(ino)

    async def _wait_for_others(self, ino: int, lock: CachedLock) -> None:
        """Until every other mount has closed it. It is only tried: behind one who waits for EX
        others would wait who open the file, and thereby those who have it open."""
        core = self.core
        pause_s = TRY_FIRST_S
        self._trying += 1
        try:
            while True:
                await core.runtime.sleep(pause_s)
                if self.stopped:
                    return
                if await core.locks.try_lock(lock.name, Mode.EX, poke=True) is not None:
                    lock.release(Mode.EX)
                    break
                pause_s = min(2 * pause_s, TRY_MAX_S * max(1, self._trying / TRIES_MAX))
        except (FsError, BarredError):
            return
        finally:
            self._trying -= 1
        self._pending.discard(ino)
        self.reap_soon(ino)

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
    """Move the entries of a slot that nobody uses into our own list, as many as it takes; how many.
    The other slot's blocks are on the disk when this returns."""
    if slot == orphans.covered.number:
        return 0
    covered = Covered(slot, None)
    moved: list[int] = []
    nodes = await read_orphans(core, slot, first_block + HEADER_BLOCKS)
    for node in nodes:
        covered.nodes[node.block] = node
        if any(node.inos) and orphans.room:
            moved += await core.run(lambda tx, n=node: _move(tx, orphans, covered, n))  # type: ignore[misc]
    if moved:
        await core.journal.checkpoint()
        for ino in moved:
            orphans.reap_soon(ino)
    return len(moved)


def _move(tx: Tx, orphans: Orphans, covered: Covered, node: OrphanNode) -> list[int]:
    """Move entries of a block of another slot; those that were moved."""
    twin = tx.edit(covered, node.block, Kind.ORPHANS)
    assert isinstance(twin, OrphanNode)
    taken: list[int] = []
    for index, ino in enumerate(twin.inos):
        if ino and len(taken) < orphans.room:
            twin.inos[index] = 0
            if not orphans.holds(ino):
                taken.append(ino)
    orphans.enter(tx, taken)
    return taken
