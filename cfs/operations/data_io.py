"""Handlers of data: read, write, and what makes it durable.

A READ or WRITE through the page cache takes the inode's lock itself, as a waiter that a revocation
can serve or go around (`KernelCaches.hold`), because the kernel may keep pages locked for it. What
bypasses the page cache (O_DIRECT; O_APPEND, which is answered with direct_io so that no page is
ever filled at the end of file that the kernel believes in) goes through the core's own locking.
"""

from __future__ import annotations

import logging
import os
import time

import trio

from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.fuse import layout
from cfs.fuse.callers_io import write_calls
from cfs.fuse.interrupt_io import RequestWaits
from cfs.fuse.kernel_cache import PAGE_BYTES, KernelInode, Waiter
from cfs.fuse.kernel_cache_io import KernelCaches
from cfs.fuse.pyfuse3_io import pyfuse3
from cfs.operations.base_io import Handle, handler
from cfs.operations.direct_io import DirectRead, DirectWrite
from cfs.operations.extension_io import Answer, Extension, Parked
from cfs.operations.open_io import OpenOperations
from cluster.device import Buffer
from cluster.locks import CachedLock, Mode
from native.requests import Opcode, Request

log = logging.getLogger("cfs.operations")

READ_BYTES_MAX = 512 << 20
"""Data of READs being answered; above it further ones wait (their lock held, their turn near)."""
SYNC_BIT = os.O_SYNC & ~os.O_DSYNC
WAITING_FLAGS = os.O_APPEND | os.O_DSYNC | os.O_SYNC
"""Of an open file: its writes wait, or need more than the lock."""
WRITE_BYTES_MAX = 1 << 20
SPLIT_BYTES_MIN = WRITE_BYTES_MAX - PAGE_BYTES
SPLIT_LOOK_S = 0.005
SPLIT_UNSEEN_S = 0.05
SPLIT_WAIT_S = 10.0
"""How long the lock stays for the rest of a record: while its writer is inside of the call, if that
can be seen; looked at that often."""


class Admission:
    """Bytes in progress, bounded; first come, first served."""

    def __init__(self, bytes_max: int) -> None:
        self._free = bytes_max
        self._queue: list[trio.Event] = []

    async def enter(self, size: int) -> None:
        while self._queue or self._free < size:
            event = trio.Event()
            self._queue.append(event)
            await event.wait()
            if self._free >= size:
                break
        self._free -= size

    def leave(self, size: int) -> None:
        self._free += size
        if self._queue:
            self._queue.pop(0).set()


class DataOperations(OpenOperations):
    """read, write, fsync, flush."""

    def __init__(self, fs: FileSystem, caches: KernelCaches, waits: RequestWaits) -> None:
        super().__init__(fs, caches, waits)
        self.admission = Admission(READ_BYTES_MAX)
        self.launder_waits = 0

    # -- what became of written data -----------------------------------------------------------

    def data_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.FLUSH: Extension(self._flush, self._try_flush),
            Opcode.READ: Extension(self.read_waiting, self._try_read),
            Opcode.WRITE: Extension(self._write, try_in_place=self._try_write),
        }

    def _try_flush(self, request: Request, body: bytes) -> bytes:
        """close() waits for nothing, and tells of data that was lost by now."""
        handle = self.handles.get(request.handle)
        if handle is not None:
            self.flushed(handle.inode.number, request.lock_owner)
            self._hear(handle)
        return b""

    async def _flush(self, request: Request, body: bytes) -> bytes:
        return self._try_flush(request, body)

    def _hear(self, handle: Handle) -> None:
        """Raise for data that was lost since this handle was told last."""
        number, handle.losses_heard = self.fs.take_error(handle.inode.number, handle.losses_heard)
        if number:
            raise FsError(number, "data written earlier was lost")

    async def sync_written(self, handle: Handle, flags: int = os.O_DSYNC) -> None:
        """After a write through a handle with O_DSYNC or O_SYNC: durable before the answer."""
        await self.fs.sync_own(handle.inode.number, datasync=not flags & SYNC_BIT)
        self._hear(handle)

    @handler
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        handle = self.handles[fh]
        await self.fs.fsync(handle.inode.number, datasync)
        self._hear(handle)

    # -- reading -------------------------------------------------------------------------------

    def _try_read(self, request: Request, body: bytes) -> Answer | Parked | None:
        return DirectRead(self, request).now_or_later() if request.past_cache else None

    async def read_waiting(self, request: Request, body: bytes) -> bytes:
        """Any READ, in a task."""
        handle = self.handles[request.handle]
        data = await self._read(handle, request, request.offset, request.size)
        if not request.flags & os.O_NOATIME:
            self.fs.accessed(handle.inode.number)
        return data

    async def _read(self, handle: Handle, request: Request, off: int, size: int) -> bytes:
        inode = handle.inode
        if request.past_cache:
            return await self.fs.read(inode.number, off, size, direct=True)
        lock = handle.lock
        while True:
            mode = Mode.EX if inode.writers else Mode.PR
            if inode.revoking or not lock.try_hold(mode):
                waiter = Waiter(off, off + size, mode, writes=False, cached=True)
                await self.caches.hold(inode, lock, waiter)
            inode.serving += 1
            try:
                if inode.writers and mode == Mode.EX:
                    # Stores into these pages will ask nobody: they get their blocks now.
                    await self.fs.reserve_held(inode.number, off, size)
                if mode == Mode.EX or not inode.writers:
                    data = await self._read_current(inode, off, size)
                if mode == Mode.EX or not inode.writers:
                    return data
            finally:
                inode.answered_read(off, off + size, time.monotonic_ns())
                lock.release(mode)
                self.caches.served_one(inode)
            # A shared writer came while this waited, or read: again, under EX.

    async def _read_current(self, inode: KernelInode, off: int, size: int) -> bytes:
        """Read under the lock; again if a write overtook it, because its page would be believed."""
        await self.admission.enter(size)
        inode.reading += 1
        try:
            while True:
                number = inode.write_number
                data = await self.fs.read_held(inode.number, off, size)
                if number == inode.write_number or not inode.written_since(number, off, off + size):
                    return data
        finally:
            inode.reading -= 1
            if not inode.reading:
                inode.writes.clear()
            self.admission.leave(size)

    # -- writing -------------------------------------------------------------------------------

    def _try_write(self, request: Request, body: memoryview) -> Answer | Parked | None:
        """The common cases: under a lock that is here."""
        if request.laundered:
            return None
        handle = self.handles[request.handle]
        if request.flags & WAITING_FLAGS:
            if request.append:
                turn = handle.appends[request.unique] = trio.Event()
                if len(handle.appends) == 1:
                    turn.set()
            return None
        if request.past_cache:
            if handle.uncached or not request.flags & os.O_DIRECT:
                return None
            return DirectWrite(self, request, body[layout.WRITE_IN_BYTES :]).now_or_later()
        inode, lock = handle.inode, handle.lock
        # `filled`: pages were invalidated, and this WRITE may be near that.
        if inode.revoking or inode.filled or not lock.try_hold(Mode.EX):
            return None
        off, buf = request.offset, body[layout.WRITE_IN_BYTES :]
        try:
            kill = request.kills_privileges
            if kill and (seen := self.fs.try_getattr(inode.number)) and seen.mode & 0o6000:
                return None  # the kernel has to be told before the answer
            written = self.fs.try_write_held(inode.number, off, buf, kill=kill)
        finally:
            # Whatever becomes of it: the kernel has filled its pages before it asked.
            inode.wrote_pages(off, off + len(buf), time.monotonic_ns())
            lock.release(Mode.EX)
        return layout.WRITE_OUT.pack(written, 0)

    async def _write(self, request: Request, body: bytes) -> bytes:
        off, buf = request.offset, memoryview(body)[layout.WRITE_IN_BYTES :]
        if request.laundered:
            written = await self._launder(self.known(request.inode), off, buf)
        else:
            handle = self.handles[request.handle]
            try:
                written = await self._write_by(handle, request, off, buf)
            except FsError:
                handle.refused_thread = request.pid
                raise
            await self.caches.attributes_settled(handle.inode)
        return layout.WRITE_OUT.pack(written, 0)

    async def _write_by(self, handle: Handle, request: Request, off: int, buf: Buffer) -> int:
        inode = handle.inode
        flags, kill = request.flags, request.kills_privileges
        if request.append:
            return await self._append(handle, request, off, buf)
        if request.past_cache:
            return await self._write_past_cache(handle, request, off, buf)
        lock = handle.lock
        arrived_ns = time.monotonic_ns()
        if inode.revoking or not lock.try_hold(Mode.EX):
            waiter = Waiter(off, off + len(buf), Mode.EX, writes=True, cached=True)
            await self.caches.hold(inode, lock, waiter)
        written = await self._write_under(inode, lock, off, buf, kill=kill)
        if inode.filled and inode.near_invalidation(arrived_ns):
            await self.caches.drop_filled(inode, off, off + len(buf))
        if flags & os.O_DSYNC:
            await self.sync_written(handle, flags)
        return written

    async def _write_past_cache(
        self, handle: Handle, request: Request, off: int, buf: Buffer
    ) -> int:
        inode = handle.inode
        flags, kill = request.flags, request.kills_privileges
        direct = bool(flags & os.O_DIRECT)
        arrived_ns = time.monotonic_ns()
        try:
            written = await self.fs.write(inode.number, off, buf, direct=direct, kill=kill)
        except FsError:
            # If data was lost on the way through the buffer, the handle is told of it now.
            _, handle.losses_heard = self.fs.take_error(inode.number, handle.losses_heard)
            raise
        finally:
            # Also after an error: some of it may have been written.
            if handle.uncached or inode.filled_beside(off, off + len(buf), arrived_ns):
                await self.caches.settle(inode, [(off, off + len(buf))])
            else:
                inode.note_write(off, off + len(buf))
        if flags & os.O_DSYNC:
            await self.sync_written(handle, flags)
        return written

    async def _append(self, handle: Handle, request: Request, off: int, buf: Buffer) -> int:
        """Write at the true end of file, whatever the kernel believes that to be."""
        turn = handle.appends[request.unique]
        try:
            if not turn.is_set():
                await self.waits.wait(turn)
            end, written = await self._append_in_turn(handle, request, off, buf)
        finally:
            del handle.appends[request.unique]
            for following in handle.appends.values():
                following.set()
                break
        spans = [(end, end + len(buf))]
        if handle.uncached:
            await self.caches.settle(handle.inode, spans)
        else:
            # O_APPEND was set on an open handle (F_SETFL): the kernel has filled pages at its own
            # idea of the end.
            self.caches.start_settle(handle.inode, [*spans, (off, off + len(buf))])
        if request.data_sync:
            await self.sync_written(handle, request.flags)
        return written

    async def _append_in_turn(
        self, handle: Handle, request: Request, off: int, buf: Buffer
    ) -> tuple[int, int]:
        """Where the end of file was, and what was written there."""
        inode, lock = handle.inode, handle.lock
        if handle.appending is not None:
            handle.appending.cancel()  # this takes over the hold that was kept for it
            handle.appending = None
        elif inode.revoking or not lock.try_hold(Mode.EX):
            waiter = Waiter(off, off + len(buf), Mode.EX, writes=True, cached=not handle.uncached)
            await self.caches.hold(inode, lock, waiter)
        kept = False
        inode.serving += 1
        try:
            end = (await self.fs.getattr_held(inode.number)).size
            written = await self.fs.write_held(
                inode.number, end, buf, kill=request.kills_privileges
            )
            kept = SPLIT_BYTES_MIN < len(buf) < WRITE_BYTES_MAX
        finally:
            if kept:
                self._keep_for_the_rest(handle, request.pid)
            else:
                lock.release(Mode.EX)
            self.caches.served_one(inode)
        return end, written

    def _keep_for_the_rest(self, handle: Handle, thread: int) -> None:
        """The kernel splits a write of at most 1 MiB whose buffer is not page aligned; the lock
        stays here until the rest has come, so that no other node's record comes in between."""
        scope = handle.appending = trio.CancelScope()
        calls = write_calls(thread)

        async def give_back() -> None:
            end = trio.current_time() + (SPLIT_UNSEEN_S if calls is None else SPLIT_WAIT_S)
            with scope:
                while trio.current_time() < end and write_calls(thread) == calls:  # noqa: ASYNC110
                    await trio.sleep(SPLIT_LOOK_S)
            if handle.appending is scope:  # nobody has taken the hold over meanwhile
                handle.appending = None
                handle.lock.release(Mode.EX)

        trio.lowlevel.spawn_system_task(give_back)

    async def _write_under(
        self,
        inode: KernelInode,
        lock: CachedLock,
        off: int,
        buf: Buffer,
        *,
        laundered: bool = False,
        kill: bool = False,
    ) -> int:
        """Write under the EX hold that the caller has taken, and give it back."""
        inode.serving += 1
        try:
            return await self.fs.write_held(inode.number, off, buf, laundered=laundered, kill=kill)
        finally:
            inode.wrote_pages(off, off + len(buf), time.monotonic_ns())
            lock.release(Mode.EX)
            self.caches.served_one(inode)

    async def _launder(self, inode: KernelInode, off: int, buf: Buffer) -> int:
        """The kernel writes dirty pages of a shared mapping back; if this failed they would be
        lost, and whoever invalidates them waits for it. It is only buffered."""
        lock = self.fs.inode_lock(inode.number)
        if not lock.hold_demoting(Mode.EX):
            # Pages of an inode with a shared writer are valid only under EX, so this is rare: the
            # grant is on its way.
            self.launder_waits += 1
            await lock.hold(Mode.EX)
        try:
            await self._write_under(inode, lock, off, buf, laundered=True)
        except FsError as error:
            # The kernel drops the page whatever it is told. Whoever has the file open hears of it.
            log.error("inode %d: a page of a mapping is lost: %s", inode.number, error)
            self.fs.note_error(inode.number, error.errno)
        return len(buf)
