"""Handlers of names and attributes: the complete set of FUSE operations of a mount.

Answers that the kernel may cache are built and sent without a checkpoint between the look at the
lock and the answer; see `KernelCaches.attribute_timeout` and `name_timeout`.
"""

from __future__ import annotations

import errno
import os
import stat

from cfs.attributes import NOW, Attributes, DirEntry, SetAttributes
from cfs.errors import FsError
from cfs.kernel_cache import KernelInode
from cfs.mount_fuse_io import pyfuse3
from cfs.operations_base_io import handler
from cfs.operations_extension_io import Extension
from cfs.operations_inode_io import InodeOperations
from cfs.operations_lookup_io import LookupOperations
from cfs.operations_range_io import RangeOperations
from cfs.operations_xattr_io import XattrOperations
from native.requests import SETATTR_ATIME_NOW, SETATTR_MTIME_NOW, Opcode

READDIR_BATCH = 64
PERMISSION_BITS = 0o7777
Entry = pyfuse3.EntryAttributes
Context = pyfuse3.RequestContext


class CfsOperations(LookupOperations, InodeOperations, XattrOperations, RangeOperations):
    """What pyfuse3 calls, and the answers to what it does not know (`extensions`)."""

    def extensions(self) -> dict[Opcode, Extension]:
        """The requests that are answered past pyfuse3."""
        return {
            **self.lookup_extensions(),
            **self.data_extensions(),
            **self.range_extensions(),
            **self.xattr_extensions(),
            **self.inode_extensions(),
            **self.lock_extensions(),
        }

    # -- names -----------------------------------------------------------------------------------

    def _made(self, parent: KernelInode, revision: int, attributes: Attributes) -> Entry:
        self.stop_if_abandoned_now()
        return self.answer_entry(attributes, self.name_timeout(parent, revision))

    @handler
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: Context,
    ) -> tuple[pyfuse3.FileInfo, Entry]:
        parent = self.known(parent_inode)
        revision = parent.revision
        try:
            attributes = await self.fs.create(
                parent.number, name, mode, ctx.uid, ctx.gid, ctx.umask
            )
        except FsError as error:
            if error.errno == errno.EEXIST and not flags & os.O_EXCL:
                # Another node made it meanwhile. ESTALE lets the kernel look again and open it
                # the ordinary way, with the permission checks that a CREATE does not get.
                raise FsError(errno.ESTALE) from None
            raise
        # Two answers in one: nothing may come between the entry's and the handle's making.
        inode = self.caches.know(attributes.ino, attributes.generation, directory=False)
        inode.lookups += 1
        try:
            info = await self.open_handle(inode, flags & ~os.O_TRUNC)
        except BaseException:
            inode.lookups -= 1
            raise
        inode.lookups -= 1
        self.stop_if_opened_in_vain(info.fh)
        return info, self._made(parent, revision, attributes)

    @handler
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: Context,
    ) -> Entry:
        parent = self.known(parent_inode)
        revision = parent.revision
        made = await self.fs.mknod(parent.number, name, mode, ctx.uid, ctx.gid, rdev, ctx.umask)
        return self._made(parent, revision, made)

    @handler
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: Context,
    ) -> Entry:
        parent = self.known(parent_inode)
        revision = parent.revision
        made = await self.fs.mkdir(parent.number, name, mode, ctx.uid, ctx.gid, ctx.umask)
        return self._made(parent, revision, made)

    @handler
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: Context,
    ) -> Entry:
        parent = self.known(parent_inode)
        revision = parent.revision
        made = await self.fs.symlink(parent.number, name, target, ctx.uid, ctx.gid)
        return self._made(parent, revision, made)

    @handler
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: Context,
    ) -> Entry:
        parent = self.known(new_parent_inode)
        revision = parent.revision
        made = await self.fs.link(self.ino(inode), parent.number, new_name)
        return self._made(parent, revision, made)

    @handler
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: Context
    ) -> None:
        self.buried(await self.fs.unlink(self.ino(parent_inode), name))

    @handler
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: Context
    ) -> None:
        self.buried(await self.fs.rmdir(self.ino(parent_inode), name))

    @handler
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: Context,
    ) -> None:
        old, new = self.ino(parent_inode_old), self.ino(parent_inode_new)
        self.buried(await self.fs.rename(old, name_old, new, name_new, flags))

    @handler
    async def readlink(self, inode: pyfuse3.InodeT, ctx: Context) -> pyfuse3.FileNameT:
        number = self.ino(inode)
        target = await self.fs.readlink(number)
        self.fs.accessed(number)
        return pyfuse3.FileNameT(target)

    # -- attributes --------------------------------------------------------------------------------

    @handler
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: Entry,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: Context,
    ) -> Entry:
        account = self.known(inode)
        request = self.request
        valid = request.operation_flags
        atime = NOW if valid & SETATTR_ATIME_NOW else attr.st_atime_ns
        mtime = NOW if valid & SETATTR_MTIME_NOW else attr.st_mtime_ns
        changes = SetAttributes(
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode & PERMISSION_BITS if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=atime if fields.update_atime else None,
            mtime_ns=mtime if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            kill_privileges=request.kills_privileges,
        )
        if changes.size is not None:
            changed = await self.truncate(account, changes)
        else:
            changed = await self.fs.setattr(account.number, changes)
        return self.answer_attributes(account, changed)

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
    async def opendir(self, inode: pyfuse3.InodeT, ctx: Context) -> pyfuse3.FileHandleT:
        account = self.known(inode)
        number = account.number
        try:
            if not self.fs.try_open_ref(number):
                await self.fs.open_ref(number)
        except FsError as error:
            if error.errno != errno.ESTALE or account.remains is None:
                raise
            handle = self.add_handle(account, self.fs.inode_lock(number), 0)
            handle.removed = True
            return pyfuse3.FileHandleT(handle.number)
        try:
            handle = self.add_handle(account, self.fs.inode_lock(number), 0)
        except BaseException:
            self.fs.close_ref(number)
            raise
        self.stop_if_opened_in_vain(pyfuse3.FileHandleT(handle.number))
        return pyfuse3.FileHandleT(handle.number)

    @handler
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        handle = self.drop_handle(fh)
        if not handle.removed:
            self.fs.close_ref(handle.inode.number)

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
