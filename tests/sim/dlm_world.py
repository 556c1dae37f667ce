"""The lock manager of several members in one deterministic world, with clients that use it.

After each step of the world (`tests.sim.group_world`) the lock manager's invariants are checked
over all members. Dead ones count as well: their caches may still be served (until `silent`), or
their writes may still land (until `released`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.control import GroupEvent
from cluster.ids import Instance
from cluster.locks import Mode
from dlm.engine import Completion
from dlm.lockspace import Blocking, Left, Lockspace, Send
from dlm.messages import NO_MODE
from dlm.modes import (
    COMPATIBLE,
    COVERS,
    LVB_WRITERS,
    QUECVT_LEGAL,
    WRITE_MODES,
    Flags,
    Result,
)
from tests.sim.group_world import STEPS_MAX, GroupProcess, GroupWorld
from tests.sim.world import Violation

MODES = list(Mode)


@dataclass
class Client:
    """What the user of one lock knows."""

    name: bytes
    number: int
    mode: Mode | None = None
    pending: int = 0
    completions: int = 0
    ops: int = 0
    wanted: int = 0
    since: int = 0
    unlocking: bool = False


@dataclass(eq=False)
class Member(GroupProcess):
    """A process and its clients."""

    clients: dict[int, Client] = field(default_factory=dict)


class World(GroupWorld[Member]):
    """The whole, driven by one seed."""

    def __init__(self, seed: int, *, names: int = 4, members: int = 3, faults: bool = True) -> None:
        super().__init__(seed, [b"r%d" % n for n in range(names)], members, faults=faults)
        self.corpses: dict[Instance, list[tuple[bytes, Mode]]] = {}
        self.writes = 0
        self.lvb: dict[bytes, bytes | None] = {}
        self.history: dict[bytes, list[bytes | None]] = {}
        self.tokens: dict[bytes, tuple[int, int]] = {}
        for _ in range(members):
            self.birth()

    # The group.

    def start(self, me: Instance) -> Member:
        return Member(Lockspace(me), len(self.log))

    def bury(self, victim: Instance, member: Member) -> None:
        held = []
        for lock in member.space.owner.locks.values():
            if lock.sure > Mode.NL:
                held.append((lock.resource.name, Mode(lock.sure)))
                if lock.mode in LVB_WRITERS:
                    self.write_lvb(lock.resource.name, None)
        self.corpses[victim] = held

    def crash(self, victim: Instance) -> None:
        super().crash(victim)
        if self.random.random() < 0.2:
            # The recovery of the locks has nothing to do with that of the journal.
            self.silence(victim)
            self.release(victim)

    def silence(self, subject: Instance) -> None:
        self.corpses[subject] = [h for h in self.corpses[subject] if h[1] in WRITE_MODES]
        super().silence(subject)

    def release(self, subject: Instance) -> None:
        del self.corpses[subject]
        super().release(subject)

    # One step.

    def step(self, clients: float = 0.3) -> bool:
        """Do one thing; False if nothing can be done."""
        self.steps += 1
        moves = self.moves()
        if self.faults and self.random.random() < 0.01:
            self.fault()
        elif clients and (not moves or self.random.random() < clients):
            self.client_step()
        elif moves:
            self.move(*self.random.choice(moves))
        else:
            return False
        self.check()
        return True

    def receive(self, to: Instance, source: Instance, payload: bytes) -> None:
        member = self.members[to]
        member.space.now_ns = self.steps
        member.space.receive(source, payload)
        self.perform(to, member)

    def group_event(self, to: Instance, event: GroupEvent) -> None:
        member = self.members[to]
        self.note(f"{to} takes {event.kind} {event.seq}")
        member.space.group_event(event)
        self.perform(to, member)

    def perform(self, me: Instance, member: Member) -> None:
        for action in member.space.take():
            if isinstance(action, Send):
                self.send(me, action.to, action.payload)
            elif isinstance(action, Completion):
                self.completed(member, action)
            elif isinstance(action, Blocking):
                client = member.clients.get(action.lock)
                if client is not None:
                    client.wanted |= action.waiting
            elif isinstance(action, Left):
                self.left(me)

    def fault(self) -> None:
        chance = self.random.random()
        waiting = [one for one in self.dead if one not in self.silent]
        if chance < 0.35 and len(self.view) > 1:
            alive = [one for one in self.view if one in self.members]
            if len(alive) > 1:
                self.crash(self.random.choice(alive))
        elif chance < 0.55 and waiting:
            self.silence(self.random.choice(waiting))
        elif chance < 0.75 and self.silent:
            self.release(self.random.choice(self.silent))
        elif chance < 0.9 and len(self.view) < self.size:
            self.birth()
        elif len(self.view) > 1:
            me = self.random.choice(self.view)
            member = self.members.get(me)
            if member is not None and member.space.members:
                self.note(f"{me} leaves")
                self.leave(me, member)

    def leave(self, me: Instance, member: Member) -> None:
        member.leaving = True
        for number, client in member.clients.items():
            if not client.unlocking:
                client.unlocking = True
                client.ops += 1
                self.lowered(member, client, number, Flags.IVVALBLK, None, None)
        member.space.leave()
        self.perform(me, member)

    # Clients.

    def client_step(self) -> None:
        ready = self.ready()
        if not ready:
            return
        member = self.random.choice(ready)
        member.space.now_ns = self.steps
        free = [one for one in member.clients.values() if not one.unlocking]
        if not free or (len(free) < 4 and self.random.random() < 0.4):
            self.new_lock(member)
        else:
            client = self.random.choice(free)
            wanted = [one for one in free if one.wanted and not one.pending]
            if wanted and self.random.random() < 0.6:
                client = self.random.choice(wanted)
                self.obey(member, client)
            else:
                self.operate(member, client)
        self.perform(member.space.me, member)

    def new_lock(self, member: Member) -> None:
        name = self.random.choice(self.names)
        mode = self.random.choice(MODES)
        flags = Flags.VALBLK
        roll = self.random.random()
        if roll < 0.15:
            flags |= Flags.NOQUEUE
        elif roll < 0.2:
            flags |= Flags.NOQUEUE | Flags.NOQUEUEBAST
        elif roll < 0.25 and mode == Mode.NL:
            flags |= Flags.EXPEDITE
        number = member.space.lock(name, mode, flags)
        assert number is not None
        self.note(f"{member.space.me} lock {number} {name!r} {mode.name} {flags:#x}")
        member.clients[number] = Client(name, number, pending=1, ops=1, since=self.steps)

    def operate(self, member: Member, client: Client) -> None:
        roll = self.random.random()
        number = client.number
        if client.pending:
            if roll < 0.5:
                assert member.space.cancel(number) == Result.GRANTED
            elif roll < 0.7:
                self.unlock(member, client, Flags.FORCEUNLOCK)
            else:
                assert member.space.convert(number, Mode.EX) == Result.BUSY
        elif roll < 0.35:
            self.unlock(member, client, Flags.NONE)
        else:
            self.convert(member, client, self.random.choice(MODES))

    def value(self) -> bytes:
        self.writes += 1
        return b"%064d" % self.writes

    def lowered(
        self,
        member: Member,
        client: Client,
        number: int,
        flags: int,
        mode: Mode | None,
        lvb: bytes | None,
    ) -> None:
        """The client gives up a write mode: that is when its value block becomes the last one."""
        held = member.space.owner.locks[number].mode
        if held in LVB_WRITERS and (mode is None or not COVERS[mode][held] or mode == held):
            if flags & Flags.IVVALBLK:
                self.write_lvb(client.name, None)
            elif flags & Flags.VALBLK and lvb is not None:
                self.write_lvb(client.name, lvb)

    def unlock(self, member: Member, client: Client, flags: int) -> None:
        if self.random.random() < 0.7:
            flags |= Flags.VALBLK
        lvb = self.value()
        self.lowered(member, client, client.number, flags, None, lvb)
        client.unlocking = True
        client.ops += 1
        self.note(
            f"{member.space.me} unlock {client.number} {client.name!r} {flags:#x} {lvb[-4:]!r}"
        )
        result = member.space.unlock(client.number, flags, lvb)
        assert result == Result.GRANTED, result

    def convert(self, member: Member, client: Client, mode: Mode) -> None:
        held = Mode(member.space.owner.locks[client.number].mode)
        flags = Flags.NONE
        if self.random.random() < 0.7:
            flags |= Flags.VALBLK
        roll = self.random.random()
        if roll < 0.4 and QUECVT_LEGAL[held][mode]:
            flags |= Flags.QUECVT
        elif roll < 0.5:
            flags |= Flags.NOQUEUE
        elif roll < 0.55:
            flags |= Flags.CONVDEADLK
        lvb = self.value()
        self.lowered(member, client, client.number, flags, mode, lvb)
        client.pending = 1
        client.since = self.steps
        client.ops += 1
        me = member.space.me
        self.note(f"{me} convert {client.number} {client.name!r} {mode.name} {flags:#x}")
        result = member.space.convert(client.number, mode, flags, lvb)
        assert result == Result.GRANTED, result

    def obey(self, member: Member, client: Client) -> None:
        """A blocking callback: get out of the way."""
        if self.random.random() < 0.5:
            self.unlock(member, client, Flags.NONE)
        else:
            self.convert(member, client, Mode.NL)

    def completed(self, member: Member, done: Completion) -> None:
        client = member.clients.get(done.lock)
        if client is None:
            raise Violation(f"S6: callback of {done.lock} after its end")
        client.completions += 1
        if client.completions > client.ops:
            raise Violation(f"S6: {client.name!r} {done} completed twice")
        what = f"{done.result.name} {done.mode.name} {done.lvb_valid} {(done.lvb or b'')[-4:]!r}"
        self.note(f"{member.space.me} completed {done.lock} {client.name!r} {what}")
        if done.result == Result.UNLOCKED:
            if client.completions != client.ops:
                raise Violation(f"S6: an operation of {client.name!r} never completed")
            del member.clients[done.lock]
            return
        client.pending = 0
        if done.result == Result.GRANTED:
            client.mode = done.mode
            # The master tells again what still waits after a grant, not after a refusal.
            client.wanted = 0
            if done.lvb is not None and done.lvb_valid:
                self.read_lvb(client, done)
            if done.mode == Mode.EX and done.grant != (0, 0):
                if done.grant <= self.tokens.get(client.name, (0, 0)):
                    raise Violation(f"S10: token {done.grant} of {client.name!r} is not new")
                self.tokens[client.name] = done.grant
        elif client.mode is None and not client.unlocking:
            del member.clients[done.lock]

    def read_lvb(self, client: Client, done: Completion) -> None:
        """PR and above exclude writers: the value is the last one. Below that there is no order
        between the read and a write: it is one that was written."""
        value = self.lvb.get(client.name)
        allowed = {value} if done.mode >= Mode.PR else set(self.history.get(client.name, ()))
        if done.lvb not in allowed:
            raise Violation(f"S8: {client.name!r} {done.lvb!r} is not the last write {value!r}")

    def write_lvb(self, name: bytes, value: bytes | None) -> None:
        self.lvb[name] = value
        self.history.setdefault(name, []).append(value)

    # Invariants.

    def check(self) -> None:
        held: dict[bytes, list[tuple[object, Mode]]] = {}
        masters: dict[bytes, Instance] = {}
        for me, member in self.members.items():
            member.space.check()
            for lock in member.space.owner.locks.values():
                mode = lock.sure
                if mode > Mode.NL:
                    held.setdefault(lock.resource.name, []).append((me, Mode(mode)))
            for name, resource in member.space.master.resources.items():
                if resource.removing:
                    continue
                if name in masters:
                    raise Violation(f"S3: {name!r} has two masters, {me} and {masters[name]}")
                masters[name] = me
        for corpse, locks in self.corpses.items():
            for name, mode in locks:
                held.setdefault(name, []).append((corpse, mode))
        for name, locks in held.items():
            for index, (one, mode) in enumerate(locks):
                for two, other in locks[index + 1 :]:
                    if not COMPATIBLE[mode][other]:
                        both_dead = one in self.corpses and two in self.corpses
                        if not both_dead:
                            raise Violation(
                                f"S1: {name!r} held by {one} {mode.name} and {two} {other.name}"
                            )

    # The end: no more faults, everybody obeys, everything must complete and vanish.

    def quiesce(self) -> None:
        self.end_faults()
        for _ in range(STEPS_MAX):
            if not self.obey_all():
                break
            self.drain()
        stuck = [
            (str(me), client)
            for me, member in self.members.items()
            for client in member.clients.values()
            if client.pending
        ]
        if stuck:
            raise Violation(f"L1: never completed: {stuck} {self.queues(stuck[0][1].name)}")
        self.conservation()
        for member in self.members.values():
            for client in list(member.clients.values()):
                self.unlock(member, client, Flags.NONE)
                self.perform(member.space.me, member)
        self.drain()
        for me, member in self.members.items():
            space = member.space
            left = space.owner.locks, space.master.resources, space.directory.records
            if any(left):
                raise Violation(f"L4: {me} keeps {left}")

    def queues(self, name: bytes) -> list[str]:
        """How the masters of a name see it."""
        return [
            f"{me}: {lock.owner}/{lock.number} {lock.granted}->{lock.requested} told {lock.told:b}"
            for me, member in self.members.items()
            if name in member.space.master.resources
            for lock in member.space.master.resources[name].locks()
        ]

    def obey_all(self) -> bool:
        acted = False
        for me, member in list(self.members.items()):
            for client in list(member.clients.values()):
                if client.wanted and not client.unlocking:
                    flags = Flags.FORCEUNLOCK if client.pending else Flags.NONE
                    self.unlock(member, client, flags)
                    self.perform(me, member)
                    acted = True
        return acted

    def conservation(self) -> None:
        """S11: each lock of each owner is at exactly one master, with the same modes."""
        there = {
            key: (lock.granted, lock.requested)
            for member in self.members.values()
            for key, lock in member.space.master.locks.items()
        }
        here = {
            (me, number): (lock.mode, lock.wanted if lock.pending else NO_MODE)
            for me, member in self.members.items()
            for number, lock in member.space.owner.locks.items()
        }
        if there != here:
            odd = sorted(set(there.items()) ^ set(here.items()), key=str)
            raise Violation(f"S11: owners and masters differ about {odd}")


def run(seed: int, steps: int = 600, **options: object) -> World:
    """One whole life; raises Violation or AssertionError."""
    world = World(seed, **options)  # type: ignore[arg-type]
    for _ in range(steps):
        world.step()
    world.quiesce()
    return world
