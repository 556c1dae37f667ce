"""Persistent reservations a second time, written from the clauses of SPC and from nothing else.

One rule, one method; the state is a set of tuples. It shares no code with the machine that it
judges. Clause numbers are those of SPC-4 revision 17.
"""

from __future__ import annotations

from typing import Any, NamedTuple

REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE, MOVE = range(8)
PREEMPTED, RELEASED, REGISTRATION_PREEMPTED = 0x2A03, 0x2A04, 0x2A05
VALID_TYPES = {1, 3, 5, 6, 7, 8}
ONE_HOLDER = {1, 3, 5, 6}
TELLING = {5, 6, 7, 8}


class Command(NamedTuple):
    who: Any
    action: int
    key: int = 0
    service_key: int = 0
    kind: int = 0
    scope: int = 0
    target: Any = None
    unregister: bool = False


class Answer(NamedTuple):
    status: str
    attentions: frozenset[tuple[Any, int]] = frozenset()
    lost: frozenset[Any] = frozenset()


BAD, NO = Answer("check"), Answer("conflict")


class Model:
    """`registered`: (nexus, key) pairs. `reserved`: None or (type, the nexus that reserved)."""

    def __init__(self) -> None:
        self.registered: set[tuple[Any, int]] = set()
        self.reserved: tuple[int, Any] | None = None
        self.generation = 0

    def keys(self) -> dict[Any, int]:
        return dict(self.registered)

    def kind(self) -> int:
        return self.reserved[0] if self.reserved else 0

    def holders(self) -> set[Any]:
        """5.7.10: the one that reserved, or every registered one."""
        if not self.reserved:
            return set()
        kind, who = self.reserved
        return {who} if kind in ONE_HOLDER else set(self.keys())

    def do(self, c: Command) -> Answer:
        if c.action in (REGISTER, IGNORE):
            return self.register(c)
        if (c.who, c.key) not in self.registered:
            return NO
        rule = {
            RESERVE: self.reserve, RELEASE: self.release, CLEAR: self.clear,
            PREEMPT: self.preempt, PREEMPT_AND_ABORT: self.preempt, MOVE: self.move,
        }[c.action]  # fmt: skip
        return rule(c)

    def good(self, code: int = 0, told: set[Any] = frozenset(), lost: set[Any] = frozenset()):
        return Answer("good", frozenset((n, code) for n in told), frozenset(lost))

    def forget(self, gone: set[Any]) -> None:
        self.registered = {pair for pair in self.registered if pair[0] not in gone}

    def register(self, c: Command) -> Answer:
        """5.7.7; a zero service action key unregisters (5.7.11.3)."""
        own = self.keys().get(c.who)
        if c.action == REGISTER and c.key != (own or 0):
            return NO
        if own is None and c.service_key == 0:
            return self.good()
        self.generation += 1
        if c.service_key:
            self.forget({c.who})
            self.registered.add((c.who, c.service_key))
            return self.good()
        was_holder, kind = c.who in self.holders(), self.kind()
        self.forget({c.who})
        if was_holder and (kind in ONE_HOLDER or not self.registered):
            self.reserved = None
            told = set(self.keys()) if kind in TELLING else set()
            return self.good(RELEASED, told, {c.who})
        return self.good(lost={c.who})

    def reserve(self, c: Command) -> Answer:
        """5.7.9."""
        if c.scope or c.kind not in VALID_TYPES:
            return BAD
        if self.reserved is None:
            self.reserved = (c.kind, c.who)
            return self.good()
        return self.good() if c.who in self.holders() and c.kind == self.kind() else NO

    def release(self, c: Command) -> Answer:
        """5.7.11.2."""
        if c.who not in self.holders():
            return self.good()
        if c.scope or c.kind != self.kind():
            return BAD
        told = set(self.keys()) - {c.who} if c.kind in TELLING else set()
        self.reserved = None
        return self.good(RELEASED, told)

    def clear(self, c: Command) -> Answer:
        """5.7.11.6."""
        everyone = set(self.keys())
        self.registered, self.reserved = set(), None
        self.generation += 1
        return self.good(PREEMPTED, everyone - {c.who}, everyone)

    def move(self, c: Command) -> Answer:
        """5.7.8."""
        if self.kind() not in ONE_HOLDER or c.who not in self.holders():
            return NO
        if c.service_key == 0 or c.target in (None, c.who):
            return BAD
        kind = self.kind()
        self.generation += 1
        self.forget({c.target} | ({c.who} if c.unregister else set()))
        self.registered.add((c.target, c.service_key))
        self.reserved = (kind, c.target)
        return self.good(lost={c.who} if c.unregister else set())

    def preempt(self, c: Command) -> Answer:
        """5.7.11.4: the table of what the service action reservation key says."""
        owners = {n for n, key in self.registered if key == c.service_key}
        one_holder = self.kind() in ONE_HOLDER
        if c.service_key == 0:
            if not self.reserved or one_holder:
                return BAD
            return self.take(c, set(self.keys()) - {c.who})
        if not owners:
            return NO
        if one_holder and self.holders() <= owners:
            return self.take(c, owners - {c.who})
        self.generation += 1  # 5.7.11.4.4: registrations only
        self.forget(owners)
        if not one_holder and not self.registered:
            self.reserved = None
        return self.good(REGISTRATION_PREEMPTED, owners - {c.who}, owners)

    def take(self, c: Command, victims: set[Any]) -> Answer:
        """5.7.11.4.3: the reservation itself."""
        if c.scope or c.kind not in VALID_TYPES:
            return BAD
        changed = c.kind != self.kind()
        self.generation += 1
        self.forget(victims)
        self.reserved = (c.kind, c.who)
        told = {(n, REGISTRATION_PREEMPTED) for n in victims}
        if changed:
            told |= {(n, RELEASED) for n in self.keys() if n != c.who}
        return Answer("good", frozenset(told), frozenset(victims))
