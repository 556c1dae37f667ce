"""Bugs that byte-range locks in a cluster invite, put into ours one at a time.

Each must be caught by the world (`tests/sim/range_world.py`); `Patch` as in `dlm_mutants`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dlm.modes import Result
from dlm.range_deadlock import DeadlockSearch
from dlm.range_file import UNLOCK, Role
from dlm.range_keeper import KeeperSide
from dlm.range_locks import RangeLocks
from dlm.ranges import RangeTable
from dlm.resource import Resource
from tests.sim.dlm_mutants import Patch
from tests.sim.hunting import hunt
from tests.sim.range_world import run


def a_new_keeper_believes_it_knows_all(patch: Patch) -> None:
    """It does not ask the members what they hold."""
    real = RangeLocks._open_if_complete

    def mutant(self, file):
        file.missing.clear()
        real(self, file)

    patch(RangeLocks, "_open_if_complete", mutant)


def locks_of_the_dead_go_at_the_view(patch: Patch) -> None:
    """A dead member's locks come free before it is silent."""
    real = KeeperSide.settle

    def keep_without(self, file, gone):
        for instance in gone:
            file.table.forget_waiters(instance)
            file.table.forget_owners(instance)
            file.guests.discard(instance)
            file.missing.discard(instance)
        file.doubt &= self.dead - self.silent
        self._open_if_complete(file)
        if file.role is Role.KEEPER:
            real(self.at_keeper, file)

    patch(RangeLocks, "_keep_without", keep_without)


def nobody_doubts_the_dead(patch: Patch) -> None:
    """What a member held that died before it was asked is taken for nothing."""
    real = RangeLocks._open_if_complete

    def mutant(self, file):
        file.doubt.clear()
        real(self, file)

    patch(RangeLocks, "_open_if_complete", mutant)


def answers_of_another_tenure_are_believed(patch: Patch) -> None:
    """A grant of a keeper that is no more counts."""
    real = RangeLocks._reply

    def mutant(self, source, message):
        file = self.files.get(message.name)
        if file is not None and file.role in (Role.GUEST, Role.NONE):
            kept, file.tenure = (file.role, file.tenure), message.tenure
            file.role = Role.GUEST
            real(self, source, message)
            file.role, file.tenure = kept

    patch(RangeLocks, "_reply", mutant)


def requests_are_decided_too_early(patch: Patch) -> None:
    """What arrives while the members are still being asked is decided at once."""
    real = KeeperSide.receive

    def mutant(self, source, message):
        file = self._service.files.get(message.name)
        early = file is not None and file.role is Role.ENLISTING
        if early:
            file.role = Role.KEEPER
        real(self, source, message)
        if early and file.role is Role.KEEPER:
            file.role = Role.ENLISTING

    patch(KeeperSide, "receive", mutant)


def an_unlock_overtakes_answers_under_way(patch: Patch) -> None:
    """It takes effect here at once, and a grant that the keeper made before it brings it back."""
    patch(RangeLocks, "_others_of", lambda self, operation: False)


def a_wanted_keeper_says_nothing(patch: Patch) -> None:
    """Who asks for EX waits for as long as the keeper has something."""

    def mutant(self, file):
        if file.role is Role.KEEPER and file.idle:
            self.resign(file)

    patch(RangeLocks, "on_wanted", mutant)


def a_keeper_is_told_of_the_first_asker_only(patch: Patch) -> None:
    """The lock manager keeps in mind that the holder was told, after the asker took its wish
    back."""
    patch(Resource, "_tell_anew", lambda self, withdrawn: None)


def a_grant_to_nobody_stays(patch: Patch) -> None:
    """The caller was killed, the keeper had granted: nobody gives it back."""
    patch(RangeLocks, "_granted_to_nobody", lambda self, file, owner, operation: None)


def an_interrupted_wait_ends_at_once(patch: Patch) -> None:
    """The keeper is told, but not heard: what it has granted meanwhile is nobody's."""

    def mutant(self, operation):
        file = operation.file
        if operation.kind == UNLOCK or operation.number not in file.operations:
            return
        if file.role is Role.GUEST and operation.sent and not operation.test:
            self._cancel_at_keeper(operation)
        if file.role is Role.KEEPER:
            file.table.withdraw(self.me, operation.number)
        del file.operations[operation.number]
        self.end(operation, Result.CANCELLED)

    patch(RangeLocks, "withdraw", mutant)


def what_was_under_way_is_not_asked_again(patch: Patch) -> None:
    """The new keeper never hears of an operation that the old one had."""
    real = RangeLocks._new_tenure

    def mutant(self, file, role, keeper, tenure):
        sent = [one for one in file.operations.values() if one.sent]
        real(self, file, role, keeper, tenure)
        for operation in sent:
            operation.sent = True

    patch(RangeLocks, "_new_tenure", mutant)


def the_dead_get_what_they_waited_for(patch: Patch) -> None:
    """The wishes of a dead member stay in the queue."""
    patch(RangeTable, "forget_waiters", lambda self, instance: None)


def a_circle_is_believed_the_first_time(patch: Patch) -> None:
    """The chase is not repeated, though its parts were seen one after another."""

    def mutant(self, _source, message):
        operation = self._service.waiting.get(message.path[0].number)
        if operation is not None:
            self._service.give_up(operation)

    patch(DeadlockSearch, "cycle", mutant)


def circles_over_members_are_not_seen(patch: Patch) -> None:
    """Only the keeper's own owners are looked at."""
    real = DeadlockSearch.chased

    def mutant(self, source, message):
        if source == self._service.me:
            real(self, source, message)

    patch(DeadlockSearch, "chased", mutant)


def a_keeper_is_always_sure(patch: Patch) -> None:
    """It says that a lock is taken which was given back, before it has heard of that."""
    patch(KeeperSide, "_ask_holders", lambda self, file, source, one: False)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    a_new_keeper_believes_it_knows_all,
    locks_of_the_dead_go_at_the_view,
    nobody_doubts_the_dead,
    answers_of_another_tenure_are_believed,
    requests_are_decided_too_early,
    an_unlock_overtakes_answers_under_way,
    a_wanted_keeper_says_nothing,
    a_keeper_is_told_of_the_first_asker_only,
    a_grant_to_nobody_stays,
    an_interrupted_wait_ends_at_once,
    what_was_under_way_is_not_asked_again,
    the_dead_get_what_they_waited_for,
    a_circle_is_believed_the_first_time,
    circles_over_members_are_not_seen,
    a_keeper_is_always_sure,
)

ONE_THREAD = {"threads": 1, "interrupts": 0.0, "faults": False}
WORLDS: dict[Callable[[Patch], None], dict[str, object]] = {
    nobody_doubts_the_dead: {"fault_rate": 0.03},
    requests_are_decided_too_early: {"fault_rate": 0.03},
    answers_of_another_tenure_are_believed: {
        "members": 5,
        "names": 3,
        "file_bytes": 3,
        "fault_rate": 0.03,
        "threads": 1,
        "interrupts": 0.0,
        "abandons": 0.8,
    },
    a_circle_is_believed_the_first_time: {
        **ONE_THREAD,
        "members": 4,
        "file_bytes": 3,
        "lag": 0.9,
        "step_ns": 60_000_000,
    },
    circles_over_members_are_not_seen: ONE_THREAD,
}
"""Where a bug shows itself sooner than in the ordinary world."""
FIRST_SEEDS: dict[Callable[[Patch], None], int] = {
    answers_of_another_tenure_are_believed: 383,
    a_circle_is_believed_the_first_time: 302,
}
"""Of bugs that few seeds meet: the first that does."""


def finding(mutant: Callable[[Patch], None], seeds: Iterable[int]) -> tuple[int, Exception] | None:
    """The first seed on which something is wrong with this bug in place, and what."""
    first = FIRST_SEEDS.get(mutant, 0)
    return hunt(
        lambda seed: run(seed, **WORLDS.get(mutant, {})),
        (first + seed for seed in seeds),
        Exception,
    )
