"""The keeper's side of byte-range locks: who gets what, who waits.

It decides only in the role KEEPER, when all that anybody holds is known; what comes before waits in
`early`. What is meant for another tenure is answered with RangeResigned.

Who unlocks does not wait for us. So before we say that a lock is not free its holders have to
confirm it: what they have given back is on its way before their answer. Otherwise a process that
was told by its holder that a lock is free could find it taken.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.ids import Instance
from dlm import messages as m
from dlm.modes import Result
from dlm.range_file import UNLOCK, Operation, Question, RangeFile, Role
from dlm.ranges import READ, Owner, RangeTable, Waiter

if TYPE_CHECKING:
    from dlm.range_locks import RangeLocks

RANGES_MAX = 1 << 16
"""Ranges, and again waiting locks and questions, of one name; above it the caller gets FULL."""
MOVE_USES = 64
MOVE_IDLE_NS = 1_000_000_000
"""A keeper that has not used a name for so long, while one other member used it so often, lets
go."""


class KeeperSide:
    """Decides for the names that this member keeps."""

    def __init__(self, service: RangeLocks) -> None:
        self._service = service
        self.move_uses = MOVE_USES
        self.move_idle_ns = MOVE_IDLE_NS
        self._questions = 0

    def decide_own(self, file: RangeFile, operation: Operation) -> None:
        operation.sent = True
        file.own_used_ns = self._service.now_ns()
        file.foreign_uses = 0
        if operation.kind == UNLOCK:
            self._unlock(file, self._service.me, operation.number, operation.key, operation)
        else:
            self._decide(file, self._service.me, operation)

    def receive(self, source: Instance, message: m.RangeMessage) -> None:
        """A request of another member, if we keep the name in the tenure that it means."""
        assert isinstance(message, m.RangeLock | m.RangeUnlock | m.RangeCancel)
        file = self._service.files.get(message.name)
        if file is None or file.tenure != message.tenure or file.keeper != self._service.me:
            self._service.tell(source, m.RangeResigned(message.name, message.tenure))
            return
        file.guests.add(source)
        if file.role is Role.ENLISTING:
            file.early.append((source, message))
        elif isinstance(message, m.RangeLock):
            file.foreign_uses += 1
            if file.foreign_uses % self.move_uses == 0 and self._better_there(file, source):
                self._service.resign(file)
            else:
                self._decide(file, source, message)
        elif isinstance(message, m.RangeUnlock):
            self._unlock(file, source, message.number, message.key, message)
        elif file.table.withdraw(source, message.number) is not None:
            self._answer(file, source, message.number, Result.CANCELLED)

    def _better_there(self, file: RangeFile, source: Instance) -> bool:
        """Whether only `source` uses this name."""
        used = {owner.instance for owner in file.table.owners}
        used |= {waiter.owner.instance for waiter in file.table.waiters}
        idle_ns = self._service.now_ns() - file.own_used_ns
        return used <= {source} and not file.operations and idle_ns > self.move_idle_ns

    def _decide(
        self, file: RangeFile, source: Instance, one: m.RangeLock | Operation, *, sure: bool = False
    ) -> None:
        """`sure`: what is in the way of a try or a test has been confirmed."""
        table, owner = file.table, Owner(source, one.key)
        start, end, kind = one.start, one.end, one.kind
        if one.test or not one.wait:
            found = table.conflict(owner, start, end, kind)
            if found is not None and not sure and self._ask_holders(file, source, one):
                return
            if one.test or found is not None:
                result = Result.GRANTED if one.test else Result.AGAIN
                self._answer(file, source, one.number, result, self._conflict(table, found))
                return
        elif not table.free(owner, start, end, kind):
            if len(table.waiters) >= RANGES_MAX:
                self._answer(file, source, one.number, Result.FULL)
            else:
                table.waiters.append(Waiter(owner, one.number, start, end, kind, one.pid))
            return
        if table.count >= RANGES_MAX:
            self._answer(file, source, one.number, Result.FULL)
            return
        table.put(owner, start, end, kind, one.pid)
        self._answer(file, source, one.number, Result.GRANTED)
        if kind == READ and table.waiters:
            self.settle(file)

    def _ask_holders(self, file: RangeFile, source: Instance, one: m.RangeLock | Operation) -> bool:
        """Ask the members whose locks are in the way. What the asker's own member holds, and ours,
        is known; what a dead one held is gone when that member is silent."""
        owner = Owner(source, one.key)
        holders = {
            other.instance for other in file.table.conflicting(owner, one.start, one.end, one.kind)
        }
        missing = (holders & self._service.members) - {self._service.me, source}
        if not missing:
            return False
        if len(file.questions) >= RANGES_MAX:
            self._answer(file, source, one.number, Result.FULL)
            return True
        self._questions += 1
        file.questions[self._questions] = Question(source, one, missing)
        for member in sorted(missing):
            confirm = m.RangeConfirm(file.name, file.tenure, self._questions)
            self._service.tell(member, confirm)
        return True

    def confirmed(self, source: Instance, message: m.RangeMessage) -> None:
        """A member has said what it had given back, if anything. A question that has ended, also
        with a tenure, has a number that is never used again."""
        assert isinstance(message, m.RangeConfirmed)
        file = self._service.files.get(message.name)
        if file is not None:
            self._heard(file, source, message.number)

    def without(self, file: RangeFile, gone: frozenset[Instance]) -> None:
        """Who is gone will say nothing."""
        for number, question in list(file.questions.items()):
            if question.source in gone:
                del file.questions[number]
            for member in gone & question.missing:
                self._heard(file, member, number)

    def _heard(self, file: RangeFile, member: Instance, number: int) -> None:
        question = file.questions.get(number)
        if question is None:
            return
        question.missing.discard(member)
        if question.missing:
            return
        del file.questions[number]
        one = question.one
        if isinstance(one, m.RangeLock) or one.number in file.operations:
            self._decide(file, question.source, one, sure=True)

    def _unlock(
        self,
        file: RangeFile,
        source: Instance,
        number: int,
        key: int,
        span: m.RangeUnlock | Operation,
    ) -> None:
        owner = Owner(source, key)
        file.table.remove(owner, span.start, span.end)
        if isinstance(span, m.RangeUnlock):
            for start, end, kind in span.rows:
                file.table.put(owner, start, end, kind)
        if number:
            self._answer(file, source, number, Result.GRANTED)
        self.settle(file)

    def settle(self, file: RangeFile) -> None:
        """Something came free: it goes to those who wait, in their order."""
        if not file.table.waiters:
            return
        for waiter in file.table.retry():
            self._answer(file, waiter.owner.instance, waiter.number, Result.GRANTED)

    def _answer(
        self,
        file: RangeFile,
        source: Instance,
        number: int,
        result: Result,
        conflict: m.RangeConflict | None = None,
    ) -> None:
        if source == self._service.me:
            self._service.end(file.operations.pop(number), result, conflict)
        else:
            reply = m.RangeReply(file.name, file.tenure, number, result, conflict)
            self._service.tell(source, reply)

    @staticmethod
    def _conflict(
        table: RangeTable, found: tuple[Owner, tuple[int, int, int]] | None
    ) -> m.RangeConflict | None:
        if found is None:
            return None
        owner, row = found
        return m.RangeConflict(owner.instance, owner.key, table.owners[owner].pid, *row)
