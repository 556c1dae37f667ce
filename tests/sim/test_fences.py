"""Bars and reservations in their simulated world: seeds without a finding, and seeded bugs."""

import pytest

from tests.sim.fence_mutants import MUTANTS
from tests.sim.fence_world import run
from tests.sim.hunting import hunt

HUNT_SEEDS = 20


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_servers_that_die_and_views_that_come_late(first):
    for seed in range(first, first + 10):
        world = run(seed)
        assert world.fences > 20, seed
        assert world.refused > 0, seed


def test_a_seed_gives_the_same_run_again():
    first, second = run(3), run(3)
    assert (first.world.events, first.landings) == (second.world.events, second.landings)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_bug_is_caught(mutant, monkeypatch):
    mutant(lambda where, name, value: monkeypatch.setattr(where, name, value))
    found = hunt(run, range(HUNT_SEEDS))
    print(f"{mutant.__name__}: {found}")
    assert found is not None, mutant.__doc__
