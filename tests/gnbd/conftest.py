"""A gnbd-server and the networks to it."""

from __future__ import annotations

import pytest

from cluster.control import ServerInfo
from cluster.ids import ServerId
from lab.block_server import export_toml, member, running
from tests.gnbd.proxy import Relay

MEMBERS = member(live=(1, 2), next_=3)


@pytest.fixture
def server(tmp_path):
    """One disk for instances; modules that need others have their own."""
    exports = export_toml("disk0", tmp_path / "disk0.img", "cluster", "256M", '"volatile"')
    with running(tmp_path, exports, ("127.0.0.1", "127.0.0.2")) as server:
        server.install(1, MEMBERS)
        yield server


@pytest.fixture
def relayed(server):
    """Two networks to it that can be cut, stalled and slowed."""
    relays = [Relay(f"127.0.0.{n}", server.port, ("127.0.0.1", server.port)) for n in (3, 4)]
    info = ServerInfo(ServerId(129), "s1", [r.address for r in relays], server.port)
    yield info, relays
    for relay in relays:
        relay.release()
        relay.cut()
