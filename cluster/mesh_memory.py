"""A mesh without sockets: the same core, wires are queues, and a test decides what is delivered.

`MemoryHub` is a group in one process. `hub.view(members)` makes the next group event and hands it
to all members at once, or with `hold=True` leaves it to the test to call `hub.give(instance)`.
`hub.step(pick)` carries one batch of one wire, `hub.settle()` runs until nothing moves.
Everything is deterministic: wires are served in the order of (source, destination).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from cluster.control import GroupEvent, GroupMember
from cluster.ids import Epoch, Instance
from cluster.mesh import (
    Batch,
    Closed,
    Deliver,
    Hello,
    MeshAction,
    MeshCore,
    MeshEvent,
    Opened,
    Out,
    Transmit,
)

RETRY_NS = 1_000_000_000
STEPS_MAX = 1_000_000

Pick = Callable[[Sequence[tuple[Instance, Instance]]], int]


class MemoryMesh:
    """One member of a `MemoryHub`; implements the `Mesh` protocol."""

    def __init__(self, hub: MemoryHub, me: Instance, mesh_id: int) -> None:
        self.core = MeshCore(me, mesh_id, RETRY_NS)
        self._hub = hub
        self._deliver: Deliver | None = None
        self._early: deque[MeshEvent] = deque()

    @property
    def me(self) -> Instance:
        return self.core.me

    def start(self, deliver: Deliver) -> None:
        """Begin delivery; what was early is delivered now."""
        self._deliver = deliver
        while self._early:
            deliver(self._early.popleft())

    def send(self, to: Instance, payload: bytes) -> None:
        """Queue a message."""
        self.core.send(to, payload)

    def group_event(self, event: GroupEvent) -> None:
        """Take a group event."""
        self.perform(self.core.group_event(event))

    def perform(self, actions: Sequence[MeshAction]) -> None:
        """Carry out the actions of the core."""
        for action in actions:
            if isinstance(action, Out):
                if self._deliver is None:
                    self._early.append(action.event)
                else:
                    self._deliver(action.event)
            elif isinstance(action, Transmit):
                self._hub.wire(self.me, action.peer).append(action.batch)
            elif isinstance(action, Opened | Closed):
                self._hub.rewire(self.me)


class MemoryHub:
    """The wires and the group of a set of `MemoryMesh` members."""

    def __init__(self, group: str = "test") -> None:
        self.group = group
        self.members: dict[Instance, MemoryMesh] = {}
        self.crashed: set[Instance] = set()
        self.cut: set[tuple[Instance, Instance]] = set()
        self.epoch = Epoch(1)
        self._seq = 0
        self._mesh_ids = 0
        self._view: list[Instance] = []
        self._dead: list[Instance] = []
        self._silent: list[Instance] = []
        self._wires: dict[tuple[Instance, Instance], deque[Batch]] = {}
        self._pending: dict[Instance, deque[GroupEvent]] = {}

    def mesh(self, me: Instance) -> MemoryMesh:
        """Make the mesh of a process; it becomes a member with the next `view`."""
        self._mesh_ids += 1
        made = MemoryMesh(self, me, self._mesh_ids)
        self.members[me] = made
        self._pending[me] = deque()
        self.crashed.discard(me)
        return made

    def wire(self, source: Instance, to: Instance) -> deque[Batch]:
        """The queue of batches from `source` to `to`."""
        return self._wires.setdefault((source, to), deque())

    def rewire(self, me: Instance) -> None:
        """Connect `me` with every member when both sides have opened the link."""
        mine = self.members[me].core
        for peer, other in self.members.items():
            if peer == me or peer in self.crashed:
                continue
            there = other.core
            if peer not in mine.links or me not in there.links:
                continue
            if mine.links[peer].paths and there.links[me].paths:
                continue
            self.wire(me, peer).clear()
            self.wire(peer, me).clear()
            for one, two in ((mine, there), (there, mine)):
                seen = two.links[one.me].received
                one.path_up(Hello(self.group, two.me, one.me, two.mesh_id, 0, b"", seen))

    def crash(self, instance: Instance) -> None:
        """The process dies: nothing is delivered to it or sent by it any more."""
        self.crashed.add(instance)

    def view(self, members: Sequence[Instance], *, failed: bool = True, hold: bool = False) -> None:
        """The group is now `members`; who is missing has failed (or left, if not `failed`)."""
        new = sorted(members)
        gone = [one for one in self._view if one not in new]
        joined = [one for one in new if one not in self._view]
        if failed:
            self._dead += gone
        self._view = new
        self._emit(
            "view", hold, joined=joined, left=[] if failed else gone, failed=gone if failed else []
        )

    def silent(self, subject: Instance, *, hold: bool = False) -> None:
        """`subject` is fenced and its caches are gone."""
        self._silent.append(subject)
        self._emit("silent", hold, subject=subject)

    def released(self, subject: Instance, *, hold: bool = False) -> None:
        """The journal of `subject` has been replayed."""
        self._dead.remove(subject)
        self._silent = [one for one in self._silent if one != subject]
        self._emit("released", hold, subject=subject)

    def _emit(
        self,
        kind: str,
        hold: bool,
        joined: Sequence[Instance] = (),
        left: Sequence[Instance] = (),
        failed: Sequence[Instance] = (),
        subject: Instance | None = None,
    ) -> None:
        self._seq += 1
        event = GroupEvent(
            group=self.group,
            epoch=self.epoch,
            seq=self._seq,
            kind=kind,
            members=[GroupMember(one, f"n{one.node}", [], 0) for one in self._view],
            joined=list(joined),
            left=list(left),
            failed=list(failed),
            subject=subject,
            dead=list(self._dead),
            silent=list(self._silent),
        )
        for one in (*self._view, *left):
            if one not in self.crashed:
                self._pending[one].append(event)
        if not hold:
            for one in (*self._view, *left):
                self.give_all(one)

    def give(self, instance: Instance) -> bool:
        """Hand the next pending group event to one member. False if there is none."""
        pending = self._pending[instance]
        if not pending or instance in self.crashed:
            return False
        self.members[instance].group_event(pending.popleft())
        return True

    def give_all(self, instance: Instance) -> None:
        """Hand all pending group events to one member."""
        while self.give(instance):
            pass

    def _flush(self) -> None:
        for me in sorted(self.members):
            if me not in self.crashed:
                self.members[me].perform(self.members[me].core.flush(0))

    def ready(self) -> list[tuple[Instance, Instance]]:
        """The wires that could deliver now."""
        self._flush()
        return [
            key
            for key in sorted(self._wires)
            if self._wires[key] and key[1] not in self.crashed and key not in self.cut
        ]

    def step(self, pick: Pick = lambda _ready: 0) -> bool:
        """Deliver one batch of the wire that `pick` chooses. False if nothing moves."""
        ready = self.ready()
        if not ready:
            return False
        source, to = ready[pick(ready)]
        batch = self._wires[source, to].popleft()
        member = self.members[to]
        member.perform(member.core.receive(source, batch))
        return True

    def settle(self, pick: Pick = lambda _ready: 0) -> None:
        """Deliver until nothing moves."""
        for _ in range(STEPS_MAX):
            if not self.step(pick):
                return
        raise AssertionError("the mesh does not come to rest")
