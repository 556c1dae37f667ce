"""The complete set of FUSE operations of a mount; here are those that libfuse and pyfuse3 carry.

Answers that the kernel may cache are built and sent without a checkpoint between the look at the
lock and the answer; see `KernelCaches.attribute_timeout` and `name_timeout`.
"""

from __future__ import annotations

import errno
import stat

import trio

from cfs.attributes import DirEntry
from cfs.errors import FsError
from cfs.fuse.pyfuse3_io import pyfuse3
from cfs.operations.base_io import handler
from cfs.operations.extension_io import Extension
from cfs.operations.inode_io import InodeOperations
from cfs.operations.names_io import NameOperations
from cfs.operations.range_io import RangeOperations
from cfs.operations.xattr_io import XattrOperations
from native.requests import Opcode

READDIR_BATCH = 128
PREFETCH_S = 0.5
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
        unique = self.request.unique
        revision = parent.revision
        found = await self.fs.readdir(parent.number, start_id, READDIR_BATCH)
        await self._prefetch(found, patient=start_id != 0)
        if self.waits.is_abandoned(unique):
            raise FsError(errno.EINTR)
        # No waiting from here on: what the kernel is told to believe must hold when it is sent.
        timeout = self.name_timeout(parent, revision)
        for item in found:
            if not self._reply_name(token, item, timeout):
                return

    async def _prefetch(self, found: list[DirEntry], *, patient: bool) -> None:
        """Have the attributes of what is listed here, all at once. After its first READDIRPLUS for
        a directory the kernel sends another one only to a caller who looks at every file: for that
        one (`patient`) other nodes are asked to give way, else what they have is left out."""
        absent = [
            item.ino
            for item in found
            if item.name not in (b".", b"..") and not self.fs.has_attributes(item.ino)
        ]
        if absent:
            # The names are what was asked for; they do not wait for what nobody may get soon.
            with trio.move_on_after(PREFETCH_S):
                async with trio.open_nursery() as nursery:
                    for ino in absent:
                        nursery.start_soon(self.fs.prefetch, ino, patient)

    def _reply_name(self, token: pyfuse3.ReaddirToken, item: DirEntry, timeout_s: float) -> bool:
        """Add a name to the answer, with attributes if they are here, as a LOOKUP would."""
        name = pyfuse3.FileNameT(item.name)
        if timeout_s and item.name not in (b".", b".."):
            attributes = self.fs.try_getattr(item.ino)
            if attributes is not None and stat.S_IFMT(attributes.mode) == item.type:
                answer = self.answer_entry(attributes, timeout_s)
                if pyfuse3.readdir_reply(token, name, answer, item.cookie):
                    return True
                inode = self.caches.inodes[item.ino]
                inode.lookups -= 1
                self.caches.drop_if_unused(inode)
                return False
        return bool(pyfuse3.readdir_reply(token, name, self._plain.fill(item), item.cookie))
