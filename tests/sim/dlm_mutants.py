"""Known bugs of lock managers, put into ours one at a time: each must be caught by the world.

A mutant is a function that patches the code through a `pytest.MonkeyPatch`-like `patch(object,
name, value)`; `hunt` runs seeds until an invariant fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dlm.directory import Directory
from dlm.master import MasterSide
from dlm.messages import NO_MODE
from dlm.modes import Flags
from dlm.owner import OwnerLock, OwnerSide
from dlm.recovery import Recovery
from dlm.resource import Resource
from tests.sim.dlm_world import run
from tests.sim.hunting import hunt

Patch = Callable[[Any, str, Any], None]


def highest_blocked_is_never_reset(patch: Patch) -> None:
    """A holder is told once in its life."""
    grant = Resource._grant

    def mutant(self, lock, lvb=None):
        told = lock.told
        grant(self, lock, lvb)
        lock.told = told

    patch(Resource, "_grant", mutant)
    patch(Resource, "check", lambda self: None)


def blockers_are_not_told_after_a_grant(patch: Patch) -> None:
    """Lost wakeup: the new holder never hears of those who waited before it."""

    def mutant(self):
        if self.converting or self.waiting:
            self._grant_queue(self.converting)
            self._grant_queue(self.waiting)

    patch(Resource, "_after", mutant)
    patch(Resource, "check", lambda self: None)


def dead_writers_go_at_the_view(patch: Patch) -> None:
    """The locks of a dead member go before it is silent."""
    patch(Resource, "owner_died", lambda self, owner: self.owner_gone(owner, write_modes=True))


def silence_frees_write_modes(patch: Patch) -> None:
    """Write locks go before the journal is replayed."""
    silent = MasterSide.owner_silent

    def mutant(self, owner, *, write_modes):
        silent(self, owner, write_modes=True)

    patch(MasterSide, "owner_silent", mutant)


def no_phantoms(patch: Patch) -> None:
    """A new master believes that it knows everything."""
    patch(Resource, "add_phantom", lambda self, dead, **how: None)


def slots_of_the_dead_are_open(patch: Patch) -> None:
    """A name that only the dead directory member knew is taken for a new one."""
    install = Directory.install

    def mutant(self, members, view, dead):
        install(self, members, view, ())

    patch(Directory, "install", mutant)


def value_of_a_dead_writer_stays_valid(patch: Patch) -> None:
    """The value block survives the death of a holder in EX."""

    def spare(real):
        def mutant(self, owner, **options):
            valid = self.lvb_valid
            result = real(self, owner, **options)
            self.lvb_valid = valid
            return result

        return mutant

    for name in ("owner_died", "owner_gone", "add_phantom"):
        patch(Resource, name, spare(getattr(Resource, name)))


def released_before_the_survivors_spoke(patch: Patch) -> None:
    """A released member's names are free at once, also those that a survivor is about to claim."""
    released = Recovery.released

    def mutant(self, subject):
        released(self, subject)
        if not self._space.dead:
            self._space.directory.forget_lost(self._space.members)

    patch(Recovery, "released", mutant)


def oldest_value_wins(patch: Patch) -> None:
    """Recovery takes any copy of the value block for the last one."""

    def mutant(self, resource, pushes):
        best = min(pushes, key=lambda push: push.lvb_seq)
        resource.lvb_seq = best.lvb_seq
        if best.lvb is not None:
            resource.lvb, resource.lvb_valid = best.lvb, True

    patch(Recovery, "_choose_lvb", mutant)
    push = OwnerSide._push

    def pushed(self, lock):
        made = push(self, lock)
        made.lvb = lock.lvb
        return made

    patch(OwnerSide, "_push", pushed)


def old_views_are_taken_for_new(patch: Patch) -> None:
    """Pushes of an interrupted recovery count in the next one."""
    push, pushed = Recovery.lock_push, Recovery.pushed
    patch(Recovery, "lock_push", lambda self, s, msg, _v: push(self, s, msg, self._space.view))
    patch(Recovery, "pushed", lambda self, s, _v: pushed(self, s, self._space.view))
    patch(Recovery, "sync", lambda self, s, _v: (self._synced.add(s), self._after_sync())[1])


def messages_of_the_dead_are_heard(patch: Patch) -> None:
    """What a failed member sent still changes state after the view without it."""
    from dlm.lockspace import Lockspace

    def mutant(self, source, batch):
        for message in batch.messages:
            self._handle(source, message, (batch.epoch, batch.seq))

    patch(Lockspace, "_take_in", mutant)


def duplicate_request_makes_a_second_lock(patch: Patch) -> None:
    """A request that is held and then withdrawn comes back to life."""
    patch(MasterSide, "unpark", lambda self, some: list(some))


def a_former_master_answers(patch: Patch) -> None:
    """Who is asked for a name it has given up takes it up again without the directory."""
    find = MasterSide._find_master

    def mutant(self, source, message):
        space = self._space
        if space.directory.owner(space.slot_of(message.name)) == space.me:
            find(self, source, message)
        else:
            self._request_here(self.create(message.name, 0), source, message)

    patch(MasterSide, "_find_master", mutant)


def new_masters_by_two_rules(patch: Patch) -> None:
    """Every owner takes itself for the new master of what it holds."""
    pushes = OwnerSide.pushes

    def mutant(self, view):
        for _target, lock in pushes(self, view):
            resource = self.resources.get(lock.name)
            if resource is not None:
                resource.target = self._space.me
                for one in resource.locks.values():
                    one.sent_to = self._space.me
            yield self._space.me, lock

    patch(OwnerSide, "pushes", mutant)


def new_directory_answers_at_once(patch: Patch) -> None:
    """A slot that moved is open before its names have been pushed."""
    install = Directory.install

    def mutant(self, members, view, dead):
        install(self, members, view, dead)
        self.unsettled.clear()

    patch(Directory, "install", mutant)


def granted_before_the_reply(patch: Patch) -> None:
    """The owner counts on a conversion as soon as it has asked for it."""
    begin = OwnerSide._begin

    def mutant(self, lock, mode, flags):
        begin(self, lock, mode, flags)
        if lock.mode != NO_MODE and not flags & Flags.NOQUEUE:
            lock.mode = mode

    patch(OwnerSide, "_begin", mutant)


def pr_and_cw_are_ordered(patch: Patch) -> None:
    """CW to PR is taken for a conversion upwards: both sides keep what they had."""
    patch(OwnerLock, "sure", property(lambda self: self.mode))


def lazy_unlock_is_dropped_in_recovery(patch: Patch) -> None:
    """What was sent to a master that is being replaced is not sent again."""
    settle = OwnerSide._settle

    def mutant(self, resource, master):
        resource.backlog.clear()
        settle(self, resource, master)

    patch(OwnerSide, "_settle", mutant)


def probes_to_the_dead_are_not_repeated(patch: Patch) -> None:
    """A question to a dead directory member waits for ever."""
    patch(OwnerSide, "_ask_elsewhere", lambda self, resource, members: None)


def leaver_keeps_the_values(patch: Patch) -> None:
    """A clean leave says nothing about value blocks, and the heir trusts any copy."""

    def note(self, source, message):
        lock = self.locks.get(message.lock)
        if lock is not None:
            lock.exact = lock.lvb_valid = True

    patch(OwnerSide, "note", note)


MUTANTS: tuple[Callable[[Patch], None], ...] = (
    highest_blocked_is_never_reset,
    blockers_are_not_told_after_a_grant,
    dead_writers_go_at_the_view,
    silence_frees_write_modes,
    no_phantoms,
    slots_of_the_dead_are_open,
    value_of_a_dead_writer_stays_valid,
    released_before_the_survivors_spoke,
    oldest_value_wins,
    old_views_are_taken_for_new,
    messages_of_the_dead_are_heard,
    duplicate_request_makes_a_second_lock,
    a_former_master_answers,
    new_masters_by_two_rules,
    new_directory_answers_at_once,
    granted_before_the_reply,
    pr_and_cw_are_ordered,
    lazy_unlock_is_dropped_in_recovery,
    probes_to_the_dead_are_not_repeated,
    leaver_keeps_the_values,
)


WORLDS: dict[Callable[[Patch], None], dict[str, int]] = {
    released_before_the_survivors_spoke: {"members": 4, "names": 2},
}
"""Where a bug shows itself sooner than in the ordinary world."""


def finding(mutant: Callable[[Patch], None], seeds: Iterable[int]) -> tuple[int, Exception] | None:
    """The first seed on which something is wrong with this bug in place, and what."""
    return hunt(lambda seed: run(seed, **WORLDS.get(mutant, {})), seeds, Exception)
