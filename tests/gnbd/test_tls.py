"""TLS with foreign clients: off, allowed, required, by name; nothing from before it survives."""

from __future__ import annotations

import os
import ssl
import struct
import subprocess

import pytest

from cluster.errors import ConfigError
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.exports import decode_exports
from lab.block_server import export_toml, instance, member, running
from tests.gnbd.certificates import Authority
from tests.gnbd.raw import RawClient

MIB = 1 << 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    authority = Authority(tmp_path_factory.mktemp("certificates"))
    authority.issue("s1", "server")
    for name in ("n1", "n2"):
        authority.issue(name, "client")
    return authority


def tls_head(authority, more: str = "") -> str:
    """No table may follow before the exports."""
    own = authority.directory / "s1"
    return (
        f'tls = {{certificate = "{own}/server-cert.pem", key = "{own}/server-key.pem", '
        f'authority = "{authority.certificate}"{more}}}\n'
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory, authority):
    directory = tmp_path_factory.mktemp("tls")
    exports = export_toml("either", directory / "either.img", size="128M")
    exports += export_toml("secure", directory / "secure.img", size="128M")
    exports += 'tls = "required"\n'
    exports += export_toml("bare", directory / "bare.img", size="1M") + 'tls = "off"\n'
    exports += export_toml("mine", directory / "mine.img", size="1M") + 'clients = ["n1"]\n'
    exports += export_toml("disk0", directory / "disk0.img", access="cluster")
    with running(directory, exports, head=tls_head(authority)) as server:
        yield server


def uri(server, export: str, authority, name: str = "n1") -> str:
    certificates = f"?tls-certificates={authority.directory}/{name}"
    return f"nbds://127.0.0.1:{server.port}/{export}{certificates}"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("export", "client", "works"),
    [
        ("either", "n1", True), ("either", "", True), ("secure", "n1", True), ("secure", "", False),
        ("bare", "", True), ("bare", "n1", False), ("mine", "n1", True), ("mine", "n2", False),
        ("mine", "", False),
    ],
)  # fmt: skip
def test_who_gets_in(server, authority, export, client, works):
    """libnbd, with and without TLS, by the name in its certificate."""
    where = uri(server, export, authority, client) if client else f"{server.uri}/{export}"
    done = run("nbdinfo", "--size", where)
    assert (done.returncode == 0) == works, done.stderr
    listed = run("nbdinfo", "--list", "--json", uri(server, "", authority, client) if client
                 else server.uri).stdout  # fmt: skip
    assert (f'"export-name": "{export}"' in listed) == works


def test_copies_through_tls(server, authority, tmp_path):
    """nbdcopy both ways over several connections, qemu-img with its own credentials."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(24 * MIB))
    for command in (
        ("nbdcopy", "--connections=4", "--flush", str(source), uri(server, "secure", authority)),
        ("nbdcopy", uri(server, "secure", authority), str(tmp_path / "back")),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back").read_bytes()[: 24 * MIB] == source.read_bytes()
    done = run(
        "qemu-img", "compare", "--image-opts", "--object",
        f"tls-creds-x509,id=t,dir={authority.directory}/n1,endpoint=client",
        f"driver=file,filename={source}",
        f"driver=nbd,host=127.0.0.1,port={server.port},export=secure,tls-creds=t",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stranger_is_turned_away(server, tmp_path):
    """A certificate of another authority, or none: the handshake of TLS fails."""
    other = Authority(tmp_path / "other")
    other.issue("n1", "client")
    assert run("nbdinfo", "--size", uri(server, "either", other)).returncode != 0
    with RawClient(server) as client:
        assert client.option(p.OPT_STARTTLS) == [(p.REP_ACK, b"")]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client.sock = context.wrap_socket(client.sock)  # TLS 1.3: refused after the client's part
        with pytest.raises((ssl.SSLError, OSError, EOFError)):
            client.option(p.OPT_LIST)
    assert run("nbdinfo", "--size", f"{server.uri}/either").returncode == 0


def secured(client: RawClient, authority, name: str = "n1") -> None:
    """STARTTLS of a raw client."""
    assert client.option(p.OPT_STARTTLS) == [(p.REP_ACK, b"")]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(authority.certificate)
    own = authority.directory / name
    context.load_cert_chain(own / "client-cert.pem", own / "client-key.pem")
    client.sock = context.wrap_socket(client.sock)


def test_nothing_agreed_before_tls_counts(server, authority):
    """Structured replies, contexts and a name from before are forgotten; STARTTLS comes once."""
    with RawClient(server) as client:
        assert client.option(p.OPT_STRUCTURED_REPLY)[-1][0] == p.REP_ACK
        data = struct.pack(">I6sII15s", 6, b"either", 1, 15, b"base:allocation")
        assert client.option(p.OPT_SET_META_CONTEXT, data)[-1][0] == p.REP_ACK
        secured(client, authority)
        assert client.option(p.OPT_STARTTLS)[0][0] == p.REP_ERR_INVALID
        assert client.option(p.OPT_SET_META_CONTEXT, data)[0][0] == p.REP_ERR_INVALID
        client.go("either")
        assert client.request(p.CMD_WRITE, 0, b"simple") == 0
        assert client.read(0, 6) == b"simple"  # simple replies
        assert client.request(p.CMD_BLOCK_STATUS, 0, length=512) == p.EINVAL


@pytest.mark.parametrize("injected", [p.option(p.OPT_STRUCTURED_REPLY), b"\x16"])
def test_bytes_behind_starttls_end_the_connection(server, injected):
    """Somebody in between cannot slip options in."""
    with RawClient(server) as client:
        client.sock.sendall(p.option(p.OPT_STARTTLS) + injected)
        with pytest.raises((EOFError, ConnectionError)):
            client.take(4096)


def test_a_certificate_speaks_for_its_node_only(server, authority):
    """LOGIN as node 1 under n1's certificate works, under n2's it does not; and not before TLS."""
    named = [member(node, (1,), 2) for node in (1, 2)]
    members = [type(x)(x.node, x.incarnation, x.live, x.next, f"n{x.node}") for x in named]
    server.install(1, *members)
    for name, status in (("n2", m.LOGIN_REFUSED), ("n1", m.LOGIN_OK)):
        with RawClient(server) as client:
            secured(client, authority, name)
            assert client.login(instance(), "disk0", generation=5).status == status
            if status == m.LOGIN_OK:
                client.go("disk0")
                assert client.request(p.CMD_WRITE, 0, b"x" * 512, flags=p.CMD_FLAG_FUA) == 0
                rows = [r for r in server_connections(server) if r.export == "disk0"]
                assert [(r.certificate, r.peer.split(":")[0]) for r in rows] == [
                    ("n1", "127.0.0.1")
                ]
    with RawClient(server) as client:
        assert client.login(instance(), "disk0", generation=6).status == m.LOGIN_OK
        assert client.option(p.OPT_STARTTLS)[0][0] == p.REP_ERR_INVALID


def server_connections(server):
    with server.control() as control:
        return control.ask(m.ConnectionsRequest(), m.ConnectionsReport).connections


def test_a_server_that_demands_tls(tmp_path, authority):
    """Forced: every option is refused with the reason, the old way in is shut, STARTTLS works."""
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    head = tls_head(authority, ", required = true")
    with running(tmp_path, exports, joined=False, head=head) as server:
        with RawClient(server) as client:
            for option in (p.OPT_LIST, p.OPT_STRUCTURED_REPLY, p.OPT_GO, 99):
                data = p.go_data("disk") if option == p.OPT_GO else b""
                assert client.option(option, data)[0][0] == p.REP_ERR_TLS_REQD
            secured(client, authority)
            client.go("disk")
            big = bytes(range(256)) * (8 * 4096)
            assert client.request(p.CMD_WRITE, 0, big[:MIB]) == 0
            assert client.read(0, MIB) == big[:MIB]
            assert server.stop() == 0
            assert client.sock.recv(1) == b""
        server.start()
        with RawClient(server) as client, pytest.raises((EOFError, ConnectionError)):
            client.option(p.OPT_EXPORT_NAME, b"disk")


def test_a_reload_takes_over_that_tls_is_required(tmp_path, authority):
    """For who connects from then on."""
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    with running(tmp_path, exports, head=tls_head(authority)) as server:
        assert run("nbdinfo", "--size", f"{server.uri}/disk").returncode == 0
        server.head = tls_head(authority, ", required = true")
        server.write_config()
        assert server.ctl("reload").returncode == 0
        assert "TLS" in run("nbdinfo", "--size", f"{server.uri}/disk").stderr
        assert run("nbdinfo", "--size", uri(server, "disk", authority)).returncode == 0


def test_an_expired_certificate_is_told(tmp_path, authority):
    """By --check-config and a reload, before a client finds out; who needs no TLS is served."""
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    good = tls_head(authority)
    authority.issue("s1", "server", place="late", expired=True)
    with running(tmp_path, exports, head=good) as server:
        assert run(*server.command("--check-config")).returncode == 0
        server.head = good.replace("/s1/", "/late/")
        server.write_config()
        checked = run(*server.command("--check-config"))
        assert (checked.returncode, "has expired" in checked.stderr) == (2, True), checked.stderr
        reloaded = server.ctl("reload")
        assert (reloaded.returncode, "has expired" in reloaded.stdout) == (0, True), reloaded
        server.stop()
        server.start()
        assert run("nbdinfo", "--size", f"{server.uri}/disk").returncode == 0


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('[[exports]]\nname="a"\npath="/a"\ntls="required"', r"exports\[0\].tls"),
        ('[[exports]]\nname="a"\npath="/a"\nclients=["n1"]', r"exports\[0\].clients"),
        ('tls={certificate="/c",key="/k",required=true}\n[[exports]]\nname="a"\npath="/a"\n'
         'tls="off"', "demands"),
        ('tls={certificate="/c"}', "key"),
    ],
)  # fmt: skip
def test_configurations_that_make_no_sense(text, match):
    """Named by their place."""
    with pytest.raises(ConfigError, match=match):
        decode_exports(f'state_dir = "/s"\n{text}', "file")
