"""Takes back what the kernel was told it may cache: the revocation protocol.

Gate first, serve on stall. When the lock of an inode has to go down:
1. `revoking` goes up: every answer from now on carries timeout 0, new data requests wait for the
   lock, those in service end and their pages are recorded;
2. threads invalidate the recorded ranges. An invalidation that has not returned after
   `STALL_S` waits for a page locked by a waiting request (or for dirty pages to be written, which
   is always served): the waiting requests that the still held lock covers are answered, the pages
   they carried are recorded, and are invalidated in the next round;
3. waiting requests that the held lock does not cover (a WRITE that needs EX while PR is held) keep
   at most pages without valid data locked: the invalidation goes around them;
4. until nothing is recorded.

An answer that makes the kernel know an inode may have been sent, and its caller has not run since:
then the kernel does not find the inode, and would believe the answer when it comes to it. So a
notification that finds nothing is repeated until it does, or the kernel has forgotten the inode.
After `UNSEEN_S` the lock goes all the same, and that is done on the side: the caller may be a
READDIRPLUS that waits for a LOOKUP of a name, which waits for this lock.

No lock of the daemon is held while a notification is outstanding except the cluster lock itself.
Without this order one pass of invalidation leaves stale pages behind under hot readers (measured).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from cfs.fuse.kernel_cache import (
    EPOCH_NEVER,
    EVERYTHING,
    SHARING_MODES,
    KernelInode,
    Span,
    Waiter,
    WaiterId,
    detour,
    page_span,
    revocation,
    servable,
    without_waiting_reads,
)
from cfs.fuse.notify_io import (
    Job,
    Notifier,
    encode_attributes,
    encode_pages,
)
from cluster.locks import CachedLock, Mode

UNSEEN_S = 1.0
PURSUIT_S = 60.0
UNSEEN_PAUSE_MIN_S, UNSEEN_PAUSE_MAX_S = 0.0005, 0.02
STALL_S = 0.002
STUCK_AFTER_STALLS = 5
TIMEOUT_LONG_S = 86400.0 * 365
ROOT_NODE = 1


class InodeTable(Protocol):
    """Where guard finds the inodes that it has to purge when this process cannot (rule G1)."""

    def add(self, node: int) -> int: ...

    def remove(self, slot: int) -> None: ...


class _Gate:
    """What a waiting request and a revocation share beside the account."""

    __slots__ = ("lock", "scope", "waiter")

    def __init__(self, waiter: Waiter, lock: CachedLock) -> None:
        self.waiter = waiter
        self.lock = lock
        self.scope: trio.CancelScope | None = None


class KernelCaches:
    """The kernel's caches of one mount."""

    def __init__(self, table: InodeTable, root: int) -> None:
        self.inodes: dict[int, KernelInode] = {}
        self._notifier: Notifier
        self._table = table
        self._root = root
        self._epoch = 0
        self._ids = itertools.count(1)
        self._gates: dict[WaiterId, _Gate] = {}
        self._idle: dict[int, trio.Event] = {}
        self._dropping: dict[int, trio.Lock] = {}
        self._settling: dict[int, trio.Event] = {}
        self.revocations = 0
        self.stalls = 0
        self.served = 0
        self.rounds_max = 0
        self.detours = 0

    def connect(self, notifier: Notifier) -> None:
        """The mount is there; no request has been answered yet."""
        self._notifier = notifier

    @property
    def notifications(self) -> int:
        """What the kernel has been told, in all."""
        return self._notifier.sent

    # -- the account -------------------------------------------------------------------------

    def know(self, number: int, generation: int, *, directory: bool) -> KernelInode:
        """The account of an inode that an answer is about to mention."""
        inode = self.inodes.get(number)
        if inode is None:
            node = ROOT_NODE if number == self._root else number
            inode = KernelInode(number, node, generation, directory=directory)
            inode.table_slot = self._table.add(node)
            self.inodes[number] = inode
        elif inode.generation != generation:
            inode.generation = generation
            inode.directory = directory
            inode.remains = None
        return inode

    def drop_if_unused(self, inode: KernelInode) -> bool:
        """Forget an inode that the kernel has forgotten."""
        if inode.lookups or inode.handles or inode.revoking:
            return False
        if self.inodes.pop(inode.number, None) is not None:
            self._table.remove(inode.table_slot)
        self._dropping.pop(inode.number, None)
        self._settling.pop(inode.number, None)
        return True

    def attribute_timeout(self, inode: KernelInode, lock: CachedLock, revision: int) -> float:
        """How long the kernel may believe attributes that are answered now, without a checkpoint
        in between. `revision` is that of the inode before its attributes were read."""
        if (
            lock.demoting
            or inode.revoking
            or inode.revision != revision
            or lock.mode not in SHARING_MODES
        ):
            return 0.0
        inode.attributes_out = True
        return TIMEOUT_LONG_S

    def name_timeout(self, parent: KernelInode, lock: CachedLock, revision: int) -> float:
        """How long the kernel may believe a name (or its absence) that is answered now. Without
        epochs (before Linux 6.16) not at all: a single name cannot be taken back without waiting
        for the directory's requests, which may wait for the lock that has to go."""
        if (
            lock.demoting
            or parent.revoking
            or parent.revision != revision
            or lock.mode not in SHARING_MODES
            or not self._notifier.has_epoch
        ):
            return 0.0
        parent.names_epoch = self._epoch
        return TIMEOUT_LONG_S

    # -- requests ----------------------------------------------------------------------------

    async def hold(self, inode: KernelInode, lock: CachedLock, waiter: Waiter) -> None:
        """Hold `lock` for a request that the kernel may keep pages locked for."""
        number = WaiterId(next(self._ids))
        gate = _Gate(waiter, lock)
        inode.waiting[number] = waiter
        self._gates[number] = gate
        try:
            while True:
                with trio.CancelScope() as scope:
                    gate.scope = scope
                    await lock.hold(waiter.mode)
                    return
                gate.scope = None
                # Woken by a revocation that this request is in the way of.
                if lock.hold_demoting(waiter.mode):
                    self.served += 1
                    return
        finally:
            del inode.waiting[number]
            del self._gates[number]

    @contextmanager
    def serving(self, inode: KernelInode) -> Iterator[None]:
        """Count a request that holds the lock."""
        inode.serving += 1
        try:
            yield
        finally:
            self.served_one(inode)

    def served_one(self, inode: KernelInode) -> None:
        """One request that held the lock is about to be answered."""
        inode.serving -= 1
        if inode.serving == 0 and inode.revoking:
            event = self._idle.pop(inode.number, None)
            if event is not None:
                event.set()

    # -- revocation --------------------------------------------------------------------------

    async def revoke(self, number: int, mode: Mode) -> None:
        """Take back everything that `mode` does not allow the kernel of this node to cache."""
        inode = self.inodes.get(number)
        if inode is None:
            return
        inode.revoking += 1
        inode.revision += 1
        self.revocations += 1
        try:
            await self._until_idle(inode)
            while True:
                plan = revocation(inode, mode, self._epoch)
                if plan.names:
                    self._drop_names(inode)
                if plan.pages:
                    # An invalidation of pages drops the attributes as well, if it finds the inode.
                    inode.attributes_out = await self._drop_pages(inode) and inode.attributes_out
                elif plan.attributes:
                    inode.attributes_out = False
                    await self._drop_attributes(inode)
                else:
                    break
        finally:
            inode.revoking -= 1
            inode.revision += 1
            self.drop_if_unused(inode)

    def distrust(self) -> None:
        """The kernel may believe wrong names and attributes of any inode: take all of them back."""
        stale = []
        for inode in self.inodes.values():
            inode.revision += 1
            inode.names_epoch = EPOCH_NEVER
            if inode.attributes_out:
                inode.attributes_out = False
                stale.append(encode_attributes(inode.node))
        self._notifier.submit(stale)
        if self._notifier.has_epoch:
            self._epoch += 1
            self._notifier.bump_epoch()

    async def drop_all_pages(self, number: int) -> None:
        """Drop every page of an inode whatever the account says."""
        inode = self.inodes.get(number)
        if inode is None:
            return
        inode.pages.add(*EVERYTHING)
        inode.revoking += 1
        inode.revision += 1
        try:
            await self._drop_pages(inode)
        finally:
            inode.revoking -= 1

    # -- what the file system says ---------------------------------------------------------------

    def granted(self, number: int, mode: Mode) -> None:
        """The lock went up; what was known under the old mode has been taken back already."""
        inode = self.inodes.get(number)
        if inode is not None:
            inode.revision += 1

    def attributes_changed(self, number: int) -> None:
        """Begin to drop the attributes of an inode; `attributes_settled` waits for the end."""
        inode = self.inodes.get(number)
        if inode is not None and inode.attributes_out:
            done = self._settling[number] = trio.Event()
            self._notifier.submit([encode_attributes(inode.node)], done.set)

    async def attributes_settled(self, inode: KernelInode) -> None:
        """Before a request is answered that has changed attributes by the way: the kernel must not
        go on with the old ones (a set-user-id bit that is gone) after it."""
        done = self._settling.pop(inode.number, None)
        if done is not None:
            await done.wait()

    async def settle(self, inode: KernelInode, spans: list[Span]) -> None:
        """After a write past the page cache to `spans`: drop what the kernel holds of them. The
        caller keeps no page locked and holds no lock."""
        for span in spans:
            inode.note_write(*span)
        stale = [page_span(*span) for span in spans if inode.pages.overlaps(*page_span(*span))]
        if stale:
            inode.invalidated_ns = time.monotonic_ns()
            await self._run([encode_pages(inode.node, span) for span in stale])

    def settle_then(self, inode: KernelInode, span: Span, then: Callable[[], None]) -> None:
        """Drop the pages of `span`, as `settle` does; `then` is called at the end."""
        inode.invalidated_ns = time.monotonic_ns()
        self._notifier.submit([encode_pages(inode.node, page_span(*span))], then)

    def start_settle(self, inode: KernelInode, spans: list[Span]) -> None:
        """`settle` for bytes that the kernel has also put into pages, which may be locked until
        the answer: the invalidation is only started, and gets through right after the answer."""
        for span in spans:
            inode.note_write(*span)
        inode.invalidated_ns = time.monotonic_ns()
        self._notifier.submit([encode_pages(inode.node, page_span(*span)) for span in spans])

    async def drop_filled(self, inode: KernelInode, start: int, end: int) -> None:
        """Before a WRITE through the page cache to [start, end) is answered: drop pages there that
        a READ brought back without its bytes. If such a page is locked, it is by this WRITE, and
        then it is its own page."""
        first, last = page_span(start, end)
        spans = [(max(s, first), min(e, last)) for s, e in inode.filled.spans]
        spans = [(s, e) for s, e in spans if s < e]
        if not spans:
            return
        done = trio.Event()
        inode.invalidated_ns = time.monotonic_ns()
        job = self._notifier.submit([encode_pages(inode.node, span) for span in spans], done.set)
        while not done.is_set():
            with trio.move_on_after(STALL_S):
                await done.wait()
            if job.stuck():
                return

    async def _until_idle(self, inode: KernelInode) -> None:
        while inode.serving:
            event = self._idle.get(inode.number)
            if event is None:
                event = self._idle[inode.number] = trio.Event()
            await event.wait()

    def _drop_names(self, inode: KernelInode) -> None:
        inode.names_epoch = EPOCH_NEVER
        self._epoch += 1
        self._notifier.bump_epoch()

    async def _drop_attributes(self, inode: KernelInode) -> None:
        now = time.monotonic()
        if not await self._pursue(inode, now + UNSEEN_S):
            trio.lowlevel.spawn_system_task(self._pursue, inode, now + PURSUIT_S)

    async def _pursue(self, inode: KernelInode, until_s: float) -> bool:
        """Drop attributes until the kernel knows the inode or has forgotten it."""
        pause_s = UNSEEN_PAUSE_MIN_S
        while True:
            job = await self._run([encode_attributes(inode.node)])
            if not (job.missed and inode.lookups):
                return True
            if time.monotonic() > until_s:
                return False
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, UNSEEN_PAUSE_MAX_S)

    async def _drop_pages(self, inode: KernelInode) -> bool:
        """Returns whether the kernel may not have found the inode."""
        missed = False
        lock = self._dropping.setdefault(inode.number, trio.Lock())
        rounds = 0
        async with lock:
            todo = inode.take_pages(time.monotonic_ns())
            while todo:
                rounds += 1
                missed = await self._invalidate(inode, todo) or missed
                await self._until_idle(inode)
                pages = inode.take_pages(time.monotonic_ns())
                todo = without_waiting_reads(pages, inode.waiting.values())
        self.rounds_max = max(self.rounds_max, rounds)
        return missed or not rounds

    async def _invalidate(self, inode: KernelInode, todo: list[Span]) -> bool:
        """Invalidate `todo`, answering or going around what stands in the way. Returns whether the
        kernel did not know the inode."""
        wake = trio.Event()

        def woken() -> None:
            wake.set()

        def submit(spans: list[Span]) -> Job | None:
            messages = [encode_pages(inode.node, span) for span in spans]
            return self._notifier.submit(messages, woken) if messages else None

        jobs = [job for job in [submit(todo)] if job is not None]
        edges: list[Job] = []
        avoided: set[WaiterId] = set()
        stalls = 0
        while True:
            with trio.move_on_after(STALL_S):
                await wake.wait()
            if wake.is_set():
                wake = trio.Event()
            edges = [job for job in edges if not job.done]
            if all(job.done for job in jobs) and (
                not edges or (stalls > STUCK_AFTER_STALLS and all(job.stuck() for job in edges))
            ):
                return not jobs or any(job.missed for job in jobs)
            stalls += 1
            self.stalls += 1
            blocked = self._serve_waiting(inode)
            if blocked.keys() - avoided:
                avoided = set(blocked)
                self.detours += 1
                way = detour(todo, blocked.values())
                jobs = [job for job in [submit(way.open)] if job is not None]
                edges = [job for span in way.edges if (job := submit([span])) is not None]

    def _serve_waiting(self, inode: KernelInode) -> dict[WaiterId, Waiter]:
        """Let the waiting requests go that the held lock covers; return the others."""
        blocked: dict[WaiterId, Waiter] = {}
        for number, waiter in inode.waiting.items():
            gate = self._gates[number]
            if servable(waiter, gate.lock.mode):
                if gate.scope is not None:
                    gate.scope.cancel()
            else:
                blocked[number] = waiter
        return blocked

    async def _run(self, messages: list[bytes]) -> Job:
        done = trio.Event()
        job = self._notifier.submit(messages, done.set)
        await done.wait()
        return job
