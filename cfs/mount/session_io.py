"""The FUSE session of a mount: from the mount system call to its end."""

from __future__ import annotations

import errno
import logging
import os
import select

import trio

from cfs.fuse.notify_io import Notifier, encode_attributes
from cfs.fuse.pyfuse3_io import fuse, pyfuse3
from cfs.mount.options import MountArguments, fuse_options
from cfs.mount.reader_io import take_turns
from cfs.mount.system_io import abort_mount, mounted_minor, set_read_ahead, unmount
from cfs.operations.extension_io import Extensions
from cluster.errors import StackError

log = logging.getLogger("cfs.mount")

TASKS_IDLE = 32
TASKS_MAX = 10_000
BACKGROUND_MAX = 16384
SET_BITS = (
    fuse.Init.EXPLICIT_INVAL_DATA
    | fuse.Init.PARALLEL_DIROPS
    | fuse.Init.POSIX_ACL
    | fuse.Init.DONT_MASK
    | fuse.Init.SETXATTR_EXT
    | fuse.Init.HANDLE_KILLPRIV_V2  # the kernel says of each write whether suid and sgid go
)
CLEAR_BITS = (
    fuse.Init.AUTO_INVAL_DATA
    | fuse.Init.WRITEBACK_CACHE
    | fuse.Init.EXPORT_SUPPORT
    | fuse.Init.HANDLE_KILLPRIV
)


class FuseSession:
    """One mounted connection. There is one per process (pyfuse3 keeps it in a global)."""

    def __init__(self, arguments: MountArguments) -> None:
        self._arguments = arguments
        self.mountpoint = arguments.mountpoint
        self.minor = -1
        self.descriptor = -1
        self.opened = False
        self.aborted = False
        self.unmounted = False
        """The kernel has let go of it; what is mounted there now is not ours."""

    def open(self, operations: pyfuse3.Operations) -> None:
        """Mount. Raises StackError."""
        bits = SET_BITS
        if self._arguments.mmap_coherent:
            bits |= fuse.Init.DIRECT_IO_ALLOW_MMAP
        if self._arguments.cluster_locks:
            bits |= fuse.Init.POSIX_LOCKS | fuse.Init.FLOCK_LOCKS
        fuse.configure(
            fuse.Settings(
                set_bits=bits,
                clear_bits=CLEAR_BITS,
                max_background=BACKGROUND_MAX,
                congestion_threshold=BACKGROUND_MAX * 3 // 4,
            )
        )
        try:
            pyfuse3.init(operations, self.mountpoint, fuse_options(self._arguments))
        except RuntimeError as error:
            raise StackError(f"cannot mount at {self.mountpoint}: {error}") from error
        self.opened = True
        if not fuse.interposed():
            raise StackError("the FUSE session extension was not called; libfuse has changed")
        self.descriptor = fuse.session_fd()
        self.minor = mounted_minor(self.mountpoint)
        set_read_ahead(self.minor, self._arguments.read_ahead_kb)

    def make_notifier(self) -> Notifier:
        """The notifier of this connection; start it inside trio."""
        return Notifier(self.descriptor, epoch=self._arguments.use_epoch)

    async def serve(self, extensions: Extensions) -> None:
        """Answer requests until the mount is gone or `terminate`."""
        take_turns(extensions.dispatch)
        try:
            await pyfuse3.main(min_tasks=TASKS_IDLE, max_tasks=TASKS_MAX)
        finally:
            self.unmounted = not self._is_mounted()

    def terminate(self) -> None:
        """Let `serve` return although the mount is still there."""
        pyfuse3.terminate()

    def is_broken(self) -> bool:
        """Whether the kernel has given the connection up (unmounted or aborted)."""
        poll = select.poll()
        poll.register(self.descriptor, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))

    def _is_mounted(self) -> bool:
        """Whether what is on top of the mount point is ours. Its minor alone does not tell: once
        the kernel has let go of a mount, while this process was stopped perhaps, the next one at
        the place gets the same; but then the kernel does not know our root any more."""
        if mounted_minor(self.mountpoint) != self.minor:
            return False
        try:
            os.write(self.descriptor, encode_attributes(pyfuse3.ROOT_INODE))
        except OSError as error:
            return error.errno != errno.ENOENT
        return True

    async def try_unmount(self) -> int:
        """Unmount if nobody uses it; an errno (0: done). Writes what is dirty; needs `serve`."""
        return await trio.to_thread.run_sync(unmount, self.mountpoint)

    def abort(self) -> None:
        """Every request, now and later, ends with an error; the mount leaves the tree."""
        if self.opened and not self.aborted and not self.unmounted and self._is_mounted():
            self.aborted = True
            abort_mount(self.mountpoint, self.minor)

    def close(self) -> None:
        """Give the connection back; unmounts if that has not happened yet."""
        if self.opened:
            self.abort()
            self.opened = False
            pyfuse3.close(unmount=False)
