"""Real gnbd-server processes for tests."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.control import MemberInfo, ServerInfo
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId, ServerId
from cluster.wire import instance_secret
from gnbd import messages as m
from gnbd.control_blocking_io import BlockingControl, open_blocking
from gnbd.control_session import Peer
from gnbd.identity import ServerIdentity, encode_server_token
from gnbd.server_io import join_cluster

DEADLINE_S = 20.0
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

    def __init__(self, directory: Path, exports: str, addresses: tuple[str, ...] = ("127.0.0.1",)):
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
        program = "from gnbd.control_cli import control_main; control_main()"
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
        return [*self.prefix, sys.executable, "-m", "gnbd.cli", *arguments, str(self.file)]

    def join(self) -> None:
        join_cluster(self.state_dir, self.identity)

    def join_by_command(self) -> None:
        self.write_config()
        token = encode_server_token(self.identity)
        subprocess.run(self.command("--join", token), check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        if self.port == 0:
            self.port = free_port()
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

        wait_for(ready, "server start")

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
        self, epoch: int, *members: MemberInfo, dead_ms: int = 60_000, node: int = 1
    ) -> None:
        with self.control(node) as control:
            control.ask(m.Install(Epoch(epoch), list(members), {}, dead_ms), m.Done)


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


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
