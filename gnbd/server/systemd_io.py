"""What systemd and a service agree on: sockets that it opened, and how the service is
(sd_listen_fds(3), sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time

import structlog

FIRST_DESCRIPTOR = 3
log = structlog.get_logger("gnbd")


def inherited_sockets() -> list[socket.socket]:
    """The listening sockets that were passed to this process; the environment is cleared of them,
    so that no child believes that they are its own."""
    number = os.environ.pop("LISTEN_PID", "")
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if number != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for descriptor in range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(count)):
        os.set_inheritable(descriptor, False)
        found.append(socket.socket(fileno=descriptor))
    return found


def notify(state: str) -> None:
    """Tell the service manager, if there is one: READY=1, RELOADING=1, STOPPING=1."""
    target = os.environ.get("NOTIFY_SOCKET")
    if not target:
        return
    if state == "RELOADING=1":
        state += f"\nMONOTONIC_USEC={time.monotonic_ns() // 1000}"
    address = "\0" + target[1:] if target.startswith("@") else target
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(address)
            sock.send(state.encode())
        except OSError as error:
            log.warning("cannot notify", error=str(error))
