"""What the kernel of this node may hold in its caches, inode by inode, and what must be dropped.

The kernel caches pages, attributes and names on our word: each answer says how long it may be
believed. The word is good only while the cluster lock of the inode is held here. This module
keeps the account of what has been given out; `kernel_cache_io` takes it back.

Invariants:
- a byte range of a file that the kernel may hold as valid is in `pages`, from the moment of the
  answer that carried it until a completed invalidation;
- `attributes_out` and `names_epoch` likewise for attributes, and for names below a directory;
- while `revoking`, an answer carries timeout 0, and data is answered only to requests that stand in
  the way of the revocation, under the lock that is still held;
- while `writers` is not zero a shared mapping may turn a clean page dirty without any request, so
  pages are answered only under EX.

What a *waiting* request does to the page cache (measured, and read in the kernel):
a READ that waits keeps its pages locked and without valid data; a WRITE through the cache keeps at
most its two ragged edge pages locked, those without valid data; nothing else is locked. An
invalidation of a locked page blocks until that request is answered.

Two races between a READ and a WRITE of the same page exist only because we invalidate. The kernel
copies the bytes of a write into its page, then sends the WRITE; if the page is dropped in between,
a READ brings it back without those bytes. So a READ that is overtaken by an overlapping write is
read again before it is answered (`written_since`), and a WRITE near an invalidation drops the pages
that READs have filled meanwhile before it is answered (`filled`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NewType

from cfs.attributes import Attributes
from cluster.locks import Mode

PAGE_BYTES = 4096
RANGES_MAX = 64
EPOCH_NEVER = -1
WRITES_MAX = 256
NEAR_NS = 5_000_000_000
"""How long a WRITE may be on its way from the kernel's look at its pages to this process."""
WaiterId = NewType("WaiterId", int)

Span = tuple[int, int]
"""Bytes [start, end), page aligned."""

EVERYTHING: Span = (0, 1 << 62)
SHARING_MODES = frozenset({Mode.PR, Mode.PW, Mode.EX})
"""Under these nobody else changes the inode, so attributes and names may be believed."""


def page_span(start_bytes: int, end_bytes: int) -> Span:
    """The whole pages that the bytes [start, end) touch."""
    return start_bytes & -PAGE_BYTES, (end_bytes + PAGE_BYTES - 1) & -PAGE_BYTES


def edge_pages(start_bytes: int, end_bytes: int) -> list[Span]:
    """The ragged first and last page of a write: what the kernel may keep locked for it."""
    found = []
    first = start_bytes & -PAGE_BYTES
    last = end_bytes & -PAGE_BYTES
    if start_bytes != first:
        found.append((first, first + PAGE_BYTES))
    if end_bytes != last and (start_bytes == first or last != first):
        found.append((last, last + PAGE_BYTES))
    return found


def subtract(spans: Iterable[Span], holes: Iterable[Span]) -> list[Span]:
    """What is left of `spans` without `holes`."""
    left = list(spans)
    for hole_start, hole_end in holes:
        left = [
            piece
            for start, end in left
            for piece in ((start, min(end, hole_start)), (max(start, hole_end), end))
            if piece[0] < piece[1]
        ]
    return left


class Spans:
    """Sorted, disjoint spans; more than `RANGES_MAX` are merged over their smallest gap."""

    __slots__ = ("spans",)

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def __bool__(self) -> bool:
        return bool(self.spans)

    def add(self, start: int, end: int) -> None:
        """Cover [start, end), rounded out to pages."""
        start, end = page_span(start, end)
        if start >= end:
            return
        spans = self.spans
        if spans:
            last_start, last_end = spans[-1]
            if last_start <= start:
                if end <= last_end:
                    return
                if start <= last_end:  # the sequential reader
                    spans[-1] = (last_start, end)
                    return
        before = [span for span in spans if span[1] < start]
        after = [span for span in spans if span[0] > end]
        for span_start, span_end in spans[len(before) : len(spans) - len(after)]:
            start, end = min(start, span_start), max(end, span_end)
        self.spans = [*before, (start, end), *after]
        if len(self.spans) > RANGES_MAX:
            self._merge_smallest_gap()

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any of it lies in [start, end)."""
        return any(s < end and start < e for s, e in self.spans)

    def take(self) -> list[Span]:
        """Everything; nothing is left."""
        taken, self.spans = self.spans, []
        return taken

    def _merge_smallest_gap(self) -> None:
        spans = self.spans
        at = min(range(len(spans) - 1), key=lambda i: spans[i + 1][0] - spans[i][1])
        spans[at : at + 2] = [(spans[at][0], spans[at + 1][1])]


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits for the lock of its inode, and the pages that it may keep locked."""

    start: int
    end: int
    mode: Mode
    writes: bool
    cached: bool
    """It goes through the page cache (not O_DIRECT)."""

    def locked_pages(self) -> list[Span]:
        """Pages that an invalidation would wait for. They hold no valid data if they are locked."""
        if not self.cached:
            return []
        if self.writes:
            return edge_pages(self.start, self.end)
        return [page_span(self.start, self.end)]


@dataclass(slots=True, eq=False)
class KernelInode:
    """The account of one inode that the kernel knows."""

    number: int
    node: int
    """Its name towards the kernel: the number, except 1 for the root."""
    generation: int = 0
    lookups: int = 0
    handles: int = 0
    directory: bool = False
    remains: Attributes | None = None
    """Of an inode that lost its last name here: a working directory or an O_PATH handle may still
    refer to it, which no request tells."""
    pages: Spans = field(default_factory=Spans)
    attributes_out: bool = False
    names_epoch: int = EPOCH_NEVER
    revoking: int = 0
    revision: int = 0
    serving: int = 0
    waiting: dict[WaiterId, Waiter] = field(default_factory=dict)
    writers: int = 0
    table_slot: int = 0
    invalidated_ns: int = 0
    """When pages were last invalidated; 0: never."""
    filled: Spans = field(default_factory=Spans)
    """Pages that READs have brought since; kept only once there was an invalidation."""
    filled_ns: int = 0
    """When pages were last answered or written; 0: never."""
    reading: int = 0
    write_number: int = 0
    writes: deque[tuple[int, int, int]] = field(default_factory=lambda: deque(maxlen=WRITES_MAX))

    def note_write(self, start: int, end: int) -> None:
        """Bytes [start, end) have just been changed."""
        self.write_number += 1
        if self.reading:
            self.writes.append((self.write_number, start, end))

    def written_since(self, number: int, start: int, end: int) -> bool:
        """Whether a write later than `number` touched [start, end). Only for a READ in progress
        that was counted in `reading` when `write_number` was `number`."""
        if self.writes and self.writes[0][0] > number + 1:
            return True
        return any(n > number and s < end and start < e for n, s, e in self.writes)

    def wrote_pages(self, start: int, end: int, now_ns: int) -> None:
        """A WRITE through the page cache: the kernel has filled the pages of [start, end)."""
        self.note_write(start, end)
        self.pages.add(start, end)
        self.filled_ns = now_ns

    def answered_read(self, start: int, end: int, now_ns: int) -> None:
        """The pages of [start, end) go to the kernel now."""
        self.pages.add(start, end)
        self.filled_ns = now_ns
        if self.invalidated_ns:
            self.filled.add(start, end)

    def take_pages(self, now_ns: int) -> list[Span]:
        """What has to be invalidated; an invalidation of it begins."""
        self.invalidated_ns = now_ns
        self.filled.take()
        return self.pages.take()

    def filled_beside(self, start: int, end: int, arrived_ns: int) -> bool:
        """Whether the kernel may hold pages of [start, end) that it has filled since it dropped
        them for a WRITE past the page cache, which arrived at `arrived_ns`. It drops them once more
        behind a WRITE that its caller waits for, unless that fails, but not behind one of io_submit
        or io_uring."""
        return self.filled_ns > arrived_ns - NEAR_NS and self.pages.overlaps(*page_span(start, end))

    def near_invalidation(self, arrived_ns: int) -> bool:
        """Whether pages could have been dropped under a WRITE that arrived at `arrived_ns`."""
        return self.invalidated_ns > arrived_ns - NEAR_NS and self.invalidated_ns > 0

    def data_mode(self, *, writes: bool, cached: bool) -> Mode:
        """The lock mode under which a READ or WRITE is answered."""
        if writes or (self.writers and cached):
            return Mode.EX
        return Mode.PR

    def check(self) -> None:
        """Assert the invariants that hold between steps."""
        assert self.lookups >= 0
        assert self.handles >= 0
        assert self.serving >= 0
        assert self.writers >= 0
        assert self.revoking >= 0
        for (_, end), (start, _) in zip(self.pages.spans, self.pages.spans[1:], strict=False):
            assert end < start


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a demotion to a mode takes away from the kernel."""

    pages: bool
    attributes: bool
    names: bool


def revocation(inode: KernelInode, mode: Mode, epoch: int) -> Revocation:
    """Decide what has to go before the lock of `inode` may go down to `mode`."""
    sharing = mode in SHARING_MODES
    return Revocation(
        pages=bool(inode.pages) and (not sharing or (inode.writers > 0 and mode != Mode.EX)),
        attributes=not sharing and inode.attributes_out,
        names=not sharing and inode.directory and inode.names_epoch == epoch,
    )


def servable(waiter: Waiter, held: Mode) -> bool:
    """Whether the lock that is still held allows the waiting request to be answered."""
    return held == Mode.EX or (held == waiter.mode and held in SHARING_MODES)


@dataclass(frozen=True, slots=True)
class Detour:
    """A way around requests that cannot be answered before the lock has gone down.

    `open` is invalidated as ever. Each page of `edges` is either locked by a WRITE and without
    valid data, or not locked: invalidated alone, and left behind when it proves to be locked.
    """

    open: list[Span]
    edges: list[Span]


def detour(todo: list[Span], blocked: Iterable[Waiter]) -> Detour:
    """Plan the detour for what is left to do."""
    reads: list[Span] = []
    edges: list[Span] = []
    for waiter in blocked:
        (edges if waiter.writes else reads).extend(waiter.locked_pages())
    edges = subtract(sorted(set(edges)), reads)
    touched = [e for e in edges if any(s < e[1] and e[0] < t for s, t in todo)]
    return Detour(open=subtract(todo, [*reads, *edges]), edges=touched)


def without_waiting_reads(spans: list[Span], waiting: Iterable[Waiter]) -> list[Span]:
    """Leave out pages of READs that still wait: locked, no valid data, and recorded anew when
    they are answered."""
    holes = [page for w in waiting if not w.writes for page in w.locked_pages()]
    return subtract(spans, holes) if holes else spans
