"""Reads of a device that end in time, for commands on metadata.

The data path waits for storage that is away; a command that only wants to read a label should say
that the server does not answer. Writes are not bounded, and an interrupted command waits for its
own: the device carries one out also when its caller has gone, and it might land after what the next
holder of the lock has written.
"""

from __future__ import annotations

from collections.abc import Sequence

import trio

from cluster.device import BlockDevice, Buffer
from cluster.errors import DeviceError

READ_TIMEOUT_S = 5.0


class BoundedDevice:
    """A `BlockDevice` whose reads raise DeviceError after `timeout_s`."""

    def __init__(self, name: str, device: BlockDevice, timeout_s: float = READ_TIMEOUT_S) -> None:
        self._name = name
        self._device = device
        self._timeout_s = timeout_s

    @property
    def size_bytes(self) -> int:
        return self._device.size_bytes

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        return (await self.read_many([(offset_bytes, length_bytes)]))[0]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with trio.move_on_after(self._timeout_s):
            return await self._device.read_many(ranges)
        raise DeviceError(
            f'Device "{self._name}" does not answer.',
            hint="is its block server up? see: clusterctl status",
        )

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        with trio.CancelScope(shield=True):
            await self._device.write(offset_bytes, data, fua=fua)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        with trio.CancelScope(shield=True):
            await self._device.write_many(parts, fua=fua)

    async def flush(self) -> None:
        await self._device.flush()

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        with trio.CancelScope(shield=True):
            await self._device.discard(offset_bytes, length_bytes)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        with trio.CancelScope(shield=True):
            await self._device.write_zeroes(offset_bytes, length_bytes)
