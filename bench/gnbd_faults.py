"""How long a fence takes, and how long a client stalls when one of its two paths is cut."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import trio

from gnbd import protocol as p
from lab.block_server import (
    GnbdServer,
    export_toml,
    instance,
    member,
    opened,
    set_link,
    two_networks,
)
from lab.raw_client import RawClient

FENCES = 50
WRITES, CONNECTIONS = 64, 8
CUTS = 20
PATH_MS = 50
WARM_WRITES = 50


def fences(server: GnbdServer, export: str, epoch: int) -> list[float]:
    """Milliseconds from asking until the victim's writes can no longer happen: it has 64 under way
    on 8 connections."""
    found = []
    os.sync()  # what the jobs before have left is not the victim's
    for number in range(10, FENCES + 10):
        victim = instance(number)
        keeper = member(2, (1,), 2)
        epoch += 2
        server.install(epoch, member(1, (number,), number + 1), keeper, node=2)
        with ExitStack() as stack:
            clients = []
            for path in range(CONNECTIONS):
                client = stack.enter_context(RawClient(server))
                assert client.login(victim, export, path=path).status == "ok"
                client.go(export)
                clients.append(client)
            for client in clients:
                for index in range(WRITES // CONNECTIONS):
                    client.send(p.CMD_WRITE, index * 4096, bytes(4096))
            begin = time.monotonic()
            server.install(epoch + 1, member(1, (), number + 1), keeper, node=2)
            found.append((time.monotonic() - begin) * 1000)
    return sorted(found)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.005)


def path_cuts(directory: Path) -> list[float]:
    """Milliseconds that a writer's longest write takes around each cut of one of two networks.
    An error of a write ends the measurement."""
    directory.mkdir()
    toml = export_toml("own", directory / "disk", access="cluster")
    found: list[float] = []

    async def cut(device, namespace: str, network: int) -> None:
        longest, writes, stop = 0.0, 0, trio.Event()

        async def writer() -> None:
            nonlocal longest, writes
            while not stop.is_set():
                begin = trio.current_time()
                await device.write(writes % 256 * 4096, bytes(4096))
                longest, writes = max(longest, trio.current_time() - begin), writes + 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer)
            await until(lambda: writes > WARM_WRITES)
            longest = 0.0
            await trio.to_thread.run_sync(set_link, namespace, network, False)
            await until(lambda: device.status()["paths"][network] == 0)
            seen = writes
            await until(lambda: writes > seen + WARM_WRITES)
            found.append(longest * 1000)
            await trio.to_thread.run_sync(set_link, namespace, network, True)
            await until(lambda: device.status()["paths"] == [1, 1])
            stop.set()

    async def all_of_them(server: GnbdServer, namespace: str) -> None:
        async with opened(server, instance(1), "own", deadline_s=300, path_ms=PATH_MS) as device:
            await until(lambda: device.status()["paths"] == [1, 1])
            for number in range(CUTS):
                await cut(device, namespace, number % 2)

    with two_networks() as (namespace, addresses):
        server = GnbdServer(directory, toml, addresses)
        server.prefix = ["ip", "netns", "exec", namespace]
        server.join()
        server.start()
        try:
            server.install(1, member(1, (1,), 2))
            trio.run(all_of_them, server, namespace)
        finally:
            server.stop()
    return sorted(found)
