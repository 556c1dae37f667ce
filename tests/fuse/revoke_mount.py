"""A mount of one file whose content another node (a task here) replaces at every revocation.

Arguments: DIRECTORY VERSION_FILE PAUSE_MS [OPTION,...]. The file `f` has PAGES pages, each filled
with the version; the version is in VERSION_FILE too, from the moment it counts. A read that starts
later must not see an older one. With `writers` in the options local stores are kept: page 0..3 hold
counters that only local programs change.
"""

import logging
import mmap
import os
import random
import stat
import struct
import sys
import tempfile

import trio

import native.fuse  # noqa: F401
from cfs.lock_names import inode_lock_name
from cfs.mount.local_io import open_local
from cfs.mount.options import parse_arguments
from cfs.mount.process_io import Mount
from cfs.mount.system_io import StatusPipe, settle_process
from tests.fuse.memory_fs import MemoryFileSystem, Node

PAGES = 256
OWN_PAGES = 4
"""Of the local programs."""
INO = 50
PAGE = 4096


def page(version):
    return struct.pack("<Q", version) * 512


class Said(StatusPipe):
    def __init__(self):
        super().__init__()
        self.mounted = trio.Event()

    def report(self, exit_code, message=""):
        self.mounted.set()


class Changing(MemoryFileSystem):
    """The `other node` writes at the moment at which the lock has left this one."""

    version = 0
    shared = None

    def let_others_write(self):
        engine = self.locks.engine
        unlock, lock = engine.unlock, engine.lock
        names = {}

        def watched_lock(name, mode, flags, client):
            number = lock(name, mode, flags, client)
            names[number] = name
            return number

        def watched_unlock(number, flags, lvb=None):
            result = unlock(number, flags, lvb)
            if names.pop(number) == inode_lock_name(INO):
                self.other_node_writes()
            return result

        engine.lock, engine.unlock = watched_lock, watched_unlock

    def other_node_writes(self):
        self.version += 1
        node = self.nodes[INO]
        data = page(self.version) * (PAGES - OWN_PAGES)
        node.data[OWN_PAGES * PAGE : OWN_PAGES * PAGE + len(data)] = data
        node.touch()
        self.shared[0:8] = struct.pack("<Q", self.version)

    async def revoked(self, ino, mode):
        # What the demotion of a real core costs: the disk.
        await trio.sleep(self.chooser.choice([0, 0, 0.001]))

    async def read_held(self, ino, offset, size, *, direct=False):
        found = await super().read_held(ino, offset, size)
        if self.chooser.random() < 0.3:
            await trio.lowlevel.checkpoint()
        return found


async def revoke_for_ever(mount, locks, pause_s, chooser):
    while True:
        await trio.sleep(pause_s * chooser.uniform(0.5, 1.5))
        await locks.drop(inode_lock_name(INO))


def main():
    directory, version_file, pause_ms, seed, *options = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    settle_process()
    chooser = random.Random(int(seed))
    with open(version_file, "r+b") as file:
        shared = mmap.mmap(file.fileno(), PAGE)

    async def make(device, locks, environment, _options):
        node = Node(INO, stat.S_IFREG | 0o666)
        node.data[:] = bytes(PAGES * PAGE)
        root = Node(7, stat.S_IFDIR | 0o755)
        root.names[b"f"] = (INO, 5, stat.S_IFREG)
        fs = Changing(locks, environment, {7: root, INO: node})
        fs.shared, fs.chooser = shared, chooser
        fs.let_others_write()
        make.fs = fs
        return fs

    async def run():
        async with trio.open_nursery() as nursery:
            mount, said = Mount(arguments), Said()

            async def later():
                await said.mounted.wait()
                await revoke_for_ever(mount, make.fs.locks, float(pause_ms) / 1000, chooser)

            nursery.start_soon(later)
            code = await mount.run(open_local, make, lambda nursery: None, said)
            nursery.cancel_scope.cancel()
        print("VERSION", make.fs.version, mount.counters(), file=sys.stderr, flush=True)
        return code

    with tempfile.NamedTemporaryFile() as image:
        image.truncate(1 << 20)
        arguments = parse_arguments([image.name, directory, "-f", *options])
        return trio.run(run)


if __name__ == "__main__":
    result = main()
    sys.stdout.flush()
    os._exit(result)
