"""What callers of a device may do: give up, write again, use any memory, end the device."""

from __future__ import annotations

import os
from array import array

import pytest
import trio

from cluster.errors import StackError
from gnbd import messages as m
from gnbd.client.device_io import open_device
from gnbd.client.pieces import REQUEST_BYTES_MAX
from lab.block_server import instance
from tests.gnbd.test_client_io import DEADLINE_S, ME, eventually, opened, trio_test

BLOCK = 4096


def test_a_write_after_a_cancelled_one_at_the_same_place(server, relayed):
    """The first one hangs in a network, is cancelled, and is sent again on the other one later: not
    over what has been written there since."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info, path_ms=10_000) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            for relay in relays:
                relay.stall()
            with trio.move_on_after(0.1) as scope:
                await device.write(0, b"old!" * 1024)
            assert scope.cancelled_caught
            (lane,) = (one for path in device.core.paths for one in path.lanes if one.in_flight)
            other = device.core.paths[1 - lane.path.index].lanes[0]
            lane.bytes_in_flight += 64 << 20  # the other one is the better one now
            relays[other.path.index].release()
            async with trio.open_nursery() as nursery:

                async def write_again():
                    await device.write(0, b"new!" * 1024)

                nursery.start_soon(write_again)
                await eventually(lambda: device.core.queue or other.answered)
                relays[lane.path.index].cut()
                relays[lane.path.index].release()
            await eventually(lambda: not device.status()["pending"])
            assert await device.read(0, BLOCK) == b"new!" * 1024

    trio_test(body)


@pytest.mark.parametrize("size", [BLOCK, REQUEST_BYTES_MAX + BLOCK])
def test_views_of_wider_items(server, size):
    """Their length is not that of their bytes."""

    async def body():
        async with opened(server) as device:
            words = array("Q", os.urandom(size))
            square = memoryview(bytearray(words.tobytes())).cast("B", (8, size // 8))
            await device.write(0, memoryview(words))
            await device.write_many([(2 * size, memoryview(words)), (4 * size, square)], fua=True)
            for start in (0, 2 * size, 4 * size):
                assert await device.read(start, size) == words.tobytes()
            if size == BLOCK:
                done = []
                device.start_write([(6 * size, memoryview(words))], done.append)
                await eventually(lambda: done == [None])
                assert await device.read(6 * size, size) == words.tobytes()

    trio_test(body)


def test_who_waits_for_a_device_whose_tasks_are_cancelled(server):
    """It ends with an error, and so does who comes later."""

    async def body():
        ended = []

        async def read(device):
            with pytest.raises(StackError, match="closed"):
                await device.read(0, BLOCK)
            ended.append(device)

        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as callers:
                async with trio.open_nursery() as nursery:
                    secret = server.secret(ME)
                    device = await open_device(server.info, "disk0", ME, secret, nursery)
                    server.kill()
                    callers.start_soon(read, device)
                    await eventually(lambda: device.status()["pending"])
                    nursery.cancel_scope.cancel()
                await read(device)
            assert ended == [device, device]

    trio_test(body)


def test_nothing_of_a_closed_device_executes_later(server):
    """The disk is slow, a write is cancelled and the device closed: the bytes that the next user
    writes stay."""

    def delay(control, action, **settings):
        control.ask(m.FilterCommand("disk0", action, "delay", settings), m.Done)

    async def body():
        with server.control() as control:
            async with opened(server) as device, opened(server, instance(2)) as other:
                await eventually(lambda: device.status()["paths"] == [1, 1])
                first, second = (link.lane for link in device._links.values())
                first.bytes_in_flight += 64 << 20  # LOGOUT goes there, what is written does not
                delay(control, "add", write_ms=700)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(device.write, 0, b"old!" * 1024)
                    await eventually(lambda: second.in_flight)
                    await other.read(0, BLOCK)  # it has begun by now
                    nursery.cancel_scope.cancel()
                await device.aclose()
                delay(control, "set", write_ms=0)
                await other.write(0, b"new!" * 1024)
                await eventually(lambda: server.report("disk0").connections == 2)
                assert await other.read(0, BLOCK) == b"new!" * 1024

    trio_test(body)
