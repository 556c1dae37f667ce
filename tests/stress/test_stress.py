"""A short run of the stress program: every kind of cell, and one fault of each kind at least."""

from __future__ import annotations

import random

from tests.stress.campaign import Plan, run


def test_nothing_is_stale_while_mounts_die():
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    report = run(Plan(reads=60_000, nodes=3, workers=1, cells=64, seconds=20, seed=seed))
    print(report.as_json())
    assert report.stale == 0, report.examples
    assert report.faults
    assert report.writes.total() > 20
