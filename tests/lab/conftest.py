"""One lab for all tests of this folder: three nodes, two storage hosts, a mounted file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import cluster
from lab.topology import Lab, LabState


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A running lab, removed at the end whatever happened."""
    directory: Path = tmp_path_factory.mktemp("lab") / "lab"
    lab = cluster.create(directory, LabState(3, 2, "2G", "fast"))
    try:
        cluster.up(lab)
        yield lab
    finally:
        cluster.down(directory)


@pytest.fixture
def ready(lab: Lab) -> Lab:
    """The lab with every host up and every node mounted again, whatever the last test did."""
    cluster.up(lab)
    return lab
