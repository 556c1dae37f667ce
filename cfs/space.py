"""The allocator: groups of blocks, each under its own lock.

A mount allocates from groups whose locks it has cached; it takes another group only when those are
full, first one that nobody uses. A freed block becomes FREEING. It is used again only when a map
that says FREEING (or FREE) is certainly on the disk: from then on a replay leaves the block alone,
whatever old images of it stand in any journal (`cfs.replay`), and no committed transaction still
refers to it. While a dead mount is being recovered nothing FREEING is used again at all, so that
the replayer sees maps that stand still.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cfs.cache import GroupState, InodeState
from cfs.errors import CorruptionError
from cfs.format import Superblock
from cfs.lock_names import NEIGHBOURS, group_lock_name, inode_lock_name
from cfs.nodes import BlockState, GroupNode, InodeNode
from cfs.transaction import NeedGroup, NeedInodes, NeedSpace, Tx
from cfs.tree import TreeSpace
from cluster.locks import LockHooks, LockManager, Mode

RUN_BLOCKS_MAX = 4096
_ZEROES = bytes(RUN_BLOCKS_MAX)
_TWOS = bytes(1 if value == BlockState.FREEING else 0 for value in range(256))


def usable_freeing(current: bytes | bytearray, durable: bytes) -> int:
    """Which blocks are FREEING in both maps, as an integer with a byte (0 or 1) for each block."""
    return int.from_bytes(current.translate(_TWOS), "little") & int.from_bytes(
        durable.translate(_TWOS), "little"
    )


def find_run(states: bytearray, count: int, hint: int) -> tuple[int, int] | None:
    """A run of free blocks: `count` of them, or a half, a quarter... where there is no such run."""
    size = min(count, RUN_BLOCKS_MAX)
    while size:
        pattern = _ZEROES[:size]
        at = states.find(pattern, hint)
        if at < 0 and hint:
            at = states.find(pattern)
        if at >= 0:
            return at, size
        size //= 2
    return None


class Space:
    """The groups of one mount and the inodes it keeps ready."""

    def __init__(
        self, superblock: Superblock, locks: LockManager, hooks: LockHooks, first: int = 0
    ) -> None:
        self.superblock = superblock
        self._locks = locks
        self._hooks = hooks
        self.groups: list[GroupState] = []
        self.mine: dict[int, GroupState] = {}
        self.first = first
        self.recovering = False
        self.on_changed: Callable[[], None] = lambda: None
        """A map was changed; called when the transaction is applied."""
        self.pool: deque[InodeState] = deque()
        self._pooled: set[int] = set()
        self.extend(superblock)

    def extend(self, superblock: Superblock) -> None:
        """Know the groups of a superblock that may have grown."""
        self.superblock = superblock
        for number in range(len(self.groups), superblock.group_count):
            lock = self._locks.get(group_lock_name(number), self._hooks)
            self.groups.append(GroupState(number, lock, superblock.group_block(number)))

    # -- the groups at hand ----------------------------------------------------------------------

    def granted(self, group: GroupState) -> None:
        group.clear()
        self.mine[group.number] = group

    def gone(self, group: GroupState) -> None:
        """The lock leaves: forget what it protected."""
        node = group.node
        if node is not None:
            group.believed_free = node.free + node.freeing
        group.clear()
        self.mine.pop(group.number, None)

    def staying(self) -> list[GroupState]:
        """The groups at hand that nobody else is about to get: what can be used at once."""
        return [g for g in self.mine.values() if not g.lock.demoting and not g.damaged]

    def available(self, group: GroupState) -> int:
        """How many blocks the group can give now."""
        node = group.node
        if group.damaged:
            return 0
        if node is None:
            return max(group.believed_free, 0)
        if node.freeing and group.durable is not None and not self.recovering:
            return node.free + usable_freeing(node.states, group.durable).bit_count()
        return node.free

    def total_free(self) -> int:
        """Free blocks in all groups as far as this mount knows, those not yet for use included."""
        total = 0
        for group in self.groups:
            node = group.node
            if node is not None:
                total += node.free + node.freeing
            elif group.believed_free >= 0:
                total += group.believed_free
            else:
                total += self.superblock.group_length(group.number)
        return total

    def open(self, tx: Tx, group: GroupState) -> GroupNode | None:
        """The group for an allocation, or None if its lock cannot be held at once."""
        if group.damaged:
            return None
        try:
            node = tx.group(group)
        except NeedGroup:
            return None
        tx.after(self.on_changed)
        durable = group.durable
        if node.freeing and durable is not None and not self.recovering:
            both = usable_freeing(node.states, durable)
            if both:
                length = len(node.states)
                swept = int.from_bytes(node.states, "little") - both * BlockState.FREEING
                node.states = bytearray(swept.to_bytes(length, "little"))
                count = both.bit_count()
                node.free += count
                node.freeing -= count
            change = node.change
            tx.after(lambda: self._swept(group, change))
        return node

    @staticmethod
    def _swept(group: GroupState, change: int) -> None:
        group.durable = None
        group.swept_change = change

    # -- allocation ------------------------------------------------------------------------------

    def allocate(self, tx: Tx, goal: int, count: int) -> tuple[int, int]:
        """Up to `count` blocks in a row for data, at `goal` if that is free (0: anywhere)."""
        length = self.superblock.group_blocks
        if goal and goal // length < len(self.groups):
            group = self.groups[goal // length]
            if group.number in self.mine:
                found = self._at_goal(tx, group, goal - group.number * length, count)
                if found is not None:
                    return found
        for group in list(self.mine.values()):
            if not self.available(group) and group.node is not None:
                continue
            node = self.open(tx, group)
            if node is None or not node.free:
                continue
            run = find_run(node.states, count, group.data_hint or len(node.states) // 8)
            if run is not None:
                group.data_hint = run[0] + run[1]
                return self._take(node, group, run, BlockState.DATA)
        raise NeedSpace(count)

    def _at_goal(self, tx: Tx, group: GroupState, index: int, count: int) -> tuple[int, int] | None:
        cached = group.node
        if cached is not None and not self.available(group):
            return None
        node = self.open(tx, group)
        if node is None or index >= len(node.states):
            return None
        wanted = node.states[index : index + min(count, RUN_BLOCKS_MAX)]
        run = len(wanted) - len(wanted.lstrip(b"\0"))
        if not run:
            found = find_run(node.states, count, index)
            return None if found is None else self._take(node, group, found, BlockState.DATA)
        return self._take(node, group, (index, run), BlockState.DATA)

    def _take(
        self, node: GroupNode, group: GroupState, run: tuple[int, int], state: BlockState
    ) -> tuple[int, int]:
        index, count = run
        node.states[index : index + count] = bytes((state,)) * count
        node.free -= count
        return group.number * self.superblock.group_blocks + index, count

    def allocate_meta(self, tx: Tx) -> tuple[int, int]:
        """One block for metadata: (block, generation)."""
        for group in list(self.mine.values()):
            if not self.available(group) and group.node is not None:
                continue
            node = self.open(tx, group)
            if node is None or not node.free:
                continue
            run = find_run(node.states, 1, group.meta_hint)
            if run is not None:
                run = self._beside_pool(node, group, run[0]), 1
                group.meta_hint = run[0]
                block, _ = self._take(node, group, run, BlockState.META)
                node.last_generation += 1
                return block, node.last_generation
        raise NeedSpace(1)

    def _beside_pool(self, node: GroupNode, group: GroupState, index: int) -> int:
        """A free block that is no inode to be, if there is one after the free block `index`."""
        base = group.number * self.superblock.group_blocks
        at = index
        while at >= 0 and base + at in self._pooled:
            at = node.states.find(b"\0", at + 1)
        return index if at < 0 else at

    def new_inode(self, tx: Tx) -> tuple[InodeState, InodeNode]:
        """A fresh inode from the pool, its lock held in EX until the transaction is closed."""
        while self.pool:
            state = self.pool[0]
            length = self.superblock.group_blocks
            group = self.groups[state.ino // length]
            node = self.open(tx, group) if group.number in self.mine else None
            index = state.ino % length
            usable = node is not None and node.states[index] == BlockState.FREE
            if usable and not state.pins and not state.open_count and state.try_hold(Mode.EX):
                assert node is not None
                self._take(node, group, (index, 1), BlockState.META)
                node.last_generation += 1
                tx.keep(state, Mode.EX)
                tx.after(self._pop_pool)
                state.nodes.clear()
                state.sole = True
                inode = InodeNode(state.ino, node.last_generation)
                tx.add(state, inode)
                return state, inode
            self._pop_pool()
        raise NeedInodes

    def _pop_pool(self) -> None:
        state = self.pool.popleft()
        self._pooled.discard(state.ino)

    def free(self, tx: Tx, block: int, count: int) -> None:
        """Give blocks of one group back."""
        length = self.superblock.group_blocks
        group = self.groups[block // length]
        node = tx.group(group)
        index = block % length
        run = node.states[index : index + count]
        if len(run) != count or run.count(BlockState.FREE) or run.count(BlockState.FREEING):
            raise CorruptionError(
                f"blocks {block}+{count} are in use but free in the map of group {group.number}",
                block=group.block,
            )
        node.states[index : index + count] = bytes((BlockState.FREEING,)) * count
        node.freeing += count
        tx.after(self.on_changed)

    # -- more groups, more inodes ----------------------------------------------------------------

    def candidates(self) -> list[GroupState]:
        """Groups of others that may have room, those near this mount's own start first."""
        count = len(self.groups)
        order = [self.groups[(self.first + step) % count] for step in range(count)]
        return [g for g in order if g.number not in self.mine and g.believed_free]

    def pool_candidates(self, count: int) -> list[int]:
        """Free blocks of groups at hand that could become inodes: those whose locks need no message
        if there are any, else any."""
        for home in (True, False):
            result: list[int] = []
            for group in self.staying():
                node = group.node
                if node is not None and node.free and len(result) < count:
                    self._candidates(group, node, count, result, home=home)
            if result:
                break
        return result

    def _candidates(
        self, group: GroupState, node: GroupNode, count: int, result: list[int], *, home: bool
    ) -> None:
        """Add free blocks of one group, from where the last search ended."""
        states, base = node.states, group.number * self.superblock.group_blocks
        start = group.inode_hint
        for first, end in ((start, len(states)), (0, start)):
            at = states.find(b"\0", first, end)
            while at >= 0:
                block = base + at
                run_end = (block | NEIGHBOURS - 1) + 1 - base
                if not home or self._locks.is_home(inode_lock_name(block)):
                    while 0 <= at < run_end and len(result) < count:
                        if base + at not in self._pooled:
                            result.append(base + at)
                        at = states.find(b"\0", at + 1, end)
                    if len(result) >= count:
                        group.inode_hint = result[-1] - base
                        return
                else:
                    at = states.find(b"\0", run_end, end)

    def add_to_pool(self, state: InodeState) -> None:
        if state.ino not in self._pooled:
            self._pooled.add(state.ino)
            self.pool.append(state)

    def loaded(self, group: GroupState, node: GroupNode) -> None:
        """A group's block came from the disk, so what it says is durable."""
        group.durable = bytes(node.states) if node.freeing else None
        group.swept_change = 0
        group.meta_hint = group.data_hint = group.inode_hint = 0

    def placed(self, node: GroupNode) -> None:
        """This image of a group is on the disk and flushed."""
        group = self.groups[node.owner]
        fresh = node.change >= group.swept_change
        if node.freeing and fresh and group.number in self.mine and group.nodes:
            group.durable = bytes(node.states)

    def tree_space(self, tx: Tx, inode: InodeNode) -> TreeSpace:
        """Allocate and free tree blocks of an inode, counted in its `blocks`."""

        def allocate() -> tuple[int, int]:
            found = self.allocate_meta(tx)
            inode.blocks += 1
            return found

        def free(block: int) -> None:
            self.free(tx, block, 1)
            inode.blocks -= 1

        return TreeSpace(allocate, free)
