"""Our client as the judge's: nbdkit with its filters, qemu-nbd, nbd-server, as plain disks."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from cluster.control import ServerInfo
from cluster.errors import DeviceError, UsageError
from cluster.ids import ServerId
from gnbd.client.device_io import Options, open_device
from gnbd.client.plain_io import open_plain, parse_uri
from lab.block_server import export_toml, running
from tests.gnbd.certificates import Authority
from tests.gnbd.others import SIZE_BYTES, Nbdkit, NbdServer, QemuNbd, serving
from tests.gnbd.test_client_io import DEADLINE_S, ME, eventually, trio_test
from tests.gnbd.test_tls import tls_head

BLOCK = 4096
BLOCKS = 2048


@asynccontextmanager
async def opened(uri: str, **options):
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            device = await open_plain(uri, nursery, Options(**options))
            try:
                yield device
            finally:
                with trio.CancelScope(shield=True):
                    await device.aclose()


SERVERS = {
    "nbdkit": lambda directory: Nbdkit(directory),
    "nbdkit, memory": lambda directory: Nbdkit(directory, "memory", str(SIZE_BYTES)),
    "nbdkit, delay": lambda directory: Nbdkit(
        directory, "--filter=delay", "file", str(directory / "disk.img"), "wdelay=3ms", "rdelay=1ms"
    ),
    "nbdkit, little": lambda directory: Nbdkit(
        directory, "--filter=nozero", "--filter=fua", "--filter=multi-conn", "file",
        str(directory / "disk.img"), "multi-conn-mode=disable",
    ),
    "qemu-nbd": QemuNbd,
    "nbd-server": lambda directory: NbdServer(directory, "flush = true", "fua = true"),
    "nbd-server, trim": lambda directory: NbdServer(directory, "flush = true", "trim = true"),
}  # fmt: skip


async def exercise(device, chance: random.Random, rounds: int) -> bytearray:
    """All kinds of requests against a model, several at once at different places."""
    model = bytearray(BLOCKS * BLOCK)
    await device.write_zeroes(0, len(model))

    async def one(first: int) -> None:
        for _ in range(rounds):
            count = chance.choice([1, 1, 1, 2, 16, 32])
            start = (first + chance.randrange(256 - count)) * BLOCK
            end = start + count * BLOCK
            kind = chance.randrange(6)
            if kind == 0:
                await device.write_zeroes(start, end - start)
                model[start:end] = bytes(end - start)
            elif kind == 1:
                await device.flush()
            elif kind == 2:
                assert await device.read(start, end - start) == model[start:end]
            else:
                data = chance.randbytes(end - start)
                await device.write(start, data, fua=kind == 3)
                model[start:end] = data

    async with trio.open_nursery() as nursery:
        for first in range(0, BLOCKS, 256):
            nursery.start_soon(one, first)
    await device.flush()
    return model


@pytest.mark.parametrize("name", SERVERS)
def test_every_operation(tmp_path, name):
    """What was written is read, by us and in the file."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)

    async def body(server):
        async with opened(server.uri, connections_per_path=3) as device:
            assert device.size_bytes == SIZE_BYTES
            assert not device.fenced
            assert device.status()["fenced"] is False
            multiple = "little" not in name
            assert device.status()["paths"] == [3 if multiple else 1]
            model = await exercise(device, random.Random(seed), 12)
            ranges = [(o, 1 << 20) for o in range(0, len(model), 1 << 20)]
            assert b"".join(await device.read_many(ranges)) == model
            big = os.urandom(9 << 20)
            await device.write(20 << 20, big)
            assert await device.read(20 << 20, len(big)) == big
            await device.discard(20 << 20, len(big))
            await device.flush()
            return model

    with serving(SERVERS[name](tmp_path)) as server:
        model = trio.run(body, server)
    if "memory" not in name:
        assert (tmp_path / "disk.img").read_bytes()[: len(model)] == model


def test_our_own_plain_export_also_over_tls_and_unix_sockets(tmp_path):
    authority = Authority(tmp_path / "authority")
    authority.issue("s1", "server")
    authority.issue("me", "client")
    path = tmp_path / "gnbd.sock"
    head = tls_head(authority) + f'unix_sockets = ["{path}"]\n'
    uris = ["nbd://127.0.0.1:{}/disk", "nbds://127.0.0.1:{}/disk?tls-certificates="
            f"{authority.directory}/me", f"nbd+unix:///disk?socket={path}"]  # fmt: skip

    async def body(server):
        for number, uri in enumerate(uris):
            async with opened(uri.format(server.port), connections_per_path=2) as device:
                await exercise(device, random.Random(number), 4)

    exports = export_toml("disk", tmp_path / "d.img")
    both = ("127.0.0.1", "127.0.0.2")  # the certificate names only the first
    with running(tmp_path, exports, both, joined=False, head=head) as server:
        trio_test(body, server)
        with pytest.raises(ExceptionGroup) as caught:
            trio_test(open_and_close, f"nbds://127.0.0.2:{server.port}/disk?tls-certificates="
                      f"{authority.directory}/me")  # fmt: skip
        assert "certificate" in str(leaf(caught.value))


async def open_and_close(uri: str) -> None:
    async with opened(uri):
        pass


def leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def test_killed_again_and_again(tmp_path):
    """nbdkit's memory is gone with it: what was written since the last flush comes back, what was
    under way is done, nobody sees an error. (What was flushed is that server's to keep.)"""
    written: dict[int, bytes] = {}

    async def writer(device, index, stop):
        count = 0
        while not stop.is_set():
            data = f"{index} {count}".encode().ljust(BLOCK, b".")
            await device.write((index * 8 + count % 8) * BLOCK, data)
            written[index * 8 + count % 8] = data
            count += 1

    async def body(server):
        async with opened(server.uri, connections_per_path=2) as device:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for index in range(8):
                    nursery.start_soon(writer, device, index, stop)
                for _ in range(3):
                    await eventually(lambda: len(written) == 64)
                    server.kill()
                    written.clear()
                    server.start()
                await eventually(lambda: len(written) == 64)
                stop.set()
            for block, data in written.items():
                assert await device.read(block * BLOCK, BLOCK) == data
            server.kill()
            server.start()
            for block, data in written.items():
                assert await device.read(block * BLOCK, BLOCK) == data

    with serving(Nbdkit(tmp_path, "memory", str(SIZE_BYTES))) as server:
        trio_test(body, server)


def test_errors_of_the_disk_are_told_from_those_of_the_path(tmp_path):
    """EIO and ENOSPC go to the caller and leave the connection; ESHUTDOWN is waited out."""
    trigger = tmp_path / "trigger"

    def failing(*words: str) -> Nbdkit:
        return Nbdkit(tmp_path, "--filter=error", "file", str(tmp_path / "disk.img"), *words)

    async def body(server, match):
        async with opened(server.uri) as device:
            await device.write(0, b"a" * BLOCK)
            generation = device.core.paths[0].generation
            trigger.touch()
            for call in (device.write(0, b"b" * BLOCK), device.read(0, BLOCK)):
                with pytest.raises(DeviceError, match=match):
                    await call
            trigger.unlink()
            assert device.core.paths[0].generation == generation
            assert await device.read(0, BLOCK) == b"a" * BLOCK

    for error, match in (("EIO", "I/O error"), ("ENOSPC", "no space")):
        words = (f"error={error}", "error-rate=100%", f"error-file={trigger}")
        with serving(failing(*words)) as server:
            trio_test(body, server, match)

    async def shutting_down(server):
        async with opened(server.uri) as device:
            trigger.touch()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(device.write, 0, b"c" * BLOCK)
                generation = device.core.paths[0].generation
                await eventually(lambda: device.core.paths[0].generation > generation)
                trigger.unlink()
            assert await device.read(0, BLOCK) == b"c" * BLOCK

    with serving(failing("error=ESHUTDOWN", "error-rate=100%", f"error-file={trigger}")) as server:
        trio_test(shutting_down, server)


def test_a_slow_disk_is_not_a_dead_path(tmp_path):
    """Each write takes longer than `dead_ms`."""
    words = ("--filter=delay", "memory", str(SIZE_BYTES), "delay-write=1500ms")

    async def body(server):
        async with opened(server.uri, dead_ms=1000) as device:
            generation = device.core.paths[0].generation
            await device.write_many([(n * BLOCK, bytes([n]) * BLOCK) for n in range(32)])
            assert device.core.paths[0].generation == generation
            assert await device.read(5 * BLOCK, BLOCK) == bytes([5]) * BLOCK

    with serving(Nbdkit(tmp_path, *words)) as server:
        trio_test(body, server)


LINE = re.compile(r"connection=\d+ (\.\.\.)?(Write|Flush) (?:id=\d+) ?(?:offset=(0x[0-9a-f]+))?")


def test_a_flush_follows_what_it_covers(tmp_path):
    """nbdkit's log: each FLUSH begins when every write that our caller had been told of is over,
    also on other connections, although later writes are under way beside it."""
    log = tmp_path / "nbdkit.log"
    words = ("--filter=log", "--filter=delay", "memory", str(SIZE_BYTES), f"logfile={log}",
             "delay-write=2ms")  # fmt: skip
    told: list[set[int]] = []

    async def body(server):
        done: set[int] = set()

        async def writer(index):
            for number in range(30):
                place = (index * 30 + number) << 16
                await device.write(place, bytes(1 << 16))
                done.add(place)

        async def flusher():
            for _ in range(10):
                await trio.testing.wait_all_tasks_blocked(0.001)
                told.append(set(done))
                await device.flush()

        async with opened(server.uri, connections_per_path=4) as device:
            async with trio.open_nursery() as nursery:
                for index in range(16):
                    nursery.start_soon(writer, index)
                nursery.start_soon(flusher)

    with serving(Nbdkit(tmp_path, *words)) as server:
        trio_test(body, server)
    connections = set(re.findall(r"(connection=\d+) Write", log.read_text()))
    assert len(connections) > 1
    over, begun, flushes = set(), {}, 0
    for line in log.read_text().splitlines():
        if not (found := LINE.search(line)):
            continue
        end, kind, offset = found.groups()
        key = line.split()[2], re.search(r"id=(\d+)", line).group()
        if kind == "Write" and not end:
            begun[key] = int(offset, 16)
        elif kind == "Write":
            over.add(begun.pop(key))
        elif not end:
            assert told[flushes] <= over
            flushes += 1
    assert flushes == len(told) == 10
    assert len(over) == 480


def test_what_a_server_cannot_do(tmp_path):
    """No FLUSH: said when it is asked for, not silently true. Read only: the error of a write."""

    async def without_flush(server):
        async with opened(server.uri) as device:
            await device.write(0, b"x" * BLOCK)
            assert await device.read(0, BLOCK) == b"x" * BLOCK
            for call in (device.flush(), device.write(0, b"y" * BLOCK, fua=True)):
                with pytest.raises(DeviceError, match="no FLUSH"):
                    await call
            assert device.status()["retained_bytes"] == 0

    async def read_only(server):
        async with opened(server.uri) as device:
            with pytest.raises(DeviceError, match="read-only"):
                await device.write(0, b"x" * BLOCK)
            await device.flush()

    with serving(NbdServer(tmp_path, "flush = false")) as server:
        trio_test(without_flush, server)
    with serving(Nbdkit(tmp_path, "-r", "file", str(tmp_path / "disk.img"))) as server:
        trio_test(read_only, server)


@pytest.mark.parametrize("name", ["nbdkit", "qemu-nbd", "nbd-server"])
def test_a_cluster_refuses_them(tmp_path, name):
    """They know no LOGIN: nobody could be fenced. Said at once, with what to do."""

    async def body(server):
        info = ServerInfo(ServerId(129), "s1", ["127.0.0.1"], server.port)
        with trio.fail_after(DEADLINE_S):
            async with trio.open_nursery() as nursery:
                await open_device(info, "disk", ME, bytes(32), nursery)

    with serving(SERVERS[name](tmp_path)) as server:
        with pytest.raises(ExceptionGroup) as caught:
            trio_test(body, server)
    error = leaf(caught.value)
    assert isinstance(error, UsageError)
    assert "no gnbd-server" in error.message
    assert "open_plain" in error.hint


def test_no_such_export(tmp_path):
    with serving(NbdServer(tmp_path)) as server:
        with pytest.raises(ExceptionGroup) as caught:
            trio_test(open_and_close, server.uri.replace("/disk", "/nothing"))
    assert isinstance(leaf(caught.value), UsageError)


def test_a_disk_that_has_shrunk_is_not_taken(tmp_path):
    """The server comes back with something else: nothing is written to it."""

    async def body(server):
        async with opened(server.uri) as device:
            await device.write(0, b"x" * BLOCK)
            server.kill()
            os.truncate(server.image, SIZE_BYTES // 2)
            server.start()
            await eventually(lambda: "another disk" in str(device.status()["problems"]))
            server.kill()
            os.truncate(server.image, SIZE_BYTES)
            server.start()
            assert await device.read(0, BLOCK) == b"x" * BLOCK

    with serving(Nbdkit(tmp_path)) as server:
        trio_test(body, server)


@pytest.mark.parametrize(
    ("uri", "address", "port", "export"),
    [
        ("nbd://host/disk", "host", 10809, "disk"), ("nbd://[::1]:7/", "::1", 7, ""),
        ("nbd+tcp://1.2.3.4:99/a%20b", "1.2.3.4", 99, "a b"),
        ("nbd+unix:///e?socket=/run/x", "/run/x", 10809, "e"),
        ("nbds://host/x/y", "host", 10809, "x/y"),
    ],
)  # fmt: skip
def test_uris(uri, address, port, export):
    place = parse_uri(uri)
    assert (place.address, place.port, place.export) == (address, port, export)
    assert place.secure == uri.startswith("nbds")


@pytest.mark.parametrize(
    "uri", ["", "disk", "http://host/x", "nbd://", "nbd+unix:///x", "nbd://host:x/",
            "nbd+unix:///x?socket=y", "nbd+vsock://1/x"],
)  # fmt: skip
def test_what_is_no_uri(uri):
    with pytest.raises(UsageError, match="no NBD URI"):
        parse_uri(uri)


def test_the_example_of_the_documentation(tmp_path):
    """docs/gnbd.md: it runs as it stands there, over several connections."""
    text = (Path(__file__).parents[2] / "docs/gnbd.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with serving(Nbdkit(tmp_path)) as server:
        done = subprocess.run(
            [sys.executable, "-c", example, server.uri], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{SIZE_BYTES} b'hello' False [2]\n"
