"""The block I/O ring: batches of operations in, completions out through an eventfd.

io_uring by raw system calls where the kernel allows it, else a pool of C threads, behind one
interface; `CFS_RING_ENGINE=threads|io_uring` overrides the choice. Operations queued by `readv`,
`writev`, `fsync` and `fallocate` start with `submit`. They run at the same time in any order: an
fsync covers the writes that were *reaped* before it was submitted.

A read or write completes with all its bytes, with fewer only at the end of the file, or with
-errno. The ring keeps its buffers alive until the completion was reaped; the caller leaves their
bytes alone until then. Not for several threads at once; not across fork.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Any

from native._native import ffi, lib

Buffer = bytes | bytearray | memoryview

DEPTH_MAX = 4096
BUFFERS_MAX = 1024
"""Buffers in one operation."""
REAP_MAX = 256
STREAM = (1 << 64) - 1
"""The offset for pipes and sockets."""
ENGINES = ("auto", "io_uring", "threads")

_READ, _WRITE, _FSYNC, _FALLOCATE = range(4)


class RingFullError(Exception):
    """`depth` operations are queued or in flight."""


class Ring:
    """One ring; `depth` operations at most. A context manager: closing waits for what runs."""

    def __init__(self, depth: int = 128, *, engine: str | None = None, threads: int = 4) -> None:
        if not 0 < depth <= DEPTH_MAX:
            raise ValueError(f"depth must be in 1..{DEPTH_MAX}")
        chosen = engine or os.environ.get("CFS_RING_ENGINE") or "auto"
        error = ffi.new("int *")
        self._ring = lib.native_ring_open(depth, ENGINES.index(chosen), threads, error)
        if not self._ring:
            raise OSError(error[0], f"the {chosen} engine: {os.strerror(error[0])}")
        self.depth = depth
        self.engine = ENGINES[lib.native_ring_kind(self._ring)]
        self._held: dict[int, Any] = {}  # tag -> its buffers
        self._tags = ffi.new("uint64_t[]", REAP_MAX)
        self._results = ffi.new("int64_t[]", REAP_MAX)
        self._event_fd = int(lib.native_ring_event_fd(self._ring))

    def fileno(self) -> int:
        """The eventfd: readable when `reap` has something to give."""
        return self._event_fd

    @property
    def in_flight(self) -> int:
        """Operations queued or submitted and not yet reaped."""
        return len(self._held)

    @property
    def room(self) -> int:
        return self.depth - len(self._held)

    def readv(self, tag: int, descriptor: int, offset: int, buffers: Sequence[Buffer]) -> None:
        """Queue a read into writable buffers. `tag` must not be in flight."""
        views = [ffi.from_buffer("char[]", part, require_writable=True) for part in buffers]
        self._add(_READ, tag, descriptor, offset, views, 0)

    def writev(
        self,
        tag: int,
        descriptor: int,
        offset: int,
        buffers: Sequence[Buffer],
        *,
        data_sync: bool = False,
    ) -> None:
        """Queue a write; with `data_sync` it is durable when it completes (RWF_DSYNC)."""
        views = [ffi.from_buffer("char[]", part) for part in buffers]
        self._add(_WRITE, tag, descriptor, offset, views, os.RWF_DSYNC if data_sync else 0)

    def fsync(self, tag: int, descriptor: int, *, data_only: bool = True) -> None:
        """Queue an fdatasync (or fsync)."""
        self._add_plain(_FSYNC, tag, descriptor, 0, 0, int(data_only))

    def fallocate(self, tag: int, descriptor: int, mode: int, offset: int, length: int) -> None:
        """Queue a fallocate(2)."""
        self._add_plain(_FALLOCATE, tag, descriptor, offset, length, mode)

    def submit(self) -> int:
        """Start everything that is queued; how many."""
        return int(lib.native_ring_submit(self._ring))

    def reap(self) -> list[tuple[int, int]]:
        """What completed since the last call, as (tag, bytes or -errno); never waits.

        At most `REAP_MAX`; if there is more the eventfd stays readable.
        """
        count = lib.native_ring_reap(self._ring, self._tags, self._results, REAP_MAX)
        result = list(zip(self._tags[0:count], self._results[0:count], strict=True))
        for tag, _ in result:
            del self._held[tag]
        return result

    def close(self) -> None:
        """Wait for what was submitted, then free the ring; idempotent."""
        if self._ring:
            ring, self._ring = self._ring, ffi.NULL
            lib.native_ring_close(ring)
            self._held.clear()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(
        self, op: int, tag: int, descriptor: int, offset: int, views: list[Any], flags: int
    ) -> None:
        if tag in self._held:
            raise ValueError(f"tag {tag} is in flight")
        if len(views) == 1:
            error = lib.native_ring_add_one(
                self._ring, op, tag, descriptor, offset, views[0], len(views[0]), flags
            )
        else:
            lengths = [len(view) for view in views]
            error = lib.native_ring_add(
                self._ring, op, tag, descriptor, offset, views, lengths, len(views), flags
            )
        self._note(error, tag, views)

    def _add_plain(
        self, op: int, tag: int, descriptor: int, offset: int, length: int, flags: int
    ) -> None:
        if tag in self._held:
            raise ValueError(f"tag {tag} is in flight")
        error = lib.native_ring_add_one(
            self._ring, op, tag, descriptor, offset, ffi.NULL, length, flags
        )
        self._note(error, tag, ())

    def _note(self, error: int, tag: int, views: Any) -> None:
        if error == errno.EBUSY:
            raise RingFullError(f"{self.depth} operations are in flight")
        if error:
            raise OSError(error, os.strerror(error))
        self._held[tag] = views
