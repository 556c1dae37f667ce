"""Damaged blocks as a running mount meets them: what is told, and to whom.

Whoever needs a damaged block gets EIO; all else goes on. Each block is told once in a while, in one
line that names the block, its owner and the remedy; when much is damaged the lines are counted
instead (`LINES_MAX` in `WINDOW_NS`).
"""

from __future__ import annotations

from collections.abc import Callable

from cfs.cache import Covered, GroupState, InodeState
from cfs.errors import REMEDY
from cfs.format import Header
from cfs.nodes import Node

REPEAT_NS = 600 * 1_000_000_000
WINDOW_NS = 10 * 1_000_000_000
LINES_MAX = 20
BLOCKS_KNOWN_MAX = 4096
VERSIONS_MAX = 1 << 16


def owner_of(covered: Covered, block: int) -> str:
    """What a block belongs to, in words."""
    if isinstance(covered, GroupState):
        return f"allocation group {covered.number}"
    if isinstance(covered, InodeState):
        inode = covered.node
        if block == covered.number:
            return f"inode {covered.number}"
        if inode is None:
            return f"a block of inode {covered.number}"
        kind = "directory" if inode.is_directory else "file"
        return f"the tree of {kind} {covered.number}"
    return "the slot table"


class DamageLog:
    """Tells of damage, each block once in `REPEAT_NS`, not more than `LINES_MAX` in a window."""

    def __init__(self, tell: Callable[[int, str], None], now_ns: Callable[[], int]) -> None:
        self._tell = tell
        self._now_ns = now_ns
        self._told: dict[str, int] = {}
        self._window = 0
        self._lines = 0
        self._untold = 0
        self.count = 0
        """Times that somebody met damage."""

    def report(self, block: int, owner: str, what: str) -> None:
        """`what` is a sentence that names the block; `owner` may be in it already ("")."""
        self.count += 1
        now = self._now_ns()
        told = self._told.get(what)
        if told is not None and now - told < REPEAT_NS:
            return
        if now - self._window >= WINDOW_NS:
            self._window, self._lines = now, 0
        if self._lines >= LINES_MAX:
            self._untold += 1
            return
        self._lines += 1
        self._told.pop(what, None)
        self._told[what] = now
        if len(self._told) > BLOCKS_KNOWN_MAX:
            del self._told[next(iter(self._told))]
        more = f"; {self._untold} more were not told" if self._untold else ""
        self._untold = 0
        whose = f" ({owner})" if owner else ""
        self._tell(
            block, f"damage: {what}{whose}; who needs it gets EIO, all else goes on{more}; {REMEDY}"
        )


class Versions:
    """The versions of blocks that were read or written here. The version of a metadata block only
    grows, so a block that comes back with a lower one is stale: its last write was lost."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int]] = {}

    def note(self, node: Node) -> None:
        known = self._known
        known.pop(node.block, None)
        known[node.block] = (node.generation, node.change)
        if len(known) > VERSIONS_MAX:
            del known[next(iter(known))]

    def is_stale(self, header: Header) -> bool:
        known = self._known.get(header.block)
        return known is not None and (header.generation, header.change) < known
