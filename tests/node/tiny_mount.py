"""A mount of one file under guard, as small as can be: run as a process of its own by the tests.

usage: tiny_mount.py MOUNTPOINT REPORT    (CFS_RUN_DIR names the node)
The file `data` holds 64 KiB; its pages stay in the kernel's cache. Each read that reaches this
process adds a byte to REPORT. The files `slow1` and `slow2` are like it, but writes, and reads at
and above SLOW_FROM, wait until a SIGUSR1 comes. From a SIGUSR2 on an answer is under way for ever.
"""

import errno
import os
import signal
import stat
import sys
from pathlib import Path

import trio

from cfs.fuse.pyfuse3_io import fuse, pyfuse3
from cfs.mount.guard_client_io import SharedInodeTable, attach
from cfs.mount.system_io import mounted_minor
from cluster.control_io import open_session
from cluster.ids import Instance

INODES = {b"data": 2, b"slow1": 3, b"slow2": 4}
CONTENT = b"x" * 65536
SLOW_FROM = 32768


def attributes(inode):
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.st_mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
    entry.st_size = 0 if inode == 1 else len(CONTENT)
    entry.st_nlink = 1
    entry.attr_timeout = entry.entry_timeout = 3600
    return entry


class Tiny(pyfuse3.Operations):
    def __init__(self, report):
        super().__init__()
        self.report = report
        self.gate = None
        self.released = trio.Event()

    async def lookup(self, _parent, name, _context):
        if name not in INODES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return attributes(INODES[name])

    async def getattr(self, inode, _context):
        return attributes(inode)

    async def open(self, inode, _flags, _context):
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    async def read(self, handle, offset, size):
        with self.report.open("ab") as file:
            file.write(b"r")
        if handle != INODES[b"data"] and offset + size > SLOW_FROM:
            await self.released.wait()
        return CONTENT[offset : offset + size]

    async def write(self, _handle, _offset, data):
        await self.released.wait()
        return len(data)


async def main(mountpoint, report):
    operations = Tiny(Path(report))
    fuse.configure(fuse.Settings())
    pyfuse3.init(operations, mountpoint, {"fsname=tiny"} | set(pyfuse3.default_options))
    minor = mounted_minor(mountpoint)
    async with open_session(None, {}, lambda *_event: None) as session:
        granted = await session.call("instance.register", {"kind": "mount", "title": mountpoint})
        table = SharedInodeTable()
        for inode in (1, *INODES.values()):
            table.add(inode)
        guarded = await attach(
            granted["guard_socket"], Instance(*granted["instance"]), minor, mountpoint,
            (fuse.session_fd(), table.descriptor, fuse.requests_fd()),
        )  # fmt: skip
        operations.gate = guarded.gate
        fuse.set_gate(guarded.gate)

        async def stamp():
            while True:
                guarded.gate.stamp()
                fuse.gate_flush()
                await trio.sleep(0.02)

        async def release():
            with trio.open_signal_receiver(signal.SIGUSR1, signal.SIGUSR2) as signals:
                print("ready", minor, flush=True)
                async for number in signals:
                    if number == signal.SIGUSR2:
                        print("under way", guarded.gate.enter(), flush=True)
                    else:
                        operations.released.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stamp)
            nursery.start_soon(release)
            await pyfuse3.main()
            nursery.cancel_scope.cancel()
        fuse.set_gate(None)
        await guarded.detach()
        await session.call("instance.leave")
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    os.chdir("/")
    trio.run(main, sys.argv[1], sys.argv[2])
