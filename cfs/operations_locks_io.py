"""Handlers of file locks: flock on a lock of the lock manager per open file.

A lock that is free is granted, and one that is given back is gone, without a task of its own. Who
waits is ended by any signal of its caller; the wish is withdrawn at the master in the background,
so that an unreachable master keeps nobody from dying.
"""

from __future__ import annotations

import errno
import fcntl

import trio

from cfs.errors import FsError
from cfs.file_locks import LockRequest, parse_lock
from cfs.filesystem import FileSystem
from cfs.kernel_cache_io import KernelCaches
from cfs.lock_names import flock_lock_name
from cfs.mount_fuse_io import pyfuse3
from cfs.mount_interrupt_io import RequestWaits
from cfs.operations_base_io import OperationsBase
from cfs.operations_extension_io import Extension
from cluster.locks import Mode
from dlm.flocks import Flock, Flocks
from dlm.modes import Result
from native.requests import RELEASE_FLOCK_UNLOCK, Opcode, Request

_ERRORS = {Result.AGAIN: errno.EAGAIN, Result.DEADLOCK: errno.EDEADLK}


class _Outcome:
    """What became of an operation on a lock."""

    __slots__ = ("event", "result")

    def __init__(self) -> None:
        self.result: Result | None = None
        self.event: trio.Event | None = None

    def set(self, result: Result) -> None:
        self.result = result
        if self.event is not None:
            self.event.set()

    def answer(self) -> bytes:
        """Raises FsError."""
        assert self.result is not None
        if self.result != Result.GRANTED:
            raise FsError(_ERRORS.get(self.result, errno.EIO))
        return b""


class LockOperations(OperationsBase):
    """GETLK, SETLK, SETLKW, and what ends locks when a file is closed."""

    def __init__(self, fs: FileSystem, caches: KernelCaches, waits: RequestWaits) -> None:
        super().__init__(fs, caches, waits)
        self.flocks: Flocks | None = None
        """None: the kernel keeps the locks of this mount to itself."""
        self._turns: dict[tuple[bytes, int], list[trio.Event]] = {}

    def lock_extensions(self) -> dict[Opcode, Extension]:
        """The requests that are answered past pyfuse3."""
        if self.flocks is None:
            return {}
        extension = Extension(self.set_lock, self.try_set_lock)
        return {Opcode.SETLK: extension, Opcode.SETLKW: extension}

    def try_set_lock(self, request: Request, body: bytes) -> bytes | None:
        """What needs no waiting: giving back."""
        wanted = parse_lock(body)
        if not wanted.unlocks:
            return None
        assert self.flocks is not None
        self.flocks.unlock(self._flock_name(request), wanted.owner)
        return b""

    async def set_lock(self, request: Request, body: bytes) -> bytes:
        return await self._flock(request, parse_lock(body))

    async def _flock(self, request: Request, wanted: LockRequest) -> bytes:
        assert self.flocks is not None
        mode = Mode.EX if wanted.type == fcntl.F_WRLCK else Mode.PR
        name, key, wait = self._flock_name(request), wanted.owner, request.opcode == Opcode.SETLKW
        while True:
            outcome = _Outcome()
            lock = self.flocks.lock(name, key, mode, outcome.set, wait=wait, pid=wanted.pid)
            if outcome.result != Result.BUSY:
                break
            if not wait:
                raise FsError(errno.EAGAIN)
            # Another thread waits for a lock of the same open file.
            turn = trio.Event()
            self._turns.setdefault((name, key), []).append(turn)
            await self.waits.wait_interruptibly(turn)
        try:
            if lock is not None:
                await self._wait_for_flock(self.flocks, lock, outcome)
        finally:
            for turn in self._turns.pop((name, key), ()):
                turn.set()
        return outcome.answer()

    async def _wait_for_flock(self, flocks: Flocks, lock: Flock, outcome: _Outcome) -> None:
        event = outcome.event = trio.Event()
        try:
            await self.waits.wait_interruptibly(event)
        except FsError:
            if outcome.result != Result.GRANTED:  # else it came in the same moment: the caller's
                flocks.cancel(lock)
                raise
        except BaseException:
            flocks.cancel(lock)
            raise

    def _flock_name(self, request: Request) -> bytes:
        return flock_lock_name(self.known(pyfuse3.InodeT(request.inode)).number)

    def released(self, ino: int, request: Request) -> None:
        """An open file is gone, and its locks with it."""
        if self.flocks is not None and request.operation_flags & RELEASE_FLOCK_UNLOCK:
            self.flocks.unlock(flock_lock_name(ino), request.lock_owner)
