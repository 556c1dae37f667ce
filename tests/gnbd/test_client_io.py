"""`GnbdDevice` against real server processes."""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

import pytest
import trio
import trio.testing

from cluster.errors import BarredError, DeviceError, ForeignError, StackError, UsageError
from cluster.ids import Epoch
from gnbd import messages as m
from gnbd.client.device_io import GnbdDevice, open_device
from gnbd.client.pieces import REQUEST_BYTES_MAX
from gnbd.client.retained import RETAINED_BYTES_MAX
from lab import block_server
from lab.block_server import export_toml, instance, member, running
from tests.gnbd.conftest import MEMBERS

ME = instance(1)
KIB = 1024
DEADLINE_S = 60


def opened(server, who=ME, export="disk0", info=None, deadline_s=DEADLINE_S, **options):
    return block_server.opened(server, who, export, info, deadline_s, **options)


def trio_test(body: Callable[..., Awaitable[None]], *arguments: object) -> None:
    trio.run(body, *arguments)


async def eventually(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.005)


async def verified_writer(device: GnbdDevice, index: int, stop: trio.Event) -> None:
    """Write one block again and again until told to stop, and read each time what was written."""
    count = 0
    while not stop.is_set():
        data = bytes([index, count % 256]) * 2048
        await device.write(index * 4096, data)
        assert await device.read(index * 4096, 4096) == data
        count += 1


def test_every_operation(server):
    """Sizes from a sector to more than one request, all kinds, many at once."""

    async def body():
        async with opened(server, connections_per_path=2) as device:
            assert device.size_bytes == 256 << 20
            big = os.urandom(9 << 20)
            await device.write(1 << 20, big)
            assert await device.read(1 << 20, len(big)) == big
            parts = [(i * 8192, os.urandom(4096)) for i in range(100)]
            await device.write_many(parts, fua=True)
            assert await device.read_many([(o, 4096) for o, _ in parts]) == [d for _, d in parts]
            view = memoryview(bytearray(300 * KIB))
            await device.read_into(1 << 20, view)
            assert view == big[: 300 * KIB]
            await device.write_zeroes(1 << 20, 64 * KIB)
            await device.discard(2 << 20, 64 * KIB)
            assert await device.read(1 << 20, 64 * KIB) == bytes(64 * KIB)
            source = bytearray(b"q" * 4096)
            await device.write(0, memoryview(source))
            source[:] = b"x" * 4096  # the device must not see this any more
            await device.flush()
            assert await device.read(0, 4096) == b"q" * 4096
            assert await device.read_many([]) == []
            await device.write_many([])

    trio_test(body)
    server.kill()
    assert (server.directory / "disk0.img").read_bytes()[:4096] == b"q" * 4096


class Ends:
    """How requests without a task ended."""

    def __init__(self):
        self.all = []
        self.read = b""

    def wrote(self, error):
        self.all.append(error)

    def took(self, error, pieces):
        self.all.append(error)
        self.read = b"".join(pieces)


def test_requests_without_a_task(server):
    """What was started ends with a call; the memory of it is free again at once."""

    async def body():
        async with opened(server) as device:
            assert device.can_start()
            ends = Ends()
            datas = [bytearray(os.urandom(n)) for n in (4096, 512 * KIB, 1 << 20)]
            wanted = b"".join(datas)
            offset = 0
            parts = []
            for data in datas:
                parts.append((offset, memoryview(data)))
                offset += len(data)
            device.start_write(parts, ends.wrote)
            for data in datas:
                data[:] = bytes(len(data))
            await eventually(lambda: ends.all == [None])
            device.start_read(0, offset, ends.took)
            await eventually(lambda: len(ends.all) == 2)
            assert ends.read == wanted
            gone = weakref.ref(ends)
            ends = None
            assert gone() is None, "a circle: only the collector would free what was read"
        ends = Ends()
        device.start_write([(0, bytes(4096))], ends.wrote)
        device.start_read(0, 4096, ends.took)
        assert [type(error) for error in ends.all] == [StackError, StackError]

    gc.disable()
    try:
        trio_test(body)
    finally:
        gc.enable()


def test_many_tasks(server):
    """A few hundred tasks with requests of mixed sizes, each seeing its own bytes."""

    async def one(device, index):
        chance = random.Random(index)
        for _ in range(10):
            offset = index * (512 * KIB) + chance.randrange(100) * 512
            data = chance.randbytes(512 * chance.choice([1, 8, 64, 600]))[: 460 * KIB]
            await device.write(offset, data)
            assert await device.read(offset, len(data)) == data

    async def body():
        async with opened(server) as device, trio.open_nursery() as nursery:
            for index in range(200):
                nursery.start_soon(one, device, index)

    trio_test(body)


def test_server_killed_again_and_again(server):
    """kill -9, at random, of a server whose cache is volatile, under four clients: no flushed and
    no acknowledged byte is lost, and they only see a delay."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    latest: dict[int, bytes] = {}
    durable: dict[int, bytes] = {}
    written = [0]

    async def writer(device, index, stop):
        chance = random.Random(seed + index)
        count = 0
        while not stop.is_set():
            block = chance.randrange(8) * 8 + index
            data = f"{index} {count}".encode().ljust(4096, b".")
            await device.write(block * 4096, data, fua=chance.random() < 0.1)
            latest[block] = data
            count += 1
            written[0] += 1
            if chance.random() < 0.05:
                seen = {b: d for b, d in latest.items() if b % 8 == index}
                await device.flush()
                durable.update(seen)

    async def killer(stop):
        chance = random.Random(seed)
        for _ in range(4):
            goal = written[0] + chance.randrange(10, 500)
            await eventually(lambda g=goal: written[0] >= g)
            server.kill()
            image = (server.directory / "disk0.img").read_bytes()
            for block, data in list(durable.items()):
                stored = image[block * 4096 : block * 4096 + 4096]
                assert order(stored) >= order(data), block
            server.start()
            server.install(1, MEMBERS)
        stop.set()

    def order(data: bytes) -> int:
        return int(data.split(b".")[0].split()[1]) if data[0] else -1

    async def body():
        async with AsyncExitStack() as stack:
            devices = [
                await stack.enter_async_context(opened(server, instance(number)))
                for number in range(1, 5)
            ]
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(killer, stop)
                for index in range(8):
                    nursery.start_soon(writer, devices[index % 4], index, stop)
            for block in latest:
                for device in devices:
                    assert await device.read(block * 4096, 4096) == latest[block]
            for device in devices:
                await device.flush()

    trio_test(body)
    server.kill()
    image = (server.directory / "disk0.img").read_bytes()
    for block, data in latest.items():
        assert image[block * 4096 : block * 4096 + 4096] == data


def test_unflushed_writes_survive_the_server(server):
    """The plain case: acknowledged, not flushed, server dies, comes back: the bytes are there."""

    async def body():
        async with opened(server) as device:
            await device.write(0, b"a" * 4096)
            await device.flush()
            await device.write(0, b"b" * 8192)
            await device.write(4096, b"c" * 8192, fua=True)
            await device.write_zeroes(0, 512)
            server.kill()
            assert (server.directory / "disk0.img").read_bytes()[:4096] == b"a" * 4096
            server.start()
            server.install(1, MEMBERS)
            expected = bytes(512) + b"b" * 3584 + b"c" * 8192
            assert await device.read(0, len(expected)) == expected
            await device.flush()
            server.kill()
            assert (server.directory / "disk0.img").read_bytes()[: len(expected)] == expected

    trio_test(body)


def test_barred(server):
    """An install without us: requests end with BarredError, for ever, and so does a new device."""

    async def body():
        async with opened(server) as device:
            await device.write(0, b"a" * 4096)
            await trio.to_thread.run_sync(lambda: server.install(2, member(live=(2,), next_=3)))
            with pytest.raises(BarredError):
                await device.write(0, b"b" * 4096)
            with pytest.raises(BarredError):
                await device.flush()
            async with trio.open_nursery() as nursery:
                with pytest.raises(BarredError):
                    await open_device(server.info, "disk0", ME, server.secret(ME), nursery)

    trio_test(body)


def test_epoch_gate(server):
    """R3: after set_epoch nothing is sent before the server has installed that epoch."""

    async def body():
        async with opened(server) as device:
            await device.write(0, b"a" * 4096)
            device.set_epoch(Epoch(2))
            done = trio.Event()

            async def reader():
                await device.read(0, 4096)
                done.set()

            before = server.report("disk0").counters["reads"]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reader)
                await trio.testing.wait_all_tasks_blocked()
                assert server.report("disk0").counters["reads"] == before
                assert not done.is_set()
                await trio.to_thread.run_sync(lambda: server.install(2, MEMBERS))
                device.note_installed(Epoch(2))
            assert done.is_set()

    trio_test(body)


def test_a_slow_server_is_not_dead(tmp_path):
    """Each request takes longer than `dead_ms`, and more is sent than the server takes in: its
    closed window is no reason to begin anew, which would go on for ever."""
    exports = export_toml("disk0", tmp_path / "d.img", "cluster", "64M", '"delay:write_ms=1500"')

    async def body(server):
        async with opened(server, dead_ms=1000) as device:
            path = device.core.paths[0]
            before = path.generation
            parts = [(i * REQUEST_BYTES_MAX, bytes([i]) * REQUEST_BYTES_MAX) for i in range(4)]
            await device.write_many(parts)
            assert path.generation == before
            for offset, data in parts:
                assert await device.read(offset, len(data)) == data

    with running(tmp_path, exports) as server:
        server.install(1, MEMBERS)
        trio_test(body, server)


def test_usage_and_store_errors(server):
    """No such export: UsageError at open. Past the end, store error: DeviceError, and go on."""

    async def body():
        async with trio.open_nursery() as nursery:
            with pytest.raises(UsageError):
                await open_device(server.info, "nope", ME, server.secret(ME), nursery)
        async with opened(server) as device:
            with pytest.raises(DeviceError, match="past the end"):
                await device.read(device.size_bytes, 512)
            with server.control() as control:
                command = {"operation": "read", "count": 1}
                control.ask(m.FilterCommand("disk0", "add", "error", command), m.Done)
            with pytest.raises(DeviceError, match="I/O error"):
                await device.read(0, 512)
            assert await device.read(0, 512) == bytes(512)

    trio_test(body)


def change_filter(server, action, kind, **parameters):
    with server.control() as control:
        control.ask(m.FilterCommand("disk0", action, kind, parameters), m.Done)


def test_a_bad_range_fails_alone(server):
    """Many tasks, errors in one range: who touches it is told, all others notice nothing."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    bad = range(20, 30)
    kept = {}

    async def one(device, number):
        chance = random.Random(seed + number)
        for count in range(20):
            block, length = 8 * chance.randrange(8) + number, 4096 * chance.choice((1, 1, 2))
            if block in bad or (length > 4096 and block + 1 in bad):
                with pytest.raises(DeviceError, match="I/O error"):
                    await device.write(block * 4096, bytes(length))
                with pytest.raises(DeviceError, match="I/O error"):
                    await device.read(block * 4096, length)
            else:
                kept[block] = f"{number} {count}".encode().ljust(4096, b".")
                await device.write(block * 4096, kept[block])
                assert await device.read(block * 4096, 4096) == kept[block]

    async def body():
        async with opened(server, connections_per_path=2) as device:
            change_filter(server, "add", "error", offset=20 * 4096, length=10 * 4096)
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(one, device, number)
            change_filter(server, "remove", "error")
            await device.flush()
            for block, data in kept.items():
                assert await device.read(block * 4096, 4096) == data
            assert await device.read(20 * 4096, 10 * 4096) == bytes(10 * 4096)

    trio_test(body)


def test_a_disk_that_refuses_what_is_written_again(server):
    """After a restart: everything waits, and goes on when the disk is well again."""

    def refused() -> int:
        return server.report("disk0").filter_reports["stats"].get("write_errors", 0)

    async def body():
        async with opened(server) as device:
            await device.write(0, b"a" * 4096)
            server.kill()
            server.exports = export_toml(
                "disk0", server.directory / "disk0.img", "cluster", "256M",
                '"volatile", "error:operation=write", "stats"',
            )  # fmt: skip
            server.start()
            server.install(1, MEMBERS)
            await eventually(lambda: refused() >= 3)
            change_filter(server, "remove", "error")
            assert await device.read(0, 4096) == b"a" * 4096
            await device.flush()
            server.kill()
            assert (server.directory / "disk0.img").read_bytes()[:4096] == b"a" * 4096

    trio_test(body)


def test_another_disk_behind_the_name_is_not_used(tmp_path):
    """Two disks of a server change places while it is down: nothing is written to the wrong one,
    not even what had been acknowledged and is sent again."""
    first, second = (tmp_path / f"{name}.img" for name in ("one", "two"))

    def exports(zero, one):
        both = (("disk0", zero), ("disk1", one))
        return "".join(export_toml(n, path, "cluster", "16M", '"volatile"') for n, path in both)

    async def body():
        begins_with_a = {"is_ours": lambda head: head.startswith(b"a")}
        async with opened(server) as device:
            await device.write(0, b"a" * 4096, fua=True)
        async with opened(server, **begins_with_a) as device, trio.open_nursery() as nursery:
            await device.write(4096, b"b" * 4096)
            server.kill()
            server.exports = exports(second, first)
            server.start()
            server.install(1, MEMBERS)
            nursery.start_soon(partial(device.write, 8192, b"c" * 4096, fua=True))
            await eventually(lambda: "another disk" in str(device.status()["problems"]))
            with pytest.raises(ExceptionGroup) as caught:
                async with opened(server, **begins_with_a):
                    pass
            assert caught.group_contains(ForeignError, match="another disk")
            server.kill()
            assert second.read_bytes() == bytes(16 << 20)
            server.exports = exports(first, second)
            server.start()
            server.install(1, MEMBERS)
            await device.flush()
        server.kill()
        assert first.read_bytes()[:12288] == b"a" * 4096 + b"b" * 4096 + b"c" * 4096

    with running(tmp_path, exports(first, second)) as server:
        server.install(1, MEMBERS)
        trio_test(body)


def test_a_disk_whose_beginning_cannot_be_read_is_used(tmp_path):
    """Nothing says that it is another one."""
    broken = '"error:operation=read,offset=0,length=4096"'
    exports = export_toml("disk0", tmp_path / "disk0.img", "cluster", "16M", broken)

    async def body():
        async with opened(server, is_ours=lambda _head: False) as device:
            await device.write(4096, b"x" * 4096)
            assert await device.read(4096, 4096) == b"x" * 4096

    with running(tmp_path, exports) as server:
        server.install(1, MEMBERS)
        trio_test(body)


def test_failed_flush_is_told_and_repaired(server):
    """R7: fdatasync fails once: the caller learns it; the next flush makes all of it durable."""

    async def body():
        async with opened(server) as device:
            await device.write(0, b"a" * 4096)
            with server.control() as control:
                command = {"operation": "flush", "count": 1}
                control.ask(m.FilterCommand("disk0", "add", "error", command), m.Done)
            with pytest.raises(DeviceError):
                await device.flush()
            await device.flush()
            server.kill()
            assert (server.directory / "disk0.img").read_bytes()[:4096] == b"a" * 4096

    trio_test(body)


def test_retained_bytes_are_bounded(server):
    """A writer that never flushes makes the device flush by itself."""

    async def body():
        async with opened(server) as device:
            data = os.urandom(1 << 20)
            async with trio.open_nursery() as nursery:
                for index in range(200):
                    nursery.start_soon(device.write, index << 20, data)
            assert device.core.retained.bytes <= RETAINED_BYTES_MAX
            assert server.report("disk0").counters["flushes"] >= 2

    trio_test(body)


def test_clean_close_unregisters(server):
    """aclose: the registration of the instance goes."""

    async def body():
        async with opened(server) as device:
            await device.write(0, b"a" * 512)

    trio_test(body)
    with server.control() as control:
        assert control.ask(m.ReserveIn("disk0"), m.ReserveReport).registrations == []


def test_a_lone_caller_that_takes_replies(server, relayed):
    """It is cancelled, another caller comes meanwhile, the instance is barred: nobody waits for a
    connection that says nothing."""
    info, relays = relayed

    async def read_first(device, done):
        with pytest.raises(BarredError):
            await device.read(0, 4096)
        done.append(True)

    def stall():
        for relay in relays:
            relay.stall()

    def release():
        for relay in relays:
            relay.release()

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            data = os.urandom(8192)
            await device.write(0, data)
            stall()
            with trio.move_on_after(0.05) as scope:
                await device.read(0, 4096)
            assert scope.cancelled_caught
            got = []

            async def second():
                got.append(await device.read(4096, 4096))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(second)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(second)
                await trio.testing.wait_all_tasks_blocked()
                release()
            assert got == [data[4096:]] * 2
            await eventually(lambda: not device.status()["pending"])
            assert await device.read(0, 4096) == data[:4096]
            stall()
            done = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_first, device, done)
                await trio.testing.wait_all_tasks_blocked()
                device.core.bar("for the test")
                await eventually(lambda: bool(done))
            release()

    trio_test(body)
