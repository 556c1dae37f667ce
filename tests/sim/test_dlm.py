"""The lock manager in its simulated world: seeds without a bug, and bugs that seeds must find."""

import pytest

from tests.sim.dlm_mutants import MUTANTS, finding
from tests.sim.dlm_world import run

HUNT_SEEDS = 250


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_members_that_die_join_and_leave(first):
    for seed in range(first, first + 10):
        run(seed)


def test_members_that_live():
    for seed in range(15):
        run(seed, faults=False)


def test_many_members_and_one_name():
    for seed in range(10):
        run(seed, names=1, members=5)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_bug_is_caught(mutant, monkeypatch):
    mutant(lambda where, name, value: monkeypatch.setattr(where, name, value, raising=False))
    assert finding(mutant, range(HUNT_SEEDS)) is not None, mutant.__doc__
