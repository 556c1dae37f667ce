"""READs and WRITEs past the page cache that no task waits for.

Where nothing has to be waited for but the disk, the request is on its way when its attempt returns,
and what the disk answers is handed on by a call (`cfs.direct`). The kernel keeps no page locked for
it, so nothing of a revocation waits behind it but the lock that it holds.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from cfs.errors import FsError
from cfs.fuse import layout
from cfs.operations.base_io import Handle
from cfs.operations.extension_io import PARKED, Answer, Parked
from cfs.transaction import NotNow
from cluster.device import Buffer
from native.requests import Opcode, Request

if TYPE_CHECKING:
    from cfs.operations.data_io import DataOperations


class _DirectCall:
    """One request. Answered once: by the disk, or before that if its caller is killed. (The kernel
    sends no INTERRUPT for O_DIRECT, whose caller cannot be killed while it waits, but it does for
    reads through an open file with direct_io.)"""

    __slots__ = ("error", "handle", "operations", "over", "parked", "pieces", "request", "unheard")

    def __init__(self, operations: DataOperations, request: Request) -> None:
        self.operations = operations
        self.request = request
        self.handle: Handle = operations.handles[request.handle]
        self.over = False
        self.parked = False
        self.unheard = False
        """The caller has been killed."""
        self.error: Exception | None = None
        self.pieces: list[Buffer] = []

    def _start(self) -> None:
        """Raises NotNow."""
        raise NotImplementedError

    def _answer(self) -> Answer:
        """What the disk has answered, for the caller; once. Raises what went wrong."""
        raise NotImplementedError

    def now_or_later(self) -> Answer | Parked:
        """Raises FsError, NotNow."""
        self._start()
        if self.over:
            return self._answer()
        self.parked = True
        if self.request.opcode == Opcode.READ:
            self.operations.waits.park(self.request, self.signalled)
        return PARKED

    def ended(self, error: Exception | None, pieces: list[Buffer]) -> None:
        self.error, self.pieces = error, pieces
        self._finish()

    def _finish(self) -> None:
        self.over = True
        if not self.parked:
            return
        operations, request = self.operations, self.request
        operations.waits.unpark(request.unique)
        try:
            data, number = self._answer(), 0
        except NotNow:
            if not self.unheard:
                operations.answer_later(request, operations.read_waiting)
            return
        except Exception as problem:
            data, number = b"", operations.errno_of(Opcode(request.opcode).name.lower(), problem)
        if not self.unheard:
            operations.answer(request, number, data)

    def signalled(self, killed: bool) -> None:
        """The disk goes on."""
        if killed and not self.unheard:
            self.unheard = True
            self.operations.answer(self.request, errno.EINTR, b"")


class DirectRead(_DirectCall):
    __slots__ = ()

    def _start(self) -> None:
        request = self.request
        self.operations.fs.start_read(
            self.handle.inode.number, request.offset, request.size, self.ended
        )

    def _answer(self) -> Answer:
        if self.error is not None:
            raise self.error
        if not self.request.flags & os.O_NOATIME:
            self.operations.fs.accessed(self.handle.inode.number)
        return self.pieces


class DirectWrite(_DirectCall):
    __slots__ = ("arrived_ns", "data")

    def __init__(self, operations: DataOperations, request: Request, data: memoryview) -> None:
        super().__init__(operations, request)
        self.arrived_ns = time.monotonic_ns()
        self.data: memoryview | None = data

    def _start(self) -> None:
        request, fs, number = self.request, self.operations.fs, self.handle.inode.number
        kill = request.kills_privileges
        if kill and (seen := fs.try_getattr(number)) and seen.mode & 0o6000:
            raise NotNow  # the kernel has to be told before the answer
        data, self.data = self.data, None
        assert data is not None
        fs.start_write(number, request.offset, data, self.written, kill=kill)

    def written(self, error: Exception | None) -> None:
        """Also after an error some of it may have been written."""
        self.error = error
        inode, start = self.handle.inode, self.request.offset
        end = start + self.request.size
        inode.note_write(start, end)
        if inode.filled_beside(start, end, self.arrived_ns):
            self.operations.caches.settle_then(inode, (start, end), self._finish)
        else:
            self._finish()

    def _answer(self) -> Answer:
        handle, request = self.handle, self.request
        if isinstance(self.error, FsError):
            handle.refused_thread = request.pid
            # If data was lost on the way through the buffer, the handle is told of it now.
            _, handle.losses_heard = self.operations.fs.take_error(
                handle.inode.number, handle.losses_heard
            )
        if self.error is not None:
            raise self.error
        return layout.WRITE_OUT.pack(request.size, 0)
