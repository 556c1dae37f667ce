"""What changes names, taken past libfuse: create, mkdir, unlink, rename and their kin.

Answers that the kernel may cache are built and sent without a checkpoint between the look at the
lock and the answer; see `KernelCaches.attribute_timeout` and `name_timeout`.
"""

from __future__ import annotations

import errno
import os

from cfs.attributes import Attributes
from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.kernel_cache import KernelInode
from cfs.operations.extension_io import Extension, Later
from cfs.operations.lookup_io import LookupOperations
from cfs.operations.open_io import OpenOperations
from cfs.transaction import NotNow
from native.requests import Opcode, Request


class NameOperations(LookupOperations, OpenOperations):
    """create, mknod, mkdir, symlink, link, unlink, rmdir, rename."""

    def name_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.CREATE: Extension(self._create, self._try_create),
            Opcode.MKNOD: Extension(self._mknod),
            Opcode.MKDIR: Extension(self._mkdir, self._try_mkdir),
            Opcode.SYMLINK: Extension(self._symlink),
            Opcode.LINK: Extension(self._link),
            Opcode.UNLINK: Extension(self._unlink, self._try_unlink),
            Opcode.RMDIR: Extension(self._rmdir, self._try_rmdir),
            Opcode.RENAME: Extension(self._rename, self._try_rename),
            Opcode.RENAME2: Extension(self._rename, self._try_rename),
        }

    def _made(
        self, request: Request, parent: KernelInode, revision: int, attributes: Attributes
    ) -> bytes:
        """The answer after something was waited for."""
        self.stop_if_abandoned(request.unique)
        return self.encode_named(parent, revision, attributes)

    # -- create: a new file, open ----------------------------------------------------------------

    def _try_create(self, request: Request, body: bytes) -> bytes:
        flags, mode, umask, _ = layout.CREATE_IN.unpack_from(body)
        name = body[layout.CREATE_IN.size : -1]
        parent = self.known(request.inode)
        revision = parent.revision
        try:
            made = self.fs.try_create(parent.number, name, mode, request.uid, request.gid, umask)
        except FsError as error:
            raise self._not_created(error, flags) from None
        inode = self.caches.know(made.ino, made.generation, directory=False)
        try:
            handle = self.try_open_handle(inode, flags & ~os.O_TRUNC)
        except (NotNow, FsError):  # the waiting way meets an error again, and knows what to do
            raise Later(lambda r, _: self._open_created(r, parent, revision, made, flags)) from None
        entry = self.encode_named(parent, revision, made)
        return entry + self.encode_opened(handle)

    async def _create(self, request: Request, body: bytes) -> bytes:
        flags, mode, umask, _ = layout.CREATE_IN.unpack_from(body)
        name = body[layout.CREATE_IN.size : -1]
        parent = self.known(request.inode)
        revision = parent.revision
        try:
            made = await self.fs.create(parent.number, name, mode, request.uid, request.gid, umask)
        except FsError as error:
            raise self._not_created(error, flags) from None
        return await self._open_created(request, parent, revision, made, flags)

    @staticmethod
    def _not_created(error: FsError, flags: int) -> FsError:
        """Another node may have made it meanwhile. ESTALE lets the kernel look again and open it
        the ordinary way, with the permission checks that a CREATE does not get."""
        if error.errno == errno.EEXIST and not flags & os.O_EXCL:
            return FsError(errno.ESTALE)
        return error

    async def _open_created(
        self, request: Request, parent: KernelInode, revision: int, made: Attributes, flags: int
    ) -> bytes:
        # Two answers in one: nothing may come between the entry's and the handle's making.
        try:
            handle = await self.open_made(made, flags)
        except FsError:
            # The file is there although its caller is told of an error: the kernel may believe
            # that the name is not.
            self.caches.distrust()
            raise
        self.stop_if_opened_in_vain(request, handle)
        return self.encode_named(parent, revision, made) + self.encode_opened(handle)

    # -- other new inodes, and new names ---------------------------------------------------------

    async def _mknod(self, request: Request, body: bytes) -> bytes:
        mode, rdev, umask, _ = layout.MKNOD_IN.unpack_from(body)
        parent = self.known(request.inode)
        revision = parent.revision
        made = await self.fs.mknod(
            parent.number, body[layout.MKNOD_IN.size : -1], mode, request.uid, request.gid,
            rdev, umask,
        )  # fmt: skip
        return self._made(request, parent, revision, made)

    def _try_mkdir(self, request: Request, body: bytes) -> bytes:
        mode, umask = layout.MKDIR_IN.unpack_from(body)
        parent = self.known(request.inode)
        revision = parent.revision
        made = self.fs.try_mkdir(
            parent.number, body[layout.MKDIR_IN.size : -1], mode, request.uid, request.gid,
            umask,
        )  # fmt: skip
        return self.encode_named(parent, revision, made)

    async def _mkdir(self, request: Request, body: bytes) -> bytes:
        mode, umask = layout.MKDIR_IN.unpack_from(body)
        parent = self.known(request.inode)
        revision = parent.revision
        made = await self.fs.mkdir(
            parent.number, body[layout.MKDIR_IN.size : -1], mode, request.uid, request.gid,
            umask,
        )  # fmt: skip
        return self._made(request, parent, revision, made)

    async def _symlink(self, request: Request, body: bytes) -> bytes:
        name, rest = layout.split_name(body)
        parent = self.known(request.inode)
        revision = parent.revision
        made = await self.fs.symlink(parent.number, name, rest[:-1], request.uid, request.gid)
        return self._made(request, parent, revision, made)

    async def _link(self, request: Request, body: bytes) -> bytes:
        (node,) = layout.LINK_IN.unpack_from(body)
        parent = self.known(request.inode)
        revision = parent.revision
        name = body[layout.LINK_IN.size : -1]
        meant = self.known(node)
        made = await self.fs.link(meant.number, parent.number, name, generation=self.life_of(meant))
        return self._made(request, parent, revision, made)

    # -- names that go ---------------------------------------------------------------------------

    def _try_unlink(self, request: Request, body: bytes) -> bytes:
        self.buried(self.fs.try_remove(self.ino(request.inode), body[:-1], directory=False))
        return b""

    async def _unlink(self, request: Request, body: bytes) -> bytes:
        self.buried(await self.fs.unlink(self.ino(request.inode), body[:-1]))
        return b""

    def _try_rmdir(self, request: Request, body: bytes) -> bytes:
        self.buried(self.fs.try_remove(self.ino(request.inode), body[:-1], directory=True))
        return b""

    async def _rmdir(self, request: Request, body: bytes) -> bytes:
        self.buried(await self.fs.rmdir(self.ino(request.inode), body[:-1]))
        return b""

    def _places(self, request: Request, body: bytes) -> tuple[int, bytes, int, bytes, int]:
        """What a RENAME or RENAME2 says: old directory and name, new directory and name, flags."""
        head = layout.RENAME_IN if request.opcode == Opcode.RENAME else layout.RENAME2_IN
        (node,) = layout.RENAME_IN.unpack_from(body)
        name, rest = layout.split_name(body[head.size :])
        return self.ino(request.inode), name, self.ino(node), rest[:-1], request.flags

    def _try_rename(self, request: Request, body: bytes) -> bytes:
        self.buried(self.fs.try_rename(*self._places(request, body)))
        return b""

    async def _rename(self, request: Request, body: bytes) -> bytes:
        self.buried(await self.fs.rename(*self._places(request, body)))
        return b""
