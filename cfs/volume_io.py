"""Opening what a tool works on: a volume through clusterd, or a file of this machine."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio

from cluster.control import InstanceGranted, ViewInfo
from cluster.control_io import open_session
from cluster.device import BlockDevice
from cluster.device_file_io import FileDevice
from cluster.errors import BarredError, UsageError
from cvm.target_io import VolumeClient, open_volume

Work = Callable[[BlockDevice], Awaitable[None]]


def is_local(target: str, local: bool) -> bool:
    """A path that exists or begins with / or . is a file; `vg/lv` is a volume."""
    return local or target.startswith(("/", ".")) or os.path.exists(target)


async def with_device(target: str, local: bool, kind: str, work: Work) -> None:
    """Run `work` with the target open; nobody else has the volume open meanwhile."""
    if is_local(target, local):
        if not await trio.Path(target).exists():
            raise UsageError(f"{target} does not exist")
        device = FileDevice(target, read_only=kind == "fsck")
        try:
            await work(device)
        finally:
            device.close()
        return
    if target.count("/") != 1:
        raise UsageError(f"{target!r} is no volume", hint="a volume is called VG/LV")
    await _with_volume(target, kind, work)


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
