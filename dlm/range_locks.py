"""Byte-range locks of files in the cluster: fcntl(2) where the lock is used.

The ranges of one name are kept by one member, its *keeper*: who holds EX on the name in the lock
manager. What is asked for on the keeper is decided in this process, without a message; others send
it there: one message and one answer. Whoever wants a name whose keeper is unknown asks for EX; a
keeper that is asked for EX says who it is (the asker takes its wish back), or lets go if it keeps
nothing; a keeper that works only for one other member lets go, so that it moves there.

Each member knows what its own owners hold: what a keeper has granted and it has heard of, less what
they have given back. That is the truth; a keeper's table is a copy that lets it decide. So a name
may be without a keeper at any time: who gets EX next asks every member what it holds
(`RangeEnlist`) and decides nothing before it has all answers. Of a member that died without an
answer nothing is known: nothing is decided until that member is silent (its servers know that it is
out, its caches are purged). What a dead member is known to hold ends at the same moment. Disk
blocks need no care here: what a dead member may have written is guarded by the locks of inodes,
until its journal is replayed.

`tenure` is the fencing token of the keeper's EX and rises with each keeper; what was said in
another tenure than the receiver's is out of date. After a change operations without an answer go
to the new keeper, in their order; operations are numbered, a number is asked once in a tenure.

Invariants (`check`, and the simulator over all members): locks that owners believe to hold never
conflict, those of dead members included until they are silent; a keeper that decides knows of each
of them; what belongs to one owner happens in one order at the keeper and here: an owner whose
operation was given up does nothing new until that operation has ended at the keeper.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from cluster.errors import BarredError
from cluster.ids import Instance
from cluster.locks import Mode
from dlm import messages as m
from dlm.engine import Completion, Engine, Runtime
from dlm.lockspace import Changed
from dlm.modes import Flags, Result
from dlm.range_deadlock import DeadlockSearch
from dlm.range_file import UNLOCK, Done, Operation, RangeFile, Role
from dlm.range_keeper import KeeperSide
from dlm.ranges import END, READ, WRITE, Owner

KEPT_MAX = 4096
"""Names without locks that are remembered."""
TRIM_SCAN_MAX = 8


class RangeLocks:
    """All byte ranges of this member's processes, and the names that it keeps.

    `tell` sends a message to another member (`Dispatcher.tell`)."""

    def __init__(
        self,
        me: Instance,
        engine: Engine,
        tell: Callable[[Instance, m.RangeMessage], None],
        runtime: Runtime,
        *,
        kept_max: int = KEPT_MAX,
    ) -> None:
        self.me = me
        self.engine = engine
        self.tell = tell
        self.now_ns = runtime.now_ns
        self.kept_max = kept_max
        self.files: OrderedDict[bytes, RangeFile] = OrderedDict()
        self.members: frozenset[Instance] = frozenset()
        self.dead: frozenset[Instance] = frozenset()
        self.silent: frozenset[Instance] = frozenset()
        self.waiting: dict[int, Operation] = {}
        """Locks that somebody waits for."""
        self._left = False
        self._last = 0
        self._deadlocks = DeadlockSearch(self, runtime)
        self.at_keeper = KeeperSide(self)
        self._handlers: dict[type, Callable[[Instance, m.RangeMessage], None]] = {
            m.RangeLock: self.at_keeper.receive,
            m.RangeUnlock: self.at_keeper.receive,
            m.RangeCancel: self.at_keeper.receive,
            m.RangeReply: self._reply,
            m.RangeKeeper: self._keeper,
            m.RangeEnlist: self._enlist,
            m.RangeEnlisted: self._enlisted,
            m.RangeResigned: self._resigned,
            m.RangeChase: self._deadlocks.chase,
            m.RangeChased: self._deadlocks.chased,
            m.RangeCycle: self._deadlocks.cycle,
            m.RangeConfirm: self._confirm,
            m.RangeConfirmed: self.at_keeper.confirmed,
        }

    # What processes ask for. An operation that has ended when the call returns is not returned.

    def lock(
        self,
        name: bytes,
        key: int,
        start: int,
        end: int,
        kind: int,
        done: Done,
        *,
        wait: bool,
        pid: int = 0,
    ) -> Operation | None:
        """Lock [start, end] for reading or writing, in place of what the owner has there. Results:
        GRANTED, AGAIN (`wait` is false and the lock is not free), DEADLOCK (its holders wait for
        this owner), FULL. Raises BarredError when this member has left."""
        operation = self._make(name, key, start, end, kind, done, pid)
        operation.wait = wait
        return self._submit(operation)

    def unlock(self, name: bytes, key: int, start: int, end: int, done: Done) -> Operation | None:
        """Unlock [start, end]. It is done at once, and the keeper hears of it; it asks us before it
        tells anybody that the lock is taken (`dlm.range_keeper`). Only behind an operation of the
        same owner that has no answer yet, of another thread, it waits for the keeper's answer."""
        file = self.files.get(name)
        if file is None or not (file.operations or Owner(self.me, key) in file.table.owners):
            return None
        return self._submit(self._make(name, key, start, end, UNLOCK, done, 0))

    def close(self, name: bytes, key: int) -> None:
        """The owner holds nothing any more. Never waits."""
        file = self.files.get(name)
        if file is None:
            return
        mine = any(one.key == key and one.sent for one in file.operations.values())
        if mine or Owner(self.me, key) in file.table.owners:
            self._submit(self._make(name, key, 0, END, UNLOCK, None, 0))

    def test(
        self, name: bytes, key: int, start: int, end: int, kind: int, done: Done
    ) -> Operation | None:
        """Who is in the way of a lock: `conflict`, None if nobody."""
        operation = self._make(name, key, start, end, kind, done, 0)
        operation.test = True
        return self._submit(operation)

    def withdraw(self, operation: Operation) -> None:
        """The caller was interrupted: end this wait with CANCELLED, unless it ends otherwise in the
        same moment. The keeper is asked first, so that what it has granted is not lost."""
        file = operation.file
        if operation.kind == UNLOCK:
            return
        if self._is_at_keeper(operation):
            operation.withdrawn = True
            self._cancel_at_keeper(operation)
            return
        if file.role is Role.KEEPER:
            file.table.withdraw(self.me, operation.number)
        del file.operations[operation.number]
        self.end(operation, Result.CANCELLED)
        self._forget_if_unused(file)

    def abandon(self, operation: Operation) -> None:
        """The caller is dead and the keeper does not answer: `done` is not called any more. If the
        lock is granted all the same, it is given back, or ends with its owner."""
        operation.done = None
        self.waiting.pop(operation.number, None)
        if operation.kind == UNLOCK or operation.result is not None or operation.abandoned:
            return
        if self._is_at_keeper(operation):
            operation.abandoned = True
            operation.file.abandoned += 1
        else:
            self.withdraw(operation)

    def give_up(self, operation: Operation) -> None:
        """A deadlock: end this wait with DEADLOCK, unless it is granted meanwhile."""
        file = operation.file
        if file.role is Role.KEEPER:
            if file.table.withdraw(self.me, operation.number) is not None:
                del file.operations[operation.number]
                self.end(operation, Result.DEADLOCK)
        elif self._is_at_keeper(operation) and not operation.deadlock:
            operation.deadlock = True
            self._cancel_at_keeper(operation)

    @staticmethod
    def _is_at_keeper(operation: Operation) -> bool:
        """Whether another member may grant this, or have granted it."""
        return operation.file.role is Role.GUEST and operation.sent and not operation.test

    def _cancel_at_keeper(self, operation: Operation) -> None:
        file = operation.file
        self._to_keeper(file, m.RangeCancel(file.name, file.tenure, operation.number))

    def stands_in_the_way(self, name: bytes, key: int, wanted: m.RangeRow) -> bool:
        """Whether another owner's lock of those bytes would wait for an owner of ours."""
        file = self.files.get(name)
        ranges = file.table.owners.get(Owner(self.me, key)) if file is not None else None
        return ranges is not None and ranges.conflict(*wanted) is not None

    def leave(self) -> None:
        """Our owners are gone; let others keep what they hold."""
        self._left = True
        for file in list(self.files.values()):
            if file.role in (Role.KEEPER, Role.ENLISTING):
                self.resign(file)

    # From an operation to its end.

    def _make(
        self,
        name: bytes,
        key: int,
        start: int,
        end: int,
        kind: int,
        done: Done | None,
        pid: int,
    ) -> Operation:
        if self._left:
            raise BarredError("this process has left the lockspace")
        file = self.files.get(name)
        if file is None:
            if len(self.files) >= self.kept_max:
                self._trim()
            file = self.files[name] = RangeFile(self, name)
        else:
            self.files.move_to_end(name)
        self._last += 1
        return Operation(file, self._last, key, start, end, kind, done, pid)

    def _submit(self, operation: Operation) -> Operation | None:
        file = operation.file
        if file.role is Role.KEEPER:
            # The common case needs no account: it is decided here and now, or it waits.
            file.operations[operation.number] = operation
            self.at_keeper.decide_own(file, operation)
        elif operation.kind == UNLOCK and not self._others_of(operation):
            # No answer is under way that could bring back what goes here.
            self._give_back(file, operation)
        else:
            file.operations[operation.number] = operation
            if file.role is Role.GUEST and not file.abandoned:
                self._send(file, operation)
            else:
                self._send_what_can_be(file)
        if operation.result is not None or operation.number not in file.operations:
            return None
        if operation.wait and operation.kind != UNLOCK:
            self.waiting[operation.number] = operation
            operation.since_ns = self.now_ns()
            self._deadlocks.watch(operation)
        return operation

    def _give_back(self, file: RangeFile, one: Operation) -> None:
        file.table.remove(Owner(self.me, one.key), one.start, one.end)
        if file.role is Role.GUEST:
            unlock = m.RangeUnlock(file.name, file.tenure, 0, one.key, one.start, one.end)
            self._to_keeper(file, unlock)
        self.end(one, Result.GRANTED)
        self._forget_if_unused(file)

    def _others_of(self, operation: Operation) -> bool:
        key = operation.key
        return any(one.key == key for one in operation.file.operations.values())

    def _send_what_can_be(self, file: RangeFile) -> None:
        """Bring operations that were not asked in this tenure to the keeper, in their order."""
        if file.role is Role.NONE:
            self._without_keeper(file)
        if file.role not in (Role.GUEST, Role.KEEPER):
            return
        stuck = {one.key for one in file.operations.values() if one.abandoned}
        for operation in list(file.operations.values()):
            if operation.sent or operation.key in stuck:
                continue
            if file.role is Role.KEEPER:
                self.at_keeper.decide_own(file, operation)
            else:
                self._send(file, operation)

    def _without_keeper(self, file: RangeFile) -> None:
        """An unlock needs no keeper, unless a lock of the same owner goes first."""
        locking: set[int] = set()
        for operation in list(file.operations.values()):
            if operation.kind != UNLOCK:
                locking.add(operation.key)
            elif operation.key not in locking:
                owner = Owner(self.me, operation.key)
                file.table.remove(owner, operation.start, operation.end)
                del file.operations[operation.number]
                self.end(operation, Result.GRANTED)
        if file.operations:
            self._ask(file)
        else:
            self._forget_if_unused(file)

    def _send(self, file: RangeFile, one: Operation) -> None:
        one.sent = True
        if one.kind != UNLOCK:
            self._to_keeper(
                file,
                m.RangeLock(
                    file.name, file.tenure, one.number, one.key, one.start, one.end, one.kind,
                    one.wait, one.pid, one.test,
                ),
            )  # fmt: skip
            return
        unlock = m.RangeUnlock(file.name, file.tenure, one.number, one.key, one.start, one.end)
        self._to_keeper(file, unlock)

    def _to_keeper(self, file: RangeFile, message: m.RangeMessage) -> None:
        assert file.keeper is not None
        self.tell(file.keeper, message)

    def end(
        self, operation: Operation, result: Result, conflict: m.RangeConflict | None = None
    ) -> None:
        self.waiting.pop(operation.number, None)
        operation.result = result
        operation.conflict = conflict
        done, operation.done = operation.done, None
        if done is not None:
            done(operation)

    def _reply(self, source: Instance, message: m.RangeMessage) -> None:
        """The keeper has decided. Answers come in the order of its decisions."""
        assert isinstance(message, m.RangeReply)
        file = self.files.get(message.name)
        if file is None or file.role is not Role.GUEST or file.tenure != message.tenure:
            return
        operation = file.operations.pop(message.number, None)
        if operation is None:
            return  # a test that nobody waits for
        owner = Owner(self.me, operation.key)
        result = message.result
        if operation.abandoned:
            file.abandoned -= 1
            if result == Result.GRANTED:
                self._granted_to_nobody(file, owner, operation)
            self._send_what_can_be(file)
        elif result == Result.GRANTED and not operation.test:
            if operation.kind != UNLOCK:
                file.table.put(owner, operation.start, operation.end, operation.kind, operation.pid)
            else:
                file.table.remove(owner, operation.start, operation.end)
        elif result == Result.CANCELLED and operation.deadlock:
            result = Result.DEADLOCK
        if not operation.abandoned:
            self.end(operation, result, message.conflict)
        self._forget_if_unused(file)

    def _granted_to_nobody(self, file: RangeFile, owner: Owner, operation: Operation) -> None:
        """Make it again as it was. If more of this owner is under way, whose answers tell what
        comes after this grant, or if the grant has made a write lock a read lock, it must be taken;
        it ends with its owner."""
        start, end = operation.start, operation.end
        ranges = file.table.owners.get(owner)
        rows = ranges.within(start, end) if ranges is not None else []
        more = any(one.sent and one.key == owner.key for one in file.operations.values())
        if more or (operation.kind == READ and any(row[2] == WRITE for row in rows)):
            file.table.put(owner, start, end, operation.kind, operation.pid)
            return
        unlock = m.RangeUnlock(file.name, file.tenure, 0, owner.key, start, end, rows)
        self._to_keeper(file, unlock)

    # Who keeps a name.

    def _ask(self, file: RangeFile) -> None:
        if file.asking or self._left:
            return
        file.asking = True
        number = self.engine.lock(file.name, Mode.EX, Flags.NONE, file)
        if file.asking:
            file.lock = number

    def on_completed(self, file: RangeFile, completion: Completion) -> None:
        """The lock manager's answer to our wish for EX."""
        if completion.result == Result.UNLOCKED:
            return
        file.asking = file.cancelling = False
        if completion.result == Result.GRANTED:
            file.lock = completion.lock
            self._become_keeper(file, completion.grant)
            return
        file.lock = 0
        if file.role is Role.NONE:
            self._send_what_can_be(file)

    def on_wanted(self, file: RangeFile) -> None:
        """Another member wants EX: say that we keep the name, or let it go."""
        if file.role is Role.KEEPER and file.idle:
            self.resign(file)
        elif file.role in (Role.KEEPER, Role.ENLISTING):
            for member in sorted(self.members - {self.me}):
                self.tell(member, m.RangeKeeper(file.name, file.tenure))

    def _become_keeper(self, file: RangeFile, tenure: tuple[int, int]) -> None:
        assert tenure > file.tenure, (file.name, tenure, file.tenure)
        self._new_tenure(file, Role.ENLISTING, self.me, tenure)
        file.early.clear()
        file.guests.clear()
        file.foreign_uses = 0
        file.missing = set(self.members - {self.me})
        file.doubt = set(self.dead - self.silent)
        for member in sorted(file.missing):
            self.tell(member, m.RangeEnlist(file.name, tenure))
        self._open_if_complete(file)

    def _become_guest(self, file: RangeFile, keeper: Instance, tenure: tuple[int, int]) -> None:
        self._new_tenure(file, Role.GUEST, keeper, tenure)
        if file.asking and not file.cancelling:
            file.cancelling = True
            self.engine.cancel(file.lock)
        self._send_what_can_be(file)

    def _new_tenure(
        self, file: RangeFile, role: Role, keeper: Instance | None, tenure: tuple[int, int]
    ) -> None:
        """Nothing has been asked in this tenure. What was given up is not asked again."""
        file.role, file.keeper, file.tenure = role, keeper, tenure
        file.abandoned = 0
        for operation in list(file.operations.values()):
            operation.sent = operation.deadlock = False
            if operation.abandoned:
                del file.operations[operation.number]
            elif operation.withdrawn:
                del file.operations[operation.number]
                self.end(operation, Result.CANCELLED)

    def _lose_keeper(self, file: RangeFile) -> None:
        self._new_tenure(file, Role.NONE, None, file.tenure)
        self._send_what_can_be(file)

    def resign(self, file: RangeFile) -> None:
        """Keep the name no longer. What others hold they know themselves."""
        lock, file.lock = file.lock, 0
        for guest in sorted(file.guests & self.members):
            self.tell(guest, m.RangeResigned(file.name, file.tenure))
        for owner in [one for one in file.table.owners if one.instance != self.me]:
            file.table.remove(owner)
        file.table.waiters.clear()
        file.questions.clear()
        file.early.clear()
        file.guests.clear()
        self._new_tenure(file, Role.NONE, None, file.tenure)
        self.engine.unlock(lock, Flags.NONE)
        self._send_what_can_be(file)

    def _keeper(self, source: Instance, message: m.RangeMessage) -> None:
        assert isinstance(message, m.RangeKeeper)
        file = self.files.get(message.name)
        if file is not None and file.may_follow(message.tenure):
            self._become_guest(file, source, message.tenure)

    def _enlist(self, source: Instance, message: m.RangeMessage) -> None:
        """A new keeper asks what we hold."""
        assert isinstance(message, m.RangeEnlist)
        file = self.files.get(message.name)
        rows: list[tuple[int, int, int, int, int]] = []
        if file is not None:
            if not file.may_follow(message.tenure):
                return
            rows = [
                (owner.key, ranges.pid, *row)
                for owner, ranges in file.table.owners.items()
                for row in ranges.rows
            ]
        for start in range(0, len(rows) or 1, m.PUSH_LOCKS_MAX):
            part = rows[start : start + m.PUSH_LOCKS_MAX]
            last = start + m.PUSH_LOCKS_MAX >= len(rows)
            self.tell(source, m.RangeEnlisted(message.name, message.tenure, part, last))
        if file is not None:
            self._become_guest(file, source, message.tenure)

    def _enlisted(self, source: Instance, message: m.RangeMessage) -> None:
        assert isinstance(message, m.RangeEnlisted)
        file = self.files.get(message.name)
        if file is None or file.role is not Role.ENLISTING or file.tenure != message.tenure:
            return
        for key, pid, start, end, kind in message.rows:
            file.table.put(Owner(source, key), start, end, kind, pid)
            file.guests.add(source)
        if message.last:
            file.missing.discard(source)
            self._open_if_complete(file)

    def _open_if_complete(self, file: RangeFile) -> None:
        """All that anybody holds is known: decide."""
        if file.role is not Role.ENLISTING or file.missing or file.doubt:
            return
        file.role = Role.KEEPER
        file.own_used_ns = self.now_ns()
        self._send_what_can_be(file)
        early, file.early = file.early, []
        for source, message in early:
            self.at_keeper.receive(source, message)
        self._forget_if_unused(file)

    def _resigned(self, source: Instance, message: m.RangeMessage) -> None:
        assert isinstance(message, m.RangeResigned)
        file = self.files.get(message.name)
        if file is None or file.role is not Role.GUEST or file.tenure != message.tenure:
            return
        self._lose_keeper(file)

    def _confirm(self, source: Instance, message: m.RangeMessage) -> None:
        """A keeper wants to be sure; what we have given back is before this in its stream."""
        assert isinstance(message, m.RangeConfirm)
        self.tell(source, m.RangeConfirmed(message.name, message.tenure, message.number))

    # The world.

    def receive(self, source: Instance, message: m.RangeMessage) -> None:
        """A message of another member (`dlm.lockspace.Ranged`)."""
        self._handlers[type(message)](source, message)

    def changed(self, change: Changed) -> None:
        """Members came or went, or a dead one is silent or released (`dlm.lockspace.Changed`)."""
        gone = self.members - change.members
        self.members, self.dead, self.silent = change.members, change.dead, change.silent
        for file in list(self.files.values()):
            if file.role is Role.GUEST and file.keeper in gone:
                self._lose_keeper(file)
            elif file.role in (Role.KEEPER, Role.ENLISTING):
                self._keep_without(file, gone)

    def _keep_without(self, file: RangeFile, gone: frozenset[Instance]) -> None:
        for instance in gone:
            file.table.forget_waiters(instance)
            file.guests.discard(instance)
            file.early = [item for item in file.early if item[0] != instance]
            if instance in file.missing:
                file.missing.discard(instance)
                file.doubt.add(instance)
        kept = self.dead - self.silent
        file.doubt &= kept
        for instance in {owner.instance for owner in file.table.owners} - self.members - kept:
            file.table.forget_owners(instance)
        self._open_if_complete(file)
        if file.role is Role.KEEPER:
            self.at_keeper.settle(file)
            self.at_keeper.without(file, gone)

    # Memory.

    def _forget_if_unused(self, file: RangeFile) -> None:
        """A name that we neither keep nor use nor know the keeper of."""
        if file.role is Role.NONE and file.idle and not file.asking:
            self.files.pop(file.name, None)

    def _trim(self) -> None:
        for name in list(self.files)[:TRIM_SCAN_MAX]:
            file = self.files[name]
            if not file.idle or file.asking or len(self.files) < self.kept_max:
                continue
            if file.role is Role.KEEPER:
                self.resign(file)
            self.files.pop(name, None)

    # For people and tests.

    def describe(self, name: bytes) -> list[dict[str, object]]:
        """What this member's owners hold and wait for."""
        file = self.files.get(name)
        if file is None:
            return []
        names = {READ: "read", WRITE: "write"}
        rows: list[dict[str, object]] = [
            {"kind": "range", "mode": names[row[2]], "waits": False, "pid": ranges.pid,
             "start": row[0], "end": row[1]}
            for owner, ranges in file.table.owners.items() if owner.instance == self.me
            for row in ranges.rows
        ]  # fmt: skip
        for one in file.operations.values():
            if one.wait and one.kind != UNLOCK:
                rows.append(
                    {"kind": "range", "mode": names[one.kind], "waits": True, "pid": one.pid,
                     "start": one.start, "end": one.end}
                )  # fmt: skip
        return rows

    def check(self) -> None:
        for name, file in self.files.items():
            assert file.name == name
            assert (file.role in (Role.KEEPER, Role.ENLISTING)) == (file.keeper == self.me)
            if file.role is not Role.ENLISTING:
                assert not file.early
            assert file.role is Role.KEEPER or not file.questions
            if file.role is Role.KEEPER:
                file.table.check()
                assert file.lock
                assert not file.asking
                mine = [one for one in file.table.waiters if one.owner.instance == self.me]
                asked = {q.one.number for q in file.questions.values() if q.source == self.me}
                assert {one.number for one in mine} == set(file.operations) - asked
            elif file.role is not Role.ENLISTING:
                assert all(owner.instance == self.me for owner in file.table.owners)
                assert not file.table.waiters
            for ranges in file.table.owners.values():
                ranges.check()
