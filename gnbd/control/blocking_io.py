"""CONTROL sessions from command-line tools: blocking, without trio."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from cluster.errors import ForeignError, UnreachableError, os_failure
from cluster.wire import Keys
from gnbd import messages as m
from gnbd.control.client import CONNECT_TIMEOUT_S, ControlProtocol, expect
from gnbd.control.session import Peer
from gnbd.unix_paths_io import unix_address

A = TypeVar("A")
T = TypeVar("T", bound=m.Answer)


class _HungUpError(UnreachableError):
    """It closed the connection instead of an answer."""


class BlockingControl:
    """A session of a tool."""

    def __init__(self, protocol: ControlProtocol, sock: socket.socket) -> None:
        self._protocol = protocol
        self._sock = sock
        self._believed = False

    @property
    def server_id(self) -> int:
        return self._protocol.server_id

    def ask(self, request: m.Request, kind: type[T]) -> T:
        """One request; a refusal is raised."""
        try:
            answer = _drive_blocking(self._protocol.ask(request), self._sock)
        except _HungUpError:
            if self._believed:
                raise
            raise ForeignError(
                "the server does not believe this key: another cluster, or the keys differ",
                hint="compare [cluster] in node.toml with server.toml of the server",
            ) from None
        self._believed = True
        return expect(answer, kind)


def _drive_blocking(dialogue: Generator[bytes | int, bytes, A], sock: socket.socket) -> A:
    try:
        wanted = next(dialogue)
        while True:
            if isinstance(wanted, bytes):
                sock.sendall(wanted)
                wanted = next(dialogue)
                continue
            data = bytearray()
            while len(data) < wanted:
                more = sock.recv(wanted - len(data))
                if not more:
                    raise _HungUpError("the server closed the control session")
                data += more
            wanted = dialogue.send(bytes(data))
    except StopIteration as stop:
        result: A = stop.value
        return result
    except OSError as error:
        raise UnreachableError(f"the control session broke: {error}") from error


def _connect(address: str, port: int) -> socket.socket:
    """TCP, or a Unix socket if `address` is a path."""
    if not address.startswith("/"):
        return socket.create_connection((address, port), CONNECT_TIMEOUT_S)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with unix_address(Path(address)) as short:
            sock.connect(short)
    except OSError:
        sock.close()
        raise
    return sock


@contextmanager
def open_blocking(
    addresses: Sequence[str], port: int, keys: Keys, identity: Peer, timeout_s: float = 30.0
) -> Iterator[BlockingControl]:
    """A blocking session over the first address that answers. Raises UnreachableError,
    NotPermittedError."""
    problem: object = ""
    for address in addresses:
        try:
            sock = _connect(address, port)
        except OSError as error:
            if isinstance(error, PermissionError) and not port:  # a socket of this machine
                raise os_failure(error, f"cannot reach the server at {address}") from error
            problem = error.strerror or error
            continue
        with sock:
            sock.settimeout(timeout_s)
            protocol = ControlProtocol(keys, identity)
            _drive_blocking(protocol.open(secrets.token_bytes(m.NONCE_BYTES)), sock)
            yield BlockingControl(protocol, sock)
            return
    raise UnreachableError(
        f"no server answers at {', '.join(addresses)}{f' port {port}' if port else ''}: {problem}",
        hint="is gnbd-server running there?",
    )
