"""The mesh: messages between the member processes of a group, in order and without loss.

One `Link` per other member. It numbers what it sends (1, 2, ...), keeps it until the peer has
acknowledged it, and delivers what it receives in the order of the numbers, each once. A link runs
over one of several paths (one TCP connection per network); when the active path breaks or does
not acknowledge in time, everything unacknowledged is sent again on another one.

Group events pass through the same streams: at every group event each link to a survivor carries a
marker (epoch, seq). What comes after a marker is held back until this side has taken the same
event; so a message that was sent after event E is delivered after E. Messages of members that
failed are dropped as soon as the view without them is taken, also those that were held back.

An acknowledgement rides on the next batch of the other direction; without one it goes by itself,
after a fraction of the time after which the peer would try another path, or many items.

Invariants: numbers of a link rise by one; `received` only grows; a message is delivered at most
once; what is sent again is byte for byte the same; nothing of a removed member is delivered.
A connection from somebody who is not (yet) a member is parked by the shell, bounded.

Wire, inside an authenticated stream frame (cluster/wire.py), msgpack arrays:

| struct | fields |
|---|---|
| Hello | group, instance, to, mesh id (random per life), path, nonce, received |
| Batch | ack, number of the first item, items: bytes = message, [epoch, seq] = marker |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Protocol

import msgspec

from cluster.control import GroupEvent, GroupMember
from cluster.errors import BusyError
from cluster.ids import Instance

SEND_BYTES_MAX = 256 << 20
BATCH_BYTES_MAX = 1 << 20
BATCH_ITEMS_MAX = 4096
HELD_ITEMS_MAX = 1 << 16
OWED_ITEMS_MAX = 256
"""After so many items without a batch of our own they are acknowledged at once."""
RETRIES_PER_ACK = 16
"""The wait for a batch that carries an acknowledgement, as a part of the retry time."""
PATHS_MAX = 4
RETRY_SHIFT_MAX = 4


class Marker(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A group event in the stream of a link."""

    epoch: int
    seq: int


class Hello(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """First frame in each direction of a connection."""

    group: str
    instance: Instance
    to: Instance
    mesh_id: int
    path: int
    nonce: bytes
    received: int


class Batch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Items in order, and how far the other direction has been received."""

    ack: int
    first: int
    items: list[bytes | Marker] = []


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message from another member; `marker` is the last group event its sender had taken."""

    source: Instance
    payload: bytes
    marker: Marker = Marker(0, 0)


class View(msgspec.Struct, frozen=True):
    """A group event at its place in the stream."""

    event: GroupEvent


MeshEvent = Message | View
Deliver = Callable[[MeshEvent], None]


class Mesh(Protocol):
    """What the lock manager sees of the mesh (mesh_io and mesh_memory implement it)."""

    @property
    def me(self) -> Instance: ...

    def start(self, deliver: Deliver) -> None:
        """Begin delivery, in order, synchronously. What came before is delivered first."""
        ...

    def send(self, to: Instance, payload: bytes) -> None:
        """Queue a message. To somebody who is no member (any more) it vanishes."""
        ...

    def group_event(self, event: GroupEvent) -> None:
        """Feed in the events of the group, all of them and in order."""
        ...


class Transmit(msgspec.Struct, frozen=True):
    """Send this batch on that path of the link to `peer`."""

    peer: Instance
    path: int
    batch: Batch


class Opened(msgspec.Struct, frozen=True):
    """`member` is now in the group: connect to it, take up its parked connections."""

    member: GroupMember


class Closed(msgspec.Struct, frozen=True):
    """`peer` is out: close its connections."""

    peer: Instance


class Out(msgspec.Struct, frozen=True):
    """Deliver this to the user of the mesh."""

    event: MeshEvent


MeshAction = Transmit | Opened | Closed | Out


def _size(item: bytes | Marker) -> int:
    return len(item) + 8 if isinstance(item, bytes) else 16


class Link:
    """Both directions of the conversation with one member."""

    def __init__(self, member: GroupMember, retry_ns: int) -> None:
        self.member = member
        self.mesh_id: int | None = None
        self.paths: set[int] = set()
        self.connections = 0
        self.active: int | None = None
        self.received = 0
        self.markers_from = Marker(0, 0)
        self.held: deque[bytes | Marker] = deque()
        self._retry_ns = retry_ns
        self._unacked: deque[bytes | Marker] = deque()
        self._unacked_first = 1
        self._unacked_bytes = 0
        self._sent = 0
        self._ack_due = False
        self._owed = 0
        self._owed_since: int | None = None
        self._stalled_since: int | None = None
        self._retries = 0

    def push(self, item: bytes | Marker) -> None:
        """Queue one item. Raises BusyError when the peer has not acknowledged for far too long."""
        self._unacked.append(item)
        self._unacked_bytes += _size(item)
        if self._unacked_bytes > SEND_BYTES_MAX and isinstance(item, bytes):
            self._unacked.pop()
            self._unacked_bytes -= _size(item)
            raise BusyError(f"the mesh link to {self.member.instance} is full")

    def path_up(self, path: int, received: int) -> None:
        """A connection is there; the peer has everything up to `received`."""
        self.acknowledged(received)
        self.paths.add(path)
        self.connections += 1
        if self.active is None:
            self._activate(path)

    def path_down(self, path: int) -> None:
        """The connection is gone; go on over another one if there is one."""
        self.paths.discard(path)
        if self.active == path:
            self.active = None
            if self.paths:
                self._activate(min(self.paths))

    def _activate(self, path: int | None) -> None:
        self.active = path
        self._sent = self._unacked_first - 1
        self._ack_due = True
        self._stalled_since = None

    def acknowledged(self, ack: int) -> None:
        """The peer has received everything up to `ack`."""
        progress = False
        while self._unacked_first <= ack and self._unacked:
            self._unacked_bytes -= _size(self._unacked.popleft())
            self._unacked_first += 1
            progress = True
        if progress:
            self._sent = max(self._sent, self._unacked_first - 1)
            self._stalled_since = None
            self._retries = 0

    def take(self, batch: Batch) -> list[bytes | Marker]:
        """The new items of a batch, in order; duplicates and what lies behind a gap are not."""
        self.acknowledged(batch.ack)
        if not batch.items:
            return []
        skip = self.received + 1 - batch.first
        self._owed += len(batch.items)
        # What comes again, or too early, says that the peer does not know how far we are.
        self._ack_due |= skip != 0 or self._owed > OWED_ITEMS_MAX
        if skip < 0 or len(self.held) > HELD_ITEMS_MAX:
            return []
        fresh = batch.items[skip:]
        self.received += len(fresh)
        return fresh

    def flush(self, now_ns: int) -> list[Transmit]:
        """Batches for everything that was not sent on the active path yet, or a bare ack that is
        due."""
        if self.active is None:
            return []
        if self._owed and self._owed_since is None:
            self._owed_since = now_ns
        actions: list[Transmit] = []
        end = self._unacked_first + len(self._unacked) - 1
        while self._sent < end or self._ack_due:
            first = self._sent + 1
            items: list[bytes | Marker] = []
            size = 0
            start = first - self._unacked_first
            for item in islice(self._unacked, start, start + BATCH_ITEMS_MAX):
                if items and size + _size(item) > BATCH_BYTES_MAX:
                    break
                items.append(item)
                size += _size(item)
            self._sent += len(items)
            self._ack_due = False
            self._owed, self._owed_since = 0, None
            actions.append(
                Transmit(self.member.instance, self.active, Batch(self.received, first, items))
            )
        if self._unacked and self._stalled_since is None:
            self._stalled_since = now_ns
        return actions

    def deadline(self) -> int | None:
        """When `tick` has something to do."""
        dues = [due for due in (self._retry_at(), self._ack_at()) if due is not None]
        return min(dues, default=None)

    def _retry_at(self) -> int | None:
        """When unacknowledged items go out again."""
        if self._stalled_since is None or not self._unacked or self.active is None:
            return None
        return self._stalled_since + (self._retry_ns << min(self._retries, RETRY_SHIFT_MAX))

    def _ack_at(self) -> int | None:
        """When items are acknowledged although nothing else is to be sent."""
        if self._owed_since is None or self.active is None:
            return None
        return self._owed_since + self._retry_ns // RETRIES_PER_ACK

    def tick(self, now_ns: int) -> None:
        """Acknowledge at last. The active path did not acknowledge in time: use the next one, from
        the first item."""
        ack_at = self._ack_at()
        self._ack_due |= ack_at is not None and now_ns >= ack_at
        due = self._retry_at()
        if due is None or now_ns < due:
            return
        later = sorted(path for path in self.paths if path != self.active)
        after = [path for path in later if self.active is not None and path > self.active]
        # The only path is tried again as well: the peer drops items when it holds back too many.
        self._retries += 1
        candidates = after or later
        self._activate(candidates[0] if candidates else self.active)

    def check(self) -> None:
        """Assert the invariants."""
        assert self._sent >= self._unacked_first - 1
        assert self._sent <= self._unacked_first + len(self._unacked) - 1
        assert self._unacked_bytes == sum(map(_size, self._unacked))
        assert self.active is None or self.active in self.paths


class MeshCore:
    """All links of one member and the order of group events in them."""

    def __init__(self, me: Instance, mesh_id: int, retry_ns: int) -> None:
        self.me = me
        self.mesh_id = mesh_id
        self.links: dict[Instance, Link] = {}
        self.installed = Marker(0, 0)
        self._retry_ns = retry_ns
        self._loopback: deque[bytes] = deque()

    def send(self, to: Instance, payload: bytes) -> None:
        """Queue a message; it leaves with the next `flush`."""
        if to == self.me:
            self._loopback.append(payload)
            return
        link = self.links.get(to)
        if link is not None:
            link.push(payload)

    def group_event(self, event: GroupEvent) -> list[MeshAction]:
        """Take a group event: links open and close, survivors get markers, held items go out."""
        marker = Marker(event.epoch, event.seq)
        if (marker.epoch, marker.seq) <= (self.installed.epoch, self.installed.seq):
            return []
        actions: list[MeshAction] = []
        if event.kind == "view":
            actions += self._membership(event)
        for link in self.links.values():
            link.push(marker)
        self.installed = marker
        actions.append(Out(View(event)))
        for peer in list(self.links):
            actions += self._release(self.links[peer])
        return actions

    def _membership(self, event: GroupEvent) -> list[MeshAction]:
        actions: list[MeshAction] = []
        wanted = {m.instance: m for m in event.members if m.instance != self.me}
        gone = [peer for peer in self.links if peer not in wanted or peer in event.joined]
        for peer in gone:
            del self.links[peer]
            actions.append(Closed(peer))
        for peer, member in wanted.items():
            if peer not in self.links:
                self.links[peer] = Link(member, self._retry_ns)
                actions.append(Opened(member))
        return actions

    def hello_ok(self, hello: Hello) -> bool:
        """True if a connection of `hello` belongs to the present life of that link."""
        link = self.links.get(hello.instance)
        return link is not None and link.mesh_id in (None, hello.mesh_id)

    def path_up(self, hello: Hello) -> None:
        """A connection has exchanged hellos (`hello_ok` was asked)."""
        link = self.links[hello.instance]
        link.mesh_id = hello.mesh_id
        link.path_up(hello.path, hello.received)

    def path_down(self, peer: Instance, path: int) -> None:
        """A connection broke."""
        link = self.links.get(peer)
        if link is not None:
            link.path_down(path)

    def receive(self, peer: Instance, batch: Batch) -> list[MeshAction]:
        """Take a batch of `peer`, from any path."""
        link = self.links.get(peer)
        if link is None:
            return []
        link.held.extend(link.take(batch))
        return self._release(link)

    def _release(self, link: Link) -> list[MeshAction]:
        """Deliver held items up to the first one behind an event that we have not taken."""
        actions: list[MeshAction] = []
        mine = (self.installed.epoch, self.installed.seq)
        while link.held:
            item = link.held[0]
            if isinstance(item, Marker):
                if (item.epoch, item.seq) > mine:
                    break
                link.markers_from = item
            else:
                actions.append(Out(Message(link.member.instance, item, link.markers_from)))
            link.held.popleft()
        return actions

    def flush(self, now_ns: int) -> list[MeshAction]:
        """What has to be transmitted now."""
        actions: list[MeshAction] = []
        while self._loopback:
            actions.append(Out(Message(self.me, self._loopback.popleft(), self.installed)))
        for link in self.links.values():
            actions += link.flush(now_ns)
        return actions

    def tick(self, now_ns: int) -> list[MeshAction]:
        """Acknowledge, switch paths that do not; returns as `flush`."""
        for link in self.links.values():
            link.tick(now_ns)
        return self.flush(now_ns)

    def deadline(self) -> int | None:
        """When `tick` wants to be called."""
        times = [due for link in self.links.values() if (due := link.deadline()) is not None]
        return min(times, default=None)

    def check(self) -> None:
        """Assert the invariants of all links."""
        for peer, link in self.links.items():
            assert peer == link.member.instance != self.me
            link.check()
