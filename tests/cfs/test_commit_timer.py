"""Without any sync a change is on the disk within the interval of the commit timer."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import trio

from cfs.attributes import BLOCK_BYTES, MountOptions
from cfs.filesystem import FileSystem
from cfs.runtime_io import TrioRuntime
from cluster.device_memory import MemoryDevice
from dlm.local_io import local_locks
from tests.cfs.harness import Clock, Environment, instance, make_device, mounted

pytestmark = pytest.mark.trio
INTERVAL_S = 1.0
DISK_S = {"read": 0.001, "write": 0.002, "flush": 0.03}
FILES = 4
KINDS = ("block", "direct", "small", "name")


class MockRuntime(TrioRuntime):
    def now_ns(self) -> int:
        return round(trio.current_time() * 1e9)


@dataclass
class Promise:
    """A change that was made, and the disk as a crash would have left it when it was so old."""

    kind: str
    number: int
    version: int
    disk: MemoryDevice


def durable(device: MemoryDevice) -> MemoryDevice:
    """What a power cut would leave now."""
    twin = MemoryDevice(device.size_bytes)
    twin._durable = device._durable.copy()
    twin._unflushed = list(device._unflushed)
    twin.crash()
    return twin


async def change(fs: FileSystem, kind: str, number: int, version: int) -> None:
    root, name = fs.root_ino, b"%s%d" % (kind.encode(), number)
    if kind == "name":
        await fs.rename(root, b"%s.%d" % (name, version - 1), root, b"%s.%d" % (name, version))
    else:
        ino = (await fs.lookup(root, name)).ino
        size = 100 if kind == "small" else BLOCK_BYTES
        await fs.write(ino, 0, (b"%08d" % version) * (size // 8), direct=kind == "direct")


async def version_of(fs: FileSystem, kind: str, number: int) -> int:
    root, name = fs.root_ino, b"%s%d" % (kind.encode(), number)
    if kind != "name":
        return int(await fs.read((await fs.lookup(root, name)).ino, 0, 8))
    entries = await fs.readdir(root, 0, 1000)
    (found,) = [e.name for e in entries if e.name.startswith(name + b".")]
    return int(found.rpartition(b".")[2])


async def prepare(fs: FileSystem) -> None:
    for number in range(FILES):
        for kind in KINDS:
            name = b"%s%d" % (kind.encode(), number) + (b".0" if kind == "name" else b"")
            made = await fs.create(fs.root_ino, name, 0o644, 0, 0)
            if kind in ("block", "direct"):
                await fs.write(made.ino, 0, bytes(BLOCK_BYTES))
            if kind != "name":
                await change(fs, kind, number, 0)
    await fs.sync()


async def test_nothing_is_unwritten_for_longer_than_the_interval(autojump_clock) -> None:
    seed = random.SystemRandom().randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    device = await make_device(16)

    async def take_time(kind: str, offset: int, length: int) -> None:
        await trio.sleep(DISK_S.get(kind, 0))

    promises: list[Promise] = []
    async with trio.open_nursery() as nursery:
        environment = Environment(
            MockRuntime(nursery), instance(1), Clock(), is_barred=lambda who: True
        )
        options = MountOptions(commit_interval_ms=round(INTERVAL_S * 1000))
        fs = await FileSystem.mount(device, local_locks(nursery), environment, options)
        await prepare(fs)
        device.hook = take_time

        async def watch(kind: str, number: int, version: int) -> None:
            await trio.sleep(INTERVAL_S)
            promises.append(Promise(kind, number, version, durable(device)))

        async def work(number: int) -> None:
            versions = dict.fromkeys(KINDS, 0)
            for _ in range(12):
                await trio.sleep(rng.uniform(0, 3 * INTERVAL_S))
                kind = rng.choice(KINDS)
                versions[kind] += 1
                await change(fs, kind, number, versions[kind])
                watchers.start_soon(watch, kind, number, versions[kind])

        async with trio.open_nursery() as watchers, trio.open_nursery() as workers:
            for number in range(FILES):
                workers.start_soon(work, number)
        await fs.unmount()
        nursery.cancel_scope.cancel()
    assert len(promises) == 12 * FILES
    for promise in promises:
        async with mounted(promise.disk, unmount=False) as after:
            found = await version_of(after, promise.kind, promise.number)
            assert found >= promise.version, promise
