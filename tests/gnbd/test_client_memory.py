"""The memory of a `GnbdDevice`'s callers: filled, sent and given back when it must be."""

from __future__ import annotations

import os
from array import array

import pytest
import trio
import trio.testing

from cluster.errors import BarredError
from gnbd import messages as m
from gnbd.client.pieces import REQUEST_BYTES_MAX
from native import crc32c_blocks
from tests.gnbd.test_client_io import eventually, opened, trio_test


@pytest.mark.parametrize("several", [False, True])
def test_a_cancelled_reader_gets_its_memory_back(server, several):
    """What the server answers later goes nowhere, and the device goes on."""

    async def body():
        async with opened(server) as device:
            parts = 3 if several else 1
            size = parts * REQUEST_BYTES_MAX
            await device.write(0, b"r" * size)
            with server.control() as control:
                control.ask(m.FilterCommand("disk0", "add", "delay", {"read_ms": 400}), m.Done)
            memory = bytearray(size)
            with trio.move_on_after(0.1) as scope:
                await device.read_into(0, memoryview(memory))
            assert scope.cancelled_caught
            seen = bytes(memory)
            await eventually(lambda: not device.status()["pending"])
            assert memory == seen
            memory.clear()
            assert await device.read(512, 512) == b"r" * 512

    trio_test(body)


def test_a_cancelled_writer_may_use_its_memory_again(server, relayed):
    """More than the connections take in: what has not left is sent from a copy, also when the path
    breaks and all is sent once more."""
    info, relays = relayed
    count = 6

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            for relay in relays:
                relay.stall()
            size = count * REQUEST_BYTES_MAX
            memory = bytearray(b"w" * size)
            with trio.move_on_after(0.1) as scope:
                await device.write(0, memory)
            assert scope.cancelled_caught
            memory[:] = b"!" * size
            relays[0].cut()
            for relay in relays:
                relay.release()
            await eventually(lambda: not device.status()["pending"])
            memory.clear()  # not possible while anybody holds it
            assert await device.read(0, size) == b"w" * size

    trio_test(body)


def test_who_is_barred_gets_its_memory_back(server, relayed):
    """One path learns it while requests hang on the other: nothing fills their memory later."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            memories = [bytearray(4096), bytearray(1 << 20)]
            for relay in relays:
                relay.stall()
            async with trio.open_nursery() as nursery:
                for memory in memories:
                    nursery.start_soon(read_barred, device, memory)
                await trio.testing.wait_all_tasks_blocked()
                device._bar("for the test")
            for relay in relays:
                relay.release()

    async def read_barred(device, memory):
        with pytest.raises(BarredError):
            await device.read_into(0, memoryview(memory))
        assert not any(link._transport._pins for link in device._links.values())

    trio_test(body)


def test_checksums_of_the_same_call(server):
    """Of what is read and written, in several requests too; a caller that is cancelled gets its
    room back."""
    size = 2 * REQUEST_BYTES_MAX + 5 * 512

    async def body():
        async with opened(server) as device:
            data = os.urandom(size)
            right = crc32c_blocks(data, 4096)
            for length in (size, 4096, 512):
                blocks = -(-length // 4096)
                expected = right[:blocks] if length % 4096 == 0 else None
                sums = [array("I", bytes(4 * blocks)) for _ in range(2)]
                await device.write(0, data[:length], sums=sums[0])
                memory = bytearray(length)
                await device.read_into(0, memoryview(memory), sums=sums[1])
                assert memory == data[:length]
                assert sums[0] == sums[1] == (expected or crc32c_blocks(memory, 4096))
            with server.control() as control:
                control.ask(m.FilterCommand("disk0", "add", "delay", {"read_ms": 400}), m.Done)
            room = array("I", bytes(4))
            with trio.move_on_after(0.1) as scope:
                await device.read_into(0, memoryview(bytearray(4096)), sums=room)
            assert scope.cancelled_caught
            await eventually(lambda: not device.status()["pending"])
            assert room[0] == 0

    trio_test(body)


def test_memory_that_cannot_be_used(server):
    """It is refused before anything is sent, and nothing hangs afterwards."""

    async def body():
        async with opened(server) as device:
            with pytest.raises(TypeError):
                await device.read_into(0, memoryview(bytes(512)))
            with pytest.raises(TypeError):
                await device.read_into(0, memoryview(bytearray(1024))[::2])
            for call in (device.write, lambda o, d: device.write_many([(o, d)])):
                with pytest.raises(TypeError):
                    await call(0, memoryview(bytes(1024))[::2])
            await device.write(0, b"f" * 512)
            assert await device.read(0, 512) == b"f" * 512

    trio_test(body)
