"""Requests of a volume that were started on several legs, and end one by one. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.device import Buffer, Read, Written
from cluster.errors import BarredError
from cvm.layout import ReadPlan


def worst(errors: Sequence[Exception]) -> Exception:
    """Which of several errors counts."""
    return next((one for one in errors if isinstance(one, BarredError)), errors[0])


class GatheredRead:
    """A read of one range in `runs`: (leg number, run number on it, run)."""

    __slots__ = ("_done", "_errors", "_found", "_left", "_slices", "runs")

    def __init__(self, plan: ReadPlan, done: Read) -> None:
        (self._slices,) = plan.slices
        self._done = done
        self._errors: list[Exception] = []
        self._found: dict[tuple[int, int], memoryview] = {}
        self.runs = [(leg, at, run) for leg in plan.runs for at, run in enumerate(plan.runs[leg])]
        self._left = len(self.runs)

    def taker(self, number: int, index: int) -> Read:
        """What takes the bytes of a run of a leg."""

        def took(error: Exception | None, pieces: list[Buffer]) -> None:
            if error is not None:
                self._errors.append(error)
            else:
                whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                self._found[number, index] = memoryview(whole)
            self._left -= 1
            if not self._left:
                self._end()

        return took

    def _end(self) -> None:
        if self._errors:
            self._done(worst(self._errors), [])
            return
        found = self._found
        pieces: list[Buffer] = []
        for leg, index, start, size in self._slices:
            pieces.append(found[leg, index][start : start + size])
        self._done(None, pieces)


class GatheredWrite:
    """A write to so many legs."""

    __slots__ = ("_done", "_errors", "_left")

    def __init__(self, left: int, done: Written) -> None:
        self._left = left
        self._done = done
        self._errors: list[Exception] = []

    def took(self, error: Exception | None) -> None:
        """One leg has ended."""
        if error is not None:
            self._errors.append(error)
        self._left -= 1
        if not self._left:
            self._done(worst(self._errors) if self._errors else None)
