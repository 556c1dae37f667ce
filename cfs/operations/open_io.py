"""Open files and directories, taken past libfuse: open, release, opendir, releasedir.

The answer to an open follows without a checkpoint, so that no revocation comes between.
"""

from __future__ import annotations

import errno
import os

from cfs.attributes import Attributes, SetAttributes
from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.kernel_cache import KernelInode
from cfs.immediate import Attempt
from cfs.operations.base_io import Handle
from cfs.operations.extension_io import Extension
from cfs.operations.locks_io import LockOperations
from cfs.protection import need_openable
from cfs.transaction import NotNow
from cluster.locks import CachedLock, Mode
from native.requests import Opcode, Request


class OpenOperations(LockOperations):
    """open, release, opendir, releasedir."""

    mmap_coherent = True

    def open_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.OPEN: Extension(self._open, self._try_open),
            Opcode.RELEASE: Extension(self._release, self._try_release),
            Opcode.OPENDIR: Extension(self._opendir, self._try_opendir),
            Opcode.RELEASEDIR: Extension(self._release, self._try_releasedir),
        }

    def encode_opened(self, handle: Handle) -> bytes:
        """`fuse_open_out`."""
        flags = layout.FOPEN_KEEP_CACHE
        if handle.uncached:
            flags |= layout.FOPEN_DIRECT_IO
        return layout.OPEN_OUT.pack(handle.number, flags, 0)

    # -- files -------------------------------------------------------------------------------------

    def _try_open(self, request: Request, body: bytes) -> bytes:
        handle = self.try_open_handle(self.known(request.inode), request.flags)
        return self.encode_opened(handle)

    async def _open(self, request: Request, body: bytes) -> bytes:
        account = self.known(request.inode)
        handle = await self.open_handle(account, request.flags, kill=request.kills_privileges)
        self.stop_if_opened_in_vain(request, handle)
        return self.encode_opened(handle)

    def try_open_handle(self, inode: KernelInode, flags: int) -> Handle:
        """`open_handle` if nothing has to be waited for: no message, no page to drop. Raises NotNow
        else."""
        number = inode.number
        shared = flags & os.O_ACCMODE == os.O_RDWR and self.mmap_coherent
        if flags & os.O_TRUNC or (shared and not inode.writers and inode.pages):
            raise NotNow
        if not self.fs.try_open_ref(number):
            raise NotNow
        try:
            with Attempt() as attempt:
                if flags & os.O_ACCMODE:
                    found = self.fs.try_getattr(number)
                    if found is None:
                        raise NotNow
                    need_openable(found.flags, writes=True, appends=bool(flags & os.O_APPEND))
                if shared:
                    attempt.hold(self.fs.inode_lock(number), Mode.EX)
                handle = self._new_handle(inode, flags)
                if shared:
                    handle.shared_writer = True
                    inode.writers += 1
        except BaseException:
            self.fs.close_ref(number)
            raise
        return handle

    async def open_handle(self, inode: KernelInode, flags: int, *, kill: bool = False) -> Handle:
        """Open an inode that the kernel knows; the answer follows without a checkpoint. `kill`:
        who truncates may not keep set-user-id and set-group-id."""
        number = inode.number
        if not self.fs.try_open_ref(number):
            await self.fs.open_ref(number)
        try:
            if flags & (os.O_ACCMODE | os.O_TRUNC):
                found = self.fs.try_getattr(number) or await self.fs.getattr(number)
                appends = flags & (os.O_APPEND | os.O_TRUNC) == os.O_APPEND
                need_openable(found.flags, writes=True, appends=appends)
            handle = self._new_handle(inode, flags)
        except BaseException:
            self.fs.close_ref(number)
            raise
        try:
            shared = flags & os.O_ACCMODE == os.O_RDWR and self.mmap_coherent
            if shared:
                handle.shared_writer = True
                inode.writers += 1
            if flags & os.O_TRUNC:
                # No lock is waited for after this: the kernel drops its pages only if the open
                # succeeds, and until the answer it writes no dirty page back, which a revocation
                # may be waiting for.
                await self.truncate(inode, SetAttributes(size=0, kill_privileges=kill))
                await self.caches.attributes_settled(inode)
            elif shared:
                await self._start_shared_writing(inode, handle.lock)
        except BaseException:
            self.drop_handle(handle.number)
            self.fs.close_ref(number)
            raise
        return handle

    async def open_made(self, made: Attributes, flags: int) -> Handle:
        """`open_handle` of a file that was just made, which the kernel does not know yet."""
        inode = self.caches.know(made.ino, made.generation, directory=False)
        inode.lookups += 1  # so that it stays while this waits
        try:
            handle = await self.open_handle(inode, flags & ~os.O_TRUNC)
        except BaseException:
            inode.lookups -= 1
            self.caches.drop_if_unused(inode)
            raise
        inode.lookups -= 1
        return handle

    def _new_handle(self, inode: KernelInode, flags: int) -> Handle:
        handle = self.add_handle(inode, self.fs.inode_lock(inode.number), flags)
        handle.losses_heard = self.fs.error_mark(inode.number)
        shared = flags & os.O_ACCMODE == os.O_RDWR
        handle.uncached = bool(flags & os.O_APPEND) or (shared and not self.mmap_coherent)
        return handle

    async def _start_shared_writing(self, inode: KernelInode, lock: CachedLock) -> None:
        """From now on the inode's pages are valid only under EX (rule G5). Those that are cached
        under PR stay valid if the lock goes up without having gone down; if it does go down
        first, the revocation drops them because `writers` is up. Pages of holes go in any case: a
        store into them would find no block reserved."""
        if not lock.try_hold(Mode.EX):
            await lock.hold(Mode.EX)
        try:
            if inode.writers == 1 and inode.pages:
                start, end = inode.pages.spans[0][0], inode.pages.spans[-1][1]
                if await self.fs.has_holes_held(inode.number, start, end):
                    await self.caches.drop_all_pages(inode.number)
        finally:
            lock.release(Mode.EX)

    def stop_if_opened_in_vain(self, request: Request, handle: Handle) -> None:
        """Raise if the caller was killed: the kernel will never release the handle."""
        if self.waits.is_abandoned(request.unique):
            self._close(handle.number)
            raise FsError(errno.EINTR, "the caller was killed")

    def _try_release(self, request: Request, body: bytes) -> bytes:
        self._close(request.handle, request)
        return b""

    async def _release(self, request: Request, body: bytes) -> bytes:
        raise AssertionError("a release never waits")

    def _close(self, number: int, request: Request | None = None) -> None:
        handle = self.drop_handle(number)
        if request is not None:
            self.released(handle.inode.number, request)
        if handle.appending is not None:
            handle.appending.cancel()
            handle.appending = None
            handle.lock.release(Mode.EX)
        self.fs.close_ref(handle.inode.number)

    # -- directories -----------------------------------------------------------------------------

    def _try_opendir(self, request: Request, body: bytes) -> bytes | None:
        account = self.known(request.inode)
        if not self.fs.try_open_ref(account.number):
            return None
        return self._opened_directory(account)

    async def _opendir(self, request: Request, body: bytes) -> bytes:
        account = self.known(request.inode)
        try:
            await self.fs.open_ref(account.number)
        except FsError as error:
            if error.errno != errno.ESTALE or account.remains is None:
                raise
            handle = self.add_handle(account, self.fs.inode_lock(account.number), 0)
            handle.removed = True
            return self._encode_opened_directory(handle)
        answer = self._opened_directory(account)
        if self.waits.is_abandoned(request.unique):
            (number, _, _) = layout.OPEN_OUT.unpack(answer)
            self._close_directory(number)
            raise FsError(errno.EINTR, "the caller was killed")
        return answer

    def _opened_directory(self, account: KernelInode) -> bytes:
        """The caller has taken a reference."""
        try:
            handle = self.add_handle(account, self.fs.inode_lock(account.number), 0)
        except BaseException:
            self.fs.close_ref(account.number)
            raise
        return self._encode_opened_directory(handle)

    @staticmethod
    def _encode_opened_directory(handle: Handle) -> bytes:
        return layout.OPEN_OUT.pack(handle.number, 0, 0)

    def _try_releasedir(self, request: Request, body: bytes) -> bytes:
        self._close_directory(request.handle)
        return b""

    def _close_directory(self, number: int) -> None:
        handle = self.drop_handle(number)
        if not handle.removed:
            self.fs.close_ref(handle.inode.number)
