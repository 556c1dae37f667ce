"""The integrity area of an export in C: what every read is checked against.

Every call may block and raises OSError; `ChecksumError`: a block is not what was written there.
None takes the GIL while it works. Layout of the file, and why a sum that is believed is right:
native/src/integrity.h and native/src/nbd_integrity.c.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from native._native import ffi, lib

BLOCK_BYTES = 4096
REGION_BYTES = 4 << 20
BITS_AT = 8192
BITS_BYTES = 2 << 20
SUMS_AT = BITS_AT + BITS_BYTES
SIZE_BYTES_MAX = BITS_BYTES * 8 * REGION_BYTES
BAD_MAX = 64
_DONE, _FAILED, _NOTHING = range(3)
_NO_REGION = (1 << 64) - 1


class ChecksumError(OSError):
    """Not what was written. `offset`: the address of the block in bytes."""

    def __init__(self, offset: int) -> None:
        super().__init__(errno.EIO, f"checksum mismatch in the block at {offset}")
        self.offset = offset


class Checked(NamedTuple):
    """What `check` has found."""

    bad: list[int]
    bad_count: int
    unreadable: int
    skipped: int


class Change:
    """One change of the data under way."""

    done = True
    """Set it to False if nothing was changed after all."""


class Area:
    """The area in the file `descriptor`, for a disk of `size_bytes`."""

    def __init__(self, descriptor: int, size_bytes: int, event_descriptor: int = -1) -> None:
        """`event_descriptor`: an eventfd to write to at each mismatch. The caller owns both."""
        self._lock = threading.Lock()
        error = ffi.new("int *")
        self._area = lib.native_integrity_open(descriptor, size_bytes, event_descriptor, error)
        if not self._area:
            raise OSError(error[0], os.strerror(error[0]))

    @property
    def raw(self) -> Any:
        """For `native.nbd.Export.protect`."""
        return self._area

    def free(self) -> None:
        """Nobody reads or writes through it any more; `counters` may still be called."""
        with self._lock:
            area, self._area = self._area, ffi.NULL
            lib.native_integrity_free(area)

    def read(self, descriptor: int, offset: int, view: memoryview) -> None:
        """Fill `view` from the disk `descriptor`, checked."""
        bad = ffi.new("uint64_t *")
        data = ffi.from_buffer("uint8_t[]", view, require_writable=True)
        _check(
            lib.native_integrity_read(
                self._area, descriptor, data, len(view), offset, ffi.NULL, bad
            ),
            bad,
        )

    def write(self, descriptor: int, offset: int, view: memoryview, flags: int = 0) -> None:
        """Write all of `view`, and its sums."""
        bad = ffi.new("uint64_t *")
        data = ffi.from_buffer("uint8_t[]", view)
        _check(
            lib.native_integrity_write(
                self._area, descriptor, data, ffi.NULL, len(view), offset, flags, bad
            ),
            bad,
        )

    @contextmanager
    def zeroing(self, descriptor: int, offset: int, length: int) -> Iterator[Change]:
        """Around what makes zeroes of a range."""
        bad, change = ffi.new("uint64_t *"), Change()
        raw = ffi.new("struct native_integrity_change *")
        _check(
            lib.native_integrity_begin(
                self._area, descriptor, raw, ffi.NULL, ffi.NULL, length, offset, bad
            ),
            bad,
        )
        outcome = _FAILED
        try:
            yield change
            outcome = _DONE if change.done else _NOTHING
        finally:
            error = lib.native_integrity_end(self._area, descriptor, raw, outcome)
        _check(error, bad)

    def is_zero(self, offset: int, length: int) -> bool:
        """Whether every sum of these whole blocks is that of zeroes."""
        return bool(lib.native_integrity_zeroes(self._area, offset, length))

    def settle(self, descriptor: int, region: int) -> tuple[int, int] | None:
        """Give one region from `region` on whose sums are not believed those of what is there.
        Which one it was, and 0 or why it could not be; None: there is none."""
        error = ffi.new("int *")
        found = int(lib.native_integrity_settle(self._area, descriptor, region, error))
        return None if found == _NO_REGION else (found, int(error[0]))

    def pick(self, *, every: bool = False) -> int:
        """Regions that have rested since the last call (or every one) may become clean once data
        and sums are durable; how many. `clear` ends it."""
        return int(lib.native_integrity_pick(self._area, every))

    def clear(self, *, durable: bool) -> None:
        """What was picked is clean, if all of it is durable now."""
        _check(lib.native_integrity_clear(self._area, durable), None)

    def check(self, descriptor: int, offset: int, memory: memoryview) -> Checked:
        """Check as many bytes as `memory` (aligned to pages) has, whole blocks."""
        bad, unreadable, skipped = (
            ffi.new("uint64_t[]", BAD_MAX), ffi.new("uint64_t *"), ffi.new("uint64_t *")
        )  # fmt: skip
        data = ffi.from_buffer("uint8_t[]", memory, require_writable=True)
        count = int(
            lib.native_integrity_check(
                self._area, descriptor, data, len(memory), offset, bad, BAD_MAX, unreadable, skipped
            )
        )
        return Checked(list(bad[0 : min(count, BAD_MAX)]), count, unreadable[0], skipped[0])

    def grow(self, descriptor: int, size_bytes: int) -> None:
        """The disk is longer; the file of the area is, too."""
        _check(lib.native_integrity_grow(self._area, descriptor, size_bytes), None)

    def doubt(self, *, every: bool) -> None:
        """Believe no sum of a region in flux before it is settled. `every`: none at all; others may
        change data without this area from now on, its file is gone, and nobody may `settle`."""
        lib.native_integrity_doubt(self._area, every)

    def counters(self) -> dict[str, int]:
        """Mismatches in this life; regions in flux and not settled, now."""
        out = ffi.new("uint64_t[3]")
        with self._lock:
            if self._area:
                lib.native_integrity_counters(self._area, out)
        return dict(zip(("mismatches", "flux_regions", "unsettled_regions"), out, strict=True))

    def take_bad(self) -> list[int]:
        """Addresses of mismatches since the last call, at most `BAD_MAX`."""
        out = ffi.new("uint64_t[]", BAD_MAX)
        return list(out[0 : lib.native_integrity_take_bad(self._area, out)])


def _check(error: int, bad: Any) -> None:
    if error == errno.EBADMSG:
        assert bad is not None
        raise ChecksumError(int(bad[0]))
    if error:
        raise OSError(error, os.strerror(error))
