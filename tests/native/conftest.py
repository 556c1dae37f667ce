"""The FUSE control file system, which a fresh machine need not have mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

CONNECTIONS = "/sys/fs/fuse/connections"


@pytest.fixture(scope="session", autouse=True)
def fusectl() -> Iterator[None]:
    """Mount it for these tests if it is not there, and take it away again."""
    ours = not os.path.ismount(CONNECTIONS)
    if ours:
        subprocess.run(["mount", "-t", "fusectl", "none", CONNECTIONS], check=True)
    try:
        yield
    finally:
        if ours:
            subprocess.run(["umount", CONNECTIONS], check=True)
