"""Several networks of a `GnbdDevice`: failing, slow, flapping, and what they have done."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from cluster.errors import DeviceError
from gnbd import protocol as p
from gnbd.client.path_choice import LOSSES
from tests.gnbd.test_client_io import eventually, opened, trio_test, verified_writer


def test_failover_and_return(server, relayed):
    """Networks break and come back in turn under load: no error, every byte right."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for index in range(8):
                    nursery.start_soon(verified_writer, device, index, stop)
                await eventually(lambda: device.status()["paths"] == [1, 1])
                for turn in range(4):
                    relays[turn % 2].cut()
                    await eventually(lambda t=turn: device.status()["paths"][t % 2] == 0)
                    await device.flush()
                    relays[turn % 2].heal()
                    await eventually(lambda: device.status()["paths"] == [1, 1])
                relays[0].cut()
                relays[1].cut()
                await eventually(lambda: device.status()["paths"] == [0, 0])
                relays[1].heal()
                await device.flush()
                stop.set()

    trio_test(body)


def test_a_slow_network_gets_less(server, relayed):
    """It is left after the first answers, asked again now and then, and used when it is alone."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            relays[0].delay_s = 0.1
            slow, fast = (path.lanes[0] for path in device.core.paths)
            number = 0
            while fast.answered < 100 + 3 * slow.answered:
                await device.write(number % 256 * 4096, bytes([number % 256]) * 4096)
                number += 1
            before = slow.answered, device.core.paths[0].health.sampled_ns(False)
            while device.core.paths[0].health.sampled_ns(False) == before[1]:
                await device.read(0, 4096)
            relays[1].cut()
            for number in range(20):
                got = await device.read(number * 4096, 4096)
                assert got == bytes([number]) * 4096
            assert slow.answered > before[0]

    trio_test(body)


def test_a_flapping_network_is_held_down(server, relayed):
    """It is up, but used only when the other one is away."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            for _ in range(LOSSES + 3):
                relays[0].cut()
                await eventually(lambda: device.status()["paths"] == [0, 1])
                relays[0].heal()
                await eventually(lambda: device.status()["paths"] == [1, 1])
            assert device.status()["standby"] == [True, False]
            good = device.core.paths[1].lanes[0]
            before = good.answered
            await device.write_many([(n * 8192, b"x" * 4096) for n in range(100)])
            assert good.answered >= before + 100
            relays[1].cut()
            assert await device.read(0, 4096) == b"x" * 4096
            assert device.status()["paths"] == [1, 0]

    trio_test(body)


def test_old_bytes_on_a_slow_network_never_land(server, relayed):
    """R6: a write stuck in one network is sent again on the other after its drain; when the stuck
    bytes arrive at last, newer data stays."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            relays[0].stall()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.write, 0, b"old!" * 1024)
                await trio.testing.wait_all_tasks_blocked()
                assert device.core.paths[0].lanes[0].in_flight
                relays[0].close_listener()
                device._scopes[0].cancel()
            await device.write(0, b"new!" * 1024)
            relays[0].release()
            await eventually(lambda: relays[0].pumps == 0)
            assert await device.read(0, 4096) == b"new!" * 1024

    trio_test(body)


def test_what_the_paths_have_done(server, relayed):
    """Also of connections that are gone, and what of theirs was repeated."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            await device.write(0, b"s" * 8192)
            await device.read(0, 4096)
            with pytest.raises(DeviceError):
                await device.read(device.size_bytes, 512)
            assert [path.state for path in device.stats()] == ["up", "up"]
            assert total(device, "failures") == 1
            assert total(device, "written_bytes") == 8192
            assert 4096 <= total(device, "read_bytes") < 8192
            assert any(path.service_us > 0 for path in device.stats())
            for relay in relays:
                relay.stall()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.write, 0, b"t" * 4096)
                await trio.testing.wait_all_tasks_blocked()
                writes = (r.kind == p.CMD_WRITE for r in in_flight(device, 0))
                used = 0 if any(writes) else 1
                relays[used].cut()
                await eventually(lambda: device.stats()[used].state == "down")
                relays[1 - used].release()
            assert device.stats()[used].connections == 0
            assert device.stats()[used].repeated == 1
            assert total(device, "written_bytes") == 8192 + 4096

    def total(device, name):
        return sum(getattr(path, name) for path in device.stats())

    def in_flight(device, index):
        return device.core.paths[index].lanes[0].in_flight.values()

    trio_test(body)
