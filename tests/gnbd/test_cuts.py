"""A connection that is cut at every byte of a session, in either direction."""

from __future__ import annotations

import socket
import struct

import pytest

from gnbd import messages as m
from gnbd import protocol as p
from lab.block_server import export_toml, running, wait_for
from tests.gnbd.raw import RawClient

BLOCK = 64


@pytest.fixture(scope="module", params=["", '"stats"'], ids=["C", "Python"])
def server(tmp_path_factory, request):
    directory = tmp_path_factory.mktemp("cuts")
    exports = export_toml("disk", directory / "disk.img", size="1M", filters=request.param)
    with running(directory, exports) as server:
        yield server


def session(extended: bool) -> tuple[bytes, bytes]:
    """What a client says before and in transmission: each command once, writes of a pattern."""
    handshake = struct.pack(">I", 3) + p.option(p.OPT_LIST)
    option = p.OPT_EXTENDED_HEADERS if extended else p.OPT_STRUCTURED_REPLY
    handshake += p.option(option)
    context = b"base:allocation"
    data = struct.pack(">I4sII", 4, b"disk", 1, len(context)) + context
    handshake += p.option(p.OPT_SET_META_CONTEXT, data) + p.option(p.OPT_GO, p.go_data("disk"))
    requests = b""
    for number, (kind, length) in enumerate(
        [(p.CMD_WRITE, BLOCK), (p.CMD_READ, BLOCK), (p.CMD_FLUSH, 0), (p.CMD_WRITE, BLOCK),
         (p.CMD_BLOCK_STATUS, 4096), (p.CMD_CACHE, 512), (p.CMD_READ, 4096), (p.CMD_DISC, 0)]
    ):  # fmt: skip
        payload = bytes([number + 1]) * BLOCK if kind == p.CMD_WRITE else b""
        if extended:
            flags = p.CMD_FLAG_PAYLOAD_LEN if payload else 0
            head = (p.EXTENDED_REQUEST_MAGIC, flags, kind, number, number * BLOCK, length)
            requests += p.EXTENDED_REQUEST.pack(*head) + payload
        else:
            head = (p.REQUEST_MAGIC, 0, kind, number, number * BLOCK, length)
            requests += p.REQUEST.pack(*head) + payload
    return handshake, requests


def connected(server) -> socket.socket:
    return socket.create_connection((server.addresses[0], server.port), 15)


def cut(sock: socket.socket, hard: bool) -> None:
    """By FIN or by RST."""
    if hard:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def has_recovered(server) -> bool:
    """Nothing is left of all the connections, and the next one works."""
    with server.control() as control:
        left = control.ask(m.ConnectionsRequest(), m.ConnectionsReport).connections
    threads = len(list((server.proc / "task").iterdir()))
    return not left and threads < 20


@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
def test_cut_at_every_byte(server, extended):
    """The client stops talking, or listening, anywhere: writes are whole or not there, and nothing
    of the connection stays behind."""
    handshake, requests = session(extended)
    whole = handshake + requests
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_TRIM, 0, length=4096) == 0
    for length in range(len(handshake) if extended else 0, len(whole)):
        with connected(server) as sock:
            sock.sendall(whole[:length])
            cut(sock, hard=length % 2 == 1)
    with connected(server) as sock:
        sock.sendall(whole)
        answer = b""
        while more := sock.recv(1 << 16):
            answer += more
    for length in range(0, len(answer), 7):
        with connected(server) as sock:
            sock.sendall(whole)
            taken = 0
            while taken < length:
                taken += len(sock.recv(length - taken))
            cut(sock, hard=length % 2 == 1)
    with RawClient(server, "disk") as client:
        content = client.read(0, 4 * BLOCK)
        assert content == b"\1" * BLOCK + bytes(2 * BLOCK) + b"\4" * BLOCK
    wait_for(lambda: has_recovered(server), "all connections end")


def test_a_write_that_never_came_whole_is_not_executed(server):
    """Cut one byte before its end, by FIN: the old bytes stand."""
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 8192, b"o" * 8192) == 0
    with RawClient(server, "disk") as client:
        head = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_WRITE, 1, 8192, 8192)
        client.sock.sendall(head + b"n" * 8191)
        client.sock.shutdown(socket.SHUT_WR)
        assert client.sock.recv(1) == b""
    with RawClient(server, "disk") as client:
        assert client.read(8192, 8192) == b"o" * 8192
