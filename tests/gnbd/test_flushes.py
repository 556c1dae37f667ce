"""Flushes of one export share their fate."""

import threading

import pytest

from gnbd.server.flushes_io import Flushes

WAIT_S = 60.0


class Store:
    """A flush that waits for `go`; the error of a failure is told once, as the kernel does."""

    def __init__(self, errors):
        self.errors = errors
        self.calls = 0
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def flush(self):
        self.calls += 1
        self.entered.release()
        assert self.go.acquire(timeout=WAIT_S)
        if self.errors:
            self.errors -= 1
            raise OSError(5, "I/O error")


class Client(threading.Thread):
    def __init__(self, flushes, store, cut):
        super().__init__(daemon=True)
        self.parts = (flushes, store, cut)
        self.result = None
        self.start()

    def run(self):
        flushes, store, cut = self.parts
        try:
            flushes.run(store.flush, cut.set, cut.is_set)
            self.result = "done"
        except OSError:
            self.result = "failed"


def waiting(flushes, count):
    """All `count` clients beside the running one have come."""
    end = threading.Event()
    for _ in range(1000):
        with flushes._changed:
            if len(flushes._changed._waiters) == count:
                return
        end.wait(0.01)
    raise AssertionError("the clients do not come")


def test_who_comes_during_a_failed_flush_has_no_success():
    flushes, store, cut = Flushes(), Store(errors=1), threading.Event()
    first = Client(flushes, store, cut)
    assert store.entered.acquire(timeout=WAIT_S)
    later = [Client(flushes, store, cut) for _ in range(3)]
    waiting(flushes, 3)
    store.go.release()
    for client in (first, *later):
        client.join(WAIT_S)
        assert client.result == "failed"
    assert store.calls == 1


def test_flushes_that_come_together_share_one():
    flushes, store, cut = Flushes(), Store(errors=0), threading.Event()
    first = Client(flushes, store, cut)
    assert store.entered.acquire(timeout=WAIT_S)
    later = [Client(flushes, store, cut) for _ in range(3)]
    waiting(flushes, 3)
    store.go.release()
    first.join(WAIT_S)
    assert store.entered.acquire(timeout=WAIT_S)
    assert [client.result for client in later] == [None] * 3
    store.go.release()
    for client in later:
        client.join(WAIT_S)
        assert client.result == "done"
    assert store.calls == 2


def test_a_durable_write_that_failed_spoils_the_running_flush():
    flushes, store, cut = Flushes(), Store(errors=0), threading.Event()
    first = Client(flushes, store, cut)
    assert store.entered.acquire(timeout=WAIT_S)
    told = threading.Event()
    writer = threading.Thread(target=flushes.write_failed, args=(store.flush, told.set))
    writer.start()
    waiting(flushes, 1)
    assert not told.is_set()
    store.go.release()
    first.join(WAIT_S)
    assert first.result == "failed"
    assert store.entered.acquire(timeout=WAIT_S)
    store.go.release()
    writer.join(WAIT_S)
    assert told.is_set()
    flushes_after = threading.Event()
    store.go.release()
    flushes.run(store.flush, flushes_after.set, flushes_after.is_set)
    cut.set()
    with pytest.raises(OSError, match="shutdown"):
        flushes.run(store.flush, cut.set, cut.is_set)
