"""A small world for bars and reservations: servers that execute late, die and come back.

The servers are those of `fence_server`. Views follow one another; two coordinators install them,
late, twice and out of order. Nodes die, return as new incarnations, preempt each other and register
again.

What must hold, seen from outside:

- after an install was answered, nothing of an instance that its view bars changes the disk;
- after a PREEMPT AND ABORT was answered, nothing of whom it removed does, until that one has asked
  to be registered again;
- a barred instance is registered nowhere; a reservation of all registrants never ends by itself,
  and who is not registered does not write;
- a life of a server executes nothing before its first answered install, nor when it has heard no
  member for `DEAD_MS`;
- when all faults are over every node that is a member can write.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cluster.control import MemberInfo
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from tests.sim.fence_server import DEAD_MS, Server, View, Write
from tests.sim.world import MS, LivenessFailure, Violation, World

NODES = (1, 2, 3)
DIES_SAVING, DIES_SAVING_FIRST = 0.06, 0.3
RUN = 12_000 * MS
SETTLE = 6_000 * MS


class FenceWorld:
    """Servers, nodes, views, and an eye on everything."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.rng = self.world.rng
        self.members = {n: MemberInfo(NodeId(n), Incarnation(1), [InstanceNo(0), InstanceNo(1)],
                                      InstanceNo(2), f"n{n}") for n in NODES}  # fmt: skip
        self.tombstones: dict[NodeId, Incarnation] = {}
        self.down: set[int] = set()
        self.everybody: set[Instance] = set()
        self.views: list[View] = []
        self.barred: dict[int, set[Instance]] = {}
        self.removed: dict[int, set[Instance]] = {}
        self.heard_ns: dict[int, int] = {}
        self.held: set[int] = set()
        self.leaving: dict[tuple[int, Instance], int] = {}
        self.landings: dict[tuple[int, Instance], int] = {}
        self.refused = self.fences = self.preempts = 0
        self.faults = True
        self.decide()
        self.servers = self.new_servers()

    def new_servers(self) -> list[Server]:
        return [Server(self, name) for name in (1, 2)]

    @property
    def now(self) -> int:
        return self.world.now

    def later(self, mean_ms: float, action: Callable[[], None]) -> None:
        """After a random time."""
        self.world.at(int(self.rng.expovariate(1 / mean_ms) * MS) + 1, action)

    # --- the cluster

    def living(self) -> list[Instance]:
        """Who would write now."""
        return [
            Instance(m.node, m.incarnation, number)
            for m in self.members.values()
            if m.node not in self.down
            for number in m.live
        ]

    def decide(self) -> None:
        """The next view."""
        epoch = Epoch(len(self.views) + 1)
        members = [m for n, m in sorted(self.members.items()) if n not in self.down]
        self.views.append(View(epoch, members, dict(self.tombstones)))
        self.everybody |= {
            Instance(m.node, m.incarnation, InstanceNo(number))
            for m in members
            for number in range(m.next)
        }

    def change_view(self) -> None:
        """A node goes or comes back, or an instance dies and another one starts."""
        node = self.rng.choice(NODES)
        member = self.members[node]
        kind = self.rng.random()
        if node in self.down:
            self.down.discard(node)
            self.tombstones.pop(member.node, None)
            self.members[node] = msgspec.structs.replace(
                member, incarnation=Incarnation(member.incarnation + 1),
                live=[InstanceNo(0), InstanceNo(1)], next=InstanceNo(2),
            )  # fmt: skip
        elif kind < 0.5 and len(self.down) < len(NODES) - 1:
            self.down.add(node)
            self.tombstones[member.node] = member.incarnation
        elif len(member.live) > 1 and member.next < 6:
            live = [member.live[0], InstanceNo(member.next)]
            self.members[node] = msgspec.structs.replace(
                member, live=live, next=InstanceNo(member.next + 1)
            )
        self.decide()

    def coordinate(self) -> None:
        """Somebody installs the newest view, or is slow and installs an older one."""
        late = self.faults and self.rng.random() < 0.25
        view = self.rng.choice(self.views[-4:]) if late else self.views[-1]
        sender = self.rng.choice(view.members)
        for server in self.servers:
            if self.rng.random() < 0.85 or not self.faults:
                self.later(5, self.delivery(server, (sender.node, sender.incarnation), view))

    def delivery(self, server: Server, sender: tuple[int, int], view: View) -> Callable[[], None]:
        def deliver() -> None:
            if server.up:
                newest = server.admission.record
                members = view.members if newest is None else newest.members
                if any((m.node, m.incarnation) == sender for m in (*members, *view.members)):
                    self.heard_ns[server.name] = self.now
                server.install(sender, view)

        return deliver

    # --- the checker

    def executes(self, server: Server, write: Write) -> None:
        """A request has found that it may change the disk."""
        if not server.opened:
            raise Violation(f"s{server.name} executes before an install of this life")
        silent_ns = self.now - self.heard_ns.get(server.name, 0)
        if silent_ns > (DEAD_MS + 60) * MS:
            raise Violation(f"s{server.name} executes after {silent_ns // MS} ms of silence")
        if server.name in self.held and write.nexus not in server.table.keys:
            raise Violation(f"{write.nexus} writes on s{server.name} without a registration")

    def landed(self, server: Server, write: Write) -> None:
        """A write changes the disk."""
        if write.nexus in self.barred.get(server.name, ()):
            raise Violation(f"{write.nexus} writes on s{server.name} after its fence was answered")
        if write.nexus in self.removed.get(server.name, ()):
            raise Violation(f"{write.nexus} writes on s{server.name} after it was preempted")
        self.landings[server.name, write.nexus] = self.now

    def installed(self, server: Server, view: View) -> None:
        """An install is answered: whom this view bars is out here for ever."""
        self.fences += 1
        self.heard_ns[server.name] = self.now
        admitted = {m.node: m for m in view.members}
        out = set()
        for nexus in self.everybody:
            member = admitted.get(nexus.node)
            stone = view.tombstones.get(nexus.node, 0)
            if member is None:
                gone = nexus.incarnation <= stone
            elif nexus.incarnation == member.incarnation:
                gone = nexus.number not in member.live and nexus.number < member.next
            else:
                gone = nexus.incarnation < member.incarnation
            if gone:
                out.add(nexus)
        self.barred.setdefault(server.name, set()).update(out)
        self.look()

    def serial(self) -> int:
        """A number for a preemption."""
        self.preempts += 1
        return self.preempts

    def removes(self, server: Server, victim: Instance, serial: int) -> None:
        """A PREEMPT AND ABORT is in force, not yet answered."""
        if victim in server.table.keys:
            raise Violation(f"{victim} is registered on s{server.name} after its preemption")
        self.leaving[server.name, victim] = serial

    def preempted(self, server: Server, victim: Instance, serial: int) -> None:
        """It is answered. Who has asked to come back meanwhile is not concerned."""
        if self.leaving.get((server.name, victim)) == serial:
            self.removed.setdefault(server.name, set()).add(victim)

    def asked(self, server: Server, nexus: Instance) -> None:
        """It asks to be registered (again)."""
        if nexus in self.barred.get(server.name, ()):
            raise Violation(f"s{server.name} registers {nexus}, which is barred")
        self.leaving.pop((server.name, nexus), None)
        self.removed.get(server.name, set()).discard(nexus)

    def holds(self, server: Server) -> None:
        """From the first registration on the export is held for all registrants."""
        self.held.add(server.name)

    def look(self) -> None:
        """What can be seen at any time."""
        for server in self.servers:
            if not server.up:
                continue
            server.table.check()
            for nexus in self.barred.get(server.name, ()):
                if nexus in server.table.keys and not server.busy:
                    raise Violation(f"{nexus} is barred and registered on s{server.name}")
            if server.name in self.held and server.table.keys and server.table.type == 0:
                raise Violation(f"the reservation of s{server.name} has ended")

    # --- the course of things

    def act(self) -> None:
        """The nodes: everybody who lives or thinks so logs in, writes, fights now and then."""
        rng = self.rng
        for server in self.servers:
            if not server.up:
                continue
            server.tick()
            dead = sorted(self.everybody - set(self.living()))
            some = [*self.living(), *rng.sample(dead, min(len(dead), 3))]
            for nexus in some:
                if rng.random() < 0.2:
                    server.login(nexus)
                for path in range(2):
                    if rng.random() < 0.5:
                        self.later(3, self.sending(server, Write(nexus, path)))
            if self.faults and rng.random() < 0.1 and len(self.living()) > 1:
                server.preempt(*rng.sample(self.living(), 2))
        self.look()
        self.later(15, self.act)

    def sending(self, server: Server, write: Write) -> Callable[[], None]:
        return lambda: server.receive(write) if server.up else None

    def nemesis(self) -> None:
        """Servers die; the view changes; coordinators fall silent."""
        if not self.faults:
            return
        kind = self.rng.random()
        server = self.rng.choice(self.servers)
        if kind < 0.3:
            self.end(server)
        elif kind < 0.85:
            self.change_view()
        self.later(200, self.nemesis)

    def end(self, server: Server) -> None:
        """A server dies, and comes back."""
        if server.up:
            server.crash()
            self.later(100, server.boot)

    def saving(self, server: Server) -> None:
        """A server begins to save its state: some die over it, mostly over the first one."""
        chance = DIES_SAVING if server.has_saved else DIES_SAVING_FIRST
        if self.faults and self.rng.random() < chance:
            self.later(2, lambda: self.end(server))

    def coordinating(self) -> None:
        """Installs come again and again, with long silences while there are faults."""
        self.coordinate()
        quiet = self.faults and self.rng.random() < 0.05
        delay_ms = self.rng.randrange(1500) if quiet else self.rng.randrange(120)
        self.world.at(delay_ms * MS, self.coordinating)

    def run(self) -> None:
        """Faults, then rest. Raises Violation or LivenessFailure."""
        for begin in (self.act, self.nemesis, self.coordinating):
            begin()
        self.world.run(RUN)
        self.faults = False
        rest = self.now
        self.world.run(rest + SETTLE)
        for server in self.servers:
            for nexus in self.living():
                if self.landings.get((server.name, nexus), 0) < rest:
                    raise LivenessFailure(f"{nexus} cannot write on s{server.name}")


def run(seed: int) -> FenceWorld:
    """One seed."""
    world = FenceWorld(seed)
    world.run()
    return world
