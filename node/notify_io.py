"""systemd's readiness protocol: one datagram to NOTIFY_SOCKET."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(text: str) -> None:
    """Tell systemd, if it started us: `READY=1`, `STATUS=...`, `STOPPING=1`."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.sendall(text.encode())
