"""The block I/O ring for trio: await an operation, or many at once.

A started operation is never abandoned: its buffers belong to the kernel until it ends, so waiting
for it cannot be cancelled (waiting for room in the ring can).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import trio

from native.ring import Buffer, Ring

Start = Callable[[int], None]


class AsyncRing:
    """A ring driven by one trio task; use `open_ring`."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self._room = trio.Semaphore(ring.depth)
        self._tag = 0
        self._serving = trio.CancelScope(shield=True)
        self._waiting: dict[int, Callable[[int], None]] = {}

    async def readv(self, descriptor: int, offset: int, buffers: Sequence[Buffer]) -> int:
        """Fill the buffers from `offset`; bytes read, fewer only at the end of the file."""
        ring = self.ring
        return (await self._run([lambda tag: ring.readv(tag, descriptor, offset, buffers)]))[0]

    async def writev(
        self, descriptor: int, offset: int, buffers: Sequence[Buffer], *, data_sync: bool = False
    ) -> int:
        """Write all the buffers from `offset`."""
        return (
            await self._run(
                [
                    lambda tag: self.ring.writev(
                        tag, descriptor, offset, buffers, data_sync=data_sync
                    )
                ]
            )
        )[0]

    async def read_many(self, descriptor: int, parts: Sequence[tuple[int, Buffer]]) -> list[int]:
        """Read into (offset, buffer) parts, all in flight at once; bytes of each."""
        return await self._run([self._reader(descriptor, *part) for part in parts])

    async def write_many(
        self, descriptor: int, parts: Sequence[tuple[int, Buffer]], *, data_sync: bool = False
    ) -> list[int]:
        """Write (offset, buffer) parts, all in flight at once; bytes of each."""
        return await self._run([self._writer(descriptor, *part, data_sync) for part in parts])

    async def fsync(self, descriptor: int, *, data_only: bool = True) -> None:
        """Make what completed before this call durable."""
        await self._run([lambda tag: self.ring.fsync(tag, descriptor, data_only=data_only)])

    async def fallocate(self, descriptor: int, mode: int, offset: int, length: int) -> None:
        await self._run([lambda tag: self.ring.fallocate(tag, descriptor, mode, offset, length)])

    async def serve(self) -> None:
        """Wake whoever's operation ended, until `stop`; a cancellation must not lose anybody."""
        with self._serving:
            while True:
                await trio.lowlevel.wait_readable(self.ring.fileno())
                self._collect()

    def stop(self) -> None:
        self._serving.cancel()

    def _reader(self, descriptor: int, offset: int, buffer: Buffer) -> Start:
        return lambda tag: self.ring.readv(tag, descriptor, offset, [buffer])

    def _writer(self, descriptor: int, offset: int, buffer: Buffer, data_sync: bool) -> Start:
        return lambda tag: self.ring.writev(tag, descriptor, offset, [buffer], data_sync=data_sync)

    def _collect(self) -> None:
        for tag, result in self.ring.reap():
            self._room.release()
            self._waiting.pop(tag)(result)

    async def _run(self, starts: Sequence[Start]) -> list[int]:
        """Start all, as far as there is room, and wait until the last one ended."""
        results = [0] * len(starts)
        left = 0
        task: trio.lowlevel.Task | None = None

        def ended(index: int, result: int) -> None:
            nonlocal left
            results[index] = result
            left -= 1
            if left == 0 and task is not None:
                trio.lowlevel.reschedule(task)

        try:
            for index, start in enumerate(starts):
                try:
                    self._room.acquire_nowait()
                except trio.WouldBlock:
                    self.ring.submit()
                    await self._room.acquire()
                self._tag += 1
                try:
                    start(self._tag)
                except BaseException:
                    self._room.release()
                    raise
                left += 1
                self._waiting[self._tag] = partial(ended, index)
        finally:
            self.ring.submit()
            if left:
                task = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(_never_abort)
        for result in results:
            if result < 0:
                raise OSError(-result, os.strerror(-result))
        return results


def _never_abort(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


@asynccontextmanager
async def open_ring(depth: int = 128, *, engine: str | None = None) -> AsyncIterator[AsyncRing]:
    """A ring and the task that drives it. Inside, no operation may be left running at the end."""
    with Ring(depth, engine=engine) as ring:
        result = AsyncRing(ring)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(result.serve)
            try:
                yield result
            finally:
                result.stop()
