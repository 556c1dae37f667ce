"""Where a mount touches what all mounts share: begin, recovery, one more journal, growth.

Begin, another journal and growth happen under the control lock `C` in EX. Recovery of a dead member
does not: it is done by one member at a time by the order of the group's events, and ends with the
write that makes the journal free.
"""

from __future__ import annotations

import contextlib
import errno

import msgspec

from cfs import journal_format
from cfs.attributes import BLOCK_BYTES
from cfs.core import Core
from cfs.errors import REMEDY, CorruptionError, FsError
from cfs.format import (
    FEATURES_MADE,
    FIRST_GROUP_BLOCK,
    GROUP_BLOCKS_MAX,
    GROUP_BLOCKS_MIN,
    GROUP_BLOCKS_STEP,
    SLOT_TABLE_BLOCK,
    SLOTS_MAX,
    SUPERBLOCK_BLOCK,
    Feature,
    Kind,
    Superblock,
    decode_superblock_untrusted,
    open_block_untrusted,
)
from cfs.journal import Journal
from cfs.journal_format import (
    HEADER_BLOCKS,
    HEADER_TURNS,
    LOG_OFFSET,
    ORPHAN_BLOCKS,
    JournalHeader,
)
from cfs.nodes import (
    ORPHANS_PER_BLOCK,
    BlockState,
    GroupNode,
    OrphanNode,
    SlotsNode,
    decode_node_untrusted,
    mapped_blocks_untrusted,
)
from cfs.orphans import Orphans, adopt
from cfs.replay import Replayed, Replayer
from cfs.transaction import NeedSpace, Tx
from cluster.device import BlockDevice, Buffer
from cluster.errors import BusyError, RefusedError
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.locks import Mode

NOBODY = Instance(NodeId(0), Incarnation(0), InstanceNo(0))
LAST_GROUP_BLOCKS_MIN = 16
"""A shorter last group is not worth its block: those blocks are left out."""
CLEAR_BLOCKS = 1024
MAPS_AT_ONCE = 256


async def read_superblock(device: BlockDevice) -> Superblock:
    """The newer superblock of the two, or the one that can be read. Raises CorruptionError if there
    is none."""
    if device.size_bytes < (SUPERBLOCK_BLOCK + 1) * BLOCK_BYTES:
        raise CorruptionError(f"no cfs file system fits into {device.size_bytes} bytes")
    data = await device.read(SUPERBLOCK_BLOCK * BLOCK_BYTES, BLOCK_BYTES)
    try:
        found = decode_superblock_untrusted(SUPERBLOCK_BLOCK, data)
    except CorruptionError as error:
        copy = await find_superblock_copy(device)
        if copy is None:
            raise error
        return copy
    return await _newer_copy(device, found)


async def _newer_copy(device: BlockDevice, found: Superblock) -> Superblock:
    """The copy is written first: after a crash it alone may know how large the file system is."""
    block = found.backup_block
    if (block + 1) * BLOCK_BYTES <= device.size_bytes:
        with contextlib.suppress(CorruptionError):  # told by whoever mounts or checks
            data = await device.read(block * BLOCK_BYTES, BLOCK_BYTES)
            copy = decode_superblock_untrusted(block, data)
            if copy.uuid == found.uuid and copy.version > found.version:
                return copy
    return found


def need_mountable(superblock: Superblock) -> None:
    """Raises RefusedError if this is nothing to mount."""
    if superblock.features_incompatible & Feature.REPAIRING:
        raise RefusedError(
            "a repair of this file system was begun and has not ended",
            hint="run fsck.cfs --repair again",
        )
    if superblock.features_incompatible & Feature.METADATA_ONLY:
        raise RefusedError(
            "this was restored from a dump of metadata: there is no data in it",
            hint="fsck.cfs can check it",
        )


async def find_superblock_copy(device: BlockDevice) -> Superblock | None:
    """The copy, found without the superblock: it is in the last block of group 0, whose size is a
    multiple of `GROUP_BLOCKS_STEP`. What only looks like one (the copy of a file system that was
    here before, a file's content) does not fit the slot table and the groups."""
    blocks = device.size_bytes // BLOCK_BYTES
    last = min(GROUP_BLOCKS_MAX, blocks)
    sizes = range(GROUP_BLOCKS_MIN, last + 1, GROUP_BLOCKS_STEP)
    ranges = [((size - 1) * BLOCK_BYTES, BLOCK_BYTES) for size in sizes]
    best: Superblock | None = None
    for size, data in zip(sizes, await device.read_many(ranges), strict=True):
        try:
            found = decode_superblock_untrusted(size - 1, data)
        except CorruptionError:
            continue
        newer = best is None or (found.version, found.created_ns) > (best.version, best.created_ns)
        if found.group_blocks == size and newer and await _fits(device, found):
            best = found
    return best


async def _fits(device: BlockDevice, superblock: Superblock) -> bool:
    """Whether other structures are where a superblock says that they are."""
    places = {SLOT_TABLE_BLOCK: (Kind.SLOTS, 0), FIRST_GROUP_BLOCK: (Kind.GROUP, 0)}
    if superblock.group_count > 1:
        places[superblock.group_block(1)] = (Kind.GROUP, 1)
    fitting = 0
    for block, expected in places.items():
        if (block + 1) * BLOCK_BYTES > device.size_bytes:
            return False
        data = await device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        try:
            header = open_block_untrusted(superblock.fs, block, data)
        except CorruptionError:
            continue
        fitting += (header.kind, header.owner) == expected
    return fitting * 2 > len(places)


def format_journal(fs: int, slot: int, place: tuple[int, int]) -> list[tuple[int, Buffer]]:
    """(block, bytes) of an empty journal; the log itself may hold anything (see `clear_log`)."""
    first = place[0]
    writes: list[tuple[int, Buffer]] = []
    for change in range(1, HEADER_TURNS + 1):
        header = JournalHeader(slot, False, NOBODY, 0, 1, change, place[1])
        writes.append(journal_format.encode_header(fs, header, first))
    for index in range(ORPHAN_BLOCKS):
        block = first + HEADER_BLOCKS + index
        node = OrphanNode(block, slot, 1, [0] * ORPHANS_PER_BLOCK)
        writes.append((block, node.encode(fs, 0)))
    return writes


async def clear_log(device: BlockDevice, place: tuple[int, int]) -> None:
    """Write zeroes over the log of a new journal: a store that allocates when it is written has its
    blocks before the first commit waits for them, and nothing of an earlier journal is left."""
    first, end = place[0] + LOG_OFFSET, sum(place)
    for block in range(first, end, CLEAR_BLOCKS):
        size = min(CLEAR_BLOCKS, end - block) * BLOCK_BYTES
        await device.write(block * BLOCK_BYTES, bytes(size))


async def write_blocks(device: BlockDevice, writes: list[tuple[int, Buffer]]) -> None:
    await device.write_many([(block * BLOCK_BYTES, data) for block, data in writes])


async def begin(core: Core) -> tuple[Journal, list[tuple[int, tuple[int, int]]]]:
    """Replay what nobody owns and take a journal; the caller holds `C`. Returns the journal and
    the slots that are free (with their places)."""
    replayer = Replayer(core.device, core.superblock)
    environment = core.environment
    chosen: tuple[JournalHeader, tuple[int, int]] | None = None
    free: list[tuple[int, tuple[int, int]]] = []
    try:
        places = (await core.slots()).journals
    except FsError as error:
        raise CorruptionError(str(error), hint=REMEDY) from error
    for slot, place in enumerate(places):
        header = await replayer.header(place)
        for block in await replayer.unreadable_copies(place):
            rotten = CorruptionError(f"block {block} is no journal header", block=block)
            core.damaged(rotten, block, f"a copy of the header of journal {slot}")
        if header.in_use and (
            header.owner == environment.owner or environment.is_barred(header.owner)
        ):
            await replayer.replay(place, header)
            await replayer.finish(place, header)
            header = await replayer.header(place)
            core.control.nodes.clear()
        if header.in_use:
            continue
        if chosen is None:
            chosen = header, place
        else:
            free.append((slot, place))
    await _settle_superblock(core, same=await core.refresh_superblock())
    if chosen is None:
        raise BusyError(
            "all journals of this file system are in use",
            hint="a mounted node makes another one within seconds; try again",
        )
    header, place = chosen
    mine = JournalHeader(
        header.slot, True, environment.owner, header.tail, header.sequence, header.change + 1,
        place[1],
    )  # fmt: skip
    block, data = journal_format.encode_header(core.fs, mine, place[0])
    await core.device.write(block * BLOCK_BYTES, data)
    await core.device.flush()
    core.space.first = header.slot * len(core.space.groups) // max(len(places), 1)
    return Journal(core.fs, core.counter, core.runtime, place, mine), free


async def journals_of(
    device: BlockDevice, replayer: Replayer, fs: int, dead: Instance
) -> list[tuple[tuple[int, int], JournalHeader]]:
    """The journals that a dead instance left, as (place, header). Raises CorruptionError when a
    header cannot be read and none of the others is its: it may be just that one, and nothing of
    the dead may be released before its journal is replayed."""
    found = []
    damage: CorruptionError | None = None
    data = await device.read(SLOT_TABLE_BLOCK * BLOCK_BYTES, BLOCK_BYTES)
    for place in _places(fs, data):
        try:
            header = await replayer.header(place)
        except CorruptionError as error:
            damage = error
            continue
        if header.in_use and header.owner == dead:
            found.append((place, header))
    if damage is not None and not found:
        raise damage
    return found


async def recover(
    core: Core, orphans: Orphans, dead: Instance, others: frozenset[Instance] = frozenset()
) -> list[Replayed]:
    """Replay the journals of a dead instance and take its orphans over. `others`: all who are dead.
    One of them may have died while it did the same: what it has taken out of the list of orphans,
    and put into its own, is in its journal only, which is therefore replayed first."""
    await core.refresh_superblock()  # the dead one may have grown the file system
    replayer = Replayer(core.device, core.superblock)
    for other in sorted(others - {dead}):
        with contextlib.suppress(CorruptionError):  # told when it is this one's turn
            for place, header in await journals_of(core.device, replayer, core.fs, other):
                await replayer.replay(place, header)
    done = []
    for place, header in await journals_of(core.device, replayer, core.fs, dead):
        done.append(await replayer.replay(place, header))
        await adopt(core, orphans, header.slot, place[0])
        await replayer.finish(place, header)
    return done


def _places(fs: int, data: bytes) -> list[tuple[int, int]]:
    node = decode_node_untrusted(open_block_untrusted(fs, SLOT_TABLE_BLOCK, data), data)
    if not isinstance(node, SlotsNode):
        raise FsError(errno.EIO, "the slot table is damaged")
    return node.journals


async def ensure_free_slot(core: Core) -> bool:
    """Make another journal if none is free for the next mount; True if one was made. Takes `C`."""
    lock = core.control.lock
    assert lock is not None
    await lock.hold(Mode.EX)
    try:
        slots = await core.slots()
        replayer = Replayer(core.device, core.superblock)
        for place in slots.journals:
            with contextlib.suppress(CorruptionError):  # told by whoever needs that journal
                if not (await replayer.header(place)).in_use:
                    return False
        if len(slots.journals) >= SLOTS_MAX:
            return False
        await add_journal(core, slots)
        return True
    finally:
        lock.release(Mode.EX)


async def add_journal(core: Core, slots: SlotsNode) -> None:
    """One journal more, as large as the first one if there is such a run of blocks."""
    wanted = slots.journals[0][1]
    place = await core.run(lambda tx: _allocate_journal(core, tx, wanted))
    await core.journal.checkpoint()
    await clear_log(core.device, place)
    await write_blocks(core.device, format_journal(core.fs, len(slots.journals), place))
    await core.device.flush()

    def enter(tx: Tx) -> None:
        node = tx.edit(core.control, SLOT_TABLE_BLOCK, Kind.SLOTS)
        assert isinstance(node, SlotsNode)
        node.journals.append(place)

    await core.run(enter)
    await core.journal.checkpoint()


def _allocate_journal(core: Core, tx: Tx, wanted: int) -> tuple[int, int]:
    space = core.space
    for group in list(space.mine.values()):
        node = space.open(tx, group)
        if node is None:
            continue
        at = node.states.find(bytes(wanted))
        if at >= 0:
            node.states[at : at + wanted] = bytes((BlockState.META,)) * wanted
            node.free -= wanted
            return group.number * space.superblock.group_blocks + at, wanted
    if wanted // 2 >= journal_format.JOURNAL_BLOCKS_MIN and not space.candidates():
        return _allocate_journal(core, tx, wanted // 2)
    raise NeedSpace(wanted)


# -- growth -------------------------------------------------------------------------------------


def usable_blocks(device_blocks: int, group_blocks: int) -> int:
    """How many blocks of a device a file system uses."""
    rest = device_blocks % group_blocks
    return device_blocks - (rest if rest < LAST_GROUP_BLOCKS_MIN else 0)


def empty_group(superblock: Superblock, number: int, change: int = 1) -> GroupNode:
    """A group where only its own block is taken."""
    states = bytearray(superblock.group_length(number))
    block = superblock.group_block(number)
    states[block % superblock.group_blocks] = BlockState.META
    return GroupNode(block, number, change, 0, states)


async def grow(core: Core) -> None:
    """Use all of the device. New groups first, then the superblock that names them, then the rest
    of what was the last group, now or when a growth was ended by a crash: that costs nothing but
    another `grow`."""
    lock = core.control.lock
    assert lock is not None
    await lock.hold(Mode.EX)
    try:
        await _settle_superblock(core, same=await core.refresh_superblock())
        old = core.superblock
        total = usable_blocks(core.device.size_bytes // BLOCK_BYTES, old.group_blocks)
        if total > old.total_blocks:
            await _grow_to(core, old, total)
        for number in await _short_groups(core):
            await _extend_group(core, number)
    finally:
        lock.release(Mode.EX)


async def _write_superblock(core: Core, new: Superblock) -> None:
    for block in (new.backup_block, SUPERBLOCK_BLOCK):
        await write_blocks(core.device, [(block, new.encode(block))])
        await core.device.flush()
    core.superblock = new
    core.space.extend(new)


async def _settle_superblock(core: Core, *, same: bool) -> None:
    """Both copies are the newer one (`same`: they are), and let a file system of an older version
    have what this one may write into it."""
    new = core.superblock
    features = new.features_incompatible | FEATURES_MADE
    if features != new.features_incompatible:
        new = msgspec.structs.replace(new, features_incompatible=features, version=new.version + 1)
    if (new != core.superblock or not same) and not core.options.read_only:
        await _write_superblock(core, new)


async def _grow_to(core: Core, old: Superblock, total: int) -> None:
    new = msgspec.structs.replace(old, total_blocks=total, version=old.version + 1)
    writes: list[tuple[int, Buffer]] = []
    for number in range(old.group_count, new.group_count):
        node = empty_group(new, number)
        writes.append((node.block, node.encode(core.fs, 0)))
    for start in range(0, len(writes), MAPS_AT_ONCE):
        await write_blocks(core.device, writes[start : start + MAPS_AT_ONCE])
    await core.device.flush()
    await _write_superblock(core, new)


async def _short_groups(core: Core) -> list[int]:
    """Those whose map ends before they do."""
    superblock, short = core.superblock, []
    for start in range(0, superblock.group_count, MAPS_AT_ONCE):
        numbers = range(start, min(start + MAPS_AT_ONCE, superblock.group_count))
        blocks = [superblock.group_block(number) for number in numbers]
        ranges = [(block * BLOCK_BYTES, BLOCK_BYTES) for block in blocks]
        maps = await core.device.read_many(ranges)
        for number, block, data in zip(numbers, blocks, maps, strict=True):
            with contextlib.suppress(CorruptionError):  # told by whoever needs that map
                if mapped_blocks_untrusted(core.fs, block, data) < superblock.group_length(number):
                    short.append(number)
    return short


async def _extend_group(core: Core, number: int) -> None:
    """The group that was the last one may be longer now."""
    group = core.space.groups[number]
    wanted = core.superblock.group_length(number)

    def extend(tx: Tx) -> None:
        node = tx.group(group)
        more = wanted - len(node.states)
        if more > 0:
            node.states += bytes(more)
            node.free += more

    await core.run(extend)
    await core.journal.checkpoint()


async def describe_journals(core: Core) -> list[dict[str, object]]:
    """For `cfsctl journals`: every slot, who uses it, and how much of its log is in use."""
    data = await core.device.read(SLOT_TABLE_BLOCK * BLOCK_BYTES, BLOCK_BYTES)
    replayer = Replayer(core.device, core.superblock)
    result: list[dict[str, object]] = []
    for slot, place in enumerate(_places(core.fs, data)):
        try:
            header = await replayer.header(place)
        except CorruptionError:
            header = JournalHeader(slot, False, NOBODY, 0, 0, 0, place[1])
            result.append(_describe(header, place, "damaged", mine=False))
            continue
        state = "in use" if header.in_use else "free"
        result.append(_describe(header, place, state, mine=header.slot == core.journal.slot))
    return result


def _describe(
    header: JournalHeader, place: tuple[int, int], state: str, *, mine: bool
) -> dict[str, object]:
    return {
        "slot": header.slot,
        "block": place[0],
        "blocks": place[1],
        "log_blocks": place[1] - LOG_OFFSET,
        "state": state,
        "owner": str(header.owner) if header.in_use else "",
        "mine": mine,
        "sequence": header.sequence,
    }
