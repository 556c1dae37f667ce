"""The purge of a mount's kernel caches (rules G3, G4), in threads of its own.

`Sweep.run` returns when the kernel holds nothing of the mount, or when its connection is gone. An
invalidation that stalls behind a locked page is gone around (`node.guard_detour`) if the mount has
lent its table of unanswered requests; without it the sweep waits. Threads that still hang then end
when their request is answered; what they use belongs to the sweep and goes with the last of them.
"""

from __future__ import annotations

import errno
import mmap
import os
import select
import threading
from collections.abc import Callable

from cfs.fuse.kernel_cache import EVERYTHING
from native.notify import SWEEP_SLOTS, InodeSweep, increment_epoch, invalidate_inode
from native.requests import RequestTable
from node.guard_detour import Detour, Piece, by_inode

THREADS = 4
STALL_S = 0.002


class Sweep:
    """One purge."""

    def __init__(self, fuse_fd: int, table_fd: int, requests: RequestTable | None = None) -> None:
        """Takes duplicates of the descriptors. `requests` without a table: after an abort nothing
        is locked any more."""
        self._fd = os.dup(fuse_fd)
        self._users = 1
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._requests = requests
        self._job: InodeSweep | None = None
        self._error = 0
        self._slots = 0
        self._running: set[int] = set()
        self._before: dict[int, int] = {}
        self._detours: dict[int, Detour] = {}
        self._threads: dict[int, tuple[Piece, int]] = {}
        size = os.fstat(table_fd).st_size // 8 * 8
        if size > 8:
            table = mmap.mmap(table_fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            used = min(int.from_bytes(table[:8], "little"), size // 8 - 1)
            if used:
                self._job = InodeSweep(self._fd, memoryview(table)[8 : 8 + 8 * used])

    def run(self) -> bool:
        """Purge. True if the connection is gone."""
        try:
            increment_epoch(self._fd)
            if self._job is None:
                return False
            for _ in range(THREADS):
                self._add_worker(self._job)
            while True:
                self._wake.wait(STALL_S if self._requests is not None else None)
                self._wake.clear()
                if self._error:
                    return True
                if self._is_over(self._job):
                    return False
                if self._requests is not None:
                    self._go_around(self._job, self._requests)
        finally:
            self._release()

    def _is_over(self, job: InodeSweep) -> bool:
        """Whether every inode is done, by its worker or by a detour."""
        with self._lock:
            running = list(self._running)
        if not running:
            return True
        if not job.exhausted:
            return False
        at = [job.at(slot) for slot in running]
        return all(inode in self._detours and self._detours[inode].covered for inode in at)

    # --- threads

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            last = self._users == 0
        if last:
            os.close(self._fd)

    def _start(self, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
            finally:
                self._wake.set()
                self._release()

        with self._lock:
            self._users += 1
        threading.Thread(target=run, daemon=True, name="sweep").start()

    def _add_worker(self, job: InodeSweep) -> None:
        slot = self._slots
        self._slots += 1
        self._running.add(slot)

        def work() -> None:
            error = job.run(slot)
            with self._lock:
                self._error = self._error or error
                self._running.discard(slot)

        self._start(work)

    def _start_piece(self, inode: int, piece: Piece) -> None:
        def work() -> None:
            identity = threading.get_native_id()
            with self._lock:
                self._threads[identity] = (piece, inode)
            for start, end in piece.spans:
                if piece.stopped:
                    break
                length = 0 if end >= EVERYTHING[1] else end - start
                error = invalidate_inode(self._fd, inode, start, length)
                if error not in (0, errno.ENOENT):
                    self._error = self._error or error
                piece.finished += 1
            with self._lock:
                del self._threads[identity]

        self._start(work)

    # --- stalls

    def _go_around(self, job: InodeSweep, requests: RequestTable) -> None:
        for slot in list(self._running):
            inode = job.at(slot)
            if inode and inode == self._before.get(slot) and inode not in self._detours:
                self._detours[inode] = Detour()
                if not job.exhausted and self._slots < SWEEP_SLOTS:
                    self._add_worker(job)  # in place of the one that hangs
            self._before[slot] = inode
        open_detours = {n: one for n, one in self._detours.items() if not one.covered}
        if not open_detours:
            return
        self._see_who_waits()
        # In this order: nobody can begin to wait for a request that is not in the rows.
        unread = select.poll()
        unread.register(self._fd, select.POLLIN)
        complete = not unread.poll(0) and requests.complete()
        rows = by_inode(requests.rows())
        for inode, detour in open_detours.items():
            for piece in detour.look(rows.get(inode, []), complete=complete):
                self._start_piece(inode, piece)

    def _see_who_waits(self) -> None:
        with self._lock:
            threads = list(self._threads.items())
        for identity, (piece, _inode) in threads:
            piece.waiting = piece.waiting + 1 if _sleeps(identity) else 0


def _sleeps(thread_id: int) -> bool:
    """Whether a thread of this process sleeps uninterruptibly in the kernel."""
    try:
        with open(f"/proc/self/task/{thread_id}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()[0] == b"D"
    except OSError:
        return False
