"""The client program of the benchmarks (client.c), compiled for a lab."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from lab import hosts
from lab.demo_work import all_at_once, last_json
from lab.topology import Host, Lab

SOURCE = Path(__file__).parent / "client.c"
TIMEOUT_S = 600


def client(lab: Lab) -> str:
    """The path of the program, compiled when it is not there."""
    path = lab.directory / "bench-client"
    if not path.exists():
        subprocess.run(["cc", "-O2", "-o", path, SOURCE], check=True)
    return str(path)


def on(lab: Lab, node: Host, *words: str) -> dict:
    """Run it on one node; what it measured."""
    return last_json(hosts.run(lab, node, client(lab), *words, timeout_s=TIMEOUT_S).stdout)


def on_all(lab: Lab, words: Sequence[tuple[Host, list[str]]]) -> list[dict]:
    """Run it on several nodes at once."""
    commands = [(node, [client(lab), *argv]) for node, argv in words]
    return [last_json(output) for output in all_at_once(lab, commands, TIMEOUT_S)]


def here(lab: Lab, *words: str) -> dict:
    """Run it on this machine, outside of the lab's hosts."""
    argv = [client(lab), *words]
    return last_json(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
