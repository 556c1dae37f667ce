"""The control socket for command-line tools: blocking, without trio.

One connection per call. Errors of the daemon come back as StackError with hint and exit code.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.control import Call, Event, Reply, decode_line_untrusted, encode_line
from cluster.errors import UnreachableError, connect_failure
from cluster.errors_wire import raise_failure
from cluster.paths_io import control_socket

TIMEOUT_S = 60.0
_READ_BYTES = 1 << 16


def _connect(path: Path, timeout_s: float | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise connect_failure(error, path) from error
    return sock


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """clusterd may end, or start anew, at any moment."""
    try:
        yield
    except TimeoutError as error:
        raise UnreachableError("clusterd does not answer in time") from error
    except OSError as error:
        raise UnreachableError(f"the connection to clusterd broke: {error}") from error


def _messages(sock: socket.socket) -> Iterator[Call | Reply | Event]:
    buffer = bytearray()
    while True:
        with _talking():
            data = sock.recv(_READ_BYTES)
        if not data:
            return
        buffer += data
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            yield decode_line_untrusted(line)


def call(
    method: str,
    params: Mapping[str, Any] | None = None,
    run_dir: Path | str | None = None,
    timeout_s: float | None = TIMEOUT_S,
) -> Any:
    """Call one method of the local clusterd and return its result."""
    with _connect(control_socket(run_dir), timeout_s) as sock:
        with _talking():
            sock.sendall(encode_line(Call(1, method, dict(params or {}))))
        for message in _messages(sock):
            if isinstance(message, Reply) and message.id == 1:
                if message.error is not None:
                    raise_failure(message.error)
                return message.result
    raise UnreachableError(f"clusterd closed the connection during {method}")


def follow(
    method: str, params: Mapping[str, Any] | None = None, run_dir: Path | str | None = None
) -> Iterator[Event]:
    """Call a method and yield the events that clusterd pushes afterwards, until it closes."""
    with _connect(control_socket(run_dir), None) as sock:
        with _talking():
            sock.sendall(encode_line(Call(1, method, dict(params or {}))))
        for message in _messages(sock):
            if isinstance(message, Event):
                yield message
            elif isinstance(message, Reply) and message.error is not None:
                raise_failure(message.error)
