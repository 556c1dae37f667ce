"""`LocalLocks`: the lock cache for one process without a cluster (mkfs, fsck, unit tests).

The cache is the real one; only its engine grants everything. Sequential code needs nothing else: a
hold that could never be granted raises an AssertionError there instead of waiting for ever. With
concurrent tasks give a runtime, see `dlm.local_io.local_locks`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cluster.locks import Mode
from dlm.cache import LOCKS_MAX, LockCache
from dlm.engine import Completion, LockClient, Runtime, Wakeup
from dlm.modes import LVB_ZERO, Result


class _Nobody:
    def set(self) -> None: ...

    async def wait(self) -> None:
        raise AssertionError("this lock can never be granted: its only user already holds it")


class SequentialRuntime:
    """No tasks and no time."""

    def now_ns(self) -> int:
        return 0

    def wakeup(self) -> Wakeup:
        return _Nobody()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> bool:
        return False

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> None:
        raise AssertionError("nobody else asks for a lock of this process")


class GrantAll:
    """The engine of the only member: every request is compatible with nobody else's."""

    def __init__(self) -> None:
        self._last = 0
        self._ops = 0
        self._clients: dict[int, LockClient] = {}
        self._lvbs: dict[int, bytes] = {}

    def _complete(self, lock: int, mode: Mode, result: Result) -> Result:
        self._ops += 1
        lvb = self._lvbs.get(lock)
        self._clients[lock].completed(
            Completion(
                lock, self._ops, result, mode, lvb or LVB_ZERO, lvb is not None, (0, self._ops)
            )
        )
        return Result.GRANTED

    def lock(self, name: bytes, mode: Mode, flags: int, client: LockClient) -> int:
        self._last += 1
        self._clients[self._last] = client
        self._complete(self._last, mode, Result.GRANTED)
        return self._last

    def convert(self, lock: int, mode: Mode, flags: int, lvb: bytes | None = None) -> Result:
        if lvb is not None:
            self._lvbs[lock] = lvb
        return self._complete(lock, mode, Result.GRANTED)

    def unlock(self, lock: int, flags: int, lvb: bytes | None = None) -> Result:
        del self._clients[lock]
        self._lvbs.pop(lock, None)
        return Result.GRANTED

    def cancel(self, lock: int) -> Result:
        return Result.GRANTED

    def is_home(self, name: bytes) -> bool:
        return True


class LocalLocks(LockCache):
    """A `LockManager` whose every lock is ours."""

    def __init__(self, runtime: Runtime | None = None, *, locks_max: int = LOCKS_MAX) -> None:
        super().__init__(GrantAll(), runtime or SequentialRuntime(), locks_max=locks_max)
