"""`gnbdctl scrub`: all of a disk is read at a bounded rate and compared with its sums.

It reads past the page cache where that is possible: a copy in memory says nothing about the disk.
"""

from __future__ import annotations

import mmap
import os
import threading
import time

import structlog

from gnbd import messages as m
from gnbd.server.backends_io import FileBackend
from gnbd.server.filters.bucket import SECOND_NS, Bucket
from gnbd.server.integrity_io import Integrity
from native.integrity import BLOCK_BYTES

PIECE_BYTES = 1 << 20
ADDRESSES_MAX = 256
log = structlog.get_logger("gnbd")


class Scrub:
    """One run over one disk; what it has found stays until the next one."""

    def __init__(
        self, name: str, integrity: Integrity, disk: FileBackend, rate_bytes_s: int
    ) -> None:
        self._area = integrity.area
        self._disk = disk
        self._ended = threading.Event()
        self._report = m.ScrubReport(
            export=name, state="running", rate_bytes_s=rate_bytes_s,
            size_bytes=min(integrity.size_bytes, disk.size_bytes),
        )  # fmt: skip
        self._begin_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"scrub {name}")
        self._thread.start()

    def report(self) -> m.ScrubReport:
        """How far it is."""
        return self._report

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Returns when it has ended."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        descriptor = _past_the_cache(self._disk)
        try:
            with mmap.mmap(-1, PIECE_BYTES) as memory, memoryview(memory) as view:
                self._read_all(descriptor, view)
        finally:
            if descriptor != self._disk.fd:
                os.close(descriptor)
        report = self._report
        state = "stopped" if report.checked_bytes < report.size_bytes else "done"
        self._add(state=state)
        level = log.error if report.mismatches or report.unreadable else log.info
        level("scrub ended", export=report.export, state=state, mismatches=report.mismatches,
              unreadable=report.unreadable)  # fmt: skip

    def _read_all(self, descriptor: int, view: memoryview) -> None:
        report = self._report
        rate = report.rate_bytes_s
        bucket = Bucket(rate, PIECE_BYTES, time.monotonic_ns()) if rate else None
        at = 0
        while at < report.size_bytes and not self._ended.is_set():
            length = min(PIECE_BYTES, report.size_bytes - at)
            if length > BLOCK_BYTES:
                length -= length % BLOCK_BYTES
            # What O_DIRECT may refuse is the end of a disk that ends within a block.
            source = descriptor if length % BLOCK_BYTES == 0 else self._disk.fd
            self._check(source, at, view[:length])
            at += length
            if bucket is not None:
                bucket.take(time.monotonic_ns(), length)
                self._ended.wait(bucket.owed_ns(time.monotonic_ns()) / SECOND_NS)

    def _check(self, descriptor: int, offset: int, view: memoryview) -> None:
        found = self._area.check(descriptor, offset, view)
        before = self._report
        room = ADDRESSES_MAX - len(before.addresses)
        self._add(
            checked_bytes=offset + len(view),
            mismatches=before.mismatches + found.bad_count,
            addresses=before.addresses + found.bad[:room],
            unreadable=before.unreadable + found.unreadable,
            skipped=before.skipped + found.skipped,
        )

    def _add(self, **changes: object) -> None:
        seconds = round(time.monotonic() - self._begin_s, 3)
        plain = {name: getattr(self._report, name) for name in self._report.__struct_fields__}
        self._report = m.ScrubReport(**(plain | {"seconds": seconds} | changes))


def _past_the_cache(disk: FileBackend) -> int:
    """A descriptor that reads the disk itself; else the disk's own."""
    try:
        fd = disk.reopen(os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return disk.fd
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as memory, memoryview(memory) as view:
            os.preadv(fd, [view], 0)
    except OSError:
        os.close(fd)
        return disk.fd
    return fd
