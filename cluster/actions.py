"""What the pure cores of this package ask their runner to do.

A runner feeds events to `core.step(now_ns, event)` and performs the returned actions **strictly in
order, also across steps**: an action that follows a `Persist` is performed only when that record is
durable. It calls `core.step(now_ns, Tick())` when `core.deadline()` has come (or at any other time:
a tick too early does nothing). `now_ns` is CLOCK_BOOTTIME. Lost messages are allowed everywhere;
the cores send again by themselves.
"""

from __future__ import annotations

from typing import Any

import msgspec

MS = 1_000_000


class Tick(msgspec.Struct, frozen=True):
    """Event: time has passed."""


class Received(msgspec.Struct, frozen=True):
    """Event: a message of an authenticated peer. `source` is its NodeId or ServerId."""

    source: int
    message: Any
    incarnation: int = 0


class Send(msgspec.Struct, frozen=True):
    """Send a message over the control session to a node (1..64) or a server (129..192). To the
    own id: the runner feeds it back as `Received`. No session: drop it."""

    to: int
    message: Any


class Datagram(msgspec.Struct, frozen=True):
    """Send a message by UDP over one network (0 or 1) to a node or a server."""

    to: int
    network: int
    message: Any


class Persist(msgspec.Struct, frozen=True):
    """Make the record durable (atomic replace, fsync) before the next action is performed."""

    record: bytes


class Notify(msgspec.Struct, frozen=True):
    """Something that the process around the core must know; see the core's event classes."""

    event: Any


class Reply(msgspec.Struct, frozen=True):
    """The end of a request that came in by an event with this `request` number. `error` is a
    StackError or None."""

    request: int
    result: Any = None
    error: Exception | None = None


Action = Send | Datagram | Persist | Notify | Reply
