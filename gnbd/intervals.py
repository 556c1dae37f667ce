"""A set of bytes as sorted, disjoint, non-touching intervals [start, end)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class IntervalSet:
    """Add, remove and look up ranges; all by binary search."""

    __slots__ = ("_ends", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def add(self, start: int, end: int) -> None:
        """Put [start, end) in."""
        if start >= end:
            return
        low = bisect_left(self._ends, start)
        high = bisect_right(self._starts, end)
        if low < high:
            start = min(start, self._starts[low])
            end = max(end, self._ends[high - 1])
        self._starts[low:high] = [start]
        self._ends[low:high] = [end]

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out."""
        if start >= end:
            return
        low = bisect_right(self._ends, start)
        high = bisect_left(self._starts, end)
        if low >= high:
            return
        pieces = []
        if self._starts[low] < start:
            pieces.append((self._starts[low], start))
        if self._ends[high - 1] > end:
            pieces.append((end, self._ends[high - 1]))
        self._starts[low:high] = [piece[0] for piece in pieces]
        self._ends[low:high] = [piece[1] for piece in pieces]

    def pieces(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """Cut [start, end) into (start, end, inside the set)."""
        result = []
        index = bisect_right(self._ends, start)
        while start < end:
            if index >= len(self._starts) or self._starts[index] >= end:
                result.append((start, end, False))
                break
            inner = self._starts[index]
            if inner > start:
                result.append((start, inner, False))
                start = inner
            stop = min(end, self._ends[index])
            result.append((start, stop, True))
            start = stop
            index += 1
        return result

    def total(self) -> int:
        """How many bytes are in the set."""
        return sum(self._ends) - sum(self._starts)

    def check(self) -> None:
        previous = -1
        for start, end in self:
            assert previous < start < end
            previous = end
