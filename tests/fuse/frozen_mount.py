"""A mount whose file `f` is locked by another node until a file called `thaw` appears.

Arguments: DIRECTORY CONTROL_DIRECTORY. `free` is held by nobody else; the storage of `slow` is away
until the thaw, and what is written past the buffer to `late` lands then.
"""

import logging
import os
import stat
import sys
import tempfile

import trio

import native.fuse  # noqa: F401
from cfs.lock_names import inode_lock_name
from cfs.mount.local_io import open_local
from cfs.mount.options import parse_arguments
from cfs.mount.process_io import Mount
from cfs.mount.system_io import StatusPipe, settle_process
from cfs.transaction import NotNow
from dlm.modes import Result
from tests.fuse.memory_fs import MemoryFileSystem, Node

FROZEN, FREE, SLOW, LATE = 50, 51, 52, 53


class AwayStorage(MemoryFileSystem):
    """The blocks of one file come only after the thaw."""

    back = None

    async def read_held(self, ino, offset, size, *, direct=False):
        if ino == SLOW:
            await self.back.wait()
        return await super().read_held(ino, offset, size)

    def start_read(self, ino, offset, size, done):
        if ino != SLOW:
            raise NotNow
        self._later(lambda: done(None, [bytes(self.node(ino).data[offset : offset + size])]))

    def start_write(self, ino, offset, data, done, *, kill):
        if ino not in (SLOW, LATE):
            raise NotNow
        data = bytes(data)

        def write():
            self.node(ino).data[offset : offset + len(data)] = data
            done(None)

        self._later(write)

    def _later(self, action):
        """A disk without a task."""

        async def wait():
            await self.back.wait()
            action()

        trio.lowlevel.spawn_system_task(wait)


def _slowly(name):
    """The operation waits for storage when it names something called `slow...`."""
    original = getattr(MemoryFileSystem, name)

    async def wrapped(self, *arguments, **how):
        if any(isinstance(each, bytes) and each.startswith(b"slow") for each in arguments):
            await self.back.wait()
        if SLOW in arguments:
            await self.back.wait()
        return await original(self, *arguments, **how)

    return wrapped


for _name in ("create", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "setattr"):
    setattr(AwayStorage, _name, _slowly(_name))
AwayStorage.setattr_held = _slowly("setattr_held")
AwayStorage.write_held = _slowly("write_held")


class Slow:
    """An engine that keeps the requests for one lock until it thaws."""

    def __init__(self, engine):
        self._engine = engine
        self._kept = []
        self._names = {}
        self.frozen = True

    def lock(self, name, mode, flags, client):
        if not (self.frozen and name == inode_lock_name(FROZEN)):
            return self._engine.lock(name, mode, flags, client)
        number = -1 - len(self._names)
        self._kept.append((name, mode, flags, client))
        self._names[number] = name
        return number

    def thaw(self):
        self.frozen = False
        for name, mode, flags, client in self._kept:
            client._lock = None  # the number that it knows was a placeholder
            self._engine.lock(name, mode, flags, client)

    def convert(self, lock, mode, flags, lvb=None):
        return self._engine.convert(lock, mode, flags, lvb)

    def unlock(self, lock, flags, lvb=None):
        return self._engine.unlock(lock, flags, lvb)

    def cancel(self, lock):
        return Result.GRANTED if lock < 0 else self._engine.cancel(lock)


def main():
    directory, control = sys.argv[1:3]
    logging.basicConfig(level=logging.INFO)
    settle_process()

    async def make(device, locks, environment, _options):
        locks.engine = Slow(locks.engine)
        root = Node(7, stat.S_IFDIR | 0o755)
        nodes = {7: root}
        for name, ino in ((b"f", FROZEN), (b"free", FREE), (b"slow", SLOW), (b"late", LATE)):
            nodes[ino] = Node(ino, stat.S_IFREG | 0o666)
            nodes[ino].data[:] = b"data"
            root.names[name] = (ino, ino, stat.S_IFREG)
        make.locks = locks
        make.fs = AwayStorage(locks, environment, nodes)
        make.fs.back = trio.Event()
        return make.fs

    async def obey():
        """Files are commands: a test has no other way to reach this process."""
        while True:
            await trio.sleep(0.02)
            if await trio.Path(control, "thaw").exists():
                make.locks.engine.thaw()
                make.fs.back.set()
                return
            if await trio.Path(control, "break").exists():
                raise RuntimeError("broken on demand")

    async def run():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey)
            code = await Mount(arguments).run(open_local, make, lambda nursery: None, StatusPipe())
            nursery.cancel_scope.cancel()
        return code

    with tempfile.NamedTemporaryFile() as image:
        image.truncate(1 << 20)
        arguments = parse_arguments([image.name, directory, "-f"])
        return trio.run(run)


if __name__ == "__main__":
    result = main()
    sys.stderr.flush()
    os._exit(result)
