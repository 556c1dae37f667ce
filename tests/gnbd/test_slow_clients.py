"""Clients that ask and do not listen hold up neither others nor a bar."""

from __future__ import annotations

import socket

import pytest

from gnbd import messages as m
from gnbd import protocol as p
from tests.gnbd.harness import export_toml, instance, member, running, wait_for
from tests.gnbd.raw import RawClient

MIB = 1 << 20
KEEPER = member(node=2, live=(1,), next_=2)


def counted(server) -> m.ExportReport:
    with server.control(2) as control:
        return control.ask(m.ExportsRequest(), m.ExportsReport).exports[0]


@pytest.mark.parametrize("filters", ["", '"stats"'], ids=["C", "Python"])
@pytest.mark.parametrize("length", [MIB, 32 * MIB])
def test_answers_that_nobody_takes(tmp_path, filters, length):
    """Many reads, not one answer taken: others read and write, and the bar is answered."""
    exports = export_toml("disk", tmp_path / "d.img", "cluster", "64M", filters)
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1,), next_=2), KEEPER)
        with RawClient(server) as deaf, RawClient(server) as other:
            assert deaf.login(instance(), "disk").status == m.LOGIN_OK
            deaf.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.go("disk")
            for _ in range(64):
                deaf.send(p.CMD_READ, 0, length=length)
            wait_for(lambda: counted(server).counters["reads"] > 0, "it is at work")
            assert other.login(instance(node=2), "disk").status == m.LOGIN_OK
            other.go("disk")
            assert other.request(p.CMD_WRITE, 0, b"x" * 4096) == 0
            assert other.read(0, 4096) == b"x" * 4096
            server.install(2, KEEPER, node=2)
            assert other.request(p.CMD_WRITE, 0, b"y" * 4096) == 0
            assert counted(server).counters["reads"] < 64
