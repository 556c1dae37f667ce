"""Fixtures: one local mount per module, a fresh directory in it per test."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re

import pytest

from tests.fuse.mounting import local_mount, scratch


@pytest.fixture(scope="module")
def mounted():
    """A local mount."""
    with scratch() as directory, local_mount(directory) as mount:
        yield mount


@pytest.fixture
def place(mounted, request):
    """An empty directory of the mount."""
    path = mounted.path / re.sub(r"\W+", "_", request.node.name)[:100]
    path.mkdir()
    yield path
    # Tests leave handles and mappings behind; none may keep the mount busy.
    gc.collect()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith(f"{mounted.path}/"):
                os.close(int(number))


@pytest.fixture
def chooser():
    """Randomness whose seed is printed when the test fails."""
    seed = int(os.environ.get("CFS_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"CFS_TEST_SEED={seed}")
    return random.Random(seed)
