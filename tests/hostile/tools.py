"""Run the entry point of a command-line tool in this process, and judge how it ended."""

from __future__ import annotations

import importlib
import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import click

TOOLS = {
    "clusterctl": "node.cli:main",
    "fencectl": "node.fence_cli:main",
    "clusterd": "node.daemon:main",
    "gnbd-server": "gnbd.server.cli:server_main",
    "gnbdctl": "gnbd.control.cli:control_main",
    "dlmctl": "dlm.cli:main",
    "cvmctl": "cvm.cli:main",
    "cfsctl": "cfs.cli:main",
    "mkfs.cfs": "cfs.mkfs:main",
    "fsck.cfs": "cfs.fsck.cli:main",
    "cfs-lab": "lab.cli:main",
}
USAGE = {"cvmctl": 3, "fsck.cfs": 16}
"""The exit code of a wrong command line where it is not 2."""
TEXT_MAX = 300
RUN_S = 8


class Ended(NamedTuple):
    """How a tool ended."""

    code: int
    out: str
    err: str


def command_of(tool: str) -> click.Command:
    """The click command behind a tool."""
    module, _, name = TOOLS[tool].partition(":")
    command = getattr(importlib.import_module(module), name)
    assert isinstance(command, click.Command)
    return command


def _runs(_number: int, _frame: object) -> None:
    raise AssertionError("it accepts this and runs")


def run(tool: str, *words: str) -> Ended:
    """Run a tool as its entry point does, in this process."""
    out, err = io.StringIO(), io.StringIO()
    old, sys.argv = sys.argv, [tool, *words]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    signal.signal(signal.SIGALRM, _runs)
    signal.alarm(RUN_S)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            command_of(tool)()
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
        sys.argv = old
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
            signal.signal(number, handler)
    assert isinstance(code, int), code
    return Ended(code, out.getvalue(), err.getvalue())


def one_sentence(tool: str, ended: Ended) -> str:
    """The complaint: one line that names the program, then at most a hint; nothing else."""
    assert ended.out == "", ended
    assert "Traceback" not in ended.err, ended.err
    lines = ended.err.rstrip("\n").split("\n")
    assert 1 <= len(lines) <= 2, ended.err
    start = "  " if tool == "cvmctl" else f"{tool}: "
    assert lines[0].startswith(start), ended.err
    assert len(lines[0].removeprefix(start)) > 8, ended.err
    assert len(lines[0]) <= TEXT_MAX, ended.err
    if len(lines) == 2:
        assert lines[1].startswith("  (" if tool == "cvmctl" else "  hint: "), ended.err
    return ended.err


def snapshot(*roots: Path) -> dict[str, tuple[int, bytes]]:
    """Names, modes and contents of everything below some directories."""
    found: dict[str, tuple[int, bytes]] = {}
    for root in roots:
        for path in sorted([root, *root.rglob("*")]):
            status = path.lstat()
            regular = path.is_file() and not path.is_symlink()
            found[str(path)] = (status.st_mode, path.read_bytes() if regular else b"")
    return found
