"""Drives a core: events in, actions out, in order, with durability where the core asks for it.

Actions are performed strictly in the order of the list and across steps. Up to the first `Persist`
they are performed at once, in the caller's tick; from a `Persist` on they wait in a queue, which
one task works off: it writes the record (atomic replace and fsync in a thread) and goes on. So a
`Send` behind a `Persist` never leaves before the record is durable, and steps never wait.

A store that cannot be written (a full disk) is tried again for ever. Until then the core is silent:
what waits in the queue waits, and messages are dropped, which their senders repeat; so
they are while a disk that hangs makes many actions wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import trio

from cluster.actions import Action, Persist, Received, Tick
from cluster.errors import StackError, os_failure
from cluster.paths_io import boottime_ns, write_store

QUEUE_MAX = 100_000
QUEUE_BUSY = 1000
"""From so many waiting actions on no more messages are taken."""
IDLE_NS = 1_000_000_000
STORE_RETRY_S = 0.5


class Core(Protocol):
    """Any pure core of the stack."""

    def step(self, now_ns: int, event: Any) -> Sequence[Any]: ...

    def deadline(self) -> int | None: ...


class Runner:
    """One core and its queue. `perform` carries out every action except `Persist`; `on_store` is
    told why the store cannot be written, and "" when it can be again."""

    def __init__(
        self,
        core: Core,
        perform: Callable[[Action], None],
        store: Path | None,
        on_store: Callable[[str], None] = lambda _problem: None,
    ) -> None:
        self.core = core
        self._perform = perform
        self._store = store
        self._on_store = on_store
        self._store_problem = ""
        self._queue: deque[Action] = deque()
        self._more = trio.Event()
        self._rearm = trio.Event()
        self._stepping = False
        self._events: deque[Any] = deque()

    def step(self, event: Any) -> None:
        """Feed one event. An event that `perform` feeds in turn is taken after this one."""
        busy = self._store_problem or len(self._queue) >= QUEUE_BUSY
        if busy and isinstance(event, Received):
            return
        self._events.append(event)
        if self._stepping:
            return
        self._stepping = True
        try:
            while self._events:
                self._take(self.core.step(boottime_ns(), self._events.popleft()))
        finally:
            self._stepping = False
        self._rearm.set()

    def _take(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if self._queue or isinstance(action, Persist):
                assert len(self._queue) < QUEUE_MAX
                self._queue.append(action)
                self._more.set()
            else:
                self._perform(action)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work off the queue and tick the core, for ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            task_status.started()
            while True:
                due = self.core.deadline()
                now = boottime_ns()
                wait_ns = IDLE_NS if due is None else min(IDLE_NS, max(0, due - now))
                self._rearm = trio.Event()
                with trio.move_on_after(wait_ns / 1e9 if wait_ns else 0):
                    await self._rearm.wait()
                self._tick_if_due()
                await trio.lowlevel.checkpoint()

    def _tick_if_due(self) -> None:
        due = self.core.deadline()
        if due is not None and boottime_ns() >= due:
            self.step(Tick())

    async def _drain(self) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            while self._queue:
                # The action stays in the queue while it is performed, so that none overtakes it.
                action = self._queue[0]
                if isinstance(action, Persist):
                    await self._persist(action.record)
                    self._queue.popleft()
                else:
                    self._queue.popleft()
                    self._perform(action)

    async def _persist(self, record: bytes) -> None:
        assert self._store is not None, "this core has no store"
        while True:
            try:
                await trio.to_thread.run_sync(write_store, self._store, record)
                break
            except OSError as error:
                self._tell(os_failure(error, f"cannot write {self._store}").message)
            except StackError as error:
                self._tell(error.message)
            await trio.sleep(STORE_RETRY_S)
        self._tell("")

    def _tell(self, problem: str) -> None:
        if problem != self._store_problem:
            self._store_problem = problem
            self._on_store(problem)
