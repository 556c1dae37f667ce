"""Two real networks between namespaces: one goes silent without a word, and comes back."""

from __future__ import annotations

import os
import subprocess

import pytest
import trio

from tests.gnbd.harness import GnbdServer, export_toml
from tests.gnbd.test_client_io import MEMBERS, eventually, opened

ADDRESSES = ("10.213.1.2", "10.213.2.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def far_server(tmp_path):
    """A server in a namespace of its own, two links away."""
    name = f"gnbd-test-{os.getpid()}"
    links = [f"gt{os.getpid() % 100000}a{n}" for n in (1, 2)]
    server = GnbdServer(tmp_path, export_toml("disk0", tmp_path / "d.img", "cluster"), ADDRESSES)
    ip("netns", "add", name)
    try:
        for number, link in enumerate(links, 1):
            ip("link", "add", link, "type", "veth", "peer", "name", f"far{number}", "netns", name)
            ip("addr", "add", f"10.213.{number}.1/24", "dev", link)
            ip("link", "set", link, "up")
            ip("-n", name, "addr", "add", f"10.213.{number}.2/24", "dev", f"far{number}")
            ip("-n", name, "link", "set", f"far{number}", "up")
        server.prefix = ["ip", "netns", "exec", name]
        server.join()
        server.start()
        server.install(1, MEMBERS)
        yield server, name
        server.kill()
    finally:
        for link in links:
            subprocess.run(["ip", "link", "del", link], capture_output=True)
        ip("netns", "del", name)


def test_silent_network(far_server):
    """Requests in flight on the silent network end on the other one; it is used again later."""
    server, namespace = far_server

    async def writer(device, index, stop):
        count = 0
        while not stop.is_set():
            data = bytes([index, count % 256]) * 2048
            await device.write(index * 4096, data)
            assert await device.read(index * 4096, 4096) == data
            count += 1

    async def body():
        async with opened(server, dead_ms=400) as device:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for index in range(4):
                    nursery.start_soon(writer, device, index, stop)
                await eventually(lambda: device.status()["paths"] == [1, 1])
                for number in (1, 2):
                    far = f"far{number}"
                    await trio.to_thread.run_sync(
                        lambda f=far: ip("-n", namespace, "link", "set", f, "down")
                    )
                    await eventually(lambda n=number: device.status()["paths"][n - 1] == 0)
                    await device.flush()
                    await trio.to_thread.run_sync(
                        lambda f=far: ip("-n", namespace, "link", "set", f, "up")
                    )
                    await eventually(lambda: device.status()["paths"] == [1, 1])
                stop.set()

    trio.run(body)
