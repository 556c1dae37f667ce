"""An open volume over RAM disks: the gate, dirty legs, epochs, map switches under load."""

from __future__ import annotations

import random
from collections.abc import Sequence

import msgspec
import pytest
import trio
import trio.testing

from cluster.control import ViewInfo
from cluster.device import Buffer, Written
from cluster.device_memory import MemoryDevice
from cluster.errors import BarredError, DeviceError, StackError
from cluster.ids import Epoch, ServerId
from cvm.allocate import Wanted, allocate
from cvm.bounded_io import BoundedDevice
from cvm.layout import Leg, VolumeMap, map_legs
from cvm.metadata import LvRecord, build_map
from cvm.target_io import VolumeClient, VolumeDevice
from tests.cvm.test_layout import EXTENT, vg_of

DISK_BYTES = (1 << 20) + 64 * EXTENT


class LegDisk(MemoryDevice):
    """A RAM disk that also remembers epochs and sequences."""

    def __init__(self) -> None:
        super().__init__(DISK_BYTES)
        self.required = Epoch(0)
        self.installed = Epoch(0)
        self.sequence = 0

    def set_epoch(self, required: Epoch) -> None:
        self.required = required

    def note_installed(self, epoch: Epoch) -> None:
        self.installed = epoch

    async def set_sequence(self, sequence: int) -> None:
        self.sequence = sequence


class Disks:
    def __init__(self) -> None:
        self.by_pv: dict[str, LegDisk] = {}

    async def open(self, leg: Leg, _map: VolumeMap) -> LegDisk:
        return self.by_pv.setdefault(leg.pv, LegDisk())


def maps(stripes: int = 2) -> tuple[VolumeMap, VolumeMap]:
    """A volume before and after an extension that adds a PV."""
    vg = vg_of([24, 24, 24])
    lv = LvRecord("vol0", "22" * 16, allocate(vg, None, Wanted(16, stripes, 16384)))
    vg = msgspec.structs.replace(vg, lvs=(lv,))
    larger = LvRecord("vol0", "22" * 16, allocate(vg, lv, Wanted(24, 3, 16384)))
    after = msgspec.structs.replace(vg, lvs=(larger,), sequence=2)
    return build_map(vg, lv), build_map(after, larger)


async def opened(stripes: int = 2) -> tuple[VolumeDevice, Disks]:
    disks = Disks()
    device = VolumeDevice("vg0/vol0", disks.open)
    await device.start(maps(stripes)[0])
    return device, disks


@pytest.mark.trio
async def test_reads_and_writes_meet_across_legs() -> None:
    for stripes in (1, 2):
        device, disks = await opened(stripes)
        rng = random.Random(stripes)
        model = bytearray(device.size_bytes)
        for _ in range(60):
            parts = []
            for _ in range(rng.randint(1, 3)):
                offset = rng.randrange(device.size_bytes // 512)
                length = min(rng.choice([1, 8, 100, 500]), device.size_bytes // 512 - offset)
                data = rng.randbytes(length * 512)
                end = offset * 512 + len(data)
                if all(end <= at or at + len(other) <= offset * 512 for at, other in parts):
                    parts.append((offset * 512, data))
            await device.write_many(parts)
            for offset, data in parts:
                model[offset : offset + len(data)] = data
            ranges = [(offset, len(data)) for offset, data in parts]
            assert await device.read_many(ranges) == [data for _, data in parts]
        await device.write_zeroes(512, 300 * 512)
        model[512 : 301 * 512] = bytes(300 * 512)
        await device.discard(0, 512)
        model[:512] = bytes(512)
        assert await device.read(0, device.size_bytes) == bytes(model)
        await device.flush()
        for disk in disks.by_pv.values():
            disk.crash()
        assert await device.read(0, device.size_bytes) == bytes(model)


@pytest.mark.trio
async def test_what_is_started_is_what_is_waited_for() -> None:
    """Reads and writes without a task, across legs, against the same bytes."""
    for stripes in (1, 2):
        device, _disks = await opened(stripes)
        rng = random.Random(stripes)
        model = bytearray(device.size_bytes)
        ends: list[Exception | None] = []
        assert device.can_start()
        for _ in range(60):
            offset = rng.randrange(device.size_bytes // 512 - 500) * 512
            data = bytearray(rng.randbytes(rng.choice([1, 8, 100, 500]) * 512))
            device.start_write([(offset, data)], ends.append)
            model[offset : offset + len(data)] = data
            data[:] = bytes(len(data))  # it is the caller's again
            start, length = rng.randrange(1000) * 512, rng.choice([1, 90, 500]) * 512
            found: list[bytes] = []

            def took(error: Exception | None, pieces: list[Buffer]) -> None:
                ends.append(error)  # noqa: B023
                found.append(b"".join(pieces))  # noqa: B023

            device.start_read(start, length, took)
            assert found == [model[start : start + length]]
        assert ends == [None] * 120
        assert await device.read(0, device.size_bytes) == bytes(model)


class HeldDisk(LegDisk):
    """Answers what was started when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Written] = []

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        super().start_write(parts, lambda _: self.answers.append(done))


async def opened_held() -> tuple[VolumeDevice, HeldDisk, HeldDisk]:
    disks = Disks()
    volume_map = maps()[0]
    for pv in map_legs(volume_map):
        disks.by_pv[pv] = HeldDisk()
    device = VolumeDevice("vg0/vol0", disks.open)
    await device.start(volume_map)
    first, second = disks.by_pv.values()
    assert isinstance(first, HeldDisk)
    assert isinstance(second, HeldDisk)
    return device, first, second


@pytest.mark.trio
async def test_a_change_waits_for_what_was_started() -> None:
    device, first, second = await opened_held()
    ends: list[Exception | None] = []
    device.start_write([(0, bytes(32768))], ends.append)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(device.suspend, 2, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert not device.can_start()
        assert device.in_flight == 1
        first.answers.pop()(None)
        assert (ends, device.in_flight) == ([], 1)
        second.answers.pop()(None)
    assert (ends, device.in_flight) == ([None], 0)


@pytest.mark.parametrize("barred_first", [True, False])
@pytest.mark.trio
async def test_the_worst_of_two_answers_counts_and_both_legs_are_flushed(
    barred_first: bool,
) -> None:
    device, first, second = await opened_held()
    await device.flush()
    flushes = first.flush_count, second.flush_count
    ends: list[Exception | None] = []
    device.start_write([(0, bytes(32768))], ends.append)
    errors = [BarredError("out"), DeviceError("broken")]
    one, other = errors if barred_first else errors[::-1]
    first.answers.pop()(one)
    second.answers.pop()(other)
    assert ends == [errors[0]]
    await device.flush()
    assert (first.flush_count, second.flush_count) == (flushes[0] + 1, flushes[1] + 1)


@pytest.mark.trio
async def test_flush_goes_to_dirty_legs_only() -> None:
    device, disks = await opened()
    first, second = disks.by_pv.values()
    await device.flush()
    assert (first.flush_count, second.flush_count) == (1, 1)
    await device.write(0, bytes(4096))
    await device.flush()
    assert (first.flush_count, second.flush_count) == (2, 1)
    await device.write(16384, bytes(4096), fua=True)
    await device.flush()
    assert (first.flush_count, second.flush_count) == (2, 1)
    device.set_epoch(Epoch(5))
    await device.flush()
    assert (first.flush_count, second.flush_count) == (3, 2)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.trio
async def test_what_a_failed_write_has_written_is_flushed(parts: int) -> None:
    device, disks = await opened()
    disk = next(iter(disks.by_pv.values()))
    await device.flush()
    flushes = disk.flush_count
    calls = 0

    async def hook(kind: str, _offset: int, _length: int) -> None:
        nonlocal calls
        calls += kind == "write"
        if kind == "write" and calls == parts:
            raise DeviceError("broken")

    disk.hook = hook
    with pytest.raises(DeviceError):
        await device.write_many([(8192 * number, bytes(512)) for number in range(parts)])
    await device.flush()
    assert disk.flush_count == flushes + 1


@pytest.mark.trio
async def test_no_flush_answers_for_another_one_that_is_under_way() -> None:
    device, disks = await opened()
    disk = next(iter(disks.by_pv.values()))
    release = trio.Event()
    ended = []

    async def hook(kind: str, _offset: int, _length: int) -> None:
        if kind == "flush":
            await release.wait()

    async def flush(name: str) -> None:
        await device.flush()
        ended.append(name)

    await device.flush()
    await device.write(0, bytes(512))
    disk.hook = hook
    async with trio.open_nursery() as nursery:
        nursery.start_soon(flush, "a")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(flush, "b")
        await trio.testing.wait_all_tasks_blocked()
        assert ended == []
        release.set()
    assert disk.unflushed_count == 0


@pytest.mark.trio
async def test_suspend_waits_for_what_is_in_flight_and_holds_the_rest() -> None:
    device, disks = await opened()
    disk = next(iter(disks.by_pv.values()))
    release = trio.Event()
    order = []

    async def hook(kind: str, _offset: int, _length: int) -> None:
        if kind == "write":
            await release.wait()

    async def write(name: str) -> None:
        await device.write(0, bytes(512))
        order.append(name)

    async def suspend() -> None:
        await device.suspend(2, 0)
        order.append("suspended")

    disk.hook = hook
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, "before")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(suspend)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(write, "after")
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        release.set()
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["before", "suspended"]
        assert device.in_flight == 0
        await device.resume(maps()[1])
    assert order == ["before", "suspended", "after"]
    assert device.size_bytes == maps()[1].size_bytes
    assert all(one.sequence == 2 for one in disks.by_pv.values())


@pytest.mark.trio
async def test_switches_under_load_tear_nothing() -> None:
    """Writers and readers go on while the map is switched many times; no request sees an error, and
    none runs while the gate is closed."""
    device, disks = await opened()
    old, new = maps()
    rng = random.Random(3)
    blocks = old.size_bytes // 4096
    model: dict[int, bytes] = {}
    quiet = False

    async def hook(_kind: str, _offset: int, _length: int) -> None:
        assert not quiet, "a request passed the closed gate"
        await trio.lowlevel.checkpoint()

    for disk in disks.by_pv.values():
        disk.hook = hook

    async def work(lane: int) -> None:
        for _ in range(150):
            block = rng.randrange(blocks // 4) * 4 + lane
            data = rng.randbytes(4) * 1024
            await device.write(block * 4096, data)
            model[block] = data
            assert await device.read(block * 4096, 4096) == data
            if rng.random() < 0.1:
                await device.flush()

    async def switch() -> None:
        nonlocal quiet
        for number in range(40):
            await device.suspend(2 + number, 0)
            quiet = True
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            assert device.in_flight == 0
            quiet = False
            await device.resume(msgspec.structs.replace(new, sequence=2 + number))

    async with trio.open_nursery() as nursery:
        for lane in range(4):
            nursery.start_soon(work, lane)
        nursery.start_soon(switch)
    for block, data in model.items():
        assert await device.read(block * 4096, 4096) == data


@pytest.mark.trio
async def test_an_abandoned_change_resumes_with_the_old_map() -> None:
    device, _ = await opened()
    await device.suspend(2, 0)
    assert device.suspended
    await device.resume(maps()[0])
    assert not device.suspended
    assert await device.read(0, 512) == bytes(512)


@pytest.mark.trio
async def test_older_maps_and_late_suspends_are_ignored() -> None:
    device, _ = await opened()
    await device.resume(maps()[1])
    await device.resume(maps()[0])
    assert device.map == maps()[1]
    await device.suspend(2, 0)
    assert not device.suspended


@pytest.mark.trio
async def test_what_a_coordinator_sent_before_it_was_overtaken_moves_no_gate() -> None:
    old, new = (msgspec.structs.replace(one, claim=5) for one in maps())
    device, _ = await opened()
    await device.resume(old)
    with pytest.raises(StackError, match="given up or taken over"):
        await device.suspend(2, 4)
    assert await device.read(0, 512) == bytes(512)
    await device.suspend(2, 6)
    await device.resume(old)
    assert device.suspended
    await device.resume(msgspec.structs.replace(new, claim=6))
    assert await device.read(0, 512) == bytes(512)


@pytest.mark.trio
async def test_a_leg_that_is_barred_bars_the_volume_and_errors_come_through() -> None:
    device, disks = await opened()
    first, second = disks.by_pv.values()

    def failing(error: StackError):
        async def hook(*_args: object) -> None:
            raise error

        return hook

    first.hook = failing(DeviceError("broken"))
    with pytest.raises(DeviceError):
        await device.write(0, bytes(1 << 16))
    second.hook = failing(BarredError("out"))
    with pytest.raises(BarredError):
        await device.read(0, 1 << 16)
    assert device.in_flight == 0


class FakeSession:
    """A clusterd that answers `volume.open`, perhaps after calling back."""

    def __init__(self, client: VolumeClient, before) -> None:
        self.client, self.before, self.calls = client, before, []

    async def call(self, method: str, params: dict):
        self.calls.append(method)
        if method == "volume.open":
            return await self.before(self.client.handlers(), params)
        return {}


def view(epoch: int, installed: list[int]) -> ViewInfo:
    return ViewInfo(Epoch(epoch), [], [ServerId(one) for one in installed], True)


@pytest.mark.trio
async def test_client_opens_suspends_resumes_and_closes() -> None:
    client, disks = VolumeClient(), Disks()

    async def answer(_handlers, _params):
        return msgspec.to_builtins(maps()[0])

    session = FakeSession(client, answer)
    client.on_view(view(3, [129]))
    device = await client.open(session, "vg0/vol0", "sharedwrite", disks.open)
    assert {disk.required for disk in disks.by_pv.values()} == {3}
    assert [disk.installed for disk in disks.by_pv.values()] == [3, 0]
    client.on_view(view(4, [129, 130]))
    assert {disk.installed for disk in disks.by_pv.values()} == {4}
    client.on_view(view(2, []))
    assert {disk.required for disk in disks.by_pv.values()} == {4}
    await client.handlers()["volume.suspend"]({"volume": "vg0/vol0", "sequence": 2, "claim": 0})
    assert device.suspended
    new = msgspec.to_builtins(maps()[1])
    await client.handlers()["volume.resume"]({"volume": "vg0/vol0", "map": new})
    assert device.map == maps()[1]
    unknown = {"volume": "vg0/none", "sequence": 9, "claim": 0}
    assert await client.handlers()["volume.suspend"](unknown) == {}
    await client.close(session, "vg0/vol0")
    assert session.calls == ["volume.open", "volume.close"]
    with pytest.raises(StackError, match="closed"):
        await device.read(0, 512)


@pytest.mark.trio
async def test_a_leg_that_a_change_opens_hears_of_the_view_that_came_meanwhile() -> None:
    """No later view repeats it: the leg would wait for its server's install for ever."""
    client, disks = VolumeClient(), Disks()
    old, new = maps()

    async def open_leg(leg: Leg, volume_map: VolumeMap) -> LegDisk:
        if volume_map == new:
            client.on_view(view(4, [129, 130, 131]))
        return await disks.open(leg, volume_map)

    async def answer(_handlers, _params):
        return msgspec.to_builtins(old)

    client.on_view(view(3, [129, 130, 131]))
    device = await client.open(FakeSession(client, answer), "vg0/vol0", "sharedwrite", open_leg)
    await device.resume(new)
    assert len(disks.by_pv) == 3
    assert {(disk.required, disk.installed) for disk in disks.by_pv.values()} == {(4, 4)}


@pytest.mark.trio
async def test_a_change_may_overtake_the_answer_to_open() -> None:
    """Suspend and resume come before the answer that carries the old map: the new map stays."""
    client, disks = VolumeClient(), Disks()

    async def answer(handlers, _params):
        await handlers["volume.suspend"]({"volume": "vg0/vol0", "sequence": 2, "claim": 0})
        new = msgspec.to_builtins(maps()[1])
        await handlers["volume.resume"]({"volume": "vg0/vol0", "map": new})
        return msgspec.to_builtins(maps()[0])

    device = await client.open(FakeSession(client, answer), "vg0/vol0", "sharedwrite", disks.open)
    assert device.map == maps()[1]

    client = VolumeClient()

    async def suspended(handlers, _params):
        await handlers["volume.suspend"]({"volume": "vg0/vol0", "sequence": 2, "claim": 0})
        return msgspec.to_builtins(maps()[0])

    session = FakeSession(client, suspended)
    device = await client.open(session, "vg0/vol0", "sharedwrite", disks.open)
    assert device.suspended
    with trio.move_on_after(0) as scope:
        await device.read(0, 512)
    assert scope.cancelled_caught
    await client.handlers()["volume.resume"](
        {"volume": "vg0/vol0", "map": msgspec.to_builtins(maps()[1])}
    )
    assert await device.read(0, 512) == bytes(512)


@pytest.mark.trio
async def test_a_failed_open_leaves_nothing() -> None:
    client, disks = VolumeClient(), Disks()

    async def answer(_handlers, _params):
        raise StackError("no such volume")

    for _ in range(2):
        with pytest.raises(StackError, match="no such volume"):
            await client.open(FakeSession(client, answer), "vg0/x", "sharedwrite", disks.open)


@pytest.mark.trio
async def test_a_cancelled_write_counts_as_in_flight_until_the_leg_is_idle() -> None:
    """A leg carries a request to its end even if nobody waits for it any more."""
    device, disks = await opened()
    disk = next(iter(disks.by_pv.values()))
    pending = [1]
    disk.status = lambda: {"pending": pending[0]}  # type: ignore[attr-defined]
    for other in disks.by_pv.values():
        if other is not disk:
            other.status = lambda: {"pending": 0}  # type: ignore[attr-defined]

    async def hook(*_args: object) -> None:
        await trio.sleep_forever()

    disk.hook = hook
    with trio.move_on_after(0.01):
        await device.write(0, bytes(512))
    assert device.in_flight == 0
    with trio.move_on_after(0.05) as scope:
        await device.suspend(2, 0)
    assert scope.cancelled_caught
    pending[0] = 0
    await device.suspend(2, 0)
    assert device.suspended


@pytest.mark.trio
async def test_buffers_side_by_side_on_a_leg_are_one_request() -> None:
    device, disks = await opened()
    seen = []

    async def hook(kind: str, offset: int, length: int) -> None:
        seen.append((kind, length))

    for disk in disks.by_pv.values():
        disk.hook = hook
    await device.write(0, bytes(256 * 1024))
    assert await device.read(0, 256 * 1024) == bytes(256 * 1024)
    assert seen == [("write", 128 * 1024)] * 2 + [("read", 128 * 1024)] * 2


@pytest.mark.trio
async def test_bounded_reads_end(autojump_clock) -> None:
    disk = MemoryDevice(1 << 20)
    device = BoundedDevice("s1/disk0", disk)
    await device.write(0, b"x" * 512)
    assert await device.read(0, 512) == b"x" * 512

    async def hook(*_args: object) -> None:
        await trio.sleep_forever()

    disk.hook = hook
    with pytest.raises(DeviceError, match="does not answer"):
        await device.read(0, 512)


@pytest.mark.trio
async def test_a_server_that_is_away_does_not_hold_up_a_resume(autojump_clock) -> None:
    device, disks = await opened()
    disk = next(iter(disks.by_pv.values()))

    async def away(_sequence: int) -> None:
        await trio.sleep_forever()

    disk.set_sequence = away  # type: ignore[method-assign]
    await device.suspend(2, 0)
    await device.resume(maps()[0])
    await device.suspend(2, 0)
    await device.resume(maps()[1])
    assert not device.suspended
    assert await device.read(0, 512) == bytes(512)
