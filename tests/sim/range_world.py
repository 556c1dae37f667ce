"""Byte-range locks of several members in one deterministic world, over the real lock manager.

Every step is one choice of the seed: carry the head of one link, hand the next group event to one
member, let a process lock, unlock, test, close, be interrupted or be killed, or a fault. After each
step the locks that processes believe to hold are compared over all members, those of dead members
included until these are silent (`check`).
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from cluster.control import GroupEvent, GroupMember
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from dlm.dispatcher import Dispatcher
from dlm.lockspace import Changed, Left, Lockspace, Ranged
from dlm.modes import Result
from dlm.range_deadlock import AGAIN_NS
from dlm.range_file import UNLOCK, Operation, Role
from dlm.range_locks import RangeLocks
from dlm.ranges import END, READ, WRITE, Owner, Ranges, Row
from tests.sim.dlm_world import Violation

STEPS_MAX = 100_000
STEP_NS = 3_000_000
OWNERS = 3
LAG_STEPS = 100
BYTES = 6


@dataclass
class Process:
    """An owner of locks: a process, with one thread or two."""

    key: int
    pending: dict[int, Operation] = field(default_factory=dict)
    names: set[bytes] = field(default_factory=set)
    told: dict[bytes, Ranges] = field(default_factory=dict)
    """What it was told that it holds."""
    odd: bool = False
    """A read lock was abandoned: it may have taken the place of a write lock."""


@dataclass
class Try:
    """A try or a test in progress, and whether anything was in its way since it began."""

    name: bytes
    owner: Owner
    row: Row
    blocked: bool = False


@dataclass
class Member:
    """A mount process."""

    space: Lockspace
    position: int
    api: Dispatcher | None = None
    ranges: RangeLocks | None = None
    processes: list[Process] = field(default_factory=list)
    leaving: bool = False


class Runtime:
    """Time passes with the steps of the world."""

    def __init__(self, world: RangeWorld, member: Member) -> None:
        self._world = world
        self._member = member

    def now_ns(self) -> int:
        return self._world.now_ns

    def call_at(self, when_ns, callback) -> None:
        self._world.timers.append((when_ns, self._member, callback))


class RangeWorld:
    """The whole, driven by one seed."""

    def __init__(
        self,
        seed: int,
        *,
        names: int = 2,
        members: int = 3,
        faults: bool = True,
        threads: int = 2,
        interrupts: float = 0.15,
        abandons: float = 0.3,
        step_ns: int = STEP_NS,
        file_bytes: int = BYTES,
        fault_rate: float = 0.01,
        lag: float = 0.0,
    ) -> None:
        self.random = random.Random(seed)
        self.names = [b"P%d" % n for n in range(names)]
        self.size = members
        self.faults = faults
        self.threads = threads
        self.interrupts = interrupts
        self.abandons = abandons
        self.step_ns = step_ns
        self.file_bytes = file_bytes
        self.fault_rate = fault_rate
        self.lag = lag
        """How often the link that is slow at present stands still when it could move."""
        self.now_ns = 0
        self.steps = 0
        self.births = 0
        self.keys = 0
        self.timers: list = []
        self.members: dict[Instance, Member] = {}
        self.links: dict[tuple[Instance, Instance], deque[bytes]] = {}
        self.log: list[GroupEvent] = []
        self.view: list[Instance] = []
        self.dead: list[Instance] = []
        self.silent: list[Instance] = []
        self.corpses: dict[Instance, dict[bytes, dict[Owner, list[Row]]]] = {}
        self.ghosts: list[tuple[int, dict[bytes, list[tuple[Owner, Row]]]]] = []
        """What a dead member held or asked for, until all have heard that it is silent."""
        self.tries: list[Try] = []
        self.slow: tuple[Instance, ...] = ()
        self.results: dict[Result, int] = {}
        self.circles: list[set[Owner]] = []
        self.trace: list[str] | None = getattr(self, "trace", None)
        for _ in range(members):
            self.birth()

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.steps}: {text}")

    # The group.

    def birth(self) -> None:
        self.births += 1
        me = Instance(NodeId(1 + self.births % 4), Incarnation(1 + self.births // 4), InstanceNo(1))
        member = Member(Lockspace(me), len(self.log))
        member.api = Dispatcher(
            member.space,
            lambda to, payload: self.links.setdefault((me, to), deque()).append(payload),
            lambda: self.now_ns,
            lambda action: self.other(me, member, action),
        )
        member.ranges = RangeLocks(
            me, member.api, member.api.tell, Runtime(self, member), kept_max=4
        )
        # Names move all the time here.
        member.ranges.at_keeper.move_uses = 2
        member.ranges.at_keeper.move_idle_ns = 20 * STEP_NS
        self.members[me] = member
        self.view = sorted([*self.view, me])
        for _ in range(OWNERS):
            self.new_process(member)
        self.event("view", joined=[me])

    def new_process(self, member: Member) -> None:
        self.keys += 1
        member.processes.append(Process(self.keys))

    def other(self, me: Instance, member: Member, action) -> None:
        if isinstance(action, Ranged):
            member.ranges.receive(action.source, action.message)
        elif isinstance(action, Changed):
            member.ranges.changed(action)
        elif isinstance(action, Left) and me in self.view:
            self.note(f"{me} left")
            self.view.remove(me)
            self.members.pop(me)
            self.event("view", left=[me])

    def event(self, kind: str, **fields: object) -> None:
        members = [GroupMember(one, f"n{one.node}", [], 0) for one in self.view]
        made = GroupEvent(
            "sim", Epoch(1), len(self.log) + 1, kind, members,
            dead=list(self.dead), silent=list(self.silent), **fields,
        )  # fmt: skip
        self.log.append(made)

    def crash(self, victim: Instance) -> None:
        member = self.members.pop(victim)
        self.corpses[victim] = {name: self.rows_of(member, name) for name in self.names}
        self.ghosts.append((STEPS_MAX, {n: self.wants(victim, member, n) for n in self.names}))
        for (source, _to), link in self.links.items():
            if source == victim:
                for _ in range(self.random.randint(0, len(link))):
                    link.pop()
        self.dead.append(victim)
        self.view.remove(victim)
        self.note(f"crash {victim}")
        self.event("view", failed=[victim])

    def silence(self, subject: Instance) -> None:
        self.silent.append(subject)
        del self.corpses[subject]
        self.event("silent", subject=subject)
        self.ghosts = [
            (len(self.log) if self.is_of(subject, rows) else index, rows)
            for index, rows in self.ghosts
        ]

    @staticmethod
    def is_of(subject: Instance, rows: dict[bytes, list[tuple[Owner, Row]]]) -> bool:
        return any(owner.instance == subject for some in rows.values() for owner, _ in some)

    def release(self, subject: Instance) -> None:
        self.silent.remove(subject)
        self.dead.remove(subject)
        self.event("released", subject=subject)

    def fault(self) -> None:
        chance = self.random.random()
        noisy = [one for one in self.dead if one not in self.silent]
        alive = [one for one in self.view if one in self.members]
        if chance < 0.3 and len(alive) > 1:
            self.crash(self.random.choice(alive))
        elif chance < 0.55 and noisy:
            self.silence(self.random.choice(noisy))
        elif chance < 0.75 and self.silent:
            self.release(self.random.choice(self.silent))
        elif chance < 0.92 and len(self.view) < self.size:
            self.birth()
        elif len(alive) > 1:
            self.leave(self.random.choice(alive))

    def leave(self, me: Instance) -> None:
        member = self.members[me]
        if not member.space.members or member.leaving:
            return
        self.note(f"{me} leaves")
        member.leaving = True
        for process in list(member.processes):
            self.kill(member, process)
        member.ranges.leave()
        member.api.leave()

    # One step.

    def moves(self) -> list[tuple[str, object]]:
        ready: list[tuple[str, object]] = [
            ("link", key) for key, link in self.links.items() if link and key[1] in self.members
        ]
        ready += [("event", me) for me, one in self.members.items() if one.position < len(self.log)]
        return ready

    def step(self, activity: float = 0.3) -> None:
        self.steps += 1
        self.now_ns += self.step_ns
        moves = self.moves()
        if self.faults and self.random.random() < self.fault_rate:
            self.fault()
        elif self.random.random() < 0.02:
            self.ring()
        elif not moves or self.random.random() < activity:
            self.act()
        else:
            kind, what = self.random.choice(moves)
            if kind == "event" or what != self.slow or self.random.random() >= self.lag:
                self.move(kind, what)
        if self.lag and self.steps % LAG_STEPS == 0:
            self.slow = tuple(self.random.sample(sorted(self.members), min(2, len(self.members))))
        self.check()
        heard = min((one.position for one in self.members.values()), default=0)
        self.ghosts = [ghost for ghost in self.ghosts if ghost[0] > heard]
        for one in self.tries:
            one.blocked = one.blocked or self.is_in_the_way(one)

    def move(self, kind: str, what) -> None:
        if kind == "link":
            source, to = what
            self.members[to].api.receive(source, self.links[source, to].popleft())
        else:
            member = self.members[what]
            event = self.log[member.position]
            member.position += 1
            member.api.group_event(event)

    def ring(self) -> None:
        """Timers that are due."""
        due = [timer for timer in self.timers if timer[0] <= self.now_ns]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_ns]
        for _when, member, callback in due:
            if member in self.members.values():
                callback()

    # Processes.

    def act(self) -> None:
        ready = [
            member
            for member in self.members.values()
            if member.space.members and not member.leaving
        ]
        if not ready:
            return
        member = self.random.choice(ready)
        waiting = [one for one in member.processes if one.pending]
        free = [one for one in member.processes if not one.pending]
        if waiting and self.random.random() < self.interrupts:
            self.interrupt(member, self.random.choice(waiting))
        elif free and (not waiting or self.threads == 1 or self.random.random() < 0.8):
            self.operate(member, self.random.choice(free))
        elif self.threads > 1:
            process = self.random.choice(waiting)
            if len(process.pending) < self.threads:
                self.operate(member, process)

    def interrupt(self, member: Member, process: Process) -> None:
        if self.random.random() < 0.3:
            self.note(f"{member.space.me} {process.key} is killed")
            self.kill(member, process)
            self.new_process(member)
            return
        operation = self.random.choice(list(process.pending.values()))
        self.note(f"{member.space.me} {process.key} interrupts {operation.number}")
        member.ranges.withdraw(operation)
        if operation.number in process.pending and (
            operation.kind == UNLOCK or self.random.random() < self.abandons
        ):
            # The keeper does not answer; the open file lives on in another process.
            self.forget(process, operation)
            process.odd |= operation.kind != WRITE
            member.ranges.abandon(operation)

    def kill(self, member: Member, process: Process) -> None:
        """Its waits are interrupted, are answered or not; then its files are closed."""
        for operation in list(process.pending.values()):
            member.ranges.withdraw(operation)
            if operation.number in process.pending:
                self.forget(process, operation)
                member.ranges.abandon(operation)
        for name in sorted(process.names):
            member.ranges.close(name, process.key)
        member.processes.remove(process)

    @staticmethod
    def forget(process: Process, operation: Operation) -> None:
        process.pending.pop(operation.number, None)

    def operate(self, member: Member, process: Process) -> None:
        name = self.random.choice(self.names)
        most = self.file_bytes
        low, high = sorted(self.random.randint(0, most) for _ in range(2))
        high = END if high == most else high
        low = min(low, most - 1)
        roll = self.random.random()
        ranges, key = member.ranges, process.key
        process.names.add(name)
        ended: list[Operation] = []

        kind = self.random.choice([READ, WRITE])
        attempt = Try(name, Owner(member.space.me, key), (low, high, kind))
        attempt.blocked = self.is_in_the_way(attempt)
        self.tries.append(attempt)

        def done(operation: Operation) -> None:
            ended.append(operation)
            self.tries.remove(attempt)
            refused = operation.result == Result.AGAIN or operation.conflict is not None
            if refused and not (attempt.blocked or self.is_in_the_way(attempt)):
                raise Violation(f"R8: nothing was in the way of {operation.number}")
            self.done(member, process, operation)

        if roll < 0.06:
            ranges.close(name, key)
            process.told.pop(name, None)
            return
        if roll < 0.35:
            what = "unlock"
            operation = ranges.unlock(name, key, low, high, done)
        elif roll < 0.42:
            what = "test"
            operation = ranges.test(name, key, low, high, kind, done)
        else:
            wait = self.random.random() < 0.7
            what = f"{'lock' if wait else 'try'} {'rw'[kind]}"
            operation = ranges.lock(name, key, low, high, kind, done, wait=wait, pid=key)
        number = operation.number if operation else "-"
        self.note(f"{member.space.me} {key} {what} {number} {name!r} [{low},{high}]")
        if operation is not None and not ended:
            process.pending[operation.number] = operation

    def done(self, member: Member, process: Process, operation: Operation) -> None:
        result = operation.result
        self.note(f"{member.space.me} {process.key} done {operation.number} {result.name}")
        self.results[result] = self.results.get(result, 0) + 1
        process.pending.pop(operation.number, None)
        name = operation.file.name
        if result == Result.GRANTED and not operation.test:
            told = process.told.setdefault(name, Ranges())
            if operation.kind == UNLOCK:
                told.remove(operation.start, operation.end)
            else:
                told.put(operation.start, operation.end, operation.kind)
            rows = self.rows_of(member, name).get(Owner(member.space.me, process.key), [])
            here = cut(rows, operation.start, operation.end)
            wanted = (
                []
                if operation.kind == UNLOCK
                else [(operation.start, operation.end, operation.kind)]
            )
            if here != wanted and self.threads == 1:
                raise Violation(f"R2: {operation.number} was granted, but holds {here}")
        if result == Result.DEADLOCK and self.threads == 1 and not self.interrupts:
            self.must_be_a_circle(member, process, operation)

    # What is true of the whole.

    @staticmethod
    def rows_of(member: Member, name: bytes) -> dict[Owner, list[Row]]:
        """What the processes of a member may rely on: what they hold, less what they are giving
        up by an unlock or by a read lock in place of a write lock."""
        file = member.ranges.files.get(name)
        found: dict[Owner, list[Row]] = {}
        if file is None:
            return found
        for owner, ranges in file.table.owners.items():
            if owner.instance != member.space.me:
                continue
            sure = Ranges()
            sure.rows = list(ranges.rows)
            for one in file.operations.values():
                if one.key != owner.key or one.test or one.kind == WRITE:
                    continue
                here = sure.within(one.start, one.end)
                sure.remove(one.start, one.end)
                if one.kind == READ:
                    for start, end, _kind in here:
                        sure.put(start, end, READ)
            found[owner] = sure.rows
        return found

    def held(self, name: bytes) -> dict[Owner, list[Row]]:
        """What anybody believes to hold, and what the dead did."""
        found: dict[Owner, list[Row]] = {}
        for member in self.members.values():
            found |= self.rows_of(member, name)
        for corpse in self.corpses.values():
            found |= corpse.get(name, {})
        return found

    def locked(self, name: bytes) -> dict[Owner, list[Row]]:
        """As `held`, with what is only about to be given up."""
        return {
            owner: list(ranges.rows)
            for member in self.members.values()
            if (file := member.ranges.files.get(name)) is not None
            for owner, ranges in file.table.owners.items()
            if owner.instance == member.space.me
        }

    @staticmethod
    def wants(me: Instance, member: Member, name: bytes) -> list[tuple[Owner, Row]]:
        """What the owners of a member hold or may just have been granted."""
        file = member.ranges.files.get(name)
        if file is None:
            return []
        found = [
            (owner, row) for owner, ranges in file.table.owners.items() for row in ranges.rows
            if owner.instance == me
        ]  # fmt: skip
        for one in file.operations.values():
            if one.kind != UNLOCK and not one.test:
                found.append((Owner(me, one.key), (one.start, one.end, one.kind)))
        return found

    def is_in_the_way(self, one: Try) -> bool:
        """Whether anybody else holds, or may hold, what does not go together with it."""
        rows = [
            item for me, member in self.members.items() for item in self.wants(me, member, one.name)
        ]
        for _index, ghost in self.ghosts:
            rows += ghost.get(one.name, [])
        start, end, kind = one.row
        return any(
            owner != one.owner and low <= end and start <= high and WRITE in (kind, held)
            for owner, (low, high, held) in rows
        )

    def check(self) -> None:
        for member in self.members.values():
            member.space.check()
            member.ranges.check()
            for process in member.processes if self.threads == 1 else ():
                self.no_surprise(member, process)
        for name in self.names:
            held = self.held(name)
            self.no_conflict(name, held)
            keepers = [
                member
                for member in self.members.values()
                if (file := member.ranges.files.get(name)) is not None and file.role is Role.KEEPER
            ]
            if len(keepers) > 1:
                raise Violation(f"R3: {name!r} has two keepers")
            for keeper in keepers:
                table = keeper.ranges.files[name].table
                for owner, rows in held.items():
                    known = table.owners[owner].rows if owner in table.owners else []
                    for row in rows:
                        if not covered(row, known):
                            raise Violation(f"R4: the keeper of {name!r} misses {owner} {row}")

    def no_surprise(self, member: Member, process: Process) -> None:
        """R7: an owner holds what it was told, nothing that it has given up waiting for."""
        if process.odd or process.pending:
            return
        for name, told in process.told.items():
            file = member.ranges.files.get(name)
            if file is None or any(o.key == process.key for o in file.operations.values()):
                continue
            ranges = file.table.owners.get(Owner(member.space.me, process.key))
            held = ranges.rows if ranges is not None else []
            if held != told.rows:
                raise Violation(f"R7: {process.key} holds {held} of {name!r}, not {told.rows}")

    def no_conflict(self, name: bytes, held: dict[Owner, list[Row]]) -> None:
        everything = [(owner, row) for owner, rows in held.items() for row in rows]
        for index, (owner, row) in enumerate(everything):
            for other, second in everything[index + 1 :]:
                overlap = row[0] <= second[1] and second[0] <= row[1]
                if owner != other and overlap and WRITE in (row[2], second[2]):
                    raise Violation(f"R1: {name!r} {owner} {row} and {other} {second}")

    def must_be_a_circle(self, member: Member, process: Process, victim: Operation) -> None:
        """Along what owners hold and wait for, the victim comes back to itself; or another one of
        its circle has been told so just before."""
        waiting = {
            Owner(me, p.key): op
            for me, one in self.members.items()
            for p in one.processes
            for op in p.pending.values()
            if op.wait and op.kind != UNLOCK
        }
        me = Owner(member.space.me, process.key)
        waiting[me] = victim
        seen: set[Owner] = set()
        todo = [me]
        while todo:
            one = todo.pop()
            operation = waiting.get(one)
            if operation is None:
                continue
            for owner, rows in self.locked(operation.file.name).items():
                for row in cut(rows, operation.start, operation.end):
                    blocks = owner != one and WRITE in (operation.kind, row[2])
                    if blocks and owner not in seen:
                        seen.add(owner)
                        todo.append(owner)
        if me in seen:
            self.circles.append(seen)
        elif not any(me in circle for circle in self.circles):
            raise Violation(f"R5: {me} was told of a deadlock that is none")

    # The end: no more faults, nobody asks for more, everything must end.

    def drain(self) -> None:
        for _ in range(STEPS_MAX):
            self.steps += 1
            moves = self.moves()
            if not moves:
                return
            self.move(*self.random.choice(moves))
            self.check()
        raise Violation("L1: the members never stop talking")

    def pending(self) -> list[tuple[str, int, Operation]]:
        return [
            (str(me), process.key, operation)
            for me, member in self.members.items()
            for process in member.processes
            for operation in process.pending.values()
        ]

    def quiesce(self) -> None:
        self.faults = False
        self.drain()
        for one in list(self.dead):
            if one not in self.silent:
                self.silence(one)
            self.release(one)
        self.drain()
        self.conservation()
        for _ in range(60):
            if not self.pending():
                break
            for member in self.members.values():
                for process in member.processes:
                    if not process.pending:
                        for name in sorted(process.names):
                            member.ranges.close(name, process.key)
                        process.told.clear()
            self.now_ns += AGAIN_NS
            self.ring()
            self.drain()
        if self.pending():
            raise Violation(f"L1: never ended: {self.pending()}")
        self.conservation()
        for member in self.members.values():
            for process in list(member.processes):
                self.kill(member, process)
        self.drain()
        for me, member in self.members.items():
            for name, file in member.ranges.files.items():
                if not file.idle:
                    raise Violation(f"L2: {me} still has something of {name!r}")

    def conservation(self) -> None:
        """R6: a keeper knows of no lock that its owner does not know of."""
        for member in self.members.values():
            for name, file in member.ranges.files.items():
                if file.role is Role.KEEPER:
                    known = {owner: list(r.rows) for owner, r in file.table.owners.items()}
                    if known != self.locked(name):
                        raise Violation(f"R6: {name!r}: {known} is not {self.locked(name)}")


def cut(rows: list[Row], start: int, end: int) -> list[Row]:
    return [(max(a, start), min(b, end), k) for a, b, k in rows if a <= end and b >= start]


def covered(row: Row, known: list[Row]) -> bool:
    """Whether everything of a range is known, in its mode or a stronger one."""
    at = row[0]
    for start, end, kind in known:
        if start <= at <= end and (kind == WRITE or row[2] == READ):
            at = end + 1
    return at > row[1]


def run(seed: int, steps: int = 700, **options) -> RangeWorld:
    """One whole life; raises Violation or AssertionError."""
    world = RangeWorld(seed, **options)
    for _ in range(steps):
        world.step()
    world.quiesce()
    return world
