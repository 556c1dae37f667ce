"""Mount process over the file system in memory: python -m tests.fuse.memory_mount DIR [OPTIONS]."""

import logging
import os
import sys
import tempfile

import trio

import native.fuse  # noqa: F401
from cfs.mount.local_io import open_local
from cfs.mount.options import parse_arguments
from cfs.mount.process_io import Mount
from cfs.mount.system_io import StatusPipe, settle_process
from tests.fuse import memory_fs


class Said(StatusPipe):
    def report(self, exit_code, message=""):
        print("MOUNTED" if not exit_code else message, flush=True)


def main():
    logging.basicConfig(level=logging.INFO)
    settle_process()
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(1 << 20)
        arguments = parse_arguments([file.name, *sys.argv[1:], "-f"])

        async def run():
            mount = Mount(arguments)
            code = await mount.run(open_local, memory_fs.make, lambda nursery: None, Said())
            print(mount.counters(), flush=True)
            return code

        return trio.run(run)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
