"""A bounded run of every target, and the corpus. Longer: python -m tests.fuzz --seconds 60."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.engine import Finding, fuzz, try_one
from tests.fuzz.targets import TARGETS, Target

INPUTS = 400


@pytest.mark.parametrize("name", TARGETS)
def test_arbitrary_bytes_end_in_the_errors_that_were_promised(name):
    """Mutations of good inputs, with mended checksums: ProtocolError or CorruptionError at most."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    assert fuzz(name, TARGETS[name], seed, 0, INPUTS) == INPUTS


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_taken(name):
    """The seeds are real: without a change they decode (so the fuzzer starts where it matters)."""
    for data in TARGETS[name].seeds:
        TARGETS[name].run(data)


def test_the_fuzzer_finds_what_is_there():
    """A decoder that does not keep its promise is found."""
    target = Target(lambda data: data.decode(), [b"good"])
    with pytest.raises(Finding):
        fuzz("bad", target, 1, 0, 2000)
    with pytest.raises(Finding):
        try_one("bad", target, b"\xff")
