"""Putting a node out by levels of methods: who is tried when, and when it is proven. Pure.

A *method* is one way to make sure that a life of a node changes nothing any more (`fencing/
settings.py` has the kinds). A *level* is a list of methods that must all succeed. Levels are tried
in order, each method up to `1 + retries` times; when the last level has failed, the whole list is
tried again, `rounds` times in all.

    Begin -> Run(attempt) -> Ended(attempt, outcome) -> ... -> Done(verdict, level)

Invariants, asserted by `check`:

- at most one attempt is under way, and it has a deadline;
- an attempt that is late is stopped and counts as `UNKNOWN`; what it says later is not heard;
- PROVEN is said only if every method of one level was proven in one pass through that level, each
  with a text that says how that is known;
- the number of attempts is bounded.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

MS = 1_000_000
TEXT_MAX = 1000


class Verdict(enum.StrEnum):
    """What is known after an attempt, or after all."""

    PROVEN = "proven"
    """The life that was to be put out changes nothing any more; the text says how we know."""
    FAILED = "failed"
    UNKNOWN = "unknown"
    """No answer in time. It may have worked; nobody may build on that."""


class Method(msgspec.Struct, frozen=True):
    """How one method is tried. `delay_ms` before the first attempt, `retry_ms` between two."""

    name: str
    retries: int = 1
    timeout_ms: int = 60_000
    delay_ms: int = 0
    retry_ms: int = 1000


class Outcome(msgspec.Struct, frozen=True):
    """What a method says of one attempt. `text`: the proof, or what went wrong."""

    verdict: Verdict
    text: str


class Attempt(msgspec.Struct, frozen=True):
    """History of one attempt. `level` and `number` count from 1; `began_ms` since `Begin`."""

    level: int
    method: str
    number: int
    began_ms: int
    took_ms: int
    verdict: Verdict
    text: str


class Begin(msgspec.Struct, frozen=True):
    """Start."""


class Ended(msgspec.Struct, frozen=True):
    """The attempt with this number has an outcome."""

    attempt: int
    outcome: Outcome


class Tick(msgspec.Struct, frozen=True):
    """The deadline may have passed."""


Event = Begin | Ended | Tick


class Run(msgspec.Struct, frozen=True):
    """Try this method now; give `Ended` with the same number."""

    attempt: int
    method: str


class Stop(msgspec.Struct, frozen=True):
    """Nobody waits for this attempt any more."""

    attempt: int


class Done(msgspec.Struct, frozen=True):
    """All is over. `level` is the one that was proven, 0 for none."""

    verdict: Verdict
    level: int


Action = Run | Stop | Done


class Fencer:
    """One node being put out."""

    def __init__(
        self, levels: Sequence[Sequence[Method]], rounds: int = 1, pause_ms: int = 5000
    ) -> None:
        assert levels
        assert all(levels)
        assert rounds >= 1
        self.levels = [list(level) for level in levels]
        self.history: list[Attempt] = []
        self.done: Done | None = None
        self._rounds = rounds
        self._pause_ms = pause_ms
        self._began_ns: int | None = None
        self._round = 1
        self._level = 0
        self._place = 0
        self._try = 0
        self._serial = 0
        self._running_since_ns: int | None = None
        self._next_ns: int | None = None
        self._pass: list[str] = []
        """Methods proven in the present pass through the present level."""

    @property
    def _method(self) -> Method:
        return self.levels[self._level][self._place]

    def deadline(self) -> int | None:
        """When `Tick` must come."""
        if self.done is not None or self._began_ns is None:
            return None
        if self._running_since_ns is not None:
            return self._running_since_ns + self._method.timeout_ms * MS
        return self._next_ns

    def step(self, now_ns: int, event: Event) -> list[Action]:
        if self.done is not None:
            return []
        match event:
            case Begin():
                assert self._began_ns is None
                self._began_ns = now_ns
                self._enter(now_ns)
                return self._due(now_ns)
            case Ended(attempt, outcome):
                if attempt != self._serial or self._running_since_ns is None:
                    return []  # it was stopped; what it says now proves nothing
                return [*self._ended(now_ns, outcome), *self._due(now_ns)]
            case Tick():
                return [*self._late(now_ns), *self._due(now_ns)]

    def _enter(self, now_ns: int) -> None:
        """The method whose turn it is has not been tried yet."""
        self._try = 0
        self._next_ns = now_ns + self._method.delay_ms * MS

    def _due(self, now_ns: int) -> list[Action]:
        if self.done is not None or self._next_ns is None or now_ns < self._next_ns:
            return []
        self._next_ns = None
        self._try += 1
        self._serial += 1
        self._running_since_ns = now_ns
        return [Run(self._serial, self._method.name)]

    def _late(self, now_ns: int) -> list[Action]:
        since_ns = self._running_since_ns
        if since_ns is None or now_ns < since_ns + self._method.timeout_ms * MS:
            return []
        number = self._serial
        text = f"no answer within {self._method.timeout_ms} ms"
        return [Stop(number), *self._ended(now_ns, Outcome(Verdict.UNKNOWN, text))]

    def _ended(self, now_ns: int, outcome: Outcome) -> list[Action]:
        assert self._running_since_ns is not None
        assert self._began_ns is not None
        if outcome.verdict is Verdict.PROVEN and not outcome.text:
            outcome = Outcome(Verdict.FAILED, "it says that it worked, but not how it knows")
        self.history.append(
            Attempt(
                level=self._level + 1, method=self._method.name, number=self._try,
                began_ms=(self._running_since_ns - self._began_ns) // MS,
                took_ms=(now_ns - self._running_since_ns) // MS,
                verdict=outcome.verdict, text=outcome.text[:TEXT_MAX],
            )
        )  # fmt: skip
        self._running_since_ns = None
        if outcome.verdict is Verdict.PROVEN:
            return self._proven(now_ns)
        if self._try <= self._method.retries:
            self._next_ns = now_ns + self._method.retry_ms * MS
            return []
        return self._next_level(now_ns)

    def _proven(self, now_ns: int) -> list[Action]:
        self._pass.append(self._method.name)
        if self._place + 1 < len(self.levels[self._level]):
            self._place += 1
            self._enter(now_ns)
            return []
        self.done = Done(Verdict.PROVEN, self._level + 1)
        return [self.done]

    def _next_level(self, now_ns: int) -> list[Action]:
        self._pass = []
        self._place = 0
        if self._level + 1 < len(self.levels):
            self._level += 1
            self._enter(now_ns)
            return []
        if self._round < self._rounds:
            self._round += 1
            self._level = 0
            self._enter(now_ns)
            assert self._next_ns is not None
            self._next_ns += self._pause_ms * MS
            return []
        last = self.history[-1].verdict
        self.done = Done(Verdict.UNKNOWN if last is Verdict.UNKNOWN else Verdict.FAILED, 0)
        return [self.done]

    def attempts_max(self) -> int:
        """No more attempts than this are ever made."""
        each = sum(method.retries + 1 for level in self.levels for method in level)
        return self._rounds * each

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self.history) <= self.attempts_max()
        if self._began_ns is not None and self.done is None:
            assert (self._running_since_ns is None) != (self._next_ns is None)
        for attempt in self.history:
            assert attempt.verdict is not Verdict.PROVEN or attempt.text
        if self.done is not None and self.done.verdict is Verdict.PROVEN:
            names = [method.name for method in self.levels[self.done.level - 1]]
            assert self._pass == names
