"""The proposing half of the register: CASPaxos without a leader.

One operation at a time, the others wait. An operation is a compare-and-swap (`Propose`: `value`
follows `expected`) or a read. Outcomes:

- `Decided`: `value` is the register's value, decided by majorities of the voters (of the old and
  the new ones during a change of voters);
- `Conflict`: the register has another version; `value` is decided. Our own value may have been
  decided before it: compare what you wanted with what is there;
- `NoQuorum`: no majority answered in time. What was proposed may still be decided later.

Rules: a round first gets promises from majorities of every electorate concerned (of the value that
it builds on, of the newest configuration known, of the value that it proposes), then has the same
majorities accept. What it finds accepted under the highest ballot it finishes before anything else.
A value that adds a voter is proposed only when that voter has made its store.
A read first asks without a ballot: if a majority has accepted the same ballot and nobody a higher
one, that is decided. Refused: again with a higher ballot after a pause that grows with the attempt
and with the rank of this node, so two proposers do not chase each other.
"""

from __future__ import annotations

from collections import deque

import msgspec

from cluster.actions import Action, Received, Send, Tick
from cluster.control import Timing
from cluster.ids import VoterId
from cluster.messages import (
    ZERO_BALLOT,
    Accept,
    Accepted,
    Ballot,
    Current,
    EchoAge,
    Initialise,
    Prepare,
    Promised,
    Query,
    Refused,
    Uninitialised,
)
from cluster.state import ClusterState, electorates, is_majority
from cluster.timing import MS

QUEUE_MAX = 128
PAUSE_MS = 15
RESEND_DIVISOR = 3


class Propose(msgspec.Struct, frozen=True):
    """Event: replace the value of version `expected` by `value`."""

    request: int
    expected: int
    value: ClusterState
    until_ns: int


class Read(msgspec.Struct, frozen=True):
    """Event: linearizable read. `fresh_ages`: go through an accept, for the ages of R8."""

    request: int
    until_ns: int
    fresh_ages: bool = False


class VoterAges(msgspec.Struct, frozen=True):
    """What one voter told when it accepted, and when we got that."""

    voter: int
    received_ns: int
    ages: list[EchoAge]
    start_age_ns: int


class Decided(msgspec.Struct, frozen=True):
    value: ClusterState
    ages: list[VoterAges]


class Conflict(msgspec.Struct, frozen=True):
    value: ClusterState
    ages: list[VoterAges]


class NoQuorum(msgspec.Struct, frozen=True):
    answered: list[int]


Outcome = Decided | Conflict | NoQuorum
ProposerEvent = Propose | Read | Received | Tick


class Done(msgspec.Struct, frozen=True):
    """The outcome of one operation (returned by `take_done`)."""

    request: int
    outcome: Outcome


class Proposer:
    """See the module. `known` is the newest value seen; it tells where the voters are."""

    def __init__(self, node: int, incarnation: int, timing: Timing, known: ClusterState) -> None:
        self.node = node
        self.incarnation = incarnation
        self.known = known
        self._phase_ns = timing.phase_ms * MS
        self._queue: deque[Propose | Read] = deque()
        self._operation: Propose | Read | None = None
        self._counter = 0
        self._serial = 0
        self._attempt = 0
        self._done: list[Done] = []
        self._resend_ns: int | None = None
        self._pause_ns: int | None = None
        self._clear()

    def _clear(self) -> None:
        self._phase = "idle"
        self._ballot = ZERO_BALLOT
        self._base: ClusterState | None = None
        self._base_ballot = ZERO_BALLOT
        self._value: ClusterState | None = None
        self._answered: dict[int, Promised | VoterAges | Current] = {}

    def take_done(self) -> list[Done]:
        """The outcomes since the last call."""
        done, self._done = self._done, []
        return done

    @property
    def idle(self) -> bool:
        return self._operation is None

    def deadline(self) -> int | None:
        """When `Tick` is wanted."""
        if self._operation is None:
            return None
        times = [self._operation.until_ns]
        if self._pause_ns is not None:
            times.append(self._pause_ns)
        elif self._resend_ns is not None:
            times.append(self._resend_ns)
        return min(times)

    def step(self, now_ns: int, event: ProposerEvent) -> list[Action]:
        """One event; call `take_done` afterwards."""
        match event:
            case Propose() | Read():
                if len(self._queue) >= QUEUE_MAX:
                    self._done.append(Done(event.request, NoQuorum([])))
                    return []
                self._queue.append(event)
                return self._next(now_ns)
            case Received(source, message):
                return self._received(now_ns, source, message)
            case _:
                return self._tick(now_ns)

    def check(self) -> None:
        """Assert the invariants."""
        assert (self._operation is None) == (self._phase == "idle")
        if self._phase == "accept":
            assert self._value is not None

    # --- operations

    def _next(self, now_ns: int) -> list[Action]:
        if self._operation is not None or not self._queue:
            return []
        self._operation = self._queue.popleft()
        self._attempt = 0
        self._pause_ns = None
        if isinstance(self._operation, Read) and not self._operation.fresh_ages:
            return self._query(now_ns)
        return self._prepare(now_ns)

    def _finish(self, now_ns: int, outcome: Outcome) -> list[Action]:
        assert self._operation is not None
        self._done.append(Done(self._operation.request, outcome))
        if not isinstance(outcome, NoQuorum):
            self.known = outcome.value
        self._operation = None
        self._pause_ns = self._resend_ns = None
        self._clear()
        return self._next(now_ns)

    def _tick(self, now_ns: int) -> list[Action]:
        if self._operation is None:
            return []
        if now_ns >= self._operation.until_ns:
            return self._finish(now_ns, NoQuorum(sorted(self._answered)))
        if self._pause_ns is not None:
            if now_ns < self._pause_ns:
                return []
            self._pause_ns = None
            return self._prepare(now_ns)
        if self._resend_ns is not None and now_ns >= self._resend_ns:
            return self._broadcast(now_ns)
        return []

    # --- rounds

    def _query(self, now_ns: int) -> list[Action]:
        self._clear()
        self._phase = "query"
        self._serial += 1
        return self._broadcast(now_ns)

    def _prepare(self, now_ns: int) -> list[Action]:
        self._clear()
        self._phase = "prepare"
        self._serial += 1
        self._counter += 1
        self._ballot = Ballot(self._counter, self.node, self.incarnation)
        return self._broadcast(now_ns)

    def _retry(self, now_ns: int) -> list[Action]:
        """After a refusal: leave others the time to finish."""
        self._attempt += 1
        rank = sum(1 for info in self.known.nodes if info.id < self.node)
        slots = min(self._attempt, 8) * (rank + 1) - 1
        self._clear()
        self._phase = "pause"
        self._pause_ns = now_ns + (slots * PAUSE_MS + 1) * MS
        return []

    def _electorates(self) -> list[list[VoterId]]:
        found = list(electorates(self.known))
        for value in (self._base, self._value, self._wanted()):
            if value is not None:
                found.extend(voters for voters in electorates(value) if voters not in found)
        return found

    def _wanted(self) -> ClusterState | None:
        if isinstance(self._operation, Propose):
            return self._operation.value
        return None

    def _has_quorum(self) -> bool:
        answered = sorted(self._answered)
        return all(is_majority(voters, answered) for voters in self._electorates())

    def _message(self) -> Query | Prepare | Accept:
        if self._phase == "query":
            return Query(self._serial)
        if self._phase == "prepare":
            return Prepare(self._serial, self._ballot, self.known.config_epoch)
        assert self._value is not None
        floor = max(self.known.config_epoch, self._value.config_epoch)
        return Accept(self._serial, self._ballot, floor, self._value)

    def _broadcast(self, now_ns: int) -> list[Action]:
        self._resend_ns = now_ns + self._phase_ns // RESEND_DIVISOR
        message = self._message()
        voters = sorted({voter for group in self._electorates() for voter in group})
        return [Send(voter, message) for voter in voters if voter not in self._answered]

    # --- answers

    def _received(self, now_ns: int, source: int, message: object) -> list[Action]:
        if self._operation is None:
            return []
        match message:
            case Uninitialised(request, boot):
                return self._uninitialised(source, request, boot)
            case Refused(request):
                if request != self._serial or self._phase not in ("prepare", "accept"):
                    return []
                self._learn(message.promised, message.value)
                return self._retry(now_ns)
            case Current(request):
                if request == self._serial and self._phase == "query":
                    return self._current(now_ns, source, message)
            case Promised(request, ballot):
                if request == self._serial and self._phase == "prepare" and ballot == self._ballot:
                    return self._promised(now_ns, source, message)
            case Accepted(request, ballot, ages, start_age_ns):
                if request == self._serial and self._phase == "accept" and ballot == self._ballot:
                    self._answered[source] = VoterAges(source, now_ns, ages, start_age_ns)
                    return self._accepted(now_ns)
            case _:
                pass
        return []

    def _learn(self, ballot: Ballot, value: ClusterState | None) -> None:
        self._counter = max(self._counter, ballot.counter)
        if value is not None and value.config_epoch > self.known.config_epoch:
            self.known = value

    def _uninitialised(self, source: int, request: int, boot: int) -> list[Action]:
        """A voter that is being added gets its store; any other one counts for nothing."""
        if request != self._serial or self._phase != "prepare":
            return []
        for value in (self._wanted(), self.known):
            if value is not None and value.old_voters and source not in value.old_voters:
                return [Send(source, Initialise(request, boot)), Send(source, self._message())]
        return []

    def _current(self, now_ns: int, source: int, message: Current) -> list[Action]:
        self._answered[source] = message
        self._learn(message.accepted, message.value)
        if message.accepted > self._base_ballot:
            self._base, self._base_ballot = message.value, message.accepted
        if not self._has_quorum():
            return []
        same = [
            voter
            for voter, answer in sorted(self._answered.items())
            if isinstance(answer, Current) and answer.accepted == self._base_ballot
        ]
        if self._base is not None and all(is_majority(v, same) for v in self._electorates()):
            return self._finish(now_ns, Decided(self._base, []))
        return self._prepare(now_ns)

    def _promised(self, now_ns: int, source: int, message: Promised) -> list[Action]:
        before = len({voter for group in self._electorates() for voter in group})
        self._answered[source] = message
        if message.accepted > self._base_ballot:
            self._base, self._base_ballot = message.value, message.accepted
        self._learn(message.accepted, message.value)
        if not self._has_quorum():
            more = len({voter for group in self._electorates() for voter in group}) > before
            return self._broadcast(now_ns) if more else []
        if self._base is None:
            return []
        value = self._choose(self._base)
        if any(voter not in self._answered for voter in self._new_voters(self._base, value)):
            return []
        self._value = value
        self._phase = "accept"
        self._answered = {}
        return self._broadcast(now_ns)

    def _new_voters(self, base: ClusterState, value: ClusterState) -> list[VoterId]:
        """Voters whom this very value adds: each must have its store before it is proposed."""
        if value.config_epoch == base.config_epoch:
            return []
        return [voter for voter in value.voters if voter not in base.voters]

    def _choose(self, base: ClusterState) -> ClusterState:
        """The value of this round: ours if it follows what is there, else what is there."""
        operation = self._operation
        if isinstance(operation, Propose) and base.version == operation.expected:
            return operation.value
        return base

    def _accepted(self, now_ns: int) -> list[Action]:
        if not self._has_quorum():
            return []
        value, operation = self._value, self._operation
        assert value is not None
        ages = [answer for answer in self._answered.values() if isinstance(answer, VoterAges)]
        if isinstance(operation, Propose) and value.writer != operation.value.writer:
            return self._finish(now_ns, Conflict(value, ages))
        return self._finish(now_ns, Decided(value, ages))
