"""Requests for which there is no memory: refused one by one, the connection goes on."""

from __future__ import annotations

import os
import socket
import struct
import threading

import pytest

from gnbd import protocol as p
from native import nbd

MIB = 1 << 20
LONG = 8 * MIB


@pytest.fixture
def client(tmp_path):
    """A socket whose other end is served in C, with memory for nothing long."""
    near, far = socket.socketpair()
    near.settimeout(60)
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 2 * LONG)
    export = nbd.Export()
    export.set(fd, 2 * LONG, read_only=False)
    served = nbd.Connection(far.fileno(), export, b"", logged_in=False, style=nbd.SIMPLE)
    access = nbd.Access(nbd.READ | nbd.WRITE)
    nbd.set_memory_max(MIB, wait_ms=10)
    thread = threading.Thread(target=served.run, args=(access,))
    thread.start()
    yield near
    near.close()
    thread.join(60)
    nbd.set_memory_max(1 << 30)
    served.free()
    far.close()
    os.close(fd)
    assert not thread.is_alive()
    assert nbd.memory_used() == 0


def ask(client, kind: int, length: int, data: bytes = b"") -> int:
    """The error of one request at offset 0."""
    client.sendall(p.REQUEST.pack(p.REQUEST_MAGIC, 0, kind, 7, 0, length) + data)
    magic, error, cookie = struct.unpack(">IIQ", client.recv(16, socket.MSG_WAITALL))
    assert (magic, cookie) == (p.REPLY_MAGIC, 7)
    return error


def test_long_requests_are_refused(client):
    """ENOMEM after the wait; what is short, and what is long later, works."""
    assert ask(client, p.CMD_WRITE, 512, b"a" * 512) == 0
    assert ask(client, p.CMD_WRITE, LONG, b"b" * LONG) == p.ENOMEM
    assert ask(client, p.CMD_READ, LONG) == p.ENOMEM
    assert ask(client, p.CMD_READ, 512) == 0
    assert client.recv(512, socket.MSG_WAITALL) == b"a" * 512
    nbd.set_memory_max(1 << 30)
    assert ask(client, p.CMD_WRITE, LONG, b"c" * LONG) == 0
    assert ask(client, p.CMD_READ, LONG) == 0
    left = LONG
    while left:
        got = client.recv(min(left, MIB))
        assert got
        assert got == b"c" * len(got)
        left -= len(got)
