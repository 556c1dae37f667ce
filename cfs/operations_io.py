"""The complete set of FUSE operations of a mount; here are those that libfuse and pyfuse3 carry.

Answers that the kernel may cache are built and sent without a checkpoint between the look at the
lock and the answer; see `KernelCaches.attribute_timeout` and `name_timeout`.
"""

from __future__ import annotations

import errno
import stat

from cfs.attributes import DirEntry
from cfs.errors import FsError
from cfs.mount_fuse_io import pyfuse3
from cfs.operations_base_io import handler
from cfs.operations_extension_io import Extension
from cfs.operations_inode_io import InodeOperations
from cfs.operations_names_io import NameOperations
from cfs.operations_range_io import RangeOperations
from cfs.operations_xattr_io import XattrOperations
from native.requests import Opcode

READDIR_BATCH = 64
Context = pyfuse3.RequestContext


class CfsOperations(NameOperations, InodeOperations, XattrOperations, RangeOperations):
    """What pyfuse3 calls, and the answers to what it does not know (`extensions`)."""

    def extensions(self) -> dict[Opcode, Extension]:
        """The requests that are answered past pyfuse3."""
        return {
            **self.lookup_extensions(),
            **self.name_extensions(),
            **self.open_extensions(),
            **self.data_extensions(),
            **self.range_extensions(),
            **self.xattr_extensions(),
            **self.inode_extensions(),
            **self.lock_extensions(),
        }

    @handler
    async def readlink(self, inode: pyfuse3.InodeT, ctx: Context) -> pyfuse3.FileNameT:
        number = self.ino(inode)
        target = await self.fs.readlink(number)
        self.fs.accessed(number)
        return pyfuse3.FileNameT(target)

    @handler
    async def statfs(self, ctx: Context) -> pyfuse3.StatvfsData:
        totals = await self.fs.statfs()
        found = pyfuse3.StatvfsData()
        found.f_bsize = found.f_frsize = totals.block_bytes
        found.f_blocks = totals.blocks
        found.f_bfree = found.f_bavail = totals.free_blocks
        found.f_files = totals.blocks
        found.f_ffree = found.f_favail = totals.free_blocks
        found.f_namemax = totals.name_bytes_max
        return found

    # -- directories -------------------------------------------------------------------------------

    @handler
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        handle = self.handles[fh]
        if not handle.removed:
            await self.fs.fsync(handle.inode.number, datasync)

    @handler
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        if self.handles[fh].removed:
            return
        parent = self.handles[fh].inode
        self.fs.accessed(parent.number)
        cookie = start_id
        unique = self.request.unique
        counted: list[int] = []
        while True:
            revision = parent.revision
            found = await self.fs.readdir(parent.number, cookie, READDIR_BATCH)
            if self.waits.is_abandoned(unique):
                self._uncount(counted)
                raise FsError(errno.EINTR)
            timeout = self.name_timeout(parent, revision)
            for item in found:
                if not self._reply_name(token, item, timeout, counted):
                    return
                cookie = item.cookie
            if len(found) < READDIR_BATCH:
                return

    def _uncount(self, numbers: list[int]) -> None:
        """The kernel did not get an answer that named these inodes."""
        for number in numbers:
            inode = self.caches.inodes[number]
            inode.lookups -= 1
            self.caches.drop_if_unused(inode)

    def _reply_name(
        self, token: pyfuse3.ReaddirToken, item: DirEntry, timeout_s: float, counted: list[int]
    ) -> bool:
        """Add a name to the answer, with attributes if they are here, as a LOOKUP would; those
        are added to `counted`."""
        name = pyfuse3.FileNameT(item.name)
        if timeout_s and item.name not in (b".", b".."):
            attributes = self.fs.try_getattr(item.ino)
            if attributes is not None and stat.S_IFMT(attributes.mode) == item.type:
                answer = self.answer_entry(attributes, timeout_s)
                if pyfuse3.readdir_reply(token, name, answer, item.cookie):
                    counted.append(item.ino)
                    return True
                self._uncount([item.ino])
                return False
        return bool(pyfuse3.readdir_reply(token, name, self._plain.fill(item), item.cookie))
