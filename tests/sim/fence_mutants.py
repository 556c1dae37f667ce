"""Bugs that bars and reservations invite, put into ours one at a time.

Each must be caught by the world (`tests/sim/fence_world.py`); `Patch` as in `dlm_mutants`. Those
that patch `Server` break an order that `gnbd/server/service_io.py` keeps in the same way.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

import fencing.admission as a
from cluster.ids import Incarnation
from fencing import reservations
from fencing.reservations import WRITE, Reservations, ReservationType
from tests.sim.dlm_mutants import Patch
from tests.sim.fence_server import Server


def fence_answered_before_the_drain(patch: Patch) -> None:
    """An install is answered when the access words are stored, whatever is in flight."""
    patch(Server, "drain", lambda self, then: then())


def preempt_answered_before_the_drain(patch: Patch) -> None:
    """PREEMPT AND ABORT does what PREEMPT does."""
    real = Reservations._preempt
    patch(Reservations, "_preempt", lambda self, request, _abort: real(self, request, False))


def drain_of_one_path(patch: Patch) -> None:
    """Requests of the other connections of a nexus are not waited for."""
    real = Server.revoked
    patch(Server, "revoked", lambda self: [w for w in real(self) if w.path == 0])


def check_at_receipt(patch: Patch) -> None:
    """The access of a request is looked at when it comes in, not when it executes."""
    patch(Server, "access", lambda self, write: write.word)


def words_stored_after_the_drain(patch: Patch) -> None:
    """The drain begins before the access words are stored: what begins meanwhile is missed."""
    real = Server.perform

    def mutant(self, view, event):
        if not isinstance(event, a.Persisted):
            return real(self, view, event)
        for action in self.admission.step(self.world.now, event):
            assert isinstance(action, a.Revoke)
            before, self.words = self.words, {}
            writes = self.revoked()
            self.words = before
            done = self.drained(view, action.epoch)
            if writes:
                self.waiting.append((writes, done))
            else:
                self.later(40, done)
        return None

    patch(Server, "perform", mutant)


def ban_forgotten_at_restart(patch: Patch) -> None:
    """A server starts without the views that it had installed."""
    real = Server.load
    patch(Server, "load", lambda self: msgspec.structs.replace(real(self), record=None))


def ban_not_durable_before_the_answer(patch: Patch) -> None:
    """The answer does not wait for the disk."""
    real = Server.save

    def mutant(self, record, table, then):
        then()
        self.later(150, lambda: real(self, record, table, lambda: None))

    patch(Server, "save", mutant)


def a_start_believes_the_cache(patch: Patch) -> None:
    """What a killed life had not made durable is taken for durable by the next one."""
    patch(Server, "settle", lambda self: None)


def ban_by_node(patch: Patch) -> None:
    """A node that was put out is out for ever, not only its life."""
    real = a.Admission._requested

    def mutant(self, now_ns, event):
        action = real(self, now_ns, event)
        if isinstance(action, a.Persist):
            stones = {node: Incarnation(1 << 40) for node in action.record.tombstones}
            record = msgspec.structs.replace(action.record, tombstones=stones)
            return a.Persist(record)
        return action

    patch(a.Admission, "_requested", mutant)


def ban_of_the_node_only(patch: Patch) -> None:
    """An instance that died goes on as long as its node is a member."""
    patch(a, "admits", lambda member, incarnation, _number: member.incarnation == incarnation)


def ban_of_the_newest_life_only(patch: Patch) -> None:
    """A node's earlier lives are let in with its newest."""

    def mutant(member, incarnation, number):
        same = member.incarnation == incarnation
        return incarnation < member.incarnation or (
            same and (number >= member.next or number in member.live)
        )

    patch(a, "admits", mutant)


def an_older_view_is_installed(patch: Patch) -> None:
    """A slow coordinator's view replaces a newer one."""

    def mutant(self, now_ns, event):
        self.heard_ns = max(self.heard_ns, now_ns)
        return a.Persist(
            a.InstallRecord(event.epoch, event.members, {}, dict(event.tombstones), event.dead_ms)
        )

    def persisted(self, now_ns, event):
        if isinstance(event, a.Persisted):
            self.record = event.record
            return [a.Revoke(event.record.epoch)]
        return real(self, now_ns, event)

    real = a.Admission.step
    patch(a.Admission, "_requested", mutant)
    patch(a.Admission, "step", persisted)


def serves_after_a_restart(patch: Patch) -> None:
    """What was installed in an earlier life is enough to serve."""
    real = a.Admission.__init__

    def mutant(self, record, now_ns):
        real(self, record, now_ns)
        self.serving = record is not None

    patch(a.Admission, "__init__", mutant)


def serves_on_in_silence(patch: Patch) -> None:
    """A server that hears no member goes on for ever."""
    patch(a.Admission, "deadline", lambda self: None)


def the_barred_keep_a_server_going(patch: Patch) -> None:
    """Writes of anybody count as a sign of life."""
    real = Server.receive

    def mutant(self, write):
        self.admission.heard_ns = self.world.now
        real(self, write)

    patch(Server, "receive", mutant)


def a_barred_instance_may_register(patch: Patch) -> None:
    """The bar is asked at LOGIN of data only."""
    patch(Server, "may_register", lambda self, _nexus: self.admission.serving)


def registrations_of_the_barred_stay(patch: Patch) -> None:
    """An install leaves the table as it is."""
    patch(Reservations, "drop", lambda self, gone: [])


def the_last_barred_holder_ends_the_reservation(patch: Patch) -> None:
    """Dropping registrants of an all-registrants reservation releases it."""
    real = Reservations.drop

    def mutant(self, gone):
        attentions = real(self, gone)
        if gone:
            self._end_reservation()
        return attentions

    patch(Reservations, "drop", mutant)


def a_preempted_key_stays(patch: Patch) -> None:
    """PREEMPT of an all-registrants reservation removes nobody."""
    real = Reservations._preempt

    def mutant(self, request, abort):
        before = dict(self.keys)
        outcome = real(self, request, abort)
        self.keys = before
        return outcome

    patch(Reservations, "_preempt", mutant)


def strangers_write(patch: Patch) -> None:
    """Write exclusive, all registrants, lets everybody write."""
    kind = ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS
    table = {**reservations.ACCESS, kind: (WRITE | 1, WRITE | 1, WRITE | 1)}
    patch(reservations, "ACCESS", table)


def registrations_are_not_kept(patch: Patch) -> None:
    """A restart forgets reservation and registrations although they were asked to be kept."""
    patch(Reservations, "stored_state", lambda self: reservations.ReservationState())


MUTANTS: list[Callable[[Patch], None]] = [
    fence_answered_before_the_drain,
    preempt_answered_before_the_drain,
    drain_of_one_path,
    check_at_receipt,
    words_stored_after_the_drain,
    ban_forgotten_at_restart,
    ban_not_durable_before_the_answer,
    a_start_believes_the_cache,
    ban_by_node,
    ban_of_the_node_only,
    ban_of_the_newest_life_only,
    an_older_view_is_installed,
    serves_after_a_restart,
    serves_on_in_silence,
    the_barred_keep_a_server_going,
    a_barred_instance_may_register,
    registrations_of_the_barred_stay,
    the_last_barred_holder_ends_the_reservation,
    a_preempted_key_stays,
    strangers_write,
    registrations_are_not_kept,
]
