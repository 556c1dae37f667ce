"""What is true of the byte-range locks of all members, whatever their world does.

`RangeChecker.check` compares the locks that processes believe to hold over all members, those of
dead ones included until these are silent, with what the keepers know.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.ids import Instance
from dlm.dispatcher import Dispatcher
from dlm.modes import Result
from dlm.range_file import UNLOCK, Operation, Role
from dlm.range_locks import RangeLocks
from dlm.ranges import READ, WRITE, Owner, Ranges, Row
from tests.sim.group_world import STEPS_MAX, GroupProcess
from tests.sim.world import Violation

if TYPE_CHECKING:
    from tests.sim.range_world import RangeWorld


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


@dataclass(eq=False)
class Try:
    """A try or a test in progress, and whether anything was in its way since it began."""

    name: bytes
    owner: Owner
    row: Row
    blocked: bool = False


@dataclass(eq=False)
class Member(GroupProcess):
    """A mount process."""

    api: Dispatcher | None = None
    ranges: RangeLocks | None = None
    processes: list[Process] = field(default_factory=list)


class RangeChecker:
    """Sees all members of a world."""

    def __init__(self, world: RangeWorld) -> None:
        self.world = world
        self.members: dict[Instance, Member] = world.members
        self.one_thread = world.options.threads == 1
        self.corpses: dict[Instance, dict[bytes, dict[Owner, list[Row]]]] = {}
        self.ghosts: list[tuple[int, dict[bytes, list[tuple[Owner, Row]]]]] = []
        """What a dead member held or asked for, until all have heard that it is silent."""
        self.tries: list[Try] = []
        self.circles: list[set[Owner]] = []

    # What happens.

    def bury(self, victim: Instance, member: Member) -> None:
        names = self.world.names
        self.corpses[victim] = {name: self.rows_of(member, name) for name in names}
        self.ghosts.append((STEPS_MAX, {n: self.wants(victim, member, n) for n in names}))

    def silence(self, subject: Instance) -> None:
        """Everybody is about to hear it."""
        del self.corpses[subject]
        heard = len(self.world.log)
        self.ghosts = [
            (heard if self.is_of(subject, rows) else index, rows) for index, rows in self.ghosts
        ]

    @staticmethod
    def is_of(subject: Instance, rows: dict[bytes, list[tuple[Owner, Row]]]) -> bool:
        return any(owner.instance == subject for some in rows.values() for owner, _ in some)

    def begins(self, name: bytes, owner: Owner, row: Row) -> Try:
        """An operation, of which nothing is known yet."""
        attempt = Try(name, owner, row)
        attempt.blocked = self.is_in_the_way(attempt)
        self.tries.append(attempt)
        return attempt

    def ended(self, attempt: Try, operation: Operation) -> None:
        """R8: who is told that something is in the way is told the truth."""
        if attempt not in self.tries:
            raise Violation(f"R9: {operation.number} has ended twice")
        self.tries.remove(attempt)
        refused = operation.result == Result.AGAIN or operation.conflict is not None
        if refused and not (attempt.blocked or self.is_in_the_way(attempt)):
            raise Violation(f"R8: nothing was in the way of {operation.number}")

    def granted(self, member: Member, process: Process, operation: Operation) -> None:
        """R2: an owner holds what it is told that it holds."""
        name, start, end = operation.file.name, operation.start, operation.end
        told = process.told.setdefault(name, Ranges())
        if operation.kind == UNLOCK:
            told.remove(start, end)
            wanted = []
        else:
            told.put(start, end, operation.kind)
            wanted = [(start, end, operation.kind)]
        rows = self.rows_of(member, name).get(Owner(member.space.me, process.key), [])
        here = cut(rows, start, end)
        if here != wanted and self.one_thread:
            raise Violation(f"R2: {operation.number} was granted, but holds {here}")

    def stepped(self) -> None:
        """After a step."""
        self.check()
        heard = min((one.position for one in self.members.values()), default=0)
        self.ghosts = [ghost for ghost in self.ghosts if ghost[0] > heard]
        for one in self.tries:
            one.blocked = one.blocked or self.is_in_the_way(one)

    # What anybody holds.

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

    # Invariants.

    def check(self) -> None:
        for member in self.members.values():
            member.space.check()
            member.ranges.check()
            for process in member.processes if self.one_thread else ():
                self.no_surprise(member, process)
        for name in self.world.names:
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
