"""What LOGIN and a reservation cost each request: our server with and without them, in turns.

The same requests go to a plain export and to one where the client has logged in and holds a
reservation for registrants only. The load is as light as it can be made here: requests that were
made before, in batches.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fencing.reservations import ReservationType, ServiceAction, Status
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.server.service_io import registration_key
from lab.block_server import GnbdServer, instance, member
from lab.raw_client import RawClient

NUMBER = 5
ME = instance(NUMBER)
"""Greater than those of the measurements before (an install never admits more), less than those of
the fences."""
BLOCK = 4096
ROUND_S = 0.1
ROUNDS_EACH = 20
"""Rounds of one kind of request for each round of the other measurements."""
REPLY_BYTES = 16
JOBS = {
    "4 KiB read QD1": (p.CMD_READ, 1),
    "4 KiB read QD32": (p.CMD_READ, 32),
    "4 KiB write QD32": (p.CMD_WRITE, 32),
}


def cpu_s(pid: int) -> float:
    """Processor time of a process, to the nanosecond."""
    return time.clock_gettime(~pid << 3 | 2)


@contextmanager
def reserved(server: GnbdServer, export: str, epoch: int) -> Iterator[RawClient]:
    """A client that has logged in, and reserved the export for registrants only."""
    server.install(epoch, member(1, (NUMBER,), NUMBER + 1))
    with RawClient(server) as client:
        assert client.login(ME, export).status == m.LOGIN_OK
        kind = int(ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
        request = m.ReserveOut(
            export, ME, int(ServiceAction.PREEMPT), registration_key(ME), 0, kind
        )
        with server.control() as control:
            assert control.ask(request, m.ReserveResult).status == Status.GOOD
        client.go(export)
        yield client


def batches(kind: int, depth: int, size_bytes: int) -> list[bytes]:
    """Requests as they are sent."""
    data = bytes(BLOCK) if kind == p.CMD_WRITE else b""
    return [
        b"".join(
            p.REQUEST.pack(
                p.REQUEST_MAGIC, 0, kind, 0, random.randrange(size_bytes // BLOCK) * BLOCK, BLOCK
            )
            + data
            for _ in range(depth)
        )
        for _ in range(256)
    ]


def load(client: RawClient, sent: list[bytes], answer_bytes: int) -> int:
    """Send batch after batch for a while; how many."""
    room, count, end = bytearray(answer_bytes), 0, time.monotonic() + ROUND_S
    while time.monotonic() < end:
        client.sock.sendall(sent[count % len(sent)])
        view = memoryview(room)
        while view:
            view = view[client.sock.recv_into(view) :]
        count += 1
    assert p.REPLY.unpack_from(room)[:2] == (p.REPLY_MAGIC, 0)
    return count


def costs(
    server: GnbdServer, plain: str, cluster: str, size_bytes: int, rounds: int, epoch: int
) -> dict[str, dict[str, list[float]]]:
    """Microseconds of the server's processor per request, each round with and without."""
    assert server.process is not None
    pid = server.process.pid
    found: dict[str, dict[str, list[float]]] = {}
    with RawClient(server, plain) as stranger, reserved(server, cluster, epoch) as known:
        for job, (kind, depth) in JOBS.items():
            sent = batches(kind, depth, size_bytes)
            answer = depth * (REPLY_BYTES + (BLOCK if kind == p.CMD_READ else 0))
            pair = found[job] = {"with": [], "without": []}
            for number in range(rounds * ROUNDS_EACH):
                order = [("with", known), ("without", stranger)]
                for name, client in order if number % 2 else reversed(order):
                    before = cpu_s(pid)
                    count = load(client, sent, answer)
                    pair[name].append((cpu_s(pid) - before) / (count * depth) * 1e6)
    return found


def percent(pair: dict[str, list[float]]) -> float:
    """How much more, by the median of neighbours."""
    ratios = [a / b for a, b in zip(pair["with"], pair["without"], strict=True)]
    return (statistics.median(ratios) - 1) * 100
