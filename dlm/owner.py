"""The owner's side: the locks of this process, wherever their masters are.

The owner is right about what it holds: a mode goes up only when the master's reply arrives, and
goes down the moment the owner says so (the acknowledgement comes later; until then the operation
is kept as `unacked`, with the value block it writes, so that a new master can be told).

States of a resource here: UNKNOWN (nobody was asked), PROBING (one request is out to learn the
master, the others wait behind it), KNOWN, LOST (the master is gone; what is held and wanted will be
or was pushed to a new one, `backlog` collects what comes later).

Invariants: exactly one completion per accepted operation; one operation of a lock at a time that
the user waits for; replies for another operation than the present one change nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.ids import Instance
from cluster.locks import Mode
from dlm.engine import Completion
from dlm.messages import (
    LVB_CURRENT,
    LVB_INVALID,
    LVB_STALE,
    NO_MODE,
    Bast,
    Cancel,
    Convert,
    LvbNote,
    PushedLock,
    Redirect,
    Reply,
    Request,
    ToMaster,
    Unlock,
)
from dlm.modes import (
    EXCLUDES,
    LVB_DIRECTION,
    LVB_WRITERS,
    LVB_ZERO,
    MODES,
    READ_LVB,
    WRITE_LVB,
    Flags,
    Result,
    Status,
    convert_is_valid,
    goes_down,
    meet,
    request_is_valid,
    unlock_is_valid,
)

if TYPE_CHECKING:
    from dlm.lockspace import Lockspace

HINTS_MAX = 1 << 16

_KNOWS_LVB = frozenset({Mode.PR, Mode.PW, Mode.EX})

_DECISIONS = frozenset({Result.GRANTED, Result.QUEUED, Result.AGAIN, Result.DEADLOCK})


class Knowledge(enum.Enum):
    UNKNOWN = 0
    PROBING = 1
    KNOWN = 2
    LOST = 3


class OwnerLock:
    """One lock of this process."""

    __slots__ = (
        "cancelled", "exact", "flags", "gone", "lazy", "lvb", "lvb_read", "lvb_seq", "lvb_valid",
        "mode", "number", "op", "pending", "resource", "sent_to", "since_ns", "state", "unacked",
        "wanted", "write",
    )  # fmt: skip

    def __init__(self, resource: OwnerResource, number: int) -> None:
        self.resource = resource
        self.number = number
        self.mode: int = NO_MODE
        self.op = 0
        self.state = 0
        self.pending = False
        self.wanted: int = NO_MODE
        self.flags = Flags.NONE
        self.cancelled = False
        self.since_ns = 0
        self.sent_to: Instance | None = None
        self.lazy = 0
        self.unacked = 0
        self.gone = False
        self.lvb = LVB_ZERO
        self.lvb_valid = False
        self.lvb_seq = 0
        self.lvb_read = False
        self.exact = False
        self.write = False

    @property
    def sure(self) -> int:
        """What this lock holds whatever the master has decided about the pending conversion: the
        reply to a PR that became CW may be under way, and others were told already."""
        if not self.pending or self.mode == NO_MODE:
            return self.mode
        if self.flags & Flags.CONVDEADLK:
            return Mode.NL
        mode = meet(MODES[self.mode], MODES[self.wanted])
        if self.flags & Flags.ALTPR:
            mode = meet(mode, Mode.PR)
        if self.flags & Flags.ALTCW:
            mode = meet(mode, Mode.CW)
        return mode


class OwnerResource:
    """What this process knows of one name."""

    __slots__ = (
        "asked", "backlog", "knowledge", "locks", "master", "name", "pushed", "slot", "target",
        "waiting",
    )  # fmt: skip

    def __init__(self, name: bytes, slot: int) -> None:
        self.name = name
        self.slot = slot
        self.knowledge = Knowledge.UNKNOWN
        self.master: Instance | None = None
        self.asked: Instance | None = None
        self.target: Instance | None = None
        self.pushed: tuple[int, int] | None = None
        self.locks: dict[int, OwnerLock] = {}
        self.waiting: list[OwnerLock] = []
        self.backlog: list[ToMaster] = []


class OwnerSide:
    """All locks of this process. Called by `Lockspace`, which delivers and posts messages."""

    def __init__(self, space: Lockspace) -> None:
        self._space = space
        self.locks: dict[int, OwnerLock] = {}
        self.resources: dict[bytes, OwnerResource] = {}
        self.hints: dict[bytes, Instance] = {}
        self._last = 0

    # Operations.

    def lock(self, name: bytes, mode: Mode, flags: int) -> int | None:
        """A new lock; None if the flags make no sense."""
        if not request_is_valid(mode, flags):
            return None
        resource = self.resources.get(name)
        if resource is None:
            resource = OwnerResource(name, self._space.slot_of(name))
            self.resources[name] = resource
        self._last += 1
        lock = OwnerLock(resource, self._last)
        resource.locks[lock.number] = self.locks[lock.number] = lock
        self._begin(lock, mode, flags)
        self._submit(lock)
        return lock.number

    def convert(self, number: int, mode: Mode, flags: int, lvb: bytes | None) -> Result:
        lock = self.locks.get(number)
        if lock is None or lock.gone:
            return Result.NO_LOCK
        if lock.pending:
            return Result.BUSY
        granted = MODES[lock.mode]
        if not convert_is_valid(granted, mode, flags):
            return Result.INVALID
        reads = flags & Flags.VALBLK and LVB_DIRECTION[granted][mode] == READ_LVB
        writes = self._note_write(lock, mode, flags, lvb)
        if goes_down(granted, mode) and not reads:
            lock.op += 1
            self._lower(lock, mode, writes)
            message = Convert(lock.number, lock.op, mode, flags, lvb if writes else None)
            self._to_master(lock, message)
            self._complete(lock, lock.op, Result.GRANTED)
            return Result.GRANTED
        self._begin(lock, mode, flags)
        self._to_master(lock, Convert(lock.number, lock.op, mode, flags))
        return Result.GRANTED

    def unlock(self, number: int, flags: int, lvb: bytes | None) -> Result:
        lock = self.locks.get(number)
        if lock is None or lock.gone:
            return Result.NO_LOCK
        if not unlock_is_valid(flags):
            return Result.INVALID
        if lock.pending and not flags & Flags.FORCEUNLOCK:
            return Result.BUSY
        writes = self._note_write(lock, Mode.NL, flags, lvb)
        if lock.pending:
            self._end(lock, Result.CANCELLED)
        lock.op += 1
        resource = lock.resource
        if lock in resource.waiting:
            resource.waiting.remove(lock)
            lock.gone = True
            self._complete(lock, lock.op, Result.UNLOCKED)
            self._forget(lock)
            return Result.GRANTED
        self._lower(lock, NO_MODE, writes)
        lock.gone = True
        self._complete(lock, lock.op, Result.UNLOCKED)
        self._to_master(lock, Unlock(lock.number, lock.op, flags, lvb if writes else None))
        return Result.GRANTED

    def cancel(self, number: int) -> Result:
        lock = self.locks.get(number)
        if lock is None or lock.gone:
            return Result.NO_LOCK
        if not lock.pending:
            return Result.INVALID
        if lock.cancelled:
            return Result.GRANTED
        resource = lock.resource
        if lock in resource.waiting:
            resource.waiting.remove(lock)
            self._finish(lock, Result.CANCELLED)
            return Result.GRANTED
        lock.cancelled = True
        self._to_master(lock, Cancel(lock.number, lock.op))
        return Result.GRANTED

    def _begin(self, lock: OwnerLock, mode: Mode, flags: int) -> None:
        lock.op += 1
        lock.pending = True
        lock.cancelled = False
        lock.wanted = mode
        lock.flags = flags
        lock.since_ns = self._space.now_ns

    def _note_write(self, lock: OwnerLock, mode: Mode, flags: int, lvb: bytes | None) -> bool:
        """Whether this operation carries a value (table and flags). That, or the invalidation of
        the value, is remembered until the master has it."""
        if lock.mode not in LVB_WRITERS or LVB_DIRECTION[lock.mode][mode] != WRITE_LVB:
            return False
        if flags & Flags.IVVALBLK:
            lock.lvb_valid, lock.write = False, True
            return False
        if not flags & Flags.VALBLK or lvb is None:
            return False
        lock.lvb, lock.lvb_valid, lock.lvb_read = lvb, True, True
        lock.lvb_seq += 1
        return True

    def _lower(self, lock: OwnerLock, mode: int, writes: bool) -> None:
        lock.mode = mode
        lock.unacked = lock.lazy = lock.op
        lock.write = lock.write or writes
        if mode not in _KNOWS_LVB and not lock.write:
            lock.lvb_read = False

    # Sending.

    def _to_master(self, lock: OwnerLock, message: ToMaster) -> None:
        resource = lock.resource
        if resource.knowledge is Knowledge.LOST:
            resource.backlog.append(message)
            return
        target = lock.sent_to
        if target is None:
            target = resource.master
        assert target is not None
        self._space.post(target, message)

    def _submit(self, lock: OwnerLock) -> None:
        """Send a new request to the master, or find out who that is."""
        resource = lock.resource
        if resource.knowledge is Knowledge.KNOWN:
            assert resource.master is not None
            self._send_request(lock, resource.master, probe=False)
        elif resource.knowledge is Knowledge.UNKNOWN:
            if resource.name in self._space.master.resources:
                self._master_is(resource, self._space.me)
                self._send_request(lock, self._space.me, probe=False)
            else:
                self._probe(lock, self.hints.pop(resource.name, None))
        elif resource.knowledge is Knowledge.LOST and resource.pushed is not None:
            resource.backlog.append(self._request(lock, probe=False))
        else:
            resource.waiting.append(lock)

    def _probe(self, lock: OwnerLock, hint: Instance | None = None) -> None:
        resource = lock.resource
        resource.knowledge = Knowledge.PROBING
        resource.master = None
        if hint is None or hint not in self._space.members:
            hint = self._space.directory.owner(resource.slot)
        resource.asked = hint
        self._send_request(lock, hint, probe=True)

    def _request(self, lock: OwnerLock, *, probe: bool) -> Request:
        age = self._space.now_ns - lock.since_ns
        return Request(
            lock.number, lock.op, lock.resource.name, MODES[lock.wanted], lock.flags, probe, age
        )

    def _send_request(self, lock: OwnerLock, to: Instance, *, probe: bool) -> None:
        lock.sent_to = to
        self._space.post(to, self._request(lock, probe=probe))

    # Messages of masters.

    def reply(self, source: Instance, message: Reply) -> None:
        lock = self.locks.get(message.lock)
        if lock is None or lock.sent_to != source or lock.resource.knowledge is Knowledge.LOST:
            return
        lock.state = max(lock.state, message.state)
        self._learn_from(lock, source, message)
        if lock.unacked and message.op >= lock.unacked:
            lock.unacked = 0
            lock.write = False
            lock.lvb_seq = max(lock.lvb_seq, message.lvb_seq)
            if lock.mode not in _KNOWS_LVB:
                lock.lvb_read = False
            if lock.gone:
                self._forget(lock)
                return
        if message.result == Result.QUEUED or not lock.pending or message.op != lock.op:
            return
        if message.result == Result.GRANTED:
            self._take_grant(lock, message)
        elif lock.mode != NO_MODE and message.status & Status.DEMOTED:
            lock.mode = message.mode
        self._finish(lock, message.result, message)

    def _learn_from(self, lock: OwnerLock, source: Instance, message: Reply) -> None:
        """A member that keeps a lock of ours is the master; one that refuses it was; one that only
        gives a request back may never have been."""
        resource = lock.resource
        present = lock.pending and message.op == lock.op
        if present and message.result in (Result.GRANTED, Result.QUEUED):
            if resource.knowledge is not Knowledge.KNOWN or resource.master != source:
                self._master_is(resource, source)
        elif resource.knowledge in (Knowledge.UNKNOWN, Knowledge.PROBING):
            if message.result in _DECISIONS:
                self._master_is(resource, source)
            elif resource.asked == source:
                resource.knowledge, resource.asked = Knowledge.UNKNOWN, None
                self._next_probe(resource)

    def _take_grant(self, lock: OwnerLock, message: Reply) -> None:
        lock.mode = message.mode
        lock.lvb_seq = message.lvb_seq
        lock.exact = False
        if message.lvb is not None:
            lock.lvb = message.lvb
            lock.lvb_valid = not message.status & Status.VALNOTVALID
            lock.lvb_read = lock.mode in _KNOWS_LVB
        elif lock.mode not in _KNOWS_LVB or message.status & Status.DEMOTED:
            # Others may have written the value while this lock held less.
            lock.lvb_read = False

    def _end(self, lock: OwnerLock, result: Result, reply: Reply | None = None) -> None:
        """The present operation is over."""
        lock.pending = False
        lock.wanted = NO_MODE
        self._complete(lock, lock.op, result, reply)

    def _finish(self, lock: OwnerLock, result: Result, reply: Reply | None = None) -> None:
        """As `_end`; a new request that was not granted leaves nothing behind."""
        self._end(lock, result, reply)
        if lock.mode == NO_MODE and result != Result.GRANTED and not lock.gone:
            lock.gone = True
            self._forget(lock)

    def _complete(
        self, lock: OwnerLock, op: int, result: Result, reply: Reply | None = None
    ) -> None:
        lvb, grant, status = None, (0, 0), 0
        if reply is not None:
            lvb, grant, status = reply.lvb, (reply.epoch, reply.grant), reply.status
        mode = MODES[max(lock.mode, 0)]
        self._space.events.append(
            Completion(lock.number, op, result, mode, lvb, lock.lvb_valid, grant, status)
        )

    def bast(self, source: Instance, message: Bast) -> None:
        lock = self.locks.get(message.lock)
        if lock is None or lock.gone or lock.sent_to != source or message.state < lock.state:
            return
        lock.state = message.state
        if message.op < lock.lazy or lock.mode == NO_MODE:
            return
        if EXCLUDES[lock.mode] & message.waiting:
            self._space.blocking(lock.number, message.mode, message.waiting)

    def redirect(self, source: Instance, message: Redirect) -> None:
        """The one we asked is not the master. `master` me: the directory has made it us."""
        if message.master == self._space.me:
            self._space.master.become(message.name, message.floor)
        lock = self.locks.get(message.lock)
        if lock is None or lock.sent_to != source or lock.mode != NO_MODE:
            return
        resource = lock.resource
        if resource.knowledge is Knowledge.LOST:
            return
        lock.sent_to = None
        if resource.knowledge is Knowledge.PROBING and resource.asked == source:
            resource.knowledge = Knowledge.UNKNOWN
            resource.asked = None
        elif (
            resource.knowledge is Knowledge.KNOWN
            and resource.master == source
            and all(other.mode == NO_MODE for other in resource.locks.values())
        ):
            resource.knowledge = Knowledge.UNKNOWN
        if resource.knowledge is Knowledge.UNKNOWN and message.master in self._space.members:
            assert message.master is not None
            self._master_is(resource, message.master)
        if lock.gone:
            self._forget(lock)
            self._next_probe(resource)
        elif lock.cancelled:
            self._finish(lock, Result.CANCELLED)
            self._next_probe(resource)
        else:
            self._submit(lock)

    def note(self, source: Instance, message: LvbNote) -> None:
        """A leaving master hands over the value block of a resource we have an interest in."""
        lock = self.locks.get(message.lock)
        if lock is None or lock.sent_to != source or lock.write:
            return
        lock.lvb, lock.lvb_seq = message.lvb, message.lvb_seq
        lock.lvb_valid, lock.exact = message.valid, True

    def _master_is(self, resource: OwnerResource, master: Instance) -> None:
        resource.knowledge = Knowledge.KNOWN
        resource.master, resource.asked = master, None
        waiting, resource.waiting = resource.waiting, []
        for lock in waiting:
            self._submit(lock)

    def _next_probe(self, resource: OwnerResource) -> None:
        """Whoever was to find out the master is gone; the next one in line does it."""
        if resource.knowledge is Knowledge.UNKNOWN and resource.waiting:
            self._probe(resource.waiting.pop(0))

    def _forget(self, lock: OwnerLock) -> None:
        resource = lock.resource
        self.locks.pop(lock.number, None)
        resource.locks.pop(lock.number, None)
        if resource.locks:
            return
        if self.resources.get(resource.name) is resource:
            del self.resources[resource.name]
        if resource.knowledge is Knowledge.KNOWN and resource.master != self._space.me:
            assert resource.master is not None
            if len(self.hints) >= HINTS_MAX:
                del self.hints[next(iter(self.hints))]
            self.hints[resource.name] = resource.master

    # Recovery.

    def view_changed(self, members: frozenset[Instance]) -> None:
        """Masters may be gone. Probes to the dead are sent again."""
        self.hints = {name: m for name, m in self.hints.items() if m in members}
        for resource in list(self.resources.values()):
            if resource.knowledge is Knowledge.KNOWN and resource.master not in members:
                resource.knowledge = Knowledge.LOST
                resource.pushed = resource.target = None
                resource.backlog.clear()
            elif resource.knowledge is Knowledge.PROBING and resource.asked not in members:
                resource.knowledge, resource.asked = Knowledge.UNKNOWN, None
            elif resource.knowledge is Knowledge.LOST and resource.target not in members:
                resource.pushed = resource.target = None
            if resource.knowledge is not Knowledge.LOST:
                self._ask_elsewhere(resource, members)

    def _ask_elsewhere(self, resource: OwnerResource, members: frozenset[Instance]) -> None:
        """What was asked of a member that is gone, whether it was the master or not."""
        for lock in list(resource.locks.values()):
            if lock.sent_to is None or lock.sent_to in members:
                continue
            lock.sent_to = None
            if lock.gone:
                self._forget(lock)
            elif lock.cancelled:
                self._finish(lock, Result.CANCELLED)
            else:
                self._submit(lock)
        self._next_probe(resource)

    def pushes(self, view: tuple[int, int]) -> Iterator[tuple[Instance, PushedLock]]:
        """What the new masters of LOST resources have to be told, by new master. It replaces
        whatever was sent or pushed before."""
        for resource in list(self.resources.values()):
            if resource.knowledge is not Knowledge.LOST:
                continue
            target = self._space.directory.owner(resource.slot)
            resource.target, resource.pushed = target, view
            resource.backlog.clear()
            resource.waiting.clear()
            for lock in list(resource.locks.values()):
                lock.sent_to, lock.state = target, 0
                if lock.pending and lock.cancelled:
                    if lock.sure == lock.mode:
                        self._finish(lock, Result.CANCELLED)
                    else:
                        # The mode may be gone already: only the new master can call it off.
                        resource.backlog.append(Cancel(lock.number, lock.op))
                if not lock.gone or lock.write:
                    yield target, self._push(lock)

    def _push(self, lock: OwnerLock) -> PushedLock:
        known = LVB_STALE
        if lock.lvb_read or lock.write or lock.exact:
            known = LVB_CURRENT if lock.lvb_valid else LVB_INVALID
        return PushedLock(
            lock.number, lock.op, lock.resource.name, lock.sure, lock.mode, lock.wanted,
            lock.flags,
            self._space.now_ns - lock.since_ns if lock.pending else 0,
            lock.lvb if known == LVB_CURRENT else None, lock.lvb_seq, known,
        )  # fmt: skip

    def settled(self, master: Instance, view: tuple[int, int]) -> None:
        """`master` has taken in what was pushed to it in `view`."""
        for resource in list(self.resources.values()):
            if (
                resource.knowledge is not Knowledge.LOST
                or resource.target != master
                or resource.pushed is None
                or resource.pushed > view
            ):
                continue
            self._settle(resource, master)

    def _settle(self, resource: OwnerResource, master: Instance) -> None:
        backlog, resource.backlog = resource.backlog, []
        resource.knowledge = Knowledge.KNOWN
        resource.master = master
        resource.target = resource.pushed = None
        later = {message.lock for message in backlog}
        for lock in list(resource.locks.values()):
            lock.sent_to = master
            lock.exact = False
            if lock.number not in later:
                lock.unacked = 0
                lock.write = False
                lock.lvb_read = lock.lvb_read and lock.mode in _KNOWS_LVB
                if lock.gone:
                    self._forget(lock)
        for message in backlog:
            self._space.post(master, message)

    def quiet(self) -> bool:
        """Nothing is out that a master has not acknowledged."""
        return not self.locks

    def check(self) -> None:
        for name, resource in self.resources.items():
            assert resource.name == name
            assert resource.locks
            if resource.knowledge is Knowledge.KNOWN:
                assert not resource.waiting
            for number, lock in resource.locks.items():
                assert self.locks[number] is lock
                assert not (lock.gone and lock.pending)
                assert lock.mode == NO_MODE or resource.knowledge in (
                    Knowledge.KNOWN,
                    Knowledge.LOST,
                ), (name, resource.knowledge)
