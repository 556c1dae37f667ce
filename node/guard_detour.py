"""The way around locked pages when the guard purges an inode (rule G3). Pure.

A locked page holds up the invalidation of its inode until the request that locked it is answered,
and a lapsed gate lets no such answer pass. But what such a request keeps locked holds no valid
data, and the request stands in the mount's table of unanswered requests. So an inode whose
invalidation stalls is invalidated once more, piece by piece, around those pages:

- A READ through the page cache has locked all its pages.
- A WRITE through the page cache has locked a ragged edge page if that held no valid data. If it did
  it is not locked, and can be dropped like any other. So each edge page is a piece of its own, left
  behind when the thread that invalidates it proves to wait for the lock. What else that thread
  could wait for is a dirty page to be written back, and dirty pages hold data. Then the write-back
  stands in the table, or it waits unread, or the kernel holds it back behind a truncation.

What was seen locked once after the gate was closed stays without data until the gate opens: no
answer fills it. Pieces that hang are left to themselves; they end when their request is answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cfs.fuse.kernel_cache import EVERYTHING, Span, edge_pages, page_span, subtract
from native.requests import Opcode, PendingRequest

PIECES_MAX = 256
WAITING_LOOKS = 2
HARMLESS = frozenset(
    {Opcode.READ, Opcode.WRITE, Opcode.GETATTR, Opcode.FLUSH, Opcode.FSYNC, Opcode.RELEASE,
     Opcode.GETLK, Opcode.SETLK, Opcode.SETLKW}
)  # fmt: skip
"""Requests that hold back no write-back of their inode while they are unanswered."""


@dataclass(slots=True)
class Piece:
    """Spans that one thread invalidates in their order."""

    spans: list[Span]
    edge: bool = False
    finished: int = 0
    """How many of the spans are done; the thread counts."""
    waiting: int = 0
    """In how many looks in a row its thread was asleep for something in the kernel."""
    stopped: bool = False
    """The thread is to take no further span."""


class Detour:
    """One inode. `look` again and again until it is `covered`."""

    def __init__(self) -> None:
        self.left: list[Span] = [EVERYTHING]
        """Neither invalidated nor seen locked since the gate was closed."""
        self.pieces: list[Piece] = []
        self._avoided: list[Span] = []
        self._started = 0

    @property
    def covered(self) -> bool:
        """Whether the kernel holds no valid page of the inode."""
        return not self.left

    def look(self, rows: Sequence[PendingRequest], *, complete: bool) -> list[Piece]:
        """Take in what the threads have done; returns the pieces to start now.

        `rows` are the unanswered requests of the inode; `complete` says that they are all that the
        kernel has sent since the pieces were last seen waiting."""
        reads, edges = _locked(rows)
        for piece in self.pieces:
            self.left = subtract(self.left, piece.spans[: piece.finished])
        self.left = subtract(self.left, reads)
        if complete and all(row.opcode in HARMLESS and not row.laundered for row in rows):
            for piece in self.pieces:
                if piece.edge and piece.waiting >= WAITING_LOOKS and piece.spans[0] in edges:
                    self.left = subtract(self.left, piece.spans)
        self.pieces = [piece for piece in self.pieces if piece.finished < len(piece.spans)]
        return self._plan(reads, edges)

    def _plan(self, reads: list[Span], edges: list[Span]) -> list[Piece]:
        """New pieces if there is something new to go around, or nothing else is under way."""
        avoid = [span for span in [*reads, *edges] if span not in self._avoided]
        running = [piece for piece in self.pieces if not piece.edge]
        if self.covered or (running and not avoid) or self._started >= PIECES_MAX:
            return []
        self._avoided += avoid
        for piece in running:
            piece.stopped = True
        self.pieces = [piece for piece in self.pieces if piece.edge]
        known = [piece.spans[0] for piece in self.pieces]
        fresh = [
            Piece([span], edge=True)
            for span in edges
            if span not in known and subtract([span], self.left) != [span]
        ]
        taken = [*known, *(piece.spans[0] for piece in fresh)]
        rest = subtract(self.left, taken)
        if rest:
            fresh.append(Piece(rest))
        self.pieces += fresh
        self._started += len(fresh)
        return fresh


def _locked(rows: Sequence[PendingRequest]) -> tuple[list[Span], list[Span]]:
    """The pages that unanswered READs keep locked, and those that WRITEs may keep locked."""
    reads: list[Span] = []
    edges: set[Span] = set()
    for row in rows:
        if row.past_cache or row.laundered:
            continue
        end = row.offset + row.size
        if row.opcode == Opcode.READ:
            reads.append(page_span(row.offset, end))
        elif row.opcode == Opcode.WRITE:
            edges.update(edge_pages(row.offset, end))
    return reads, sorted(edges)


def by_inode(rows: Sequence[PendingRequest]) -> Mapping[int, list[PendingRequest]]:
    """The rows of each inode."""
    found: dict[int, list[PendingRequest]] = {}
    for row in rows:
        found.setdefault(row.inode, []).append(row)
    return found
