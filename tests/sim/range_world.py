"""Byte-range locks of several members in one deterministic world, over the real lock manager.

A step of the world (`tests.sim.group_world`) may also let a process lock, unlock, test, close, be
interrupted or be killed. After each step everything is checked (`tests.sim.range_check`).
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.control import GroupEvent
from cluster.ids import Instance
from dlm.dispatcher import Dispatcher
from dlm.lockspace import Changed, Left, Lockspace, Ranged
from dlm.modes import Result
from dlm.range_deadlock import AGAIN_NS
from dlm.range_file import UNLOCK, Operation
from dlm.range_locks import RangeLocks
from dlm.ranges import END, READ, WRITE, Owner
from tests.sim.group_world import GroupWorld
from tests.sim.range_check import Member, Process, RangeChecker
from tests.sim.world import Violation

STEP_NS = 3_000_000
OWNERS = 3
LAG_STEPS = 100


@dataclass(frozen=True)
class Options:
    """What kind of world it is."""

    names: int = 2
    members: int = 3
    faults: bool = True
    threads: int = 2
    interrupts: float = 0.15
    abandons: float = 0.3
    step_ns: int = STEP_NS
    file_bytes: int = 6
    fault_rate: float = 0.01
    lag: float = 0.0
    """How often the link that is slow at present stands still when it could move."""


class Runtime:
    """Time passes with the steps of the world."""

    def __init__(self, world: RangeWorld, member: Member) -> None:
        self._world = world
        self._member = member

    def now_ns(self) -> int:
        return self._world.now_ns

    def call_at(self, when_ns, callback) -> None:
        self._world.timers.append((when_ns, self._member, callback))


class RangeWorld(GroupWorld[Member]):
    """The whole, driven by one seed."""

    def __init__(self, seed: int, options: Options) -> None:
        names = [b"P%d" % n for n in range(options.names)]
        super().__init__(seed, names, options.members, faults=options.faults)
        self.options = options
        self.checker = RangeChecker(self)
        self.now_ns = 0
        self.keys = 0
        self.timers: list = []
        self.slow: tuple[Instance, ...] = ()
        self.results: dict[Result, int] = {}
        for _ in range(options.members):
            self.birth()

    def check(self) -> None:
        self.checker.check()

    # The group.

    def start(self, me: Instance) -> Member:
        member = Member(Lockspace(me), len(self.log))
        member.api = Dispatcher(
            member.space,
            lambda to, payload: self.send(me, to, payload),
            lambda: self.now_ns,
            lambda action: self.other(me, member, action),
        )
        member.ranges = RangeLocks(
            me, member.api, member.api.tell, Runtime(self, member), kept_max=4
        )
        # Names move all the time here.
        member.ranges.at_keeper.move_uses = 2
        member.ranges.at_keeper.move_idle_ns = 20 * STEP_NS
        for _ in range(OWNERS):
            self.new_process(member)
        return member

    def new_process(self, member: Member) -> None:
        self.keys += 1
        member.processes.append(Process(self.keys))

    def other(self, me: Instance, member: Member, action) -> None:
        if isinstance(action, Ranged):
            member.ranges.receive(action.source, action.message)
        elif isinstance(action, Changed):
            member.ranges.changed(action)
        elif isinstance(action, Left):
            self.left(me)

    def bury(self, victim: Instance, member: Member) -> None:
        self.checker.bury(victim, member)

    def silence(self, subject: Instance) -> None:
        super().silence(subject)
        self.checker.silence(subject)

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

    def step(self, activity: float = 0.3) -> None:
        self.steps += 1
        self.now_ns += self.options.step_ns
        moves = self.moves()
        if self.faults and self.random.random() < self.options.fault_rate:
            self.fault()
        elif self.random.random() < 0.02:
            self.ring()
        elif not moves or self.random.random() < activity:
            self.act()
        else:
            kind, what = self.random.choice(moves)
            if kind == "event" or what != self.slow or self.random.random() >= self.options.lag:
                self.move(kind, what)
        if self.options.lag and self.steps % LAG_STEPS == 0:
            self.slow = tuple(self.random.sample(sorted(self.members), min(2, len(self.members))))
        self.checker.stepped()

    def receive(self, to: Instance, source: Instance, payload: bytes) -> None:
        self.members[to].api.receive(source, payload)

    def group_event(self, to: Instance, event: GroupEvent) -> None:
        self.members[to].api.group_event(event)

    def ring(self) -> None:
        """Timers that are due."""
        due = [timer for timer in self.timers if timer[0] <= self.now_ns]
        self.timers = [timer for timer in self.timers if timer[0] > self.now_ns]
        for _when, member, callback in due:
            if member in self.members.values():
                callback()

    # Processes.

    def act(self) -> None:
        ready = self.ready()
        if not ready:
            return
        member = self.random.choice(ready)
        waiting = [one for one in member.processes if one.pending]
        free = [one for one in member.processes if not one.pending]
        if waiting and self.random.random() < self.options.interrupts:
            self.interrupt(member, self.random.choice(waiting))
        elif free and (not waiting or self.options.threads == 1 or self.random.random() < 0.8):
            self.operate(member, self.random.choice(free))
        elif self.options.threads > 1:
            process = self.random.choice(waiting)
            if len(process.pending) < self.options.threads:
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
            operation.kind == UNLOCK or self.random.random() < self.options.abandons
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
        most = self.options.file_bytes
        low, high = sorted(self.random.randint(0, most) for _ in range(2))
        high = END if high == most else high
        low = min(low, most - 1)
        roll = self.random.random()
        ranges, key = member.ranges, process.key
        process.names.add(name)
        ended: list[Operation] = []
        kind = self.random.choice([READ, WRITE])
        if roll < 0.06:
            ranges.close(name, key)
            process.told.pop(name, None)
            return
        owner = Owner(member.space.me, key)
        attempt = self.checker.begins(name, owner, (low, high, kind))

        def done(operation: Operation) -> None:
            ended.append(operation)
            self.checker.ended(attempt, operation)
            self.done(member, process, operation)

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
        if ended:
            return
        if operation is not None:
            process.pending[operation.number] = operation
        else:
            self.checker.tries.remove(attempt)  # there was nothing to unlock

    def done(self, member: Member, process: Process, operation: Operation) -> None:
        result = operation.result
        self.note(f"{member.space.me} {process.key} done {operation.number} {result.name}")
        self.results[result] = self.results.get(result, 0) + 1
        process.pending.pop(operation.number, None)
        if result == Result.GRANTED and not operation.test:
            self.checker.granted(member, process, operation)
        if result == Result.DEADLOCK and self.options.threads == 1 and not self.options.interrupts:
            self.checker.must_be_a_circle(member, process, operation)

    # The end: no more faults, nobody asks for more, everything must end.

    def pending(self) -> list[tuple[str, int, Operation]]:
        return [
            (str(me), process.key, operation)
            for me, member in self.members.items()
            for process in member.processes
            for operation in process.pending.values()
        ]

    def quiesce(self) -> None:
        self.end_faults()
        self.checker.conservation()
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
        self.checker.conservation()
        for member in self.members.values():
            for process in list(member.processes):
                self.kill(member, process)
        self.drain()
        for me, member in self.members.items():
            for name, file in member.ranges.files.items():
                if not file.idle:
                    raise Violation(f"L2: {me} still has something of {name!r}")


def run(seed: int, steps: int = 700, **options) -> RangeWorld:
    """One whole life; raises Violation or AssertionError."""
    world = RangeWorld(seed, Options(**options))
    for _ in range(steps):
        world.step()
    world.quiesce()
    return world
