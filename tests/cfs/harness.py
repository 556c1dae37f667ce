"""File systems on RAM disks for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from cfs.attributes import BLOCK_BYTES, MountOptions
from cfs.filesystem import FileSystem
from cfs.fsck.checker import check
from cfs.mkfs_plan import Choices, plan, write_plan
from cfs.runtime_io import TrioEnvironment, TrioRuntime
from cluster.device_memory import MemoryDevice
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from dlm.cache import LockCache
from dlm.local_io import local_locks
from tests.cfs.shared_locks import LockTable

QUIET = MountOptions(background=False)


async def make_device(
    mebibytes: int = 32, *, log_writes: bool = False, group_blocks: int = 0, journals: int = 4
) -> MemoryDevice:
    """A RAM disk with an empty file system; the same bytes every time."""
    device = MemoryDevice(mebibytes << 20, log_writes=log_writes)
    choices = Choices(
        uuid=bytes(range(16)),
        hash_seed=bytes(range(16, 32)),
        now_ns=1_000_000,
        journals=journals,
        group_blocks=group_blocks,
    )
    await write_plan(device, plan(device.size_bytes // BLOCK_BYTES, choices))
    return device


def instance(number: int) -> Instance:
    return Instance(NodeId(number), Incarnation(1), InstanceNo(1))


class Clock:
    """A wall clock that moves by a microsecond each time it is read."""

    def __init__(self) -> None:
        self.now_ns = 1_600_000_000_000_000_000

    def read(self) -> int:
        self.now_ns += 1000
        return self.now_ns


class Environment(TrioEnvironment):
    def __init__(self, runtime: TrioRuntime, owner: Instance, clock: Clock, **how: object) -> None:
        super().__init__(runtime, owner=owner, **how)  # type: ignore[arg-type]
        self._clock = clock
        self.told: list[tuple[int, str]] = []
        """Damage that was met: (block, line)."""

    def damaged(self, block: int, text: str) -> None:
        self.told.append((block, text))

    def wall_clock_ns(self) -> int:
        return self._clock.read()


@asynccontextmanager
async def mounted(
    device: MemoryDevice,
    options: MountOptions = QUIET,
    *,
    everyone_barred: bool = True,
    unmount: bool = True,
) -> AsyncIterator[FileSystem]:
    """One mount without a cluster; unmounted at the end unless the body failed."""
    async with trio.open_nursery() as nursery:
        environment = Environment(
            TrioRuntime(nursery), instance(1), Clock(), is_barred=lambda who: everyone_barred
        )
        fs = await FileSystem.mount(device, local_locks(nursery), environment, options)
        yield fs
        if unmount:
            await fs.unmount()
        nursery.cancel_scope.cancel()


class Member:
    """One mount of a cluster."""

    def __init__(self, number: int, fs: FileSystem, locks: LockCache, scope: trio.CancelScope):
        self.number = number
        self.fs = fs
        self.locks = locks
        self.scope = scope


class Cluster:
    """Several mounts on one RAM disk with one lock table."""

    def __init__(self, nursery: trio.Nursery, device: MemoryDevice) -> None:
        self.nursery = nursery
        self.device = device
        self.table = LockTable()
        self.clock = Clock()
        self.members: dict[int, Member] = {}
        self.dead: set[Instance] = set()

    def is_barred(self, who: Instance) -> bool:
        live = {instance(number) for number in self.members}
        return who not in live and who not in self.dead

    async def mount(
        self, number: int, options: MountOptions = QUIET, clock: Clock | None = None
    ) -> FileSystem:
        started = trio.Event()
        scope = trio.CancelScope()
        box: list[Member] = []

        async def life() -> None:
            with scope:
                async with trio.open_nursery() as nursery:
                    locks = self.table.member(nursery)
                    environment = Environment(
                        TrioRuntime(nursery), instance(number), clock or self.clock,
                        is_barred=self.is_barred,
                    )  # fmt: skip
                    device = FencedDevice(self.device)
                    fs = await FileSystem.mount(device, locks, environment, options)
                    box.append(Member(number, fs, locks, scope))
                    box[0].device = device  # type: ignore[attr-defined]
                    started.set()
                    await trio.sleep_forever()

        self.nursery.start_soon(life)
        with trio.fail_after(60):
            await started.wait()
        self.members[number] = box[0]
        return box[0].fs

    async def unmount(self, number: int) -> None:
        member = self.members[number]
        await member.fs.unmount()
        await member.locks.drop_all()
        del self.members[number]
        member.scope.cancel()

    def kill(self, number: int) -> Instance:
        """The mount is gone in the middle of whatever it did; its writes are fenced."""
        member = self.members.pop(number)
        member.device.dead = True  # type: ignore[attr-defined]
        member.locks.engine.dead = True  # type: ignore[attr-defined]
        self.dead.add(instance(number))
        self.engines = getattr(self, "engines", {})
        self.engines[number] = member.locks.engine
        member.scope.cancel()
        return instance(number)

    async def recover(self, number: int) -> None:
        """What the group does: the lowest survivor replays, then the locks of the dead go."""
        for member in self.members.values():
            member.fs.set_recovering(True)
        survivor = self.members[min(self.members)]
        await survivor.fs.recover(instance(number), frozenset(self.dead))
        self.dead.discard(instance(number))
        self.table.release_dead(self.engines[number])
        for member in self.members.values():
            member.fs.set_recovering(False)


class FencedDevice:
    """The path of one mount to the shared disk; `dead` lets nothing through any more."""

    def __init__(self, base: MemoryDevice) -> None:
        self.base = base
        self.dead = False

    def __getattr__(self, name: str) -> object:
        return self._nothing_ends if self.dead else getattr(self.base, name)

    async def _nothing_ends(self, *_arguments: object, **_named: object) -> None:
        """A task of the dead that was about to run still gets here before it is cancelled."""
        await trio.sleep_forever()


@asynccontextmanager
async def cluster(device: MemoryDevice) -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:
        made = Cluster(nursery, device)
        yield made
        for number in list(made.members):
            await made.unmount(number)
        nursery.cancel_scope.cancel()


async def fsck(device: MemoryDevice) -> None:
    report = await check(device)
    assert not report.errors, "\n".join(report.errors[:20])


async def tree_of(fs: FileSystem, data: Callable[[bytes], object] = bytes) -> dict[bytes, object]:
    """Everything in a file system by path: ("dir",), ("link", target) or ("file", content)."""
    result: dict[bytes, object] = {}

    async def visit(ino: int, path: bytes) -> None:
        cookie = 0
        while True:
            entries = await fs.readdir(ino, cookie, 7)
            if not entries:
                return
            cookie = entries[-1].cookie
            for entry in entries:
                if entry.name in (b".", b".."):
                    continue
                where = path + b"/" + entry.name
                attributes = await fs.getattr(entry.ino)
                assert attributes.mode & 0o170000 == entry.type
                if attributes.is_directory:
                    result[where] = ("dir",)
                    await visit(entry.ino, where)
                elif attributes.is_regular:
                    content = await fs.read(entry.ino, 0, attributes.size + 10)
                    assert len(content) == attributes.size
                    result[where] = ("file", data(content))
                else:
                    result[where] = ("link", await fs.readlink(entry.ino))

    await visit(fs.root_ino, b"")
    return result
