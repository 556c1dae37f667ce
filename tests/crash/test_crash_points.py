"""A bounded part of the crash-point campaign; the whole: `python -m tests.crash`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.crash.pure import run_pure
from tests.crash.record import record
from tests.crash.verify import Verifier

SEEDS = (1, 2, 4)
PURE_POINTS = 12
REAL_POINTS = 40
VARIANTS = 6


def check(verifier: Verifier, points: int, seed: int) -> None:
    chosen = sorted(random.Random(seed).sample(verifier.points(), points))
    failures = [str(found) for found in verifier.run(chosen, VARIANTS, seed) if found is not None]
    assert not failures, "\n".join(failures[:5])


@pytest.mark.parametrize("seed", SEEDS)
def test_any_prefix_holds_what_was_promised(seed: int) -> None:
    """Three mounts in memory; with even seeds one of them dies half way, with the last one also
    the one that recovers it."""
    verifier = Verifier(*run_pure(seed, changes=200, kill=not seed % 2, again=not seed % 4))
    check(verifier, PURE_POINTS, seed)


def test_any_prefix_of_a_real_cluster_holds_what_was_promised(tmp_path: Path) -> None:
    """Real processes: what two servers executed for two nodes, cut off anywhere. On the way one of
    the servers loses its power, later a mount process is killed."""
    record(tmp_path, 1, changes=120, nodes=2, agents=2, each=1, kill=True, power=True)
    check(Verifier.load(tmp_path), REAL_POINTS, 1)


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one() -> None:
    """Write new, fsync, rename over it, fsync the directory: after a crash at any moment the file
    is whole, and no older than the last directory fsync that returned. Every prefix."""
    verifier = Verifier(*run_pure(5, changes=12, each=2, mounts=2, kinds=("committed",)))
    check(verifier, len(verifier.points()), 5)


def test_a_broken_promise_is_noticed() -> None:
    """The judge is not blind: flushes that cover nothing, and a lost write."""
    recording, entries, size = run_pure(3, changes=60)
    for entry in entries:
        entry.arrived_ns = 0
    verifier = Verifier(recording, entries, size)
    chosen = list(verifier.points())[-40::10]
    assert any(found is not None for found in verifier.run(chosen, VARIANTS, 3))
