"""Handlers of file locks: flock on a lock of the lock manager, fcntl on byte ranges.

What can be decided here and now is answered without a task of its own. A wait ends at any signal of
its caller. A byte range is taken back at its keeper first, so that a grant that crosses the signal
is not lost; if the caller is killed and the keeper does not answer, nobody waits for it. A flock is
taken back in the background.

Locks of a process (fcntl) end when it closes the file, which FLUSH tells with the owner. Locks of
an open file (flock, OFD) end with that, which RELEASE tells; of OFD locks without the owner, so for
each owner of byte ranges the open files are known through which it has locked.
"""

from __future__ import annotations

import errno

import trio

from cfs.errors import FsError
from cfs.file_locks import FREE, FileLocks, LockRequest, encode_lock, parse_lock
from cfs.filesystem import FileSystem
from cfs.kernel_cache_io import KernelCaches
from cfs.lock_names import flock_lock_name, range_lock_name
from cfs.mount_fuse_io import pyfuse3
from cfs.mount_interrupt_io import RequestWaits
from cfs.operations_base_io import OperationsBase
from cfs.operations_extension_io import Extension
from cluster.locks import Mode
from dlm.flocks import Flock, Flocks
from dlm.modes import Result
from dlm.range_file import Operation
from dlm.range_locks import RangeLocks
from dlm.ranges import WRITE
from native.requests import RELEASE_FLOCK_UNLOCK, Opcode, Request

_ERRORS = {
    Result.AGAIN: errno.EAGAIN,
    Result.DEADLOCK: errno.EDEADLK,
    Result.FULL: errno.ENOLCK,
    Result.CANCELLED: errno.EINTR,
}


class _Outcome:
    """What became of an operation on a lock, and what it is as long as it waits."""

    __slots__ = ("event", "flock", "operation", "result")

    def __init__(self) -> None:
        self.result: Result | None = None
        self.event: trio.Event | None = None
        self.flock: Flock | None = None
        self.operation: Operation | None = None

    def set(self, result: Result) -> None:
        self.result = result
        if self.event is not None:
            self.event.set()

    def ended(self, operation: Operation) -> None:
        self.operation = operation
        assert operation.result is not None
        self.set(operation.result)

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
        self.file_locks: FileLocks | None = None
        """None: the kernel keeps the locks of this mount to itself."""
        self._begun: dict[int, _Outcome] = {}
        self._turns: dict[tuple[bytes, int], list[trio.Event]] = {}
        self._range_owners: dict[int, dict[int, set[int]]] = {}
        """By inode and owner: the handles through which it has locked byte ranges."""

    def lock_extensions(self) -> dict[Opcode, Extension]:
        """The requests that are answered past pyfuse3."""
        if self.file_locks is None:
            return {}
        extension = Extension(self._set_lock, self._try_set_lock)
        return {
            Opcode.SETLK: extension,
            Opcode.SETLKW: extension,
            Opcode.GETLK: Extension(self._get_lock, self._try_get_lock),
        }

    def _number(self, request: Request) -> int:
        return self.known(pyfuse3.InodeT(request.inode)).number

    # -- SETLK and SETLKW --------------------------------------------------------------------------

    def _try_set_lock(self, request: Request, body: bytes) -> bytes | None:
        """What needs no waiting; for all else the wait begins."""
        assert self.file_locks is not None
        wanted = parse_lock(body)
        if wanted.flock:
            outcome = self._begin_flock(self.file_locks.flocks, request, wanted)
        else:
            outcome = self._begin_range(self.file_locks.ranges, request, wanted)
        if outcome.result is not None and outcome.result != Result.BUSY:
            return outcome.answer()
        self._begun[request.unique] = outcome
        return None

    async def _set_lock(self, request: Request, body: bytes) -> bytes:
        assert self.file_locks is not None
        outcome = self._begun.pop(request.unique)
        if outcome.operation is not None:
            await self._wait_for_range(self.file_locks.ranges, outcome.operation, outcome)
            return outcome.answer()
        return await self._flock(self.file_locks.flocks, request, parse_lock(body), outcome)

    def _begin_range(self, ranges: RangeLocks, request: Request, wanted: LockRequest) -> _Outcome:
        number = self._number(request)
        name, owner = range_lock_name(number), wanted.owner
        outcome = _Outcome()
        if wanted.unlocks:
            operation = ranges.unlock(name, owner, wanted.start, wanted.end, outcome.ended)
            if operation is None and outcome.result is None:
                outcome.result = Result.GRANTED  # nothing was locked
        else:
            owners = self._range_owners.setdefault(number, {})
            owners.setdefault(owner, set()).add(wanted.handle)
            operation = ranges.lock(
                name, owner, wanted.start, wanted.end, wanted.kind, outcome.ended,
                wait=request.opcode == Opcode.SETLKW, pid=wanted.pid,
            )  # fmt: skip
        outcome.operation = operation
        return outcome

    async def _wait_for_range(
        self, ranges: RangeLocks, operation: Operation, outcome: _Outcome
    ) -> None:
        """Until it has ended; raises FsError only if the keeper does not answer a dead caller."""
        if outcome.result is not None:
            return
        event = outcome.event = trio.Event()
        try:
            await self.waits.wait_interruptibly(event)
        except FsError:
            ranges.withdraw(operation)
            if outcome.result is None:
                await self._wait_for_keeper(ranges, operation, event)
        except BaseException:
            ranges.abandon(operation)
            raise

    async def _wait_for_keeper(
        self, ranges: RangeLocks, operation: Operation, event: trio.Event
    ) -> None:
        try:
            await self.waits.wait(event)
        except BaseException:
            ranges.abandon(operation)
            raise

    def _begin_flock(self, flocks: Flocks, request: Request, wanted: LockRequest) -> _Outcome:
        name = flock_lock_name(self._number(request))
        outcome = _Outcome()
        if wanted.unlocks:
            flocks.unlock(name, wanted.owner)
            outcome.result = Result.GRANTED
            return outcome
        wait = request.opcode == Opcode.SETLKW
        mode = Mode.EX if wanted.kind == WRITE else Mode.PR
        outcome.flock = flocks.lock(
            name, wanted.owner, mode, outcome.set, wait=wait, pid=wanted.pid
        )
        if outcome.result == Result.BUSY and not wait:
            outcome.result = Result.AGAIN
        return outcome

    async def _flock(
        self, flocks: Flocks, request: Request, wanted: LockRequest, outcome: _Outcome
    ) -> bytes:
        key = (flock_lock_name(self._number(request)), wanted.owner)
        while outcome.result == Result.BUSY:
            # Another thread waits for a lock of the same open file.
            turn = trio.Event()
            self._turns.setdefault(key, []).append(turn)
            await self.waits.wait_interruptibly(turn)
            outcome = self._begin_flock(flocks, request, wanted)
        try:
            if outcome.flock is not None and outcome.result is None:
                await self._wait_for_flock(flocks, outcome.flock, outcome)
        finally:
            for turn in self._turns.pop(key, ()):
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

    # -- GETLK -------------------------------------------------------------------------------------

    def _try_get_lock(self, request: Request, body: bytes) -> bytes | None:
        assert self.file_locks is not None
        wanted = parse_lock(body)
        outcome = _Outcome()
        name = range_lock_name(self._number(request))
        operation = self.file_locks.ranges.test(
            name, wanted.owner, wanted.start, wanted.end, wanted.kind, outcome.ended
        )
        if outcome.result is None:
            outcome.operation = operation
            self._begun[request.unique] = outcome
            return None
        return self._holder(outcome)

    async def _get_lock(self, request: Request, body: bytes) -> bytes:
        assert self.file_locks is not None
        outcome = self._begun.pop(request.unique)
        assert outcome.operation is not None
        await self._wait_for_range(self.file_locks.ranges, outcome.operation, outcome)
        return self._holder(outcome)

    def _holder(self, outcome: _Outcome) -> bytes:
        outcome.answer()
        assert self.file_locks is not None
        assert outcome.operation is not None
        found = outcome.operation.conflict
        if found is None:
            return FREE
        pid = found.pid if found.instance == self.file_locks.ranges.me else 0
        return encode_lock(found.start, found.end, found.kind, pid)

    # -- close -------------------------------------------------------------------------------------

    def flushed(self, number: int, owner: int) -> None:
        """A process has closed an inode: its byte ranges there are gone. Never waits."""
        owners = self._range_owners.get(number)
        if owners is None or owners.pop(owner, None) is None:
            return
        self._close_ranges(number, owner)

    def released(self, number: int, request: Request) -> None:
        """An open file is gone, and its locks with it. Never waits."""
        if self.file_locks is None:
            return
        if request.operation_flags & RELEASE_FLOCK_UNLOCK:
            self.file_locks.flocks.unlock(flock_lock_name(number), request.lock_owner)
        for owner, handles in list(self._range_owners.get(number, {}).items()):
            handles.discard(request.handle)
            if not handles:
                del self._range_owners[number][owner]
                self._close_ranges(number, owner)

    def _close_ranges(self, number: int, owner: int) -> None:
        assert self.file_locks is not None
        self.file_locks.ranges.close(range_lock_name(number), owner)
        if not self._range_owners[number]:
            del self._range_owners[number]
