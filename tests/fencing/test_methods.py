"""Levels, retries and deadlines of fence methods."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fencing.methods import (
    MS,
    Begin,
    Done,
    Ended,
    Fencer,
    Method,
    Outcome,
    Run,
    Stop,
    Tick,
    Verdict,
)

YES = Outcome(Verdict.PROVEN, "seen")
NO = Outcome(Verdict.FAILED, "refused")


def method(name, retries=0, timeout_ms=1000, delay_ms=0):
    return Method(name, retries, timeout_ms, delay_ms, retry_ms=100)


def test_the_first_level_that_is_proven_ends_it():
    fencer = Fencer([[method("a")], [method("b")]])
    assert fencer.step(0, Begin()) == [Run(1, "a")]
    assert fencer.step(5 * MS, Ended(1, NO)) == [Run(2, "b")]
    assert fencer.step(9 * MS, Ended(2, YES)) == [Done(Verdict.PROVEN, 2)]
    assert [(h.level, h.method, h.took_ms, h.verdict) for h in fencer.history] == [
        (1, "a", 5, Verdict.FAILED),
        (2, "b", 4, Verdict.PROVEN),
    ]
    fencer.check()


def test_all_methods_of_a_level_are_needed():
    """Half a level is not a fence, and what one level proved does not count for another."""
    fencer = Fencer([[method("a"), method("b")], [method("b"), method("c")]])
    assert fencer.step(0, Begin()) == [Run(1, "a")]
    assert fencer.step(0, Ended(1, YES)) == [Run(2, "b")]
    assert fencer.step(0, Ended(2, NO)) == [Run(3, "b")]
    assert fencer.step(0, Ended(3, YES)) == [Run(4, "c")]
    assert fencer.step(0, Ended(4, NO)) == [Done(Verdict.FAILED, 0)]


def test_retries_wait_and_delays_come_first():
    fencer = Fencer([[method("a", retries=1, delay_ms=50)]])
    assert fencer.step(0, Begin()) == []
    assert fencer.deadline() == 50 * MS
    assert fencer.step(50 * MS, Tick()) == [Run(1, "a")]
    assert fencer.step(60 * MS, Ended(1, NO)) == []
    assert fencer.step(159 * MS, Tick()) == []
    assert fencer.step(160 * MS, Tick()) == [Run(2, "a")]
    assert fencer.step(170 * MS, Ended(2, NO)) == [Done(Verdict.FAILED, 0)]


def test_late_is_not_proven():
    """An attempt that is stopped has failed, whatever it says afterwards."""
    fencer = Fencer([[method("a")], [method("b")]])
    fencer.step(0, Begin())
    assert fencer.step(1000 * MS, Tick()) == [Stop(1), Run(2, "b")]
    assert fencer.step(1001 * MS, Ended(1, YES)) == []
    assert fencer.step(2000 * MS, Tick()) == [Stop(2), Done(Verdict.UNKNOWN, 0)]
    assert fencer.step(2001 * MS, Ended(2, YES)) == []
    assert fencer.done == Done(Verdict.UNKNOWN, 0)


def test_success_without_a_proof_is_none():
    fencer = Fencer([[method("a")]])
    fencer.step(0, Begin())
    done = fencer.step(0, Ended(1, Outcome(Verdict.PROVEN, "")))
    assert done == [Done(Verdict.FAILED, 0)]
    assert "how it knows" in fencer.history[0].text


def test_rounds():
    fencer = Fencer([[method("a")]], rounds=2, pause_ms=300)
    fencer.step(0, Begin())
    assert fencer.step(0, Ended(1, NO)) == []
    assert fencer.deadline() == 300 * MS
    assert fencer.step(300 * MS, Tick()) == [Run(2, "a")]
    assert fencer.step(300 * MS, Ended(2, YES)) == [Done(Verdict.PROVEN, 1)]


names = st.sampled_from("abcd")
methods = st.builds(
    method, names, st.integers(0, 2), st.integers(1, 50), st.integers(0, 20)
)  # fmt: skip
levels = st.lists(st.lists(methods, min_size=1, max_size=3), min_size=1, max_size=3)
answers = st.lists(
    st.tuples(st.sampled_from(["proven", "failed", "empty", "late", "stale"]), st.integers(0, 60)),
    max_size=60,
)


class Expected:
    """The same, said naively: whose turn it is after each outcome."""

    def __init__(self, plan, rounds):
        self.plan, self.rounds = plan, rounds
        self.level = self.place = self.fails = 0
        self.verdict = None

    @property
    def turn(self):
        return self.plan[self.level][self.place]

    def proven(self):
        self.place, self.fails = self.place + 1, 0
        if self.place == len(self.plan[self.level]):
            self.verdict = True

    def failed(self):
        self.fails += 1
        if self.fails <= self.turn.retries:
            return
        self.level, self.place, self.fails = self.level + 1, 0, 0
        if self.level == len(self.plan):
            self.level, self.rounds = 0, self.rounds - 1
            self.verdict = None if self.rounds else False


@settings(max_examples=300, deadline=None)
@given(levels, st.integers(1, 3), answers)
def test_any_history(plan, rounds, script):
    """Whatever the methods say and when: it ends, in bounded attempts, and PROVEN only when every
    method of one level was proven in time in one pass through it."""
    fencer, expected = Fencer(plan, rounds, pause_ms=10), Expected(plan, rounds)
    now, replies, starts, running = 0, iter(script), 0, False
    queue = fencer.step(now, Begin())
    while True:
        for action in queue:
            match action:
                case Run(number, name):
                    starts += 1
                    assert (running, number, name) == (False, starts, expected.turn.name)
                    running = True
                case Stop(number):
                    assert (running, number) == (True, starts)
                    running = False
                    expected.failed()
                case Done():
                    assert fencer.deadline() is None
        fencer.check()
        if fencer.done is not None:
            break
        deadline = fencer.deadline()
        assert deadline is not None
        assert deadline >= now
        kind, after_ms = next(replies, ("failed", 0))
        if not running or kind == "late":
            now = deadline
            queue = fencer.step(now, Tick())
        elif kind == "stale":
            queue = fencer.step(now, Ended(starts - 1, YES))
            assert queue == []
        else:
            now = min(now + after_ms * MS, deadline - 1)
            outcome = {"proven": YES, "failed": NO, "empty": Outcome(Verdict.PROVEN, "")}[kind]
            (expected.proven if kind == "proven" else expected.failed)()
            running = False
            queue = fencer.step(now, Ended(starts, outcome))
    assert starts == len(fencer.history) <= fencer.attempts_max()
    assert (fencer.done.verdict is Verdict.PROVEN) == expected.verdict
    assert fencer.done.level == (expected.level + 1 if expected.verdict else 0)
