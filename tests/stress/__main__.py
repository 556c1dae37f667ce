"""`python -m tests.stress`: count stale reads on a cluster of real mounts, under faults.

Needs root. Prints one JSON object; exit code 1 if a read was stale. Runs for as long as it takes
to make the reads, or for `--seconds`.
"""

from __future__ import annotations

import json
import sys

import click

from tests.stress.campaign import Plan, run


@click.command()
@click.option("--reads", default=1_000_000, show_default=True)
@click.option("--nodes", type=click.IntRange(2, 8), default=3, show_default=True)
@click.option("--workers", default=2, show_default=True, help="Judges on each node.")
@click.option("--cells", default=96, show_default=True)
@click.option("--seconds", default=3600.0, show_default=True)
@click.option("--faults/--no-faults", default=True, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("-o", "options", multiple=True, help="A mount option, such as no_epoch.")
def main(
    reads: int,
    nodes: int,
    workers: int,
    cells: int,
    seconds: float,
    faults: bool,
    seed: int,
    options: tuple[str, ...],
) -> None:
    """Count stale reads."""
    report = run(Plan(reads, nodes, workers, cells, seconds, faults, seed, options))
    print(json.dumps(report.as_json(), indent=1))
    sys.exit(1 if report.stale else 0)


if __name__ == "__main__":
    main()
