"""Clients that ask and do not listen hold up neither others nor a bar."""

from __future__ import annotations

import socket

import pytest

from gnbd import messages as m
from gnbd import protocol as p
from lab.block_server import export_toml, instance, member, running, wait_for
from tests.gnbd.raw import RawClient, logged_in

MIB = 1 << 20
KEEPER = member(node=2, live=(1,), next_=2)


@pytest.mark.parametrize("filters", ["", '"stats"'], ids=["C", "Python"])
@pytest.mark.parametrize("length", [MIB, 32 * MIB])
def test_answers_that_nobody_takes(tmp_path, filters, length):
    """Many reads, not one answer taken: others read and write, and the bar is answered."""
    exports = export_toml("disk", tmp_path / "d.img", "cluster", "64M", filters)
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1,), next_=2), KEEPER)
        with RawClient(server) as deaf, logged_in(server, instance(node=2), "disk") as other:
            assert deaf.login(instance(), "disk").status == m.LOGIN_OK
            deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.go("disk")
            for _ in range(64):
                deaf.send(p.CMD_READ, 0, length=length)
            wait_for(lambda: server.report("disk").counters["reads"] > 0, "it is at work")
            assert other.request(p.CMD_WRITE, 0, b"x" * 4096) == 0
            assert other.read(0, 4096) == b"x" * 4096
            server.install(2, KEEPER, node=2)
            assert other.request(p.CMD_WRITE, 0, b"y" * 4096) == 0
            assert server.report("disk").counters["reads"] < 64
