"""Lock hit, local, remote, hand-over: two members of a lockspace on two nodes."""

from __future__ import annotations

import subprocess
import sys

from lab import hosts
from lab.demo_work import last_json
from lab.topology import Lab

MEMBER = [sys.executable, "-m", "bench.lock_member"]


def run(lab: Lab) -> dict:
    """Microseconds: p50 and p99."""
    first, second = lab.nodes[0], lab.nodes[1]
    server = hosts.popen(lab, second, *MEMBER, "second", stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        return last_json(hosts.run(lab, first, *MEMBER, "first", timeout_s=120).stdout)
    finally:
        server.kill()
        server.wait()


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["lock operation", "p50 µs", "p99 µs"]
    return columns, [[k, str(r["p50"]), str(r["p99"])] for k, r in result.items()]
