"""A gnbd-server process of its own, for tests and measurements: no cluster, no namespaces.

Its port is bound here for as long as the object lives, without listening: nobody else is given it,
neither before the server has started nor between two lives of it.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from cluster.control import MemberInfo, ServerInfo
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId, ServerId
from cluster.wire import instance_secret
from gnbd import messages as m
from gnbd.client.device_io import GnbdDevice, Options, open_device
from gnbd.control.blocking_io import BlockingControl, open_blocking
from gnbd.control.session import Peer
from gnbd.identity import ServerIdentity, encode_server_token
from gnbd.server.server_io import join_cluster

DEADLINE_S = 60.0
INCARNATION = Incarnation(7)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Poll a condition with a deadline."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.005)


def instance(number: int = 1, node: int = 1, incarnation: int = INCARNATION) -> Instance:
    return Instance(NodeId(node), Incarnation(incarnation), InstanceNo(number))


def member(
    node: int = 1, live: tuple[int, ...] = (), next_: int = 0, incarnation: int = INCARNATION
) -> MemberInfo:
    numbers = [InstanceNo(n) for n in live]
    return MemberInfo(
        NodeId(node), Incarnation(incarnation), numbers, InstanceNo(next_), f"n{node}"
    )


class GnbdServer:
    """One server with its directory; may be killed and started again on the same port."""

    def __init__(
        self, directory: Path, exports: str, addresses: tuple[str, ...] = ("127.0.0.1",)
    ) -> None:
        self.directory = directory
        self.addresses = addresses
        self.port = 0
        self.exports = exports
        self.identity = ServerIdentity(
            secrets.token_hex(16), "demo", secrets.token_hex(32), ServerId(129), "s1"
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.file = directory / "exports.toml"
        self.log = directory / "server.log"
        self.prefix: list[str] = []
        self.head = ""
        """More lines for the top of the exports file."""
        self.environment: dict[str, str] = {}

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def proc(self) -> Path:
        """Of the running process, in /proc."""
        assert self.process is not None
        return Path("/proc", str(self.process.pid))

    def ctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """gnbdctl on the storage host itself."""
        program = "from gnbd.control.cli import control_main; control_main()"
        local = ["-s", str(self.state_dir / "gnbd.sock"), *arguments]
        return subprocess.run(
            [sys.executable, "-c", program, *local], capture_output=True, text=True, timeout=60
        )

    @property
    def uri(self) -> str:
        return f"nbd://{self.addresses[0]}:{self.port}"

    @property
    def info(self) -> ServerInfo:
        return ServerInfo(ServerId(129), "s1", list(self.addresses), self.port)

    def secret(self, who: Instance) -> bytes:
        key = bytes.fromhex(self.identity.key)
        return instance_secret(key, self.identity.cluster_id_bytes, who)

    def write_config(self) -> None:
        listen = ", ".join(f'"{a}"' for a in self.addresses)
        head = f'listen = [{listen}]\nport = {self.port}\nstate_dir = "{self.state_dir}"\n'
        if "heartbeat_port" not in self.exports:
            head += "heartbeat_port = 0\n"
        head += self.head
        self.file.write_text(head + self.exports)

    def command(self, *arguments: str) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "gnbd.server.cli", *arguments, str(self.file)]

    def join(self) -> None:
        join_cluster(self.state_dir, self.identity)

    def join_by_command(self) -> None:
        self.write_config()
        token = encode_server_token(self.identity)
        subprocess.run(self.command("--join", token), check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        if self.port == 0:
            self.port = keep_port(self)
        self.write_config()
        mark = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stderr=log, stdout=log, env={**os.environ, **self.environment}
            )

        def ready() -> bool:
            assert self.process is not None
            text = self.log.read_text()[mark:]
            assert self.process.poll() is None, text
            return "gnbd-server: ready" in text

        try:
            wait_for(ready, "server start")
        except BaseException:  # the caller has nothing yet that it could stop
            self.kill()
            raise

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def _end(self, number: int) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)

    @contextmanager
    def control(self, node: int = 1, incarnation: int = INCARNATION) -> Iterator[BlockingControl]:
        peer = Peer(node, self.identity.cluster_id_bytes, Incarnation(incarnation))
        with open_blocking(list(self.addresses), self.port, self.identity.keys, peer) as control:
            yield control

    def report(self, export: str) -> m.ExportReport:
        """What it says of an export."""
        with self.control() as control:
            found = control.ask(m.ExportsRequest(), m.ExportsReport).exports
        return next(one for one in found if one.name == export)

    def install(
        self, epoch: int, *members: MemberInfo, dead_ms: int = 3_600_000, node: int = 1
    ) -> None:
        """No clusterd sends the server heartbeats: a short `dead_ms` closes its gate (rule R3)."""
        with self.control(node) as control:
            control.ask(m.Install(Epoch(epoch), list(members), {}, dead_ms), m.Done)


def reserve_port() -> socket.socket:
    """A TCP port that nobody else is given while the socket is open; a server may listen on it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("0.0.0.0", 0))
    return sock


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def _own_network() -> Iterator[int]:
    """The number of a part of 10/8 that no other server of this kind uses."""
    octets = list(range(64, 250))
    random.SystemRandom().shuffle(octets)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as claim:
        for octet in octets:
            try:
                claim.bind(f"\0cfs-tests-10.{octet}")
            except OSError:
                continue
            yield octet
            return
    raise AssertionError("every part is taken")


@contextmanager
def two_networks() -> Iterator[tuple[str, tuple[str, str]]]:
    """A namespace for a server, with two links to here that can go silent: its name, and the
    addresses in it."""
    name = f"gnbd-{os.getpid()}"
    links = [f"gt{os.getpid() % 100000}a{n}" for n in (1, 2)]
    with _own_network() as octet:
        addresses = (f"10.{octet}.1.2", f"10.{octet}.2.2")
        _ip("netns", "add", name)
        try:
            for number, link in enumerate(links, 1):
                far = f"far{number}"
                _ip("link", "add", link, "type", "veth", "peer", "name", far, "netns", name)
                _ip("addr", "add", f"10.{octet}.{number}.1/24", "dev", link)
                _ip("link", "set", link, "up")
                _ip("-n", name, "addr", "add", f"{addresses[number - 1]}/24", "dev", far)
                _ip("-n", name, "link", "set", far, "up")
            yield name, addresses
        finally:
            for link in links:
                subprocess.run(["ip", "link", "del", link], capture_output=True)
            _ip("netns", "del", name)


def set_link(namespace: str, network: int, up: bool) -> None:
    """One of its two networks (0 or 1) goes silent, or comes back."""
    state = "up" if up else "down"
    _ip("-n", namespace, "link", "set", f"far{network + 1}", state)


@asynccontextmanager
async def opened(
    server: GnbdServer,
    who: Instance,
    export: str,
    info: ServerInfo | None = None,
    deadline_s: float = 120,
    **options: object,
) -> AsyncIterator[GnbdDevice]:
    """Our client on an export; `options` are those of `gnbd.client.device_io.Options`."""
    with trio.fail_after(deadline_s):
        async with trio.open_nursery() as nursery:
            device = await open_device(
                info or server.info,
                export,
                who,
                server.secret(who),
                nursery,
                Options(**options),  # type: ignore[arg-type]
            )
            try:
                yield device
            finally:
                with trio.CancelScope(shield=True):
                    await device.aclose()


def keep_port(owner: object) -> int:
    """A port that is reserved for as long as `owner` is there."""
    reserved = reserve_port()
    port: int = reserved.getsockname()[1]
    weakref.finalize(owner, os.close, reserved.detach())
    return port


def export_toml(
    name: str, path: Path, access: str = "plain", size: str = "64M", filters: str = ""
) -> str:
    return (
        f'[[exports]]\nname = "{name}"\npath = "{path}"\nsize = "{size}"\n'
        f'access = "{access}"\nfilters = [{filters}]\n'
    )


@contextmanager
def running(
    directory: Path,
    exports: str,
    addresses: tuple[str, ...] = ("127.0.0.1",),
    joined: bool = True,
    head: str = "",
    environment: dict[str, str] | None = None,
) -> Iterator[GnbdServer]:
    server = GnbdServer(directory, exports, addresses)
    server.head = head
    server.environment = environment or {}
    if joined:
        server.join()
    server.start()
    try:
        yield server
    finally:
        server.kill()
