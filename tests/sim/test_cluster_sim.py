"""The cluster cores in the simulator: seeds without a finding, determinism, and seeded bugs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim import scenario
from tests.sim.mutants import FOCUS, MUTANTS, mutation
from tests.sim.scenario import Scenario, run_one
from tests.sim.world import SECOND

ROOT = Path(__file__).parents[2]
MUTANT_SEEDS_MAX = 16
MUTANT_SECONDS = 20.0


@pytest.mark.parametrize("seed", range(1, 7))
def test_three_nodes_two_servers(seed):
    assert run_one(seed, 12.0).checker.commits > 0


@pytest.mark.parametrize("seed", range(1, 3))
def test_two_nodes_and_a_server_with_a_vote(seed):
    assert run_one(seed, 12.0, nodes=2).checker.commits > 0


def test_five_nodes_one_server():
    assert run_one(1, 8.0, nodes=5, servers=1).checker.commits > 0


def test_one_node():
    assert run_one(1, 8.0, nodes=1, servers=1).checker.commits > 0


@pytest.mark.parametrize("seed", range(1, 5))
def test_an_operator_holds_nodes_out(seed):
    """Whatever fails meanwhile; and everybody comes back when let in."""
    focus = ("_hold_node", "_hold_node", "_crash_node", "_split", "_all_off", "_crash_sequencer")
    scenario = Scenario(seed, focus=focus)
    scenario.run(25.0)
    assert scenario.holds > 0


def test_a_seed_gives_the_same_run_in_another_process():
    command = [sys.executable, "-m", "tests.sim", "--seed", "3", "--until", "5"]
    runs = [
        subprocess.run(
            command, cwd=ROOT, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True,
            check=True,
        ).stdout.split("]")[0]
        for hash_seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert "ok [" in runs[0]


def test_enough_mutants():
    assert len(MUTANTS) >= 15


@pytest.mark.parametrize("name", sorted(MUTANTS))
def test_seeded_bug_is_caught(name, monkeypatch):
    monkeypatch.setattr(scenario, "SETTLE_MAX", 15 * SECOND)
    with mutation(name):
        for seed in range(1, MUTANT_SEEDS_MAX + 1):
            try:
                Scenario(seed, focus=FOCUS.get(name, ())).run(MUTANT_SECONDS)
            except AssertionError:
                return
    pytest.fail(f"{name} survives {MUTANT_SEEDS_MAX} seeds")
