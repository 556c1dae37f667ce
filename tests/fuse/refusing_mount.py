"""A local mount whose disk refuses blocks that begin with BAD! while a file `refuse` exists.

Arguments: those of mount.cfs, after CONTROL_DIRECTORY.
"""

import contextlib
import logging
import os
import sys

import trio

import native.fuse  # noqa: F401
from cfs.filesystem import FileSystem
from cfs.mount.local_io import open_local
from cfs.mount.options import parse_arguments
from cfs.mount.process_io import Mount
from cfs.mount.system_io import StatusPipe, settle_process
from cfs.runtime_io import TrioRuntime
from cluster.errors import DeviceError


class RefusingDevice:
    def __init__(self, base, control):
        self._base = base
        self._control = control

    def __getattr__(self, name):
        return getattr(self._base, name)

    async def write_many(self, parts, *, fua=False):
        for offset, data in parts:
            await self.write(offset, data, fua=fua)

    async def write(self, offset, data, *, fua=False):
        self._refuse(data)
        await self._base.write(offset, data, fua=fua)

    def start_write(self, parts, done):
        try:
            for _, data in parts:
                self._refuse(data)
        except DeviceError as error:
            done(error)
        else:
            self._base.start_write(parts, done)

    def _refuse(self, data):
        view = memoryview(data)
        bad = any(view[at : at + 4] == b"BAD!" for at in range(0, len(view), 4096))
        if bad and os.path.exists(self._control):
            raise DeviceError("bad blocks")


def main():
    control, *words = sys.argv[1:]
    logging.basicConfig(level=logging.INFO)
    settle_process()
    arguments = parse_arguments(words)

    @contextlib.asynccontextmanager
    async def open_refusing(arguments, mount):
        async with open_local(arguments, mount) as backend:
            backend.device = RefusingDevice(backend.device, os.path.join(control, "refuse"))
            yield backend

    async def run():
        return await Mount(arguments).run(
            open_refusing, FileSystem.mount, TrioRuntime, StatusPipe()
        )

    return trio.run(run)


if __name__ == "__main__":
    result = main()
    sys.stderr.flush()
    os._exit(result)
