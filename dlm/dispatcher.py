"""Between the pure lockspace and its users: an `Engine` with a client per lock.

Sends go out and callbacks are made in order as soon as the lockspace has produced them. A callback
that calls the engine again only adds to the work: nothing is ever called from within itself.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.control import GroupEvent
from cluster.errors import BarredError
from cluster.ids import Instance
from cluster.locks import Mode
from dlm.engine import Completion, LockClient
from dlm.lockspace import (
    Answered,
    Asked,
    Blocking,
    Changed,
    Left,
    Lockspace,
    Ranged,
    Send,
)
from dlm.messages import RangeMessage
from dlm.modes import Result

Other = Left | Asked | Answered | Ranged | Changed
_LEAVES_NOTHING = frozenset(
    {Result.AGAIN, Result.CANCELLED, Result.DEADLOCK, Result.INVALID, Result.NO_LOCK}
)


class Dispatcher:
    """Implements `dlm.engine.Engine` over one `Lockspace`."""

    def __init__(
        self,
        space: Lockspace,
        send: Callable[[Instance, bytes], None],
        now_ns: Callable[[], int],
        other: Callable[[Other], None],
    ) -> None:
        self.space = space
        self._send = send
        self._now_ns = now_ns
        self._other = other
        self._clients: dict[int, LockClient] = {}
        self._busy = False

    # Engine.

    def lock(self, name: bytes, mode: Mode, flags: int, client: LockClient) -> int:
        self.space.now_ns = self._now_ns()
        number = self.space.lock(name, mode, flags)
        if number is None:
            if self.space.barred or self.space.recovery.leaving:
                raise BarredError("this process has left the lockspace")
            raise ValueError(f"not a lock request: {name!r} {mode!r} {flags!r}")
        self._clients[number] = client
        self._pump()
        return number

    def convert(self, lock: int, mode: Mode, flags: int, lvb: bytes | None = None) -> Result:
        self.space.now_ns = self._now_ns()
        result = self.space.convert(lock, mode, flags, lvb)
        self._pump()
        return result

    def unlock(self, lock: int, flags: int, lvb: bytes | None = None) -> Result:
        self.space.now_ns = self._now_ns()
        result = self.space.unlock(lock, flags, lvb)
        self._pump()
        return result

    def cancel(self, lock: int) -> Result:
        result = self.space.cancel(lock)
        self._pump()
        return result

    def is_home(self, name: bytes) -> bool:
        return self.space.is_home(name)

    # The world.

    def receive(self, source: Instance, payload: bytes) -> None:
        self.space.now_ns = self._now_ns()
        self.space.receive(source, payload)
        self._pump()

    def group_event(self, event: GroupEvent) -> None:
        self.space.now_ns = self._now_ns()
        self.space.group_event(event)
        self._pump()

    def leave(self) -> None:
        self.space.leave()
        self._pump()

    def ask(self, query: int, name: bytes) -> None:
        self.space.ask(query, name)
        self._pump()

    def answer(self, to: Instance, query: int, text: bytes) -> None:
        self.space.answer(to, query, text)
        self._pump()

    def tell(self, to: Instance, message: RangeMessage) -> None:
        """Send a message about byte ranges."""
        self.space.tell(to, message)
        self._pump()

    def _pump(self) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            while actions := self.space.take():
                for action in actions:
                    if isinstance(action, Send):
                        self._send(action.to, action.payload)
                    elif isinstance(action, Completion):
                        self._complete(action)
                    elif isinstance(action, Blocking):
                        client = self._clients.get(action.lock)
                        if client is not None:
                            client.blocking(action.mode, action.waiting)
                    else:
                        self._other(action)
        finally:
            self._busy = False

    def _complete(self, completion: Completion) -> None:
        client = self._clients.get(completion.lock)
        if client is None:
            return
        gone = completion.result == Result.UNLOCKED
        if completion.result in _LEAVES_NOTHING:
            gone = completion.lock not in self.space.owner.locks
        if gone:
            del self._clients[completion.lock]
        client.completed(completion)
