"""TLS of our own client: who is spoken to, who is believed, and the same disk behind it."""

from __future__ import annotations

import os
import random

import pytest
import trio

from cluster.config import NodeConfig, decode_config, encode_node_config
from cluster.control import ServerInfo
from cluster.errors import ConfigError, ForeignError, StackError, UsageError
from cluster.ids import ServerId
from cluster.tls import TlsSection
from gnbd import messages as m
from gnbd.client.device_io import open_device
from lab.block_server import export_toml, member, running
from tests.gnbd.certificates import Authority
from tests.gnbd.proxy import Relay
from tests.gnbd.test_client_io import ME, eventually, opened, trio_test, verified_writer
from tests.gnbd.test_tls import tls_head

MEMBERS = member(live=(1, 2), next_=3)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.issue("s1", "server")
    authority.issue("s2", "server")
    authority.issue("s1", "server", place="s1-expired", expired=True)
    for name in ("n1", "n2"):
        authority.issue(name, "client")
    authority.issue("n1", "client", place="n1-expired", expired=True)
    return authority


def section(authority, name: str = "n1", *, required: bool = False, believed=None) -> TlsSection:
    own = authority.directory / name
    trusted = believed or authority
    return TlsSection(
        str(own / "client-cert.pem"), str(own / "client-key.pem"), str(trusted.certificate),
        required,
    )  # fmt: skip


@pytest.fixture(scope="module")
def servers(tmp_path_factory, authority):
    """By what their [tls] says."""
    heads = {
        "none": "",
        "offered": tls_head(authority),
        "required": tls_head(authority, ", required = true"),
        "other name": tls_head(authority).replace("/s1/", "/s2/"),
        "expired": tls_head(authority).replace("/s1/", "/s1-expired/"),
    }
    found = {}
    managers = []
    try:
        for name, head in heads.items():
            directory = tmp_path_factory.mktemp("server")
            exports = export_toml("disk0", directory / "disk0.img", access="cluster")
            managers.append(running(directory, exports, head=head))
            found[name] = managers[-1].__enter__()
            found[name].install(1, MEMBERS)
        yield found
    finally:
        for manager in managers:
            manager.__exit__(None, None, None)


def certificates(server) -> list[str]:
    """Under which names our connections have come in."""
    with server.control() as control:
        rows = control.ask(m.ConnectionsRequest(), m.ConnectionsReport).connections
    return [row.certificate for row in rows if row.export == "disk0"]


@pytest.mark.parametrize(
    ("server", "client", "secured"),
    [
        ("none", "none", False), ("none", "allowed", False), ("none", "required", None),
        ("offered", "none", False), ("offered", "allowed", True), ("offered", "required", True),
        ("required", "none", None), ("required", "allowed", True), ("required", "required", True),
    ],
)  # fmt: skip
def test_who_speaks_tls_with_whom(servers, authority, server, client, secured):
    """None: the device cannot be opened, and the reason names TLS."""
    tls = None if client == "none" else section(authority, required=client == "required")
    chosen = servers[server]

    async def body():
        async with opened(chosen, tls=tls) as device:
            await device.write(0, b"x" * 4096, fua=True)
            assert await device.read(0, 4096) == b"x" * 4096
            names = await trio.to_thread.run_sync(certificates, chosen)
            assert names == (["n1"] if secured else [""])

    if secured is None:
        with pytest.raises(ExceptionGroup) as caught:
            trio_test(body)
        (error,) = leaves(caught.value)
        assert isinstance(error, UsageError)
        assert "TLS" in error.message
        assert "[tls]" in error.hint
    else:
        trio_test(body)


def leaves(group: BaseException) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for error in group.exceptions for leaf in leaves(error)]
    return [group]


@pytest.mark.parametrize(
    ("server", "client", "kind", "match"),
    [
        ("offered", "stranger", ForeignError, "does not believe our certificate"),
        ("offered", "n1-expired", ForeignError, "does not believe our certificate.*expired"),
        ("offered", "n2", UsageError, "n2"),
        ("offered", "other authority", ForeignError, "certificate of server s1 is not believed"),
        ("expired", "n1", ForeignError, "expired"),
        ("other name", "n1", ForeignError, "names 's2'"),
        ("offered", "no file", ConfigError, "cannot read"),
    ],
)
def test_who_is_not_believed(servers, authority, tmp_path, server, client, kind, match):
    """Opening fails with the reason, instead of waiting for what no waiting mends."""
    other = Authority(tmp_path / "other")
    other.issue("n1", "client")
    tls = {
        "stranger": section(other, believed=authority),
        "other authority": section(authority, believed=other),
        "no file": TlsSection("/nowhere/c.pem", "/nowhere/k.pem", "/nowhere/a.pem"),
    }.get(client) or section(authority, client)

    async def body():
        async with opened(servers[server], tls=tls):
            pass

    with pytest.raises(ExceptionGroup) as caught:
        trio_test(body)
    (error,) = leaves(caught.value)
    assert isinstance(error, kind)
    with pytest.raises(StackError, match=match):
        raise error


def test_every_operation_over_tls(servers, authority):
    """Sizes from a sector to several requests, many at once, on several connections."""

    async def body():
        tls = section(authority, required=True)
        async with opened(servers["required"], tls=tls, connections_per_path=3) as device:
            big = os.urandom(9 << 20)
            await device.write(1 << 20, big)
            await device.flush()
            assert await device.read(1 << 20, len(big)) == big
            view = memoryview(bytearray(300 << 10))
            await device.read_into(1 << 20, view)
            assert view == big[: 300 << 10]
            parts = [(i * 8192, os.urandom(4096)) for i in range(100)]
            await device.write_many(parts)
            assert await device.read_many([(o, 4096) for o, _ in parts]) == [d for _, d in parts]
            await device.write_zeroes(1 << 20, 64 << 10)
            assert await device.read(1 << 20, 64 << 10) == bytes(64 << 10)

    trio_test(body)


@pytest.mark.parametrize("seed", [1])
def test_networks_and_servers_fail_under_tls(tmp_path, authority, seed):
    """Cut, healed, killed and started: no error, every byte right, nothing without TLS."""
    print("seed", seed)
    chance = random.Random(seed)
    exports = export_toml("disk0", tmp_path / "d.img", "cluster", filters='"volatile"')

    async def body(server, relays):
        info = ServerInfo(ServerId(129), "s1", [r.address for r in relays], server.port)
        tls = section(authority, required=True)
        async with opened(server, info=info, tls=tls) as device:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for index in range(4):
                    nursery.start_soon(verified_writer, device, index, stop)
                for _ in range(4):
                    await eventually(lambda: device.status()["paths"] == [1, 1])
                    relay = chance.choice(relays)
                    relay.cut()
                    await device.flush()
                    relay.heal()
                await eventually(lambda: device.status()["paths"] == [1, 1])
                server.kill()
                server.start()
                server.install(1, MEMBERS)
                await device.flush()
                stop.set()

    head = tls_head(authority, ", required = true")
    with running(tmp_path, exports, head=head) as server:
        server.install(1, MEMBERS)
        relays = [Relay(f"127.0.0.{n}", server.port, ("127.0.0.1", server.port)) for n in (5, 6)]
        try:
            trio_test(body, server, relays)
        finally:
            for relay in relays:
                relay.cut()


def test_a_certificate_that_ends_meanwhile_is_told(tmp_path, authority):
    """An open device waits, and its status says for what; the renewed file is taken over."""
    files = [tmp_path / name for name in ("client-cert.pem", "client-key.pem")]
    tls = TlsSection(*map(str, files), str(authority.certificate))

    def put(name):
        for file in files:
            file.write_bytes((authority.directory / name / file.name).read_bytes())

    put("n1")
    exports = export_toml("disk0", tmp_path / "d.img", "cluster")

    async def body(server):
        async with opened(server, tls=tls) as device:
            put("n1-expired")
            device._scopes[0].cancel()
            await eventually(lambda: "expired" in str(device.status()["problems"]))
            put("n1")
            await device.write(0, b"x" * 4096)
            assert not device.status()["problems"]

    with running(tmp_path, exports, head=tls_head(authority)) as server:
        server.install(1, MEMBERS)
        trio_test(body, server)


def test_a_login_to_somebody_elses_server_is_refused(tmp_path):
    """A plain NBD server cannot keep anybody from writing: said at once, not waited for."""
    exports = export_toml("disk0", tmp_path / "d.img")

    async def body(server):
        async with trio.open_nursery() as nursery:
            await open_device(server.info, "disk0", ME, bytes(32), nursery)

    with running(tmp_path, exports, joined=False) as server:
        with pytest.raises(ExceptionGroup) as caught:
            trio_test(body, server)
    (error,) = leaves(caught.value)
    assert "in no cluster" in str(error)


def test_the_section_of_a_node():
    """It is kept; relative paths are refused, because mounts run elsewhere."""
    text = (
        f'[cluster]\nid = "{"0" * 32}"\nname = "c"\nkey = "{"1" * 64}"\n'
        '[node]\nid = 1\nname = "n1"\naddresses = ["10.0.0.1"]\n'
        '[tls]\ncertificate = "/c"\nkey = "/k"\nauthority = "/a"\nrequired = true\n'
    )
    config = decode_config(text, NodeConfig, "node.toml")
    assert config.tls == TlsSection("/c", "/k", "/a", True)
    assert decode_config(encode_node_config(config), NodeConfig, "node.toml") == config
    with pytest.raises(ConfigError, match=r"tls\.key"):
        decode_config(text.replace('"/k"', '"k"'), NodeConfig, "node.toml")
