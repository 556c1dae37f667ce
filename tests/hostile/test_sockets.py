"""Random, truncated and replayed bytes at every socket: no crash, no hang, bounded memory."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import trio

from cluster import channel_io, mesh_io
from cluster.control import (
    Call,
    GroupEvent,
    GroupMember,
    Reply,
    decode_line_untrusted,
    encode_line,
)
from cluster.control_io import serve_sessions
from cluster.heartbeat_io import Datagrams
from cluster.identity import Identity
from cluster.ids import Incarnation, Instance, NodeId
from cluster.mesh import Hello, Marker, Message
from cluster.mesh_io import open_mesh
from cluster.messages import Echo, encode_message
from cluster.timing import timing_of
from cluster.transport_io import Transport
from cluster.wire import Frame, Keys, seal
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.server import server_io
from gnbd.server.export_io import Connection
from lab.block_server import export_toml, instance, member, reserve_port, running
from node.guard_mounts_io import MountSocket
from tests.gnbd.raw import RawClient, logged_in

ID = bytes(16)
KEYS = Keys(1, {1: bytes(32)})
ROUNDS = 60
RESIDENT_KIB_MAX = 400_000


@pytest.fixture
def chooser():
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return random.Random(seed)


def noise(chooser: random.Random, good: bytes) -> bytes:
    """Random bytes, or something that begins well."""
    kind = chooser.randrange(4)
    if kind == 0:
        return chooser.randbytes(chooser.randrange(1, 5000))
    if kind == 1:
        return good[: chooser.randrange(len(good))]
    made = bytearray(good)
    for _ in range(chooser.choice((1, 3, 20))):
        made[chooser.randrange(len(made))] = chooser.randrange(256)
    return bytes(made) + (chooser.randbytes(100) if kind == 2 else b"")


# --- NBD


def send_noise(server, data: bytes) -> None:
    """Say it, hang up our half, wait until the server has ended it."""
    with socket.create_connection((server.addresses[0], server.port), 30) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass


def test_nbd_before_and_after_login(tmp_path, chooser):
    """A gnbd-server takes what comes, ends those connections, and serves the next client."""
    exports = export_toml("disk0", tmp_path / "a", "cluster") + export_toml("open", tmp_path / "b")
    me = instance()
    with running(tmp_path, exports) as server:
        server.install(1, member(next_=0, live=(0, 1)))
        hello = msgspec.msgpack.encode(m.LoginHello(me, "disk0", 0, 1, bytes(32), 0))
        start = b"\0\0\0\3"
        strangers = [
            start + p.option(p.OPT_LIST) + p.option(p.OPT_GO, p.go_data("open")),
            start + p.option(p.OPT_LOGIN, hello) + p.option(p.OPT_LOGIN, b"x"),
            start + p.option(p.OPT_CONTROL, msgspec.msgpack.encode(m.ControlHello(bytes(32)))),
            start + p.option(p.OPT_LOGIN, b"\x81\xa1a\xa1\xff" + b"\x91" * 60_000),
        ]
        request = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_WRITE, 1, 0, 512) + bytes(512)
        for _ in range(ROUNDS):
            send_noise(server, noise(chooser, chooser.choice(strangers)))
        for number in range(ROUNDS // 4):
            with logged_in(server, me, generation=number + 1) as client:
                try:
                    client.sock.sendall(noise(chooser, request * 3))
                    client.sock.shutdown(socket.SHUT_WR)
                    while client.sock.recv(1 << 16):
                        pass
                except ConnectionError:
                    pass
        with RawClient(server, "open") as client:
            assert client.request(p.CMD_WRITE, 0, b"a" * 512) == 0
        log = server.log.read_text()
        assert "Traceback" not in log
        assert "connection failed" not in log
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        resident = int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1])
        assert resident < RESIDENT_KIB_MAX


def test_a_recorded_login_is_worth_nothing(tmp_path):
    """The proof answers a nonce of the server, so the same bytes again are refused."""
    me = instance()
    with running(tmp_path, export_toml("disk0", tmp_path / "a", "cluster")) as server:
        server.install(1, member(next_=0, live=(0, 1)))
        hello = msgspec.msgpack.encode(m.LoginHello(me, "disk0", 0, 1, bytes(32), 0))
        recorded = []
        with RawClient(server) as client:
            sendall = client.sock.sendall
            client.sock = SimpleNamespace(
                sendall=lambda data: (recorded.append(data), sendall(data)),
                recv=client.sock.recv, close=client.sock.close,
            )  # fmt: skip
            assert client.login(me, "disk0").status == m.LOGIN_OK
        assert hello not in recorded  # its nonce is fresh as well
        with RawClient(server) as client:
            for data in recorded:
                client.sock.sendall(data)
            answers = []
            while len(answers) < 4:
                _magic, _option, kind, length = p.OPTION_REPLY.unpack(client.take(20))
                answers.append((kind, client.take(length)))
        result = msgspec.msgpack.decode(answers[2][1], type=m.LoginResult)
        assert result.status == m.LOGIN_REFUSED


def negotiate(sock: socket.socket):
    plain = SimpleNamespace(tls=None)
    server = SimpleNamespace(service=plain, config=plain)
    return server_io._Negotiation(server, Connection(sock, "x"))


def test_a_half_open_connection_ends(monkeypatch):
    """Whoever says nothing, or a byte now and then, does not hold a thread for ever."""
    monkeypatch.setattr(server_io, "HANDSHAKE_S", 0.5)
    for dripping in (False, True):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            stop = threading.Event()

            def drip(sock=ours, stop=stop) -> None:
                while not stop.wait(0.05):
                    sock.send(b"\0")

            dripper = threading.Thread(target=drip, daemon=True)
            if dripping:
                ours.sendall(b"\0\0\0\3" + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_GO, 60_000))
                dripper.start()
            negotiation = negotiate(theirs)
            try:
                with pytest.raises(TimeoutError):
                    negotiation.run()
            finally:
                stop.set()
                if dripping:
                    dripper.join()


def test_a_stranger_gets_little_memory():
    """An option of megabytes is for authenticated sessions."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"\0\0\0\3" + p.OPTION.pack(p.OPTION_MAGIC, p.OPT_CONTROL, 4 << 20))
        assert negotiate(theirs).run() is None


# --- clusterd's sockets


@pytest.mark.trio
async def test_control_socket(tmp_path, chooser):
    """A session that says nonsense is closed; clusterd and the others go on."""
    path = tmp_path / "clusterd.sock"

    async def echo(params):
        return params["text"]

    good = encode_line(Call(1, "echo", {"text": "x"}))
    bad = [b'{"t":"call","id":1,"method":"\xff"}\n', b"[" * 100_000 + b"\n", b"\n", b"{}\n",
           b'{"t":"call","id":1,"method":"echo","params":{"x":' + b"[" * 90_000 + b"\n",
           b'{"t":"call","id":1,"method":"echo","params":{"fds":7}}\n']  # fmt: skip
    bad += [noise(chooser, good) + b"\n" for _ in range(ROUNDS)]
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_sessions, path, lambda _s: {"echo": echo}, lambda _s: None)
        for data in bad:
            async with await trio.open_unix_socket(str(path)) as stream:
                try:
                    await stream.send_all(data)
                    await stream.send_eof()
                    with trio.fail_after(60):
                        while await stream.receive_some(1 << 16):
                            pass
                except trio.BrokenResourceError:
                    pass
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(good)
            answer = decode_line_untrusted((await stream.receive_some()).rstrip())
            assert answer == Reply(1, "x")
        nursery.cancel_scope.cancel()


def identity(node: int, keys: Keys = KEYS) -> Identity:
    return Identity(NodeId(node), ID, Incarnation(1), keys)


async def say(port: int, data: bytes) -> None:
    """Say something to a port and wait until it is closed."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        try:
            await stream.send_all(data)
            with trio.fail_after(60):
                while await stream.receive_some(1 << 16):
                    pass
        except trio.BrokenResourceError:
            pass


@pytest.mark.trio
async def test_control_mesh(chooser, monkeypatch):
    """Strangers, wrong keys, replayed openings: closed in time, never believed."""
    monkeypatch.setattr(channel_io, "HANDSHAKE_S", 1.0)
    heard = []
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    transport = Transport(
        identity(1), ["127.0.0.1"], port, timing_of("fast"), lambda *what: heard.append(what)
    )
    frame = Frame(2, ID, Incarnation(1), 0, 0, 1, bytes(16) + b"\x82\xa4node\x02\xa4path\x00", 1)
    replayed, wrong = seal(KEYS, frame), seal(Keys(1, {1: b"w" * 32}), frame)
    tries = [replayed, replayed * 2, wrong, replayed[:70], b""]
    long = bytearray(replayed[:64])
    long[8:12] = (3 << 20).to_bytes(4, "little")
    tries.append(bytes(long))
    tries += [noise(chooser, replayed) for _ in range(20)]
    with reserved:
        async with trio.open_nursery() as nursery:
            await nursery.start(transport.run)

            async with trio.open_nursery() as attempts:
                for data in tries:
                    attempts.start_soon(say, port, data)
            assert heard == []
            assert transport.nodes() == []
            nursery.cancel_scope.cancel()


@pytest.mark.trio
async def test_member_mesh(chooser, monkeypatch):
    """Strangers between two members of a lockspace are closed in time, at most so many at once are
    listened to, and the members go on."""
    monkeypatch.setattr(channel_io, "HANDSHAKE_S", 1.0)
    monkeypatch.setattr(mesh_io, "STRANGERS_MAX", 8)
    ours, theirs = Instance(NodeId(1), 1, 1), Instance(NodeId(2), 1, 1)
    key, group, heard = b"k" * 32, "fs", {ours: [], theirs: []}
    about = Identity(theirs.node, hashlib.blake2b(group.encode(), digest_size=16).digest(),
                     theirs.incarnation, Keys(0, {0: key}))  # fmt: skip
    hello = msgspec.msgpack.encode(Hello(group, theirs, ours, 9, 0, b"", 0))
    frame = Frame(2, about.cluster_id, about.incarnation, 0, 0, 1, bytes(16) + hello, 1)
    replayed, wrong = seal(about.keys, frame), seal(Keys(0, {0: b"w" * 32}), frame)
    tries = [replayed, replayed * 2, wrong, replayed[:70], b""]
    tries += [noise(chooser, replayed) for _ in range(40)]
    async with open_mesh(ours, ["127.0.0.1"], key, group=group, retry_ms=100) as one:
        async with open_mesh(theirs, ["127.0.0.1"], key, group=group, retry_ms=100) as two:
            meshes = {ours: one, theirs: two}
            members = [GroupMember(who, f"n{who.node}", ["127.0.0.1"], mesh.port)
                       for who, mesh in meshes.items()]  # fmt: skip
            for who, mesh in meshes.items():
                mesh.start(heard[who].append)
                mesh.group_event(GroupEvent(group, 1, 1, "view", members, joined=list(meshes)))
            with trio.fail_after(60):
                async with trio.open_nursery() as attempts:
                    for data in tries:
                        attempts.start_soon(say, one.port, data)
                    two.send(ours, b"through")
                while Message(theirs, b"through", Marker(1, 1)) not in heard[ours]:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert len([item for item in heard[ours] if isinstance(item, Message)]) == 1


def test_guard_socket(tmp_path, chooser):
    """Packets that are no attach, and any descriptors with them, cost the guard nothing."""
    path = tmp_path / "guard.sock"
    door = MountSocket(path)
    good = b'{"attach": [1, 7, 1], "connection": 55, "mountpoint": "/mnt/cfs"}'
    packets = [b"", b"{}", good, good[:-1], b"[" * 60_000, b'{"attach": [1, 7, 1]}', b"\xff", b"0"]
    packets += [noise(chooser, good) for _ in range(ROUNDS)]
    before = len(os.listdir("/proc/self/fd"))
    for packet in packets:
        fds = [os.open("/dev/null", os.O_RDWR) for _ in range(chooser.randrange(6))]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(path))
            theirs = door.accept()
            socket.send_fds(sock, [packet], fds)
            assert door.read_attach(theirs) is None, packet
            for later in (b"", packet):
                sock.send(later)
                assert door.read(theirs) in (None, False)
            theirs.close()
        for fd in fds:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    assert door.accept() is None
    door.listener.close()


def test_heartbeat_datagrams(chooser):
    """Noise is dropped; a datagram is taken once, however often it comes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    datagrams = Datagrams(identity(1), ["127.0.0.1"], port)
    try:
        body = encode_message(Echo(2, 1, Incarnation(1), 1, True, []))
        good = seal(KEYS, Frame(2, ID, Incarnation(1), 0, 0, 5, body, 0))
        older = seal(KEYS, Frame(2, ID, Incarnation(1), 0, 0, 4, body, 0))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("127.0.0.1", port))
            for data in [good, good, older, *(noise(chooser, good) for _ in range(30)), good]:
                sock.send(data)
        found = []
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not found:
            found += datagrams.receive(0)
        found += datagrams.receive(0)
        assert len(found) == 1
    finally:
        datagrams.close()
