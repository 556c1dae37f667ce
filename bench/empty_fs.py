"""An empty pyfuse3 file system: the limit that Python sets. `python -m bench.empty_fs DIR`.

It has one file `f` of 1 GiB that reads as zeroes and swallows writes. It lets anything be created,
renamed and removed, and remembers nothing: what the kernel has cached is all there is.
"""

from __future__ import annotations

import errno
import stat
import sys

import pyfuse3
import trio
from pyfuse3 import ROOT_INODE, EntryAttributes, FileInfo, FUSEError

FILE_INODE = 2
FILE_BYTES = 1 << 30
ZEROES = bytes(1 << 20)


class EmptyOperations(pyfuse3.Operations):
    """Nothing but the request loop."""

    def __init__(self):
        super().__init__()
        self._last = FILE_INODE

    def _attributes(self, inode):
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == ROOT_INODE else stat.S_IFREG | 0o644
        entry.st_size = FILE_BYTES if inode == FILE_INODE else 0
        entry.attr_timeout = entry.entry_timeout = 3600
        return entry

    async def getattr(self, inode, ctx=None):
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        return self._attributes(inode)

    async def lookup(self, parent, name, ctx=None):
        if name != b"f":
            raise FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def create(self, parent, name, mode, flags, ctx):
        self._last += 1
        return FileInfo(fh=self._last, keep_cache=True), self._attributes(self._last)

    async def unlink(self, parent, name, ctx):
        """Nothing to do."""

    async def rename(self, parent_old, name_old, parent_new, name_new, flags, ctx):
        """Nothing to do."""

    async def release(self, fh):
        """Nothing to do."""

    async def flush(self, fh):
        raise FUSEError(errno.ENOSYS)

    async def open(self, inode, flags, ctx):
        return FileInfo(fh=inode, keep_cache=True)

    async def read(self, fh, offset, size):
        return ZEROES[:size]

    async def write(self, fh, offset, data):
        return len(data)

    async def fsync(self, fh, datasync):
        """Nothing to do."""


def main() -> None:
    options = set(pyfuse3.default_options) | {"fsname=empty"}
    pyfuse3.init(EmptyOperations(), sys.argv[1], options)
    print("mounted", flush=True)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
