"""The demonstration: a cluster comes up, works, loses a node and a storage host, loses nothing.

Each step is a function that raises `StackError` when a claim does not hold; the summary says what
was seen. Long results are tables; with `--json` the summary is one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cluster.errors import StackError
from lab import cluster, demo_database, demo_faults, demo_work
from lab.report import Reporter
from lab.topology import Lab, LabState


def _farewell(lab: Lab, report: Reporter) -> None:
    option = "" if str(lab.directory) == "/var/tmp/cfs-lab" else f" --dir {lab.directory}"
    report.console.print(
        f"The cluster is still running. Look around:\n"
        f"  .venv/bin/cfs-lab status{option}\n"
        f"  .venv/bin/cfs-lab exec{option} n1 -- ls -l /mnt/cfs\n"
        f"  .venv/bin/cfs-lab exec{option} n3 -- clusterctl status\n"
        f"  .venv/bin/cfs-lab shell{option} n2\n"
        f"Stop it and remove everything it made:\n"
        f"  .venv/bin/cfs-lab down{option}",
        markup=False,
    )


def run(directory: Path, disk_size: str, *, keep: bool, as_json: bool) -> int:
    """Run the whole demonstration; returns the exit code."""
    report = Reporter(silent=as_json)
    lab = cluster.create(directory, LabState(3, 2, disk_size, "fast"))
    steps: list[tuple[str, Callable[[], list[tuple[str, str]]]]] = [
        ("A cluster from nothing", lambda: demo_work.bring_up(lab, report)),
        ("Real work from every node", lambda: demo_work.real_work(lab, report)),
        ("fio on all mounts at once", lambda: demo_work.fio_everywhere(lab, report)),
        ("Grow the mounted volume while fio goes on", lambda: demo_work.grow(lab, report)),
        ("Power cuts: a node, then a storage host", lambda: demo_faults.power_cuts(lab, report)),
        ("One database, every node, a power cut", lambda: demo_database.database(lab, report)),
        ("A node paused beyond its lease", lambda: demo_faults.pause_node(lab, report)),
        ("Unmount, check, mount again", lambda: demo_work.check_and_remount(lab, report)),
    ]
    failure: StackError | None = None
    try:
        for number, (title, action) in enumerate(steps, 1):
            report.step(number, title, action)
    except StackError as error:
        failure = error
    report.summary()
    if as_json:
        result: dict[str, Any] = {
            "rows": [msgspec.to_builtins(row) for row in report.rows],
            "error": None if failure is None else failure.message,
        }
        print(json.dumps(result))
    if failure is not None:
        report.console.print(f"[red]failed:[/red] {failure.message}")
        if failure.hint:
            report.console.print(f"hint: {failure.hint}")
        return failure.exit_code
    if not keep:
        cluster.down(directory)
    else:
        _farewell(lab, report)
    return 0
