"""Which block belongs to what, as found by walking; compared with the maps at the end."""

from __future__ import annotations

from collections.abc import Iterable

from cfs.format import FIRST_GROUP_BLOCK, Superblock
from cfs.nodes import BlockState


class Claims:
    """One byte per block: what it is used for (`BlockState`, FREE: unclaimed)."""

    def __init__(self, superblock: Superblock) -> None:
        self.superblock = superblock
        self.states = bytearray(superblock.total_blocks)
        self.conflicts: dict[int, bool] = {}
        """Blocks that were claimed again, and whether metadata is one of the claimants."""
        self.take(0, FIRST_GROUP_BLOCK + 1, BlockState.META)
        for group in range(1, superblock.group_count):
            self.take(superblock.group_block(group), 1, BlockState.META)
        self.take(superblock.backup_block, 1, BlockState.META)

    def take(self, first: int, count: int, state: BlockState) -> None:
        self.states[first : first + count] = bytes((state,)) * count

    def is_free(self, block: int) -> bool:
        return not self.states[block]

    def exist(self, first: int, count: int) -> bool:
        return first > 0 < count and first + count <= len(self.states)

    def claim(self, first: int, count: int, state: BlockState) -> bool:
        """Take blocks that exist; False if something else has some of them. Those are conflicts;
        metadata is stronger than data."""
        taken = self.states[first : first + count]
        if taken.count(0) == count:
            self.take(first, count, state)
            return True
        for block, before in enumerate(taken, first):
            if before:
                meta = BlockState.META in (before, state)
                self.conflicts[block] = self.conflicts.get(block, False) or meta
            if before != BlockState.META:
                self.states[block] = state
        return False

    def release(self, blocks: Iterable[int]) -> None:
        """These blocks are used no more."""
        for block in blocks:
            self.states[block] = BlockState.FREE

    def of_group(self, group: int) -> bytearray:
        """The claims of one group."""
        base = group * self.superblock.group_blocks
        return self.states[base : base + self.superblock.group_length(group)]
