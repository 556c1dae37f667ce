"""The file system of one mount: the door through which FUSE, tools and tests go.

Every method takes the cluster locks that it needs, works on a consistent snapshot, and raises
`FsError(errno)`. What a method returned is visible to every call that starts later on any node.
Names are bytes. All methods may be called concurrently by any number of tasks.

Fast paths: `try_getattr`, `try_lookup` and `try_read` answer synchronously when locks and blocks are
here, else None. The `*_held` methods are for a caller that has a hold on the inode's lock already
(PR for reading, EX for writing), taken with `try_hold`, `hold` or `hold_demoting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfs.attributes import Attributes, DirEntry, MountOptions, SetAttributes, Totals
from cfs.seams import Environment
from cluster.device import BlockDevice, Buffer
from cluster.ids import Instance
from cluster.locks import CachedLock, LockManager


class FileSystem:
    """One mount. Made by `FileSystem.mount`, ended by `unmount`."""

    root_ino: int

    @classmethod
    async def mount(
        cls,
        device: BlockDevice,
        locks: LockManager,
        environment: Environment,
        options: MountOptions | None = None,
    ) -> FileSystem:
        """Read the superblock, replay journals that nobody owns, take a journal, start the tasks."""
        raise NotImplementedError

    # -- locks -----------------------------------------------------------------------------------

    def inode_lock(self, ino: int) -> CachedLock:
        """The cached lock of an inode; synchronous, never a message."""
        raise NotImplementedError

    # -- synchronous attempts ----------------------------------------------------------------------

    def try_getattr(self, ino: int) -> Attributes | None:
        """Attributes if the lock is cached in PR or EX, is not being demoted, and the inode is here."""
        raise NotImplementedError

    def try_lookup(self, parent: int, name: bytes) -> Attributes | None:
        """As `lookup`, if everything is here. Raises FsError(ENOENT) for a name known to be absent."""
        raise NotImplementedError

    # -- under a hold of the caller ------------------------------------------------------------------

    async def getattr_held(self, ino: int) -> Attributes:
        """The caller holds the inode's lock in PR or stronger."""
        raise NotImplementedError

    async def read_held(self, ino: int, offset: int, size: int, *, direct: bool = False) -> bytes:
        """The caller holds the inode's lock in PR or stronger."""
        raise NotImplementedError

    async def write_held(
        self, ino: int, offset: int, data: Buffer, *, laundered: bool = False
    ) -> int:
        """The caller holds the inode's lock in EX. `laundered`: the kernel writes back a page of a
        shared mapping; it is only buffered, never refused, and clipped at the end of file."""
        raise NotImplementedError

    async def reserve_held(self, ino: int, offset: int, size: int) -> None:
        """The caller holds EX. Give blocks to the holes of a range inside the file, so that stores
        through a shared mapping cannot run out of space (rule G5)."""
        raise NotImplementedError

    # -- attributes ---------------------------------------------------------------------------------

    async def getattr(self, ino: int) -> Attributes:
        raise NotImplementedError

    async def setattr(self, ino: int, changes: SetAttributes) -> Attributes:
        """All changes in one transaction. A new size truncates or extends with zeroes."""
        raise NotImplementedError

    async def readlink(self, ino: int) -> bytes:
        raise NotImplementedError

    # -- names --------------------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes) -> Attributes:
        """"." and ".." are understood."""
        raise NotImplementedError

    async def create(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int
    ) -> Attributes:
        """Make a regular file; EEXIST if the name is there."""
        raise NotImplementedError

    async def mknod(
        self, parent: int, name: bytes, mode: int, uid: int, gid: int, rdev: int
    ) -> Attributes:
        """Make a node of the type that `mode` says."""
        raise NotImplementedError

    async def mkdir(self, parent: int, name: bytes, mode: int, uid: int, gid: int) -> Attributes:
        raise NotImplementedError

    async def symlink(
        self, parent: int, name: bytes, target: bytes, uid: int, gid: int
    ) -> Attributes:
        raise NotImplementedError

    async def link(self, ino: int, parent: int, name: bytes) -> Attributes:
        raise NotImplementedError

    async def unlink(self, parent: int, name: bytes) -> None:
        """The inode lives on while any node has it open (`open_ref`)."""
        raise NotImplementedError

    async def rmdir(self, parent: int, name: bytes) -> None:
        raise NotImplementedError

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int = 0
    ) -> None:
        """`flags`: 0 or RENAME_NOREPLACE; others are EINVAL."""
        raise NotImplementedError

    async def readdir(self, ino: int, cookie: int, limit: int) -> list[DirEntry]:
        """Entries with a cookie greater than `cookie` in the order of their cookies (0: from the
        start, with "." and ".."), at most `limit`. Empty at the end."""
        raise NotImplementedError

    # -- data ---------------------------------------------------------------------------------------

    async def read(self, ino: int, offset: int, size: int, *, direct: bool = False) -> bytes:
        raise NotImplementedError

    async def write(
        self,
        ino: int,
        offset: int,
        data: Buffer,
        *,
        append: bool = False,
        sync: bool = False,
        direct: bool = False,
    ) -> int:
        """Write all or nothing. `append`: at the true end of file whatever `offset` says (the kernel
        is told through `KernelCache.changed` when they differ). `sync`: durable before it returns.
        `direct`: past the write-behind buffer."""
        raise NotImplementedError

    async def fsync(self, ino: int, datasync: bool = False) -> None:
        """Data and metadata of the inode are durable when this returns. Raises the error of a
        write-behind that failed since."""
        raise NotImplementedError

    # -- references -------------------------------------------------------------------------------

    def try_open_ref(self, ino: int) -> bool:
        """`open_ref` if it needs no message."""
        raise NotImplementedError

    async def open_ref(self, ino: int) -> None:
        """An open handle: the inode outlives its last name, cluster wide, until `close_ref`."""
        raise NotImplementedError

    def close_ref(self, ino: int) -> None:
        """Give one `open_ref` back. Synchronous: what it starts runs in the background."""
        raise NotImplementedError

    def forget(self, inos: Sequence[int]) -> None:
        """The kernel knows these inodes no more; their cached state may go."""
        raise NotImplementedError

    # -- the whole file system ----------------------------------------------------------------------

    async def statfs(self) -> Totals:
        raise NotImplementedError

    async def sync(self) -> None:
        """Everything that was done before is durable when this returns."""
        raise NotImplementedError

    async def grow(self) -> Totals:
        """Use all of the device, which has become larger. Other mounts see it by themselves."""
        raise NotImplementedError

    async def recover(self, dead: Instance) -> int:
        """Replay the journals of a dead mount that is silent; how many were replayed. Repeatable."""
        raise NotImplementedError

    def set_recovering(self, recovering: bool) -> None:
        """True from a view with failed members until all of them are released: meanwhile no freed
        block is used again, so that the replayer sees a state that stands still."""
        raise NotImplementedError

    async def query(self, verb: str, params: dict[str, Any]) -> Any:
        """Answer `cfs.<verb>`: df, journals, sync, grow."""
        raise NotImplementedError

    async def unmount(self) -> None:
        """Write everything, leave a clean journal, stop the tasks."""
        raise NotImplementedError
