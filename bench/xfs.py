"""xfs on a loop file of this machine: what a local file system does with the same program."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from lab.topology import Lab


@contextlib.contextmanager
def mounted(lab: Lab) -> Iterator[str]:
    """The path of a fresh xfs."""
    image, top = f"{lab.directory}/xfs.img", f"{lab.directory}/xfs"
    commands = [
        ["truncate", "-s", "1G", image],
        ["mkfs.xfs", "-q", image],
        ["mkdir", "-p", top],
        ["mount", "-o", "loop", image, top],
    ]
    for argv in commands:
        subprocess.run(argv, check=True, capture_output=True)
    try:
        yield top
    finally:
        subprocess.run(["umount", top], check=True)
        subprocess.run(["rm", image], check=True)
