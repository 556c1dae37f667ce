"""Requests that reach the daemon in a warm re-read and in warm stats."""

from __future__ import annotations

import json
import sys

from lab import hosts
from lab.topology import MOUNT_POINT, Host, Lab

FILES = 10_000
MIB = 256
MAKE = r"""
import os, sys
top, files = sys.argv[1], int(sys.argv[2])
os.makedirs(top, exist_ok=True)
for i in range(files):
    os.close(os.open(f"{top}/f{i}", os.O_CREAT | os.O_WRONLY))
"""
STAT = r"""
import os, sys
top, files = sys.argv[1], int(sys.argv[2])
for i in range(files):
    os.stat(f"{top}/f{i}")
"""


def _requests(lab: Lab, node: Host) -> int:
    """All requests that the mount process of a node has read so far."""
    text = hosts.run(lab, node, "cfsctl", "stats", "--json", MOUNT_POINT).stdout
    return int(json.loads(text)["requests"])


def run(lab: Lab) -> dict:
    node = lab.nodes[0]
    path, top = f"{MOUNT_POINT}/bench-warm", f"{MOUNT_POINT}/bench-warm-d"
    hosts.run(
        lab, node, "dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={MIB}", "conv=fsync"
    )
    hosts.run(lab, node, sys.executable, "-c", MAKE, top, str(FILES), timeout_s=300)
    results = {}
    for name, argv in (
        (f"re-read of {MIB} MiB", ["dd", f"if={path}", "of=/dev/null", "bs=1M"]),
        (f"stat of {FILES} files", [sys.executable, "-c", STAT, top, str(FILES)]),
    ):
        hosts.run(lab, node, *argv)
        before = _requests(lab, node)
        hosts.run(lab, node, *argv)
        results[name] = _requests(lab, node) - before
    hosts.run(lab, node, "rm", "-rf", path, top, timeout_s=300)
    return results


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    return ["warm", "requests", "aim"], [[k, str(v), "0"] for k, v in result.items()]
