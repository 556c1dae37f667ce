"""`LocalLocks` for a process with several trio tasks and no cluster (unit tests, the RAM disk)."""

from __future__ import annotations

import trio

from dlm.cache import LOCKS_MAX
from dlm.local import LocalLocks
from dlm.runtime_io import TrioRuntime


def local_locks(nursery: trio.Nursery | None = None, *, locks_max: int = LOCKS_MAX) -> LocalLocks:
    """A `LockManager` that grants everything; `nursery` is needed only for trimming its LRU."""
    return LocalLocks(TrioRuntime(nursery), locks_max=locks_max)
