"""What the demonstration says while it goes on, and its summary."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from rich.console import Console
from rich.table import Table


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
