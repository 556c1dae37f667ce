"""`fail_after_ms`, and COMPARE AND WRITE whose answer is lost: what may be concluded from it."""

from __future__ import annotations

import pytest
import trio

from cluster.errors import StackError, UnreachableError, UsageError
from gnbd import messages as m
from gnbd.client.device_io import Options
from gnbd.client.failures import UnknownOutcomeError
from gnbd.client.plain_io import open_plain
from lab.block_server import export_toml, instance, running
from tests.gnbd.test_client_io import MEMBERS, eventually, opened, trio_test

BLOCK = 4096
LIMIT_MS = 3000
"""A busy machine serves a request in this time."""


@pytest.fixture
def server(tmp_path):
    exports = export_toml("disk0", tmp_path / "disk0.img", "cluster", "64M", '"volatile"')
    exports += export_toml("open", tmp_path / "open.img")
    with running(tmp_path, exports) as server:
        server.install(1, MEMBERS)
        yield server


def test_what_is_given_up_never_lands_later(server, relayed):
    """Bytes hang in the networks. Their callers hear of it, nothing is taken meanwhile; once the
    device works again, the old bytes are out: they do not come over new ones."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info, fail_after_ms=LIMIT_MS) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            await device.write(0, b"kept" * 1024)
            for relay in relays:
                relay.stall()
            for call in (device.write(0, b"old!" * 1024), device.read(0, BLOCK)):
                with pytest.raises(UnreachableError, match="not served for 3 s"):
                    await call
            assert device.status()["failed"]
            for relay in relays:
                relay.release()
            await eventually(lambda: device.status()["failed"] is None)
            assert await device.read(0, BLOCK) in (b"kept" * 1024, b"old!" * 1024)
            await device.write(0, b"new!" * 1024)
            await eventually(lambda: all(relay.pumps == 2 for relay in relays))
            assert await device.read(0, BLOCK) == b"new!" * 1024

    trio_test(body)


def test_what_was_acknowledged_outlives_it(server):
    """The server is killed and its cache gone: a write is given up, one from before is written
    again when the server is back, and the next flush covers it."""

    async def body():
        async with opened(server, fail_after_ms=LIMIT_MS) as device:
            await device.write(0, b"a" * BLOCK)
            server.kill()
            with pytest.raises(UnreachableError):
                await device.write(BLOCK, b"b" * BLOCK)
            server.start()
            server.install(1, MEMBERS)
            await eventually(lambda: device.status()["failed"] is None)
            await device.flush()
            server.kill()
            assert (server.directory / "disk0.img").read_bytes()[:BLOCK] == b"a" * BLOCK

    trio_test(body)


def test_opening_is_given_up_too(server):
    """With the reason."""
    server.kill()

    async def body():
        async with trio.open_nursery() as nursery:
            await open_plain(f"{server.uri}/open", nursery, Options(fail_after_ms=100))

    with pytest.raises(ExceptionGroup) as caught:
        trio_test(body)
    with pytest.raises(UnreachableError, match="refused"):
        raise caught.value.exceptions[0]


def test_a_plain_disk_works_again(server):
    """Nobody confirms a drain there: it is taken again with the next connection."""

    async def body():
        async with trio.open_nursery() as nursery:
            options = Options(fail_after_ms=LIMIT_MS)
            device = await open_plain(f"{server.uri}/open", nursery, options)
            await device.write(0, b"a" * BLOCK)
            server.kill()
            with pytest.raises(UnreachableError):
                await device.read(0, BLOCK)
            server.start()
            await eventually(lambda: device.status()["failed"] is None)
            assert await device.read(0, BLOCK) == b"a" * BLOCK
            await device.aclose()

    trio_test(body)


def test_compare_and_write_counts(server):
    """A counter that two instances raise at once: nothing is lost."""
    size = 512

    async def raise_it(device, times):
        for _ in range(times):
            while True:
                before = await device.read(0, size)
                number = int.from_bytes(before, "big") + 1
                if await device.compare_and_write(0, before, number.to_bytes(size, "big")):
                    break

    async def body():
        async with opened(server) as first, opened(server, instance(2)) as second:
            async with trio.open_nursery() as nursery:
                for device in (first, second):
                    for _ in range(3):
                        nursery.start_soon(raise_it, device, 10)
            assert int.from_bytes(await first.read(0, size), "big") == 60
            assert not await first.compare_and_write(0, b"x" * size, b"y" * size)
            for wrong in ((b"x", b"yy"), (bytes(1 << 17), bytes(1 << 17))):
                with pytest.raises(UsageError):
                    await first.compare_and_write(0, *wrong)
            await first.write(BLOCK, b"a" * size)  # kept until a flush
            assert await first.compare_and_write(BLOCK, b"a" * size, b"b" * size)
            server.kill()
            server.start()
            server.install(1, MEMBERS)
            assert await first.read(BLOCK, size) == b"b" * size

    trio_test(body)


def test_compare_and_write_without_an_answer(server, relayed):
    """It is not sent again: it might compare with what it has written itself."""
    info, relays = relayed

    async def body():
        async with opened(server, info=info) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            for relay in relays:
                relay.stall()

            async def change():
                with pytest.raises(UnknownOutcomeError):
                    await device.compare_and_write(0, bytes(512), b"x" * 512)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                await eventually(lambda: any(r.kind for r in device.core.all_requests()))
                await eventually(lambda: not device.core.queue)
                for path in device.core.paths:
                    device._scopes[path.index].cancel()
                await eventually(lambda: device.status()["paths"] == [0, 0])
                for relay in relays:
                    relay.release()
            assert await device.read(0, 512) in (bytes(512), b"x" * 512)

    trio_test(body)


def test_what_a_compare_and_write_has_written_is_not_undone(server):
    """Its answer is lost, but it is there and durable, and others build on it. What this client had
    written there before is not brought back when the server loses its cache."""

    async def body():
        async with opened(server) as device, opened(server, instance(2)) as other:
            await device.write(0, b"a" * BLOCK)  # kept until a flush
            with server.control() as control:
                which = {"operation": "write", "count": 1}
                control.ask(m.FilterCommand("disk0", "add", "drop", which), m.Done)

            async def change():
                with pytest.raises(UnknownOutcomeError):
                    await device.compare_and_write(0, b"a" * BLOCK, b"b" * BLOCK)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(change)
                while await other.read(0, BLOCK) != b"b" * BLOCK:
                    pass
                device._scopes[0].cancel()
            assert await other.compare_and_write(0, b"b" * BLOCK, b"c" * BLOCK)
            server.kill()
            server.start()
            server.install(1, MEMBERS)
            await device.flush()
            assert await device.read(0, BLOCK) == b"c" * BLOCK

    trio_test(body)


def test_a_plain_disk_has_no_compare_and_write(server):
    async def body():
        async with trio.open_nursery() as nursery:
            device = await open_plain(f"{server.uri}/open", nursery)
            with pytest.raises(StackError, match="only a gnbd-server"):
                await device.compare_and_write(0, bytes(512), bytes(512))
            await device.aclose()

    trio_test(body)
