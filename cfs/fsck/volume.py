"""The volume under check: reads in large pieces, repairs kept in memory until they are written.

The order in which repairs reach the disk (`write`) makes every moment of it repairable:
0. the mark in the superblock: no mount until a repair has ended,
1. blocks that nothing refers to yet (new tree blocks),
2. maps that call in use what was or will be,
3. what refers to them (inodes, tree blocks in their places, orphan lists),
4. maps as they shall be, and the slot table,
5. journal headers: free,
6. the superblocks without the mark.
Between the steps stands a flush. A run that is cut anywhere is followed by another that finds what
was not done yet: everything is derived from what is on the disk.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

import msgspec

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import HASH_SHIFT, SUPERBLOCK_BLOCK, Feature, Superblock
from cfs.fsck.claims import Claims
from cfs.fsck.overlay import OverlayDevice
from cfs.fsck.session import Session
from cfs.journal import joined
from cfs.nodes import BlockState, GroupNode, Node
from cluster.device import BlockDevice, Buffer

RUN_BLOCKS_MAX = 256
GAP_BLOCKS_MAX = 8
"""Reading so many blocks for nothing is cheaper than one more request."""
RANGES_MAX = 16
WRITE_BLOCKS_MAX = 1024
GENERATION_GAP = 1 << 20
"""So much later than any that was met a map that is made anew begins to count."""


class Step(enum.IntEnum):
    """When a block is written."""

    FRESH = 1
    UNION = 2
    PLACE = 3
    FINAL = 4
    JOURNAL = 5


class NoRoomError(Exception):
    """No block is certainly free."""


def runs_of(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """(first, count) of as few reads as make sense for these blocks."""
    result: list[tuple[int, int]] = []
    first = last = -1
    for block in sorted(set(blocks)):
        if first >= 0 and block - last <= GAP_BLOCKS_MAX and block - first < RUN_BLOCKS_MAX:
            last = block
            continue
        if first >= 0:
            result.append((first, last - first + 1))
        first = last = block
    if first >= 0:
        result.append((first, last - first + 1))
    return result


class Volume:
    """One file system on one device."""

    def __init__(self, device: BlockDevice, superblock: Superblock, session: Session) -> None:
        self.base = device
        self.device = OverlayDevice(device)
        self.superblock = superblock
        self.fs = superblock.fs
        self.is_dump = bool(superblock.features_incompatible & Feature.METADATA_ONLY)
        """From a dump: no data, no values of attributes."""
        self.names_hashed = self.is_dump and not any(superblock.hash_seed)
        """From a dump with hashed names: cookies do not fit, short names may be the same."""
        self.session = session
        self.claims = Claims(superblock)
        self.steps: dict[int, Step] = {}
        self.unions: dict[int, GroupNode] = {}
        """Maps for step 2, by block."""
        self.maps: list[GroupNode | None] = []
        """Group blocks as they were read; None: damaged."""
        self.generations: dict[int, int] = {}
        """The highest generation of metadata that was met, by group."""
        self.moved: set[int] = set()
        """Blocks that the repair itself has taken or given back: no errors of the maps."""
        self.last_generations: dict[int, int] = {}
        """The last generation that the repair has given out, by group."""
        self.rewrite_superblocks = False
        self._ahead: dict[int, bytes] = {}
        self._free_from: dict[int, int] = {}

    # -- reading ---------------------------------------------------------------------------------

    async def read_blocks(self, blocks: Iterable[int]) -> dict[int, bytes]:
        """Blocks, none of them beyond the end, read in large pieces."""
        wanted = set(blocks)
        ahead = self._ahead
        result = {block: ahead[block] for block in wanted if block in ahead} if ahead else {}
        runs = runs_of(block for block in wanted if block not in result)
        for start in range(0, len(runs), RANGES_MAX):
            part = runs[start : start + RANGES_MAX]
            ranges = [(first * BLOCK_BYTES, count * BLOCK_BYTES) for first, count in part]
            for (first, count), data in zip(part, await self.device.read_many(ranges), strict=True):
                for index in range(count):
                    if first + index in wanted:
                        at = index * BLOCK_BYTES
                        result[first + index] = data[at : at + BLOCK_BYTES]
        return result

    async def read_ahead(self, blocks: Iterable[int]) -> None:
        """Read what is going to be read in small pieces; forgets what was read ahead before."""
        self._ahead = {}
        self._ahead = await self.read_blocks(block for block in blocks if self.exists(block))

    async def read(self, block: int) -> bytes:
        return await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)

    def cookie_fits(self, cookie: int, name: bytes) -> bool:
        """Whether a name (of a directory or an attribute) may stand at a cookie."""
        return self.names_hashed or cookie >> HASH_SHIFT == self.superblock.name_hash(name)

    def exists(self, block: int) -> bool:
        return 0 < block < self.superblock.total_blocks

    def saw(self, block: int, generation: int) -> None:
        """Metadata of this generation is in use."""
        group = self.superblock.group_of(block)
        self.generations[group] = max(self.generations.get(group, 0), generation)

    # -- changing --------------------------------------------------------------------------------

    def put(self, node: Node, step: Step) -> None:
        """A block that is to be written; its version grows, whatever was there."""
        node.change += step is not Step.FRESH
        self.put_raw(node.block, node.encode(self.fs, 0), step)

    def put_raw(self, block: int, data: bytes, step: Step) -> None:
        self._ahead.pop(block, None)
        self.device.written[block] = data
        self.steps[block] = step

    def allocate(self, state: BlockState = BlockState.META) -> tuple[int, int]:
        """A block that is free by its map and by use: (block, generation). Raises NoRoomError."""
        for group, node in enumerate(self.maps):
            at = self._free_from.get(group, 0)
            while node is not None:
                at = node.states.find(b"\0", at)
                if at < 0:
                    break
                block = group * self.superblock.group_blocks + at
                at += 1
                self._free_from[group] = at
                if self.claims.is_free(block):
                    self.claims.take(block, 1, state)
                    self.moved.add(block)
                    return block, self.next_generation(group)
        raise NoRoomError

    def release(self, blocks: Iterable[int]) -> None:
        """The repair has no more use for these blocks."""
        self.claims.release(blocks)
        self.moved.update(blocks)

    def next_generation(self, group: int) -> int:
        """For a block that is made anew."""
        node = self.maps[group]
        last = GENERATION_GAP if node is None else node.last_generation
        given = self.last_generations.get(group, 0)
        self.last_generations[group] = max(last, self.generations.get(group, 0), given) + 1
        return self.last_generations[group]

    # -- writing ---------------------------------------------------------------------------------

    @property
    def is_dirty(self) -> bool:
        return bool(self.steps or self.unions or self.rewrite_superblocks)

    async def write(self) -> None:
        """Make all repairs durable, in the order of the module's text."""
        await self._superblocks(self.superblock.features_incompatible | Feature.REPAIRING)
        done = 0
        total = len(self.steps) + len(self.unions)
        for step in Step:
            writes: list[tuple[int, Buffer]]
            if step is Step.UNION:
                writes = [(b, node.encode(self.fs, 0)) for b, node in self.unions.items()]
            else:
                chosen = [block for block, at in self.steps.items() if at is step]
                writes = [(block, self.device.written[block]) for block in chosen]
            for start in range(0, len(writes), WRITE_BLOCKS_MAX):
                part = joined(writes[start : start + WRITE_BLOCKS_MAX])
                await self.base.write_many(part)
                done += min(WRITE_BLOCKS_MAX, len(writes) - start)
                self.session.show("writing repairs", done, total)
            if writes:
                await self.base.flush()
        await self._superblocks(self.superblock.features_incompatible & ~Feature.REPAIRING)

    async def _superblocks(self, features: int) -> None:
        new = msgspec.structs.replace(
            self.superblock,
            features_incompatible=int(features),
            version=self.superblock.version + 1,
        )
        for block in (new.backup_block, SUPERBLOCK_BLOCK):
            await self.base.write(block * BLOCK_BYTES, new.encode(block))
            await self.base.flush()
        self.superblock = new


def need_block(volume: Volume, block: int) -> None:
    """Raises CorruptionError if there is no such block."""
    if not volume.exists(block):
        raise CorruptionError(f"block {block} does not exist")
