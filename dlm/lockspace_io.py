"""A member of a lockspace on trio: the core, the mesh below it, the lock cache above it.

The core runs inline wherever something comes in (a message, a group event, an operation); there is
no task per message or lock. What it wants sent goes to the mesh, which sends all of one tick in one
frame. Callbacks never recurse into the core: what they ask for is queued behind them.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import trio

from cluster.control import GroupEvent
from cluster.errors import BarredError, ProtocolError, UsageError
from cluster.ids import Instance
from cluster.locks import LockHooks, Mode
from cluster.mesh import Mesh, MeshEvent, Message
from dlm import dump
from dlm.cache import LOCKS_MAX, Glock, LockCache
from dlm.engine import Completion, LockClient
from dlm.lockspace import Answered, Asked, Blocking, Left, Lockspace, Send
from dlm.modes import Flags, Result
from dlm.runtime_io import TrioRuntime

log = logging.getLogger("dlm")

QUERY_S = 2.0
LEAVE_S = 30.0


class LockspaceMember:
    """One member process. Implements `dlm.engine.Engine` and `cluster.locks.LockManager`."""

    def __init__(self, mesh: Mesh, title: str, nursery: trio.Nursery, locks_max: int) -> None:
        self.space = Lockspace(mesh.me)
        self.cache = LockCache(self, TrioRuntime(nursery), locks_max=locks_max)
        self._mesh = mesh
        self._title = title
        self._clients: dict[int, LockClient] = {}
        self._busy = False
        self._member = trio.Event()
        self._left = trio.Event()
        self._last_query = 0
        self._queries: dict[int, tuple[list[Any], trio.Event]] = {}

    # -- cluster.locks.LockManager ---------------------------------------------------------------

    def get(self, name: bytes, hooks: LockHooks | None = None) -> Glock:
        return self.cache.get(name, hooks)

    async def try_lock(self, name: bytes, mode: Mode) -> Glock | None:
        return await self.cache.try_lock(name, mode)

    async def drop(self, name: bytes) -> None:
        await self.cache.drop(name)

    # -- dlm.engine.Engine -----------------------------------------------------------------------

    def lock(self, name: bytes, mode: Mode, flags: Flags, client: LockClient) -> int:
        """Raises BarredError when this member is out or has left."""
        self._clock()
        number = self.space.lock(name, mode, flags)
        if number is None:
            raise BarredError("this process is not a member of the lockspace any more")
        self._clients[number] = client
        self._run()
        return number

    def convert(self, lock: int, mode: Mode, flags: Flags, lvb: bytes | None = None) -> Result:
        self._clock()
        result = self.space.convert(lock, mode, flags, lvb)
        self._run()
        return result

    def unlock(self, lock: int, flags: Flags, lvb: bytes | None = None) -> Result:
        # The client has let go of the number: nothing about it is told from here on.
        self._clients.pop(lock, None)
        self._clock()
        result = self.space.unlock(lock, flags, lvb)
        self._run()
        return result

    def cancel(self, lock: int) -> Result:
        self._clock()
        result = self.space.cancel(lock)
        self._run()
        return result

    # -- the world -------------------------------------------------------------------------------

    def deliver(self, event: MeshEvent) -> None:
        """A message or a group event, at its place in the stream."""
        self._clock()
        if isinstance(event, Message):
            try:
                self.space.receive(event.source, event.payload)
            except ProtocolError as error:
                log.error("%s sent what is no message: %s", event.source, error)
        else:
            self._group_event(event.event)
        self._run()

    def _group_event(self, event: GroupEvent) -> None:
        self.space.group_event(event)
        if self.space.members:
            self._member.set()

    def _clock(self) -> None:
        self.space.now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)

    def _run(self) -> None:
        """Perform what the core wants, until it wants nothing."""
        if self._busy:
            return
        self._busy = True
        try:
            while actions := self.space.take():
                for action in actions:
                    self._perform(action)
        finally:
            self._busy = False

    def _perform(self, action: Send | Completion | Blocking | Left | Asked | Answered) -> None:
        match action:
            case Send():
                self._mesh.send(action.to, action.payload)
            case Completion():
                client = self._clients.get(action.lock)
                if action.lock not in self.space.owner.locks:
                    self._clients.pop(action.lock, None)
                if client is not None:
                    client.completed(action)
            case Blocking():
                client = self._clients.get(action.lock)
                if client is not None:
                    client.blocking(action.mode, action.waiting)
            case Left():
                self._left.set()
            case Asked():
                text = msgspec.json.encode(dump.about(self.space, action.name))
                self.space.answer(action.source, action.id, text)
            case Answered():
                self._answered(action)

    # -- life ------------------------------------------------------------------------------------

    async def wait_member(self) -> None:
        """Until the first view with this process in it has come."""
        await self._member.wait()

    async def leave(self) -> None:
        """Give all locks back and hand over what is mastered here; then the group may be left."""
        with trio.move_on_after(LEAVE_S):
            await self.cache.drop_all()
            self._clock()
            self.space.leave()
            self._run()
            await self._left.wait()
            return
        log.warning("left %s without handing over in time", self._title)

    def bar(self, reason: str) -> None:
        """This instance is out for ever: every waiter gets BarredError."""
        self.space.bar()
        self.cache.bar(reason)

    def dead_instances(self) -> list[Instance]:
        """Failed members that are not released yet."""
        return sorted(self.space.dead)

    # -- dlmctl ----------------------------------------------------------------------------------

    def _answered(self, action: Answered) -> None:
        query = self._queries.get(action.id)
        if query is None:
            return
        rows, full = query
        rows.append(msgspec.json.decode(action.text))
        if len(rows) >= len(self.space.members):
            full.set()

    async def query(self, verb: str, params: dict[str, Any]) -> Any:
        """Answer `dlm.<verb>`: spaces, locks, waiters, dump, or `why` with a name."""
        self._clock()
        if verb == "spaces":
            return dump.space_row(self.space, self._title)
        if verb in ("locks", "waiters"):
            return dump.own_locks(self.space, waiting=verb == "waiters")
        if verb == "dump":
            return dump.everything(self.space, self._title)
        if verb == "why":
            return await self._why(str(params.get("name", "")))
        raise UsageError(f"the lock manager knows no {verb!r}")

    async def _why(self, text: str) -> list[Any]:
        try:
            name = dump.parse_name(text)
        except ValueError:
            raise UsageError(f"{text!r} is no resource name") from None
        self._last_query += 1
        rows, full = self._queries[self._last_query] = ([], trio.Event())
        try:
            self.space.ask(self._last_query, name)
            self._run()
            with trio.move_on_after(QUERY_S):
                await full.wait()
            return rows
        finally:
            self._queries.pop(self._last_query, None)


@contextlib.asynccontextmanager
async def join(
    mesh: Mesh, title: str, *, locks_max: int = LOCKS_MAX
) -> AsyncIterator[LockspaceMember]:
    """A member on the mesh, for the life of the block. The caller joins the process group, feeds
    group events to the mesh, and says `leave` before it leaves the group."""
    async with trio.open_nursery() as nursery:
        member = LockspaceMember(mesh, title, nursery, locks_max)
        mesh.start(member.deliver)
        try:
            yield member
        finally:
            nursery.cancel_scope.cancel()
