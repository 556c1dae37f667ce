"""python -m tests.fuzz [--seconds N] [--seed S] [TARGET...]: N seconds for each target.

A finding goes into tests/fuzz/corpus, where every test run tries it again. Exit codes: 0 nothing
found, 1 something found.
"""

from __future__ import annotations

import random
import sys

import click

from tests.fuzz.engine import Finding, fuzz, keep
from tests.fuzz.targets import TARGETS


@click.command()
@click.option("--seconds", type=click.FloatRange(0.01), default=1.0, show_default=True)
@click.option("--seed", type=int, default=None)
@click.argument("names", nargs=-1, metavar="[TARGET]...")
def main(seconds: float, seed: int | None, names: tuple[str, ...]) -> None:
    """Fuzz all decoders, or these."""
    chosen = seed if seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {chosen}")
    found = 0
    for name in names or TARGETS:
        if name not in TARGETS:
            raise click.UsageError(f"no target {name}; there are: {', '.join(TARGETS)}")
        try:
            print(f"{name}: {fuzz(name, TARGETS[name], chosen, seconds)} inputs", flush=True)
        except Finding as finding:
            found += 1
            print(f"FOUND {finding}\n  kept as {keep(finding)}", flush=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
