"""What a new file system looks like, as blocks to write. Nothing here touches a device."""

from __future__ import annotations

import stat
from typing import NamedTuple

import msgspec

from cfs.attributes import BLOCK_BYTES
from cfs.format import (
    DEVICE_BLOCKS_MIN,
    FEATURES_MADE,
    FIRST_GROUP_BLOCK,
    GROUP_BLOCKS_MAX,
    GROUP_BLOCKS_MIN,
    GROUP_BLOCKS_STEP,
    SLOT_TABLE_BLOCK,
    SLOTS_MAX,
    SUPERBLOCK_BLOCK,
    Superblock,
)
from cfs.journal_format import JOURNAL_BLOCKS_MIN
from cfs.nodes import BlockState, GroupNode, InodeNode, SlotsNode, Tree
from cfs.stage import (
    clear_log,
    empty_group,
    find_superblock_copy,
    format_journal,
    usable_blocks,
)
from cluster.device import BlockDevice, Buffer
from cluster.errors import NoSpaceError, UsageError

JOURNALS_DEFAULT = 4
JOURNAL_BYTES_DEFAULT = 32 << 20
GROUPS_WANTED = 32
ROOT_BLOCK = FIRST_GROUP_BLOCK + 1


class Choices(msgspec.Struct, frozen=True):
    """What the administrator decides."""

    uuid: bytes
    hash_seed: bytes
    now_ns: int
    label: str = ""
    journals: int = JOURNALS_DEFAULT
    journal_bytes: int = 0
    group_blocks: int = 0


def choose_group_blocks(blocks: int) -> int:
    """Small enough that several mounts find groups of their own, and room for a journal."""
    wanted = max(blocks // GROUPS_WANTED, GROUP_BLOCKS_MIN)
    if blocks >= GROUP_BLOCKS_MAX * 4:
        wanted = GROUP_BLOCKS_MAX
    return min(wanted - wanted % GROUP_BLOCKS_STEP, GROUP_BLOCKS_MAX)


def choose_journal_blocks(blocks: int, group_blocks: int, journals: int, asked: int) -> int:
    """The asked size; else 32 MiB, less on a small device: all journals take an eighth at most."""
    room = group_blocks - 64
    if asked:
        chosen = asked // BLOCK_BYTES
        if not JOURNAL_BLOCKS_MIN <= chosen <= room:
            raise UsageError(f"a journal here has {JOURNAL_BLOCKS_MIN * 4} KiB to {room * 4} KiB")
        return chosen
    share = blocks // 8 // journals
    return max(min(JOURNAL_BYTES_DEFAULT // BLOCK_BYTES, share, room), JOURNAL_BLOCKS_MIN)


class Plan(NamedTuple):
    """What mkfs writes."""

    journals: list[tuple[int, int]]
    """First block and length of each; their logs are cleared."""
    writes: list[tuple[int, Buffer]]
    """(block, bytes) of everything else; the superblock comes last, so that a device is a file
    system only when all else is written."""


def plan(device_blocks: int, choices: Choices) -> Plan:
    """Lay a file system out. Raises UsageError if the device is too small."""
    if device_blocks < DEVICE_BLOCKS_MIN:
        raise NoSpaceError(f"a file system needs at least {DEVICE_BLOCKS_MIN * 4 // 1024} MiB")
    if not 1 <= choices.journals <= SLOTS_MAX:
        raise UsageError(f"1 to {SLOTS_MAX} journals")
    if len(choices.label.encode()) > 63:
        raise UsageError("a label has at most 63 bytes")
    asked = choices.group_blocks
    if asked and (not GROUP_BLOCKS_MIN <= asked <= GROUP_BLOCKS_MAX or asked % GROUP_BLOCKS_STEP):
        raise UsageError(f"groups of {asked} blocks are not possible")
    group_blocks = choices.group_blocks or choose_group_blocks(device_blocks)
    most = min(GROUP_BLOCKS_MAX, device_blocks)
    if not GROUP_BLOCKS_MIN <= group_blocks <= most or group_blocks % GROUP_BLOCKS_STEP:
        raise UsageError(f"a group has a multiple of {GROUP_BLOCKS_STEP} blocks, at most {most}")
    total = usable_blocks(device_blocks, group_blocks)
    superblock = Superblock(
        uuid=choices.uuid,
        label=choices.label,
        hash_seed=choices.hash_seed,
        group_blocks=group_blocks,
        total_blocks=total,
        root_ino=ROOT_BLOCK,
        version=1,
        created_ns=choices.now_ns,
        features_incompatible=FEATURES_MADE,
    )
    fs = superblock.fs
    groups = [empty_group(superblock, number) for number in range(superblock.group_count)]
    _take(groups[0], 0, ROOT_BLOCK + 1)
    groups[0].last_generation = 1
    _take(groups[0], superblock.backup_block, 1)
    size = choose_journal_blocks(total, group_blocks, choices.journals, choices.journal_bytes)
    places = [_place_journal(superblock, groups, size, n) for n in range(choices.journals)]
    writes: list[tuple[int, Buffer]] = []
    for slot, place in enumerate(places):
        writes += format_journal(fs, slot, place)
    writes.append((SLOT_TABLE_BLOCK, SlotsNode(SLOT_TABLE_BLOCK, 1, places).encode(fs, 0)))
    writes.append((ROOT_BLOCK, root_inode(choices.now_ns).encode(fs, 0)))
    writes += [(group.block, group.encode(fs, 0)) for group in groups]
    for block in (superblock.backup_block, SUPERBLOCK_BLOCK):
        writes.append((block, superblock.encode(block)))
    return Plan(places, writes)


def root_inode(now_ns: int) -> InodeNode:
    root = InodeNode(ROOT_BLOCK, 1, 1)
    root.mode = stat.S_IFDIR | 0o755
    root.nlink = 2
    root.size = BLOCK_BYTES
    root.parent = ROOT_BLOCK
    root.root = Tree(0, [], [], 0)
    root.atime_ns = root.mtime_ns = root.ctime_ns = root.birth_ns = now_ns
    return root


def _take(group: GroupNode, index: int, count: int) -> None:
    group.states[index : index + count] = bytes((BlockState.META,)) * count
    group.free = group.states.count(BlockState.FREE)


def _place_journal(
    superblock: Superblock, groups: list[GroupNode], size: int, number: int
) -> tuple[int, int]:
    """Journals start at groups spread over the device, so that mounts do not meet there."""
    start = number * len(groups) // SLOTS_MAX
    order = [*groups[start:], *groups[:start]]
    for group in order:
        at = group.states.find(bytes(size))
        if at >= 0:
            _take(group, at, size)
            return int(group.owner) * superblock.group_blocks + at, size
    raise NoSpaceError(
        "the device is too small for so many journals of this size", hint="fewer (-j), smaller (-J)"
    )


async def _destroy_superblocks(device: BlockDevice) -> None:
    """Also the copy of an earlier file system: who is interrupted leaves nothing that a mount would
    take for it and show with holes."""
    block = SUPERBLOCK_BLOCK
    while block:
        await device.write(block * BLOCK_BYTES, bytes(BLOCK_BYTES))
        await device.flush()
        copy = await find_superblock_copy(device)
        block = copy.backup_block if copy is not None else 0


async def write_plan(device: BlockDevice, whole: Plan) -> None:
    """Destroy what is recognisable, write everything, and the superblock behind a flush."""
    await _destroy_superblocks(device)
    for place in whole.journals:
        await clear_log(device, place)
    body, last = whole.writes[:-1], whole.writes[-1]
    for start in range(0, len(body), 128):
        part = body[start : start + 128]
        await device.write_many([(block * BLOCK_BYTES, data) for block, data in part])
    await device.flush()
    await device.write(last[0] * BLOCK_BYTES, last[1])
    await device.flush()
