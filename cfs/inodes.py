"""Operations on one inode that are neither data nor names: attributes, extended attributes."""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from cfs import acl, xattr
from cfs.attributes import (
    FLAG_NOATIME,
    FLAGS_SETTABLE,
    NOW,
    Attributes,
    SetAttributes,
)
from cfs.cache import InodeState
from cfs.core import Core
from cfs.errors import CorruptionError, FsError
from cfs.files import Files
from cfs.immediate import Attempt
from cfs.nodes import InodeNode
from cfs.orphans import Orphans
from cfs.protection import need_mutable, need_unprotected
from cfs.reading import need_regular
from cfs.transaction import READER, Missing, Tx
from cfs.xattr import ACCESS_ACL, DEFAULT_ACL, XattrEditor
from cluster.errors import BarredError
from cluster.locks import Mode

ACCESSED_MAX = 1024
"""Access times being moved at once; further ones are left out."""
ACCESS_INTERVAL_NS = 24 * 3600 * 1_000_000_000


class Inodes:
    """Operations on single inodes; names of methods as the system calls."""

    def __init__(self, core: Core, files: Files, orphans: Orphans) -> None:
        self.core = core
        self.files = files
        self.orphans = orphans
        self._accessed: set[int] = set()

    # -- attributes ------------------------------------------------------------------------------

    async def setattr(self, state: InodeState, changes: SetAttributes) -> Attributes:
        """All changes in one transaction. The caller holds the inode in EX. It is done with that:
        what hinders the rest of a long cut (a signal to the caller) only puts it off."""
        core = self.core
        done, attributes = await core.run(lambda tx: self._setattr_body(tx, state, changes))
        try:
            while not done:
                done = await core.run(lambda tx: self._cut_more(tx, state))
        except FsError:
            self.orphans.reap_soon(state.ino)
        return attributes

    def try_setattr(self, state: InodeState, changes: SetAttributes) -> Attributes:
        """As `setattr` without a new size, at once, taking the lock itself. Raises NotNow."""
        assert changes.size is None
        with Attempt() as attempt:
            attempt.hold(state, Mode.EX)
            return self.core.try_run(lambda tx: self._setattr_body(tx, state, changes))[1]

    def _setattr_body(
        self, tx: Tx, state: InodeState, changes: SetAttributes
    ) -> tuple[bool, Attributes]:
        seen = tx.inode(state)
        if changes.generation not in (None, seen.generation):
            raise FsError(errno.ESTALE)
        self._need_settable(seen, changes)
        inode = tx.edit_inode(state)
        done = True
        if changes.size is not None:
            done = self.files.set_size(tx, state, inode, changes.size)
            if not done:
                self.orphans.add(tx, inode.block)
            self.files.drop_privileges(tx, state, inode, kill=changes.kill_privileges)
            self.files.touch(inode)
        if changes.mode is not None:
            inode.mode = stat.S_IFMT(inode.mode) | changes.mode & 0o7777
            self._mode_into_acl(tx, state, inode)
        if changes.uid is not None or changes.gid is not None:
            inode.uid = inode.uid if changes.uid is None else changes.uid
            inode.gid = inode.gid if changes.gid is None else changes.gid
            if not inode.is_directory:
                self.files.drop_privileges(tx, state, inode, kill=changes.mode is None)
        now = self.core.now(inode.ctime_ns)
        if changes.atime_ns is not None:
            inode.atime_ns = now if changes.atime_ns == NOW else changes.atime_ns
        if changes.mtime_ns is not None:
            inode.mtime_ns = now if changes.mtime_ns == NOW else changes.mtime_ns
        inode.ctime_ns = now if changes.ctime_ns in (None, NOW) else changes.ctime_ns or now
        inode.counter += 1
        return done, inode.attributes()

    @staticmethod
    def _need_settable(inode: InodeNode, changes: SetAttributes) -> None:
        need_mutable(inode)
        if changes.size is not None:
            need_regular(inode)
        if any(
            field not in (None, NOW)
            for field in (
                changes.size, changes.mode, changes.uid, changes.gid, changes.atime_ns,
                changes.mtime_ns,
            )
        ):  # fmt: skip
            need_unprotected(inode)

    def _mode_into_acl(self, tx: Tx, state: InodeState, inode: InodeNode) -> None:
        if inode.xattrs is None:
            return
        editor = XattrEditor(tx, state, inode, self.core.space)
        value = editor.get(ACCESS_ACL)
        if value is None:
            return
        try:
            entries = acl.decode_untrusted(value)
        except CorruptionError as error:
            raise self.core.damaged(error, inode.block, "an access control list") from error
        editor.set(ACCESS_ACL, acl.encode(acl.with_mode(entries, inode.mode)))

    def accessed(self, state: InodeState) -> None:
        """The inode was read: move its access time in the background, if that is due."""
        options = self.core.options
        if not options.access_times or options.read_only:
            return
        node = state.node
        if node is None or not self._is_access_due(node) or len(self._accessed) >= ACCESSED_MAX:
            return
        if state.number not in self._accessed:
            self._accessed.add(state.number)
            self.core.runtime.spawn(lambda: self._access_task(state), "access time")

    def _is_access_due(self, inode: InodeNode) -> bool:
        if inode.flags & FLAG_NOATIME:
            return False
        now = self.core.environment.wall_clock_ns()
        return inode.atime_ns <= max(inode.mtime_ns, inode.ctime_ns) or (
            now - inode.atime_ns >= ACCESS_INTERVAL_NS
        )

    async def _access_task(self, state: InodeState) -> None:
        try:
            await state.hold(Mode.EX)
            try:
                await self.core.run(lambda tx: self._access_body(tx, state))
            finally:
                state.release(Mode.EX)
        except (FsError, BarredError):
            pass  # It is gone, or the mount is; nobody waits for this.
        finally:
            self._accessed.discard(state.number)

    def _access_body(self, tx: Tx, state: InodeState) -> None:
        if not self._is_access_due(tx.inode(state)):
            return
        inode = tx.edit_inode(state)
        inode.atime_ns = self.core.now(max(inode.mtime_ns, inode.ctime_ns))
        tx.after(lambda: self.core.kernel.attributes_changed(inode.block))

    def _cut_more(self, tx: Tx, state: InodeState) -> bool:
        """The next step of a cut that one transaction could not do."""
        done = self.files.cut_more(tx, state)
        if done and tx.inode(state).nlink:
            self.orphans.remove(tx, state.ino)
        return done

    # -- extended attributes ---------------------------------------------------------------------

    def try_getxattr(self, state: InodeState, name: bytes) -> bytes | None:
        """`getxattr` if all is here, else None."""
        xattr.need_name(name)
        if not state.try_hold(Mode.PR):
            return None
        try:
            return self._value(state, self.core.superblock.name_hash(name), name)
        except Missing:
            return None
        finally:
            state.release(Mode.PR)

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
            return await self.core.see(lambda: xattr.names(READER, state, READER.inode(state)))
        finally:
            state.release(Mode.PR)

    async def setxattr(
        self,
        state: InodeState,
        name: bytes,
        value: bytes,
        flags: int = 0,
        *,
        kill_group_id: bool = False,
    ) -> None:
        """`kill_group_id`: who sets this access list may not keep the set-group-id bit."""
        xattr.need_name(name)
        if name not in (ACCESS_ACL, DEFAULT_ACL):
            await self._change(state, lambda editor: editor.set(name, value, flags))
            return
        entries = acl.parse(value)
        if name == ACCESS_ACL:
            await self._change(
                state, lambda editor: self._set_access(editor, entries, kill_group_id)
            )
        else:
            await self._change(state, lambda editor: self._set_default(editor, entries))

    @staticmethod
    def _set_access(editor: XattrEditor, entries: acl.Acl, kill_group_id: bool) -> None:
        inode = editor.inode
        if stat.S_ISLNK(inode.mode):
            raise FsError(errno.EOPNOTSUPP)
        if entries:
            inode.mode = inode.mode & ~0o777 | acl.permission_bits(entries)
            if kill_group_id:
                inode.mode &= ~stat.S_ISGID
        if acl.is_minimal(entries):
            editor.remove(ACCESS_ACL)
        else:
            editor.set(ACCESS_ACL, acl.encode(entries))

    @staticmethod
    def _set_default(editor: XattrEditor, entries: acl.Acl) -> None:
        if not entries:
            editor.remove(DEFAULT_ACL)
        elif not editor.inode.is_directory:
            raise FsError(errno.EACCES)
        else:
            editor.set(DEFAULT_ACL, acl.encode(entries))

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
        need_unprotected(tx.inode(state))
        inode = tx.edit_inode(state)
        change(XattrEditor(tx, state, inode, self.core.space))
        self.changed(inode)

    # -- flags -----------------------------------------------------------------------------------

    async def set_flags(self, state: InodeState, flags: int, mask: int) -> None:
        """Change the flags in `mask`. EOPNOTSUPP for a flag that is not known."""
        if flags & ~FLAGS_SETTABLE:
            raise FsError(errno.EOPNOTSUPP)
        await state.hold(Mode.EX)
        try:
            await self.core.run(lambda tx: self._flags_body(tx, state, flags, mask))
        finally:
            state.release(Mode.EX)

    def _flags_body(self, tx: Tx, state: InodeState, flags: int, mask: int) -> None:
        mask &= FLAGS_SETTABLE
        seen = tx.inode(state)
        if seen.flags & mask == flags & mask:
            return
        inode = tx.edit_inode(state)
        inode.flags = inode.flags & ~mask | flags & mask
        self.changed(inode)

    def changed(self, inode: InodeNode) -> None:
        """Attributes changed now, not the content."""
        inode.ctime_ns = self.core.now(inode.ctime_ns)
        inode.counter += 1
