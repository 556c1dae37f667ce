"""Random damage, and repairs that are cut: what no table thinks of."""

from __future__ import annotations

import random

from cfs.attributes import BLOCK_BYTES
from cfs.fsck.checker import check, repair
from cfs.fsck.report import Report
from cfs.fsck.session import Consent, Session
from cluster.device_memory import LoggedWrite, MemoryDevice, durable_positions
from tests.corrupter.image import Image, reseal
from tests.corrupter.probe import probe
from tests.corrupter.table import Damage
from tests.corrupter.world import World

DAMAGES_MAX = 8


async def repaired(device: MemoryDevice) -> Report:
    """Repair everything; a check finds nothing afterwards."""
    report = await repair(device, Session(Report(), Consent.ALL))
    assert not report.left_count, report.errors
    again = await check(device)
    assert again.clean, again.errors
    return report


async def random_damage(world: World, seed: int) -> list[str]:
    """One run; what was done. Raises AssertionError (or whatever breaks) if it does not end well:
    the mount goes on or refuses, the repair ends in a clean file system that mounts."""
    rng = random.Random(seed)
    device = (world.crashed if rng.random() < 0.4 else world.device).snapshot()
    image = Image(device, world.superblock)
    blocks = await image.metadata_blocks()
    done = [await _spoil(image, world, rng, blocks) for _ in range(rng.randint(1, DAMAGES_MAX))]
    await probe(device.snapshot(), list(world.facts))
    mounted = device.snapshot()
    await probe(mounted, list(world.facts))
    for spoiled in (device, mounted):
        # Without any superblock there is nothing to repair; the campaign leaves one copy whole.
        await repaired(spoiled)
        answers = await probe(spoiled, [])
        assert not answers.refused
        assert not answers.told
        assert answers.written
        assert (await check(spoiled)).clean
    return done


async def _spoil(image: Image, world: World, rng: random.Random, blocks: list[int]) -> str:
    block = rng.choice([block for block in blocks if block != world.superblock.backup_block])
    how = rng.choice(["flip", "zero", "noise", "stale", "copy", "patch", "patch", "patch"])
    data = bytearray(await image.get(block))
    if how == "flip":
        data[rng.randrange(BLOCK_BYTES)] ^= 1 << rng.randrange(8)
    elif how == "zero":
        data = bytearray(BLOCK_BYTES)
    elif how == "noise":
        start = rng.randrange(0, BLOCK_BYTES, 512)
        data[start : start + 512] = rng.randbytes(512)
    elif how == "stale":
        data = bytearray(await Image(world.early, world.superblock).get(block))
    elif how == "copy":
        data = bytearray(await image.get(rng.choice(blocks)))
    else:
        for _ in range(rng.randint(1, 4)):
            at = rng.choice([rng.randrange(64, 420), rng.randrange(20, BLOCK_BYTES)])
            size = rng.choice([1, 1, 2, 4, 8])
            value = rng.choice([bytes(size), b"\xff" * size, rng.randbytes(size)])
            data[at : at + size] = value[: BLOCK_BYTES - at]
        data = bytearray(reseal(data))
    await image.put(block, data)
    return f"{how} {block}"


async def cut_repairs(world: World, damage: Damage, seed: int, cuts_max: int) -> int:
    """Cut the repair of one class after some of its writes (in all ways that the flushes allow);
    each time the next repair ends well and saves the same. How many cuts."""
    rng = random.Random(seed)
    source = (world.crashed if damage.crashed else world.device).snapshot()
    await damage.plant(Image(source, world.superblock), world)
    recorder = MemoryDevice(source.size_bytes, log_writes=True)
    recorder._current = source._current.copy()
    recorder._durable = source._current.copy()
    await repaired(recorder)
    log = list(recorder.log)
    points = range(len(log) + 1)
    chosen = rng.sample(points, min(cuts_max, len(points)))
    for count in chosen:
        cut = source.snapshot()
        durable = durable_positions(log, count)
        for position, entry in enumerate(log[:count]):
            if isinstance(entry, LoggedWrite) and (position in durable or rng.random() < 0.6):
                cut._current.write(entry.offset_bytes, entry.data)
        await repaired(cut)
        answers = await probe(cut, list(world.facts))
        assert not answers.refused
        for path, expected in world.facts.items():
            if not damage.is_in(path, damage.lost):
                assert answers.found[path] == expected, (count, path)
    return len(chosen)
