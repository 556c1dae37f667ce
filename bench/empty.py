"""The empty pyfuse3 file system mounted on a node of the lab."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from lab import hosts
from lab.topology import Host, Lab

PATH = "/run/empty"


@contextlib.contextmanager
def mounted(lab: Lab, node: Host) -> Iterator[str]:
    """Its path on the node."""
    hosts.run(lab, node, "mkdir", "-p", PATH)
    hosts.daemon(lab, node, "empty", sys.executable, "-m", "bench.empty_fs", PATH)
    hosts.wait_for(
        lambda: hosts.run(lab, node, "test", "-f", f"{PATH}/f", check=False).returncode == 0,
        20,
        "the empty file system is mounted",
    )
    try:
        yield PATH
    finally:
        hosts.run(lab, node, "umount", PATH, check=False)
