"""A small file system in RAM on pyfuse3 and native.fuse; driven by JSON lines on stdin.

Run as `python tiny_fs.py MOUNTPOINT OPTIONS-JSON`. Commands {"do": name, ...} are
answered by one line each. Regular files and one directory only; files whose name begins with d
bypass the page cache.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
import sys
import time
from collections import Counter, deque

import trio

from native import fuse, fuse_io, notify
from native.gate import Gate
from native.requests import Opcode

# isort: split
import pyfuse3  # only after native.fuse

from cfs.mount.reader_io import take_turns

FOREVER_S = 1e6


class TinyFs(pyfuse3.Operations):
    enable_writeback_cache = True  # must be turned off below

    def __init__(self):
        super().__init__()
        self.names = {}
        self.data = {}
        self.log = deque(maxlen=4000)
        self.counts = Counter()
        self.mismatches = 0
        self.held = set()
        self.opened = trio.Event()
        self.interrupts = fuse_io.Interrupts()
        self.eintr = 0

    async def begin(self, name, handle=None, offset=None):
        request = fuse.current_request()
        if Opcode(request.opcode).name != name or (
            handle is not None and (request.handle, request.offset) != (handle, offset or 0)
        ):
            self.mismatches += 1
        self.counts[name] += 1
        self.log.append(request)
        await trio.lowlevel.checkpoint()  # others run in between
        while name in self.held and not request.laundered:
            scope = trio.CancelScope()
            with self.interrupts.watch(request, scope.cancel), scope:
                await self.opened.wait()
            if scope.cancelled_caught:
                self.eintr += 1
                raise pyfuse3.FUSEError(errno.EINTR)
        return request

    def attributes(self, inode):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = FOREVER_S
        directory = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o777 if directory else stat.S_IFREG | 0o666
        entry.st_nlink = 1
        entry.st_size = 0 if directory else len(self.data[inode])
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = 1_000_000_007
        return entry

    async def lookup(self, parent_inode, name, ctx):
        await self.begin("LOOKUP")
        if name not in self.names:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(self.names[name])

    async def getattr(self, inode, ctx):
        await self.begin("GETATTR")
        return self.attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        await self.begin("SETATTR")
        if fields.update_size:
            del self.data[inode][attr.st_size :]
            self.data[inode].extend(bytes(attr.st_size - len(self.data[inode])))
        return self.attributes(inode)

    async def open(self, inode, flags, ctx):
        await self.begin("OPEN")
        if flags & os.O_TRUNC:
            self.data[inode].clear()
        direct = any(name[:1] == b"d" for name, other in self.names.items() if other == inode)
        return pyfuse3.FileInfo(fh=inode + 1000, keep_cache=True, direct_io=direct)

    async def create(self, parent_inode, name, mode, flags, ctx):
        await self.begin("CREATE")
        inode = self.names.setdefault(name, len(self.data) + 2)
        self.data.setdefault(inode, bytearray())
        return pyfuse3.FileInfo(fh=inode + 1000), self.attributes(inode)

    async def read(self, fh, off, size):
        await self.begin("READ", fh, off)
        return bytes(self.data[fh - 1000][off : off + size])

    async def write(self, fh, off, buf):
        request = await self.begin("WRITE", fh, off)
        if request.size != len(buf) or request.inode + 1000 != fh != 0:
            self.mismatches += 1
        data = self.data[request.inode]
        data.extend(bytes(max(0, off - len(data))))
        data[off : off + len(buf)] = buf
        return len(buf)

    async def flush(self, fh):
        await self.begin("FLUSH", fh)

    async def release(self, fh):
        await self.begin("RELEASE", fh)

    async def fsync(self, fh, datasync):
        request = await self.begin("FSYNC", fh)
        self.mismatches += bool(request.operation_flags & 1) != bool(datasync)

    async def opendir(self, inode, ctx):
        await self.begin("OPENDIR")
        return inode

    async def readdir(self, fh, start_id, token):
        request = await self.begin("READDIRPLUS")
        self.mismatches += request.handle != fh or request.offset != start_id
        for index, (name, inode) in enumerate(list(self.names.items())[start_id:]):
            if not pyfuse3.readdir_reply(token, name, self.attributes(inode), start_id + index + 1):
                break

    async def unlink(self, parent_inode, name, ctx):
        await self.begin("UNLINK")
        del self.names[name]


def answer_diverted(length):
    """Past libfuse: LSEEK goes 7 bytes further, up to 1000; SETLK grants everything."""
    request = fuse.current_request()
    if request.opcode == Opcode.SETLK:
        fuse.reply(request.unique, 0)
        return
    handle, offset = struct.unpack_from("<QQ", fuse.body(length))
    assert (request.opcode, handle) == (Opcode.LSEEK, request.inode + 1000)
    error = errno.ENXIO if offset > 1000 else 0
    fuse.reply(request.unique, error, struct.pack("<Q", offset + 7))


class Driver:
    """The commands of the test."""

    def __init__(self, fs, gate):
        self.fs = fs
        self.gate = gate

    def do_state(self):
        return {
            "counts": dict(self.fs.counts),
            "mismatches": self.fs.mismatches,
            "eintr": self.fs.eintr,
            "queue": fuse.gate_queue()._asdict(),
            "pending": [row._asdict() for row in fuse.pending_requests()],
        }

    def do_session(self):
        return {**fuse.session_info()._asdict(), "fd": fuse.session_fd()}

    def do_log(self, opcode):
        rows = [row for row in self.fs.log if Opcode(row.opcode).name == opcode]
        return [
            {
                **row._asdict(),
                "laundered": row.laundered,
                "append": row.append,
                "sync": row.data_sync,
            }
            for row in rows
        ]

    def do_hold(self, names):
        self.fs.held = set(names)
        self.fs.opened.set()
        self.fs.opened = trio.Event()

    def do_put(self, name, text):
        inode = self.fs.names.setdefault(name.encode(), len(self.fs.data) + 2)
        self.fs.data[inode] = bytearray(text.encode())
        return inode

    def do_poke(self, inode, at, text):
        """Another node changes the bytes."""
        self.fs.data[inode][at : at + len(text)] = text.encode()

    async def do_notify(self, call, *arguments):
        arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
        function = getattr(notify, call)
        return await trio.to_thread.run_sync(function, fuse.session_fd(), *arguments)

    def do_gate(self):
        fuse.set_gate(self.gate)

    def do_flush(self):
        return fuse.gate_flush()

    def do_abandon(self, unique):
        return fuse.gate_abandon(unique, errno.EINTR)

    async def do_freeze(self, seconds):
        time.sleep(seconds)  # noqa: ASYNC251 - the loop hangs on purpose


async def commands(driver, cancel):
    buffer = b""
    while True:
        await trio.lowlevel.wait_readable(0)
        part = os.read(0, 65536)
        if not part:
            return cancel()
        *lines, buffer = (buffer + part).split(b"\n")
        for line in lines:
            message = json.loads(line)
            result = getattr(driver, "do_" + message.pop("do"))(*message.get("args", []))
            if hasattr(result, "__await__"):
                result = await result
            print(json.dumps(result), flush=True)


async def main(driver):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(driver.fs.interrupts.run)
        nursery.start_soon(commands, driver, nursery.cancel_scope.cancel)
        take_turns(answer_diverted)
        await pyfuse3.main(min_tasks=1, max_tasks=1000)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    mountpoint, options = sys.argv[1], json.loads(sys.argv[2])
    gate = Gate.map(options["gate"]) if "gate" in options else None
    fs = TinyFs()
    fuse.configure(fuse.Settings(**options.get("settings", {})))
    fuse.divert([Opcode.LSEEK, Opcode.SETLK])
    pyfuse3.init(fs, mountpoint, {*pyfuse3.default_options, "fsname=tiny"})
    if not fuse.interposed():
        sys.exit("fuse_session_new was not ours")
    hello = {
        "connection": fuse.connection_number(mountpoint),
        "fd": fuse.session_fd(),
        "table": fuse.requests_fd(),
    }
    print(json.dumps(hello), flush=True)
    try:
        trio.run(main, Driver(fs, gate))
    finally:
        pyfuse3.close(unmount=False)
        os._exit(0)
