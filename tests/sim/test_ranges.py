"""Byte-range locks in their simulated world: seeds without a bug, and bugs that seeds must find."""

import subprocess
import sys
from pathlib import Path

import pytest

from dlm.modes import Result
from tests.sim.range_mutants import MUTANTS, finding
from tests.sim.range_world import run

ROOT = Path(__file__).resolve().parents[2]
HUNT_SEEDS = 250
LIVES = """
from tests.sim.range_world import run
worlds = [run(seed, threads=1, interrupts=0.0, faults=False) for seed in range(4)]
print([(world.steps, world.now_ns, world.random.random()) for world in worlds])
"""


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


def test_a_seed_is_the_same_world_in_every_process():
    """The order in which a set is gone through is another one in each."""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", LIVES], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(3)
    }
    assert len(outputs) == 1, outputs


def test_many_members_and_one_name():
    for seed in range(10):
        run(seed, names=1, members=5)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_known_bug_is_caught(mutant, monkeypatch):
    mutant(lambda where, name, value: monkeypatch.setattr(where, name, value, raising=False))
    assert finding(mutant, range(HUNT_SEEDS)) is not None, mutant.__doc__
