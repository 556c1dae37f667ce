"""The gnbd-server process: listeners, a thread per connection, the clock of rule R3, the end.

A connection thread negotiates (`handshake`, pure), answers private options, and then runs the
data loop (`transmission_io`). SIGTERM answers what was received, flushes everything, ends with 0.
"""

from __future__ import annotations

import fcntl
import secrets
import signal
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from pathlib import Path
from types import FrameType

import msgspec
import structlog

from cluster.errors import ConfigError, ForeignError, ProtocolError, os_failure
from cluster.holders_io import bind
from cluster.paths_io import lock_directory, read_durable, read_store, write_durable
from cluster.register import decode_record_untrusted
from cluster.sizes import parse_size
from fencing.store_io import StateFile
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.exports import ServerConfig
from gnbd.identity import (
    LOCAL_IDENTITY,
    LOCAL_SOCKET,
    ServerIdentity,
    decode_identity,
    encode_identity,
)
from gnbd.server.backends_io import check_disks, check_served
from gnbd.server.catalogue_io import Catalogue, reload_or_complain
from gnbd.server.control_io import ControlServer
from gnbd.server.export_io import Connection
from gnbd.server.grown_io import GrownSizes
from gnbd.server.handshake import (
    GREETING,
    Close,
    Denied,
    Enter,
    Handshake,
    Offer,
    Private,
    Send,
    StartTls,
)
from gnbd.server.integrity_io import check_area
from gnbd.server.listeners_io import close_all, listen_all, listen_unix, peer_of, place_of
from gnbd.server.metrics_io import check_metrics, serve_metrics
from gnbd.server.service_io import Service
from gnbd.server.systemd_io import inherited_sockets, notify
from gnbd.server.transmission_io import Transmission
from gnbd.server.voter_io import Voter
from gnbd.tls_io import certificate_problem, server_context
from native import nbd

TICK_S = 0.1
UNIX_SEND_BYTES = 512 << 10
HANDSHAKE_S = 30.0
SENT_S = 2.0
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
        context = self._server.service.tls
        tls = self._server.config.tls
        handshake = Handshake(
            _View(self._server.service, self._connection),
            tls=context is not None and not self._connection.local,
            tls_required=tls is not None and tls.required and not self._connection.local,
        )
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
                case StartTls(data):
                    sock.sendall(data)
                    assert context is not None
                    self._connection.start_tls(context, max(0.001, end_s - time.monotonic()))
                    sock = self._connection.sock
                    handshake.secured(self._connection.client)
                case Enter():
                    sock.sendall(handshake.entry_bytes())
                    return action
                case Close(reason):
                    log.debug("closed", peer=self._connection.peer, reason=reason)
                    return None
        return None

    def _private(self, handshake: Handshake, option: int, data: bytes) -> bytes:
        local = self._connection.local and option == p.OPT_CONTROL
        if self._server.identity is None and not local:
            return handshake.refusal(option, p.REP_ERR_POLICY, "this server is in no cluster")
        if option == p.OPT_CONTROL:
            if self._control is None:
                self._control = self._server.control(local)
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

    def __init__(self, config: ServerConfig, source: Path) -> None:
        """`source`: the file that the configuration is from. Raises StackError."""
        self.config = config
        state_dir = Path(config.state_dir)
        check_before_start(config, state_dir)
        if config.tls is not None and (problem := certificate_problem(config.tls)):
            log.warning(problem)
        # A refusal makes no directory; but another server is a better reason than its port.
        used = (state_dir / "lock").exists()
        self._state_lock = lock_directory(state_dir, "gnbd-server") if used else -1
        self._inherited = inherited_sockets()
        for listener in self._inherited:
            # They stay open elsewhere: nothing but time gets a thread out of accept.
            listener.settimeout(TICK_S)
        if config.metrics:
            check_metrics(config.metrics)
        self._listeners = self._inherited or listen_all(config)
        if not used:
            self._state_lock = lock_directory(state_dir, "gnbd-server")
        self.identity = load_identity(state_dir)
        self.service = Service(config, self.identity)
        self.catalogue = Catalogue(self.service, source)
        self.voter = Voter(self.identity, state_dir) if self.identity else None
        nbd.set_memory_max(parse_size(config.memory_max))
        self._stopped = threading.Event()
        self._hang_up = threading.Event()
        self._count = threading.Semaphore(config.connections_max)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; SIGHUP reads the exports file again."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_hang_up)
        self._start_echoes()
        if self.config.metrics:
            serve_metrics(self.service, self.config.metrics)
        local = listen_unix(Path(self.config.state_dir) / LOCAL_SOCKET, 0o600)
        for listener in (*self._listeners, local):
            arguments = (listener, listener is local)
            threading.Thread(target=self._accept, args=arguments, daemon=True).start()
        threading.Thread(target=self._reload_when_told, daemon=True).start()
        self._ready()
        while not self._stopped.wait(TICK_S):
            self.service.tick()
        notify("STOPPING=1")
        close_all([local] if self._inherited else [*self._listeners, local])
        self.catalogue.close()
        self.service.stop()
        log.info("stopped")

    def control(self, local: bool) -> ControlServer:
        """The server's end of a CONTROL session."""
        identity = LOCAL_IDENTITY if local or self.identity is None else self.identity
        return ControlServer(self.service, self.catalogue, self.voter, identity, local)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped.set()

    def _on_hang_up(self, _number: int, _frame: FrameType | None) -> None:
        self._hang_up.set()

    def _reload_when_told(self) -> None:
        """A thread of its own: a reload may wait for a disk or a client, rule R3 may not."""
        while True:
            self._hang_up.wait()
            self._hang_up.clear()
            notify("RELOADING=1")
            reload_or_complain(self.catalogue)
            notify("READY=1")

    def _ready(self) -> None:
        names = ", ".join(sorted(self.service.exports)) or "nothing"
        places = ", ".join(sorted({place_of(listener) for listener in self._listeners}))
        print(f"gnbd-server: ready on {places}, exports {names}", file=sys.stderr, flush=True)
        notify("READY=1")

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

    def _accept(self, listener: socket.socket, local: bool) -> None:
        while not self._stopped.is_set():
            try:
                sock, address = listener.accept()
            except TimeoutError:
                continue
            except OSError:
                if self._stopped.is_set():
                    return
                self._stopped.wait(TICK_S)  # out of descriptors: let some end
                continue
            if not self._count.acquire(blocking=False):
                log.warning("too many connections", peer=peer_of(sock, address))
                sock.close()
                continue
            connection = Connection(sock, peer_of(sock, address), local=local)
            threading.Thread(target=self._connection, args=(connection,), daemon=True).start()

    def _connection(self, connection: Connection) -> None:
        try:
            self._tune(connection.sock)
            entered = _Negotiation(self, connection).run()
            if entered is not None:
                connection.sock.settimeout(None)
                export = self.service.attach(connection, entered.offer)
                if export is not None:
                    Transmission(self.service, connection, export, entered).run()
        except ssl.SSLError as error:
            log.warning("no TLS", peer=connection.peer, reason=str(error))
        except (OSError, ProtocolError) as error:
            log.debug("connection ended", peer=connection.peer, error=str(error))
        except Exception:
            log.exception("connection failed", peer=connection.peer)
        finally:
            self.service.detach(connection)
            if self.service.stopping:
                wait_sent(connection.sock)
            connection.sock.close()
            if connection.tls is not None:
                connection.tls.close(SENT_S)
            self._count.release()

    @staticmethod
    def _tune(sock: socket.socket) -> None:
        sock.settimeout(None)
        if sock.family == socket.AF_UNIX:
            # TCP makes its own room; here the reply to a long READ would go in pieces of 200 KiB,
            # server and client in turns.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)
            return
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)


def wait_sent(sock: socket.socket) -> None:
    """Return when the peer has what was sent: a close beside unread bytes would take it back."""
    end_s = time.monotonic() + SENT_S
    while time.monotonic() < end_s:
        try:
            (left,) = struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))
        except OSError:
            return
        if not left:
            return
        time.sleep(0.002)


def check_before_start(config: ServerConfig, state_dir: Path) -> None:
    """Refuse what must be refused before anything is made or changed. Raises StackError."""
    for path in (state_dir, *state_dir.parents):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"state_dir: {path} is not a directory")
    load_identity(state_dir)
    served = StateFile(state_dir / "fencing.state").load().exports
    GrownSizes(state_dir / "grown.json")
    record = read_store(state_dir / "acceptor")
    if record is not None:
        decode_record_untrusted(record)
    if config.tls is not None:
        server_context(config.tls)
    check_disks(config.exports)
    for export in config.exports:
        check_area(export, state_dir)
    check_served(config.exports, served)


def load_identity(state_dir: Path) -> ServerIdentity | None:
    """server.toml, if this server has joined a cluster."""
    path = state_dir / "server.toml"
    try:
        data = read_durable(path)
    except PermissionError as error:
        raise os_failure(error, f"cannot read {path}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return None if data is None else decode_identity(data, str(path))


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
