"""Operations on names: lookup, create, unlink, rename and their kin.

An operation on several inodes looks up, lets go, takes the locks of all inodes in the order of
their numbers, and looks again; when something is no longer as it was (`Changed`) it begins anew.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable

from cfs import directory
from cfs.attributes import (
    BLOCK_BYTES,
    LINKS_MAX,
    NAME_BYTES_MAX,
    RENAME_NOREPLACE,
    ROOT_COOKIE_PARENT,
    ROOT_COOKIE_SELF,
    SYMLINK_BYTES_MAX,
    Attributes,
    DirEntry,
)
from cfs.cache import InodeState, hold_all, release_all
from cfs.core import Core
from cfs.errors import FsError
from cfs.files import Files
from cfs.lock_names import RENAME_LOCK, open_lock_name
from cfs.nodes import InodeNode, Tree
from cfs.orphans import Orphans
from cfs.transaction import READER, Changed, Missing, NeedInodes, Reader, Tx
from cluster.locks import CachedLock, Mode

RENAME_DEPTH_MAX = 4096
DIRECTORY_TYPE = stat.S_IFDIR >> 12


def need_name(name: bytes) -> None:
    if not name or b"/" in name or b"\0" in name:
        raise FsError(errno.EINVAL)
    if len(name) > NAME_BYTES_MAX:
        raise FsError(errno.ENAMETOOLONG)


def need_new_name(name: bytes) -> None:
    need_name(name)
    if name in (b".", b".."):
        raise FsError(errno.EEXIST)


class Names:
    """Operations on directories."""

    def __init__(self, core: Core, files: Files, orphans: Orphans) -> None:
        self.core = core
        self.files = files
        self.orphans = orphans

    # -- finding ---------------------------------------------------------------------------------

    def _directory(self, reader: Reader, state: InodeState) -> InodeNode:
        inode = reader.inode(state)
        if not inode.is_directory:
            raise FsError(errno.ENOTDIR)
        return inode

    def _find(self, reader: Reader, state: InodeState, name: bytes) -> directory.Found | None:
        inode = self._directory(reader, state)
        return directory.find(reader, state, inode, self.core.superblock.name_hash(name), name)

    def _child(self, reader: Reader, state: InodeState, name: bytes) -> int:
        """The inode that `name` means, "." and ".." too."""
        if name == b".":
            return self._directory(reader, state).block
        if name == b"..":
            return self._directory(reader, state).parent
        if len(name) > NAME_BYTES_MAX:
            raise FsError(errno.ENAMETOOLONG)
        found = self._find(reader, state, name)
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
                        return await core.see(lambda s=child: READER.inode(s).attributes())  # type: ignore[misc]
                    finally:
                        child.release(Mode.PR)
            finally:
                pstate.release(Mode.PR)
            both = [(pstate, Mode.PR), (child, Mode.PR)]
            await hold_all(both)
            try:
                if await core.see(lambda: self._child(READER, pstate, name)) == child.ino:
                    return await core.see(lambda s=child: READER.inode(s).attributes())  # type: ignore[misc]
            finally:
                release_all(both)

    async def readdir(self, ino: int, cookie: int, limit: int) -> list[DirEntry]:
        core = self.core
        state = core.state(ino)
        await state.hold(Mode.PR)
        try:
            return await core.see(lambda: self._entries(state, cookie, limit))
        finally:
            state.release(Mode.PR)

    def _entries(self, state: InodeState, cookie: int, limit: int) -> list[DirEntry]:
        inode = self._directory(READER, state)
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
        mode: int,
        owner: tuple[int, int],
        content: Callable[[InodeNode], None] | None = None,
    ) -> Attributes:
        """A new inode of the type in `mode` under a new name."""
        need_new_name(name)
        core = self.core
        pstate = core.state(parent)
        while True:
            await pstate.hold(Mode.EX)
            try:
                made = await core.run(
                    lambda tx: self._make_body(tx, pstate, name, mode, owner, content)
                )
                core.refill_pool_soon()
                return made
            except NeedInodes:
                pass
            finally:
                pstate.release(Mode.EX)
            await core.fill_pool(patient=True)

    def _make_body(
        self,
        tx: Tx,
        pstate: InodeState,
        name: bytes,
        mode: int,
        owner: tuple[int, int],
        content: Callable[[InodeNode], None] | None,
    ) -> Attributes:
        self._need_alive(tx, pstate)
        if self._find(tx, pstate, name) is not None:
            raise FsError(errno.EEXIST)
        state, inode = self.core.space.new_inode(tx)
        self.files.mark_changed(tx, state)
        parent = tx.edit_inode(pstate)
        inode.mode = mode
        inode.uid, inode.gid = owner
        if parent.mode & stat.S_ISGID:
            inode.gid = parent.gid
            if stat.S_ISDIR(mode):
                inode.mode |= stat.S_ISGID
        inode.nlink = 1
        now = self.core.now(0)
        inode.atime_ns = inode.mtime_ns = inode.ctime_ns = inode.birth_ns = now
        if stat.S_ISDIR(mode):
            if parent.nlink >= LINKS_MAX:
                raise FsError(errno.EMLINK)
            inode.nlink = 2
            inode.size = BLOCK_BYTES
            inode.parent = parent.block
            inode.root = Tree(0, [], [], 0)
            parent.nlink += 1
        if content is not None:
            content(inode)
        self._insert(tx, pstate, parent, name, inode)
        return inode.attributes()

    def _need_alive(self, tx: Tx, state: InodeState) -> None:
        if not self._directory(tx, state).nlink:
            raise FsError(errno.ENOENT)

    def _insert(
        self, tx: Tx, state: InodeState, parent: InodeNode, name: bytes, inode: InodeNode
    ) -> None:
        editor = self.files.editor(tx, state, parent)
        hashed = self.core.superblock.name_hash(name)
        directory.insert(editor, hashed, name, inode.block, inode.mode >> 12)
        self._directory_changed(parent)

    def _remove(self, tx: Tx, state: InodeState, parent: InodeNode, cookie: int) -> None:
        self.files.editor(tx, state, parent).remove(cookie)
        self._directory_changed(parent)

    def _directory_changed(self, inode: InodeNode) -> None:
        inode.size = BLOCK_BYTES * max(inode.blocks, 1)
        self.files.touch(inode)

    def _inode_changed(self, inode: InodeNode) -> None:
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

        return await self.make(parent, name, stat.S_IFLNK | 0o777, (uid, gid), content)

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        need_new_name(name)
        core = self.core
        state, pstate = core.state(ino), core.state(parent)
        if state is pstate:
            raise FsError(errno.EPERM)
        both = [(pstate, Mode.EX), (state, Mode.EX)]
        await hold_all(both)
        try:
            return await core.run(lambda tx: self._link_body(tx, state, pstate, name))
        finally:
            release_all(both)

    def _link_body(self, tx: Tx, state: InodeState, pstate: InodeState, name: bytes) -> Attributes:
        self._need_alive(tx, pstate)
        seen = tx.inode(state)
        if seen.is_directory:
            raise FsError(errno.EPERM)
        if self._find(tx, pstate, name) is not None:
            raise FsError(errno.EEXIST)
        if not seen.nlink:
            raise FsError(errno.ENOENT)
        if seen.nlink >= LINKS_MAX:
            raise FsError(errno.EMLINK)
        inode = tx.edit_inode(state)
        inode.nlink += 1
        self._inode_changed(inode)
        self._insert(tx, pstate, tx.edit_inode(pstate), name, inode)
        return inode.attributes()

    # -- taking away -----------------------------------------------------------------------------

    async def remove(self, parent: int, name: bytes, *, directory_wanted: bool) -> None:
        """unlink and rmdir."""
        if name == b".":
            raise FsError(errno.EINVAL)
        if name == b"..":
            raise FsError(errno.ENOTEMPTY)
        need_name(name)
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
                alone = await self._alone(child)
                try:
                    await core.run(
                        lambda tx, c=child, a=alone: self._remove_body(  # type: ignore[misc]
                            tx, pstate, c, name, (directory_wanted, a is not None)
                        )
                    )
                    return
                except Changed:
                    continue
                finally:
                    if alone is not None:
                        alone.release(Mode.EX)
            finally:
                release_all(wants)

    async def _alone(self, child: InodeState) -> CachedLock | None:
        """The open lock in EX if the inode is about to lose its last name and nobody has it open.
        Tried only: it never waits."""
        core = self.core
        inode = await core.see(lambda: READER.inode(child))
        if child.open_count or (inode.nlink > 1 and not inode.is_directory):
            return None
        core.locks.get(open_lock_name(child.ino), core)
        return await core.locks.try_lock(open_lock_name(child.ino), Mode.EX)

    def _remove_body(
        self, tx: Tx, pstate: InodeState, child: InodeState, name: bytes, how: tuple[bool, bool]
    ) -> None:
        directory_wanted, alone = how
        found = self._find(tx, pstate, name)
        if found is None or found[1] != child.ino:
            raise Changed
        seen = tx.inode(child)
        if directory_wanted and not seen.is_directory:
            raise FsError(errno.ENOTDIR)
        if seen.is_directory and not directory_wanted:
            raise FsError(errno.EISDIR)
        if seen.is_directory and not directory.is_empty(seen):
            raise FsError(errno.ENOTEMPTY)
        inode = tx.edit_inode(child)
        parent = tx.edit_inode(pstate)
        self._remove(tx, pstate, parent, found[0])
        self._drop_link(tx, child, inode, parent, alone=alone)

    def _drop_link(
        self, tx: Tx, state: InodeState, inode: InodeNode, parent: InodeNode, *, alone: bool
    ) -> None:
        """One name of the inode is gone."""
        if inode.is_directory:
            inode.nlink = 0
            parent.nlink -= 1
        else:
            inode.nlink -= 1
        self._inode_changed(inode)
        if not inode.nlink:
            self.orphans.bury(tx, state, inode, alone=alone)

    # -- rename ----------------------------------------------------------------------------------

    async def rename(self, places: tuple[int, bytes, int, bytes], flags: int) -> None:
        parent, name, new_parent, new_name = places
        if flags & ~RENAME_NOREPLACE:
            raise FsError(errno.EINVAL)
        for each in (name, new_name):
            if each in (b".", b".."):
                raise FsError(errno.EBUSY)
            need_name(each)
        core = self.core
        old = core.state(parent)
        new = core.state(new_parent)
        rename_lock: CachedLock | None = None
        try:
            while True:
                source, target = await self._rename_peek(old, new, name, new_name)
                moves = source[1] == DIRECTORY_TYPE and old is not new
                if moves and rename_lock is None:
                    lock = core.locks.get(RENAME_LOCK, core)
                    await lock.hold(Mode.EX)
                    rename_lock = lock
                    continue
                if moves:
                    await self._need_no_cycle(source[0], new_parent)
                try:
                    await self._rename_locked(
                        (old, name, new, new_name), (source[0], target), flags
                    )
                    return
                except Changed:
                    continue
        finally:
            if rename_lock is not None:
                rename_lock.release(Mode.EX)

    async def _rename_peek(
        self, old: InodeState, new: InodeState, name: bytes, new_name: bytes
    ) -> tuple[tuple[int, int], int]:
        """What stands at both places now: ((inode, type), inode or 0)."""
        core = self.core
        await old.hold(Mode.PR)
        try:
            source = await core.see(lambda: self._find(READER, old, name))
        finally:
            old.release(Mode.PR)
        if source is None:
            raise FsError(errno.ENOENT)
        await new.hold(Mode.PR)
        try:
            target = await core.see(lambda: self._find(READER, new, new_name))
        finally:
            new.release(Mode.PR)
        return (source[1], source[2]), 0 if target is None else target[1]

    async def _need_no_cycle(self, ino: int, new_parent: int) -> None:
        """`ino` must not be an ancestor of its new place. Under the rename lock no directory moves
        to another parent, so the chain stands still while it is read lock by lock."""
        core = self.core
        at = new_parent
        for _ in range(RENAME_DEPTH_MAX):
            if at == ino:
                raise FsError(errno.EINVAL)
            if at == core.superblock.root_ino:
                return
            state = core.state(at)
            await state.hold(Mode.PR)
            try:
                at = await core.see(lambda s=state: self._directory(READER, s).parent)  # type: ignore[misc]
            finally:
                state.release(Mode.PR)
        raise FsError(errno.ELOOP)

    async def _rename_locked(
        self,
        places: tuple[InodeState, bytes, InodeState, bytes],
        found: tuple[int, int],
        flags: int,
    ) -> None:
        core = self.core
        old, _, new, _ = places
        states = {old.ino: old, new.ino: new}
        for ino in found:
            if ino:
                states[ino] = core.state(ino)
        wants = [(state, Mode.EX) for state in states.values()]
        await hold_all(wants)
        try:
            alone = None
            if found[1] and found[1] not in (old.ino, found[0]):
                alone = await self._alone(states[found[1]])
            try:
                await core.run(
                    lambda tx: self._rename_body(tx, places, found, flags, alone is not None)
                )
            finally:
                if alone is not None:
                    alone.release(Mode.EX)
        finally:
            release_all(wants)

    def _rename_body(
        self,
        tx: Tx,
        places: tuple[InodeState, bytes, InodeState, bytes],
        found: tuple[int, int],
        flags: int,
        alone: bool,
    ) -> None:
        core = self.core
        old, name, new, new_name = places
        self._need_alive(tx, new)
        source = self._find(tx, old, name)
        target = self._find(tx, new, new_name)
        if source is None or (source[1], 0 if target is None else target[1]) != found:
            raise Changed
        if target is not None and flags & RENAME_NOREPLACE:
            raise FsError(errno.EEXIST)
        if target is not None and target[1] == source[1]:
            return
        moved_state = core.state(source[1])
        is_directory = tx.inode(moved_state).is_directory
        if target is not None:
            self._need_replaceable(tx.inode(core.state(target[1])), is_directory=is_directory)
        if is_directory and old is not new and tx.inode(new).nlink >= LINKS_MAX:
            raise FsError(errno.EMLINK)
        moved = tx.edit_inode(moved_state)
        old_parent, new_parent = tx.edit_inode(old), tx.edit_inode(new)
        self._remove(tx, old, old_parent, source[0])
        if target is None:
            self._insert(tx, new, new_parent, new_name, moved)
        else:
            editor = self.files.editor(tx, new, new_parent)
            editor.replace(target[0], (moved.block, moved.mode >> 12, new_name))
            self._directory_changed(new_parent)
            gone_state = core.state(target[1])
            gone = tx.edit_inode(gone_state)
            self._drop_link(tx, gone_state, gone, new_parent, alone=alone)
        if is_directory and old is not new:
            old_parent.nlink -= 1
            new_parent.nlink += 1
            moved.parent = new.ino
        self._inode_changed(moved)

    @staticmethod
    def _need_replaceable(target: InodeNode, *, is_directory: bool) -> None:
        if is_directory and not target.is_directory:
            raise FsError(errno.ENOTDIR)
        if target.is_directory and not is_directory:
            raise FsError(errno.EISDIR)
        if target.is_directory and not directory.is_empty(target):
            raise FsError(errno.ENOTEMPTY)
