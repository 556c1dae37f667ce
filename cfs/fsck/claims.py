"""Which block belongs to what, as found by walking; compared with the maps at the end."""

from __future__ import annotations

from cfs.format import FIRST_GROUP_BLOCK, Superblock
from cfs.fsck.report import Report
from cfs.nodes import BlockState


class Claims:
    """One byte per block: what it is used for (`BlockState`, FREE: unclaimed)."""

    def __init__(self, superblock: Superblock, report: Report) -> None:
        self.superblock = superblock
        self.report = report
        self.states = bytearray(superblock.total_blocks)
        self._take(0, FIRST_GROUP_BLOCK + 1)
        for group in range(1, superblock.group_count):
            self._take(superblock.group_block(group), 1)
        self._take(superblock.backup_block, 1)

    def _take(self, first: int, count: int) -> None:
        self.states[first : first + count] = bytes((BlockState.META,)) * count

    def claim(self, first: int, count: int, state: BlockState, who: str) -> bool:
        """Say that `who` uses the blocks; False if they are out of range or taken."""
        if first <= 0 or count <= 0 or first + count > len(self.states):
            self.report.error(f"{who} uses blocks {first}+{count}, which do not exist")
            return False
        taken = self.states[first : first + count]
        good = taken.count(0) == count
        if not good:
            self.report.error(f"{who} uses blocks {first}+{count}, which something else uses too")
        self.states[first : first + count] = bytes((state,)) * count
        return good

    def compare(self, group: int, states: bytes | bytearray) -> None:
        """Hold the map of a group against the claims."""
        base = group * self.superblock.group_blocks
        claimed = self.states[base : base + len(states)]
        if len(claimed) != self.superblock.group_length(group):
            self.report.error(f"group {group} has a map of {len(states)} blocks")
            return
        expected = bytes(states).replace(bytes((BlockState.FREEING,)), b"\0")
        if claimed == expected:
            return
        wrong = [i for i in range(len(claimed)) if claimed[i] != expected[i]]
        for index in wrong[:8]:
            self.report.error(
                f"block {base + index} is {BlockState(claimed[index]).name} by use but "
                f"{BlockState(states[index]).name} in the map of group {group}"
            )
        if len(wrong) > 8:
            self.report.error(f"{len(wrong) - 8} more blocks of group {group} differ from its map")
