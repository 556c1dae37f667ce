"""`python -m tests.stress`: count stale reads on a cluster of real mounts, under faults.

Needs root. Prints one JSON object; exit code 1 if a read was stale or wrong. Runs for as long as it
takes to make the reads, or for `--seconds`. With `--lab` in network namespaces, with more faults,
which are printed as they strike, and files with a history.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click

from tests.stress.campaign import Plan, run
from tests.stress.faults import FAULTS
from tests.stress.lab_campaign import LabCampaign, LabPlan


@click.command()
@click.option("--reads", default=1_000_000, show_default=True)
@click.option("--nodes", type=click.IntRange(2, 8), default=3, show_default=True)
@click.option("--workers", default=2, show_default=True, help="Judges on each node.")
@click.option("--cells", default=96, show_default=True)
@click.option("--seconds", default=3600.0, show_default=True)
@click.option("--faults/--no-faults", default=True, show_default=True)
@click.option("--seed", default=1, show_default=True)
@click.option("--lab", "in_lab", is_flag=True, help="In a lab; the next options need it.")
@click.option("--histories", default=12, show_default=True, help="Files with a history.")
@click.option("--fault", "only", multiple=True, help="Only this kind of fault (several: repeat).",
              type=click.Choice([fault.name for fault in FAULTS]))  # fmt: skip
@click.option("--logs", type=click.Path(path_type=Path), help="Keep the logs here if it fails.")
@click.option("-o", "options", multiple=True, help="A mount option, such as no_epoch.")
def main(
    reads: int,
    nodes: int,
    workers: int,
    cells: int,
    seconds: float,
    faults: bool,
    seed: int,
    in_lab: bool,
    histories: int,
    only: tuple[str, ...],
    logs: Path | None,
    options: tuple[str, ...],
) -> None:
    """Count stale reads."""
    common = (reads, nodes, workers, cells, seconds, faults, seed, options)
    if in_lab:
        with tempfile.TemporaryDirectory(prefix="cfs-stress-") as name:
            report = LabCampaign(Path(name), LabPlan(*common, histories, only, logs)).run()
    else:
        report = run(Plan(*common))
    print(json.dumps(report.as_json(), indent=1))
    sys.exit(1 if report.stale else 0)


if __name__ == "__main__":
    main()
