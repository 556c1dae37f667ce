"""EXTENDED_HEADERS by hand: no client of Debian 12 speaks it yet."""

from __future__ import annotations

import struct

import pytest

from gnbd import protocol as p
from lab.block_server import export_toml, running
from tests.gnbd.raw import RawClient

MIB = 1 << 20
GIB = 1 << 30
SIZE = 16 * GIB


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("extended")
    exports = export_toml("disk", directory / "disk.img", size="16G")
    exports += export_toml("slow", directory / "slow.img", size="16G", filters='"stats"')
    with running(directory, exports, joined=False) as server:
        yield server


class Extended(RawClient):
    """Transmission with 32-byte headers."""

    def __init__(self, server, export: str, *contexts: bytes) -> None:
        super().__init__(server)
        assert self.option(p.OPT_EXTENDED_HEADERS) == [(p.REP_ACK, b"")]
        if contexts:
            queries = b"".join(struct.pack(">I", len(c)) + c for c in contexts)
            name = export.encode()
            data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(contexts)) + queries
            assert self.option(p.OPT_SET_META_CONTEXT, data)[-1][0] == p.REP_ACK
        self.go(export)

    def ask(self, kind, offset=0, length=0, data=b"", flags=0, magic=p.EXTENDED_REQUEST_MAGIC):
        """One request; its chunks as (type, payload)."""
        self.cookie += 1
        if data:
            length, flags = len(data), flags | p.CMD_FLAG_PAYLOAD_LEN
        head = p.EXTENDED_REQUEST.pack(magic, flags, kind, self.cookie, offset, length)
        self.sock.sendall(head + data)
        found = []
        while True:
            fields = p.EXTENDED_CHUNK.unpack(self.take(p.EXTENDED_CHUNK.size))
            magic, flags, kind, cookie, at, size = fields
            assert (magic, cookie, at) == (p.EXTENDED_CHUNK_MAGIC, self.cookie, offset)
            found.append((kind, self.take(size)))
            if flags & p.CHUNK_DONE:
                return found


OK = [(0, b"")]


class Failed:
    """An error chunk with this number and some text."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, chunks: object) -> bool:
        ((kind, payload),) = chunks
        number, length = struct.unpack_from(">IH", payload)
        whole = len(payload) == 6 + length > 6
        return (kind, number, whole) == (0x8001, self.number, True)


@pytest.mark.parametrize("export", ["disk", "slow"])
def test_every_command(server, export):
    """The same answers as ever, in the other headers; effects of more than 4 GiB at once."""
    with Extended(server, export, b"base:allocation", b"x-cfs:reservation") as client:
        assert client.ask(p.CMD_TRIM, 0, SIZE) == OK
        assert client.ask(p.CMD_WRITE, 9 * GIB, data=b"x" * 8192, flags=p.CMD_FLAG_FUA) == OK
        assert client.ask(p.CMD_WRITE, MIB, data=b"y" * (5 * MIB)) == OK
        whole = client.ask(p.CMD_READ, MIB, 5 * MIB, flags=p.CMD_FLAG_DF)
        assert whole == [(1, struct.pack(">Q", MIB) + b"y" * (5 * MIB))]
        assert client.ask(p.CMD_READ, 2 * GIB, MIB)[-1][0] == (2 if export == "disk" else 1)
        (kind, body), (_, own) = client.ask(p.CMD_BLOCK_STATUS, 0, SIZE)
        assert kind == p.CHUNK_BLOCK_STATUS_EXT
        assert struct.unpack_from(">II", body) == (1, (len(body) - 8) // 16)
        rows = list(struct.iter_unpack(">QQ", body[8:]))
        assert sum(length for length, _ in rows) == SIZE
        assert (8192, 0) in rows
        assert max(length for length, _ in rows) > 1 << 32
        assert own == struct.pack(">II2Q", 2, 1, SIZE, p.STATE_WRITABLE)
        assert client.ask(p.CMD_WRITE_ZEROES, 0, 10 * GIB, flags=p.CMD_FLAG_FAST_ZERO) == OK
        assert client.ask(p.CMD_READ, 9 * GIB, 16)[-1][1][-8:] == bytes(8)
        assert client.ask(p.CMD_CACHE, 0, SIZE) == OK
        assert client.ask(p.CMD_FLUSH) == OK


def test_errors(server):
    """Each as a chunk; an unexpected payload is taken and refused; out of step ends it."""
    with Extended(server, "disk") as client:
        assert client.ask(p.CMD_READ, SIZE, 1) == Failed(p.EINVAL)
        assert client.ask(p.CMD_READ, 0, 1 << 63) == Failed(p.EINVAL)
        assert client.ask(p.CMD_WRITE_ZEROES, 1, SIZE) == Failed(p.ENOSPC)
        assert client.ask(p.CMD_TRIM, (1 << 64) - 1, (1 << 64) - 1) == Failed(p.EINVAL)
        assert client.ask(p.CMD_TRIM, 0, data=b"unexpected") == Failed(p.EINVAL)
        assert client.ask(p.CMD_FLUSH, 0, data=bytes(5 * MIB)) == Failed(p.EINVAL)
        assert client.ask(p.CMD_BLOCK_STATUS, 0, 512) == Failed(p.EINVAL)
        assert client.ask(p.CMD_PING, 0, 8) == Failed(p.EINVAL)
        assert client.ask(99) == Failed(p.EINVAL)
        assert client.ask(p.CMD_READ, 0, 0) == OK
        with pytest.raises((EOFError, ConnectionError)):
            client.ask(p.CMD_FLUSH, magic=p.REQUEST_MAGIC)


def test_negotiation(server):
    """It takes no data, covers structured replies, and shuts the old way in."""
    with RawClient(server) as client:
        assert client.option(p.OPT_EXTENDED_HEADERS, b"x")[0][0] == p.REP_ERR_INVALID
        assert client.option(p.OPT_STRUCTURED_REPLY)[0][0] == p.REP_ACK
        assert client.option(p.OPT_EXTENDED_HEADERS)[0][0] == p.REP_ACK
        assert client.option(p.OPT_STRUCTURED_REPLY)[0][0] == p.REP_ERR_EXT_HEADER_REQD
        with pytest.raises((EOFError, ConnectionError)):
            client.option(p.OPT_EXPORT_NAME, b"disk")
