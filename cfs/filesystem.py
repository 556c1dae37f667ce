"""The file system of one mount: the door through which FUSE, tools and tests go.

Every method takes the cluster locks that it needs, works on a consistent snapshot, and raises
`FsError(errno)`. What a method returned is visible to every call that starts later on any node.
Names are bytes. All methods may be called concurrently by any number of tasks.

Fast paths: `try_getattr`, `try_lookup` and `try_read` answer synchronously when locks and blocks
are here, else None. The `*_held` methods are for a caller that has a hold on the inode's lock
already (PR for reading, EX for writing), taken with `try_hold`, `hold` or `hold_demoting`.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from typing import Any

import msgspec

from cfs import stage
from cfs.attributes import BLOCK_BYTES, Attributes, DirEntry, MountOptions, SetAttributes, Totals
from cfs.background import Background
from cfs.core import Core
from cfs.direct import DirectIo
from cfs.errors import FsError
from cfs.inodes import Inodes
from cfs.lock_names import MOUNT_LOCK
from cfs.names import Birth, Names
from cfs.nodes import InodeNode
from cfs.orphans import Orphans, adopt
from cfs.range_calls import RangeCalls
from cfs.renames import Renames
from cfs.seams import Environment, Runtime
from cfs.transaction import READER, Missing
from cluster.device import BlockDevice, Buffer, Read, Written
from cluster.errors import BarredError, BusyError
from cluster.ids import Instance
from cluster.locks import CachedLock, LockManager, Mode

STATFS_MAX_AGE_NS = 1_000_000_000
RECOVERY_WAIT_S = 60.0
RECOVERY_POLL_S = 0.2


async def pass_door(locks: LockManager, runtime: Runtime) -> CachedLock:
    """The mount lock in PR. Nobody alive keeps a mount out with it (mkfs and fsck have the volume
    for themselves), but what a dead mount had locked stays locked until its journal is replayed;
    somebody is at it, perhaps this very process. Raises BusyError after `RECOVERY_WAIT_S`: a
    damaged journal is never replayed."""
    for _ in range(round(RECOVERY_WAIT_S / RECOVERY_POLL_S)):
        lock = await locks.try_lock(MOUNT_LOCK, Mode.PR)
        if lock is not None:
            return lock
        await runtime.sleep(RECOVERY_POLL_S)
    raise BusyError(
        "a mount of this file system died and is not recovered yet",
        hint="clusterctl events tells why; after journal.damaged: unmount it everywhere, fsck.cfs",
    )


class FileSystem(RangeCalls):
    """One mount. Made by `FileSystem.mount`, ended by `unmount`."""

    def __init__(self, core: Core, mount_lock: CachedLock) -> None:
        super().__init__(core)
        self.root_ino = core.superblock.root_ino
        self.direct = DirectIo(core, self.files, self.reader)
        self.orphans: Orphans
        self.names: Names
        self.renames: Renames
        self.inodes: Inodes
        self._mount_lock = mount_lock
        self.background: Background
        self._beliefs_at = -STATFS_MAX_AGE_NS

    @classmethod
    async def mount(
        cls,
        device: BlockDevice,
        locks: LockManager,
        environment: Environment,
        options: MountOptions | None = None,
    ) -> FileSystem:
        """Read the superblock, replay journals that nobody owns, take a journal, start the tasks.

        Raises CorruptionError (no file system), BusyError (a dead mount is not recovered in time,
        no journal free).
        """
        superblock = await stage.read_superblock(device)
        stage.need_mountable(superblock)
        core = Core(device, locks, environment, options or MountOptions(), superblock)
        lock = await pass_door(locks, environment.runtime)
        self = cls(core, lock)
        try:
            await self._begin()
        except BaseException:
            lock.release(Mode.PR)
            raise
        if core.options.background:
            self.background.start()
        return self

    async def _begin(self) -> None:
        core = self.core
        control = core.control.lock
        assert control is not None
        await control.hold(Mode.EX)
        try:
            journal, free = await stage.begin(core)
            core.attach(journal)
            self.orphans = Orphans(core, self.files, journal.slot, journal.first_block)
            self.names = Names(core, self.files, self.orphans)
            self.renames = Renames(core, self.names)
            self.inodes = Inodes(core, self.files, self.orphans)
            self.background = Background(core, self.orphans)
            await self.orphans.load()
            for slot, place in free:
                await adopt(core, self.orphans, slot, place[0])
        finally:
            control.release(Mode.EX)
        self.orphans.reap_all()
        if not free:
            core.runtime.spawn(self._add_slot, "another journal")

    async def _add_slot(self) -> None:
        try:
            await stage.ensure_free_slot(self.core)
        except (FsError, BarredError):
            pass  # No room for another journal: the next mount is told that all are in use.

    async def tick(self, *, checkpoint: bool = False) -> None:
        """One round of the background's work, for mounts that do none by themselves."""
        await self.background.commit()
        if checkpoint:
            await self.background.checkpoint()
        await self.background.tidy()

    @property
    def damage_met(self) -> int:
        """How many damaged blocks this mount has met."""
        return self.core.damage.count

    # -- locks -----------------------------------------------------------------------------------

    def inode_lock(self, ino: int) -> CachedLock:
        """The cached lock of an inode; synchronous, never a message."""
        return self.core.state(ino).lock

    # -- synchronous attempts --------------------------------------------------------------------

    def try_getattr(self, ino: int) -> Attributes | None:
        """Attributes if the lock is cached in PR or EX, not being demoted, and the inode here."""
        state = self.core.state(ino)
        if not state.lock.try_hold(Mode.PR):
            return None
        node = state.node
        state.lock.release(Mode.PR)
        if node is None:
            return None
        if not node.mode:
            raise FsError(errno.ESTALE)
        return node.attributes()

    def has_attributes(self, ino: int) -> bool:
        """Whether `try_getattr` would succeed."""
        state = self.core.state(ino)
        if state.node is None or not state.lock.try_hold(Mode.PR):
            return False
        state.lock.release(Mode.PR)
        return True

    async def prefetch(self, ino: int, patient: bool) -> None:
        """Bring the attributes of an inode here; if another node is in the way, only if `patient`.
        Never raises for what is wrong with it."""
        core = self.core
        state = core.state(ino)
        state.pins += 1
        try:
            if patient:
                await state.lock.hold(Mode.PR)
            elif await core.locks.try_lock(state.lock.name, Mode.PR) is None:
                return
            try:
                await core.see(lambda: READER.inode(state))
            finally:
                state.lock.release(Mode.PR)
        except (FsError, BarredError):
            pass  # Who looks at it by name meets the error.
        finally:
            state.pins -= 1

    def try_lookup(self, parent: int, name: bytes) -> Attributes | None:
        """As `lookup`, if everything is here. Raises FsError(ENOENT) for a name that is absent."""
        return self.names.try_lookup(parent, name)

    def try_read(self, ino: int, offset: int, size: int) -> bytes | None:
        """As `read`, if it needs neither a message nor the disk."""
        state = self.core.state(ino)
        if not state.try_hold(Mode.PR):
            return None
        try:
            return self.reader.read_now(state, offset, size)
        except Missing:
            return None
        finally:
            state.release(Mode.PR)

    def try_setattr(self, ino: int, changes: SetAttributes) -> Attributes:
        """As `setattr` without a new size. Raises NotNow, like those that follow, if it would have
        to wait."""
        return self.inodes.try_setattr(self.core.state(ino), changes)

    def try_create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int
    ) -> Attributes:
        """As `create`."""
        birth = Birth(stat.S_IFREG | mode & 0o7777, uid, gid, umask)
        return self.names.try_make(parent, name, birth)

    def try_mkdir(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int
    ) -> Attributes:
        """As `mkdir`."""
        birth = Birth(stat.S_IFDIR | mode & 0o7777, uid, gid, umask)
        return self.names.try_make(parent, name, birth)

    def try_remove(self, parent: int, name: bytes, *, directory: bool) -> Attributes | None:
        """As `rmdir` if it is to be a `directory`, else `unlink`."""
        return self.names.try_remove(parent, name, directory_wanted=directory)

    def try_rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int
    ) -> Attributes | None:
        """As `rename`."""
        return self.renames.try_rename((parent, name, new_parent, new_name), flags)

    def try_write_held(self, ino: int, offset: int, data: Buffer, *, kill: bool) -> int:
        """As `write_held`."""
        return self.files.try_write(self.core.state(ino), offset, data, kill=kill)

    def start_read(self, ino: int, offset: int, size: int, done: Read) -> None:
        """As a direct `read`, of which `done` is told the end, perhaps before this returns. An end
        with NotNow: read again. Raises NotNow."""
        self.direct.start_read(self.core.state(ino), offset, size, done)

    def start_write(
        self, ino: int, offset: int, data: Buffer, done: Written, *, kill: bool
    ) -> None:
        """As a direct `write`, likewise. The caller may change `data` when this has returned."""
        self.direct.start_write(self.core.state(ino), offset, data, done, kill=kill)

    def try_getxattr(self, ino: int, name: bytes) -> bytes | None:
        """As `getxattr`, if it needs neither a message nor the disk. Raises ENODATA."""
        return self.inodes.try_getxattr(self.core.state(ino), name)

    # -- under a hold of the caller --------------------------------------------------------------

    async def getattr_held(self, ino: int) -> Attributes:
        """The caller holds the inode's lock in PR or stronger."""
        state = self.core.state(ino)
        return await self.core.see(lambda: READER.inode(state).attributes())

    async def read_held(self, ino: int, offset: int, size: int, *, direct: bool = False) -> bytes:
        """The caller holds the inode's lock in PR or stronger."""
        return await self.reader.read(self.core.state(ino), offset, size)

    async def write_held(
        self, ino: int, offset: int, data: Buffer, *, laundered: bool = False, kill: bool = True
    ) -> int:
        """The caller holds the inode's lock in EX. `laundered`: the kernel writes back a page of a
        shared mapping; it is only buffered, never refused, and clipped at the end of file. `kill`:
        the writer may not keep set-user-id and set-group-id."""
        state = self.core.state(ino)
        _, length = await self.files.write(state, offset, data, laundered=laundered, kill=kill)
        return len(data) if laundered else length

    async def setattr_held(self, ino: int, changes: SetAttributes) -> Attributes:
        """The caller holds EX."""
        return await self.inodes.setattr(self.core.state(ino), changes)

    # -- attributes ------------------------------------------------------------------------------

    async def getattr(self, ino: int) -> Attributes:
        state = self.core.state(ino)
        await state.hold(Mode.PR)
        try:
            return await self.core.see(lambda: READER.inode(state).attributes())
        finally:
            state.release(Mode.PR)

    async def setattr(self, ino: int, changes: SetAttributes) -> Attributes:
        """All changes in one transaction. A new size truncates or extends with zeroes."""
        state = self.core.state(ino)
        await state.hold(Mode.EX)
        try:
            return await self.setattr_held(ino, changes)
        finally:
            state.release(Mode.EX)

    def accessed(self, ino: int) -> None:
        """The caller has read the inode's content; synchronous. Moves the access time if this
        mount keeps those (`MountOptions.access_times`)."""
        if self.core.options.access_times:
            self.inodes.accessed(self.core.state(ino))

    async def readlink(self, ino: int) -> bytes:
        state = self.core.state(ino)
        await state.hold(Mode.PR)
        try:
            inode: InodeNode = await self.core.see(lambda: READER.inode(state))
        finally:
            state.release(Mode.PR)
        if not stat.S_ISLNK(inode.mode):
            raise FsError(errno.EINVAL)
        return inode.data

    # -- extended attributes ---------------------------------------------------------------------

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        """The value of an attribute. Raises ENODATA."""
        return await self.inodes.getxattr(self.core.state(ino), name)

    async def listxattr(self, ino: int) -> list[bytes]:
        """The names of all attributes, at most `XATTR_LIST_BYTES_MAX` with a zero byte each."""
        return await self.inodes.listxattr(self.core.state(ino))

    async def setxattr(
        self, ino: int, name: bytes, value: bytes, flags: int = 0, *, kill_group_id: bool = False
    ) -> None:
        """Make (XATTR_CREATE), replace (XATTR_REPLACE) or do either. Raises EEXIST, ENODATA. An
        access control list changes the mode; with `kill_group_id` set-group-id goes as well."""
        state = self.core.state(ino)
        await self.inodes.setxattr(state, name, value, flags, kill_group_id=kill_group_id)

    async def removexattr(self, ino: int, name: bytes) -> None:
        """Raises ENODATA."""
        await self.inodes.removexattr(self.core.state(ino), name)

    async def set_flags(self, ino: int, flags: int, mask: int) -> None:
        """Set the flags (`FLAG_...`) in `mask` as in `flags`. EOPNOTSUPP for unknown ones."""
        await self.inodes.set_flags(self.core.state(ino), flags, mask)

    # -- names -----------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """ "." and ".." are understood."""
        return await self.names.lookup(parent, name)

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int = 0
    ) -> Attributes:
        """Make a regular file; EEXIST if the name is there. A default access control list of the
        directory takes the place of `umask`."""
        birth = Birth(stat.S_IFREG | mode & 0o7777, uid, gid, umask)
        return await self.names.make(parent, name, birth)

    async def mknod(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int, umask: int = 0
    ) -> Attributes:
        """Make a node of the type that `mode` says."""
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind in (stat.S_IFDIR, stat.S_IFLNK):
            raise FsError(errno.EINVAL)

        def content(inode: InodeNode) -> None:
            inode.rdev = rdev if kind in (stat.S_IFBLK, stat.S_IFCHR) else 0

        birth = Birth(kind | mode & 0o7777, uid, gid, umask)
        return await self.names.make(parent, name, birth, content)

    async def mkdir(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int = 0
    ) -> Attributes:
        birth = Birth(stat.S_IFDIR | mode & 0o7777, uid, gid, umask)
        return await self.names.make(parent, name, birth)

    async def tmpfile(
        self, parent: int, mode: int, uid: int, gid: int, umask: int = 0, *, linkable: bool = True
    ) -> Attributes:
        """Make a regular file without a name, open (`close_ref`), that goes with its last handle
        unless `link` has given it a name."""
        birth = Birth(stat.S_IFREG | mode & 0o7777, uid, gid, umask)
        made = await self.names.make_nameless(parent, birth, linkable=linkable)
        try:
            await self.open_ref(made.ino)
        except BaseException:
            self.orphans.reap_soon(made.ino)
            raise
        return made

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        return await self.names.symlink(parent, name, target, uid, gid)

    async def link(
        self, ino: int, parent: int, name: bytes, *, generation: int | None = None
    ) -> Attributes:
        """`generation` as of `SetAttributes`."""
        return await self.names.link(ino, parent, name, generation)

    async def unlink(self, parent: int, name: bytes) -> Attributes | None:
        """The inode lives on while any node has it open (`open_ref`). Returns what was left of it
        if this was its last name; `rmdir` and `rename` as well."""
        return await self.names.remove(parent, name, directory_wanted=False)

    async def rmdir(self, parent: int, name: bytes) -> Attributes | None:
        return await self.names.remove(parent, name, directory_wanted=True)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> Attributes | None:
        """`flags`: 0, RENAME_NOREPLACE or RENAME_EXCHANGE; others are EINVAL."""
        return await self.renames.rename((parent, name, new_parent, new_name), flags)

    async def readdir(self, ino: int, cookie: int, limit: int) -> list[DirEntry]:
        """Entries with a cookie greater than `cookie` in the order of their cookies (0: from the
        start, with "." and ".."), at most `limit`. Empty at the end."""
        return await self.names.readdir(ino, cookie, limit)

    # -- data ------------------------------------------------------------------------------------

    async def read(self, ino: int, offset: int, size: int, *, direct: bool = False) -> bytes:
        state = self.core.state(ino)
        await state.hold(Mode.PR)
        try:
            return await self.reader.read(state, offset, size)
        finally:
            state.release(Mode.PR)

    async def write(
        self,
        ino: int,
        offset: int,
        data: Buffer,
        *,
        append: bool = False,
        sync: bool = False,
        direct: bool = False,
        kill: bool = True,
    ) -> int:
        """Write all or nothing. `append`: at the true end of file whatever `offset` says (the
        kernel is told through `KernelCache.changed` when they differ). `sync`: durable before it
        returns, or FsError. `direct`: past the write-behind buffer. `kill`: the writer may not keep
        set-user-id and set-group-id."""
        state = self.core.state(ino)
        losses = state.errors.count
        at = None if append else offset
        await state.hold(Mode.EX)
        try:
            if direct:
                done, length = await self.direct.write(state, at, data, kill=kill)
            else:
                done, length = await self.files.write(state, at, data, kill=kill)
            if sync:
                await self.files.sync(state, datasync=True)
                if state.errors.count != losses:
                    raise FsError(state.errors.errno)
        finally:
            state.release(Mode.EX)
        if done != offset:
            self.core.kernel.changed(ino, min(offset, done), -1)
        return length

    async def fsync(self, ino: int, datasync: bool = False) -> None:
        """Data and metadata of the inode are durable when this returns, whichever node changed
        them; except data that was lost (`take_error` tells each handle of that). Raises
        FsError(EIO) if the mount cannot go on."""
        state = self.core.state(ino)
        await state.hold(Mode.PR)  # who has changed it writes it before we get the lock
        state.release(Mode.PR)
        await self.files.sync(state, datasync=datasync)

    async def sync_own(self, ino: int, *, datasync: bool) -> None:
        """As `fsync`, but only what was changed on this node; takes no lock."""
        await self.files.sync(self.core.state(ino), datasync=datasync)

    # -- references ------------------------------------------------------------------------------

    def try_open_ref(self, ino: int) -> bool:
        """`open_ref` if it needs no message."""
        state = self.core.state(ino)
        if not state.open_count:
            node = state.node
            if node is None or not node.mode or not state.lock.try_hold(Mode.PR):
                return False
            state.lock.release(Mode.PR)
        state.open_count += 1
        return True

    async def open_ref(self, ino: int) -> None:
        """An open handle: the inode outlives its last name, cluster wide, until `close_ref`. The
        open lock is taken when the inode's own lock goes (`Core.demote`)."""
        if self.try_open_ref(ino):
            return
        state = self.core.state(ino)
        await state.hold(Mode.PR)
        try:
            await self.core.see(lambda: READER.inode(state))
            state.open_count += 1
        finally:
            state.release(Mode.PR)

    def close_ref(self, ino: int) -> None:
        """Give one `open_ref` back. Synchronous: what it starts runs in the background."""
        state = self.core.state(ino)
        assert state.open_count > 0, f"inode {ino} is not open"
        state.open_count -= 1
        if not state.open_count:
            self.core.release_open(state)
            self.orphans.reap_soon(ino)

    def forget(self, inos: Sequence[int]) -> None:
        """The kernel knows these inodes no more; their cached state may go."""
        # The cache is bounded by itself; locks of forgotten inodes are worth keeping until then.

    # -- the whole file system -------------------------------------------------------------------

    async def statfs(self) -> Totals:
        core = self.core
        now = core.runtime.now_ns()
        if now - self._beliefs_at >= STATFS_MAX_AGE_NS:
            await core.demand.look()
            self._beliefs_at = now
        free = freeing = 0
        for group in core.space.groups:
            node = group.node
            if node is not None:
                free += node.free
                freeing += node.freeing
            else:
                free += max(group.believed_free, 0)
        total = core.superblock.total_blocks
        return Totals(total, free + freeing, freeing)

    async def sync(self) -> None:
        """Everything that was done before is durable when this returns."""
        await self.core.pages.flush_all()
        await self.core.journal.commit()

    async def grow(self) -> Totals:
        """Use all of the device, which has become larger. Other mounts see it by themselves."""
        await stage.grow(self.core)
        self._beliefs_at = -STATFS_MAX_AGE_NS
        return await self.statfs()

    async def recover(self, dead: Instance, others: frozenset[Instance] = frozenset()) -> int:
        """Replay the journals of a dead mount that is silent; how many. `others`: all that are dead
        and not yet recovered. Repeatable; one at a time."""
        return len(await stage.recover(self.core, self.orphans, dead, others))

    def set_recovering(self, recovering: bool) -> None:
        """True from a view with failed members until all of them are released: meanwhile no freed
        block is used again, so that the replayer sees a state that stands still."""
        self.core.space.recovering = recovering
        if not recovering:
            self.core.demand.recovery_ended()

    async def query(self, verb: str, params: dict[str, Any]) -> Any:
        """Answer `cfs.<verb>`: df, journals, sync, grow, losses."""
        if verb == "df":
            self._beliefs_at = -STATFS_MAX_AGE_NS
            return msgspec.to_builtins(await self.statfs())
        if verb == "sync":
            await self.sync()
            return {}
        if verb == "grow":
            return msgspec.to_builtins(await self.grow())
        if verb == "journals":
            return await stage.describe_journals(self.core)
        if verb == "losses":
            return self.losses()
        raise FsError(errno.EOPNOTSUPP, verb)

    def losses(self) -> dict[str, Any]:
        """What would be gone if this mount ended now without writing: the dirty files by inode with
        their unwritten bytes, and the metadata blocks that no commit has made durable."""
        journal = self.core.journal
        files = [
            {"ino": state.ino, "bytes": BLOCK_BYTES * len({*state.pages, *state.flushing})}
            for state in self.core.table.states.values()
            if state.pages or state.flushing
        ]
        return {"files": files, "metadata_blocks": len({*journal.running, *journal.sealed})}

    async def unmount(self) -> None:
        """Write everything, leave a clean journal, stop the tasks. Locks stay with the lock
        manager; whoever owns it gives them back."""
        core = self.core
        await self.orphans.stop()
        await self.background.stop()
        while core.pages.dirty:
            await core.pages.flush_all()
        await core.journal.close()
        self._mount_lock.release(Mode.PR)
