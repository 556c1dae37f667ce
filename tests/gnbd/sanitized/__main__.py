"""python -m tests.gnbd.sanitized [--inputs N] [--seed S]: the C transmission of server and client
under sanitizers.

Exit codes: 0 nothing found, 1 something found (kept in tests/gnbd/sanitized/*corpus).
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import click

from tests.gnbd.sanitized.campaign import HARNESSES, Finding, build, replay, run

PART = 5000
PART_S = 300


@click.command()
@click.option("--inputs", type=click.IntRange(1), default=200_000, show_default=True)
@click.option("--seed", type=click.IntRange(0, 1 << 62), default=None)
def main(inputs: int, seed: int | None) -> None:
    """Streams of requests, and of replies, made up and mutated, until so many of each have run."""
    chosen = seed if seed is not None else random.SystemRandom().randrange(1 << 62)
    print(f"seed {chosen}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        try:
            for harness in HARNESSES:
                program = build(Path(directory), harness)
                print(f"{harness}: {replay(program)} kept inputs replayed", flush=True)
                for begin in range(0, inputs, PART):
                    count = min(PART, inputs - begin)
                    run(program, chosen + begin, count, PART_S)
                    print(f"{harness}: {begin + count} inputs", flush=True)
        except Finding as finding:
            print(f"FOUND {finding}")
            sys.exit(1)


if __name__ == "__main__":
    main()
