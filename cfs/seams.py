"""The narrow protocols between the file system core and what surrounds it.

The core imports no trio: it takes a `Runtime` for events, tasks and sleep (`cfs.runtime_io` makes
one from a trio nursery), and a `KernelCache` through which it reaches the pages, attributes and
names that the kernel of this node keeps.

How the kernel's caches follow the inode lock (`I` + ino):
1. Another member wants the lock: `CachedLock.demoting` turns true, `try_hold` fails, the running
   holders finish, then the core's demote hook runs.
2. The hook first awaits `KernelCache.revoke(ino, mode)`. Handlers that arrive meanwhile queue; when
   the invalidation stalls behind them, they are served under the old mode with
   `CachedLock.hold_demoting` and `FileSystem.read_held` / `write_held`.
3. Then the hook writes the inode's dirty data, commits the journal, writes the blocks in place and
   flushes. No hook ever waits for an inode lock: groups are the only cluster locks that a flush may
   need, and the demote hook of a group lock waits for no cluster lock at all.
4. `granted` comes before the first holder of a new grant runs, also when the lock was never cached.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from cluster.ids import Instance
from cluster.locks import Mode


class KernelCache(Protocol):
    """What the kernel of this node keeps of an inode. Implemented by the FUSE layer."""

    async def revoke(self, ino: int, mode: Mode) -> None:
        """Make the kernel's caches of `ino` fit `mode` (PR: nothing that is dirty or writable;
        NL: nothing at all). Writes that the kernel launders meanwhile are served with
        `FileSystem.write_held` under `hold_demoting`. Must not raise."""
        ...

    def granted(self, ino: int, mode: Mode) -> None:
        """The inode's lock went up: attributes, pages and names that are still known are stale.
        Synchronous; must not wait."""
        ...

    def changed(self, ino: int, offset: int, length: int) -> None:
        """Bytes or attributes changed here at another place than the caller expects (an append
        at the true end of file): the kernel's copy of the range is stale (length -1: to the end).
        Synchronous; must not wait."""
        ...

    def attributes_changed(self, ino: int) -> None:
        """Attributes changed here that no answer will tell (a write took set-user-id away; a read
        moved the access time). Synchronous; must not wait."""
        ...

    def failed(self, error: BaseException) -> None:
        """The file system cannot go on (barred, journal lost); called once, synchronously."""
        ...


class NoKernel:
    """A `KernelCache` for mounts without a kernel (tests, tools)."""

    async def revoke(self, ino: int, mode: Mode) -> None:
        return None

    def granted(self, ino: int, mode: Mode) -> None:
        return None

    def changed(self, ino: int, offset: int, length: int) -> None:
        return None

    def attributes_changed(self, ino: int) -> None:
        return None

    def failed(self, error: BaseException) -> None:
        return None


class Event(Protocol):
    """A one-way latch, as trio.Event."""

    def set(self) -> None: ...

    def is_set(self) -> bool: ...

    async def wait(self) -> None: ...


class Runtime(Protocol):
    """Tasks, events and time for the core."""

    def event(self) -> Event: ...

    def spawn(self, task: Callable[[], Awaitable[None]], name: str) -> None:
        """Run `task` in the background until it ends or the mount does."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def now_ns(self) -> int:
        """A monotonic clock (CLOCK_BOOTTIME)."""
        ...


class Environment(Protocol):
    """What a mount needs besides its device, its locks and its options."""

    @property
    def runtime(self) -> Runtime: ...

    @property
    def kernel(self) -> KernelCache: ...

    @property
    def owner(self) -> Instance:
        """Who this mount is; recorded in the journal it takes."""
        ...

    def wall_clock_ns(self) -> int:
        """CLOCK_REALTIME, for time stamps only."""
        ...

    def damaged(self, block: int, text: str) -> None:
        """Tell people of a damaged block: one line for the log and the event stream. Synchronous,
        rarely called (`cfs.damage` bounds it); must not raise."""
        ...

    def is_barred(self, instance: Instance) -> bool:
        """True when `instance` cannot write any more and nobody else will replay its journal: it is
        neither a member of the group nor in the group's list of the dead."""
        ...
