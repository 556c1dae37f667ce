"""The gnbd-server process: listeners, a thread per connection, the clock of rule R3, the end.

A connection thread negotiates (`handshake`, pure), answers private options, and then runs the
data loop (`transmission_io`). SIGTERM cuts everybody off, flushes everything, ends with 0.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import msgspec
import structlog

from cluster.errors import ConfigError, ForeignError, ProtocolError
from cluster.holders_io import bind
from cluster.paths_io import lock_directory, read_store, write_durable
from cluster.register import decode_record_untrusted
from fencing.store_io import StateFile
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.backends_io import check_disks
from gnbd.control_server_io import ControlServer
from gnbd.export_io import Connection
from gnbd.exports import ServerConfig
from gnbd.handshake import (
    GREETING,
    Close,
    Denied,
    Enter,
    Handshake,
    Offer,
    Private,
    Send,
)
from gnbd.identity import ServerIdentity, decode_identity, encode_identity
from gnbd.service_io import Service
from gnbd.transmission_io import Transmission
from gnbd.voter_io import Voter

CONNECTIONS_MAX = 1024
BACKLOG = 128
TICK_S = 0.1
HANDSHAKE_S = 30.0
log = structlog.get_logger("gnbd")


class _View:
    """What one client may see (handshake.Directory)."""

    def __init__(self, service: Service, connection: Connection) -> None:
        self._service = service
        self._connection = connection

    def names(self) -> list[tuple[str, str]]:
        return self._service.names(self._connection.session)

    def find(self, name: str) -> Offer | Denied:
        return self._service.find(name, self._connection.session)


class _Negotiation:
    """One connection until transmission, or for ever if it is a CONTROL session."""

    def __init__(self, server: Server, connection: Connection) -> None:
        self._server = server
        self._connection = connection
        self._hello: m.LoginHello | None = None
        self._nonce = b""
        self._control: ControlServer | None = None

    def run(self) -> Enter | None:
        """Negotiate. None: the connection is over."""
        sock = self._connection.sock
        handshake = Handshake(_View(self._server.service, self._connection))
        end_s = time.monotonic() + HANDSHAKE_S
        sock.settimeout(HANDSHAKE_S)
        sock.sendall(GREETING)
        while not handshake.ended:
            action = handshake.next()
            if self._control is not None and self._control.trusted:
                handshake.trusted = True
                sock.settimeout(None)
            else:
                # A stranger that says nothing, or a byte now and then, does not hold a thread.
                sock.settimeout(max(0.001, end_s - time.monotonic()))
            match action:
                case None:
                    data = sock.recv(handshake.wanted_bytes())
                    if not data:
                        return None
                    handshake.feed(data)
                case Send(data):
                    sock.sendall(data)
                case Private(option, data):
                    sock.sendall(self._private(handshake, option, data))
                case Enter():
                    sock.sendall(handshake.entry_bytes())
                    return action
                case Close(reason):
                    log.debug("closed", peer=self._connection.peer, reason=reason)
                    return None
        return None

    def _private(self, handshake: Handshake, option: int, data: bytes) -> bytes:
        identity = self._server.identity
        if identity is None or self._server.voter is None:
            return handshake.refusal(option, p.REP_ERR_POLICY, "this server is in no cluster")
        if option == p.OPT_CONTROL:
            if self._control is None:
                self._control = ControlServer(self._server.service, self._server.voter, identity)
            return handshake.private_reply(option, self._control.handle_untrusted(data))
        try:
            opening = m.decode_opening_untrusted(data)
        except ProtocolError:
            return handshake.refusal(option, p.REP_ERR_INVALID, "malformed login")
        if isinstance(opening, m.LoginHello) and self._connection.session is None:
            self._hello = opening
            self._nonce = secrets.token_bytes(m.NONCE_BYTES)
            answer: msgspec.Struct = m.LoginNonce(self._nonce)
        elif isinstance(opening, m.LoginProof) and self._hello is not None:
            hello, self._hello = self._hello, None
            answer = self._server.service.login(self._connection, hello, self._nonce, opening.proof)
        else:
            return handshake.refusal(option, p.REP_ERR_INVALID, "login out of order")
        return handshake.private_reply(option, msgspec.msgpack.encode(answer))


class Server:
    """One gnbd-server process."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        state_dir = Path(config.state_dir)
        check_before_start(config, state_dir)
        # A refusal makes no directory; but another server is a better reason than its port.
        used = (state_dir / "lock").exists()
        self._state_lock = lock_directory(state_dir, "gnbd-server") if used else -1
        self._listeners = [self._listen(address) for address in config.addresses]
        if not used:
            self._state_lock = lock_directory(state_dir, "gnbd-server")
        self.identity = load_identity(state_dir)
        self.service = Service(config, self.identity)
        self.voter = Voter(self.identity, state_dir) if self.identity else None
        self._stopped = threading.Event()
        self._count = threading.Semaphore(CONNECTIONS_MAX)

    def _listen(self, address: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bind(sock, address, self.config.port)
        sock.listen(BACKLOG)
        return sock

    @property
    def port(self) -> int:
        return int(self._listeners[0].getsockname()[1])

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        for listener in self._listeners:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        self._start_echoes()
        self._ready()
        while not self._stopped.wait(TICK_S):
            self.service.tick()
        for listener in self._listeners:
            listener.close()
        self.service.stop()
        log.info("stopped")

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped.set()

    def _ready(self) -> None:
        names = ", ".join(sorted(self.service.exports)) or "nothing"
        print(
            f"gnbd-server: ready on port {self.port}, exports {names}", file=sys.stderr, flush=True
        )
        notify_ready()

    def _start_echoes(self) -> None:
        if self.voter is None or not self.config.heartbeat_port:
            return
        for address in self.config.addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.settimeout(1.0)
            bind(sock, address, self.config.heartbeat_port)
            threading.Thread(
                target=self.voter.serve_echoes, args=(sock, self._stopped), daemon=True
            ).start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopped.is_set():
            try:
                sock, address = listener.accept()
            except OSError:
                if self._stopped.is_set():
                    return
                self._stopped.wait(TICK_S)  # out of descriptors: let some end
                continue
            if not self._count.acquire(blocking=False):
                log.warning("too many connections", peer=address[0])
                sock.close()
                continue
            connection = Connection(sock, f"{address[0]}:{address[1]}")
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: Connection) -> None:
        try:
            self._tune(connection.sock)
            entered = _Negotiation(self, connection).run()
            if entered is not None:
                connection.sock.settimeout(None)
                export = self.service.attach(connection, entered.offer.name)
                if export is not None:
                    Transmission(self.service, connection, export, entered).run()
        except (OSError, ProtocolError) as error:
            log.debug("connection ended", peer=connection.peer, error=str(error))
        except Exception:
            log.exception("connection failed", peer=connection.peer)
        finally:
            self.service.detach(connection)
            connection.sock.close()
            self._count.release()

    @staticmethod
    def _tune(sock: socket.socket) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def check_before_start(config: ServerConfig, state_dir: Path) -> None:
    """Refuse what must be refused before anything is made or changed. Raises StackError."""
    for path in (state_dir, *state_dir.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"state_dir: {path} is not a directory")
    load_identity(state_dir)
    StateFile(state_dir / "fencing.state").load()
    record = read_store(state_dir / "acceptor")
    if record is not None:
        decode_record_untrusted(record)
    check_disks(config.exports)


def load_identity(state_dir: Path) -> ServerIdentity | None:
    """server.toml, if this server has joined a cluster."""
    path = state_dir / "server.toml"
    try:
        return decode_identity(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def join_cluster(state_dir: Path, identity: ServerIdentity) -> bool:
    """Store the identity once. False if it was there already. Raises on another cluster's."""
    present = load_identity(state_dir)
    if present is not None:
        if present != identity:
            raise ForeignError(
                f"this server is already {present.name} of cluster {present.cluster_name}",
                hint=f"remove {state_dir}/server.toml if it shall leave that cluster",
            )
        return False
    write_durable(state_dir / "server.toml", encode_identity(identity).encode())
    return True


def notify_ready() -> None:
    """sd_notify READY=1, if systemd wants it."""
    target = os.environ.get("NOTIFY_SOCKET")
    if not target:
        return
    address = "\0" + target[1:] if target.startswith("@") else target
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)
            sock.send(b"READY=1")
        except OSError as error:
            log.warning("cannot notify", error=str(error))
