"""Allocation maps under check: what they say against what was found in use."""

from __future__ import annotations

from cfs.errors import CorruptionError
from cfs.format import open_block_untrusted
from cfs.fsck.volume import GENERATION_GAP, Step, Volume
from cfs.nodes import BlockState, GroupNode, decode_node_untrusted
from cfs.sanity import COUNTER_MAX, check_node_untrusted

TOLD_MAX = 8
_FREED = bytes(0 if state == BlockState.FREEING else state for state in range(256))


class MapChecker:
    """Compares and corrects the maps of all groups."""

    def __init__(self, volume: Volume, unsure: dict[int, bytes]) -> None:
        self.volume = volume
        self.session = volume.session
        self.unsure = unsure

    async def run(self) -> None:
        self._take_back()
        groups = range(len(self.volume.maps))
        for group in groups:
            node = self.volume.maps[group]
            expected = self.volume.claims.of_group(group)
            if node is None:
                await self._anew(group, expected)
            else:
                await self._compare(group, node, expected)
            self.session.report.free_blocks += expected.count(BlockState.FREE)
            self.session.show("checking maps", group, len(groups))

    def _take_back(self) -> None:
        """Images from a journal that came over what turned out to be data."""
        for block in self.unsure:
            if self.volume.claims.states[block] != BlockState.META:
                self.volume.device.written.pop(block, None)
                self.volume.steps.pop(block, None)

    async def _anew(self, group: int, expected: bytearray) -> None:
        if self.session.refused:
            self.session.give_up(f"the block of group {group} waits for what was refused")
            return
        if not await self.session.fix(f"the block of group {group} is damaged", "Make it anew"):
            return
        block = self.volume.superblock.group_block(group)
        last = max(self.volume.generations.get(group, 0) + GENERATION_GAP, self._given(group))
        self._put(GroupNode(block, group, GENERATION_GAP, last, bytearray(expected)), expected)

    async def _compare(self, group: int, node: GroupNode, expected: bytearray) -> None:
        repair = await self._block(group)
        missing = len(expected) - len(node.states)
        if missing:
            # A crash between growing the superblock and the group: the rest is out of use.
            self.session.report.note(f"group {group} can still grow: see cfsctl grow")
        states = node.states.translate(_FREED)
        found = bytearray(expected[: len(states)])
        if self.session.refused:
            for index, state in enumerate(states[: len(found)]):
                found[index] = found[index] or state
        if missing and any(expected[len(states) :]):
            states += bytes(missing)
            found = expected
        if states != found:
            repair |= await self._differences(group, node.states, found)
        last = self.volume.generations.get(group, 0)
        repair |= self._given(group) > node.last_generation
        if node.last_generation < last:
            text = f"group {group} has counted generations up to {node.last_generation} only"
            repair |= await self.session.fix(text, f"Count from {last}")
        if repair:
            keep_freeing = bytearray(
                BlockState.FREEING if now == BlockState.FREEING and not new else new
                for now, new in zip(node.states.ljust(len(found), b"\0"), found, strict=True)
            )
            counted = node.last_generation
            if counted >= COUNTER_MAX:
                counted = last + GENERATION_GAP
            generation = max(counted, last, self._given(group))
            self._put(
                GroupNode(node.block, group, node.change, generation, keep_freeing), node.states
            )

    def _given(self, group: int) -> int:
        return self.volume.last_generations.get(group, 0)

    async def _block(self, group: int) -> bool:
        """The block of a group as a mount would judge it."""
        number = self.volume.superblock.group_block(group)
        data = await self.volume.read(number)
        try:
            node = decode_node_untrusted(open_block_untrusted(self.volume.fs, number, data), data)
            check_node_untrusted(node, self.volume.superblock)
        except CorruptionError as error:
            return await self.session.fix(str(error), f"Write the block of group {group} anew")
        return False

    async def _differences(self, group: int, states: bytearray, found: bytearray) -> bool:
        base = group * self.volume.superblock.group_blocks
        moved = self.volume.moved
        now = states.ljust(len(found), b"\0")
        swept = now.translate(_FREED)
        repair = False
        runs: list[tuple[int, int, int, int]] = []
        for index in range(len(found)):
            if found[index] == swept[index]:
                continue
            repair = True
            if base + index in moved:
                continue
            what = (now[index], found[index])
            if runs and runs[-1][1:] == (index, *what):
                runs[-1] = (runs[-1][0], index + 1, *what)
            else:
                runs.append((index, index + 1, *what))
        agreed = not runs
        for first, end, said, use in runs[:TOLD_MAX]:
            which = f"block {base + first} is"
            if end - first > 1:
                which = f"blocks {base + first} to {base + end - 1} are"
            text = (
                f"{which} {BlockState(use).name} by use but {BlockState(said).name} in the map of "
                f"group {group}"
            )
            agreed |= await self.session.fix(text, "Correct the map")
        if len(runs) > TOLD_MAX:
            text = (
                f"{len(runs) - TOLD_MAX} more runs of blocks of group {group} differ from its map"
            )
            agreed |= await self.session.fix(text, "Correct the map")
        return repair and agreed

    def _put(self, node: GroupNode, before: bytearray) -> None:
        """The map as it shall be, and one that calls in use what was or will be."""
        union = node.clone()
        union.change += 1
        for index, state in enumerate(before[: len(union.states)]):
            if state in (BlockState.DATA, BlockState.META) and not union.states[index]:
                union.states[index] = state
        union.free = union.states.count(BlockState.FREE)
        union.freeing = union.states.count(BlockState.FREEING)
        self.volume.unions[node.block] = union
        node.change += 1
        self.volume.put(node, Step.FINAL)
