"""The upkeep of an integrity area: a thread per export that has one.

It computes the sums that are not believed yet (of a disk that is being converted or has grown, of
regions that were in flux when the server died or the disk refused sums), says which blocks were
found to be wrong, and lets regions that are no longer written to become clean.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

import structlog

from gnbd.server.damages_io import Damages
from gnbd.server.filters.bucket import SECOND_NS, Bucket
from gnbd.server.integrity_io import Integrity
from native.integrity import REGION_BYTES

CLEAR_S = 5.0
"""A region becomes clean when nothing was written to it for one to two times as long."""
SETTLE_BYTES_S = 256 << 20
SAID_MAX = 1024
log = structlog.get_logger("gnbd")


class Keeper:
    """Runs until `stop`."""

    def __init__(
        self,
        name: str,
        integrity: Integrity,
        descriptor: int,
        damages: Damages,
        flush: Callable[[], None],
    ) -> None:
        """`descriptor`: of the disk; `flush` makes its data durable, or raises OSError."""
        self._name = name
        self._integrity = integrity
        self._area = integrity.area
        self._descriptor = descriptor
        self._damages = damages
        self._flush = flush
        self._ended = threading.Event()
        self._said: set[int] = set()
        self._region: int | None = 0
        self._failed = False
        self._bucket = Bucket(SETTLE_BYTES_S, REGION_BYTES, time.monotonic_ns())
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"keeper {name}")
        self._thread.start()

    def stop(self) -> None:
        """Returns when it has ended."""
        self._ended.set()
        os.eventfd_write(self._integrity.events, 1)
        self._thread.join()

    def wake(self) -> None:
        """There may be something to settle."""
        self._region = 0
        os.eventfd_write(self._integrity.events, 1)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._integrity.events, select.POLLIN)
        clear_s = time.monotonic() + CLEAR_S
        while not self._ended.is_set():
            if self._region is not None:
                wait_s = min(self._bucket.owed_ns(time.monotonic_ns()) / SECOND_NS, 0.1)
            else:
                wait_s = max(0.0, clear_s - time.monotonic())
            if poll.poll(wait_s * 1000):
                os.eventfd_read(self._integrity.events)
                self._say_what_is_wrong()
            if self._region is not None:
                self._settle()
            if time.monotonic() >= clear_s:
                self._clear()
                clear_s = time.monotonic() + CLEAR_S
                self._said.clear()
                if self._failed:
                    self._region, self._failed = 0, False

    def _say_what_is_wrong(self) -> None:
        """Each block once in a while: a client may read it again and again."""
        for offset in self._area.take_bad():
            if offset not in self._said and len(self._said) < SAID_MAX:
                self._said.add(offset)
                self._damages.add(self._name, offset)
                log.error("checksum mismatch", export=self._name, offset=offset)

    def _settle(self) -> None:
        """One region at a time, so that clients get between."""
        region = self._region
        if region is None or self._bucket.owed_ns(time.monotonic_ns()):
            return
        found = self._area.settle(self._descriptor, region)
        if found is None:
            self._region = None
            if not self._failed:
                log.info("sums are complete", export=self._name)
            return
        number, error = found
        self._region = number + 1
        self._bucket.take(time.monotonic_ns(), REGION_BYTES)
        if error and not self._failed:
            self._failed = True
            log.error("cannot compute sums", export=self._name, offset=number * REGION_BYTES,
                      error=os.strerror(error))  # fmt: skip

    def _clear(self) -> None:
        if not self._area.pick():
            return
        durable = False
        try:
            self._flush()
            self._integrity.sync()
            durable = True
        except OSError as error:
            log.error("sums stay in flux", export=self._name, error=str(error))
            if self._area.counters()["unsettled_regions"]:
                self._region = 0
        try:
            self._area.clear(durable=durable)
        except OSError as error:
            log.error("sums stay in flux", export=self._name, error=str(error))
