"""Damage: what a mount answers, what fsck says, what a repair saves. The classes are those of the
corrupter (`tests/corrupter`); longer runs: python -m tests.corrupter."""

from __future__ import annotations

import errno
import re

import pytest

from tests.corrupter import blocks
from tests.corrupter.image import Image
from tests.corrupter.probe import probe
from tests.corrupter.table import TABLE, Damage
from tests.corrupter.world import World, build

pytestmark = pytest.mark.trio
assert blocks

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
        assert lines
        for line in lines:
            assert re.search(damage.told, line), line
            assert "fsck.cfs --repair" in line
    else:
        assert not lines
    assert answers.written == (name not in NO_NEW_FILES)


NO_NEW_FILES = {"root directory zeroed", "every group flipped"}
