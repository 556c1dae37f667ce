"""Operations on one inode that are neither data nor names: attributes, extended attributes."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from cfs import xattr
from cfs.attributes import BLOCK_BYTES, NOW, Attributes, SetAttributes
from cfs.cache import InodeState
from cfs.core import Core
from cfs.errors import FsError
from cfs.files import Files, clear_privileges, need_regular
from cfs.nodes import InodeNode
from cfs.orphans import Orphans
from cfs.transaction import READER, Tx
from cfs.xattr import XattrEditor
from cluster.locks import Mode


class Inodes:
    """Operations on single inodes; names of methods as the system calls."""

    def __init__(self, core: Core, files: Files, orphans: Orphans) -> None:
        self.core = core
        self.files = files
        self.orphans = orphans

    # -- attributes ------------------------------------------------------------------------------

    async def setattr(self, state: InodeState, changes: SetAttributes) -> Attributes:
        """All changes in one transaction. The caller holds the inode in EX."""
        core = self.core
        done, attributes = await core.run(lambda tx: self._setattr_body(tx, state, changes))
        while not done:
            done = await core.run(lambda tx: self._cut_more(tx, state))
        return attributes

    def _setattr_body(
        self, tx: Tx, state: InodeState, changes: SetAttributes
    ) -> tuple[bool, Attributes]:
        inode = tx.inode(state)
        if changes.size is not None:
            need_regular(inode)
        inode = tx.edit_inode(state)
        done = True
        if changes.size is not None:
            done = self.files.set_size(tx, state, inode, changes.size)
            if not done:
                self.orphans.add(tx, inode.block)
            clear_privileges(inode)
            self.files.touch(inode)
        if changes.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | changes.mode & 0o7777
        if changes.uid is not None or changes.gid is not None:
            inode.uid = inode.uid if changes.uid is None else changes.uid
            inode.gid = inode.gid if changes.gid is None else changes.gid
            if not inode.is_directory and changes.mode is None:
                clear_privileges(inode)
        now = self.core.now(inode.ctime_ns)
        if changes.atime_ns is not None:
            inode.atime_ns = now if changes.atime_ns == NOW else changes.atime_ns
        if changes.mtime_ns is not None:
            inode.mtime_ns = now if changes.mtime_ns == NOW else changes.mtime_ns
        inode.ctime_ns = now if changes.ctime_ns in (None, NOW) else changes.ctime_ns or now
        inode.counter += 1
        return done, inode.attributes()

    def _cut_more(self, tx: Tx, state: InodeState) -> bool:
        """The next step of a cut that one transaction could not do."""
        inode = tx.edit_inode(state)
        done = self.files.cut(tx, state, inode, -(-inode.size // BLOCK_BYTES))
        if done and inode.nlink:
            self.orphans.remove(tx, inode.block)
        return done

    # -- extended attributes ---------------------------------------------------------------------

    async def getxattr(self, state: InodeState, name: bytes) -> bytes:
        xattr.need_name(name)
        hashed = self.core.superblock.name_hash(name)
        await state.hold(Mode.PR)
        try:
            return await self.core.see(lambda: self._value(state, hashed, name))
        finally:
            state.release(Mode.PR)

    @staticmethod
    def _value(state: InodeState, hashed: int, name: bytes) -> bytes:
        found = xattr.find(READER, state, READER.inode(state), hashed, name)
        if found is None:
            raise FsError(errno.ENODATA)
        return xattr.value_of(READER, state, found[1])

    async def listxattr(self, state: InodeState) -> list[bytes]:
        await state.hold(Mode.PR)
        try:
            return await self.core.see(
                lambda: xattr.names(READER, state, READER.inode(state))
            )
        finally:
            state.release(Mode.PR)

    async def setxattr(self, state: InodeState, name: bytes, value: bytes, flags: int) -> None:
        xattr.need_name(name)
        await self._change(state, lambda editor: editor.set(name, value, flags))

    async def removexattr(self, state: InodeState, name: bytes) -> None:
        xattr.need_name(name)

        def remove(editor: XattrEditor) -> None:
            if not editor.remove(name):
                raise FsError(errno.ENODATA)

        await self._change(state, remove)

    async def _change(self, state: InodeState, change: Callable[[XattrEditor], None]) -> None:
        await state.hold(Mode.EX)
        try:
            await self.core.run(lambda tx: self._change_body(tx, state, change))
        finally:
            state.release(Mode.EX)

    def _change_body(
        self, tx: Tx, state: InodeState, change: Callable[[XattrEditor], None]
    ) -> None:
        inode = tx.edit_inode(state)
        change(XattrEditor(tx, state, inode, self.core.space))
        self.changed(inode)

    def changed(self, inode: InodeNode) -> None:
        """Attributes changed now, not the content."""
        inode.ctime_ns = self.core.now(inode.ctime_ns)
        inode.counter += 1
