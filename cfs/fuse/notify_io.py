"""Notifications to the kernel: encoded here, written by threads of their own.

A notification may block in the kernel until a request of the same inode is answered, so none is
ever written from the trio thread (one exception: the epoch, a single atomic increment). There are
at least `THREADS_MIN` threads; one that is stuck is replaced, up to `THREADS_MAX`.

| code | notification | body after the 16-byte header {u32 length, i32 code, u64 0} |
|---|---|---|
| 2 | INVAL_INODE | u64 inode, i64 offset (-1: attributes only), i64 length (0: to the end) |
| 8 | INC_EPOCH | nothing (Linux 6.16) |
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import struct
import threading
from collections.abc import Callable

import trio

from cfs.fuse.kernel_cache import EVERYTHING, Span

log = logging.getLogger(__name__)

THREADS_MIN = 8
THREADS_MAX = 1024

_HEADER = struct.Struct("<IiQ")
_INVAL_INODE = struct.Struct("<IiQQqq")
CODE_INVAL_INODE = 2
CODE_INC_EPOCH = 8

IGNORED = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENOTEMPTY})
"""The kernel does not know the inode or name (any more): there is nothing to drop."""
GONE = frozenset({errno.ENODEV, errno.ENOTCONN, errno.EBADF})
"""The connection is aborted: the kernel serves nothing from it any more."""


def encode_pages(inode: int, span: Span) -> bytes:
    """Drop the pages of `span` and the attributes."""
    start, end = span
    length = 0 if end >= EVERYTHING[1] else end - start
    return _INVAL_INODE.pack(_INVAL_INODE.size, CODE_INVAL_INODE, 0, inode, start, length)


def encode_attributes(inode: int) -> bytes:
    """Drop the attributes; never blocks on a request."""
    return _INVAL_INODE.pack(_INVAL_INODE.size, CODE_INVAL_INODE, 0, inode, -1, 0)


def encode_epoch() -> bytes:
    """Let the kernel look every name of the mount up again; never blocks."""
    return _HEADER.pack(_HEADER.size, CODE_INC_EPOCH, 0)


class Job:
    """Some notifications that one thread writes one after another."""

    __slots__ = ("_wake", "done", "messages", "missed", "thread_id")

    def __init__(self, messages: list[bytes], wake: Callable[[], None] | None) -> None:
        self.messages = messages
        self.done = False
        self.missed = False
        """The kernel did not know an inode."""
        self.thread_id = 0
        self._wake = wake

    def finish(self) -> None:
        """Runs in the trio thread."""
        self.done = True
        if self._wake is not None:
            self._wake()

    def stuck(self) -> bool:
        """Whether its thread sleeps uninterruptibly in the kernel: waits for a locked page."""
        if self.done or not self.thread_id:
            return False
        try:
            with open(f"/proc/self/task/{self.thread_id}/stat", "rb") as file:
                return file.read().rsplit(b")", 1)[1].split()[0] == b"D"
        except OSError:
            return False


class Notifier:
    """The threads, and what this kernel can do."""

    def __init__(self, descriptor: int, *, epoch: bool = True) -> None:
        """`descriptor` is the mounted /dev/fuse. `epoch` False does without what Linux 6.16 offers,
        so that the fallback runs."""
        self._descriptor = descriptor
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._threads = 0
        self._busy = 0
        self._lock = threading.Lock()
        self.has_epoch = epoch
        self._stopped = False
        self.sent = 0
        self.epochs = 0
        self.failures = 0

    def start(self) -> None:
        """Start the threads; call from inside trio, after the mount."""
        self._token = trio.lowlevel.current_trio_token()
        for _ in range(THREADS_MIN):
            self._spawn()

    def probe(self) -> None:
        """Find out what the kernel understands; it answers EINVAL to what it does not know."""
        self.has_epoch = self.has_epoch and self._try(encode_epoch())

    def stop(self) -> None:
        """The mount is gone, and what the kernel held of it: nothing more is to be dropped."""
        self._stopped = True
        for _ in range(self._threads):
            self._queue.put(None)

    def submit(self, messages: list[bytes], wake: Callable[[], None] | None = None) -> Job:
        """Have a thread write `messages`; `wake` is called in the trio thread afterwards."""
        assert self._token is not None
        job = Job(messages, wake)
        if self._stopped:
            job.finish()
            return job
        with self._lock:
            self._busy += 1
            short = self._busy > self._threads and self._threads < THREADS_MAX
        if short:
            self._spawn()
        self._queue.put(job)
        return job

    def bump_epoch(self) -> None:
        """All names of the mount are looked up again. The one notification that never blocks: it
        takes no lock in the kernel (measured while a CREATE was pending in the directory)."""
        assert self.has_epoch
        self.epochs += 1
        self._write(encode_epoch())

    def _spawn(self) -> None:
        with self._lock:
            self._threads += 1
        threading.Thread(target=self._run, name="invalidate", daemon=True).start()

    def _run(self) -> None:
        assert self._token is not None
        identity = threading.get_native_id()
        while (job := self._queue.get()) is not None:
            job.thread_id = identity
            for message in job.messages:
                if not self._write(message):
                    job.missed = True
            job.thread_id = 0
            with self._lock:
                self._busy -= 1
            try:
                self._token.run_sync_soon(job.finish)
            except trio.RunFinishedError:
                return

    def _try(self, message: bytes) -> bool:
        try:
            os.write(self._descriptor, message)
        except OSError as error:
            return error.errno in IGNORED
        return True

    def _write(self, message: bytes) -> bool:
        """False if the kernel did not know the inode."""
        self.sent += 1
        try:
            os.write(self._descriptor, message)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            if error.errno not in IGNORED and error.errno not in GONE:
                self.failures += 1
                log.error("notification %d failed: %s", message[4], error)
        return True
