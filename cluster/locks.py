"""What the file system and the volume manager see of the distributed lock manager.

`LockManager` is the lock *cache* (glocks): a lock that was once granted stays here after its
users are gone, until another member asks for it. `dlm` implements it for a cluster; `LocalLocks`
of `dlm.local` implements it for one process (mkfs, fsck, unit tests).
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Protocol


class Mode(enum.IntEnum):
    """The six modes of VMS and Linux dlm. The order of the numbers is not an order of strength:
    CW and PR exclude each other."""

    NL = 0
    CR = 1
    CW = 2
    PR = 3
    PW = 4
    EX = 5


class LockHooks(Protocol):
    """What a lock protects must be made clean before the lock goes down.

    `demote` runs in a worker task of its own, never inside a request. When it returns, nothing
    that the new mode does not allow may be cached or dirty. It may use `CachedLock.hold_demoting`
    to serve requests that would otherwise block it, and must not wait for a lock of its own class.
    `granted` is called synchronously, before any holder runs, whenever the cached mode went up
    after having been weaker: what was cached under the old mode may be stale.
    """

    async def demote(self, lock: CachedLock, mode: Mode) -> None: ...

    def granted(self, lock: CachedLock, mode: Mode) -> None: ...


class CachedLock(Protocol):
    """One resource in the lock cache."""

    @property
    def name(self) -> bytes: ...

    @property
    def mode(self) -> Mode:
        """The mode granted to this process now (NL when nothing is cached)."""
        ...

    @property
    def demoting(self) -> bool:
        """True from the blocking callback until the lower mode is reached."""
        ...

    @property
    def lvb(self) -> bytes:
        """The lock value block as of the last grant or `set_lvb`, 64 bytes."""
        ...

    @property
    def lvb_valid(self) -> bool: ...

    def set_lvb(self, value: bytes) -> None:
        """Set the value that goes to the resource when this lock leaves PW or EX."""
        ...

    def try_hold(self, mode: Mode) -> bool:
        """Take a hold synchronously if the cached mode covers `mode` and no demotion goes on."""
        ...

    async def hold(self, mode: Mode) -> None:
        """Take a hold, asking the cluster if needed. The caller must hold no other lock of the same
        class except in the global order. Raises BarredError when this instance is out."""
        ...

    def hold_demoting(self, mode: Mode) -> bool:
        """As `try_hold`, but also while a demotion hook runs and the old mode is still granted."""
        ...

    def release(self, mode: Mode) -> None:
        """Give one hold back. Never waits; the lock stays cached."""
        ...


class LockManager(Protocol):
    """The lock cache of one lockspace."""

    def get(self, name: bytes, hooks: LockHooks | None = None) -> CachedLock:
        """The cached lock called `name` (1..64 bytes); made on first use. Never a message."""
        ...

    async def try_lock(self, name: bytes, mode: Mode, *, poke: bool = False) -> CachedLock | None:
        """NOQUEUE: hold `name` in `mode` now, or None at once if another member is in the way.
        `poke`: that one is told, and gives the lock up as soon as it does not use it."""
        ...

    def is_home(self, name: bytes) -> bool:
        """Whether `try_lock` of a name that nobody uses needs no message. A hint: it changes with
        the members."""
        ...

    async def drop(self, name: bytes) -> None:
        """Demote to nothing and forget, when unused (an inode was evicted)."""
        ...


DemoteHook = Callable[[CachedLock, Mode], Awaitable[None]]
