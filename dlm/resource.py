"""One resource at its master: three queues, the grant rules, the value block.

The rules (published for VMS, kept by the Linux lock manager):
* a lock is granted when its mode is compatible with the granted mode of every other lock, on the
  granted queue and on the conversion queue;
* a conversion that can be granted at once is, ahead of queued conversions, unless QUECVT; to keep
  this from starving the queue, after OVERTAKES_MAX such grants a conversion has to queue;
* conversions go before new requests; both queues are first in, first out; a new request waits
  behind anything that waits;
* a conversion that would have to wait behind one that its own granted mode blocks is a deadlock.

Effects are appended to `out` in order: the reply to an operation before what it causes.
Locks of a dead owner stay as `dead` until the group says that they may go. A `phantom` stands for
what a dead member may have held without our knowledge.

Invariants (`check`): granted modes of live locks are pairwise compatible and compatible with those
of dead ones; the head of a queue is never grantable between operations; every holder in the way of
a waiting request has been told so since its last grant.
"""

from __future__ import annotations

from cluster.ids import Instance
from cluster.locks import Mode
from dlm.messages import NO_MODE, Bast, Reply, Request
from dlm.modes import (
    COMPATIBLE,
    EXCLUDES,
    KEEP_LVB,
    LVB_DIRECTION,
    LVB_WRITERS,
    LVB_ZERO,
    MODES,
    NL,
    READ_LVB,
    WRITE_MODES,
    Flags,
    Result,
    Status,
    goes_down,
)

OVERTAKES_MAX = 64

_STRENGTH = (Mode.EX, Mode.PW, Mode.PR, Mode.CW, Mode.CR, Mode.NL)


class MasterLock:
    """A lock as its master knows it."""

    __slots__ = (
        "dead", "flags", "granted", "last", "number", "op", "owner", "phantom", "requested",
        "resource", "since_ns", "state", "status", "told",
    )  # fmt: skip

    def __init__(self, resource: Resource, owner: Instance, number: int, since_ns: int) -> None:
        self.resource = resource
        self.owner = owner
        self.number = number
        self.since_ns = since_ns
        self.op = 0
        self.state = 0
        self.granted: int = NO_MODE
        self.requested: int = NO_MODE
        self.flags = Flags.NONE
        self.status = Status.NONE
        self.told = 0
        self.dead = False
        self.phantom = False
        self.last: Reply | None = None


Effect = tuple[MasterLock, Reply | Bast]
Parked = tuple[Instance, Request]


class Resource:
    """The queues of one name. `epoch` and `grants` make the fencing token of the next grant."""

    __slots__ = (
        "converting", "epoch", "granted", "grants", "held", "lvb", "lvb_seq", "lvb_valid",
        "name", "out", "overtakes", "removing", "slot", "waiting",
    )  # fmt: skip

    def __init__(self, name: bytes, slot: int, out: list[Effect]) -> None:
        self.name = name
        self.slot = slot
        self.out = out
        self.granted: list[MasterLock] = []
        self.converting: list[MasterLock] = []
        self.waiting: list[MasterLock] = []
        self.lvb = LVB_ZERO
        self.lvb_valid = False
        self.lvb_seq = 0
        self.epoch = 0
        self.grants = 0
        self.overtakes = 0
        self.removing = False
        self.held: list[Parked] = []

    @property
    def empty(self) -> bool:
        return not (self.granted or self.converting or self.waiting)

    def locks(self) -> list[MasterLock]:
        return [*self.granted, *self.converting, *self.waiting]

    # Operations of an owner.

    def request(self, lock: MasterLock, mode: Mode, flags: int, *, probe: bool = False) -> bool:
        """A new lock. False if it was refused and is not part of this resource."""
        lock.requested, lock.flags = mode, flags
        if self._grant_or_alternative(lock):
            self._after()
            return True
        if flags & Flags.NOQUEUE:
            self._reply(lock, Result.AGAIN)
            if flags & Flags.NOQUEUEBAST:
                self._poke(lock)
            return False
        self._enqueue(self.waiting, lock)
        if probe:
            self._reply(lock, Result.QUEUED)
        self._tell_blockers()
        return True

    def convert(self, lock: MasterLock, mode: Mode, flags: int, lvb: bytes | None) -> None:
        """Change the mode of a granted lock."""
        assert lock.granted != NO_MODE
        lock.requested, lock.flags = mode, flags
        if self._grant_or_alternative(lock, lvb):
            self._after()
            return
        if flags & Flags.NOQUEUE:
            self._reply(lock, Result.AGAIN)
            lock.requested = NO_MODE
            if flags & Flags.NOQUEUEBAST:
                self._poke(lock)
            return
        if self._is_deadlock(lock) and not flags & Flags.NODLCKWT:
            if not flags & Flags.CONVDEADLK:
                self._reply(lock, Result.DEADLOCK)
                lock.requested = NO_MODE
                return
            lock.granted, lock.status = NL, Status.DEMOTED
        self.granted.remove(lock)
        self._enqueue(self.converting, lock)
        self._after()

    def unlock(self, lock: MasterLock, flags: int, lvb: bytes | None) -> None:
        """Take a lock out, whatever it waits for."""
        if lock.granted in LVB_WRITERS:
            if flags & Flags.IVVALBLK:
                self.lvb_valid = False
            elif flags & Flags.VALBLK and lvb is not None:
                self._write_lvb(lvb)
        self._take_out(lock)
        self._tell_anew(lock)
        lock.granted = lock.requested = NO_MODE
        self._reply(lock, Result.UNLOCKED)
        self._after()

    def cancel(self, lock: MasterLock) -> bool:
        """Give up what the lock waits for. False if that leaves no lock."""
        if lock.requested == NO_MODE:
            return True
        self._take_out(lock)
        self._tell_anew(lock)
        lock.requested = NO_MODE
        if lock.granted != NO_MODE:
            self.granted.append(lock)
            # A blocking callback of before may have been answered with this very cancellation.
            lock.told = 0
        self._reply(lock, Result.CANCELLED)
        self._after()
        return lock.granted != NO_MODE

    # Deaths and recovery.

    def owner_died(self, owner: Instance) -> list[MasterLock]:
        """Keep what the dead owner may be writing or caching; its wishes go. Returns what went."""
        gone = []
        for lock in self.locks():
            if lock.owner != owner or lock.dead:
                continue
            self._take_out(lock)
            self._tell_anew(lock)
            lock.requested = NO_MODE
            if lock.granted in (NO_MODE, NL):
                gone.append(lock)
                continue
            lock.dead = True
            self.granted.append(lock)
            if lock.granted in LVB_WRITERS:
                self.lvb_valid = False
        self._after()
        return gone

    def owner_gone(self, owner: Instance, *, write_modes: bool) -> list[MasterLock]:
        """The owner left, or is silent (then only what it cannot have written under goes)."""
        gone = [
            lock
            for lock in self.locks()
            if lock.owner == owner and (write_modes or lock.granted not in WRITE_MODES)
        ]
        for lock in gone:
            self._take_out(lock)
            self._tell_anew(lock)
            if lock.granted in LVB_WRITERS:
                # It left without having written the value that its unlock would have brought.
                self.lvb_valid = False
        if gone:
            self._after()
        return gone

    def add_phantom(self, dead: Instance, *, silent: bool, released: bool = False) -> None:
        """`dead` may have held the strongest mode that the live holders leave room for. If it is
        released by now, it blocks nothing; but it may have written what the value block tells."""
        held = 0
        for other in (*self.granted, *self.converting):
            if not other.dead:
                held |= 1 << other.granted
        mode = next(mode for mode in _STRENGTH if not EXCLUDES[mode] & held)
        if mode in LVB_WRITERS:
            self.lvb_valid = False
        if mode == NL or released or (silent and mode not in WRITE_MODES):
            return
        lock = MasterLock(self, dead, 0, 0)
        lock.granted = mode
        lock.dead = lock.phantom = True
        self.granted.append(lock)

    def adopt(self, lock: MasterLock, granted: int) -> None:
        """Recovery: the owner of a lock says what it holds."""
        lock.granted = granted
        if granted != NO_MODE:
            self.granted.append(lock)

    def give_back(self, lock: MasterLock, mode: Mode) -> None:
        """Recovery: a conversion under way put this mode in doubt. If nobody is in the way it is
        as before; otherwise the owner learns with its next reply that it is gone."""
        others = 0
        for other in self.granted:
            if other is not lock:
                others |= 1 << other.granted
        if EXCLUDES[mode] & others:
            lock.status = Status.DEMOTED
        else:
            lock.granted = mode

    # The rules.

    def _grantable(self, lock: MasterLock, *, now: bool) -> bool:
        flags = lock.flags
        if flags & Flags.EXPEDITE:
            return True
        excluded = EXCLUDES[lock.requested]
        for other in self.granted:
            if excluded >> other.granted & 1 and other is not lock:
                return False
        for other in self.converting:
            if excluded >> other.granted & 1 and other is not lock:
                return False
        if lock.granted != NO_MODE:
            if now:
                return self._may_overtake(lock)
            return bool(flags & Flags.NOORDER) or self.converting[0] is lock
        if flags & Flags.NOORDER:
            return True
        if now:
            return not self.converting and not self.waiting
        return not self.converting and self.waiting[0] is lock

    def _may_overtake(self, lock: MasterLock) -> bool:
        if not self.converting:
            return True
        if lock.flags & Flags.NOORDER or goes_down(MODES[lock.granted], MODES[lock.requested]):
            return True
        if lock.flags & Flags.QUECVT:
            return False
        if self.overtakes >= OVERTAKES_MAX and not self._is_deadlock(lock):
            return False
        self.overtakes += 1
        return True

    def _is_deadlock(self, lock: MasterLock) -> bool:
        """Would it wait behind a conversion that cannot go on because of what `lock` holds?"""
        mine, wanted = lock.granted, lock.requested
        if lock.flags & Flags.HEADQUE:
            return any(
                not COMPATIBLE[mine][other.requested] and not COMPATIBLE[other.granted][wanted]
                for other in self.converting
            )
        return any(not COMPATIBLE[mine][other.requested] for other in self.converting)

    def _grant_or_alternative(self, lock: MasterLock, lvb: bytes | None = None) -> bool:
        if self._grantable(lock, now=True):
            self._grant(lock, lvb)
            return True
        alternative = None
        if lock.flags & Flags.ALTPR and lock.requested != Mode.PR:
            alternative = Mode.PR
        elif lock.flags & Flags.ALTCW and lock.requested != Mode.CW:
            alternative = Mode.CW
        if alternative is None:
            return False
        wanted, lock.requested = lock.requested, alternative
        if self._grantable(lock, now=True):
            lock.status |= Status.ALTMODE
            self._grant(lock, lvb)
            return True
        lock.requested = wanted
        return False

    def _grant(self, lock: MasterLock, lvb: bytes | None = None) -> None:
        before, mode = lock.granted, lock.requested
        direction = READ_LVB if before == NO_MODE else LVB_DIRECTION[before][mode]
        if direction in (READ_LVB, KEEP_LVB):
            pass
        elif lock.flags & Flags.IVVALBLK:
            self.lvb_valid = False
        elif lock.flags & Flags.VALBLK and lvb is not None:
            self._write_lvb(lvb)
        if before == NO_MODE or lock not in self.granted:
            self._take_out(lock)
            self.granted.append(lock)
        lock.granted, lock.requested = mode, NO_MODE
        lock.told = 0
        self.grants += 1
        reads = direction == READ_LVB and lock.flags & Flags.VALBLK
        self._reply(lock, Result.GRANTED, self.lvb if reads else None)

    def _write_lvb(self, lvb: bytes) -> None:
        self.lvb = lvb
        self.lvb_seq += 1
        self.lvb_valid = True

    def _enqueue(self, queue: list[MasterLock], lock: MasterLock) -> None:
        if lock.flags & Flags.HEADQUE:
            queue.insert(0, lock)
        else:
            queue.append(lock)

    def _take_out(self, lock: MasterLock) -> None:
        for queue in (self.granted, self.converting, self.waiting):
            if lock in queue:
                queue.remove(lock)
                return

    def _after(self) -> None:
        """Grant what can be granted now, then tell those who are in the way of the rest."""
        if not self.converting and not self.waiting:
            return
        self._grant_queue(self.converting)
        if not self.converting:
            self.overtakes = 0
        self._grant_queue(self.waiting)
        self._tell_blockers()

    def _grant_queue(self, queue: list[MasterLock]) -> None:
        index = 0
        while index < len(queue):
            if self._grantable(queue[index], now=False):
                self._grant(queue[index])
                index = 0
            else:
                index += 1

    def _tell_blockers(self) -> None:
        ahead = 0
        for lock in self.converting:
            self._tell(lock, ahead)
            ahead |= 1 << lock.requested
        for lock in self.waiting:
            ahead |= 1 << lock.requested
        if ahead:
            for lock in self.granted:
                self._tell(lock, ahead)

    def _tell_anew(self, withdrawn: MasterLock) -> None:
        """Somebody waits no longer. A holder may have answered the callback of that one wish (it
        keeps the lock and says so): whoever else waits, now or later, is another reason."""
        if withdrawn.requested != NO_MODE:
            for lock in (*self.granted, *self.converting):
                lock.told = 0

    def _tell(self, lock: MasterLock, waiting: int) -> None:
        blocked = EXCLUDES[lock.granted] & waiting
        if blocked & ~lock.told and not lock.dead:
            lock.told |= blocked
            self._bast(lock, lock.told)

    def _poke(self, asker: MasterLock) -> None:
        """NOQUEUEBAST: tell the holders although nothing will wait for them."""
        wanted = asker.requested if asker.requested != NO_MODE else NL
        for lock in (*self.granted, *self.converting):
            if lock is not asker and EXCLUDES[lock.granted] >> wanted & 1 and not lock.dead:
                self._bast(lock, 1 << wanted)

    def _bast(self, lock: MasterLock, waiting: int) -> None:
        lock.state += 1
        mode = MODES[waiting.bit_length() - 1]
        self.out.append((lock, Bast(lock.number, lock.op, lock.state, mode, waiting)))

    def _reply(self, lock: MasterLock, result: Result, lvb: bytes | None = None) -> None:
        lock.state += 1
        status = lock.status if self.lvb_valid else lock.status | Status.VALNOTVALID
        lock.last = Reply(
            lock.number, lock.op, lock.state, result, lock.granted, status, lvb,
            self.lvb_seq, self.epoch, self.grants,
        )  # fmt: skip
        self.out.append((lock, lock.last))
        if result != Result.QUEUED:
            lock.status = Status.NONE

    def check(self) -> None:
        holders = [*self.granted, *self.converting]
        for index, one in enumerate(holders):
            assert one.granted != NO_MODE
            assert one.resource is self
            for two in holders[index + 1 :]:
                both_dead = one.dead and two.dead
                assert both_dead or COMPATIBLE[one.granted][two.granted], (self.name, one, two)
        for lock in self.converting:
            assert lock.requested != NO_MODE
            assert not lock.dead
        for lock in self.waiting:
            assert lock.granted == NO_MODE
            assert lock.requested != NO_MODE
        for queue in (self.converting, self.waiting):
            for lock in queue:
                assert not self._grantable(lock, now=False), (self.name, "not granted")
        waiting = [*self.converting, *self.waiting]
        for holder in self.granted:
            blocked = 0
            for lock in waiting:
                blocked |= EXCLUDES[holder.granted] & 1 << lock.requested
            assert holder.dead or not blocked & ~holder.told, (self.name, "lost wakeup")
