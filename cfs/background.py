"""What a mount does by itself: the commit timer, checkpoints, small caches."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from cfs.core import Core
from cfs.lock_names import inode_lock_name, open_lock_name
from cfs.orphans import Orphans
from cfs.seams import Event
from cluster.errors import BarredError

COLD_MAX = 4096


class Background:
    """The tasks of one mount."""

    def __init__(self, core: Core, orphans: Orphans) -> None:
        self.core = core
        self.orphans = orphans
        self._closing = False
        self._ends: list[Event] = []

    def start(self) -> None:
        for turn in (self._commit_in_time, self._upkeep):
            self._run(turn)

    async def stop(self) -> None:
        """Returns when nothing runs any more."""
        self._closing = True
        for end in self._ends:
            await end.wait()

    def _run(self, turn: Callable[[], Awaitable[None]]) -> None:
        core = self.core
        end = core.runtime.event()
        self._ends.append(end)

        async def task() -> None:
            try:
                while not self._closing and core.error is None:
                    await turn()
            except BarredError as error:
                core.fail(error)
            finally:
                end.set()

        core.runtime.spawn(task, "background")

    async def _commit_in_time(self) -> None:
        """One turn of the commit timer. What is changed while a turn runs waits for the next one,
        which begins half an interval after this one did: so the disk has the other half, and what
        was changed is on it when the interval is over."""
        core = self.core
        begin_ns = core.runtime.now_ns()
        await self.commit()
        passed = (core.runtime.now_ns() - begin_ns) / 1e9
        await core.runtime.sleep(max(core.options.commit_interval_ms / 2000 - passed, 0))

    async def _upkeep(self) -> None:
        """One turn of what no commit has to wait for."""
        options = self.core.options
        for _ in range(max(1, options.checkpoint_interval_ms // options.commit_interval_ms)):
            await self.core.runtime.sleep(options.commit_interval_ms / 1000)
            if self._closing:
                return
            await self.tidy()
        await self.checkpoint()

    async def commit(self) -> None:
        """What is in memory becomes durable, overwritten data as well."""
        core = self.core
        try:
            await core.pages.flush_all()
            if core.journal.running or not core.counter.is_flushed(core.counter.written):
                await core.journal.commit()
        except Exception as error:
            core.fail(error)

    async def checkpoint(self) -> None:
        """A replay would have nothing to do."""
        try:
            if not self.core.journal.is_empty:
                await self.core.journal.checkpoint(move_tail=True)
        except Exception as error:
            self.core.fail(error)

    async def tidy(self) -> None:
        """Give back locks of what is gone, or too much to keep."""
        core = self.core
        self.orphans.drop_freed()
        cold, core.cold = core.cold, set()
        for ino in cold:
            state = core.table.states.get(ino)
            if state is not None:
                core.table.forget(state)
        for state in core.table.surplus(core.is_dirty)[:COLD_MAX]:
            await core.locks.drop(open_lock_name(state.ino))
            await core.locks.drop(inode_lock_name(state.ino))
            core.table.forget(state)
