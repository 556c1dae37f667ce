"""The lease gate: every combination of word and lease, and the race of enter and revoke."""

import mmap
import multiprocessing
import os
import threading
import time

import pytest

from native.gate import GATE_BYTES, Gate, Word, create_gate_memory

FAR_NS = 1 << 62


def boottime_ns():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@pytest.fixture
def descriptor():
    result = create_gate_memory()
    yield result
    os.close(result)


def test_only_an_open_word_within_the_lease_passes():
    gate = Gate(bytearray(GATE_BYTES))
    assert gate.word() is Word.CLOSED
    gate.set_lease_end(FAR_NS)
    assert not gate.enter()
    for word in (Word.OPEN, Word.LAPSED, Word.OPEN):
        gate.set_word(word)
        assert gate.enter() is (word is Word.OPEN) is gate.is_open()
    assert gate.in_flight() == 2
    gate.set_lease_end(boottime_ns())
    assert not gate.enter()
    gate.leave()
    gate.leave()
    assert gate.in_flight() == 0


def test_barred_is_final_and_changes_are_counted():
    gate = Gate(bytearray(GATE_BYTES))
    gate.set_lease_end(FAR_NS)
    for word in (Word.OPEN, Word.OPEN, Word.LAPSED, Word.BARRED, Word.OPEN):
        gate.set_word(word)
    assert gate.word() is Word.BARRED
    assert not gate.enter()
    assert gate.generation() == 3


def test_the_layout_is_the_documented_one(descriptor):
    gate = Gate.map(descriptor)
    with mmap.mmap(descriptor, mmap.PAGESIZE) as raw:
        gate.set_lease_end(FAR_NS)
        gate.set_word(Word.OPEN)
        assert gate.enter()
        before = boottime_ns()
        gate.stamp()
        fields = memoryview(raw)[:32].cast("B").tobytes()
    numbers = [int.from_bytes(fields[a:b], "little") for a, b in ((0, 8), (8, 12), (12, 16))]
    assert numbers == [FAR_NS, 1, 1]
    assert before <= int.from_bytes(fields[16:24], "little") == gate.progress() <= boottime_ns()
    assert int.from_bytes(fields[24:32], "little") == gate.generation() == 1


def test_a_buffer_must_be_large_aligned_and_writable():
    with pytest.raises(ValueError, match="aligned"):
        Gate(bytearray(GATE_BYTES - 1))
    with pytest.raises(ValueError, match="aligned"):
        Gate(memoryview(mmap.mmap(-1, 4096))[4:])
    with pytest.raises(BufferError):
        Gate(memoryview(bytes(GATE_BYTES)))


def act(gate, cell, stop):
    """Writes to `cell` only inside the gate."""
    rounds = 0
    while not stop():
        if gate.enter():
            cell[0] = (cell[0] + 1) % 251
            gate.leave()
            rounds += 1
    return rounds


def revoke(gate, cell, rounds):
    """After the word is stored and nobody is in flight, `cell` must not change."""
    for _ in range(rounds):
        gate.set_word(Word.LAPSED)
        while gate.in_flight():
            pass
        before = cell[0]
        for _ in range(200):
            assert cell[0] == before
        gate.set_word(Word.OPEN)


def test_nobody_acts_after_a_revoke_threads(descriptor):
    gate, cell, done = Gate.map(descriptor), bytearray(1), []
    gate.set_lease_end(FAR_NS)
    gate.set_word(Word.OPEN)
    actors = [threading.Thread(target=act, args=(gate, cell, lambda: done)) for _ in range(3)]
    for actor in actors:
        actor.start()
    try:
        revoke(gate, cell, 100)
    finally:
        done.append(True)
        for actor in actors:
            actor.join()
    assert gate.in_flight() == 0


def child(descriptor):
    gate = Gate.map(descriptor)
    cell = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE))[1024:]
    act(gate, cell, lambda: gate.word() is Word.BARRED)


def test_nobody_acts_after_a_revoke_processes(descriptor):
    gate = Gate.map(descriptor)
    cell = memoryview(mmap.mmap(descriptor, mmap.PAGESIZE))[1024:]
    gate.set_lease_end(FAR_NS)
    gate.set_word(Word.OPEN)
    process = multiprocessing.get_context("fork").Process(target=child, args=(descriptor,))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while cell[0] == 0 and time.monotonic() < deadline:
            os.sched_yield()
        assert cell[0]
        revoke(gate, cell, 300)
    finally:
        gate.set_word(Word.BARRED)
        process.join()
    assert process.exitcode == 0
    assert gate.in_flight() == 0
