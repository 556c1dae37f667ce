"""The parts of a mount tied together: how operations run, how blocks come in, how locks go.

`see` runs a reading body, `run` a changing one; both are synchronous functions that raise for what
is missing (`cfs.transaction`). The hooks of the cluster locks are here too: what makes an inode, a
group or the control blocks clean before another member gets them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from cfs.attributes import BLOCK_BYTES, MountOptions
from cfs.cache import Covered, GroupState, InodeState, InodeTable
from cfs.damage import DamageLog, Versions, owner_of
from cfs.demand import SpaceDemand
from cfs.errors import CorruptionError, FsError
from cfs.format import SUPERBLOCK_BLOCK, Kind, Superblock, decode_superblock_untrusted
from cfs.format import open_block_untrusted as open_block
from cfs.journal import FlushCounter, Journal
from cfs.lock_names import CONTROL_LOCK, number_of, open_lock_name
from cfs.nodes import BlockState, GroupNode, InodeNode, Node, SlotsNode, decode_node_untrusted
from cfs.pages import DirtyPages
from cfs.sanity import check_node_untrusted
from cfs.seams import Environment, Event
from cfs.space import Space
from cfs.transaction import (
    Changed,
    Missing,
    NeedGroup,
    NeedInodes,
    NeedSpace,
    NeedWait,
    NotNow,
    Tx,
)
from cluster.device import BlockDevice, PromptDevice
from cluster.errors import BarredError, DeviceError
from cluster.locks import CachedLock, LockManager, Mode

T = TypeVar("T")
SPACE_ROUNDS_MAX = 16
"""How often one operation looks for more space before it is told that there is none."""
POOL_RETRY_S = 0.001
CLOCK_FOLLOW_MAX_NS = 1_000_000_000
"""How far the time stamps of this mount follow those of a node whose clock is ahead."""


class Core:
    """One mount's state; the mount stage attaches the journal before the first operation."""

    def __init__(
        self,
        device: BlockDevice,
        locks: LockManager,
        environment: Environment,
        options: MountOptions,
        superblock: Superblock,
    ) -> None:
        self.device = device
        self.prompt = device if isinstance(device, PromptDevice) else None
        self.locks = locks
        self.environment = environment
        self.runtime = environment.runtime
        self.kernel = environment.kernel
        self.options = options
        self.superblock = superblock
        self.fs = superblock.fs
        self.counter = FlushCounter(device)
        self.table = InodeTable(locks, self, options.inodes_cached_max)
        self.space = Space(superblock, locks, self)
        self.control = Covered(0, locks.get(CONTROL_LOCK, self))
        self.pages = DirtyPages(self.counter, self.runtime, options)
        self.demand = SpaceDemand(self)
        self.space.on_changed = self.demand.maps_changed
        self._journal: Journal | None = None
        self.error: BaseException | None = None
        self.damage = DamageLog(environment.damaged, self.runtime.now_ns)
        self.pages.on_lost = self._tell_of_loss
        self.versions = Versions()
        self.cold: set[int] = set()
        self.seen_ns = 0
        self._refilling = False
        self._filling: Event | None = None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None, "the mount stage has not ended"
        return self._journal

    def attach(self, journal: Journal) -> None:
        self._journal = journal
        journal.ordered = self.pages
        journal.on_placed = self.space.placed
        journal.on_error = self.fail

    def fail(self, error: BaseException) -> None:
        """The mount cannot go on."""
        if self.error is None:
            self.error = error
            self.kernel.failed(error)

    def _tell_of_loss(self, state: InodeState, pages: int) -> None:
        text = f"inode {state.ino}: the disk refused {pages} pages of data; they are lost"
        self.environment.damaged(state.ino, text)

    def now(self, previous_ns: int) -> int:
        """A time stamp that is later than the one it replaces, whatever the clocks of the nodes,
        and not earlier than what was seen of other nodes (`follow`)."""
        return max(self.environment.wall_clock_ns(), self.seen_ns, previous_ns + 1)

    def follow(self, stamp_ns: int) -> None:
        """Another node has changed something at its time `stamp_ns`: what changes here from now on
        is not earlier, unless the other clock is far ahead."""
        if self.seen_ns < stamp_ns < self.environment.wall_clock_ns() + CLOCK_FOLLOW_MAX_NS:
            self.seen_ns = stamp_ns

    def state(self, ino: int) -> InodeState:
        if not 0 < ino < 1 << 48:
            raise FsError(errno.ESTALE)
        return self.table.get(ino)

    # -- bodies ----------------------------------------------------------------------------------

    async def see(self, body: Callable[[], T]) -> T:
        """Run a reading body; the caller holds the locks of what it reads."""
        while True:
            try:
                return body()
            except Missing as missing:
                await self.load(missing)
            except CorruptionError as error:
                raise self.damaged(error) from error

    async def run(self, body: Callable[[Tx], T]) -> T:
        """Run a changing body and apply its changes; the caller holds the inode locks in EX."""
        groups: list[GroupState] = []
        held: set[int] = set()
        rounds = 0
        try:
            while True:
                if self.error is not None:
                    raise FsError(errno.EIO, str(self.error))
                if self.journal.running_full:
                    await self.journal.commit()
                tx = Tx(self.journal.running, held)
                try:
                    result = body(tx)
                    tx.apply()
                    # Others wait for nothing here: the recovery of who holds `S` is one of them.
                    if self.demand.untold and tx.changes_maps:
                        await self.demand.announced()
                    return result
                except Missing as missing:
                    tx.close()
                    if isinstance(missing.covered, GroupState):
                        await self._hold_group(missing.covered.number, groups, held)
                    await self._load_missing(missing)
                except NeedGroup as need:
                    tx.close()
                    await self._hold_group(need.number, groups, held)
                except NeedSpace:
                    tx.close()
                    self._release_groups(groups, held)
                    rounds += 1
                    await self.demand.more_space(rounds)
                except NeedWait as need:
                    tx.close()
                    self._release_groups(groups, held)
                    await need.wait()
                except CorruptionError as error:
                    raise self.damaged(error) from error
                finally:
                    tx.close()
        finally:
            self._release_groups(groups, held)

    def try_run(self, body: Callable[[Tx], T]) -> T:
        """As `run`, if nothing has to be waited for. Raises NotNow else: the waiting way then meets
        again whatever was in the way, damage included."""
        if self.error is not None or self.journal.running_full or not self.demand.told:
            raise NotNow
        tx = Tx(self.journal.running, set())
        try:
            result = body(tx)
            tx.apply()
        except (Missing, NeedGroup, NeedSpace, NeedInodes, NeedWait, Changed, CorruptionError):
            raise NotNow from None
        finally:
            tx.close()
        return result

    async def _hold_group(self, number: int, groups: list[GroupState], held: set[int]) -> None:
        """Hold one more group for the whole operation; always in ascending order, and never twice:
        who holds a group that another mount wants would wait for himself."""
        if number in held:
            return
        wanted = sorted({number, *held})
        if groups and number < groups[-1].number:
            self._release_groups(groups, held)
        for each in wanted:
            if each in held:
                continue
            group = self.group(each)
            await group.lock.hold(Mode.EX)
            groups.append(group)
            held.add(each)

    @staticmethod
    def _release_groups(groups: list[GroupState], held: set[int]) -> None:
        for group in groups:
            group.lock.release(Mode.EX)
        groups.clear()
        held.clear()

    def group(self, number: int) -> GroupState:
        if number >= len(self.space.groups):
            raise FsError(errno.EIO, f"group {number} does not exist")
        return self.space.groups[number]

    # -- blocks ----------------------------------------------------------------------------------

    async def load(self, missing: Missing) -> None:
        """Bring a block into the cache, once for all who wait for it. The caller holds no group."""
        covered = missing.covered
        if not isinstance(covered, GroupState):
            await self._load_missing(missing)
            return
        await covered.lock.hold(Mode.EX)
        try:
            await self._load_missing(missing)
        finally:
            covered.lock.release(Mode.EX)

    async def _load_missing(self, missing: Missing) -> None:
        """As `load`, under the lock of the block, which the caller holds."""
        covered = missing.covered
        try:
            await self._load(covered, missing.block, missing.kinds)
        except FsError:
            if not isinstance(covered, GroupState):
                raise
            covered.damaged = True  # Space is found elsewhere; frees are put off or refused.
            covered.believed_free = 0

    async def _load(self, covered: Covered, block: int, kinds: tuple[Kind, ...]) -> None:
        if block in covered.nodes:
            return
        waiting = covered.loading.get(block)
        if waiting is not None:
            await waiting.wait()
            return
        event = covered.loading[block] = self.runtime.event()
        try:
            assert self._journal is None or not self._journal.is_dirty(block)
            await self._read_node(covered, block, kinds)
        finally:
            del covered.loading[block]
            event.set()

    async def _read_node(self, covered: Covered, block: int, kinds: tuple[Kind, ...]) -> None:
        try:
            if block >= self.superblock.total_blocks:
                await self.refresh_superblock()
            if block >= self.superblock.total_blocks:
                raise CorruptionError(f"block {block} is beyond the end")
            data = await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
            node = await self._verify(covered, block, kinds, data)
        except CorruptionError as error:
            own = isinstance(covered, InodeState) and block == covered.number
            if own and not await self._is_metadata(block):
                raise FsError(errno.ESTALE, error.message) from error
            raise self.damaged(error, block, owner_of(covered, block)) from error
        except DeviceError as error:
            raise FsError(errno.EIO, error.message) from error
        if isinstance(node, InodeNode) and not node.mode:
            raise FsError(errno.ESTALE, f"inode {block} is gone")
        if block not in covered.nodes:
            covered.nodes[block] = node
            if isinstance(node, InodeNode):
                self.follow(node.ctime_ns)
            if isinstance(node, GroupNode):
                assert isinstance(covered, GroupState)
                self.space.loaded(covered, node)

    async def _verify(
        self, covered: Covered, block: int, kinds: tuple[Kind, ...], data: bytes
    ) -> Node:
        """The node in a block, if it is whole, this one, of its owner, the newest, and sensible."""
        header = open_block(self.fs, block, data)
        if header.kind not in kinds or header.owner != covered.number:
            raise CorruptionError(f"block {block} holds something else")
        if self.versions.is_stale(header):
            raise CorruptionError(f"block {block} is older than it was: a write to it was lost")
        node = decode_node_untrusted(header, data)
        try:
            check_node_untrusted(node, self.superblock)
        except CorruptionError:
            # Another mount may have grown the file system: then it makes sense after all.
            await self.refresh_superblock()
            check_node_untrusted(node, self.superblock)
        self.versions.note(node)
        return node

    async def _is_metadata(self, block: int) -> bool:
        """Whether the map says that a block holds metadata. A block that was an inode once may hold
        anything now; a block that is in use as metadata and is none is damaged. A map that says
        META in its place is true (rule 3 of `cfs.journal`), so no lock is needed."""
        if block >= self.superblock.total_blocks:
            return False
        group = self.space.groups[self.superblock.group_of(block)]
        node = group.node
        if node is None:
            data = await self.device.read(group.block * BLOCK_BYTES, BLOCK_BYTES)
            try:
                found = decode_node_untrusted(open_block(self.fs, group.block, data), data)
            except CorruptionError:
                return True
            if not isinstance(found, GroupNode):
                return True
            node = found
        index = block % self.superblock.group_blocks
        return index < len(node.states) and node.states[index] == BlockState.META

    def damaged(self, error: CorruptionError, block: int = 0, owner: str = "") -> FsError:
        """Tell of damage once; the error for who met it."""
        self.damage.report(block or error.block, owner, error.message)
        return FsError(errno.EIO, error.message)

    async def load_group(self, group: GroupState) -> GroupNode:
        """The group's block; the caller holds its lock."""
        await self._load(group, group.block, (Kind.GROUP,))
        node = group.node
        assert node is not None
        return node

    async def refresh_superblock(self) -> bool:
        """See whether another mount has grown the file system: what the newer copy says. False: the
        other one is older, because a crash came between the two."""
        places = (SUPERBLOCK_BLOCK, self.superblock.backup_block)
        ranges = [(block * BLOCK_BYTES, BLOCK_BYTES) for block in places]
        found = self.superblock
        versions: set[int] = set()
        for block, data in zip(places, await self.device.read_many(ranges), strict=True):
            try:
                copy = decode_superblock_untrusted(block, data)
            except CorruptionError as error:
                self.damaged(error, block, "a copy of the superblock")
                continue
            versions.add(copy.version)
            if copy.uuid == found.uuid and copy.version > found.version:
                found = copy
        if found.version > self.superblock.version:
            self.superblock = found
            self.space.extend(found)
        return len(versions) < len(places)

    async def slots(self) -> SlotsNode:
        """The slot table; the caller holds the control lock."""
        from cfs.format import SLOT_TABLE_BLOCK

        await self._load(self.control, SLOT_TABLE_BLOCK, (Kind.SLOTS,))
        node = self.control.nodes[SLOT_TABLE_BLOCK]
        assert isinstance(node, SlotsNode)
        return node

    # -- space -----------------------------------------------------------------------------------

    async def fill_pool(self, *, patient: bool) -> None:
        """Lock free blocks as inodes to be. `patient`: wait for locks, so the caller holds none.
        One at a time: two would only find each other's requests for the same locks in the way."""
        running = self._filling
        if running is not None:
            if patient:
                await running.wait()
            return
        self._filling = done = self.runtime.event()
        try:
            await self._fill_pool(patient=patient)
        finally:
            self._filling = None
            done.set()

    async def _fill_pool(self, *, patient: bool) -> None:
        space = self.space
        wanted = self.options.inode_pool
        rounds = 0
        while len(space.pool) < wanted:
            found = space.pool_candidates(wanted)
            if not found:
                if space.pool:
                    return
                rounds += 1
                await self.demand.more_space(rounds)
                if not self._sweep_for_pool() and rounds > SPACE_ROUNDS_MAX:
                    raise FsError(errno.ENOSPC)
                continue
            added = 0
            for ino in found[: wanted - len(space.pool)]:
                added += await self._add_to_pool(ino, patient=patient and not added)
            if not added:
                if not patient or space.pool:
                    return
                await self.runtime.sleep(POOL_RETRY_S)

    def _sweep_for_pool(self) -> bool:
        """Turn freed blocks that are usable again into free ones."""
        tx = Tx(self.journal.running, set())
        try:
            for group in list(self.space.mine.values()):
                node = group.node
                if node is not None and not node.free and self.space.available(group):
                    self.space.open(tx, group)
            tx.apply()
        except Missing:
            return False
        finally:
            tx.close()
        return any(g.node is not None and g.node.free for g in self.space.mine.values())

    async def _add_to_pool(self, ino: int, *, patient: bool) -> int:
        state = self.table.get(ino)
        if state.pins or state.open_count:
            return 0  # Somebody looks at what this block was; it is of no use until that is over.
        state.pins += 1
        try:
            if not state.lock.try_hold(Mode.EX):
                if patient:
                    await state.lock.hold(Mode.EX)
                elif await self.locks.try_lock(state.lock.name, Mode.EX) is None:
                    return 0
            state.lock.release(Mode.EX)
        finally:
            state.pins -= 1
        self.space.add_to_pool(state)
        return 1

    def refill_pool_soon(self) -> None:
        if len(self.space.pool) * 2 < self.options.inode_pool and not self._refilling:
            self._refilling = True
            self.runtime.spawn(self._refill, "inode pool")

    async def _refill(self) -> None:
        try:
            await self.fill_pool(patient=False)
        except (FsError, BarredError):
            pass  # The operation that needs an inode will meet the error itself.
        finally:
            self._refilling = False

    # -- hooks of the cluster locks --------------------------------------------------------------

    def is_dirty(self, state: Covered) -> bool:
        journal = self._journal
        return journal is not None and any(journal.is_dirty(block) for block in state.nodes)

    def granted(self, lock: CachedLock, mode: Mode) -> None:
        kind = lock.name[:1]
        if kind == b"I":
            ino = number_of(lock.name)
            state = self.table.granted(ino)
            if state is not None:
                state.nodes.clear()
            self.kernel.granted(ino, mode)
        elif kind == b"A":
            self.space.granted(self.space.groups[number_of(lock.name)])
        elif kind == b"C":
            self.control.nodes.clear()

    async def demote(self, lock: CachedLock, mode: Mode) -> None:
        kind = lock.name[:1]
        if kind == b"I":
            await self._demote_inode(number_of(lock.name), lock, mode)
        elif kind == b"A":
            group = self.space.groups[number_of(lock.name)]
            if self.is_dirty(group):
                await self.journal.checkpoint()
            self.space.gone(group)
        elif kind == b"S":
            await self.demand.demote(mode)
        elif kind == b"C":
            if self.is_dirty(self.control):
                await self.journal.checkpoint()
            self.control.nodes.clear()

    async def _demote_inode(self, ino: int, lock: CachedLock, mode: Mode) -> None:
        state = self.table.find(ino)
        if state is not None:
            state.sole = False
            if mode == Mode.NL and state.open_count and not state.open_held:
                await self._hold_open(state)
        await self.kernel.revoke(ino, mode)
        if state is None:
            return
        if lock.mode == Mode.EX:
            await self.clean(state)
        # A late holder (`hold_demoting`) may have changed something meanwhile: the cache of locks
        # then calls this hook once more.
        if mode == Mode.NL and not state.pages and not self.is_dirty(state):
            state.nodes.clear()
            state.clean.clear()
            self.cold.add(ino)

    async def _hold_open(self, state: InodeState) -> None:
        """Keep an open inode from being freed when its lock is gone. Nobody holds its open lock in
        EX for long but with the inode's lock in EX, which is still here."""
        lock = self.locks.get(open_lock_name(state.ino), self)
        await lock.hold(Mode.PR)
        if state.open_count:
            state.open_held = True
        else:
            lock.release(Mode.PR)

    def release_open(self, state: InodeState) -> None:
        """Nobody here has the inode open any more."""
        if state.open_held:
            state.open_held = False
            self.locks.get(open_lock_name(state.ino), self).release(Mode.PR)

    async def clean(self, state: InodeState) -> None:
        """The inode as it is now is in its place on the disk, data and metadata, flushed."""
        await self.pages.flush(state, durable=True)
        if state.spoiled:
            await self.pages.isolate(state)
        if self.is_dirty(state):
            await self.journal.checkpoint()
        else:
            await self.counter.ensure(state.written_at)
