"""The lock cache: locks that stay here after use until another member needs them.

A `Glock` is one resource as this process sees it. The hot path is `try_hold`: one test of a bit
set, no message, no clock. All other transitions go through `_advance`, which serves the queue of
local waiters in order, asks the cluster for the head of the queue, and decides when a lock that is
in another member's way goes down. Going down is the work of a task of its own (`_demote`).

Invariants (`check`):
* a hold is given only in a mode that the granted mode covers;
* nothing is asked of the cluster while a holder is active, so no operation in progress converts a
  lock upwards in place; holders share locally, whatever their modes: exclusion between the tasks
  of one process is the business of its user;
* the mode goes down only after the demote hook returned with no holder left that the lower mode
  does not cover, and with no hold taken since that hook began;
* the queue is first in, first out: a waiter closes the fast path for those after it.

A blocking callback during an up-conversion gives the conversion up: the lock goes to nothing and
queues anew, so two members that both read and both want to write never block each other.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from weakref import WeakValueDictionary

from cluster.errors import BarredError
from cluster.locks import LockHooks, Mode
from dlm.engine import Completion, Engine, Runtime, Wakeup
from dlm.modes import (
    COVER_BITS,
    COVERS,
    EX,
    LVB_BYTES,
    LVB_WRITERS,
    LVB_ZERO,
    NAME_BYTES_MAX,
    NL,
    PR,
    PW,
    QUECVT_LEGAL,
    Flags,
    Result,
    strongest_beside,
)

LOCKS_MAX = 100_000
"""Locks kept without a user; above it each new one sends an old one away."""
TRIM_SCAN_MAX = 8
TRIMS_MAX = 64
HOLD_MIN_NS = 5_000_000
HOLD_FIRST_NS = 10_000_000
HOLD_MAX_NS = 100_000_000
IDLE_MIN_NS, IDLE_MAX_NS = 100_000, 1_000_000
"""A lock unused for so long goes when another member asks; longer where users came right back."""
BUSY_USES = 8
"""A tenure with fewer uses than this made no progress worth its price: hold longer next time."""

_READ_PROTECTING = frozenset({PR, PW, EX})
_ALL_MODES = 0b111110


class _Waiter:
    __slots__ = ("done", "granted", "mode", "wakeup")

    def __init__(self, mode: Mode, wakeup: Wakeup) -> None:
        self.mode = mode
        self.wakeup = wakeup
        self.granted = False
        self.done = False

    def finish(self, granted: bool) -> None:
        self.done = True
        self.granted = granted
        self.wakeup.set()


class Glock:
    """One cached lock; implements `cluster.locks.CachedLock` and is its engine's `LockClient`."""

    __slots__ = (
        "__weakref__", "_active", "_asking", "_cancelling", "_closing", "_demand", "_drained",
        "_gone", "_granted_at_ns", "_hold_ns", "_holds", "_hooks", "_idle_ns", "_idle_since_ns",
        "_late", "_left_ns", "_lock", "_lvb_set", "_manager", "_now", "_open", "_queue", "_seen",
        "_timer_ns", "_trier", "_uses", "_uses_at_grant", "lvb", "lvb_valid", "mode", "name",
    )  # fmt: skip

    def __init__(self, manager: LockCache, name: bytes, hooks: LockHooks | None) -> None:
        self._manager = manager
        self._now = manager.runtime.now_ns
        self._hooks = hooks
        self.name = name
        self.mode = NL
        self.lvb = LVB_ZERO
        self.lvb_valid = False
        self._lvb_set = False
        self._open = 0
        self._holds = [0] * 6
        self._active = 0
        self._queue: deque[_Waiter] = deque()
        self._lock: int | None = None
        self._asking: Mode | None = None
        self._cancelling = False
        self._trier: _Waiter | None = None
        self._demand = 0
        self._closing = False
        self._late = 0
        self._drained: Wakeup | None = None
        self._gone: list[Wakeup] = []
        self._uses = 0
        self._seen = -1
        self._uses_at_grant = 0
        self._granted_at_ns = 0
        self._idle_since_ns = 0
        self._idle_ns = IDLE_MIN_NS
        self._left_ns = 0
        self._hold_ns = HOLD_FIRST_NS
        self._timer_ns = 0

    # What cluster.locks.CachedLock promises.

    @property
    def demoting(self) -> bool:
        return self._closing

    @property
    def wanted(self) -> bool:
        """Whether another member waits for this lock (also during the time it may be kept)."""
        return self._demand != 0

    def set_lvb(self, value: bytes) -> None:
        assert len(value) == LVB_BYTES, "a lock value block has 64 bytes"
        assert self.mode in LVB_WRITERS, "only PW and EX may set the value block"
        self.lvb = value
        self.lvb_valid = True
        self._lvb_set = True

    def try_hold(self, mode: Mode) -> bool:
        if self._open >> mode & 1:
            self._holds[mode] += 1
            self._active += 1
            self._uses += 1
            return True
        return False

    async def hold(self, mode: Mode) -> None:
        if self._open >> mode & 1:
            self._holds[mode] += 1
            self._active += 1
            self._uses += 1
            return
        await self._wait(mode)

    def hold_demoting(self, mode: Mode) -> bool:
        if self._open >> mode & 1:
            return self.try_hold(mode)
        if self._closing and COVERS[self.mode][mode] and not self._manager.barred:
            self._take(mode)
            self._late += 1
            return True
        return False

    def release(self, mode: Mode) -> None:
        assert self._holds[mode] > 0, f"{self.name!r} is not held in {mode!r}"
        self._holds[mode] -= 1
        self._active -= 1
        if not self._active:
            self._idle_since_ns = self._now()
        if self._queue or self._demand:
            self._advance()

    # Waiting.

    def _take(self, mode: Mode) -> None:
        self._holds[mode] += 1
        self._active += 1
        self._uses += 1

    async def _wait(self, mode: Mode) -> None:
        manager = self._manager
        manager.raise_if_barred()
        waiter = _Waiter(mode, manager.runtime.wakeup())
        if self._left_ns and self._now() - self._left_ns < IDLE_MAX_NS:
            self._idle_ns = IDLE_MAX_NS
        self._queue.append(waiter)
        self._open = 0
        manager.keep(self)
        self._advance()
        if not waiter.done:
            try:
                await waiter.wakeup.wait()
            except BaseException:
                self._give_up(waiter)
                raise
        if not waiter.granted:
            manager.raise_if_barred()

    def _give_up(self, waiter: _Waiter) -> None:
        """The waiting task was cancelled; never leak a hold."""
        if waiter.granted:
            self.release(waiter.mode)
        elif waiter is self._trier:
            self._trier = None
        elif not waiter.done:
            self._queue.remove(waiter)
            self._advance()

    async def try_now(self, mode: Mode, *, poke: bool = False) -> bool:
        """NOQUEUE: take a hold if nobody is in the way, here or elsewhere. `poke`: or tell them."""
        if self.try_hold(mode):
            return True
        manager = self._manager
        manager.raise_if_barred()
        if not COVERS[mode][self.mode]:
            await self.send_away_and_wait()
            if self.try_hold(mode):
                return True
        busy = self._queue or self._active or self._closing or self._asking is not None
        if busy or not COVERS[mode][self.mode]:
            # Another task may have taken a stronger mode meanwhile: it goes down by the hook only.
            return False
        waiter = _Waiter(mode, manager.runtime.wakeup())
        self._trier = waiter
        manager.keep(self)
        self._ask(mode, Flags.NOQUEUE | Flags.NOQUEUEBAST if poke else Flags.NOQUEUE)
        if not waiter.done:
            try:
                await waiter.wakeup.wait()
            except BaseException:
                self._give_up(waiter)
                raise
        if not waiter.granted:
            manager.raise_if_barred()
        return waiter.granted

    # The state machine.

    def _advance(self) -> None:
        if self._manager.barred:
            self._fail_all()
            return
        if self._closing:
            if self._drained is not None and not self._in_the_way(self._target()):
                self._drained.set()
            return
        if self._asking is not None:
            return
        queue = self._queue
        while queue and COVERS[self.mode][queue[0].mode] and self._lock is not None:
            waiter = queue.popleft()
            self._take(waiter.mode)
            waiter.finish(True)
        if self._demand:
            self._consider_demotion()
            if self._closing:
                return
        if queue and not self._active:
            if COVERS[queue[0].mode][self.mode]:
                self._ask(queue[0].mode, Flags.NONE)
            else:
                # Between PR and CW there is no way up: what is cached under the one goes first.
                self._demand = _ALL_MODES
                self._close()
            return
        self._refresh()

    def _refresh(self) -> None:
        usable = self._lock is not None and not (
            self._queue or self._closing or self._asking is not None or self._manager.barred
        )
        self._open = COVER_BITS[self.mode] if usable else 0
        if self._lock is None and not (self._queue or self._active or self._asking is not None):
            self._manager.forget(self)

    def _ask(self, mode: Mode, flags: int) -> None:
        self._asking = mode
        self._open = 0
        flags |= Flags.VALBLK
        engine = self._manager.engine
        if self._lock is None:
            lock = engine.lock(self.name, mode, flags, self)
            if self._asking is not None:
                self._lock = lock
            return
        if QUECVT_LEGAL[self.mode][mode] and not flags & Flags.NOQUEUE:
            flags |= Flags.QUECVT
        result = engine.convert(self._lock, mode, flags)
        assert result == Result.GRANTED, result

    def completed(self, completion: Completion) -> None:
        if self._asking is None:
            return
        self._asking = None
        self._cancelling = False
        trier, self._trier = self._trier, None
        if completion.result == Result.GRANTED:
            self._granted(completion)
            if trier is not None:
                self._take(trier.mode)
        elif self.mode == NL:
            self._lock = None
        elif completion.result != Result.AGAIN:
            # The conversion was given up or would have been a deadlock: down, and queue anew.
            self._demand = _ALL_MODES
        if trier is not None:
            trier.finish(completion.result == Result.GRANTED)
        self._advance()

    def _granted(self, completion: Completion) -> None:
        before, self.mode = self.mode, completion.mode
        self._lock = completion.lock
        if completion.lvb is not None and not self._lvb_set:
            # What was set under PW is newer than what the master has; it goes there after EX.
            self.lvb = completion.lvb
            self.lvb_valid = completion.lvb_valid
        self._granted_at_ns = self._idle_since_ns = self._now()
        self._uses_at_grant = self._uses
        if before not in _READ_PROTECTING and self._hooks is not None:
            self._hooks.granted(self, self.mode)

    def blocking(self, mode: Mode, waiting: int) -> None:
        self._demand |= waiting
        if self._asking is not None:
            if self.mode != NL and not self._cancelling and self._trier is None:
                self._cancelling = True
                assert self._lock is not None
                self._manager.engine.cancel(self._lock)
            return
        if not self._closing:
            self._advance()

    # Going down.

    def _target(self) -> Mode:
        return strongest_beside(self.mode, self._demand)

    def _in_the_way(self, target: Mode) -> bool:
        covered = COVERS[target]
        return any(count and not covered[mode] for mode, count in enumerate(self._holds))

    def _consider_demotion(self) -> None:
        """Go down now, or stay for a bounded time while this process gets work done."""
        if self._lock is None or self._target() == self.mode:
            self._demand = 0
            return
        now = self._now()
        until = self._granted_at_ns + self._hold_ns
        idle_at = self._idle_since_ns + self._idle_ns
        if self._queue and not COVERS[self.mode][self._queue[0].mode]:
            until = now
        elif not self._active:
            until = min(until, idle_at)
        if now >= until:
            self._adapt(idle=not self._active and not self._queue and now >= idle_at)
            self._close()
        elif not now < self._timer_ns <= until:
            self._timer_ns = until
            self._manager.runtime.call_at(until, self._timer)

    def _timer(self) -> None:
        self._timer_ns = 0
        if self._demand and not self._closing:
            self._advance()

    def _adapt(self, *, idle: bool) -> None:
        if idle:
            self._left_ns = self._idle_since_ns
            self._idle_ns = max(IDLE_MIN_NS, self._idle_ns // 2)
            self._hold_ns = max(HOLD_MIN_NS, self._hold_ns // 2)
        elif self._uses - self._uses_at_grant < BUSY_USES:
            self._hold_ns = min(HOLD_MAX_NS, self._hold_ns * 2)

    def send_away(self) -> None:
        """Give the lock up although nobody asked: the cache is full or its user is gone."""
        if self._closing or self._asking is not None:
            return
        self._demand = _ALL_MODES
        self._close(spawn=True)

    def _close(self, *, spawn: bool = True) -> None:
        self._closing = True
        self._open = 0
        if spawn:
            started = self._manager.runtime.spawn(self._demote)
            assert started, "a runtime without tasks never sends blocking callbacks"

    async def _demote(self) -> None:
        try:
            while True:
                await self._drain()
                if self._manager.barred:
                    return
                target, late = self._target(), self._late
                if self._hooks is not None:
                    await self._hooks.demote(self, target)
                if self._manager.barred:
                    return
                if late == self._late and not self._in_the_way(target):
                    break
            self._lower(target)
        except BarredError as error:
            self._manager.bar(error.message)
        finally:
            for wakeup in self._gone:
                wakeup.set()
            self._gone.clear()

    async def _drain(self) -> None:
        while self._in_the_way(self._target()) and not self._manager.barred:
            self._drained = self._manager.runtime.wakeup()
            try:
                await self._drained.wait()
            finally:
                self._drained = None

    def _lower(self, target: Mode) -> None:
        """Tell the master. Both operations are complete for us as soon as they are sent."""
        assert self._lock is not None
        lock, before = self._lock, self.mode
        writes = self._lvb_set and before in LVB_WRITERS
        flags = Flags.VALBLK if writes else Flags.NONE
        value = self.lvb if writes else None
        self.mode = target
        self._lvb_set = False
        self._demand = 0
        self._closing = False
        if target == NL:
            self._lock = None
            self.lvb_valid = False
            self._manager.engine.unlock(lock, flags, value)
        else:
            self._manager.engine.convert(lock, target, flags, value)
        self._advance()

    # Ends.

    async def send_away_and_wait(self) -> None:
        if self._manager.barred:
            # A demotion that the bar cut short stays where it is: nobody would wake us.
            return
        gone = self._manager.runtime.wakeup()
        if not self._closing:
            if self._lock is None or not self.idle:
                return
            self._demand = _ALL_MODES
            self._close(spawn=False)
            if not self._manager.runtime.spawn(self._demote):
                await self._demote()
                return
        self._gone.append(gone)
        await gone.wait()

    def _fail_all(self) -> None:
        self._open = 0
        if self._drained is not None:
            self._drained.set()
        trier, self._trier = self._trier, None
        if trier is not None:
            trier.finish(False)
        while self._queue:
            self._queue.popleft().finish(False)

    def set_hooks(self, hooks: LockHooks) -> None:
        self._hooks = hooks

    @property
    def idle(self) -> bool:
        return not (self._active or self._queue or self._closing or self._asking is not None)

    def second_chance(self) -> bool:
        """True if the lock was used since the last time it was looked at."""
        used = self._seen != self._uses
        self._seen = self._uses
        return used or not self.idle

    def describe(self) -> dict[str, object]:
        """For `dlmctl`."""
        return {
            "mode": self.mode.name,
            "holders": self._active,
            "waiters": [waiter.mode.name for waiter in self._queue],
            "asking": self._asking.name if self._asking is not None else None,
            "demoting": self._closing,
            "wanted_by": [Mode(m).name for m in range(6) if self._demand >> m & 1],
            "hold_ms": self._hold_ns / 1e6,
        }

    def check(self) -> None:
        assert self._active == sum(self._holds)
        for mode, count in enumerate(self._holds):
            assert not count or COVERS[self.mode][mode], (self.name, self._holds, self.mode)
            assert not count or self._lock is not None, "held without a lock"
        if self._open:
            assert not self._queue
            assert not self._closing
            assert self._asking is None
        if self._asking is not None:
            assert not self._active


class LockCache:
    """Implements `cluster.locks.LockManager` over an engine. `get` returns the same object for a
    name as long as anybody (a user or the cluster) has an interest in it."""

    def __init__(self, engine: Engine, runtime: Runtime, *, locks_max: int = LOCKS_MAX) -> None:
        self.engine = engine
        self.runtime = runtime
        self.locks_max = locks_max
        self.barred = ""
        self._all: WeakValueDictionary[bytes, Glock] = WeakValueDictionary()
        self._kept: OrderedDict[bytes, Glock] = OrderedDict()
        self._trimming = 0

    def get(self, name: bytes, hooks: LockHooks | None = None) -> Glock:
        lock = self._all.get(name)
        if lock is None:
            assert 0 < len(name) <= NAME_BYTES_MAX, "a resource name has 1 to 64 bytes"
            lock = self._all[name] = Glock(self, name, hooks)
        elif hooks is not None:
            lock.set_hooks(hooks)
        return lock

    def find(self, name: bytes) -> Glock | None:
        """The lock if it exists here; for reports."""
        return self._all.get(name)

    async def try_lock(self, name: bytes, mode: Mode, *, poke: bool = False) -> Glock | None:
        lock = self.get(name)
        return lock if await lock.try_now(mode, poke=poke) else None

    def is_home(self, name: bytes) -> bool:
        return self.engine.is_home(name)

    async def drop(self, name: bytes) -> None:
        lock = self._all.get(name)
        if lock is not None:
            await lock.send_away_and_wait()

    async def drop_all(self) -> None:
        """Give everything back, TRIMS_MAX at a time; no new holds may be taken meanwhile."""
        while self._kept:
            batch = [lock for lock in self._kept.values() if lock.idle or lock.demoting]
            if not batch or self.barred:
                return
            for lock in batch[:TRIMS_MAX]:
                if lock.idle:
                    lock.send_away()
            for lock in batch[:TRIMS_MAX]:
                await lock.send_away_and_wait()

    def bar(self, reason: str) -> None:
        """This instance is out for ever: whoever waits gets BarredError."""
        if self.barred:
            return
        self.barred = reason or "this instance was barred from the cluster"
        for lock in list(self._kept.values()):
            lock._advance()

    def raise_if_barred(self) -> None:
        if self.barred:
            raise BarredError(self.barred)

    def keep(self, lock: Glock) -> None:
        """The lock has a place in the cluster or a waiter; it must not be collected."""
        if lock.name not in self._kept:
            self._kept[lock.name] = lock
            if len(self._kept) > self.locks_max:
                self._trim()

    def forget(self, lock: Glock) -> None:
        self._kept.pop(lock.name, None)

    def _trim(self) -> None:
        """Send away the least recently used of the first few; a used one goes to the end."""
        for _ in range(min(TRIM_SCAN_MAX, len(self._kept))):
            name = next(iter(self._kept))
            lock = self._kept[name]
            if not lock.second_chance() and self._trimming < TRIMS_MAX:
                self._trimming += 1
                if not self.runtime.spawn(lambda lock=lock: self._trim_one(lock)):  # type: ignore[misc]
                    self._trimming -= 1
                    return
            if name in self._kept:
                self._kept.move_to_end(name)

    async def _trim_one(self, lock: Glock) -> None:
        try:
            await lock.send_away_and_wait()
        finally:
            self._trimming -= 1

    def __len__(self) -> int:
        return len(self._kept)

    def describe(self) -> list[tuple[bytes, dict[str, object]]]:
        return [(name, lock.describe()) for name, lock in self._kept.items()]

    def check(self) -> None:
        for name, lock in self._kept.items():
            assert self._all[name] is lock
            lock.check()
