"""Handlers of file locks: flock on a lock of the lock manager, fcntl on byte ranges.

No task waits for a lock: what cannot be answered at once is answered by the callback that ends it.
A wait ends at any signal of its caller. A byte range is taken back at its keeper first, so that a
grant that crosses the signal is not lost; if the caller is killed and the keeper does not answer,
nobody waits for it. A flock is taken back in the background.

Locks of a process (fcntl) end when it closes the file, which FLUSH tells with the owner. Locks of
an open file (flock, OFD) end with that, which RELEASE tells; of OFD locks without the owner, so for
each owner of byte ranges the open files are known through which it has locked.
"""

from __future__ import annotations

import errno

from cfs.errors import FsError
from cfs.file_locks import FREE, FileLocks, LockRequest, encode_lock, parse_lock
from cfs.filesystem import FileSystem
from cfs.fuse.interrupt_io import RequestWaits
from cfs.fuse.kernel_cache_io import KernelCaches
from cfs.fuse.pyfuse3_io import pyfuse3
from cfs.lock_names import flock_lock_name, range_lock_name
from cfs.operations.base_io import OperationsBase
from cfs.operations.extension_io import PARKED, Extension, Parked
from cluster.locks import Mode
from dlm.flocks import Flock
from dlm.modes import Result
from dlm.range_file import Operation
from dlm.ranges import WRITE
from native.requests import RELEASE_FLOCK_UNLOCK, Opcode, Request

_ERRORS = {
    Result.AGAIN: errno.EAGAIN,
    Result.DEADLOCK: errno.EDEADLK,
    Result.FULL: errno.ENOLCK,
    Result.CANCELLED: errno.EINTR,
}


class _Call:
    """One request about a lock, until it is answered."""

    __slots__ = ("locks", "number", "operations", "parked", "request", "result", "wanted")

    def __init__(self, operations: LockOperations, request: Request, wanted: LockRequest) -> None:
        assert operations.file_locks is not None
        self.operations = operations
        self.locks: FileLocks = operations.file_locks
        self.request = request
        self.number = operations.known(pyfuse3.InodeT(request.inode)).number
        self.wanted = wanted
        self.result: Result | None = None
        self.parked = False

    @property
    def waits(self) -> bool:
        return self.request.opcode == Opcode.SETLKW

    def begin(self) -> None:
        """Ask for it; `ended` may be called before this returns. Raises BarredError."""
        raise NotImplementedError

    def signalled(self, killed: bool) -> None:
        """The caller has had a signal."""
        raise NotImplementedError

    def answer(self) -> bytes:
        """Of a call that has ended well."""
        return b""

    def now_or_later(self) -> bytes | Parked:
        """Raises FsError."""
        self.begin()
        if self.result is None:
            self.parked = True
            self.operations.waits.park(self.request, self.signalled)
            return PARKED
        if self.result != Result.GRANTED:
            raise FsError(_ERRORS.get(self.result, errno.EIO))
        return self.answer()

    def ended(self, result: Result) -> None:
        self.result = result
        if not self.parked:
            return
        self.operations.waits.unpark(self.request.unique)
        if result == Result.GRANTED:
            self.operations.answer(self.request, 0, self.answer())
        else:
            self.operations.answer(self.request, _ERRORS.get(result, errno.EIO), b"")


class _RangeCall(_Call):
    """A byte range is locked, unlocked or tested."""

    __slots__ = ("operation", "withdrawn")

    def __init__(self, operations: LockOperations, request: Request, wanted: LockRequest) -> None:
        super().__init__(operations, request, wanted)
        self.operation: Operation | None = None
        self.withdrawn = False

    def begin(self) -> None:
        ranges, wanted = self.locks.ranges, self.wanted
        name, owner = range_lock_name(self.number), wanted.owner
        start, end = wanted.start, wanted.end
        if self.request.opcode == Opcode.GETLK:
            operation = ranges.test(name, owner, start, end, wanted.kind, self.done)
        elif wanted.unlocks:
            operation = ranges.unlock(name, owner, start, end, self.done)
            if operation is None and self.result is None:
                self.result = Result.GRANTED  # nothing was locked
        else:
            self.operations.note_range_owner(self.number, owner, wanted.handle)
            operation = ranges.lock(
                name, owner, start, end, wanted.kind, self.done, wait=self.waits, pid=wanted.pid
            )
        if operation is not None:
            self.operation = operation

    def done(self, operation: Operation) -> None:
        self.operation = operation
        assert operation.result is not None
        self.ended(operation.result)

    def signalled(self, killed: bool) -> None:
        assert self.operation is not None
        if not self.withdrawn:
            self.withdrawn = True
            self.locks.ranges.withdraw(self.operation)
        elif killed:
            self.locks.ranges.abandon(self.operation)
            self.ended(Result.CANCELLED)

    def answer(self) -> bytes:
        if self.request.opcode != Opcode.GETLK:
            return b""
        assert self.operation is not None
        found = self.operation.conflict
        if found is None:
            return FREE
        pid = found.pid if found.instance == self.locks.ranges.me else 0
        return encode_lock(found.start, found.end, found.kind, pid)


class _FlockCall(_Call):
    """A flock is taken or given back."""

    __slots__ = ("flock",)

    def __init__(self, operations: LockOperations, request: Request, wanted: LockRequest) -> None:
        super().__init__(operations, request, wanted)
        self.flock: Flock | None = None

    @property
    def name(self) -> bytes:
        return flock_lock_name(self.number)

    def begin(self) -> None:
        flocks, wanted = self.locks.flocks, self.wanted
        if wanted.unlocks:
            flocks.unlock(self.name, wanted.owner, self.done)
            return
        mode = Mode.EX if wanted.kind == WRITE else Mode.PR
        self.flock = flocks.lock(
            self.name, wanted.owner, mode, self.done, wait=self.waits, pid=wanted.pid
        )

    def done(self, result: Result) -> None:
        if self.result is not None:
            return  # an unlock whose caller was killed
        if result != Result.BUSY:
            self.ended(result)
        elif self.waits:  # for another thread that waits for a lock of the same open file
            self.operations.flock_turns.setdefault(self._key(), []).append(self)
        else:
            self.ended(Result.AGAIN)

    def ended(self, result: Result) -> None:
        super().ended(result)
        if self.parked:
            for call in self.operations.flock_turns.pop(self._key(), ()):
                call.begin_again()

    def begin_again(self) -> None:
        try:
            self.begin()
        except Exception as error:
            self.operations.waits.unpark(self.request.unique)
            self.operations.answer(self.request, self.operations.errno_of("setlkw", error), b"")

    def signalled(self, killed: bool) -> None:
        if self.wanted.unlocks:
            if killed:
                self.ended(Result.CANCELLED)
            return
        if self.flock is not None:
            self.locks.flocks.cancel(self.flock)
        else:
            self.operations.flock_turns[self._key()].remove(self)
        self.ended(Result.CANCELLED)

    def _key(self) -> tuple[bytes, int]:
        return (self.name, self.wanted.owner)


class LockOperations(OperationsBase):
    """GETLK, SETLK, SETLKW, and what ends locks when a file is closed."""

    def __init__(self, fs: FileSystem, caches: KernelCaches, waits: RequestWaits) -> None:
        super().__init__(fs, caches, waits)
        self.file_locks: FileLocks | None = None
        """None: the kernel keeps the locks of this mount to itself."""
        self.flock_turns: dict[tuple[bytes, int], list[_FlockCall]] = {}
        """By name and owner: who waits until another thread's wait for that flock has ended."""
        self._range_owners: dict[int, dict[int, set[int]]] = {}
        """By inode and owner: the handles through which it has locked byte ranges."""

    def lock_extensions(self) -> dict[Opcode, Extension]:
        """The requests that are answered past pyfuse3."""
        if self.file_locks is None:
            return {}
        extension = Extension(self._never, self._begin_lock)
        return {Opcode.SETLK: extension, Opcode.SETLKW: extension, Opcode.GETLK: extension}

    def _begin_lock(self, request: Request, body: bytes) -> bytes | Parked:
        wanted = parse_lock(body)
        call = _FlockCall if wanted.flock else _RangeCall
        return call(self, request, wanted).now_or_later()

    async def _never(self, request: Request, body: bytes) -> bytes:
        raise AssertionError("no task waits for a lock")

    def note_range_owner(self, number: int, owner: int, handle: int) -> None:
        """An owner locks bytes of an inode through an open file."""
        self._range_owners.setdefault(number, {}).setdefault(owner, set()).add(handle)

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
