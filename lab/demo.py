"""The demonstration: a cluster comes up, works, loses a node and a storage host, loses nothing.

Each step is a function that raises `StackError` when a claim does not hold; the summary says what
was seen. Long results are tables; with `--json` the summary is one JSON object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from cluster.errors import StackError
from lab import cluster, demo_database, demo_faults, demo_work
from lab.topology import Lab, LabState


class Row(msgspec.Struct):
    """One line of the summary."""

    what: str
    result: str
    seconds: float


class Reporter:
    """Says what happens, as it happens: rich on a terminal, plain lines otherwise."""

    def __init__(self, *, silent: bool) -> None:
        self.console = Console(quiet=silent, highlight=False, soft_wrap=not Console().is_terminal)
        self.rows: list[Row] = []
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        elapsed = time.monotonic() - self._begin
        self.console.print(f"[dim]{elapsed:6.1f} s[/dim]  {text}")

    def text(self, title: str, output: str) -> None:
        self.console.print(f"[bold]$ {title}[/bold]")
        self.console.print(output.rstrip(), markup=False)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def step(self, number: int, title: str, action: Callable[[], list[tuple[str, str]]]) -> None:
        """Run one step and keep its results for the summary."""
        self.console.rule(f"{number}. {title}")
        begin = time.monotonic()
        for what, result in action():
            self.rows.append(Row(what, result, round(time.monotonic() - begin, 1)))

    def summary(self) -> None:
        total = time.monotonic() - self._begin
        rows = [[r.what, r.result] for r in self.rows]
        self.table(f"Summary ({total:.0f} s)", ["what", "seen"], rows)


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
