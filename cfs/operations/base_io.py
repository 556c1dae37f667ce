"""What all FUSE handlers share: the wrapper that lets only FUSEError out, counters, handles."""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Concatenate, ParamSpec, TypeVar

import trio

from cfs.attributes import Attributes, SetAttributes
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.fuse.interrupt_io import CHANGES, RequestWaits
from cfs.fuse.kernel_cache import EVERYTHING, KernelInode, Waiter
from cfs.fuse.kernel_cache_io import ROOT_NODE, KernelCaches
from cfs.fuse.pyfuse3_io import fuse, pyfuse3
from cfs.operations.entry_io import PlainEntry, entry
from cluster.device import Buffer
from cluster.errors import BarredError
from cluster.locks import CachedLock, Mode
from native.requests import Opcode, Request

log = logging.getLogger("cfs.operations")

P = ParamSpec("P")
R = TypeVar("R")
HANDLES_MAX = 1 << 20
NEW_CONTENT = (Opcode.WRITE, Opcode.SETATTR, Opcode.FALLOCATE, Opcode.OPEN)


@dataclass(slots=True, eq=False)
class Handle:
    """An open file or directory. `number` is what the kernel calls it."""

    number: int
    inode: KernelInode
    lock: CachedLock
    flags: int = 0
    uncached: bool = False
    """Answered with direct_io: nothing of it goes through the page cache."""
    appending: trio.CancelScope | None = None
    """A hold of the lock is kept for the rest of a record that the kernel has split."""
    appends: dict[int, trio.Event] = field(default_factory=dict)
    """WRITEs at the end of file, by `unique`, in the order in which the kernel sent them: the parts
    of one call may come all at once. The first one's event is set."""
    refused_thread: int = -1
    """Who was told last that a WRITE failed."""
    removed: bool = False
    """Of a directory that is no more; it holds no reference."""
    losses_heard: int = 0
    """Losses of written data that this handle has been told of (`cfs.write_errors`)."""
    shared_writer: bool = False
    """Counted in `inode.writers`: a shared mapping of it can dirty pages without a request."""


class OperationsBase(pyfuse3.Operations):  # type: ignore[misc]
    """State and helpers of the handlers of one mount."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, fs: FileSystem, caches: KernelCaches, waits: RequestWaits) -> None:
        super().__init__()
        self.fs = fs
        self.caches = caches
        self.waits = waits
        self.counters: dict[str, int] = {}
        """Requests by operation."""
        self.errors = 0
        self.handles: dict[int, Handle] = {}
        self._handle_last = 0
        self._root = fs.root_ino
        self._plain = PlainEntry()
        self.barred = False
        self.answer: Callable[[Request, int, bytes | list[Buffer]], None]
        """Answers a request with an errno, or 0 and data: `cfs.operations.extension_io`."""
        self.answer_later: Callable[[Request, Callable[[Request, bytes], Awaitable[bytes]]], None]
        """Gives a parked request a task after all."""
        self.request: Request
        """The request being dispatched; valid until the first await of its handler."""

    def ino(self, node: int) -> int:
        """The inode number that the kernel calls `node`."""
        return self._root if node == ROOT_NODE else node

    def known(self, node: int) -> KernelInode:
        """The account of an inode that a request names, which the kernel therefore knows."""
        number = self._root if node == ROOT_NODE else node
        inode = self.caches.inodes.get(number)
        if inode is None:
            attributes = self.fs.try_getattr(number)
            generation = attributes.generation if attributes is not None else 0
            inode = self.caches.know(number, generation, directory=node == ROOT_NODE)
            inode.lookups += node == ROOT_NODE
        return inode

    def errno_of(self, operation: str, error: Exception) -> int:
        """What the caller gets for an exception that left a handler."""
        if isinstance(error, FsError):
            return error.errno
        if isinstance(error, BarredError):
            self.barred = True
            return errno.ENOTCONN
        self.errors += 1
        log.error("%s failed", operation, exc_info=error)
        return errno.EIO

    def stop_if_abandoned(self, unique: int) -> None:
        """Raise if nobody waits for this answer any more: it must not be counted."""
        if self.waits.is_abandoned(unique):
            raise FsError(errno.EINTR, "the caller was killed")

    async def settle_abandoned(self, request: Request) -> None:
        """The kernel was told that this request ended, but it was carried out after that: what the
        kernel learnt in between may be wrong."""
        if request.opcode in CHANGES:
            self.caches.distrust()
            if request.opcode in NEW_CONTENT:
                await self.caches.drop_all_pages(self.ino(request.inode))

    def add_handle(self, inode: KernelInode, lock: CachedLock, flags: int) -> Handle:
        """Number a new handle."""
        if len(self.handles) >= HANDLES_MAX:
            raise FsError(errno.ENFILE)
        self._handle_last += 1
        handle = Handle(self._handle_last, inode, lock, flags)
        self.handles[handle.number] = handle
        inode.handles += 1
        return handle

    def drop_handle(self, number: int) -> Handle:
        """Forget a handle that the kernel has released."""
        handle = self.handles.pop(number)
        inode = handle.inode
        inode.handles -= 1
        if handle.shared_writer:
            inode.writers -= 1
        if self.caches.drop_if_unused(inode):
            self.fs.forget([inode.number])
        return handle

    def answer_entry(
        self, attributes: Attributes, name_timeout_s: float
    ) -> pyfuse3.EntryAttributes:
        """An answer that makes the kernel know an inode: counted until it is forgotten."""
        inode, attributes, timeout = self.count_entry(attributes)
        found = entry(attributes, attribute_timeout_s=timeout, name_timeout_s=name_timeout_s)
        if inode.node != attributes.ino:
            found.st_ino = pyfuse3.InodeT(inode.node)
        return found

    def count_entry(self, attributes: Attributes) -> tuple[KernelInode, Attributes, float]:
        """Count an answer that makes the kernel know an inode. Its account, its newest attributes,
        and how long they may be believed (seconds)."""
        ino = attributes.ino
        fresh = self.fs.try_getattr(ino)
        inode = self.caches.know(ino, attributes.generation, directory=attributes.is_directory)
        inode.lookups += 1
        timeout = 0.0
        if fresh is not None and fresh.generation == attributes.generation:
            attributes = fresh
            lock = self.fs.inode_lock(ino)
            timeout = self.caches.attribute_timeout(inode, lock, inode.revision)
        return inode, attributes, timeout

    def current_attributes(
        self, inode: KernelInode, attributes: Attributes
    ) -> tuple[Attributes, float]:
        """The newest attributes there are, and how long they may be believed (seconds)."""
        if attributes is inode.remains:
            return attributes, 0.0
        fresh = self.fs.try_getattr(inode.number)
        if fresh is None:
            return attributes, 0.0
        lock = self.fs.inode_lock(inode.number)
        return fresh, self.caches.attribute_timeout(inode, lock, inode.revision)

    def buried(self, last: Attributes | None) -> None:
        """An inode has lost its last name here (None: none has)."""
        if last is not None:
            inode = self.caches.inodes.get(last.ino)
            if inode is not None and inode.generation == last.generation:
                inode.remains = last

    def try_attributes_of(self, account: KernelInode) -> Attributes | None:
        """`attributes_of` if it needs no waiting. Raises FsError(ESTALE)."""
        if account.remains is not None:
            return None
        attributes = self.fs.try_getattr(account.number)
        if attributes is not None:
            self.need_same_life(account, attributes)
        return attributes

    async def attributes_of(self, inode: KernelInode) -> Attributes:
        """Attributes of an inode that the kernel knows, also of one that is no more."""
        try:
            attributes = self.fs.try_getattr(inode.number)
            if attributes is None:
                attributes = await self.fs.getattr(inode.number)
            self.need_same_life(inode, attributes)
        except FsError as error:
            if error.errno != errno.ESTALE or inode.remains is None:
                raise
            return inode.remains
        return attributes

    @staticmethod
    def life_of(inode: KernelInode) -> int | None:
        """The generation of the inode that the kernel means, if that is known. It asks for no
        attributes before it changes or links a file that it has found long ago (O_PATH)."""
        return inode.generation or None

    @staticmethod
    def need_same_life(inode: KernelInode, attributes: Attributes) -> None:
        """The number may have been given to another inode since the kernel heard of it."""
        if inode.generation != attributes.generation and inode.node == inode.number:
            raise FsError(errno.ESTALE)

    async def truncate(self, inode: KernelInode, changes: SetAttributes) -> Attributes:
        """Change attributes with a new size. The kernel holds back laundered WRITEs of the file
        until this is answered, so a revocation must be able to let it pass."""
        lock = self.fs.inode_lock(inode.number)
        if not lock.try_hold(Mode.EX):
            waiter = Waiter(0, 0, Mode.EX, writes=True, cached=False)
            await self.caches.hold(inode, lock, waiter)
        inode.serving += 1
        try:
            return await self.fs.setattr_held(inode.number, changes)
        finally:
            inode.note_write(*EVERYTHING)
            lock.release(Mode.EX)
            self.caches.served_one(inode)


S = TypeVar("S", bound=OperationsBase)


def handler(
    function: Callable[Concatenate[S, P], Awaitable[R]],
) -> Callable[Concatenate[S, P], Awaitable[R]]:
    """Wrap a handler: count it, let a fatal signal of its caller end its waiting, turn every
    exception into an errno. pyfuse3 would end the whole mount for anything but FUSEError."""
    name = function.__name__

    @functools.wraps(function)
    async def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        counters = self.counters
        counters[name] = counters.get(name, 0) + 1
        self.request = request = fuse.current_request()
        task = trio.lowlevel.current_task()
        requests = self.waits.requests
        requests[task] = request
        try:
            return await function(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            raise pyfuse3.FUSEError(self.errno_of(name, error)) from None
        finally:
            del requests[task]
            if self.waits.has_signals():
                if self.waits.is_abandoned(request.unique):
                    await self.settle_abandoned(request)
                self.waits.finished(request.unique)

    return wrapped
