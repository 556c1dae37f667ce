"""Operations on names: lookup, create, link, unlink and their kin; rename is in `cfs.renames`.

An operation on several inodes looks up, lets go, takes the locks of all inodes in the order of
their numbers, and looks again; when something is no longer as it was (`Changed`) it begins anew.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

import msgspec

from cfs import acl, directory, xattr
from cfs.attributes import (
    BLOCK_BYTES,
    FLAG_LINKABLE,
    LINKS_MAX,
    NAME_BYTES_MAX,
    ROOT_COOKIE_PARENT,
    ROOT_COOKIE_SELF,
    SYMLINK_BYTES_MAX,
    Attributes,
    DirEntry,
)
from cfs.cache import InodeState, hold_all, release_all
from cfs.core import Core
from cfs.errors import CorruptionError, FsError
from cfs.files import Files
from cfs.immediate import Attempt
from cfs.lock_names import open_lock_name
from cfs.nodes import InodeNode, Tree
from cfs.orphans import Orphans
from cfs.protection import need_mutable, need_unprotected
from cfs.transaction import READER, Changed, Missing, NeedInodes, Reader, Tx
from cfs.xattr import ACCESS_ACL, DEFAULT_ACL, XattrEditor
from cluster.locks import CachedLock, Mode


class Birth(msgspec.Struct, frozen=True, gc=False):
    """What a caller says about a new inode. `umask` does not count where a directory has a default
    access control list."""

    mode: int
    uid: int
    gid: int
    umask: int


def need_name(name: bytes) -> None:
    if not name or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)
    if len(name) > NAME_BYTES_MAX:
        raise FsError(errno.ENAMETOOLONG)


def need_new_name(name: bytes) -> None:
    need_name(name)
    if name in (b".", b".."):
        raise FsError(errno.EEXIST)


def need_removable_name(name: bytes) -> None:
    if name == b".":
        raise FsError(errno.EINVAL)
    if name == b"..":
        raise FsError(errno.ENOTEMPTY)
    need_name(name)


class Names:
    """Operations on directories."""

    def __init__(self, core: Core, files: Files, orphans: Orphans) -> None:
        self.core = core
        self.files = files
        self.orphans = orphans

    # -- finding ---------------------------------------------------------------------------------

    def directory_of(self, reader: Reader, state: InodeState) -> InodeNode:
        inode = reader.inode(state)
        if not inode.is_directory:
            raise FsError(errno.ENOTDIR)
        return inode

    def find(self, reader: Reader, state: InodeState, name: bytes) -> directory.Found | None:
        inode = self.directory_of(reader, state)
        return directory.find(reader, state, inode, self.core.superblock.name_hash(name), name)

    def _child(self, reader: Reader, state: InodeState, name: bytes) -> int:
        """The inode that `name` means, "." and ".." too."""
        if name == b".":
            return self.directory_of(reader, state).block
        if name == b"..":
            return self.directory_of(reader, state).parent
        if len(name) > NAME_BYTES_MAX:
            raise FsError(errno.ENAMETOOLONG)
        found = self.find(reader, state, name)
        if found is None:
            raise FsError(errno.ENOENT)
        return found[1]

    def try_lookup(self, parent: int, name: bytes) -> Attributes | None:
        core = self.core
        pstate = core.state(parent)
        if not pstate.try_hold(Mode.PR):
            return None
        try:
            child = core.state(self._child(READER, pstate, name))
            if not child.try_hold(Mode.PR):
                return None
            try:
                return READER.inode(child).attributes()
            finally:
                child.release(Mode.PR)
        except Missing:
            return None
        finally:
            pstate.release(Mode.PR)

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        core = self.core
        pstate = core.state(parent)
        while True:
            await pstate.hold(Mode.PR)
            try:
                child = core.state(await core.see(lambda: self._child(READER, pstate, name)))
                if child is pstate:
                    return READER.inode(child).attributes()
                if child.try_hold(Mode.PR):
                    try:
                        return await self._named(pstate, name, child)
                    finally:
                        child.release(Mode.PR)
            finally:
                pstate.release(Mode.PR)
            both = [(pstate, Mode.PR), (child, Mode.PR)]
            await hold_all(both)
            try:
                if await core.see(lambda: self._child(READER, pstate, name)) == child.ino:
                    return await self._named(pstate, name, child)
            finally:
                release_all(both)

    async def _named(self, pstate: InodeState, name: bytes, child: InodeState) -> Attributes:
        """The inode that a name leads to. Both are held, so it is there or the name is damage."""
        core = self.core
        try:
            return await core.see(lambda: READER.inode(child).attributes())
        except FsError as error:
            if error.errno != errno.ESTALE or name in (b".", b".."):
                raise
            text = f"{name!r} in directory {pstate.ino} leads to block {child.ino}, no inode"
            raise core.damaged(CorruptionError(text, block=child.ino)) from error

    async def readdir(self, ino: int, cookie: int, limit: int) -> list[DirEntry]:
        core = self.core
        state = core.state(ino)
        await state.hold(Mode.PR)
        try:
            while True:
                try:
                    return await core.see(lambda n=limit: self._entries(state, cookie, n))  # type: ignore[misc]
                except FsError as error:
                    # The names before a damaged block are told; EIO stands where it begins.
                    if error.errno != errno.EIO or limit <= 1:
                        raise
                    limit //= 2
        finally:
            state.release(Mode.PR)

    def _entries(self, state: InodeState, cookie: int, limit: int) -> list[DirEntry]:
        inode = self.directory_of(READER, state)
        result: list[DirEntry] = []
        if cookie < ROOT_COOKIE_SELF:
            result.append(DirEntry(ROOT_COOKIE_SELF, b".", state.ino, stat.S_IFDIR))
        if cookie < ROOT_COOKIE_PARENT:
            result.append(DirEntry(ROOT_COOKIE_PARENT, b"..", inode.parent, stat.S_IFDIR))
        del result[limit:]
        start = max(cookie, ROOT_COOKIE_PARENT)
        for key, child, kind, name in directory.entries(
            READER, state, inode, start, limit - len(result)
        ):
            result.append(DirEntry(key, name, child, kind << 12))
        return result

    # -- making ----------------------------------------------------------------------------------

    async def make(
        self,
        parent: int,
        name: bytes,
        birth: Birth,
        content: Callable[[InodeNode], None] | None = None,
    ) -> Attributes:
        """A new inode under a new name."""
        need_new_name(name)
        pstate = self.core.state(parent)
        return await self._make(
            pstate, Mode.EX, lambda tx: self._make_body(tx, pstate, name, birth, content)
        )

    def try_make(self, parent: int, name: bytes, birth: Birth) -> Attributes:
        """As `make`, at once. Raises NotNow."""
        need_new_name(name)
        pstate = self.core.state(parent)
        with Attempt() as attempt:
            attempt.hold(pstate, Mode.EX)
            made = self.core.try_run(lambda tx: self._make_body(tx, pstate, name, birth, None))
        self.core.refill_pool_soon()
        return made

    async def make_nameless(self, parent: int, birth: Birth, *, linkable: bool) -> Attributes:
        """A new regular file without a name, in the list of orphans. Nobody frees it before
        `Orphans.reap_soon` is asked to, or this mount ends."""
        pstate = self.core.state(parent)
        return await self._make(
            pstate, Mode.PR, lambda tx: self._make_nameless_body(tx, pstate, birth, linkable)
        )

    async def _make(
        self, pstate: InodeState, mode: Mode, body: Callable[[Tx], Attributes]
    ) -> Attributes:
        """Run a body that takes an inode from the pool, under the directory's lock."""
        core = self.core
        while True:
            await pstate.hold(mode)
            try:
                made = await core.run(body)
                core.refill_pool_soon()
                return made
            except NeedInodes:
                pass
            finally:
                pstate.release(mode)
            await core.fill_pool(patient=True)

    def _make_body(
        self,
        tx: Tx,
        pstate: InodeState,
        name: bytes,
        birth: Birth,
        content: Callable[[InodeNode], None] | None,
    ) -> Attributes:
        seen = self.need_alive(tx, pstate)
        if self.find(tx, pstate, name) is not None:
            raise FsError(errno.EEXIST)
        need_mutable(seen)
        state, inode = self.core.space.new_inode(tx)
        self.files.mark_changed(tx, state)
        parent = tx.edit_inode(pstate)
        self._furnish(tx, (state, inode), (pstate, parent), birth)
        if inode.is_directory:
            if parent.nlink >= LINKS_MAX:
                raise FsError(errno.EMLINK)
            inode.nlink = 2
            inode.size = BLOCK_BYTES
            inode.parent = parent.block
            inode.root = Tree(0, [], [], 0)
            parent.nlink += 1
        if content is not None:
            content(inode)
        self.insert_name(tx, pstate, parent, name, inode)
        return inode.attributes()

    def _make_nameless_body(
        self, tx: Tx, pstate: InodeState, birth: Birth, linkable: bool
    ) -> Attributes:
        parent = self.need_alive(tx, pstate)
        need_mutable(parent)
        state, inode = self.core.space.new_inode(tx)
        self.files.mark_changed(tx, state)
        self._furnish(tx, (state, inode), (pstate, parent), birth)
        inode.nlink = 0
        inode.flags = FLAG_LINKABLE if linkable else 0
        self.orphans.add(tx, inode.block)
        return inode.attributes()

    def _furnish(
        self,
        tx: Tx,
        born: tuple[InodeState, InodeNode],
        directory: tuple[InodeState, InodeNode],
        birth: Birth,
    ) -> None:
        """Mode, owner, access control lists and times of a new inode with one name."""
        state, inode = born
        pstate, parent = directory
        inode.mode = birth.mode
        inode.uid, inode.gid = birth.uid, birth.gid
        if parent.mode & stat.S_ISGID:
            inode.gid = parent.gid
            if inode.is_directory:
                inode.mode |= stat.S_ISGID
        inode.nlink = 1
        if parent.xattrs is None or not self._inherit(tx, state, inode, (pstate, parent)):
            inode.mode &= ~birth.umask
        now = self.core.now(0)
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = inode.birth_ns = now

    def _inherit(
        self,
        tx: Tx,
        state: InodeState,
        inode: InodeNode,
        directory: tuple[InodeState, InodeNode],
    ) -> bool:
        """Take over the directory's default access control list; False if it has none."""
        core = self.core
        pstate, parent = directory
        if stat.S_ISLNK(inode.mode):
            return True  # its mode means nothing
        hashed = core.superblock.name_hash(DEFAULT_ACL)
        found = xattr.find(tx, pstate, parent, hashed, DEFAULT_ACL)
        if found is None:
            return False
        value = xattr.value_of(tx, pstate, found[1])
        try:
            default = acl.decode_untrusted(value)
        except CorruptionError as error:
            raise core.damaged(error, parent.block, "a default access control list") from error
        access, inode.mode = acl.inherited(default, inode.mode)
        editor = XattrEditor(tx, state, inode, core.space)
        if not acl.is_minimal(access):
            editor.set(ACCESS_ACL, acl.encode(access))
        if inode.is_directory:
            editor.set(DEFAULT_ACL, value)
        return True

    def need_alive(self, tx: Tx, state: InodeState) -> InodeNode:
        """A directory that has not been removed."""
        inode = self.directory_of(tx, state)
        if not inode.nlink:
            raise FsError(errno.ENOENT)
        return inode

    def insert_name(
        self, tx: Tx, state: InodeState, parent: InodeNode, name: bytes, inode: InodeNode
    ) -> None:
        editor = self.files.editor(tx, state, parent)
        hashed = self.core.superblock.name_hash(name)
        directory.insert(editor, hashed, name, inode.block, inode.mode >> 12)
        self.directory_changed(parent)

    def remove_name(self, tx: Tx, state: InodeState, parent: InodeNode, cookie: int) -> None:
        self.files.editor(tx, state, parent).remove(cookie)
        self.directory_changed(parent)

    def directory_changed(self, inode: InodeNode) -> None:
        inode.size = BLOCK_BYTES * max(inode.blocks, 1)
        self.files.touch(inode)

    def inode_changed(self, inode: InodeNode) -> None:
        inode.ctime_ns = self.core.now(inode.ctime_ns)
        inode.counter += 1

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        if not target:
            raise FsError(errno.ENOENT)
        if len(target) > SYMLINK_BYTES_MAX:
            raise FsError(errno.ENAMETOOLONG)

        def content(inode: InodeNode) -> None:
            inode.data = target
            inode.size = len(target)

        return await self.make(parent, name, Birth(stat.S_IFLNK | 0o777, uid, gid, 0), content)

    async def link(
        self, ino: int, parent: int, name: bytes, generation: int | None = None
    ) -> Attributes:
        need_new_name(name)
        core = self.core
        state, pstate = core.state(ino), core.state(parent)
        if state is pstate:
            raise FsError(errno.EPERM)
        both = [(pstate, Mode.EX), (state, Mode.EX)]
        await hold_all(both)
        try:
            return await core.run(lambda tx: self._link_body(tx, state, pstate, name, generation))
        finally:
            release_all(both)

    def _link_body(
        self, tx: Tx, state: InodeState, pstate: InodeState, name: bytes, generation: int | None
    ) -> Attributes:
        need_mutable(self.need_alive(tx, pstate))
        seen = tx.inode(state)
        if generation not in (None, seen.generation):
            raise FsError(errno.ESTALE)
        if seen.is_directory:
            raise FsError(errno.EPERM)
        need_unprotected(seen)
        if self.find(tx, pstate, name) is not None:
            raise FsError(errno.EEXIST)
        if not seen.nlink and not (seen.flags & FLAG_LINKABLE and self.orphans.holds(seen.block)):
            raise FsError(errno.ENOENT)
        if seen.nlink >= LINKS_MAX:
            raise FsError(errno.EMLINK)
        inode = tx.edit_inode(state)
        if not inode.nlink:
            inode.flags &= ~FLAG_LINKABLE
            self.orphans.remove(tx, inode.block)
        inode.nlink += 1
        self.inode_changed(inode)
        self.insert_name(tx, pstate, tx.edit_inode(pstate), name, inode)
        return inode.attributes()

    # -- taking away -----------------------------------------------------------------------------

    async def remove(
        self, parent: int, name: bytes, *, directory_wanted: bool
    ) -> Attributes | None:
        """unlink and rmdir. Returns what is left of an inode that has lost its last name."""
        need_removable_name(name)
        core = self.core
        pstate = core.state(parent)
        while True:
            await pstate.hold(Mode.PR)
            try:
                child = core.state(await core.see(lambda: self._child(READER, pstate, name)))
            finally:
                pstate.release(Mode.PR)
            wants = [(pstate, Mode.EX), (child, Mode.EX)]
            await hold_all(wants)
            try:
                alone, lock = await self.alone(child)
                try:
                    return await core.run(
                        lambda tx, c=child, a=alone: self._remove_body(  # type: ignore[misc]
                            tx, pstate, c, name, (directory_wanted, a)
                        )
                    )
                except Changed:
                    continue
                finally:
                    if lock is not None:
                        lock.release(Mode.EX)
            finally:
                release_all(wants)

    def try_remove(self, parent: int, name: bytes, *, directory_wanted: bool) -> Attributes | None:
        """As `remove`, at once. Raises NotNow."""
        need_removable_name(name)
        core = self.core
        pstate = core.state(parent)
        with Attempt() as attempt:
            attempt.hold(pstate, Mode.EX)
            child = core.state(self._child(READER, pstate, name))
            attempt.hold(child, Mode.EX)
            alone = self.try_alone(child, attempt)
            return core.try_run(
                lambda tx: self._remove_body(tx, pstate, child, name, (directory_wanted, alone))
            )

    def try_alone(self, child: InodeState, attempt: Attempt) -> bool:
        """As `alone`; `attempt` takes the hold of an open lock."""
        inode = READER.inode(child)
        if child.open_count or (inode.nlink > 1 and not inode.is_directory):
            return False
        if not child.sole:
            attempt.hold(self.core.locks.get(open_lock_name(child.ino), self.core), Mode.EX)
        return True

    async def alone(self, child: InodeState) -> tuple[bool, CachedLock | None]:
        """Whether the inode is about to lose its last name and no other mount has it open; its open
        lock in EX if that was needed to know. Tried only: it never waits."""
        core = self.core
        inode = await core.see(lambda: READER.inode(child))
        if child.open_count or (inode.nlink > 1 and not inode.is_directory):
            return False, None
        if child.sole:
            return True, None
        core.locks.get(open_lock_name(child.ino), core)
        lock = await core.locks.try_lock(open_lock_name(child.ino), Mode.EX)
        return lock is not None, lock

    def _remove_body(
        self, tx: Tx, pstate: InodeState, child: InodeState, name: bytes, how: tuple[bool, bool]
    ) -> Attributes | None:
        directory_wanted, alone = how
        found = self.find(tx, pstate, name)
        if found is None or found[1] != child.ino:
            raise Changed
        seen = tx.inode(child)
        if directory_wanted and not seen.is_directory:
            raise FsError(errno.ENOTDIR)
        if seen.is_directory and not directory_wanted:
            raise FsError(errno.EISDIR)
        need_unprotected(tx.inode(pstate))
        need_unprotected(seen)
        if seen.is_directory and not directory.is_empty(seen):
            raise FsError(errno.ENOTEMPTY)
        inode = tx.edit_inode(child)
        parent = tx.edit_inode(pstate)
        self.remove_name(tx, pstate, parent, found[0])
        return self.drop_link(tx, child, inode, parent, alone=alone)

    def drop_link(
        self, tx: Tx, state: InodeState, inode: InodeNode, parent: InodeNode, *, alone: bool
    ) -> Attributes | None:
        """One name of the inode is gone. Returns its last attributes if that was the last one."""
        if inode.is_directory:
            inode.nlink = 0
            parent.nlink -= 1
        else:
            inode.nlink -= 1
        self.inode_changed(inode)
        if inode.nlink:
            return None
        last = inode.attributes()
        # It may have been opened here since `alone` was found out.
        self.orphans.bury(tx, state, inode, alone=alone and not state.open_count)
        return last
