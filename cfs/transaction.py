"""Transactions: an operation's changes, made visible all at once.

The body of an operation is a plain function: it has no await, so nothing can come between its
reading and its writing, and no other task sees half of it. It works on clones (`Tx.edit`); when a
block, a group lock or space is missing it raises, everything it did is forgotten, `Core.run` gets
what was missing, and the body runs again from its start. `Tx.apply` puts the clones in place of the
cached nodes and into the journal's running transaction.

Invariant: what is in a `Covered` may be used only while its lock is held or while the caller is
in the synchronous part after a successful `try_hold`.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from cfs.errors import CorruptionError, FsError
from cfs.format import Kind
from cfs.nodes import GroupNode, InodeNode, Node, TreeNode
from cluster.locks import CachedLock, Mode

if TYPE_CHECKING:
    from cfs.cache import Covered, GroupState, InodeState

AnyNode = TypeVar("AnyNode", bound=Node)


class Missing(Exception):
    """A block is not in the cache."""

    def __init__(self, covered: Covered, block: int, kinds: tuple[Kind, ...]) -> None:
        super().__init__(block)
        self.covered = covered
        self.block = block
        self.kinds = kinds


class NeedGroup(Exception):
    """The lock of an allocation group must be held in EX."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class NeedSpace(Exception):
    """No group that is cached here has room: get another one."""

    def __init__(self, blocks: int) -> None:
        super().__init__(blocks)
        self.blocks = blocks


class NeedInodes(Exception):
    """No inode is prepared; the caller lets its inode locks go before it prepares more."""


class NotNow(Exception):
    """Something has to be waited for; nothing was done."""


class Changed(Exception):
    """What was looked up before the locks were taken is no longer so: begin anew."""


class NeedWait(Exception):
    """Something must have ended first; awaited before the body runs again."""

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self.wait = wait


class Reader:
    """Reads nodes from the cache; `Tx` reads its own changes first."""

    __slots__ = ()

    def get(self, covered: Covered, block: int, kind: Kind) -> Node:
        node = covered.nodes.get(block)
        if node is None:
            raise Missing(covered, block, (kind,))
        return node

    def inode(self, covered: Covered) -> InodeNode:
        """The inode block of an inode's state."""
        node = self.get(covered, covered.number, Kind.INODE)
        assert isinstance(node, InodeNode)
        if not node.mode:
            raise FsError(errno.ESTALE, f"inode {covered.number} is gone")
        return node

    def tree(self, covered: Covered, block: int, kind: Kind) -> TreeNode:
        node = self.get(covered, block, kind)
        assert isinstance(node, TreeNode)
        return node


READER = Reader()


class Tx(Reader):
    """The changes of one operation. Made and used up within one synchronous body."""

    __slots__ = (
        "_after", "_dropped", "_groups_held", "_holds", "_kept", "_nodes", "_running",
    )  # fmt: skip

    def __init__(self, running: dict[int, Node], groups_held: set[int]) -> None:
        self._running = running
        self._nodes: dict[int, tuple[Covered, Node]] = {}
        self._dropped: dict[int, Covered] = {}
        self._groups_held = groups_held
        self._holds: list[tuple[int, CachedLock]] = []
        self._kept: list[tuple[InodeState, Mode]] = []
        self._after: list[Callable[[], None]] = []

    @property
    def changed(self) -> bool:
        return bool(self._nodes)

    @property
    def changes_maps(self) -> bool:
        return any(isinstance(node, GroupNode) for _, node in self._nodes.values())

    def get(self, covered: Covered, block: int, kind: Kind) -> Node:
        mine = self._nodes.get(block)
        if mine is not None:
            return mine[1]
        node = covered.nodes.get(block)
        if node is None:
            raise Missing(covered, block, (kind,))
        return node

    def edit(self, covered: Covered, block: int, kind: Kind) -> Node:
        """The block's node as this transaction's own, to be changed in place."""
        mine = self._nodes.get(block)
        if mine is not None:
            return mine[1]
        node = self.get(covered, block, kind)
        assert covered.writable, f"block {block} is changed without its lock in EX"
        twin = node.clone()
        if block not in self._running:
            twin.change += 1
        self._nodes[block] = (covered, twin)
        return twin

    def edit_inode(self, covered: Covered) -> InodeNode:
        node = self.edit(covered, covered.number, Kind.INODE)
        assert isinstance(node, InodeNode)
        return node

    def edit_tree(self, covered: Covered, block: int, kind: Kind) -> TreeNode:
        node = self.edit(covered, block, kind)
        assert isinstance(node, TreeNode)
        return node

    def add(self, covered: Covered, node: Node) -> None:
        """A block that was just allocated."""
        assert covered.writable
        self._dropped.pop(node.block, None)
        self._nodes[node.block] = (covered, node)

    def drop(self, covered: Covered, block: int) -> None:
        """A metadata block that was just freed: it leaves the cache; no image of it is needed."""
        self._nodes.pop(block, None)
        self._dropped[block] = covered

    def group(self, state: GroupState) -> GroupNode:
        """A group's block for a change; its lock stays held until the transaction has ended."""
        number = state.number
        if state.damaged:
            raise FsError(errno.EIO, f"allocation group {number} is damaged")
        if number not in self._groups_held:
            if not state.lock.try_hold(Mode.EX):
                raise NeedGroup(number)
            self._groups_held.add(number)
            self._holds.append((number, state.lock))
        node = self.edit(state, state.block, Kind.GROUP)
        assert isinstance(node, GroupNode)
        return node

    def after(self, action: Callable[[], None]) -> None:
        """Run `action` when the changes are in place, still synchronously."""
        self._after.append(action)

    def apply(self) -> None:
        """Make the changes visible. Raises CorruptionError if an inode would count less than
        nothing: it had a wrong count on the disk, and no journal could hold it."""
        for _, node in self._nodes.values():
            if isinstance(node, InodeNode) and (node.nlink < 0 or node.blocks < 0):
                raise CorruptionError(
                    f"inode {node.block} counts too few links or blocks", block=node.block
                )
        for block, covered in self._dropped.items():
            covered.nodes.pop(block, None)
            if block not in self._nodes:
                self._running.pop(block, None)
        for block, (covered, node) in self._nodes.items():
            covered.nodes[block] = node
            self._running[block] = node
        for action in self._after:
            action()

    def keep(self, state: InodeState, mode: Mode) -> None:
        """A hold that ends with the transaction."""
        self._kept.append((state, mode))

    def close(self) -> None:
        """Give the locks back that this transaction took; applied or not."""
        for state, mode in self._kept:
            state.release(mode)
        self._kept.clear()
        for number, lock in self._holds:
            self._groups_held.discard(number)
            lock.release(Mode.EX)
        self._holds.clear()
