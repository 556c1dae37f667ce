"""Deadlocks of byte-range locks: cycles of owners that wait for each other, over names and members.

A lock that has waited for `FIRST_NS` is chased: its keeper tells the members of those who stand in
its way; these tell the keepers of what those owners wait for; and so on (edge chasing, Chandy,
Misra and Haas). What comes back to the owner where it began may be stale, because the parts of the
cycle were seen one after another. So the same way is gone a second time: who still waits with the
same operation has waited all the time between, and one who waits gives nothing back. Then the one
that has waited for the shortest time gets DEADLOCK, as the one that closed the circle; nobody else
does unless that does not help (`STUBBORN_ROUNDS`).

An owner of several threads, and an OFD lock, may still move although one of its operations waits;
they are treated as a process with one thread, as POSIX does.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from cluster.ids import Instance
from dlm import messages as m
from dlm.engine import Runtime
from dlm.range_file import Operation, RangeFile, Role
from dlm.ranges import Owner, Waiter

if TYPE_CHECKING:
    from dlm.range_locks import RangeLocks

FIRST_NS = 50_000_000
AGAIN_NS = 1_000_000_000
STUBBORN_ROUNDS = 3
SEEN_MAX = 4096


class DeadlockSearch:
    """This member's part in all chases."""

    def __init__(self, service: RangeLocks, runtime: Runtime) -> None:
        self._service = service
        self._runtime = runtime
        self._timer_ns = 0
        self._seen: OrderedDict[tuple[m.RangeHop, int], None] = OrderedDict()

    def watch(self, operation: Operation) -> None:
        """It begins to wait."""
        operation.due_ns = operation.since_ns + FIRST_NS
        if not self._timer_ns:
            self._set_timer(operation.due_ns)

    def _set_timer(self, when_ns: int) -> None:
        self._timer_ns = when_ns
        self._runtime.call_at(when_ns, self._tick)

    def _tick(self) -> None:
        now = self._service.now_ns()
        for operation in list(self._service.waiting.values()):
            if operation.due_ns <= now:
                operation.rounds += 1
                operation.chased_ns = now
                operation.due_ns = now + AGAIN_NS
                path = [self._hop(operation)]
                self._chase_from(operation, m.RangeChase(operation.file.name, path, 0, False))
        due = min((one.due_ns for one in self._service.waiting.values()), default=0)
        self._timer_ns = 0
        if due:
            self._set_timer(due)

    def _hop(self, one: Operation) -> m.RangeHop:
        age_ns = self._service.now_ns() - one.since_ns
        return m.RangeHop(self._service.me, one.key, one.number, one.file.name, age_ns)

    def _chase_from(self, operation: Operation, message: m.RangeChase) -> None:
        file = operation.file
        if operation.sent and file.keeper is not None:
            self._post(file.keeper, message)

    def _post(self, to: Instance, message: m.RangeChase | m.RangeChased | m.RangeCycle) -> None:
        if to == self._service.me:
            self._service.receive(to, message)
        else:
            self._service.tell(to, message)

    def chase(self, _source: Instance, message: m.RangeMessage) -> None:
        """At the keeper of the last operation of the path (or of the one to verify)."""
        assert isinstance(message, m.RangeChase)
        file = self._service.files.get(message.name)
        path, at = message.path, message.at
        if file is None or file.role is not Role.KEEPER or at >= len(path):
            return
        waiter = self._waiter(file, path[at])
        if waiter is None:
            return
        name, wanted = file.name, (waiter.start, waiter.end, waiter.kind)
        blockers = set(file.table.conflicting(waiter.owner, *wanted))
        first = path[0]
        home = Owner(first.instance, first.key)
        if message.verify:
            following = path[(at + 1) % len(path)]
            if Owner(following.instance, following.key) not in blockers:
                return
            if at + 1 == len(path):
                self._post(first.instance, m.RangeCycle(path, True, name, wanted))
            else:
                chased = m.RangeChased(following.key, path, at + 1, True, name, wanted)
                self._post(following.instance, chased)
        elif home in blockers:
            self._post(first.instance, m.RangeCycle(path, False, name, wanted))
        elif len(path) < m.HOPS_MAX:
            known = {Owner(hop.instance, hop.key) for hop in path}
            for owner in sorted(blockers - known):  # the order of a set differs by process
                chased = m.RangeChased(owner.key, path, at, False, name, wanted)
                self._post(owner.instance, chased)

    @staticmethod
    def _waiter(file: RangeFile, hop: m.RangeHop) -> Waiter | None:
        """An operation, if it still waits."""
        for waiter in file.table.waiters:
            if waiter.number == hop.number and waiter.owner.instance == hop.instance:
                return waiter
        return None

    def chased(self, _source: Instance, message: m.RangeMessage) -> None:
        """At the member of an owner that stands in the way, if it has not given back meanwhile what
        the keeper believes it to hold: what does it wait for?"""
        assert isinstance(message, m.RangeChased)
        path = message.path
        if not self._service.stands_in_the_way(message.name, message.key, message.wanted):
            return
        for operation in list(self._service.waiting.values()):
            if operation.key != message.key:
                continue
            if message.verify:
                if operation.number == path[message.at].number:
                    name = operation.file.name
                    self._chase_from(operation, m.RangeChase(name, path, message.at, True))
            elif not self._was_seen(path[0], operation.number):
                longer = [*path, self._hop(operation)]
                name = operation.file.name
                self._chase_from(operation, m.RangeChase(name, longer, len(path), False))

    def _was_seen(self, origin: m.RangeHop, number: int) -> bool:
        """A chase passes an operation once; its first hop, with its age, is its name."""
        key = (origin, number)
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        return False

    def cycle(self, _source: Instance, message: m.RangeMessage) -> None:
        """Back where it began."""
        assert isinstance(message, m.RangeCycle)
        path = message.path
        operation = self._service.waiting.get(path[0].number)
        if operation is None or path[0].instance != self._service.me:
            return
        if not self._service.stands_in_the_way(message.name, operation.key, message.wanted):
            return
        if message.verified:
            self._service.give_up(operation)
            return
        if operation.rounds >= STUBBORN_ROUNDS or self._is_youngest(operation, path):
            self._chase_from(operation, m.RangeChase(operation.file.name, path, 0, True))

    def _is_youngest(self, operation: Operation, path: list[m.RangeHop]) -> bool:
        """The ages of the others were taken while the chase was under way, so they are too high by
        up to its length; where that leaves the order open, the names decide."""
        mine = path[0]
        length_ns = self._service.now_ns() - operation.chased_ns
        for hop in path[1:]:
            if mine.age_ns > hop.age_ns:
                return False
            same = mine.age_ns >= hop.age_ns - length_ns
            if same and (mine.instance, mine.number) < (hop.instance, hop.number):
                return False
        return True
