"""Several lock caches on one lock table in one process: a cluster's locks without a cluster.

Only the engine is replaced; the cache with its queues, demotions and holds is the real one. A
member that is killed keeps its locks until `release_dead`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from cluster.locks import Mode
from dlm.cache import LockCache
from dlm.engine import Completion, LockClient
from dlm.modes import COMPATIBLE, LVB_ZERO, Flags, Result
from dlm.runtime_io import TrioRuntime


class Runtime(TrioRuntime):
    """Keeps trio's time, which a mock clock may set."""

    def now_ns(self) -> int:
        return round(trio.current_time() * 1e9)


class Lock:
    def __init__(self, number: int, name: bytes, client: LockClient, member: MemberEngine) -> None:
        self.number = number
        self.name = name
        self.client = client
        self.member = member
        self.mode: Mode | None = None
        self.wanted: Mode | None = None


class Resource:
    def __init__(self) -> None:
        self.locks: list[Lock] = []
        self.queue: list[Lock] = []
        self.lvb = LVB_ZERO


class LockTable:
    """The master of everything."""

    def __init__(self) -> None:
        self.resources: dict[bytes, Resource] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._pumping = False
        self.numbers = 0

    def member(self, nursery: trio.Nursery) -> LockCache:
        engine = MemberEngine(self)
        cache = LockCache(engine, Runtime(nursery))
        engine.cache = cache
        return cache

    def call(self, action: Callable[[], None]) -> None:
        self._calls.append(action)

    def pump(self) -> None:
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._calls:
                self._calls.popleft()()
        finally:
            self._pumping = False

    def fits(self, resource: Resource, lock: Lock, mode: Mode) -> bool:
        return all(
            other is lock or other.mode is None or COMPATIBLE[other.mode][mode]
            for other in resource.locks
        )

    def answer(self, lock: Lock, result: Result, resource: Resource) -> None:
        self.numbers += 1
        mode = lock.mode if lock.mode is not None else Mode.NL
        done = Completion(
            lock.number, self.numbers, result, mode, resource.lvb, True, (0, self.numbers)
        )
        if not lock.member.dead:
            self.call(lambda: lock.client.completed(done))

    def serve(self, resource: Resource) -> None:
        while resource.queue:
            lock = resource.queue[0]
            assert lock.wanted is not None
            if not self.fits(resource, lock, lock.wanted):
                break
            resource.queue.pop(0)
            lock.mode, lock.wanted = lock.wanted, None
            self.answer(lock, Result.GRANTED, resource)
        for other in resource.locks:
            held = other.mode
            if held is None or other.member.dead:
                continue
            bits = 0
            for lock in resource.queue:
                assert lock.wanted is not None
                if lock is not other and not COMPATIBLE[held][lock.wanted]:
                    bits |= 1 << lock.wanted
            if bits:
                highest = Mode(bits.bit_length() - 1)
                self.call(lambda o=other, h=highest, b=bits: o.client.blocking(h, b))

    def poke(self, resource: Resource, asker: Lock, mode: Mode) -> None:
        """Tell those in the way of a lock that will not wait."""
        for other in resource.locks:
            held = other.mode
            in_the_way = held is not None and not COMPATIBLE[held][mode]
            if other is not asker and in_the_way and not other.member.dead:
                self.call(lambda o=other: o.client.blocking(mode, 1 << mode))

    def release_dead(self, engine: MemberEngine) -> None:
        for resource in self.resources.values():
            resource.locks = [lock for lock in resource.locks if lock.member is not engine]
            resource.queue = [lock for lock in resource.queue if lock.member is not engine]
            self.serve(resource)
        self.pump()


class MemberEngine:
    """Implements `dlm.engine.Engine` for one member."""

    cache: LockCache

    def __init__(self, table: LockTable) -> None:
        self.table = table
        self.locks: dict[int, Lock] = {}
        self.dead = False

    def lock(self, name: bytes, mode: Mode, flags: Flags, client: LockClient) -> int:
        table = self.table
        table.numbers += 1
        if self.dead:
            return table.numbers
        lock = Lock(table.numbers, name, client, self)
        resource = table.resources.setdefault(name, Resource())
        resource.locks.append(lock)
        self.locks[lock.number] = lock
        self._ask(resource, lock, mode, flags)
        return lock.number

    def _ask(self, resource: Resource, lock: Lock, mode: Mode, flags: Flags) -> None:
        table = self.table
        if flags & Flags.NOQUEUE and (resource.queue or not table.fits(resource, lock, mode)):
            if lock.mode is None:
                resource.locks.remove(lock)
                del self.locks[lock.number]
            table.answer(lock, Result.AGAIN, resource)
            if flags & Flags.NOQUEUEBAST:
                table.poke(resource, lock, mode)
        else:
            lock.wanted = mode
            if lock.mode is None:
                resource.queue.append(lock)
            else:
                resource.queue.insert(0, lock)
            table.serve(resource)
        table.pump()

    def convert(self, lock: int, mode: Mode, flags: Flags, lvb: bytes | None = None) -> Result:
        if self.dead:
            return Result.GRANTED
        found = self.locks[lock]
        resource = self.table.resources[found.name]
        if lvb is not None:
            resource.lvb = lvb
        assert found.mode is not None
        if mode in (Mode.NL, Mode.PR) and found.mode in (Mode.EX, Mode.PR) and mode < found.mode:
            found.mode = mode
            self.table.serve(resource)
            self.table.pump()
            return Result.GRANTED
        self._ask(resource, found, mode, flags)
        return Result.GRANTED

    def unlock(self, lock: int, flags: Flags, lvb: bytes | None = None) -> Result:
        if self.dead:
            return Result.GRANTED
        found = self.locks.pop(lock)
        resource = self.table.resources[found.name]
        if lvb is not None:
            resource.lvb = lvb
        resource.locks.remove(found)
        if found in resource.queue:
            resource.queue.remove(found)
        self.table.serve(resource)
        self.table.pump()
        return Result.GRANTED

    def is_home(self, name: bytes) -> bool:
        return False

    def cancel(self, lock: int) -> Result:
        if self.dead:
            return Result.GRANTED
        found = self.locks[lock]
        resource = self.table.resources[found.name]
        if found in resource.queue:
            resource.queue.remove(found)
            found.wanted = None
            self.table.answer(found, Result.CANCELLED, resource)
            self.table.serve(resource)
            self.table.pump()
        return Result.GRANTED
