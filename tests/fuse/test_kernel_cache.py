"""The account of what the kernel may hold, against models."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cfs.fuse import kernel_cache_io
from cfs.fuse.kernel_cache import (
    EPOCH_NEVER,
    PAGE_BYTES,
    RANGES_MAX,
    KernelInode,
    Spans,
    Waiter,
    detour,
    edge_pages,
    page_span,
    revocation,
    servable,
    subtract,
    without_waiting_reads,
)
from cfs.fuse.kernel_cache_io import KernelCaches
from cfs.fuse.notify_io import Job
from cluster.locks import Mode

ranges = st.tuples(st.integers(0, 400_000), st.integers(1, 60_000)).map(lambda p: (p[0], sum(p)))


def pages_of(spans):
    return {page for s, e in spans for page in range(s // PAGE_BYTES, -(-e // PAGE_BYTES))}


@given(st.lists(ranges, max_size=200))
def test_spans_cover_what_was_added(added):
    """Every page that was added is covered; with few spans nothing else is."""
    spans = Spans()
    for start, end in added:
        spans.add(start, end)
        assert spans.overlaps(start, end)
    covered = pages_of(spans.spans)
    assert pages_of(added) <= covered
    assert len(spans.spans) <= RANGES_MAX
    assert spans.spans == sorted(spans.spans)
    assert all(a[1] < b[0] for a, b in zip(spans.spans, spans.spans[1:], strict=False))
    if len(pages_of(added)) < RANGES_MAX:
        assert pages_of(added) == covered
    assert spans.take() and not spans if added else not spans


def test_spans_merge_the_smallest_gap():
    """Above the limit the two closest spans become one."""
    spans = Spans()
    for number in range(RANGES_MAX):
        spans.add(number * 10 * PAGE_BYTES, number * 10 * PAGE_BYTES + 1)
    spans.add(55 * PAGE_BYTES, 56 * PAGE_BYTES)
    assert len(spans.spans) == RANGES_MAX
    assert pages_of(spans.spans) - {55} > {n * 10 for n in range(RANGES_MAX)} - {55}
    assert len(pages_of(spans.spans)) == RANGES_MAX + 1 + 4


@given(st.lists(ranges), st.lists(ranges))
def test_subtract(spans, holes):
    """Set difference, byte for byte at the ends."""
    left = subtract(spans, holes)
    for start, end in left:
        assert start < end
        assert not any(s < end and start < e for s, e in holes)
    points = {p + d for pair in [*spans, *holes] for p in pair for d in (-1, 0)}
    inside = lambda p, many: any(s <= p < e for s, e in many)  # noqa: E731
    for point in points:
        assert inside(point, left) == (inside(point, spans) and not inside(point, holes))


@given(ranges)
def test_edge_pages_are_the_ragged_ones(span):
    """Each page that a write covers only in part, and no other."""
    start, end = span
    first, last = page_span(start, end)
    ragged = [
        (page, page + PAGE_BYTES)
        for page in range(first, last, PAGE_BYTES)
        if page < start or page + PAGE_BYTES > end
    ]
    assert edge_pages(start, end) == ragged


def test_revocation_of_a_file():
    """NL takes pages and attributes, PR nothing of a file without shared writers."""
    inode = KernelInode(5, 5)
    inode.pages.add(0, 10)
    inode.attributes_out = True
    plan = revocation(inode, Mode.NL, 3)
    assert (plan.pages, plan.attributes, plan.names) == (True, True, False)
    plan = revocation(inode, Mode.PR, 3)
    assert (plan.pages, plan.attributes, plan.names) == (False, False, False)
    inode.writers = 1
    plan = revocation(inode, Mode.PR, 3)
    assert (plan.pages, plan.attributes, plan.names) == (True, False, False)
    assert not revocation(inode, Mode.EX, 3).pages


def test_revocation_of_a_directory():
    """Names go by epoch: only if some were given out in the current one."""
    inode = KernelInode(5, 5, directory=True)
    assert not revocation(inode, Mode.NL, 3).names
    inode.names_epoch = 3
    assert revocation(inode, Mode.NL, 3).names
    assert not revocation(inode, Mode.NL, 4).names
    assert not revocation(inode, Mode.PR, 3).names
    inode.names_epoch = EPOCH_NEVER
    assert not revocation(inode, Mode.NL, 0).names


def test_who_is_served_during_a_revocation():
    """A READ under PR or EX, a WRITE only under EX; under EX everything."""
    read = Waiter(0, 1, Mode.PR, writes=False, cached=True)
    write = Waiter(0, 1, Mode.EX, writes=True, cached=True)
    assert servable(read, Mode.PR)
    assert servable(read, Mode.EX)
    assert not servable(write, Mode.PR)
    assert servable(write, Mode.EX)
    assert not servable(read, Mode.NL)
    assert not servable(read, Mode.CW)


def test_detour_around_blocked_requests():
    """Locked pages of READs are left out, ragged pages of WRITEs come apart."""
    write = Waiter(PAGE_BYTES + 1, 3 * PAGE_BYTES, Mode.EX, writes=True, cached=True)
    read = Waiter(5 * PAGE_BYTES, 6 * PAGE_BYTES, Mode.EX, writes=False, cached=True)
    past = Waiter(0, 1 << 20, Mode.EX, writes=True, cached=False)
    way = detour([(0, 10 * PAGE_BYTES)], [write, read, past])
    assert way.edges == [(PAGE_BYTES, 2 * PAGE_BYTES)]
    assert way.open == [
        (0, PAGE_BYTES), (2 * PAGE_BYTES, 5 * PAGE_BYTES), (6 * PAGE_BYTES, 10 * PAGE_BYTES),
    ]  # fmt: skip


def test_waiting_reads_are_left_for_later():
    """A page that a READ will bring anew needs no invalidation now; a WRITE's does."""
    read = Waiter(0, 100, Mode.PR, writes=False, cached=True)
    write = Waiter(PAGE_BYTES, PAGE_BYTES + 5, Mode.EX, writes=True, cached=True)
    left = without_waiting_reads([(0, 2 * PAGE_BYTES)], [read, write])
    assert left == [(PAGE_BYTES, 2 * PAGE_BYTES)]


def test_overtaken_reads_are_noticed():
    """A write that overlaps a READ in progress is seen by it, one elsewhere or before is not."""
    inode = KernelInode(5, 5)
    inode.note_write(0, 10)
    inode.reading = 1
    number = inode.write_number
    assert not inode.written_since(number, 0, 100)
    inode.note_write(200, 300)
    assert not inode.written_since(number, 0, 100)
    inode.note_write(99, 100)
    assert inode.written_since(number, 0, 100)
    for _ in range(1000):
        inode.note_write(5000, 5001)
    assert inode.written_since(number, 0, 100), "too many to remember: assume the worst"


class Kernel:
    """In place of the notifier: a kernel that does not know an inode until it was told `unseen`
    times."""

    has_epoch = True

    def __init__(self, unseen):
        self.unseen = unseen
        self.told = []

    def submit(self, messages, wake=None):
        job = Job(messages, wake)
        job.missed = self.unseen > 0
        self.unseen -= 1
        self.told += messages
        job.finish()
        return job


class Table:
    def add(self, node):
        return node

    def remove(self, slot):
        """Nothing to forget."""


class Lock:
    mode = Mode.PR
    demoting = False


def known_inode(kernel):
    caches = KernelCaches(Table(), 1)
    caches.connect(kernel)
    inode = caches.know(7, 1, directory=False)
    inode.lookups = 1
    return caches, inode


@pytest.mark.trio
@pytest.mark.parametrize("pages", [False, True])
async def test_an_answer_that_the_kernel_has_not_taken_in_is_taken_back_all_the_same(pages):
    """A LOOKUP was answered, and its caller has not run since: the first notifications find no
    inode; the last one does."""
    kernel = Kernel(unseen=5)
    caches, inode = known_inode(kernel)
    assert caches.attribute_timeout(inode, Lock(), inode.revision) > 0
    if pages:
        inode.answered_read(0, 4096, 1)
    await caches.revoke(7, Mode.NL)
    assert kernel.unseen < 0
    assert not inode.attributes_out


@pytest.mark.trio
async def test_an_inode_that_the_kernel_forgets_is_not_waited_for():
    kernel = Kernel(unseen=1 << 30)
    caches, inode = known_inode(kernel)
    caches.attribute_timeout(inode, Lock(), inode.revision)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(caches.revoke, 7, Mode.NL)
        while len(kernel.told) < 3:
            await trio.lowlevel.checkpoint()
        inode.lookups = 0
    assert 7 not in caches.inodes


@pytest.mark.trio
async def test_a_caller_that_does_not_run_keeps_the_lock_for_a_bounded_time(monkeypatch):
    """After that its answer is taken back on the side."""
    monkeypatch.setattr(kernel_cache_io, "UNSEEN_S", 0.0)
    kernel = Kernel(unseen=6)
    caches, inode = known_inode(kernel)
    caches.attribute_timeout(inode, Lock(), inode.revision)
    await caches.revoke(7, Mode.NL)
    assert kernel.unseen > 0
    with trio.fail_after(60):
        while kernel.unseen >= 0:
            await trio.lowlevel.checkpoint()


@pytest.mark.trio
async def test_a_change_is_announced_only_where_something_is_cached():
    kernel = Kernel(unseen=0)
    caches, inode = known_inode(kernel)
    await caches.revoke(7, Mode.NL)
    await caches.revoke(8, Mode.NL)
    assert kernel.told == []
    caches.attribute_timeout(inode, Lock(), inode.revision)
    await caches.revoke(7, Mode.PR)
    assert kernel.told == []
    await caches.revoke(7, Mode.NL)
    assert len(kernel.told) == 1
    await caches.revoke(7, Mode.NL)
    assert len(kernel.told) == 1
