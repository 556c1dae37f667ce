"""What a mount keeps in memory under its locks: blocks of inodes and groups, unwritten data.

A `Covered` owns the nodes that one lock protects. It is emptied when its lock goes to nothing.
There is one `InodeState` per inode at a time: the table finds it again as long as anybody refers to
it, so two tasks never work on two copies of one inode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

from cfs.lock_names import inode_lock_name
from cfs.nodes import GroupNode, InodeNode, Node
from cfs.seams import Event
from cfs.write_errors import WriteErrors
from cluster.device import Buffer
from cluster.locks import CachedLock, LockHooks, LockManager, Mode

Page = tuple[Buffer, int]
"""4096 bytes and the block they belong to."""


class Covered:
    """The cached nodes that a lock protects; `lock` None: this mount's own for all its life."""

    __slots__ = ("loading", "lock", "nodes", "number")

    def __init__(self, number: int, lock: CachedLock | None) -> None:
        self.number = number
        self.lock = lock
        self.nodes: dict[int, Node] = {}
        self.loading: dict[int, Event] = {}

    @property
    def writable(self) -> bool:
        return self.lock is None or self.lock.mode == Mode.EX


class GroupState(Covered):
    """An allocation group as this mount knows it.

    `durable` is the map as it is certainly on the disk: a block that is FREEING in both may be used
    again. Only images from the last sweep on count (`swept_change`): an older one may show a block
    as FREEING in an earlier life of it. `believed_free`: a guess for groups of other mounts.
    `damaged`: the block could not be read under this grant of the lock; nothing is taken from the
    group or given back to it.
    """

    __slots__ = (
        "believed_free", "block", "damaged", "data_hint", "durable", "inode_hint", "meta_hint",
        "swept_change",
    )  # fmt: skip
    lock: CachedLock

    def __init__(self, number: int, lock: CachedLock, block: int) -> None:
        super().__init__(number, lock)
        self.block = block
        self.durable: bytes | None = None
        self.believed_free = -1
        self.damaged = False
        self.swept_change = 0
        self.meta_hint = 0
        self.data_hint = 0
        self.inode_hint = 0

    @property
    def node(self) -> GroupNode | None:
        node = self.nodes.get(self.block)
        assert node is None or isinstance(node, GroupNode)
        return node

    def clear(self) -> None:
        self.nodes.clear()
        self.durable = None
        self.damaged = False


class InodeState(Covered):
    """An inode as this mount knows it: nodes, and file data that is not yet on the disk.

    `pages` wait to be written, `flushing` are being written; a page is in `flushing` at most once,
    so the disk never sees two writes of one block at a time; nor do `direct_writes`, the blocks
    [first, end) of writes past the buffer that are under way, overlap it or each other.
    `map_version` changes whenever blocks are taken away: a reader whose I/O overlapped that reads
    again. `clean` holds pages read from the disk to be changed in part (no bytes: being read); a
    write of that page takes it out again.
    `fresh`: pages whose block has never been written for this file; `spoiled`: those of them whose
    write failed (`cfs.pages`).

    An open inode (`open_count`) outlives its last name everywhere: whoever frees it needs its lock
    in EX. Before this mount lets its lock go altogether it takes the open lock, once (`open_held`).
    `sole`: made here, and its lock has been in EX ever since, so no other mount has it open.
    """

    __slots__ = (
        "__weakref__", "changed_in", "clean", "direct_done", "direct_writes", "errors",
        "flush_done", "flushing", "fresh", "map_version", "open_count", "open_held", "pages",
        "pins", "sole", "spoiled", "written_at",
    )  # fmt: skip
    lock: CachedLock

    def __init__(self, ino: int, lock: CachedLock) -> None:
        super().__init__(ino, lock)
        self.pins = 0
        self.pages: dict[int, Page] = {}
        self.flushing: dict[int, Page] = {}
        self.flush_done: Event | None = None
        self.direct_writes: list[tuple[int, int]] = []
        self.map_version = 0
        self.direct_done: Event | None = None
        self.clean: dict[int, object] = {}
        self.changed_in = 0
        self.errors = WriteErrors()
        self.fresh: set[int] = set()
        self.spoiled: set[int] = set()
        self.written_at = 0
        self.open_count = 0
        self.open_held = False
        self.sole = False

    @property
    def ino(self) -> int:
        return self.number

    @property
    def node(self) -> InodeNode | None:
        node = self.nodes.get(self.number)
        assert node is None or isinstance(node, InodeNode)
        return node

    @property
    def idle(self) -> bool:
        """Nothing but perhaps cached nodes."""
        return not (
            self.pins
            or self.pages
            or self.flushing
            or self.direct_writes
            or self.open_count
            or self.loading
        )

    async def hold(self, mode: Mode) -> None:
        """Take the inode's lock; `release` gives it back. Pinned while waiting."""
        self.pins += 1
        if self.lock.try_hold(mode):
            return
        try:
            await self.lock.hold(mode)
        except BaseException:
            self.pins -= 1
            raise

    def try_hold(self, mode: Mode) -> bool:
        if self.lock.try_hold(mode):
            self.pins += 1
            return True
        return False

    def release(self, mode: Mode) -> None:
        self.lock.release(mode)
        self.pins -= 1


class InodeTable:
    """All inode states of a mount, least recently made first."""

    def __init__(self, locks: LockManager, hooks: LockHooks, limit: int) -> None:
        self._locks = locks
        self._hooks = hooks
        self.limit = limit
        self.states: dict[int, InodeState] = {}
        self._referred: WeakValueDictionary[int, InodeState] = WeakValueDictionary()

    def get(self, ino: int) -> InodeState:
        """The state of an inode, made if it is not there."""
        state = self.states.get(ino)
        if state is None:
            state = self._referred.get(ino)
            if state is None:
                lock = self._locks.get(inode_lock_name(ino), self._hooks)
                state = self._referred[ino] = InodeState(ino, lock)
            self.states[ino] = state
        return state

    def find(self, ino: int) -> InodeState | None:
        """The state of an inode if there is one."""
        return self.states.get(ino) or self._referred.get(ino)

    def granted(self, ino: int) -> InodeState | None:
        """The lock came: what is cached under it must stay as long as the lock does, also when the
        state was taken out of the table meanwhile and only a waiting task refers to it."""
        state = self.find(ino)
        if state is not None:
            self.states[ino] = state
        return state

    def forget(self, state: InodeState) -> None:
        """Take an idle state whose lock is gone out of the table."""
        if state.idle and state.lock.mode == Mode.NL and self.states.get(state.number) is state:
            del self.states[state.number]

    def surplus(self, is_dirty: Callable[[InodeState], bool]) -> list[InodeState]:
        """States to send away so that the table keeps to its limit: the oldest unused ones.
        Those that are looked at and stay go to the end."""
        excess = len(self.states) - self.limit
        chosen: list[InodeState] = []
        if excess <= 0:
            return chosen
        for ino in list(self.states)[: 2 * excess]:
            state = self.states[ino]
            if state.idle and not is_dirty(state):
                chosen.append(state)
            else:
                self.states[ino] = self.states.pop(ino)
        return chosen


async def hold_all(wants: Sequence[tuple[InodeState, Mode]]) -> None:
    """Hold several inodes: at once if all are here, else one after another by number. The caller
    holds no inode. Release with `release_all`."""
    taken = 0
    for state, mode in wants:
        if not state.try_hold(mode):
            break
        taken += 1
    if taken == len(wants):
        return
    for state, mode in wants[:taken]:
        state.release(mode)
    for state, _ in wants:
        state.pins += 1
    done: list[tuple[InodeState, Mode]] = []
    try:
        for state, mode in sorted(wants, key=lambda want: want[0].number):
            await state.hold(mode)
            done.append((state, mode))
    except BaseException:
        release_all(done)
        raise
    finally:
        for state, _ in wants:
            state.pins -= 1


def release_all(held: Sequence[tuple[InodeState, Mode]]) -> None:
    for state, mode in held:
        state.release(mode)
