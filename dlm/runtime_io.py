"""The lock cache's runtime on trio: clock, events, tasks in one nursery, and one timer task."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Awaitable, Callable

import trio

from dlm.engine import Wakeup


class TrioRuntime:
    """`nursery` None: no tasks, hence no demotions but those that `drop` waits for."""

    def __init__(self, nursery: trio.Nursery | None = None) -> None:
        self._nursery = nursery
        self._timers: list[tuple[int, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._sooner: trio.Event | None = None
        self._ticking = False

    def now_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def wakeup(self) -> Wakeup:
        return trio.Event()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> bool:
        if self._nursery is None:
            return False
        self._nursery.start_soon(work)
        return True

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (when_ns, next(self._order), callback))
        if not self._ticking:
            self._ticking = self.spawn(self._tick)
        elif self._timers[0][0] == when_ns and self._sooner is not None:
            self._sooner.set()

    async def _tick(self) -> None:
        while self._timers:
            wait_s = (self._timers[0][0] - self.now_ns()) / 1e9
            if wait_s > 0:
                self._sooner = trio.Event()
                with trio.move_on_after(wait_s):
                    await self._sooner.wait()
                self._sooner = None
                continue
            heapq.heappop(self._timers)[2]()
        self._ticking = False
