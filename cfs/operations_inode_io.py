"""Single inodes, taken past libfuse: statx with the time of birth, O_TMPFILE, flags by ioctl."""

from __future__ import annotations

import errno
import os
import struct

from cfs import fuse_layout
from cfs.attributes import (
    FLAG_APPEND,
    FLAG_IMMUTABLE,
    FLAG_NOATIME,
    FLAG_NODUMP,
    FLAGS_SETTABLE,
    Attributes,
)
from cfs.errors import FsError
from cfs.kernel_cache import KernelInode
from cfs.operations_data_io import DataOperations
from cfs.operations_extension_io import Extension
from native.requests import Opcode, Request

FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_IOC_GETVERSION = 0x80087601
FS_IOC_FSGETXATTR = 0x801C581F
FS_IOC_FSSETXATTR = 0x401C5820
_FLAGS = struct.Struct("=I")
_FSXATTR = struct.Struct("=5I8x")
"""Extended flags, extent size hint, extents, project, copy-on-write hint."""
XFLAGS = {FLAG_IMMUTABLE: 0x8, FLAG_APPEND: 0x10, FLAG_NOATIME: 0x40, FLAG_NODUMP: 0x80}


class InodeOperations(DataOperations):
    """statx, tmpfile, ioctl."""

    def inode_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.STATX: Extension(self._statx, self._try_statx),
            Opcode.TMPFILE: Extension(self._tmpfile),
            Opcode.IOCTL: Extension(self._ioctl),
        }

    # -- statx -----------------------------------------------------------------------------------

    def _try_statx(self, request: Request, body: bytes) -> bytes | None:
        account = self.known(request.inode)
        attributes = self.try_attributes_of(account)
        return None if attributes is None else self._statx_answer(account, attributes)

    async def _statx(self, request: Request, body: bytes) -> bytes:
        account = self.known(request.inode)
        return self._statx_answer(account, await self.attributes_of(account))

    def _statx_answer(self, account: KernelInode, attributes: Attributes) -> bytes:
        attributes, timeout = self.current_attributes(account, attributes)
        return fuse_layout.encode_statx(attributes, timeout)

    # -- O_TMPFILE ---------------------------------------------------------------------------------

    async def _tmpfile(self, request: Request, body: bytes) -> bytes:
        flags, mode, umask, _ = fuse_layout.CREATE_IN.unpack_from(body)
        parent = self.ino(request.inode)
        made = await self.fs.tmpfile(
            parent, mode, request.uid, request.gid, umask, linkable=not flags & os.O_EXCL
        )
        inode = self.caches.know(made.ino, made.generation, directory=False)
        inode.lookups += 1
        try:
            info = await self.open_handle(inode, flags & ~os.O_TRUNC)
        except BaseException:
            inode.lookups -= 1
            self.caches.drop_if_unused(inode)
            raise
        finally:
            self.fs.close_ref(made.ino)
        attributes, timeout = self.current_attributes(inode, made)
        opened = (info.direct_io and fuse_layout.FOPEN_DIRECT_IO) | (
            info.keep_cache and fuse_layout.FOPEN_KEEP_CACHE
        )
        entry = fuse_layout.encode_entry(
            attributes, inode.node, attribute_timeout_s=timeout, name_timeout_s=0.0
        )
        return entry + fuse_layout.OPEN_OUT.pack(info.fh, opened, 0)

    # -- flags -----------------------------------------------------------------------------------

    async def _ioctl(self, request: Request, body: bytes) -> bytes:
        """What chattr(1) and lsattr(1) need; the kernel checks who may."""
        _, _, command, _, in_size, out_size = fuse_layout.IOCTL_IN.unpack_from(body)
        given = body[fuse_layout.IOCTL_IN.size :][:in_size]
        ino = self.ino(request.inode)
        if command == FS_IOC_SETFLAGS and len(given) >= _FLAGS.size:
            await self.fs.set_flags(ino, _FLAGS.unpack_from(given)[0], FLAGS_SETTABLE)
            return self._ioctl_answer(b"", out_size)
        if command == FS_IOC_FSSETXATTR and len(given) >= _FSXATTR.size:
            await self._set_xflags(ino, given)
            return self._ioctl_answer(b"", out_size)
        if command not in (FS_IOC_GETFLAGS, FS_IOC_GETVERSION, FS_IOC_FSGETXATTR):
            raise FsError(errno.ENOTTY)
        found = await self.fs.getattr(ino)
        if command == FS_IOC_GETFLAGS:
            return self._ioctl_answer(_FLAGS.pack(found.flags & FLAGS_SETTABLE), out_size)
        if command == FS_IOC_GETVERSION:
            return self._ioctl_answer(_FLAGS.pack(found.generation & 0x7FFF_FFFF), out_size)
        xflags = sum(bit for flag, bit in XFLAGS.items() if found.flags & flag)
        return self._ioctl_answer(_FSXATTR.pack(xflags, 0, 0, 0, 0), out_size)

    async def _set_xflags(self, ino: int, given: bytes) -> None:
        xflags, extent_size, _, project, cow_size = _FSXATTR.unpack_from(given)
        if extent_size or project or cow_size or xflags & ~sum(XFLAGS.values()):
            raise FsError(errno.EOPNOTSUPP)
        flags = sum(flag for flag, bit in XFLAGS.items() if xflags & bit)
        await self.fs.set_flags(ino, flags, FLAGS_SETTABLE)

    @staticmethod
    def _ioctl_answer(data: bytes, room: int) -> bytes:
        # Numbers that are declared as long are int in truth: no byte more than that is answered.
        return fuse_layout.IOCTL_OUT.pack(0, 0, 0, 0) + data[:room]
