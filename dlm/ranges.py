"""Byte-range locks of one file, as POSIX has them: a table without messages, clock or errors.

An owner's locks are ranges of bytes, each read or write. A new lock of an owner replaces what that
owner had there: it splits, shortens, upgrades, downgrades and merges with equal neighbours. Ranges
of different owners may overlap only where both are read locks. Who has to wait stands in a queue;
nobody waits for somebody who only waits, as that would invent deadlocks, but who comes free goes
to the queue in its order before anybody new.

Ranges are closed intervals of offsets; `END` is the end of every file (a lock of length 0).
Invariants (`check`): an owner's ranges are disjoint, in order and not mergeable; ranges of two
owners that overlap are both read locks; nobody in the queue could be granted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Final

import msgspec

from cluster.ids import Instance

END: Final = (1 << 63) - 1
READ: Final = 0
WRITE: Final = 1

Row = tuple[int, int, int]
"""First byte, last byte, READ or WRITE."""


class Owner(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """Whose locks these are: `key` is what the kernel of that member calls the owner (the open
    files of a process, or one open file for OFD locks)."""

    instance: Instance
    key: int


class Ranges:
    """The locks of one owner."""

    __slots__ = ("pid", "rows")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.pid = 0

    def put(self, start: int, end: int, kind: int) -> None:
        """Lock [start, end] in one mode, whatever was there."""
        rows = self.rows
        first = bisect_left(rows, (start,))
        if first and rows[first - 1][1] >= start - 1:
            first -= 1
        last = bisect_left(rows, (end + 2,), first)
        before: list[Row] = []
        after: list[Row] = []
        low, high = start, end
        for row in rows[first:last]:
            if row[2] == kind:
                low, high = min(low, row[0]), max(high, row[1])
                continue
            if row[0] < start:
                before.append((row[0], min(row[1], start - 1), row[2]))
            if row[1] > end:
                after.append((max(row[0], end + 1), row[1], row[2]))
        rows[first:last] = [*before, (low, high, kind), *after]

    def remove(self, start: int, end: int) -> None:
        """Unlock [start, end]."""
        rows = self.rows
        first = bisect_left(rows, (start,))
        if first and rows[first - 1][1] >= start:
            first -= 1
        last = bisect_left(rows, (end + 1,), first)
        left: list[Row] = []
        for row in rows[first:last]:
            if row[0] < start:
                left.append((row[0], start - 1, row[2]))
            if row[1] > end:
                left.append((end + 1, row[1], row[2]))
        rows[first:last] = left

    def within(self, start: int, end: int) -> list[Row]:
        """What is locked of [start, end], cut to it."""
        rows = self.rows
        first = bisect_left(rows, (start,))
        if first and rows[first - 1][1] >= start:
            first -= 1
        last = bisect_left(rows, (end + 1,), first)
        return [(max(r[0], start), min(r[1], end), r[2]) for r in rows[first:last]]

    def conflict(self, start: int, end: int, kind: int) -> Row | None:
        """The first lock that another owner's lock of [start, end] would have to wait for."""
        rows = self.rows
        at = bisect_left(rows, (start,))
        if at and rows[at - 1][1] >= start:
            at -= 1
        while at < len(rows) and rows[at][0] <= end:
            if kind == WRITE or rows[at][2] == WRITE:
                return rows[at]
            at += 1
        return None

    def check(self) -> None:
        for row in self.rows:
            assert 0 <= row[0] <= row[1] <= END, row
        for one, two in zip(self.rows, self.rows[1:], strict=False):
            assert one[1] < two[0], (one, two)
            assert one[1] + 1 < two[0] or one[2] != two[2], (one, two)


class Waiter(msgspec.Struct, frozen=True, eq=False, gc=False):
    """A lock that its owner waits for. `number` is the operation's number at its member."""

    owner: Owner
    number: int
    start: int
    end: int
    kind: int
    pid: int


class RangeTable:
    """The locks of all owners that are known here, and who waits."""

    __slots__ = ("count", "owners", "waiters")

    def __init__(self) -> None:
        self.owners: dict[Owner, Ranges] = {}
        self.waiters: list[Waiter] = []
        self.count = 0
        """Ranges in all."""

    @property
    def empty(self) -> bool:
        return not (self.owners or self.waiters)

    def conflict(self, owner: Owner, start: int, end: int, kind: int) -> tuple[Owner, Row] | None:
        """The first byte range that stands in the way of a lock, and whose it is."""
        found: tuple[Owner, Row] | None = None
        for other, ranges in self.owners.items():
            if other == owner:
                continue
            row = ranges.conflict(start, end, kind)
            if row is not None and (found is None or row < found[1]):
                found = (other, row)
        return found

    def conflicting(self, owner: Owner, start: int, end: int, kind: int) -> Iterator[Owner]:
        """Everybody who stands in the way of a lock of an owner."""
        for other, ranges in self.owners.items():
            if other != owner and ranges.conflict(start, end, kind) is not None:
                yield other

    def free(self, owner: Owner, start: int, end: int, kind: int) -> bool:
        """Whether a lock could be granted now."""
        for other, ranges in self.owners.items():
            if other != owner and ranges.conflict(start, end, kind) is not None:
                return False
        return True

    def put(self, owner: Owner, start: int, end: int, kind: int, pid: int = 0) -> None:
        """Grant a lock; the caller has seen that it is free."""
        ranges = self.owners.get(owner)
        if ranges is None:
            ranges = self.owners[owner] = Ranges()
        before = len(ranges.rows)
        ranges.put(start, end, kind)
        ranges.pid = pid or ranges.pid
        self.count += len(ranges.rows) - before

    def remove(self, owner: Owner, start: int = 0, end: int = END) -> None:
        """Take a range of an owner back."""
        ranges = self.owners.get(owner)
        if ranges is None:
            return
        before = len(ranges.rows)
        ranges.remove(start, end)
        self.count += len(ranges.rows) - before
        if not ranges.rows:
            del self.owners[owner]

    def retry(self) -> list[Waiter]:
        """Grant those waiting who can have their locks now, the oldest first; they leave the
        queue. A grant may be a downgrade that lets others in, so it starts again."""
        granted: list[Waiter] = []
        index = 0
        while index < len(self.waiters):
            waiter = self.waiters[index]
            if self.free(waiter.owner, waiter.start, waiter.end, waiter.kind):
                del self.waiters[index]
                self.put(waiter.owner, waiter.start, waiter.end, waiter.kind, waiter.pid)
                granted.append(waiter)
                index = 0 if waiter.kind == READ else index
            else:
                index += 1
        return granted

    def withdraw(self, instance: Instance, number: int) -> Waiter | None:
        """Take a waiting lock out of the queue; None if it is not in it."""
        for index, waiter in enumerate(self.waiters):
            if waiter.number == number and waiter.owner.instance == instance:
                del self.waiters[index]
                return waiter
        return None

    def forget_waiters(self, instance: Instance) -> None:
        """A member waits for nothing any more."""
        self.waiters = [one for one in self.waiters if one.owner.instance != instance]

    def forget_owners(self, instance: Instance) -> None:
        """A member holds nothing any more."""
        for owner in [one for one in self.owners if one.instance == instance]:
            self.count -= len(self.owners.pop(owner).rows)

    def check(self) -> None:
        assert self.count == sum(len(ranges.rows) for ranges in self.owners.values())
        for owner, ranges in self.owners.items():
            assert ranges.rows, owner
            ranges.check()
            for start, end, kind in ranges.rows:
                assert self.free(owner, start, end, kind), (owner, start, end, kind)
        for waiter in self.waiters:
            assert not self.free(waiter.owner, waiter.start, waiter.end, waiter.kind), waiter
