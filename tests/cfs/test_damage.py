"""Damage: what a mount answers, what fsck says, what a repair saves. The classes are those of the
corrupter (`tests/corrupter`); longer runs: python -m tests.corrupter."""

from __future__ import annotations

import errno
import re

import msgspec
import pytest

from cfs.format import Feature
from cfs.fsck.checker import check, repair
from cfs.fsck.report import Report
from cfs.fsck.session import Consent, NeedsHumanError, Session
from cluster.device_memory import MemoryDevice
from cluster.errors import RefusedError
from tests.cfs.harness import mounted
from tests.corrupter import blocks, content, names, tables
from tests.corrupter.campaign import cut_repairs, random_damage, repaired
from tests.corrupter.image import Image
from tests.corrupter.probe import probe
from tests.corrupter.table import TABLE, Damage
from tests.corrupter.world import World, build

pytestmark = pytest.mark.trio
assert all((blocks, content, names, tables))

EIO = ("errno", errno.EIO)
worlds: list[World] = []


async def the_world() -> World:
    """Built once; every test spoils a copy."""
    if not worlds:
        worlds.append(await build())
    return worlds[0]


async def spoiled(damage: Damage) -> tuple[World, Image]:
    world = await the_world()
    device = (world.crashed if damage.crashed else world.device).snapshot()
    image = Image(device, world.superblock)
    await damage.plant(image, world)
    return world, image


@pytest.mark.parametrize("name", list(TABLE))
async def test_a_mount_answers_eio_for_what_is_damaged_and_goes_on(name: str) -> None:
    damage = TABLE[name]
    world, image = await spoiled(damage)
    answers = await probe(image.device, list(world.facts))
    if damage.refused:
        assert re.search(damage.refused, answers.refused), answers.refused
        return
    assert not answers.refused
    for path, expected in world.facts.items():
        found = answers.found[path]
        if damage.is_in(path, damage.fails):
            assert found == EIO, path
        elif not (found == EIO and damage.is_in(path, damage.may_fail)):
            assert found == expected or damage.is_in(path, damage.differs), path
    lines = [text for _, text in answers.told]
    if damage.told:
        assert lines or damage.told_by_chance
        for line in lines:
            assert re.search(damage.told, line), line
            assert "fsck.cfs --repair" in line
    else:
        assert not lines
    assert answers.written == (name not in NO_NEW_FILES)


NO_NEW_FILES = {"root directory zeroed", "every group flipped"}


async def all_yes(question: str) -> bool:
    return True


@pytest.mark.parametrize("name", list(TABLE))
async def test_fsck_tells_what_is_damaged_and_changes_nothing(name: str) -> None:
    damage = TABLE[name]
    _, image = await spoiled(damage)
    before = image.device.snapshot()
    report = await check(image.device)
    if damage.says:
        assert any(re.search(damage.says, error) for error in report.errors), report.errors
        assert len(report.errors) <= damage.errors_max, report.errors
    else:
        assert report.clean, report.errors
    assert bool(report.lossy_count) == damage.lossy, report.errors
    assert await same(before, image.device)


@pytest.mark.parametrize("name", list(TABLE))
async def test_a_repair_saves_what_can_be_saved(name: str) -> None:
    damage = TABLE[name]
    world, image = await spoiled(damage)
    session = Session(Report(), Consent.SAFE)
    if damage.lossy:
        with pytest.raises(NeedsHumanError):
            await repair(image.device, session)
        session = Session(Report(), Consent.ALL)
    report = await repair(image.device, session)
    assert not report.left_count, report.errors
    assert report.fixed_count == report.error_count
    assert bool(report.fixed_count) == bool(damage.says)
    again = await check(image.device)
    assert again.clean, again.errors
    answers = await probe(image.device, [*world.facts, "/lost+found"])
    assert not answers.refused
    assert not answers.told
    assert answers.written
    for path, expected in world.facts.items():
        if not damage.is_in(path, damage.lost):
            assert answers.found[path] == expected, path
    assert report.reconnected == damage.reconnected or damage.reconnected < 0
    assert (await check(image.device)).clean


LOSSY = [name for name, damage in TABLE.items() if damage.lossy][::4]


@pytest.mark.parametrize("name", LOSSY)
async def test_what_is_refused_is_left_and_can_be_repaired_later(name: str) -> None:
    damage = TABLE[name]
    world, image = await spoiled(damage)
    asked: list[str] = []

    async def no(question: str) -> bool:
        asked.append(question)
        return False

    report = await repair(image.device, Session(Report(), Consent.ASK, no))
    assert asked
    assert len(set(asked)) == len(asked)
    assert report.left_count
    assert any(re.search(damage.says, error) for error in (await check(image.device)).errors)
    await repaired(image.device)
    answers = await probe(image.device, list(world.facts))
    for path, expected in world.facts.items():
        if not damage.is_in(path, damage.lost):
            assert answers.found[path] == expected, path


async def same(one: MemoryDevice, other: MemoryDevice) -> bool:
    size = one.size_bytes
    return await one.read(0, size) == await other.read(0, size)


CUT = [name for index, name in enumerate(TABLE) if index % 6 == 1]


@pytest.mark.parametrize("name", CUT)
async def test_a_repair_that_is_cut_is_ended_by_the_next(name: str) -> None:
    """Cut at two places each; `python -m tests.corrupter` cuts every class everywhere."""
    assert await cut_repairs(await the_world(), TABLE[name], 1, 2)


FOUND_BY = [127]  # one header copy damaged, of a journal that is replayed


@pytest.mark.parametrize("seed", [*range(8), *FOUND_BY])
async def test_random_damage_ends_in_a_clean_file_system(seed: int) -> None:
    print(f"seed {seed}: python -m tests.corrupter --seed {seed} --seeds 1 --cuts 0")
    print(await random_damage(await the_world(), seed))


async def test_no_mount_while_a_repair_has_not_ended() -> None:
    world = await the_world()
    device = world.device.snapshot()
    mark = world.superblock.features_incompatible | Feature.REPAIRING
    new = msgspec.structs.replace(world.superblock, features_incompatible=mark, version=9)
    for block in (16, new.backup_block):
        await Image(device, new).put(block, new.encode(block))
    with pytest.RaisesGroup(RefusedError, flatten_subgroups=True):
        async with mounted(device):
            raise AssertionError("mounted")
    await repaired(device)
    async with mounted(device) as fs:
        assert await fs.readdir(fs.root_ino, 0, 5)
