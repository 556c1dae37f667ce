"""Single inodes, past libfuse: setattr, statx with the time of birth, O_TMPFILE, flags by ioctl."""

from __future__ import annotations

import errno
import os
import struct

from cfs.attributes import (
    FLAG_APPEND,
    FLAG_IMMUTABLE,
    FLAG_NOATIME,
    FLAG_NODUMP,
    FLAGS_SETTABLE,
    NOW,
    Attributes,
    SetAttributes,
)
from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.callers_io import is_writing
from cfs.fuse.kernel_cache import KernelInode
from cfs.fuse.layout import NS_PER_S
from cfs.operations.data_io import DataOperations
from cfs.operations.extension_io import Extension
from native.requests import (
    SETATTR_ATIME,
    SETATTR_ATIME_NOW,
    SETATTR_CTIME,
    SETATTR_GID,
    SETATTR_MODE,
    SETATTR_MTIME,
    SETATTR_MTIME_NOW,
    SETATTR_SIZE,
    SETATTR_UID,
    Opcode,
    Request,
)

PERMISSION_BITS = 0o7777

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
    """setattr, statx, tmpfile, ioctl."""

    def inode_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.SETATTR: Extension(self._setattr, self._try_setattr),
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
        return layout.encode_statx(attributes, timeout)

    # -- setattr ---------------------------------------------------------------------------------

    def _changes(self, account: KernelInode, request: Request, body: bytes) -> SetAttributes:
        (
            valid, _, size, _, atime_s, mtime_s, ctime_s, atime_ns, mtime_ns, ctime_ns,
            mode, uid, gid,
        ) = layout.SETATTR_IN.unpack_from(body)  # fmt: skip

        def time(given: int, now: int, seconds: int, ns: int) -> int | None:
            if not valid & given:
                return None
            return NOW if valid & now else seconds * NS_PER_S + ns

        return SetAttributes(
            size=size if valid & SETATTR_SIZE else None,
            mode=mode & PERMISSION_BITS if valid & SETATTR_MODE else None,
            uid=uid if valid & SETATTR_UID else None,
            gid=gid if valid & SETATTR_GID else None,
            atime_ns=time(SETATTR_ATIME, SETATTR_ATIME_NOW, atime_s, atime_ns),
            mtime_ns=time(SETATTR_MTIME, SETATTR_MTIME_NOW, mtime_s, mtime_ns),
            ctime_ns=time(SETATTR_CTIME, 0, ctime_s, ctime_ns),
            kill_privileges=request.kills_privileges,
            generation=self.life_of(account),
        )

    def _try_setattr(self, request: Request, body: bytes) -> bytes | None:
        account = self.known(request.inode)
        changes = self._changes(account, request, body)
        if changes.size is not None:
            return None
        return self._attributes_out(account, self.fs.try_setattr(account.number, changes))

    async def _setattr(self, request: Request, body: bytes) -> bytes:
        account = self.known(request.inode)
        changes = self._changes(account, request, body)
        if changes.size is not None:
            self._need_meant(request)
            changed = await self.truncate(account, changes)
        else:
            changed = await self.fs.setattr(account.number, changes)
        return self._attributes_out(account, changed)

    def _need_meant(self, request: Request) -> None:
        """When a write past the page cache fails, the kernel cuts the file back to the end that it
        believes in (fuse_do_truncate), which may be that of long ago: other nodes have written
        behind it. It does not mind being refused. Raises FsError(EINTR)."""
        handle = self.handles.get(request.handle)
        if handle is None:
            return
        writing = is_writing(request.pid)
        if writing is None:
            writing, handle.refused_thread = handle.refused_thread == request.pid, -1
        if writing:
            raise FsError(errno.EINTR, "nobody wants to truncate")

    def _attributes_out(self, account: KernelInode, changed: Attributes) -> bytes:
        fresh, timeout = self.current_attributes(account, changed)
        return layout.encode_attr_out(fresh, timeout)

    # -- O_TMPFILE ---------------------------------------------------------------------------------

    async def _tmpfile(self, request: Request, body: bytes) -> bytes:
        flags, mode, umask, _ = layout.CREATE_IN.unpack_from(body)
        parent = self.ino(request.inode)
        made = await self.fs.tmpfile(
            parent, mode, request.uid, request.gid, umask, linkable=not flags & os.O_EXCL
        )
        try:
            handle = await self.open_made(made, flags)
        finally:
            self.fs.close_ref(made.ino)
        inode = handle.inode
        inode.lookups += 1
        attributes, timeout = self.current_attributes(inode, made)
        entry = layout.encode_entry(
            attributes, inode.node, attribute_timeout_s=timeout, name_timeout_s=0.0
        )
        return entry + self.encode_opened(handle)

    # -- flags -----------------------------------------------------------------------------------

    async def _ioctl(self, request: Request, body: bytes) -> bytes:
        """What chattr(1) and lsattr(1) need; the kernel checks who may."""
        _, _, command, _, in_size, out_size = layout.IOCTL_IN.unpack_from(body)
        given = body[layout.IOCTL_IN.size :][:in_size]
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
        return layout.IOCTL_OUT.pack(0, 0, 0, 0) + data[:room]
