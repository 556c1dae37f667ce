"""TLS of a connection: a thread that carries bytes between the peer and a socket pair.

Everything behind that pair, negotiation and transmission in C, is the same as without TLS: there is
no second semantics, only copies. Both directions share the thread, because a TLS session must not
be used by two at once; each holds at most one piece.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading

from cluster.errors import ConfigError, ForeignError
from cluster.tls import TlsSection
from gnbd.exports import Tls

PIECE_BYTES = 256 << 10
HANDSHAKE_TURNS = 4


def server_context(tls: Tls) -> ssl.SSLContext:
    """Certificate, key and whom to believe. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, tls.certificate, tls.key, tls.authority, "tls")
    if tls.authority:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def certificate_problem(tls: Tls) -> str:
    """Why no client can believe the certificate at this time, whoever its authority is: it has
    expired, say. Empty if nothing is wrong. Raises ConfigError."""
    ours = server_context(Tls(tls.certificate, tls.key))
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    theirs.check_hostname = False
    theirs.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate itself is enough
    theirs.load_verify_locations(tls.certificate)
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [theirs.wrap_bio(down, up), ours.wrap_bio(up, down, server_side=True)]
    for end in ends * HANDSHAKE_TURNS:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            return f"tls: no client believes {tls.certificate}: {error.verify_message}"
    return ""


def _load(
    context: ssl.SSLContext, certificate: str, key: str, authority: str, section: str
) -> None:
    """Raises ConfigError, which names the file."""
    for path in filter(None, (certificate, key, authority)):
        try:
            open(path, "rb").close()
        except (OSError, ValueError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"{section}: cannot read {path!r}: {what}") from error
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{section}: {certificate} and {key} are no pair of certificate and key in PEM: "
            f"{error.reason or error}"
        ) from error
    try:
        if authority:
            context.load_verify_locations(authority)
    except ssl.SSLError as error:
        why = error.reason or error
        raise ConfigError(f"{section}: {authority} has no certificates in PEM: {why}") from error


def _no_password() -> str:
    """Nobody is asked for one: a daemon would wait for its terminal."""
    hint = "openssl pkey -in KEY -out NEW takes it off"
    raise ConfigError("tls: the key has a password", hint=hint)


def client_context(tls: TlsSection) -> ssl.SSLContext:
    """The same for a client. The server's name is the caller's to check. Raises ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    _load(context, tls.certificate, tls.key, tls.authority, "[tls] in node.toml")
    return context


def secure(
    sock: socket.socket, tls: TlsSection, server: str, timeout_s: float, *, is_host: bool
) -> TlsLink:
    """The client's handshake of TLS (blocking). `sock` is used up. `server`: what the certificate
    must have as its common name, or if `is_host` among its alternative names. Raises ConfigError,
    ForeignError, OSError."""
    context = client_context(tls)
    context.check_hostname = is_host
    try:
        link = TlsLink(sock, context, timeout_s, host=server if is_host else "")
    except ssl.SSLCertVerificationError as error:
        raise ForeignError(
            f"the certificate of server {server} is not believed: {error.verify_message}",
            hint="its authority must be the one that this client was given ([tls] in node.toml)",
        ) from error
    if not is_host and link.peer != server:
        link.abandon()
        raise ForeignError(
            f"the certificate of server {server} names {link.peer!r}",
            hint="give the server a certificate whose common name is its name in the cluster",
        )
    return link


def name_of(secured: ssl.SSLSocket) -> str:
    """Whom the peer's certificate names: its common name, else its first DNS name."""
    found: dict[str, object] = dict(secured.getpeercert() or {})
    for part in found.get("subject", ()):  # type: ignore[attr-defined]
        for key, value in part:
            if key == "commonName":
                return str(value)
    for kind, value in found.get("subjectAltName", ()):  # type: ignore[attr-defined]
        if kind == "DNS":
            return str(value)
    return ""


class TlsLink:
    """One connection under TLS. `inner` is for its user: plain bytes."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        timeout_s: float,
        *,
        host: str | None = None,
    ) -> None:
        """The handshake of TLS. `host`: the server's, to be checked if it is not empty; None: this
        is the server. Raises OSError."""
        sock.settimeout(timeout_s)
        self.problem = ""
        """Why it ended, if not in order."""
        self._outer = context.wrap_socket(
            sock, server_side=host is None, server_hostname=host or None
        )
        self.peer = name_of(self._outer)
        self.inner, self._pair = socket.socketpair()
        self._outer.setblocking(False)
        self._pair.setblocking(False)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def wire(self) -> socket.socket:
        """What leads to the peer: to be asked about, not to be used."""
        return self._outer

    def abandon(self) -> None:
        """End it now; what is on the way is lost."""
        self.inner.close()
        self.close(0)

    def close(self, timeout_s: float) -> None:
        """After `inner` was closed: passes on what it sent, if the peer takes it."""
        self._thread.join(timeout_s)
        try:
            # SSLSocket's own forgets its session first: the thread would send on without TLS.
            socket.socket.shutdown(self._outer, socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster
        self._thread.join()
        self._outer.close()

    def _run(self) -> None:
        try:
            self._carry()
        except OSError as error:  # either side has gone: the other one learns it now
            self.problem = str(error)
        finally:
            self._pair.close()

    def _carry(self) -> None:
        inward = outward = memoryview(b"")
        reading = True
        while True:
            moved = False  # then more may be ready that no poll would tell
            wants = {self._outer.fileno(): 0, self._pair.fileno(): 0}
            if not outward:
                try:
                    outward = memoryview(self._pair.recv(PIECE_BYTES))
                    if not outward:
                        self._say_goodbye()
                        return
                    moved = True
                except BlockingIOError:
                    wants[self._pair.fileno()] |= select.POLLIN
            if outward:
                sent = self._send_outward(outward, wants)
                outward, moved = outward[sent:], moved or sent > 0
            if reading and not inward:
                inward, reading = self._receive_inward(wants)
                moved = moved or len(inward) > 0 or not reading
            if inward:
                try:
                    inward = inward[self._pair.send(inward) :]
                    moved = True
                except BlockingIOError:
                    wants[self._pair.fileno()] |= select.POLLOUT
                except BrokenPipeError:  # the server takes no more; its answers still go out
                    inward, reading, moved = memoryview(b""), False, True
            if not moved:
                poll = select.poll()
                for descriptor, events in wants.items():
                    if events:  # one that has hung up would be reported without end
                        poll.register(descriptor, events)
                poll.poll()

    def _send_outward(self, data: memoryview, wants: dict[int, int]) -> int:
        try:
            return self._outer.send(data)
        except ssl.SSLWantWriteError:
            wants[self._outer.fileno()] |= select.POLLOUT
        except ssl.SSLWantReadError:
            wants[self._outer.fileno()] |= select.POLLIN
        return 0

    def _receive_inward(self, wants: dict[int, int]) -> tuple[memoryview, bool]:
        """What came, and whether more may come."""
        try:
            data = self._outer.recv(PIECE_BYTES)
        except ssl.SSLWantReadError:
            wants[self._outer.fileno()] |= select.POLLIN
            return memoryview(b""), True
        except ssl.SSLWantWriteError:
            wants[self._outer.fileno()] |= select.POLLOUT
            return memoryview(b""), True
        if not data:
            self._pair.shutdown(socket.SHUT_WR)
        return memoryview(data), bool(data)

    def _say_goodbye(self) -> None:
        """The server is done; the client's own goodbye is not waited for."""
        try:
            self._outer.unwrap()
        except (ssl.SSLError, OSError):
            pass
