"""How long the lock cache keeps an unused lock that another member asks for."""

from __future__ import annotations

import pytest

from cluster.locks import Mode
from dlm.cache import IDLE_MAX_NS, IDLE_MIN_NS, Glock, LockCache
from dlm.dispatcher import Dispatcher
from tests.dlm.net import FrozenRuntime, Net

NL, EX = Mode.NL, Mode.EX
LONG_NS = 1_000_000_000


class Runtime(FrozenRuntime):
    """Timers are kept; `go_to` lets those that are due ring. Demotions run at once."""

    def __init__(self):
        super().__init__()
        self.timers = []

    def call_at(self, when_ns, callback):
        self.timers.append((when_ns, callback))

    def go_to(self, time_ns):
        self.time_ns = time_ns
        due = [callback for when_ns, callback in self.timers if when_ns <= time_ns]
        self.timers = [timer for timer in self.timers if timer[0] > time_ns]
        for callback in due:
            callback()
        while self.spawned:
            with pytest.raises(StopIteration):
                self.spawned.pop()().send(None)


@pytest.fixture
def runtime():
    found = Runtime()
    found.time_ns = LONG_NS
    return found


@pytest.fixture
def lock(runtime):
    dispatcher = Dispatcher(Net(1).at(1), lambda *a: None, lambda: 0, lambda e: None)
    return LockCache(dispatcher, runtime).get(b"r")


def use(lock: Glock) -> None:
    with pytest.raises(StopIteration):
        lock.hold(EX).send(None)
    lock.release(EX)


def goes_after(lock: Glock, runtime: Runtime, idle_ns: int) -> bool:
    """Another member asks at once; whether the lock goes when it has been unused for `idle_ns`, and
    not before."""
    since_ns = runtime.time_ns
    lock.blocking(EX, 1 << EX)
    runtime.go_to(since_ns + idle_ns - 1)
    if lock.mode != EX:
        return False
    runtime.go_to(since_ns + idle_ns)
    return lock.mode == NL


def test_a_lock_goes_soon_after_a_single_use(lock, runtime):
    use(lock)
    assert goes_after(lock, runtime, IDLE_MIN_NS)


def test_it_stays_longer_for_a_user_who_came_right_back(lock, runtime):
    use(lock)
    assert goes_after(lock, runtime, IDLE_MIN_NS)
    use(lock)
    assert goes_after(lock, runtime, IDLE_MAX_NS)


def test_a_wait_in_vain_makes_it_shorter_again(lock, runtime):
    use(lock)
    assert goes_after(lock, runtime, IDLE_MIN_NS)
    use(lock)
    assert goes_after(lock, runtime, IDLE_MAX_NS)
    runtime.go_to(runtime.time_ns + LONG_NS)
    use(lock)
    assert goes_after(lock, runtime, IDLE_MAX_NS // 2)


def test_a_lock_that_is_used_again_begins_its_time_anew(lock, runtime):
    use(lock)
    lock.blocking(EX, 1 << EX)
    runtime.go_to(runtime.time_ns + IDLE_MIN_NS // 2)
    use(lock)
    since_ns = runtime.time_ns
    runtime.go_to(since_ns + IDLE_MIN_NS - 1)
    assert lock.mode == EX
    runtime.go_to(since_ns + IDLE_MIN_NS)
    assert lock.mode == NL
