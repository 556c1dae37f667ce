"""The seam between the lock engine and who uses it: the lock cache, the low-level API.

An engine takes operations synchronously and answers through callbacks, also synchronously, as soon
as the answer is known: inside the call when this process is the resource's master. Exactly one
`completed` per accepted operation; callbacks of one lock come in the master's order. A callback may
call the engine again: the engine queues what follows and never recurses into itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec

from cluster.locks import Mode
from dlm.modes import Result


class Completion(msgspec.Struct, frozen=True, gc=False):
    """The end of one operation. `grant` is the fencing token (epoch, number), strictly rising per
    resource. `lvb` is None when the operation did not read the value block."""

    lock: int
    op: int
    result: Result
    mode: Mode
    lvb: bytes | None = None
    lvb_valid: bool = False
    grant: tuple[int, int] = (0, 0)
    status: int = 0


class LockClient(Protocol):
    """Who gets the callbacks of one lock."""

    def completed(self, completion: Completion) -> None: ...

    def blocking(self, mode: Mode, waiting: int) -> None:
        """The lock is in somebody's way: `mode` is the highest blocked mode, `waiting` the bit set
        of all modes that wait for this lock."""
        ...


class Engine(Protocol):
    """The low-level interface; semantics of libdlm."""

    def lock(self, name: bytes, mode: Mode, flags: int, client: LockClient) -> int:
        """Ask for a new lock; returns its number."""
        ...

    def convert(self, lock: int, mode: Mode, flags: int, lvb: bytes | None = None) -> Result: ...

    def unlock(self, lock: int, flags: int, lvb: bytes | None = None) -> Result: ...

    def cancel(self, lock: int) -> Result: ...

    def is_home(self, name: bytes) -> bool:
        """Whether a lock called `name`, if nobody has it, is granted here without a message."""
        ...


class Wakeup(Protocol):
    """A one-shot event."""

    def set(self) -> object: ...

    async def wait(self) -> None: ...


class Runtime(Protocol):
    """What the cache needs of its process: a clock, events, tasks and timers."""

    def now_ns(self) -> int: ...

    def wakeup(self) -> Wakeup: ...

    def spawn(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Start a task; False if this runtime has no tasks (then the caller runs it itself)."""
        ...

    def call_at(self, when_ns: int, callback: Callable[[], None]) -> None: ...
