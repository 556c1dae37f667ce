"""The C transmission under address and undefined-behaviour sanitizers: a bounded run; more with
python -m tests.gnbd.sanitized."""

from __future__ import annotations

import random

import pytest

from tests.gnbd.sanitized.campaign import HARNESSES, build, build_power, cut_power, replay, run

INPUTS = 10_000
LIVES = 3_000


@pytest.fixture(scope="module", params=HARNESSES)
def program(tmp_path_factory, request):
    return build(tmp_path_factory.mktemp("harness"), request.param)


def test_what_was_found_once_is_mended(program):
    """The corpus: streams that were findings, and some that reach far."""
    assert replay(program) > 0


def test_made_up_streams(program):
    """No sanitizer complains; replies are whole, or taken to their places; no memory and no access
    is left behind."""
    seed = random.SystemRandom().randrange(1 << 62)
    print(f"seed {seed}")
    run(program, seed, INPUTS, 120)


def test_power_cuts_of_the_integrity_area(tmp_path):
    """Whatever of unflushed data and sums is lost, no good block is refused and no bad one is
    believed where nothing was in flux."""
    seed = random.SystemRandom().randrange(1 << 62)
    print(f"seed {seed}")
    program = build_power(tmp_path)
    assert "damages found" in cut_power(program, seed, LIVES, 240)
    # Killed while it wrote a bit: the next life took what only the cache had for durable.
    assert "damages found" in cut_power(program, 3228905593268122667, 900, 240)
