"""Opening what a tool works on: a volume through clusterd, or a file of this machine."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import trio

from cluster.control import InstanceGranted, ViewInfo
from cluster.control_io import open_session
from cluster.device import BlockDevice
from cluster.device_file_io import FileDevice
from cluster.errors import BarredError, BusyError, UsageError, os_failure
from cluster.holders_io import lock_file
from cvm.target_io import VolumeClient, open_volume

Work = Callable[[BlockDevice], Awaitable[None]]


def is_local(target: str, local: bool) -> bool:
    """A path that exists or begins with / or . is a file; `vg/lv` is a volume."""
    return local or target.startswith(("/", ".")) or os.path.exists(target)


async def with_device(
    target: str, local: bool, kind: str, work: Work, *, writing: bool = True
) -> None:
    """Run `work` with the target open; nobody else has it open meanwhile. Raises BusyError if
    somebody has."""
    if is_local(target, local):
        with take_file(target), FileDevice(target, read_only=not writing) as device:
            await work(device)
        return
    if target.count("/") != 1 or "" in target.split("/"):
        raise UsageError(f"{target!r} is no volume", hint="a volume is called VG/LV")
    await _with_volume(target, kind, work)


@contextmanager
def take_file(path: str) -> Iterator[None]:
    """Have a file or block device of this machine for ourselves: nobody mounts it, exports it or
    makes a file system on it meanwhile. Raises StackError."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"{path} is a directory", hint="a file or block device is needed")
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"{path} is neither a file nor a block device")
        # O_EXCL: a block device that is mounted, or in use by LVM, md and the like, is busy.
        flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(mode) else 0)
        holder = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise BusyError(f"{path} is mounted or in use", hint="see: lsblk") from error
        raise os_failure(error, f"cannot open {path}") from error
    try:
        lock_file(holder, path)
        yield
    finally:
        os.close(holder)


async def _with_volume(volume: str, kind: str, work: Work) -> None:
    client = VolumeClient()
    barred: list[str] = []
    scope = trio.CancelScope()

    def on_event(name: str, data: Any) -> None:
        if name == "view":
            client.on_view(msgspec.convert(data, ViewInfo))
        elif name == "barred":
            barred.append(str(data))
            scope.cancel()

    async with open_session(None, client.handlers(), on_event) as session:
        answer = await session.call("instance.register", {"kind": kind, "title": volume})
        granted = msgspec.convert(answer, InstanceGranted)
        async with trio.open_nursery() as nursery:
            with scope:
                device = await open_volume(session, volume, "exclusive", granted, nursery, client)
                try:
                    await work(device)
                finally:
                    with trio.CancelScope(shield=True):
                        await client.close(session, volume)
                        await session.call("instance.leave", {})
            nursery.cancel_scope.cancel()
    if barred:
        raise BarredError(f"this process was put out of the cluster: {barred[0]}")
