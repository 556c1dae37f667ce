"""A block device over a local file or a local block device (loop, disk image).

For mkfs, fsck and tests on images. Requests run in the calling task by default: the page cache
answers faster than a hop through a thread. With `offload` every request goes to a worker thread,
so that a slow disk does not stop the event loop. With `direct` the page cache is bypassed
(O_DIRECT) through page-aligned bounce buffers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from cluster.device import Buffer, Read, Written
from cluster.errors import DeviceError

_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2
_ZERO_PIECE_BYTES = 1 << 20
SECTOR_BYTES = 512

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _device_bytes(descriptor: int) -> int:
    """Size of a file or block device, rounded down to whole sectors."""
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        size = os.lseek(descriptor, 0, os.SEEK_END)
    else:
        size = os.fstat(descriptor).st_size
    return size - size % SECTOR_BYTES


class FileDevice:
    """A `BlockDevice` over one file descriptor. Close it with `close` (or use it in `with`)."""

    def __init__(
        self,
        path: str,
        *,
        create_bytes: int | None = None,
        read_only: bool = False,
        direct: bool = False,
        offload: bool = False,
    ) -> None:
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        if create_bytes is not None:
            flags |= os.O_CREAT
        if direct:
            flags |= os.O_DIRECT
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise DeviceError(f"cannot open {path}: {error.strerror}") from error
        if create_bytes is not None and os.fstat(self._descriptor).st_size < create_bytes:
            os.ftruncate(self._descriptor, create_bytes)
        self.path = path
        self._direct = direct
        self._offload = offload
        self._has_lost = False
        self._size_bytes = _device_bytes(self._descriptor)
        self._drop_refused()  # in an earlier life: whoever was told may be dead

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileDevice:
        return self

    def __exit__(self, *_details: object) -> None:
        self.close()

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        assert offset_bytes % SECTOR_BYTES == 0, f"offset {offset_bytes} is not aligned"
        assert length_bytes % SECTOR_BYTES == 0, f"length {length_bytes} is not aligned"
        assert offset_bytes >= 0, "negative offset"
        assert offset_bytes + length_bytes <= self._size_bytes, "beyond the end of the device"

    def _make_durable(self) -> None:
        """Fails for ever once it has failed: whose writes were lost the kernel does not say, and it
        says so only once."""
        if self._has_lost:
            raise OSError(errno.EIO, "an earlier flush has failed, and what it lost is not known")
        try:
            os.fdatasync(self._descriptor)
        except OSError:
            self._has_lost = True
            self._drop_refused()
            raise

    def _drop_refused(self) -> None:
        """The kernel keeps what the disk has refused as if it was written: it would be read until
        memory runs short, and a replay would take it for the block that is in place."""
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            if self._offload:
                return await trio.to_thread.run_sync(work)
            return work()
        except OSError as error:
            raise self._failure(error) from error

    def _read_now(self, offset_bytes: int, length_bytes: int) -> bytes:
        if not self._direct:
            data = os.pread(self._descriptor, length_bytes, offset_bytes)
            while len(data) < length_bytes:
                more = os.pread(
                    self._descriptor, length_bytes - len(data), offset_bytes + len(data)
                )
                if not more:
                    raise DeviceError(
                        f"{self.path}: ends before byte {offset_bytes + length_bytes}"
                    )
                data += more
            return data
        if length_bytes == 0:
            return b""
        with mmap.mmap(-1, length_bytes) as bounce, memoryview(bounce) as view:
            done = 0
            while done < length_bytes:
                with view[done:] as rest:
                    count = os.preadv(self._descriptor, [rest], offset_bytes + done)
                if count == 0:
                    raise DeviceError(
                        f"{self.path}: ends before byte {offset_bytes + length_bytes}"
                    )
                done += count
            return bytes(view)

    def _write_now(self, offset_bytes: int, data: Buffer, fua: bool) -> None:
        view = memoryview(data).cast("B")
        if self._direct and len(view):
            with mmap.mmap(-1, len(view)) as bounce:
                bounce[:] = view
                with memoryview(bounce) as aligned:
                    self._write_all(offset_bytes, aligned)
        else:
            self._write_all(offset_bytes, view)
        if fua:
            self._make_durable()

    def _write_all(self, offset_bytes: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            with view[done:] as rest:
                done += os.pwrite(self._descriptor, rest, offset_bytes + done)

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        self._check(offset_bytes, length_bytes)
        return await self._run(lambda: self._read_now(offset_bytes, length_bytes))

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        for offset, length in ranges:
            self._check(offset, length)
        return await self._run(
            lambda: [self._read_now(offset, length) for offset, length in ranges]
        )

    def can_start(self) -> bool:
        return not self._offload

    def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None:
        self._check(offset_bytes, length_bytes)
        try:
            data = self._read_now(offset_bytes, length_bytes)
        except (OSError, DeviceError) as error:
            done(self._failure(error), [])
        else:
            done(None, [data])

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        for offset, data in parts:
            self._check(offset, memoryview(data).nbytes)
        try:
            for offset, data in parts:
                self._write_now(offset, data, False)
        except OSError as error:
            done(self._failure(error))
        else:
            done(None)

    def _failure(self, error: OSError | DeviceError) -> DeviceError:
        if isinstance(error, DeviceError):
            return error
        return DeviceError(f"{self.path}: {error.strerror}")

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await self.write_many([(offset_bytes, data)], fua=fua)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        for offset, data in parts:
            self._check(offset, memoryview(data).nbytes)

        def work() -> None:
            for offset, data in parts:
                self._write_now(offset, data, False)
            if fua:
                self._make_durable()

        await self._run(work)

    async def flush(self) -> None:
        await self._run(self._make_durable)

    def _punch(self, offset_bytes: int, length_bytes: int) -> bool:
        """Deallocate a range; it then reads as zeroes. False where that is not supported."""
        mode = _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE
        return bool(_libc.fallocate(self._descriptor, mode, offset_bytes, length_bytes) == 0)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._check(offset_bytes, length_bytes)
        with contextlib.suppress(DeviceError):
            await self._run(lambda: self._punch(offset_bytes, length_bytes))

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        self._check(offset_bytes, length_bytes)

        def work() -> None:
            if length_bytes == 0 or self._punch(offset_bytes, length_bytes):
                return
            zeroes = bytes(min(_ZERO_PIECE_BYTES, length_bytes))
            for start in range(0, length_bytes, len(zeroes)):
                size = min(len(zeroes), length_bytes - start)
                self._write_now(offset_bytes + start, memoryview(zeroes)[:size], False)

        await self._run(work)
