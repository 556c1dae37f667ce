"""Two real networks between namespaces: one goes silent without a word, and comes back."""

from __future__ import annotations

import os
import signal
import socket
import struct

import pytest
import trio

from cluster.paths_io import boottime_ns
from cluster.tls import TlsSection
from lab.block_server import GnbdServer, export_toml, set_link, two_networks
from tests.gnbd.certificates import Authority
from tests.gnbd.test_client_io import MEMBERS, eventually, opened, verified_writer
from tests.gnbd.test_tls import tls_head

MIB = 1 << 20


@pytest.fixture
def far_server(tmp_path):
    """A server in a namespace of its own, two links away, with TLS for who wants it."""
    toml = export_toml("disk0", tmp_path / "d.img", "cluster")
    with two_networks() as (namespace, addresses):
        server = GnbdServer(tmp_path, toml, addresses)
        authority = Authority(tmp_path / "authority")
        authority.issue("s1", "server")
        authority.issue("n1", "client")
        server.head = tls_head(authority)
        server.prefix = ["ip", "netns", "exec", namespace]
        server.join()
        server.start()
        try:
            server.install(1, MEMBERS)
            yield server, namespace
        finally:
            server.kill()


def test_silent_network(far_server):
    """Requests in flight on the silent network end on the other one; it is used again later."""
    server, namespace = far_server

    async def body():
        async with opened(server, dead_ms=400) as device:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for index in range(4):
                    nursery.start_soon(verified_writer, device, index, stop)
                await eventually(lambda: device.status()["paths"] == [1, 1])
                for number in (1, 2):
                    await trio.to_thread.run_sync(set_link, namespace, number - 1, False)
                    await eventually(lambda n=number: device.status()["paths"][n - 1] == 0)
                    await device.flush()
                    await trio.to_thread.run_sync(set_link, namespace, number - 1, True)
                    await eventually(lambda: device.status()["paths"] == [1, 1])
                stop.set()

    trio.run(body)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
def test_a_path_that_acknowledges_nothing_is_given_up_soon(far_server, tmp_path, secured):
    """Long before TCP would: what was under way on it ends on the other path."""
    server, namespace = far_server
    files = ("n1/client-cert.pem", "n1/client-key.pem", "ca-cert.pem")
    tls = TlsSection(*(str(tmp_path / "authority" / name) for name in files), True)

    async def body():
        async with opened(server, dead_ms=100_000, tls=tls if secured else None) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            await trio.to_thread.run_sync(set_link, namespace, 0, False)
            with trio.fail_after(60):
                await device.write(0, b"x" * 4096)
                await eventually(lambda: device.status()["paths"] == [0, 1])
            assert await device.read(0, 4096) == b"x" * 4096

    trio.run(body)


@pytest.mark.parametrize("requests", [0, 16])
def test_a_server_that_is_slow_is_not_given_up(far_server, requests):
    """It answers no ping, but its kernel acknowledges them: nothing is known to be wrong, also when
    nothing more fits into the connections."""
    server, _namespace = far_server

    async def body():
        async with opened(server, dead_ms=100_000) as device:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            links = list(device._links.values())
            async with trio.open_nursery() as nursery:
                os.kill(server.process.pid, signal.SIGSTOP)
                try:
                    for number in range(requests):
                        nursery.start_soon(device.write, number << 20, b"x" * (1 << 20))
                    await eventually(
                        lambda: all(
                            link.pinged_ns and boottime_ns() - link.pinged_ns > 1_000_000_000
                            for link in links
                        )
                    )
                finally:
                    os.kill(server.process.pid, signal.SIGCONT)
            assert list(device._links.values()) == links

    trio.run(body)


def is_closed(link) -> bool:
    """The peer takes no more: something waits, and all that was sent is acknowledged."""
    info = link._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
    return link._is_full and struct.unpack_from("=24xI", info) == (0,)


@pytest.mark.parametrize("stopped", [False, True], ids=["idle", "closed window"])
def test_all_networks_are_silent(far_server, stopped):
    """The last one is given up too, also while a server that has stopped takes in no more."""
    server, namespace = far_server

    async def turn(up):
        for network in (0, 1):
            await trio.to_thread.run_sync(set_link, namespace, network, up)

    async def body():
        async with opened(server, dead_ms=400) as device, trio.open_nursery() as nursery:
            await eventually(lambda: device.status()["paths"] == [1, 1])
            if stopped:
                server.process.send_signal(signal.SIGSTOP)
                parts = [(i * MIB, bytes([i]) * MIB) for i in range(48)]
                nursery.start_soon(device.write_many, parts)
                await eventually(lambda: all(map(is_closed, device._links.values())))
            await turn(False)
            await eventually(lambda: device.status()["paths"] == [0, 0])
            if stopped:
                server.process.send_signal(signal.SIGCONT)
            await turn(True)
            await eventually(lambda: device.status()["paths"] == [1, 1])

    trio.run(body)
