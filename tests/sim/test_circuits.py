"""Circuits between mounts in their simulated world: seeds without a finding, and seeded bugs."""

import pytest

from tests.sim.circuit_mutants import MUTANTS
from tests.sim.circuit_world import run
from tests.sim.hunting import hunt

HUNT_SEEDS = 300


def test_circuits_that_break_while_mounts_hang_and_nodes_pause_and_restart():
    """With none that is down for long nobody goes; else one end, never both."""
    went = {True: 0, False: 0}
    for seed in range(100):
        world = run(seed)
        went[world.breaks_for_long] += len(world.out)
    assert went[True] > 20
    assert went[False] == 0


def test_a_seed_gives_the_same_run_again():
    first, second = run(3), run(3)
    assert first.world.digest == second.world.digest
    assert first.world.events == second.world.events


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_bug_is_caught(mutant, monkeypatch):
    mutant(lambda where, name, value: monkeypatch.setattr(where, name, value))
    found = hunt(run, range(HUNT_SEEDS))
    print(f"{mutant.__name__}: {found}")
    assert found is not None, mutant.__doc__
