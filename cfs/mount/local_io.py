"""A mount without a cluster: one image file or block device, one machine, all locks ours."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator

import trio

from cfs.fuse.interrupt_io import InterruptibleRuntime, RequestWaits
from cfs.mount.options import MountArguments
from cluster.device_file_io import FileDevice
from cluster.errors import BusyError, DeviceError
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from dlm.local import LocalLocks
from dlm.runtime_io import TrioRuntime

BUSY_WAIT_S = 10.0
BUSY_RETRY_S = 0.05


class NoTable:
    """No guard reads the inode table."""

    def add(self, node: int) -> int:
        return 0

    def remove(self, slot: int) -> None:
        return None


class LocalBackend:
    """Implements `cfs.mount.process_io.Backend`."""

    def __init__(self, device: FileDevice, nursery: trio.Nursery) -> None:
        self.device = device
        self.waits = RequestWaits()
        self.locks = LocalLocks(InterruptibleRuntime(TrioRuntime(nursery), self.waits))
        self.table = NoTable()
        self.file_locks = None
        self.owner = Instance(
            NodeId(1), Incarnation(time.clock_gettime_ns(time.CLOCK_REALTIME)), InstanceNo(1)
        )

    def is_barred(self, instance: Instance) -> bool:
        """The image is locked, so every other owner is gone."""
        return instance != self.owner

    def tell(self, name: str, text: str, **fields: int) -> None:
        """There is no event stream."""

    def is_out(self) -> bool:
        """Nobody could put us out."""
        return False

    async def mounted(self, mount: object) -> None:
        """Nobody to tell."""

    async def end(self) -> None:
        """Locks need no hand-over."""
        await self.locks.drop_all()
        await self.device.flush()


async def _lock(holder: int, path: str) -> None:
    """Lock the image. umount(8) returns before its mount process has written the last bytes, so
    one that is still ending is waited for."""
    for _ in range(round(BUSY_WAIT_S / BUSY_RETRY_S)):
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            await trio.sleep(BUSY_RETRY_S)
    raise BusyError(f"{path} is in use")


@contextlib.asynccontextmanager
async def open_local(arguments: MountArguments, mount: object) -> AsyncIterator[LocalBackend]:
    """Lock the image and mount from it."""
    path = arguments.volume
    try:
        holder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DeviceError(f"cannot open {path}: {error.strerror}") from error
    try:
        await _lock(holder, path)
        # Also with `ro`, which is the kernel's promise to its callers: a journal may need a replay.
        with FileDevice(path) as device:
            async with trio.open_nursery() as nursery:
                yield LocalBackend(device, nursery)
                nursery.cancel_scope.cancel()
    finally:
        os.close(holder)
