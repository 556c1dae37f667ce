"""READ_CHECKED and WRITE_CHECKED: data with checksums, from the client to what is stored."""

from __future__ import annotations

import itertools
import random
import struct

import google_crc32c
import pytest
import trio

from cluster.control import ServerInfo
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.server.integrity_io import area_path
from lab.block_server import export_toml, instance, member, running
from native.integrity import SUMS_AT
from tests.gnbd.proxy import Relay
from tests.gnbd.raw import RawClient
from tests.gnbd.test_client_io import opened

MIB = 1 << 20
SIZE = 80 * MIB


def exports(tmp_path) -> str:
    found = ""
    for name, more, filters in (
        ("bare", "", ""),
        ("sums", 'integrity = "crc32c"\n', ""),
        ("python", 'integrity = "crc32c"\n', '"stats"'),
    ):
        path = tmp_path / f"{name}.img"
        found += export_toml(name, path, access="cluster", size=str(SIZE), filters=filters) + more
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checked")
    with running(directory, exports(directory)) as server:
        server.install(1, member(live=(1, 2, 3), next_=99))
        yield server


def login(server, export: str) -> RawClient:
    client = RawClient(server)
    result = client.login(instance(), export)
    assert (result.status, result.checksums) == (m.LOGIN_OK, export != "bare")
    client.go(export)
    return client


def trailer_of(offset: int, data: bytes) -> bytes:
    """By another implementation."""
    cuts = [0, *range(-offset % 4096 or 4096, len(data), 4096), len(data)] if data else []
    pieces = [data[a:b] for a, b in itertools.pairwise(cuts)]
    return struct.pack(f">{len(pieces)}I", *map(google_crc32c.value, pieces))


def send_checked(client: RawClient, offset: int, data: bytes, trailer: bytes, flags=0) -> int:
    cookie = client.send(p.CMD_WRITE_CHECKED, offset, data + trailer, length=len(data), flags=flags)
    got, error = client.reply()
    assert got == cookie
    return error


def read_checked(client: RawClient, offset: int, length: int) -> bytes:
    assert client.request(p.CMD_READ_CHECKED, offset, length=length) == 0
    data = client.take(length)
    wanted = trailer_of(offset, data)
    assert client.take(len(wanted)) == wanted
    return data


CASES = [(0, 4096), (0, 100), (4095, 2), (4096, 3 * MIB), (700, 9000), (1, 4 * MIB), (5, 6 * MIB),
         (0, 64 * MIB), (SIZE - 300, 300), (0, 0)]  # fmt: skip


@pytest.mark.parametrize("export", ["bare", "sums", "python"])
def test_what_is_written_with_checksums_is_read_with_them(server, export):
    """Any place and length, durable or not; many in one stream."""
    with login(server, export) as client:
        for number, (offset, length) in enumerate(CASES):
            data = random.Random(number).randbytes(length)
            assert p.trailer(offset, data) == trailer_of(offset, data)
            flags = p.CMD_FLAG_FUA if number % 2 else 0
            assert send_checked(client, offset, data, trailer_of(offset, data), flags) == 0
            assert read_checked(client, offset, length) == data
            assert read_checked(client, max(offset - 50, 0), length) is not None
            if length:
                assert client.read(offset, length) == data
        stream = b""
        for number in range(100):
            data = bytes([number]) * 4096
            head = p.REQUEST.pack(
                p.REQUEST_MAGIC, 0, p.CMD_WRITE_CHECKED, number, number * 4096 + 7, 4096
            )
            stream += head + data + trailer_of(7, data)
        client.sock.sendall(stream)
        assert [client.reply() for _ in range(100)] == [(number, 0) for number in range(100)]


@pytest.mark.parametrize("export", ["bare", "sums", "python"])
def test_what_was_changed_on_the_way_is_not_written(server, export):
    """One bit of the data or of the trailer, in any piece; the connection goes on."""
    with login(server, export) as client:
        old = b"o" * 20_000
        assert client.request(p.CMD_WRITE, 100, old) == 0
        data = random.Random(1).randbytes(20_000)
        right = trailer_of(100, data)
        for at in (0, 3996, 19_999):
            wrong = bytearray(data)
            wrong[at] ^= 1
            assert send_checked(client, 100, bytes(wrong), right) == p.EBADMSG
        for at in range(0, len(right), 4):
            changed = bytearray(right)
            changed[at] ^= 0x80
            flags = p.CMD_FLAG_FUA if at else 0
            assert send_checked(client, 100, data, bytes(changed), flags) == p.EBADMSG
        assert client.read(100, 20_000) == old
        assert send_checked(client, 100, data, right) == 0
        assert client.read(100, 20_000) == data


def test_the_sum_of_the_client_is_the_one_that_is_stored(server):
    """And the stored one is what a reader gets; damage in between is EIO, not a trailer."""
    with login(server, "sums") as client:
        data = random.Random(2).randbytes(8192)
        assert send_checked(client, 8192, data, trailer_of(0, data)) == 0
        with open(area_path(server.state_dir, "sums"), "rb") as file:
            file.seek(SUMS_AT + 8)
            raw = file.read(8)
        zero = google_crc32c.value(bytes(4096))
        stored = struct.pack(">2I", *(n ^ zero for n in struct.unpack("<2I", raw)))
        assert stored == trailer_of(0, data)
        with open(server.directory / "sums.img", "r+b") as file:
            file.seek(8192)
            file.write(b"?")
        assert client.request(p.CMD_READ_CHECKED, 8192, length=4096) == p.EIO
        assert read_checked(client, 12288, 4096) == data[4096:]


def test_where_they_are_refused(server):
    """Without LOGIN, with structured replies, out of range; nothing gets out of step."""
    data = b"x" * 5000
    with login(server, "bare") as client:
        end = SIZE - 100
        assert send_checked(client, end, data, trailer_of(end, data)) == p.ENOSPC
        assert client.request(p.CMD_READ_CHECKED, end, length=200) == p.EINVAL
        assert client.request(p.CMD_FLUSH) == 0
    with RawClient(server) as client:
        assert client.option(p.OPT_STRUCTURED_REPLY)[-1][0] == p.REP_ACK
        assert client.login(instance(), "bare", path=1).status == m.LOGIN_OK
        client.go("bare")
        assert send_checked(client, 0, data, trailer_of(0, data)) == p.EINVAL
        assert client.request(p.CMD_READ_CHECKED, 0, length=10) == p.EINVAL


def test_strangers_have_no_such_commands(tmp_path):
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    with running(tmp_path, exports, joined=False) as server, RawClient(server, "disk") as client:
        data = b"x" * 5000
        assert send_checked(client, 0, data, trailer_of(0, data)) == p.EINVAL
        assert client.request(p.CMD_READ_CHECKED, 0, length=10) == p.EINVAL
        assert client.read(0, 5000) == bytes(5000)


@pytest.mark.parametrize("tool", ["read", "write"])
def test_our_client_repeats_what_a_network_has_spoiled(server, tool):
    """One bit on the wire: the caller has and leaves the right bytes, over a new connection."""
    relay = Relay("127.0.0.1", 0, ("127.0.0.1", server.port))
    info = ServerInfo(server.info.id, "s1", ["127.0.0.1"], relay.port)
    mark = random.Random(tool).randbytes(64)
    data = bytes(4096 * 5) + mark + bytes(4096 * 3 - 64)

    who = instance(2 + (tool == "write"))

    async def body() -> None:
        async with opened(server, who=who, export="sums", info=info) as device:
            before = device.core.paths[0].generation
            if tool == "write":
                relay.spoils = mark
            await device.write(MIB, data)
            relay.spoils = mark
            assert await device.read(MIB, len(data)) == data
            assert relay.spoils == b""
            view = memoryview(bytearray(len(data)))
            await device.read_into(MIB, view)
            assert view == data
            assert device.core.paths[0].generation > before
            # What can change under way, or begins within a block, goes without checksums.
            await device.write(MIB + 512, bytearray(data))
            assert await device.read(MIB + 512, len(data)) == data
            await device.flush()

    try:
        trio.run(body)
    finally:
        relay.cut()
