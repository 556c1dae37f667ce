"""The same workload on the cores alone: several mounts in one task loop, on disks in memory.

No processes, no kernel, no network: hundreds of times faster, and everything follows from a seed.
What it cannot show is whether the real data path flushes when it is asked to.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import trio
import trio.testing

from cfs.attributes import BLOCK_BYTES, RENAME_EXCHANGE, MountOptions, SetAttributes
from cfs.errors import FsError
from cfs.filesystem import FileSystem
from cfs.mkfs_plan import Choices, plan, write_plan
from cfs.transaction import NotNow
from cluster.device import Buffer
from cluster.locks import Mode
from gnbd.server.filters.log_io import LOG_FLUSH, LOG_WRITE
from tests.cfs.harness import Cluster, instance
from tests.crash.agent import RANGES
from tests.crash.content import attribute_bytes, block_bytes, commit_bytes, stream
from tests.crash.disk import RamVolume
from tests.crash.record import Recording, make_things
from tests.crash.things import KINDS, NEVER_NS, Change, Thing
from tests.crash.writelog import Entry

SIZE_BYTES = 32 << 20
STRIPE_BYTES = 64 << 10
SERVERS = (1, 2)
FOLDERS = 3
HELD_MAX = 3
DISK_S = 0.0005
"""What a disk takes, on average."""
RECOVERY_S = 0.02
"""So long a recovery takes, about."""


class RecordingDevice:
    """A striped volume of two disks that notes what each of them does, and takes its time."""

    def __init__(self, rng: random.Random) -> None:
        self.volume = RamVolume(SIZE_BYTES, {})
        self.entries: list[Entry] = []
        self.clock = 0
        self._rng = rng

    size_bytes = SIZE_BYTES

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    async def _pause(self) -> None:
        """Time passes: nobody who waits for it, as a lock that is about to leave, may starve."""
        await trio.sleep(self._rng.expovariate(1 / DISK_S))

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        await self._pause()
        return await self.volume.read(offset_bytes, length_bytes)

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [await self.read(offset, length) for offset, length in ranges]

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        await self.write_many([(offset_bytes, data)], fua=fua)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        pieces = [piece for offset, data in parts for piece in _cut(offset, bytes(data))]
        self._rng.shuffle(pieces)
        for offset, data in pieces:
            await self._pause()
            self.volume.put(offset, data)
            at = self.tick()
            server = SERVERS[offset // STRIPE_BYTES % len(SERVERS)]
            self.entries.append(Entry(at, server, LOG_WRITE, fua, at, [(offset, data)]))

    async def flush(self) -> None:
        arrived = self.tick()
        for server in self._rng.sample(SERVERS, len(SERVERS)):
            await self._pause()
            self.entries.append(Entry(self.tick(), server, LOG_FLUSH, False, arrived, []))

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        await self.write_zeroes(offset_bytes, length_bytes)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        await self.write(offset_bytes, bytes(length_bytes))


def _cut(offset: int, data: bytes) -> list[tuple[int, bytes]]:
    pieces = []
    start = 0
    while start < len(data):
        size = min(STRIPE_BYTES - (offset + start) % STRIPE_BYTES, len(data) - start)
        pieces.append((offset + start, data[start : start + size]))
        start += size
    return pieces


class Client:
    """The verbs of `tests.crash.agent` on one mount without a kernel."""

    def __init__(self, fs: FileSystem) -> None:
        self.fs = fs
        self._held: list[int] = []
        self.verbs: dict[str, Callable[..., Awaitable[object]]] = {
            name: getattr(self, f"_{name}")
            for name in (
                "append", "truncate", "sync", "fresh", "block", "hold", "touch", "unlink",
                "rename", "link", "mkdir", "rmdir", "symlink", "range", "exchange", "attribute",
                "nameless",
            )
        }  # fmt: skip

    async def do(self, commands: list[list[Any]]) -> None:
        for verb, *arguments in commands:
            await self.verbs[verb](*arguments)

    async def _find(self, path: str) -> int:
        ino = self.fs.root_ino
        for name in path.encode().split(b"/"):
            if name != b".":
                ino = (await self.fs.lookup(ino, name)).ino
        return ino

    async def _parent(self, path: str) -> tuple[int, bytes]:
        top, _, name = path.rpartition("/")
        return await self._find(top or "."), name.encode()

    async def _make(self, path: str) -> int:
        parent, name = await self._parent(path)
        try:
            return (await self.fs.lookup(parent, name)).ino
        except FsError:
            return (await self.fs.create(parent, name, 0o644, 0, 0)).ino

    async def _settle(self, ino: int, how: str) -> None:
        if how in ("fsync", "fdatasync", "direct", "msync"):
            await self.fs.fsync(ino, datasync=how == "fdatasync")

    async def _append(self, path: str, seed: int, start: int, length: int, how: str) -> None:
        ino = await self._make(path)
        data = stream(seed, start, length)
        await self.fs.write(ino, 0, data, append=True, sync=how in ("dsync", "osync"))
        await self._settle(ino, how)

    async def _truncate(self, path: str, length: int, how: str) -> None:
        ino = await self._find(path)
        await self.fs.setattr(ino, SetAttributes(size=length))
        await self._settle(ino, how)

    async def _sync(self, path: str, how: str = "fsync") -> None:
        await self._settle(await self._find(path), how)

    async def _fresh(self, path: str, seed: int, version: int, how: str) -> None:
        ino = await self._make(path)
        await self.fs.setattr(ino, SetAttributes(size=0))
        await self._write(ino, commit_bytes(seed, version), sync=how in ("dsync", "osync"))
        await self._settle(ino, how)

    async def _write(self, ino: int, data: bytes, *, sync: bool) -> None:
        """From the start of a file; at once if that can be, as the mount process does it."""
        lock = self.fs.inode_lock(ino)
        if not sync and lock.try_hold(Mode.EX):
            try:
                self.fs.try_write_held(ino, 0, data, kill=True)
                return
            except NotNow:
                pass
            finally:
                lock.release(Mode.EX)
        await self.fs.write(ino, 0, data, sync=sync)

    async def _range(self, path: str, kind: str, index: int, how: str) -> None:
        ino = await self._find(path)
        await self.fs.fallocate(ino, RANGES[kind], index * BLOCK_BYTES, BLOCK_BYTES)
        await self._settle(ino, how)

    async def _exchange(self, one: str, two: str) -> None:
        await self.fs.rename(*await self._parent(one), *await self._parent(two), RENAME_EXCHANGE)

    async def _attribute(self, path: str, seed: int, version: int, how: str) -> None:
        ino = await self._find(path)
        if version:
            await self.fs.setxattr(ino, b"user.v", attribute_bytes(seed, version))
        else:
            await self.fs.removexattr(ino, b"user.v")
        await self._settle(ino, how)

    async def _nameless(self, path: str, seed: int, version: int) -> None:
        parent, name = await self._parent(path)
        ino = (await self.fs.tmpfile(parent, 0o644, 0, 0)).ino
        try:
            await self.fs.write(ino, 0, commit_bytes(seed, version))
            await self.fs.fsync(ino)
            await self.fs.link(ino, parent, name)
        finally:
            self.fs.close_ref(ino)

    async def _block(self, path: str, seed: int, index: int, version: int, how: str) -> None:
        ino = await self._find(path)
        data = block_bytes(seed, index, version)
        if how == "msync":
            lock = self.fs.inode_lock(ino)
            await lock.hold(Mode.EX)
            try:
                await self.fs.reserve_held(ino, index * BLOCK_BYTES, BLOCK_BYTES)
                await self.fs.write_held(ino, index * BLOCK_BYTES, data, laundered=True)
            finally:
                lock.release(Mode.EX)
        else:
            offset = index * BLOCK_BYTES
            await self.fs.write(ino, offset, data, sync=how == "dsync", direct=how == "direct")
        await self._settle(ino, how)

    async def _hold(self, path: str, seed: int) -> None:
        parent, name = await self._parent(path)
        ino = (await self.fs.create(parent, name, 0o600, 0, 0)).ino
        await self.fs.open_ref(ino)
        self._held.append(ino)
        await self.fs.write(ino, 0, stream(seed, 0, 100_000))
        await self.fs.unlink(parent, name)
        if len(self._held) > HELD_MAX:
            self.fs.close_ref(self._held.pop(0))

    async def _touch(self, path: str) -> None:
        place = await self._parent(path)
        try:
            self.fs.try_create(*place, 0o644, 0, 0, 0)
        except NotNow:
            await self.fs.create(*place, 0o644, 0, 0)

    async def _unlink(self, path: str) -> None:
        place = await self._parent(path)
        try:
            self.fs.try_remove(*place, directory=False)
        except NotNow:
            await self.fs.unlink(*place)

    async def _rename(self, old: str, new: str) -> None:
        places = (*await self._parent(old), *await self._parent(new))
        try:
            self.fs.try_rename(*places, 0)
        except NotNow:
            await self.fs.rename(*places)

    async def _link(self, old: str, new: str) -> None:
        await self.fs.link(await self._find(old), *await self._parent(new))

    async def _mkdir(self, path: str) -> None:
        await self.fs.mkdir(*await self._parent(path), 0o755, 0, 0)

    async def _rmdir(self, path: str) -> None:
        await self.fs.rmdir(*await self._parent(path))

    async def _symlink(self, target: str, path: str) -> None:
        await self.fs.symlink(*await self._parent(path), target.encode(), 0, 0)

    def close(self) -> None:
        while self._held:
            self.fs.close_ref(self._held.pop())


class Workers:
    """Tasks that change things through the mounts; one mount may be killed on the way."""

    def __init__(self, things: list[Thing], device: RecordingDevice, rng: random.Random) -> None:
        self.things = things
        self.device = device
        self.rng = rng
        self.left = 0
        self.busy: dict[int, tuple[int, int]] = {}
        """What is being changed: through which mount, and how many states it had before."""
        self.retired: set[int] = set()
        self.scopes: dict[int, list[trio.CancelScope]] = {}
        """Of the tasks of each mount."""

    async def apply(self, index: int, change: Change, client: Client) -> None:
        history = self.things[index].history
        if change.state is not None:
            history.begins.append(self.device.tick())
            history.states.append(change.state)
        await client.do(change.commands)
        if change.durable:
            history.marks.append((self.device.tick(), len(history.states) - 1))

    async def work_until_killed(
        self, client: Client, cluster: Cluster, number: int, scope: trio.CancelScope
    ) -> None:
        with scope:
            try:
                await self.work(client, number)
            except RuntimeError:
                if number in cluster.members:
                    raise  # Not because the disks no longer answer to the dead.

    async def until_worth_a_death(self, left: int, fs: FileSystem) -> None:
        """At `left` changes this mount has something to replay, or commits: most journals are empty
        most of the time, as what is committed is soon in its place."""
        journal = fs.core.journal
        commits = self.rng.random() < 0.5

        def worth_it() -> bool:
            return bool(journal.sealed or (journal.committed and not commits))

        while self.left > left or (self.left and not worth_it()):  # noqa: ASYNC110
            await trio.sleep(DISK_S / 10)

    def kill(self, number: int, cluster: Cluster) -> None:
        """A mount dies, with whoever works on it."""
        for scope in self.scopes[number]:
            scope.cancel()
        cluster.kill(number)
        self.retire_unsynced(number)

    async def work(self, client: Client, number: int) -> None:
        while self.left > 0:
            self.left -= 1
            free = [i for i in range(len(self.things)) if i not in self.busy.keys() | self.retired]
            if not free:
                return
            index = self.rng.choice(free)
            self.busy[index] = number, len(self.things[index].history.states)
            try:
                await self.apply(index, self.things[index].change(self.rng), client)
            except FsError:
                if self.things[index].history.until_ns == NEVER_NS:
                    raise  # Not because what was to be changed had gone with a mount.
            self.busy.pop(index, None)
            if self.rng.random() < 0.1:
                await client.fs.tick(checkpoint=self.rng.random() < 0.3)

    def retire_unsynced(self, dead: int) -> None:
        """A mount has died: what nobody synced may have gone with it."""
        for index, thing in enumerate(self.things):
            history = thing.history
            if index in self.busy or history.marks[-1][1] < len(history.states) - 1:
                self.retired.add(index)
        for index, (number, states) in self.busy.items():
            history = self.things[index].history
            if number != dead and history.marks[-1][1] < states - 1:
                history.until_ns = min(history.until_ns, self.device.tick())
        self.busy.clear()


async def record_pure(
    seed: int,
    *,
    changes: int,
    mounts: int = 3,
    each: int = 1,
    kill: bool = False,
    again: bool = False,
    kinds: Iterable[str] = tuple(KINDS),
) -> tuple[Recording, list[Entry], int]:
    """Run the workload; (what is known, what the disks did, their size). `kill`: a mount dies half
    way; `again`: so does another one while it replays the journal of the first."""
    rng = random.Random(seed)
    device = RecordingDevice(rng)
    choices = Choices(
        uuid=bytes(range(16)), hash_seed=bytes(range(16, 32)), now_ns=1_000_000,
        journals=4, journal_bytes=640 << 10, group_blocks=512,
    )  # fmt: skip
    await write_plan(device, plan(SIZE_BYTES // BLOCK_BYTES, choices))  # type: ignore[arg-type]
    begin = device.tick()
    workers = Workers(make_things(rng, FOLDERS, each, kinds), device, rng)
    async with trio.open_nursery() as nursery:
        cluster = Cluster(nursery, device)  # type: ignore[arg-type]
        clients = {}
        options = MountOptions(background=False, dirty_bytes_start=200_000, inode_pool=8)
        for number in range(1, mounts + 1):
            clients[number] = Client(await cluster.mount(number, options))
        await _prepare(workers, clients[1])
        workers.left = changes
        victims = [mounts, min(clients)] if again else [mounts] if kill else []
        await _run(workers, cluster, clients, victims)
        for number, client in clients.items():
            client.close()
            await cluster.unmount(number)
        nursery.cancel_scope.cancel()
    histories = [thing.history for thing in workers.things]
    return Recording(seed, "", {}, begin, histories), device.entries, SIZE_BYTES


async def _prepare(workers: Workers, client: Client) -> None:
    tops = [f"d{number}" for number in range(FOLDERS)]
    names = tops + [f"{top}/place{place}" for top in tops for place in range(3)]
    await client.do([["mkdir", name] for name in names] + [["sync", "."]])
    for index, thing in enumerate(workers.things):
        await workers.apply(index, thing.prepare(), client)


async def _run(
    workers: Workers, cluster: Cluster, clients: dict[int, Client], victims: list[int]
) -> None:
    """With the deaths of the victims half way; the second one replays the journal of the first."""
    half = workers.left // 2
    async with trio.open_nursery() as nursery:
        for number, client in clients.items():
            for _ in range(2):
                scope = trio.CancelScope()
                workers.scopes.setdefault(number, []).append(scope)
                nursery.start_soon(workers.work_until_killed, client, cluster, number, scope)
        if victims:
            await workers.until_worth_a_death(half, cluster.members[victims[0]].fs)
        for victim in victims:
            workers.kill(victim, cluster)
            del clients[victim]
            if victim != victims[-1]:
                await _begin_to_recover(workers, cluster, victim)
        for victim in victims:
            if instance(victim) in cluster.dead:
                await cluster.recover(victim)


async def _begin_to_recover(workers: Workers, cluster: Cluster, victim: int) -> None:
    """Returns at some moment of the recovery, at the latest when it has ended."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.recover, victim)
        await trio.sleep(workers.rng.uniform(0, RECOVERY_S))
        nursery.cancel_scope.cancel()


def run_pure(seed: int, **how: Any) -> tuple[Recording, list[Entry], int]:
    """`record_pure` with trio's scheduler in the seed's hands, too."""
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[attr-defined]
    trio._core._run._r.seed(seed)  # type: ignore[attr-defined]
    return trio.run(
        lambda: record_pure(seed, **how), clock=trio.testing.MockClock(autojump_threshold=0)
    )
