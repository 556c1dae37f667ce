"""In-memory register, devices, instances and locks: a whole cluster for the volume manager.

`Faults` counts every call that a manager makes to its node and can end the manager there (`Crash`,
before or after the call took effect) or make the call fail.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

from cluster.control import ServerInfo
from cluster.device import BlockDevice
from cluster.device_memory import MemoryDevice
from cluster.errors import DeviceError, StackError
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId, ServerId
from cluster.signatures_io import signature
from cluster.state import SetVolumeGroup, VolumeGroup
from cvm.bounded_io import BoundedDevice
from cvm.entries import change_for, entries_of
from cvm.layout import VolumeMap, same_layout
from cvm.manager import Identity, Manager, Node
from cvm.seams import ExportInfo, Opener, VgEntry

CLUSTER_ID = "c1" * 16
MIB = 1 << 20


class Crash(BaseException):
    """The coordinator dies here. Not an Exception: nobody handles it."""


class Faults:
    """What happens at the n-th call of one manager."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []
        self.crash_before: int | None = None
        self.crash_after: int | None = None
        self.fail_at: int | None = None
        self.fail_after: int | None = None
        self.observe: Callable[[], None] = lambda: None
        self.post: Callable[[Callable[[], None]], None] = lambda message: message()
        """How messages to instances travel."""

    @asynccontextmanager
    async def call(self, name: str) -> AsyncIterator[None]:
        number = self.count
        self.count += 1
        self.names.append(name)
        if number == self.crash_before:
            raise Crash
        if number == self.fail_at:
            raise DeviceError(f"{name} fails for the test")
        yield
        self.observe()
        if number == self.crash_after:
            raise Crash
        if number == self.fail_after:
            raise DeviceError(f"the answer of {name} is lost")


class FakeInstance:
    """A live instance with a volume open: only its gate and its map."""

    def __init__(self, opener: Opener) -> None:
        self.opener = opener
        self.map: VolumeMap | None = None
        self.open = True
        self.claim = 0

    def suspend(self, sequence: int, claim: int) -> None:
        """As `VolumeDevice.suspend`."""
        if self.map is not None and sequence <= self.map.sequence:
            return
        if claim < self.claim:
            raise StackError("this change was given up or taken over")
        self.claim = claim
        self.open = False

    def resume(self, volume_map: VolumeMap) -> None:
        """As `VolumeDevice.resume`."""
        newest = self.map is None or volume_map.sequence >= self.map.sequence
        if newest and volume_map.claim >= self.claim:
            if self.open and self.map is not None:
                assert same_layout(self.map, volume_map)
            self.map, self.claim = volume_map, volume_map.claim
            self.open = True


class Cluster:
    """State that all nodes share."""

    def __init__(self, disks: dict[str, int] | None = None) -> None:
        sizes = disks or {"s1/disk0": 128 * MIB, "s2/disk0": 128 * MIB}
        self.disks = {name: MemoryDevice(size) for name, size in sizes.items()}
        self.away: set[str] = set()
        names = sorted({name.partition("/")[0] for name in sizes})
        self.servers = [
            ServerInfo(ServerId(129 + number), name, [f"10.77.0.{101 + number}"])
            for number, name in enumerate(names)
        ]
        self.groups: list[VolumeGroup] = []
        self.instances: list[FakeInstance] = []
        self.minimums: dict[str, int] = {}
        self.locks: dict[str, trio.Lock] = {}
        self.uuids = 0

    def entries(self) -> dict[str, VgEntry]:
        return entries_of(self.groups)

    def apply(self, change: SetVolumeGroup) -> bool:
        present = next((group for group in self.groups if group.uuid == change.uuid), None)
        if (present.sequence if present else 0) != change.expected:
            return False
        self.groups = [group for group in self.groups if group is not present]
        if change.group is not None:
            self.groups.append(change.group)
        return True

    def new_uuid(self) -> str:
        self.uuids += 1
        return f"{self.uuids:032x}"

    def server(self, pv: str) -> ServerInfo:
        return next(one for one in self.servers if one.name == pv.partition("/")[0])

    def manager(self, node: int = 1, faults: Faults | None = None) -> Manager:
        return Manager(make_node(self, node, faults or Faults()))

    def add_instance(self, opener: Opener, volume_map: VolumeMap) -> None:
        for instance in self.instances:
            if instance.opener == opener:
                instance.map, instance.claim = volume_map, volume_map.claim

    def check_maps(self) -> None:
        """No gate is open under an uncommitted layout, and all open gates agree."""
        for volume in {one.opener.volume for one in self.instances}:
            gates = [one for one in self.instances if one.opener.volume == volume and one.open]
            maps = [one.map for one in gates if one.map is not None]
            for one in maps:
                assert same_layout(one, maps[0]), f"{volume}: two layouts at once"
                assert one.sequence <= self.entries()[one.vg].sequence, "map of the future"


def instance_of(node: int, number: int = 0) -> Instance:
    return Instance(NodeId(node), Incarnation(1), InstanceNo(number))


class FakeRegister:
    def __init__(self, cluster: Cluster, faults: Faults) -> None:
        self._cluster, self._faults = cluster, faults

    async def read(self) -> dict[str, VgEntry]:
        async with self._faults.call("read"):
            return self._cluster.entries()

    async def compare_and_set(self, vg: str, expected: VgEntry | None, new: VgEntry | None) -> bool:
        async with self._faults.call("compare_and_set"):
            change = change_for(self._cluster.groups, vg, expected, new)
            replaced = change is not None and self._cluster.apply(change)
        return replaced


class _FaultyDevice:
    """Device calls of one manager pass its faults."""

    def __init__(self, device: MemoryDevice, faults: Faults) -> None:
        self._device, self._faults = device, faults

    def __getattr__(self, name: str):
        inner = getattr(self._device, name)
        if name in ("write", "flush"):

            async def call(*args, **kwargs):
                async with self._faults.call(name):
                    return await inner(*args, **kwargs)

            return call
        return inner


class FakeDevices:
    def __init__(self, cluster: Cluster, faults: Faults) -> None:
        self._cluster, self._faults = cluster, faults

    async def open(self, pv: str) -> BlockDevice:
        if pv in self._cluster.away:
            raise DeviceError(f"{pv} does not answer")
        device = _FaultyDevice(self._cluster.disks[pv], self._faults)
        return BoundedDevice(pv, device)  # type: ignore[arg-type]

    async def signature(self, pv: str) -> str:
        return await signature(await self.open(pv))

    async def exports(self) -> list[ExportInfo]:
        return [
            ExportInfo(
                pv,
                self._cluster.server(pv).id,
                pv.partition("/")[2],
                disk.size_bytes,
                pv not in self._cluster.away,
                self._cluster.minimums.get(pv, 0),
            )
            for pv, disk in self._cluster.disks.items()
        ]

    def servers(self) -> list[ServerInfo]:
        return self._cluster.servers

    async def raise_minimum(self, pv: str, sequence: int) -> None:
        async with self._faults.call("raise_minimum"):
            self._cluster.minimums[pv] = max(sequence, self._cluster.minimums.get(pv, 0))


class FakeInstances:
    """Each instance is suspended and resumed by a call of its own, so that any may be missed."""

    def __init__(self, cluster: Cluster, faults: Faults) -> None:
        self._cluster, self._faults = cluster, faults

    def _of(self, volume: str) -> list[FakeInstance]:
        return [one for one in self._cluster.instances if one.opener.volume == volume]

    async def suspend_all(self, volume: str, sequence: int, claim: int) -> None:
        for instance in self._of(volume):
            async with self._faults.call("suspend"):
                self._faults.post(partial(instance.suspend, sequence, claim))

    async def resume_all(self, volume: str, volume_map: VolumeMap) -> None:
        for instance in self._of(volume):
            async with self._faults.call("resume"):
                self._faults.post(partial(instance.resume, volume_map))

    async def openers(self, volume: str) -> list[Opener]:
        return [one.opener for one in self._cluster.instances if volume in ("", one.opener.volume)]

    async def opened(self, opener: Opener) -> None:
        await self.closed(opener.volume, opener.instance)
        self._cluster.instances.append(FakeInstance(opener))

    async def closed(self, volume: str, instance: Instance) -> None:
        self._cluster.instances = [
            one
            for one in self._cluster.instances
            if (one.opener.volume, one.opener.instance) != (volume, instance)
        ]


class FakeLocks:
    """Locks that end with their holder, also when it dies."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    @asynccontextmanager
    async def lock(self, name: str) -> AsyncIterator[None]:
        async with self._cluster.locks.setdefault(name, trio.Lock()):
            yield


def make_node(cluster: Cluster, node: int, faults: Faults) -> Node:
    return Node(
        identity=Identity(instance_of(node), f"n{node}", CLUSTER_ID),
        register=FakeRegister(cluster, faults),
        devices=FakeDevices(cluster, faults),
        instances=FakeInstances(cluster, faults),
        locks=FakeLocks(cluster),
        new_uuid=cluster.new_uuid,
    )


async def open_on(cluster: Cluster, volume: str, node: int, number: int = 1) -> FakeInstance:
    """Open a volume as a mount on a node would."""
    opener = Opener(volume, instance_of(node, number), f"n{node}", "sharedwrite", "mount")
    volume_map = await cluster.manager(node).open_volume(opener)
    cluster.add_instance(opener, volume_map)
    return next(one for one in cluster.instances if one.opener == opener)
