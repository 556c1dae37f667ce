"""Which tests may run beside which. A new folder must be entered here, or nothing runs.

`make test` uses several workers (pytest-xdist): the tests of a group run one after another on one
worker, groups beside each other. They are begun in the order of `FOLDERS`: long ones first, so that
the small ones fill what is left. Without `-n` all tests run one after another.

What runs beside something else holds no fixed port, address, name or place, and waits for
conditions with deadlines that a busy machine keeps.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling

from tests.fuse.mounting import enter_private_namespace

FILE, TEST = "file", "test"
"""Each file is a group (it shares a mount or a cluster); each test is one (pure)."""

FOLDERS = {
    "stress": "labs",
    "lab": "labs",
    "fuse": FILE,
    "node": FILE,
    "cvm": FILE,
    "crash": FILE,
    "foreign": FILE,
    "gnbd": FILE,
    "hostile": FILE,
    "corrupter": FILE,
    "native": FILE,
    "cluster": FILE,
    "sim": TEST,
    "cfs": FILE,
    "dlm": FILE,
    "fuzz": FILE,
    "fencing": FILE,
    "test_architecture.py": FILE,
}
"""What is a group in each folder: every file, every test, or all folders with the same word."""

HERE = Path(__file__).parent


class Groups(LoadScopeScheduling):
    """Work for the workers, by the table."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        kind = FOLDERS[_folder(self.config.rootpath / file)]
        return {FILE: file, TEST: nodeid}.get(kind, kind)


def _folder(path: Path) -> str:
    return path.relative_to(HERE).parts[0]


def pytest_configure() -> None:
    """Before anything is mounted: a lab that starts at another worker would take the mount along.
    Who may not do this cannot mount anything either."""
    with contextlib.suppress(OSError):
        enter_private_namespace()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Groups:
    """What pytest-xdist asks for who runs what."""
    config.option.loadscopereorder = False
    return Groups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of the table."""
    if unknown := {_folder(item.path) for item in items} - FOLDERS.keys():
        raise pytest.UsageError(f"tests/conftest.py does not say how {sorted(unknown)} may run")
    order = list(FOLDERS)
    items.sort(key=lambda item: order.index(_folder(item.path)))
