"""Several paths to a disk in their simulated world: seeds without a finding, and seeded bugs."""

import pytest

from tests.sim.hunting import hunt
from tests.sim.multipath_mutants import MUTANTS
from tests.sim.multipath_world import run

HUNT_SEEDS = 120


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_paths_servers_and_members_that_fail(first):
    for seed in range(first, first + 10):
        print(f"seed {seed}")
        world = run(seed)
        assert world.reads > 20, seed
        assert world.flushes > 5, seed
        assert world.swaps > 0, seed


def test_a_seed_gives_the_same_run_again():
    first, second = run(3), run(3)
    values = [[cell.values for cell in world.judge.cells.values()] for world in (first, second)]
    assert values[0] == values[1]
    assert first.world.events == second.world.events


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_bug_is_caught(mutant, monkeypatch):
    mutant(lambda where, name, value: monkeypatch.setattr(where, name, value))
    found = hunt(run, range(HUNT_SEEDS))
    print(f"{mutant.__name__}: {found}")
    assert found is not None, mutant.__doc__
