"""Extended attributes, taken past libfuse: pyfuse3 has no flags for setxattr() and no sizes.

The kernel asks for `system.posix_acl_access` when it checks permissions, and keeps what it gets as
long as it believes the attributes of the inode; an invalidation of those takes the list along. So
an answer with a list counts as an answer with attributes (`KernelInode.attributes_out`).
It asks for `security.capability` before the first write to a file whose attributes are new to it.
"""

from __future__ import annotations

import errno

from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.callers_io import CAP_SYS_ADMIN, has_capability
from cfs.fuse.pyfuse3_io import fuse
from cfs.operations.base_io import OperationsBase
from cfs.operations.extension_io import Extension
from cfs.xattr import ACCESS_ACL, DEFAULT_ACL
from native.requests import Opcode, Request

_SIZE = layout.GETXATTR_IN


def sized(wanted: int, data: bytes) -> bytes:
    """The answer to a caller with room for `wanted` bytes; 0: it asks for the size."""
    if not wanted:
        return _SIZE.pack(len(data), 0)
    if len(data) > wanted:
        raise FsError(errno.ERANGE)
    return data


class XattrOperations(OperationsBase):
    """getxattr, setxattr, listxattr, removexattr."""

    def xattr_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.GETXATTR: Extension(self._getxattr, self._try_getxattr),
            Opcode.SETXATTR: Extension(self._setxattr),
            Opcode.LISTXATTR: Extension(self._listxattr),
            Opcode.REMOVEXATTR: Extension(self._removexattr),
        }

    def _try_getxattr(self, request: Request, body: bytes) -> bytes | None:
        name, _ = layout.split_name(body[_SIZE.size :])
        try:
            value = self.fs.try_getxattr(self.ino(request.inode), name)
        except FsError:
            self._answers(request, name)
            raise
        if value is None:
            return None
        self._answers(request, name)
        return sized(_SIZE.unpack_from(body)[0], value)

    async def _getxattr(self, request: Request, body: bytes) -> bytes:
        name, _ = layout.split_name(body[_SIZE.size :])
        try:
            value = await self.fs.getxattr(self.ino(request.inode), name)
        finally:
            self._answers(request, name)
        return sized(_SIZE.unpack_from(body)[0], value)

    def _answers(self, request: Request, name: bytes) -> None:
        """The kernel gets to know an access list, or that there is none. Between the look at the
        inode and the answer there is no checkpoint: a revocation comes before or after both."""
        if name in (ACCESS_ACL, DEFAULT_ACL):
            self.known(request.inode).attributes_out = True

    async def _setxattr(self, request: Request, body: bytes) -> bytes:
        size, flags, extra, _ = layout.SETXATTR_IN.unpack_from(body)
        start = layout.SETXATTR_IN.size
        if not fuse.session_info().agreed_bits & fuse.Init.SETXATTR_EXT:
            start, extra = _SIZE.size, 0
        name, value = layout.split_name(body[start:])
        await self.fs.setxattr(
            self.ino(request.inode),
            name,
            value[:size],
            flags,
            kill_group_id=bool(extra & layout.SETXATTR_ACL_KILL_SGID),
        )
        return b""

    async def _listxattr(self, request: Request, body: bytes) -> bytes:
        names = await self.fs.listxattr(self.ino(request.inode))
        hidden = [name for name in names if name.startswith(b"trusted.")]
        if hidden and not has_capability(request, CAP_SYS_ADMIN):
            names = [name for name in names if name not in hidden]
        return sized(_SIZE.unpack_from(body)[0], b"".join(name + b"\0" for name in names))

    async def _removexattr(self, request: Request, body: bytes) -> bytes:
        name, _ = layout.split_name(body)
        await self.fs.removexattr(self.ino(request.inode), name)
        return b""
