"""Errors of requests for people, and how long a request may wait."""

from __future__ import annotations

from collections import deque

from cluster.errors import DeviceError, UnreachableError
from gnbd import protocol as p

_NAMES = {
    p.CMD_READ: "read",
    p.CMD_WRITE: "write",
    p.CMD_FLUSH: "flush",
    p.CMD_TRIM: "discard",
    p.CMD_WRITE_ZEROES: "write of zeroes",
    p.CMD_SEQUENCE: "sequence",
    p.CMD_COMPARE_AND_WRITE: "compare and write",
}
_REASONS = {
    p.EPERM: "reservation conflict or read-only export",
    p.EIO: "I/O error of the store",
    p.ENOSPC: "no space left in the store, or past its end",
    p.EINVAL: "past the end of the export",
    p.ESTALE: "the volume map of this instance is too old",
    p.EMISCOMPARE: "something else is there",
}


class MiscompareError(DeviceError):
    """COMPARE AND WRITE has found something else and written nothing."""


class UnknownOutcomeError(UnreachableError):
    """The connection broke before the answer to a COMPARE AND WRITE came. It may have been
    executed; it will not be any more."""

    default_hint = "read what is there"


def failure(kind: int, offset: int, length: int, number: int) -> DeviceError:
    """What the store answered to a request."""
    name = _NAMES.get(kind, str(kind))
    reason = _REASONS.get(number, f"error {number}")
    found = MiscompareError if number == p.EMISCOMPARE else DeviceError
    return found(f"{name} of {length} bytes at {offset}: {reason}")


def given_up(reason: str) -> UnreachableError:
    """For requests that have waited too long, and those that come before the device works again."""
    return UnreachableError(
        reason,
        hint="what was being written may be on the disk or not, until a request succeeds again",
    )


class Patience:
    """Tells when a request has waited for longer than `limit_ns`, to an eighth, without a clock for
    each: it remembers how far requests had been numbered at each look."""

    def __init__(self, limit_ns: int) -> None:
        self._limit_ns = limit_ns
        self._marks: deque[tuple[int, int]] = deque()

    def look(self, now_ns: int, newest: int, oldest: int | None) -> bool:
        """`newest`: the highest number given so far; `oldest`: the lowest one still waiting."""
        if not self._marks or now_ns - self._marks[-1][0] >= self._limit_ns // 8:
            self._marks.append((now_ns, newest))
        while len(self._marks) > 1 and self._marks[1][0] <= now_ns - self._limit_ns:
            self._marks.popleft()
        began_ns, number = self._marks[0]
        return oldest is not None and oldest <= number and began_ns <= now_ns - self._limit_ns
