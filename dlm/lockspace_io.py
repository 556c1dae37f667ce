"""A lockspace member as a part of a trio process: mesh below, lock cache above.

`join(mesh, group)` starts delivery from the mesh; group events are fed to the mesh by whoever has
the session with clusterd, and come back in the stream at their place. The core runs inline in the
mesh's receive callback; there is no task per message. Waiting for a lock is all that a freeze or
a recovery costs; `BarredError` comes only when this instance is out for ever.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import trio

from cluster.control import GroupEvent
from cluster.control_io import unwrap_group
from cluster.errors import ProtocolError, UsageError
from cluster.ids import Instance
from cluster.locks import LockHooks, Mode
from cluster.mesh import Mesh, MeshEvent, View
from dlm import report
from dlm.cache import LOCKS_MAX, Glock, LockCache
from dlm.dispatcher import Dispatcher, Other
from dlm.engine import Completion
from dlm.flocks import Flocks
from dlm.lockspace import Asked, Changed, Left, Lockspace, Ranged
from dlm.modes import Flags, Result
from dlm.range_locks import RangeLocks
from dlm.runtime_io import TrioRuntime

log = logging.getLogger("dlm")

ANSWER_S = 2.0
LEAVE_S = 30.0
"""All that is lost without a hand-over is value blocks; a peer that hangs must not hang us."""
VERBS = ("spaces", "locks", "waiters", "why", "dump")


class LockspaceMember:
    """This process in a lockspace. It is a `cluster.locks.LockManager`, and a `dlm.engine.Engine`:
    the low-level interface with synchronous callbacks. `acquire` gives a thin asynchronous lock
    over the latter."""

    def __init__(
        self, mesh: Mesh, group: str, nursery: trio.Nursery, *, locks_max: int = LOCKS_MAX
    ) -> None:
        self.group = group
        self.space = Lockspace(mesh.me)
        runtime = TrioRuntime(nursery)
        self.api = Dispatcher(self.space, mesh.send, runtime.now_ns, self._other)
        self.lock, self.convert = self.api.lock, self.api.convert
        self.unlock, self.cancel = self.api.unlock, self.api.cancel
        self.cache = LockCache(self.api, runtime, locks_max=locks_max)
        self.flocks = Flocks(self.api)
        self.ranges = RangeLocks(mesh.me, self.api, self.api.tell, runtime)
        self.on_group_event: Callable[[GroupEvent], None] | None = None
        self.on_recovered: Callable[[], None] | None = None
        self._recovering = False
        self._member = trio.Event()
        self._left = trio.Event()
        self._queries = 0
        self._answers: dict[int, dict[str, report.Row]] = {}
        self._answered = trio.Event()
        mesh.start(self._deliver)

    # LockManager.

    def get(self, name: bytes, hooks: LockHooks | None = None) -> Glock:
        return self.cache.get(name, hooks)

    async def try_lock(self, name: bytes, mode: Mode, *, poke: bool = False) -> Glock | None:
        return await self.cache.try_lock(name, mode, poke=poke)

    def is_home(self, name: bytes) -> bool:
        return self.cache.is_home(name)

    async def drop(self, name: bytes) -> None:
        await self.cache.drop(name)

    # Life.

    async def wait_member(self) -> None:
        """Until the first view with this process in it has arrived."""
        await self._member.wait()

    def dead_instances(self) -> list[Instance]:
        """Failed members whose journals are not replayed yet."""
        return sorted(self.space.dead)

    def bar(self, reason: str) -> None:
        """This instance was put out of the cluster."""
        self.space.bar()
        self.cache.bar(reason)

    async def leave(self) -> None:
        """Give all locks back and hand over what is decided here; then leave the group."""
        await self.cache.drop_all()
        if self.space.barred:
            return
        self.ranges.leave()
        self.api.leave()
        with trio.move_on_after(LEAVE_S):
            await self._left.wait()
            return
        log.warning("%s: nobody took over in time; the value blocks mastered here end", self.group)

    async def acquire(self, name: bytes, mode: Mode, flags: int = Flags.NONE) -> AsyncLock:
        """A low-level lock, apart from the cache."""
        lock = AsyncLock(self.api)
        await lock.acquire(name, mode, flags)
        return lock

    def _deliver(self, event: MeshEvent) -> None:
        if isinstance(event, View):
            self.api.group_event(event.event)
            self._recovering |= bool(event.event.failed)
            if self.space.members:
                self._member.set()
            if self.on_group_event is not None:
                self.on_group_event(event.event)
        else:
            try:
                self.api.receive(event.source, event.payload)
            except ProtocolError as error:
                log.error("a message of %s was dropped: %s", event.source, error)
        if self._recovering and self.space.recovery.phase == "idle":
            self._recovering = False
            if self.on_recovered is not None:
                self.on_recovered()

    def _other(self, action: Other) -> None:
        if isinstance(action, Ranged):
            self.ranges.receive(action.source, action.message)
        elif isinstance(action, Changed):
            self.ranges.changed(action)
        elif isinstance(action, Left):
            self._left.set()
        elif isinstance(action, Asked):
            row = report.about(self.space, self.cache, action.name)
            row["file_locks"] = self._file_locks_here(action.name)
            self.api.answer(action.source, action.id, msgspec.json.encode(row))
        elif action.id in self._answers:
            self._answers[action.id][str(action.source)] = msgspec.json.decode(action.text)
            self._answered.set()
            self._answered = trio.Event()

    # Questions of dlmctl.

    async def query(self, verb: str, params: dict[str, Any]) -> Any:
        """Answer `dlm.<verb>`."""
        if verb == "spaces":
            return report.space(self.group, self.space, self.cache)
        if verb == "locks":
            return report.locks(self.space, self.cache)
        if verb == "waiters":
            return {
                "mastered": report.waiters(self.space),
                "waiting_for": report.waiting_for(self.space),
            }
        if verb == "dump":
            return report.dump(self.space, self.cache)
        if verb == "why":
            return await self._why(str(params["name"]))
        raise UsageError(f"no such question: {verb}")

    async def file_locks(self, names: Sequence[bytes]) -> dict[str, Any]:
        """Who holds and waits for locks of files under these names, over all members: `locks`, rows
        of `describe` with the member's `instance`; `no_answer`, the members that said nothing."""
        found: list[report.Row] = []
        silent: set[Instance] = set()
        for name in names:
            answers, missing = await self._ask(name)
            silent.update(missing)
            for instance in sorted(answers):
                found += [{**row, "instance": instance} for row in answers[instance]["file_locks"]]
        return {"locks": found, "no_answer": [str(one) for one in sorted(silent)]}

    def _file_locks_here(self, name: bytes) -> list[report.Row]:
        rows = [*self.flocks.describe(name), *self.ranges.describe(name)]
        return rows[: report.ROWS_MAX]

    async def _why(self, name: str) -> list[report.Row]:
        chain: list[report.Row] = []
        todo, seen = [name], {name}
        while todo and len(chain) < report.CHAIN_MAX:
            current = todo.pop(0)
            answers, silent = await self._ask(report.parse(current))
            found = report.link(current, answers, silent)
            chain.append(found)
            for other in report.next_names(found, answers):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        return chain

    async def _ask(self, name: bytes) -> tuple[dict[str, report.Row], list[Instance]]:
        self._queries += 1
        query = self._queries
        answers = self._answers[query] = {}
        try:
            self.api.ask(query, name)
            with trio.move_on_after(ANSWER_S):
                while len(answers) < len(self.space.members):
                    await self._answered.wait()
        finally:
            del self._answers[query]
        return answers, [one for one in sorted(self.space.members) if str(one) not in answers]


class AsyncLock:
    """One low-level lock for a task: operations wait, errors are results."""

    def __init__(self, api: Dispatcher) -> None:
        self._api = api
        self._number = 0
        self._done: trio.Event | None = None
        self._completion: Completion | None = None
        self.blocked_by = 0

    @property
    def mode(self) -> Mode:
        return self._completion.mode if self._completion is not None else Mode.NL

    @property
    def last(self) -> Completion:
        """The last completion: result, value block, fencing token."""
        assert self._completion is not None
        return self._completion

    async def acquire(self, name: bytes, mode: Mode, flags: int = Flags.NONE) -> Result:
        self._done = trio.Event()
        self._number = self._api.lock(name, mode, flags, self)
        return await self._outcome(new=True)

    async def convert(
        self, mode: Mode, flags: int = Flags.NONE, lvb: bytes | None = None
    ) -> Result:
        self._done = trio.Event()
        result = self._api.convert(self._number, mode, flags, lvb)
        return await self._outcome(new=False) if result == Result.GRANTED else result

    def unlock(self, flags: int = Flags.NONE, lvb: bytes | None = None) -> Result:
        return self._api.unlock(self._number, flags, lvb)

    async def _outcome(self, *, new: bool) -> Result:
        """Wait; a cancelled task waits for the outcome of the cancellation, and never leaves a
        granted lock behind."""
        done = self._done
        assert done is not None
        try:
            if not done.is_set():
                await done.wait()
        except trio.Cancelled:
            self._api.cancel(self._number)
            with trio.CancelScope(shield=True):
                await done.wait()
            if new and self.last.result == Result.GRANTED:
                self.unlock()
            raise
        return self.last.result

    def completed(self, completion: Completion) -> None:
        self._completion = completion
        if completion.result == Result.GRANTED:
            self.blocked_by = 0
        if self._done is not None:
            self._done.set()

    def blocking(self, mode: Mode, waiting: int) -> None:
        self.blocked_by |= waiting


@contextlib.asynccontextmanager
async def join(
    mesh: Mesh, group: str, *, locks_max: int = LOCKS_MAX
) -> AsyncIterator[LockspaceMember]:
    """Be a member of a lockspace for the life of the block. Feed group events to the mesh; call
    `leave` before the end unless the process is to be seen as failed."""
    try:
        async with trio.open_nursery() as nursery:
            member = LockspaceMember(mesh, group, nursery, locks_max=locks_max)
            try:
                yield member
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as several:
        inner = unwrap_group(several)
        if inner is several:
            raise
        raise inner from None
