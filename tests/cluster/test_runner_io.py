"""The runner: nothing behind a Persist is performed before the record is durable."""

import threading

import pytest
import trio

from cluster import runner_io
from cluster.actions import Notify, Persist, Received, Tick
from cluster.paths_io import boottime_ns, read_store
from cluster.runner_io import QUEUE_BUSY, STORE_RETRY_S, Runner


class Script:
    """A core that answers event n with the n-th list, and a tick with its own."""

    def __init__(self, answers):
        self.answers = answers
        self.due = None
        self.ticks = 0

    def step(self, _now, event):
        if isinstance(event, Tick):
            self.ticks += 1
            self.due = None
            return [Notify("tick")]
        return self.answers[event]

    def deadline(self):
        return self.due


@pytest.mark.trio
async def test_order_across_steps_and_durability(tmp_path, nursery):
    store = tmp_path / "store"
    seen = []

    def perform(action):
        seen.append((action.event, read_store(store)))

    core = Script({
        "a": [Notify(1), Persist(b"one"), Notify(2)],
        "b": [Notify(3), Persist(b"two"), Notify(4)],
    })  # fmt: skip
    runner = Runner(core, perform, store)
    await nursery.start(runner.run)
    runner.step("a")
    runner.step("b")
    assert seen == [(1, None)]
    with trio.fail_after(60):
        while len(seen) < 4:  # noqa: ASYNC110
            await trio.sleep(0.001)
    assert seen == [(1, None), (2, b"one"), (3, b"one"), (4, b"two")]


@pytest.mark.trio
async def test_events_fed_by_perform_come_after_the_step(nursery):
    seen = []
    core = Script({"a": [Notify("x"), Notify("y")], "x": [Notify("z")], "y": [], "z": []})

    def perform(action):
        seen.append(action.event)
        if action.event in ("x", "y"):
            runner.step(action.event)

    runner = Runner(core, perform, None)
    runner.step("a")
    assert seen == ["x", "y", "z"]


@pytest.mark.trio
async def test_ticks_at_the_deadline(nursery):
    done = trio.Event()
    core = Script({})
    core.due = boottime_ns() + 20_000_000
    runner = Runner(core, lambda _action: done.set(), None)
    await nursery.start(runner.run)
    with trio.fail_after(60):
        await done.wait()
    assert core.ticks == 1


@pytest.mark.trio
async def test_a_store_that_cannot_be_written_is_silence(tmp_path, nursery, autojump_clock):
    """Nothing behind the record leaves, messages are dropped, other events wait."""
    place = tmp_path / "directory"
    place.write_bytes(b"in the way")
    seen, told = [], []
    message = Received(1, "ask", 1)

    class Asked(Script):
        def step(self, now, event):
            return [Notify("asked")] if event == message else super().step(now, event)

    core = Asked({"a": [Persist(b"one"), Notify(1)], "b": [Notify(2)]})
    runner = Runner(core, lambda action: seen.append(action.event), place / "store", told.append)
    await nursery.start(runner.run)
    runner.step("a")
    with trio.fail_after(60):
        while not told:  # noqa: ASYNC110
            await trio.sleep(0.001)
    runner.step(message)
    runner.step("b")
    await trio.sleep(5 * STORE_RETRY_S)
    assert seen == []
    assert len(told) == 1
    assert "store" in told[0] or "directory" in told[0]
    place.unlink()
    with trio.fail_after(60):
        while len(seen) < 2:  # noqa: ASYNC110
            await trio.sleep(0.001)
    runner.step(message)
    assert seen == [1, 2, "asked"]
    assert told[1:] == [""]
    assert read_store(place / "store") == b"one"


@pytest.mark.trio
async def test_a_store_that_hangs_lets_no_queue_grow(tmp_path, nursery, monkeypatch):
    """Messages are dropped when many wait; what was taken is done, in order, when it goes on."""
    goes_on = threading.Event()
    monkeypatch.setattr(runner_io, "write_store", lambda _path, _record: goes_on.wait(60))
    seen = []

    class Asked(Script):
        def step(self, now, event):
            if isinstance(event, Received):
                return [Notify(event.source)]
            return super().step(now, event)

    core = Asked({"a": [Persist(b"one"), Notify("durable")]})
    runner = Runner(core, lambda action: seen.append(action.event), tmp_path / "store")
    await nursery.start(runner.run)
    runner.step("a")
    for number in range(2 * QUEUE_BUSY):
        runner.step(Received(number, "ask", 1))
    assert seen == []
    goes_on.set()
    with trio.fail_after(60):
        while len(seen) < QUEUE_BUSY - 1:  # noqa: ASYNC110
            await trio.sleep(0.001)
    runner.step(Received(-1, "ask", 1))
    assert seen == ["durable", *range(QUEUE_BUSY - 2), -1]
