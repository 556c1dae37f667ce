"""Rename: to a free name, over another inode, or two names exchanged; always one transaction.

A directory that gets another parent moves under the rename lock `R`, so that no two moves together
make a cycle.
"""

from __future__ import annotations

import errno
import stat
from typing import NamedTuple

from cfs import directory
from cfs.attributes import LINKS_MAX, RENAME_EXCHANGE, RENAME_NOREPLACE, Attributes
from cfs.cache import InodeState, hold_all, release_all
from cfs.core import Core
from cfs.errors import FsError
from cfs.immediate import Attempt
from cfs.lock_names import RENAME_LOCK
from cfs.names import Names, need_name
from cfs.nodes import InodeNode
from cfs.protection import need_mutable, need_unprotected
from cfs.transaction import READER, Changed, NotNow, Tx
from cluster.locks import CachedLock, Mode

RENAME_DEPTH_MAX = 4096
DIRECTORY_TYPE = stat.S_IFDIR >> 12
Entry = tuple[int, int]
"""Inode, type (S_IFMT >> 12)."""
NOTHING: Entry = (0, 0)


class Places(NamedTuple):
    """From where to where."""

    old: InodeState
    name: bytes
    new: InodeState
    new_name: bytes


class Renames:
    """rename(2) with its flags."""

    def __init__(self, core: Core, names: Names) -> None:
        self.core = core
        self.names = names

    async def rename(self, places: tuple[int, bytes, int, bytes], flags: int) -> Attributes | None:
        """Returns what is left of an inode that has lost its last name."""
        core = self.core
        here = self._places(places, flags)
        rename_lock: CachedLock | None = None
        try:
            while True:
                source, target = await self._peek(here)
                movers = self._moving(here, source, target, flags)
                if movers and rename_lock is None:
                    lock = core.locks.get(RENAME_LOCK, core)
                    await lock.hold(Mode.EX)
                    rename_lock = lock
                    continue
                for ino, into in movers:
                    await self._need_no_cycle(ino, into)
                try:
                    return await self._locked(here, (source[0], target[0]), flags)
                except Changed:
                    continue
        finally:
            if rename_lock is not None:
                rename_lock.release(Mode.EX)

    def try_rename(self, places: tuple[int, bytes, int, bytes], flags: int) -> Attributes | None:
        """As `rename`, at once. Raises NotNow."""
        core, names = self.core, self.names
        here = self._places(places, flags)
        with Attempt() as attempt:
            attempt.hold(here.old, Mode.EX)
            attempt.hold(here.new, Mode.EX)
            source = names.find(READER, here.old, here.name)
            if source is None:
                raise FsError(errno.ENOENT)
            target = names.find(READER, here.new, here.new_name) or (0, *NOTHING)
            if self._moving(here, source[1:], target[1:], flags):
                raise NotNow
            found = source[1], target[1]
            for ino in set(found) - {0, here.old.ino, here.new.ino}:
                attempt.hold(core.state(ino), Mode.EX)
            alone = False
            if self._replaces(here, found, flags):
                alone = names.try_alone(core.state(target[1]), attempt)
            return core.try_run(lambda tx: self._body(tx, here, found, flags, alone))

    def _places(self, places: tuple[int, bytes, int, bytes], flags: int) -> Places:
        """Raises FsError for names and flags that make no sense."""
        parent, name, new_parent, new_name = places
        if flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise FsError(errno.EINVAL)
        for each in (name, new_name):
            if each in (b".", b".."):
                raise FsError(errno.EBUSY)
            need_name(each)
        core = self.core
        return Places(core.state(parent), name, core.state(new_parent), new_name)

    @staticmethod
    def _replaces(here: Places, found: tuple[int, int], flags: int) -> bool:
        """Whether the inode at the new name loses it."""
        return found[1] not in (0, here.old.ino, found[0]) and not flags & RENAME_EXCHANGE

    @staticmethod
    def _moving(here: Places, source: Entry, target: Entry, flags: int) -> list[tuple[int, int]]:
        """The directories that get another parent: (inode, new parent)."""
        if here.old is here.new:
            return []
        movers = []
        if source[1] == DIRECTORY_TYPE:
            movers.append((source[0], here.new.ino))
        if flags & RENAME_EXCHANGE and target[1] == DIRECTORY_TYPE:
            movers.append((target[0], here.old.ino))
        return movers

    async def _peek(self, here: Places) -> tuple[Entry, Entry]:
        """What stands at both places now; NOTHING where the new name is free."""
        core, names = self.core, self.names
        await here.old.hold(Mode.PR)
        try:
            source = await core.see(lambda: names.find(READER, here.old, here.name))
        finally:
            here.old.release(Mode.PR)
        if source is None:
            raise FsError(errno.ENOENT)
        await here.new.hold(Mode.PR)
        try:
            target = await core.see(lambda: names.find(READER, here.new, here.new_name))
        finally:
            here.new.release(Mode.PR)
        return source[1:], NOTHING if target is None else target[1:]

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
                at = await core.see(lambda s=state: self.names.directory_of(READER, s).parent)  # type: ignore[misc]
            finally:
                state.release(Mode.PR)
        raise FsError(errno.ELOOP)

    async def _locked(self, here: Places, found: tuple[int, int], flags: int) -> Attributes | None:
        core = self.core
        states = {here.old.ino: here.old, here.new.ino: here.new}
        for ino in found:
            if ino:
                states[ino] = core.state(ino)
        wants = [(state, Mode.EX) for state in states.values()]
        await hold_all(wants)
        try:
            alone, lock = False, None
            if self._replaces(here, found, flags):
                alone, lock = await self.names.alone(states[found[1]])
            try:
                return await core.run(lambda tx: self._body(tx, here, found, flags, alone))
            finally:
                if lock is not None:
                    lock.release(Mode.EX)
        finally:
            release_all(wants)

    def _body(
        self, tx: Tx, here: Places, found: tuple[int, int], flags: int, alone: bool
    ) -> Attributes | None:
        """`alone`: no other mount has the inode open that is replaced."""
        names = self.names
        parent = names.need_alive(tx, here.new)
        source = names.find(tx, here.old, here.name)
        target = names.find(tx, here.new, here.new_name)
        if source is None or (source[1], 0 if target is None else target[1]) != found:
            raise Changed
        if target is not None and flags & RENAME_NOREPLACE:
            raise FsError(errno.EEXIST)
        if target is None and flags & RENAME_EXCHANGE:
            raise FsError(errno.ENOENT)
        if target is not None and target[1] == source[1]:
            return None
        need_unprotected(tx.inode(here.old))
        need_unprotected(tx.inode(self.core.state(source[1])))
        if target is None:
            need_mutable(parent)
        else:
            need_unprotected(parent)
            need_unprotected(tx.inode(self.core.state(target[1])))
        if flags & RENAME_EXCHANGE:
            assert target is not None
            self._exchange(tx, here, source, target)
            return None
        return self._move(tx, here, source, target, alone=alone)

    def _move(
        self,
        tx: Tx,
        here: Places,
        source: directory.Found,
        target: directory.Found | None,
        *,
        alone: bool,
    ) -> Attributes | None:
        core, names = self.core, self.names
        moved_state = core.state(source[1])
        seen = tx.inode(moved_state)
        if target is not None:
            self._need_replaceable(tx.inode(core.state(target[1])), seen)
        elsewhere = seen.is_directory and here.old is not here.new
        if elsewhere and tx.inode(here.new).nlink >= LINKS_MAX:
            raise FsError(errno.EMLINK)
        moved = tx.edit_inode(moved_state)
        old, new = tx.edit_inode(here.old), tx.edit_inode(here.new)
        names.remove_name(tx, here.old, old, source[0])
        gone: Attributes | None = None
        if target is None:
            names.insert_name(tx, here.new, new, here.new_name, moved)
        else:
            self._put(tx, here.new, (new, target[0], here.new_name), moved)
            gone_state = core.state(target[1])
            gone = names.drop_link(tx, gone_state, tx.edit_inode(gone_state), new, alone=alone)
        if elsewhere:
            old.nlink -= 1
            new.nlink += 1
            moved.parent = new.block
        names.inode_changed(moved)
        return gone

    def _exchange(
        self, tx: Tx, here: Places, source: directory.Found, target: directory.Found
    ) -> None:
        """Each of the two inodes takes the other's name."""
        core, names = self.core, self.names
        first = tx.edit_inode(core.state(source[1]))
        second = tx.edit_inode(core.state(target[1]))
        old, new = tx.edit_inode(here.old), tx.edit_inode(here.new)
        if old is not new:
            grows = new if first.is_directory else old
            if first.is_directory != second.is_directory and grows.nlink >= LINKS_MAX:
                raise FsError(errno.EMLINK)
            for moved, start, end in ((first, old, new), (second, new, old)):
                if moved.is_directory:
                    start.nlink -= 1
                    end.nlink += 1
                    moved.parent = end.block
        self._put(tx, here.old, (old, source[0], here.name), second)
        self._put(tx, here.new, (new, target[0], here.new_name), first)
        names.inode_changed(first)
        names.inode_changed(second)

    def _put(
        self, tx: Tx, state: InodeState, place: tuple[InodeNode, int, bytes], inode: InodeNode
    ) -> None:
        """Let a name of a directory mean another inode."""
        parent, cookie, name = place
        editor = self.names.files.editor(tx, state, parent)
        editor.replace(cookie, (inode.block, inode.mode >> 12, name))
        self.names.directory_changed(parent)

    @staticmethod
    def _need_replaceable(target: InodeNode, source: InodeNode) -> None:
        if source.is_directory and not target.is_directory:
            raise FsError(errno.ENOTDIR)
        if target.is_directory and not source.is_directory:
            raise FsError(errno.EISDIR)
        if target.is_directory and not directory.is_empty(target):
            raise FsError(errno.ENOTEMPTY)
