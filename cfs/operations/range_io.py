"""Ranges of files, taken past libfuse: fallocate, lseek for data and holes, copy_file_range.

The kernel holds the inode (of a copy: the target) for itself while it asks, has written dirty pages
of the range back before, and drops the range from its cache after an answer that changes bytes. A
READ that was overtaken reads again (`KernelInode.note_write`).
"""

from __future__ import annotations

import os

from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.callers_io import CAP_FSETID, has_capability
from cfs.operations.data_io import DataOperations
from cfs.operations.extension_io import Extension
from cfs.range_calls import FALLOC_KEEP_SIZE
from native.requests import Opcode, Request

COPY_32_BYTES_MAX = (1 << 32) - (1 << 20)
"""What the answer to the older of the two requests can say."""


class RangeOperations(DataOperations):
    """fallocate, lseek, copy_file_range."""

    def range_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.FALLOCATE: Extension(self._fallocate),
            Opcode.LSEEK: Extension(self._lseek),
            Opcode.COPY_FILE_RANGE: Extension(self._copy),
            Opcode.COPY_FILE_RANGE_64: Extension(self._copy_64),
        }

    async def _fallocate(self, request: Request, body: bytes) -> bytes:
        number, offset, length, mode, _ = layout.FALLOCATE_IN.unpack_from(body)
        handle = self.handles[number]
        inode = handle.inode
        try:
            await self.fs.fallocate(
                inode.number, mode, offset, length,
                kill=not has_capability(request, CAP_FSETID),
                stopped=lambda: self.waits.is_killed(request),
            )  # fmt: skip
        except FsError:
            if mode & ~FALLOC_KEEP_SIZE:
                # A part may be zero by now, and the kernel drops nothing after an error.
                await self.caches.drop_all_pages(inode.number)
            raise
        await self.caches.attributes_settled(inode)
        if mode & ~FALLOC_KEEP_SIZE:
            inode.note_write(offset, offset + length)
        if handle.flags & os.O_DSYNC:
            await self.sync_written(handle)
        return b""

    async def _lseek(self, request: Request, body: bytes) -> bytes:
        number, offset, whence, _ = layout.LSEEK_IN.unpack_from(body)
        inode = self.handles[number].inode
        # A page of a mapping may be dirty without our knowledge, over blocks that were reserved.
        found = await self.fs.seek(
            inode.number, offset, data=whence == os.SEEK_DATA, unwritten_is_data=inode.writers > 0
        )
        return layout.LSEEK_OUT.pack(found)

    async def _copy(self, request: Request, body: bytes) -> bytes:
        done = await self._copy_range(body, COPY_32_BYTES_MAX, request)
        return layout.COPY_OUT.pack(done, 0)

    async def _copy_64(self, request: Request, body: bytes) -> bytes:
        return layout.COPY_64_OUT.pack(await self._copy_range(body, 1 << 62, request))

    async def _copy_range(self, body: bytes, most: int, request: Request) -> int:
        source, offset, _, target, to, length, _ = layout.COPY_IN.unpack_from(body)
        handle = self.handles[target]
        try:
            done = await self.fs.copy_range(
                self.handles[source].inode.number, offset, handle.inode.number, to,
                min(length, most), kill=not has_capability(request, CAP_FSETID),
            )  # fmt: skip
        except FsError:
            await self.caches.drop_all_pages(handle.inode.number)  # as after a part of a punch
            raise
        await self.caches.attributes_settled(handle.inode)
        handle.inode.note_write(to, to + done)
        if handle.flags & os.O_DSYNC:
            await self.sync_written(handle)
        return done
