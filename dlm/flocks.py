"""Locks of whole files as flock(2) has them: each is a lock of the lock manager.

An owner is an open file; it holds PR (LOCK_SH) or EX (LOCK_EX) on the file's name, a lock of its
own beside those of other owners on this member. So queues, deaths and recoveries are those of the
lock manager. A change from shared to exclusive that cannot be had at once gives the shared lock up
first, as flock does everywhere.

The member that uses a name first is its master, and then locks without messages. So that it stays
the master between two uses, a lock in NL is kept on the names used last (at most `KEPT_MAX`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from cluster.locks import Mode
from dlm.engine import Completion, Engine
from dlm.modes import Flags, Result

KEPT_MAX = 4096
Done = Callable[[Result], None]


class _Keeper:
    """The client of a lock in NL."""

    def completed(self, completion: Completion) -> None:
        """NL is in nobody's way."""

    def blocking(self, mode: Mode, waiting: int) -> None:
        """NL is in nobody's way."""


_KEEPER = _Keeper()


class _Barrier:
    """The client of a lock in NL that is granted when its master has seen all that we told it."""

    __slots__ = ("_done", "_engine")

    def __init__(self, engine: Engine, done: Done) -> None:
        self._engine = engine
        self._done: Done | None = done

    def completed(self, completion: Completion) -> None:
        done, self._done = self._done, None
        if completion.result == Result.GRANTED:
            self._engine.unlock(completion.lock, Flags.NONE)
        if done is not None:
            done(Result.GRANTED)

    def blocking(self, mode: Mode, waiting: int) -> None:
        """NL is in nobody's way."""


class Flock:
    """The lock of one open file, or the wish for it; the client of its lock."""

    __slots__ = (
        "_done", "_flocks", "_unlocks", "_wait", "key", "mode", "name", "number", "pid", "wanted",
    )  # fmt: skip

    def __init__(self, flocks: Flocks, name: bytes, key: int, pid: int) -> None:
        self._flocks = flocks
        self.name = name
        self.key = key
        self.pid = pid
        self.mode = Mode.NL
        self.wanted = Mode.NL
        self.number = 0
        self._wait = False
        self._done: Done | None = None
        self._unlocks = False

    @property
    def waiting(self) -> bool:
        return self._done is not None

    def ask(self, mode: Mode, done: Done, *, wait: bool) -> None:
        """Get this lock into a mode; `done` may be called before this returns."""
        self._done, self._wait, self.wanted = done, wait, mode
        flags = Flags.NONE if wait else Flags.NOQUEUE
        if self.mode == Mode.NL:
            self.number = self._flocks.engine.lock(self.name, mode, flags, self)
        elif mode == Mode.PR:
            self._flocks.engine.convert(self.number, mode, Flags.NONE)
        else:
            self._flocks.engine.convert(self.number, mode, Flags.NOQUEUE)

    def give_back(self) -> None:
        """The lock, if it is held, and the wish for it, if it waits, end now."""
        self._done, self._unlocks = None, True
        if self.mode != Mode.NL:
            self.mode = Mode.NL
            self._flocks.engine.unlock(self.number, Flags.FORCEUNLOCK)
        elif self.number:
            self._flocks.engine.cancel(self.number)

    def completed(self, completion: Completion) -> None:
        result = completion.result
        if result == Result.UNLOCKED:
            return
        if self._unlocks:
            if result == Result.GRANTED and self.mode == Mode.NL:
                # It was granted while the cancellation was under way.
                self._flocks.engine.unlock(completion.lock, Flags.NONE)
            return
        done, self._done = self._done, None
        if result == Result.GRANTED:
            self.number = completion.lock
            self.mode = completion.mode
        elif self.mode != Mode.NL:
            # No way up at once: as everywhere, the shared lock goes first.
            self._flocks.engine.unlock(self.number, Flags.NONE)
            self.mode = Mode.NL
            if self._wait and done is not None:
                self.ask(Mode.EX, done, wait=True)
                return
        if done is not None:
            self._flocks.settled(self)
            done(result)

    def blocking(self, mode: Mode, waiting: int) -> None:
        """The owner gives it back when it likes."""


class Flocks:
    """All flocks of this member."""

    def __init__(self, engine: Engine, *, kept_max: int = KEPT_MAX) -> None:
        self.engine = engine
        self.kept_max = kept_max
        self._locks: dict[tuple[bytes, int], Flock] = {}
        self._kept: OrderedDict[bytes, int] = OrderedDict()

    def lock(
        self, name: bytes, key: int, mode: Mode, done: Done, *, wait: bool, pid: int = 0
    ) -> Flock | None:
        """Lock `name` for the open file `key` in PR or EX. `done` gets GRANTED, or AGAIN when the
        lock is not free and `wait` is false; until then the result is what `cancel` takes, after
        that it is None. On the death of a holder's node the lock comes free as any other of its
        mode. Raises BarredError when this member is out."""
        lock = self._locks.get((name, key))
        if lock is not None and lock.waiting:
            done(Result.BUSY)  # two threads at once on one open file
            return None
        if lock is None:
            lock = self._locks[name, key] = Flock(self, name, key, pid)
        lock.pid = pid
        if lock.mode == mode:
            done(Result.GRANTED)
            return None
        try:
            lock.ask(mode, done, wait=wait)
        except BaseException:
            del self._locks[name, key]
            raise
        return lock if lock.waiting else None

    def unlock(self, name: bytes, key: int, done: Done | None = None) -> None:
        """Give the lock of an open file back, if there is one. Never waits; `done` is called when
        the master has heard of it, so that whoever is told then finds the lock free. Another
        thread that waits for a lock of the same open file goes on waiting."""
        lock = self._locks.get((name, key))
        if lock is None or lock.waiting:
            if done is not None:
                done(Result.GRANTED)
            return
        del self._locks[name, key]
        lock.give_back()
        if done is not None:
            self.engine.lock(name, Mode.NL, Flags.EXPEDITE, _Barrier(self.engine, done))

    def cancel(self, lock: Flock) -> None:
        """Wait no longer; `done` is not called any more. If the lock was granted in the same moment
        it is given back."""
        if self._locks.get((lock.name, lock.key)) is lock:
            del self._locks[lock.name, lock.key]
        lock.give_back()

    def settled(self, lock: Flock) -> None:
        """An operation has ended."""
        if lock.mode == Mode.NL:
            if self._locks.get((lock.name, lock.key)) is lock:
                del self._locks[lock.name, lock.key]
        elif lock.name in self._kept:
            self._kept.move_to_end(lock.name)
        else:
            self._kept[lock.name] = self.engine.lock(lock.name, Mode.NL, Flags.EXPEDITE, _KEEPER)
            if len(self._kept) > self.kept_max:
                _name, number = self._kept.popitem(last=False)
                self.engine.unlock(number, Flags.FORCEUNLOCK)

    def describe(self, name: bytes) -> list[dict[str, object]]:
        """The locks and wishes of this member on a name, for people."""
        return [
            {"kind": "flock", "mode": lock.wanted.name, "waits": lock.waiting, "pid": lock.pid}
            for (other, _key), lock in self._locks.items()
            if other == name
        ]

    def check(self) -> None:
        for (name, key), lock in self._locks.items():
            assert (lock.name, lock.key) == (name, key)
            assert lock.mode != Mode.NL or lock.waiting, (name, key)
