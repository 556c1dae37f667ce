"""Byte-range locks in their simulated world: seeds without a bug, and bugs that seeds must find."""

import pytest

from dlm.modes import Result
from tests.sim.range_mutants import MUTANTS, hunt
from tests.sim.range_world import run

HUNT_SEEDS = 250


@pytest.mark.parametrize("first", range(0, 20, 10))
def test_members_that_die_join_and_leave(first):
    for seed in range(first, first + 10):
        run(seed)
        run(seed, threads=1)


def test_members_that_live_and_circles():
    deadlocks = 0
    for seed in range(15):
        world = run(seed, threads=1, interrupts=0.0, faults=False)
        deadlocks += world.results.get(Result.DEADLOCK, 0)
    assert deadlocks > 10


def test_many_members_and_one_name():
    for seed in range(10):
        run(seed, names=1, members=5)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_bug_is_caught(mutant, monkeypatch):
    mutant(lambda where, name, value: monkeypatch.setattr(where, name, value, raising=False))
    assert hunt(mutant, range(HUNT_SEEDS)) is not None, mutant.__doc__
