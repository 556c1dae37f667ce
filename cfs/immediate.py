"""Attempts that wait for nothing: the quick half of an operation that also has a waiting half.

An attempt is synchronous, so nothing comes between its look at the cached locks and what it does.
Where it would have to wait it raises `NotNow`, has changed nothing, and the caller takes the way
that waits. Most operations of a mount that is alone with its files end here, without a task.
"""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from cfs.errors import CorruptionError
from cfs.transaction import Missing, NotNow
from cluster.locks import Mode


class Holdable(Protocol):
    """An inode's state, or a lock."""

    def try_hold(self, mode: Mode) -> bool: ...

    def release(self, mode: Mode) -> None: ...


class Attempt:
    """The holds of one attempt, given back at its end. A block that is not here, or damaged, ends
    it with NotNow as well: the waiting way reads it, or reports it."""

    __slots__ = ("_taken",)

    def __init__(self) -> None:
        self._taken: list[tuple[Holdable, Mode]] = []

    def hold(self, lock: Holdable, mode: Mode) -> None:
        """Raises NotNow if that cannot be had at once."""
        if not lock.try_hold(mode):
            raise NotNow
        self._taken.append((lock, mode))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for lock, mode in self._taken:
            lock.release(mode)
        if isinstance(error, Missing | CorruptionError):
            raise NotNow from None
