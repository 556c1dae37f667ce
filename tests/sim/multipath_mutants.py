"""Bugs that several paths, caches and repetitions invite, put into ours one at a time.

Each must be caught by the world (`tests/sim/multipath_world.py`); `Patch` as in `dlm_mutants`.
Those that patch `DataServer` break a rule that `service_io.py` or `flushes_io.py` of `gnbd/server`
keeps, those that patch `Device` one of `gnbd/client/device_io.py`.

Too rare for the world, so that `tests/gnbd/test_client_core.py` has them alone: a DRAIN that frees
what was lost in a later generation of its path, and a sequence number that waits for bytes which
are refused without it.
"""

from __future__ import annotations

from collections.abc import Callable

from fencing import admission as a
from gnbd import protocol as p
from gnbd.client.core import ClientCore
from gnbd.client.retained import Piece, Retained
from tests.sim.dlm_mutants import Patch
from tests.sim.multipath_client import Device
from tests.sim.multipath_server import DataServer


def a_retry_without_a_drain(patch: Patch) -> None:
    """What was on its way on a lost path is sent again at once: the first copy may come later,
    after newer writes and after a fence."""
    real = ClientCore.path_lost

    def mutant(self, path, now_ns):
        real(self, path, now_ns)
        self._unstrand(path, path.generation)

    patch(ClientCore, "path_lost", mutant)


def a_drain_that_was_lost_is_not_asked_again(patch: Patch) -> None:
    """DRAIN was on a path that was lost as well."""
    real = ClientCore.path_lost

    def mutant(self, path, now_ns):
        asked = [s for other in self.paths for s in other.stranded if s.asked]
        real(self, path, now_ns)
        for stranded in asked:
            stranded.asked = True

    patch(ClientCore, "path_lost", mutant)


def a_drain_confirmed_before_its_end(patch: Patch) -> None:
    """DRAIN is answered when the connections are shut, whatever still executes."""
    real = DataServer.drain_path

    def mutant(self, job, path_id, generation):
        waiting, self.wait_for = self.wait_for, lambda _jobs, then: then()
        real(self, job, path_id, generation)
        self.wait_for = waiting

    patch(DataServer, "drain_path", mutant)


def a_login_granted_before_the_drain(patch: Patch) -> None:
    """LOGIN does not wait for what older connections of its path execute."""
    real = DataServer.bind

    def mutant(self, end, hello):
        waiting, self.wait_for = self.wait_for, lambda _jobs, then: then()
        real(self, end, hello)
        self.wait_for = waiting

    patch(DataServer, "bind", mutant)


def a_login_leaves_older_connections(patch: Patch) -> None:
    """What waits on older connections of a path executes after the LOGIN of a newer one."""
    patch(DataServer, "expel", lambda self, victims, then: then())


def a_flush_shares_one_that_runs(patch: Patch) -> None:
    """A flush that comes while another one runs is answered with it: it has overtaken writes of
    other connections."""
    real = DataServer.flush

    def mutant(self, end, then):
        if self.flushing is not None:
            self.flushing.then.append(then)
        else:
            real(self, end, then)

    patch(DataServer, "flush", mutant)


def a_flush_answered_at_once(patch: Patch) -> None:
    """FLUSH is told before the disk has it."""
    patch(DataServer, "flush", lambda self, _end, then: then(True))


def a_flush_covers_what_came_meanwhile(patch: Patch) -> None:
    """What was written while a FLUSH was on its way is not kept any more after it."""
    real = ClientCore.completed

    def mutant(self, lane, cookie, number, now_ns):
        request = lane.in_flight[cookie]
        if request.kind == p.CMD_FLUSH:
            request.mark = self.retained.mark()
        real(self, lane, cookie, number, now_ns)

    patch(ClientCore, "completed", mutant)


def a_failed_flush_counts(patch: Patch) -> None:
    """The client forgets what it wrote although the FLUSH has failed."""
    real = ClientCore.completed

    def mutant(self, lane, cookie, number, now_ns):
        request = lane.in_flight[cookie]
        if request.kind == p.CMD_FLUSH:
            self.retained.drop(request.mark)
        real(self, lane, cookie, number, now_ns)

    patch(ClientCore, "completed", mutant)


def nothing_is_written_again(patch: Patch) -> None:
    """A new cache generation is noted, no more."""
    patch(ClientCore, "_begin_resync", lambda self: None)


def older_bytes_over_newer_ones(patch: Patch) -> None:
    """Everything that was retained is written again, in any order."""
    patch(Retained, "overlay", lambda self: [x for x in self._pieces if not x.durable])


def durable_bytes_are_written_again(patch: Patch) -> None:
    """FUA writes are retained like others: another instance may have written there since."""
    real = Retained.add
    patch(Retained, "add", lambda self, piece, **_durable: real(self, piece))


def durable_places_are_forgotten(patch: Patch) -> None:
    """What a FUA write has replaced is written again over it."""
    real = Retained.add

    def mutant(self, piece: Piece, *, durable: bool = False) -> None:
        if not durable:
            real(self, piece)

    patch(Retained, "add", mutant)


def writes_before_all_is_written_again(patch: Patch) -> None:
    """New requests are sent while retained bytes are: they may be overtaken by them."""

    def mutant(self):
        return self.installed >= self.required and self.barred is None

    patch(ClientCore, "is_open", mutant)


def an_earlier_round_is_forgotten(patch: Patch) -> None:
    """New requests do not wait for bytes of an earlier round that were lost with their path."""
    patch(ClientCore, "_has_old_round", lambda self: False)


def paths_of_the_old_cache_go_on(patch: Patch) -> None:
    """Who finds a new cache generation on one path trusts the others."""
    real = ClientCore.logged_in

    def mutant(self, *arguments):
        real(self, *arguments)
        return []

    patch(ClientCore, "logged_in", mutant)


def a_failed_flush_leaves_the_cache_generation(patch: Patch) -> None:
    """Clients log in anew after a failed flush, and see no difference."""
    real = DataServer.cut_off

    def mutant(self, own):
        real(self, own)
        self.cache_generation -= 1

    patch(DataServer, "cut_off", mutant)


def a_failed_flush_cuts_nobody(patch: Patch) -> None:
    """Only whose FLUSH failed hears of it: the next one of somebody else succeeds."""
    patch(DataServer, "cut_off", lambda self, _own: None)


def what_the_disk_refused_is_read(patch: Patch) -> None:
    """After a failed flush the pages stay in the cache until memory runs short, and the next flush
    succeeds: a fence is answered, and what survivors have read of the dead goes."""
    real = DataServer.drop_refused
    patch(DataServer, "drop_refused", lambda self: self.later(300, lambda: real(self)))


def a_restart_leaves_the_cache_generation(patch: Patch) -> None:
    """The generation is that of the disk, not of the process that caches it."""
    real = DataServer.boot

    def mutant(self):
        real(self)
        self.cache_generation = 1

    patch(DataServer, "boot", mutant)


def requests_before_the_epoch(patch: Patch) -> None:
    """The client does not wait for a server to install what it works with."""
    patch(ClientCore, "set_epoch", lambda self, _required: None)


def an_epoch_counts_before_its_drain(patch: Patch) -> None:
    """LOGIN tells the epoch that is recorded: what it barred may still execute."""
    real = DataServer.granted

    def mutant(self, end, hello):
        before = self.admission.drained_epoch
        self.admission.drained_epoch = self.admission.epoch
        real(self, end, hello)
        self.admission.drained_epoch = before

    patch(DataServer, "granted", mutant)


def a_fence_that_does_not_flush(patch: Patch) -> None:
    """An install is answered when nothing of the barred executes, and a power cut takes what
    survivors have read of it."""

    def mutant(self, view, epoch):
        return lambda: self.perform(view, a.Drained(epoch))

    patch(DataServer, "drained", mutant)


def a_comparison_beside_others(patch: Patch) -> None:
    """COMPARE AND WRITE is alone among its kind on a connection only: two may compare before either
    writes."""
    patch(DataServer, "may_enter", lambda self, _job: True)


def a_swap_that_is_not_durable(patch: Patch) -> None:
    """COMPARE AND WRITE is told from the cache."""
    real = DataServer.put

    def mutant(self, job, partly=False):
        if job.call.kind == p.CMD_COMPARE_AND_WRITE:
            job.call.flags = 0
        real(self, job, partly)

    patch(DataServer, "put", mutant)


def nothing_waits_for_a_sequence_number(patch: Patch) -> None:
    """Requests overtake the declaration of the map that they need."""
    real = ClientCore._place

    def mutant(self, lane, request, now_ns):
        real(self, lane, request, now_ns)
        self._barrier = None

    patch(ClientCore, "_place", mutant)


def a_new_path_does_not_declare(patch: Patch) -> None:
    """LOGIN tells no sequence number."""
    patch(Device, "declared_at_login", property(lambda self: 0))


def newer_bytes_beside_cancelled_ones(patch: Patch) -> None:
    """A write does not wait for one at its place whose caller was cancelled: that one is on another
    path, or will be sent again."""
    patch(ClientCore, "_must_wait", lambda self, _request: False)


def a_swap_is_sent_again(patch: Patch) -> None:
    """COMPARE AND WRITE without an answer is repeated, and finds what it has written itself."""
    real = ClientCore._unstrand

    def mutant(self, path, generation):
        back = [r for s in path.stranded if s.generation <= generation for r in s.requests]
        swaps = [r for r in back if r.kind == p.CMD_COMPARE_AND_WRITE]
        for stranded in path.stranded:
            stranded.requests = [r for r in stranded.requests if r not in swaps]
        real(self, path, generation)
        self.queue.extendleft(swaps)

    patch(ClientCore, "_unstrand", mutant)


def what_was_given_up_is_forgotten(patch: Patch) -> None:
    """The next LOGIN on any path lets new requests in, whatever the other one still carries."""
    real = ClientCore.fail

    def mutant(self, reason):
        real(self, reason)
        for path in self.paths:
            path.stranded = []

    patch(ClientCore, "fail", mutant)


def requests_after_giving_up(patch: Patch) -> None:
    """New ones are taken before the old ones are known to be drained."""
    real = ClientCore.fail

    def mutant(self, reason):
        real(self, reason)
        self.failed = None

    patch(ClientCore, "fail", mutant)


def what_was_told_is_given_up_too(patch: Patch) -> None:
    """Bytes that are being written again go with the requests."""
    real = ClientCore.fail

    def mutant(self, reason):
        real(self, reason)
        self.retained = Retained()

    patch(ClientCore, "fail", mutant)


def a_logout_that_does_not_wait(patch: Patch) -> None:
    """LOGOUT takes the registration away, and other connections of the nexus go on."""
    real = DataServer.log_out

    def mutant(self, job):
        expel, self.expel = self.expel, lambda _victims, then: then()
        real(self, job)
        self.expel = expel

    patch(DataServer, "log_out", mutant)


MUTANTS: list[Callable[[Patch], None]] = [
    a_retry_without_a_drain,
    a_drain_that_was_lost_is_not_asked_again,
    a_drain_confirmed_before_its_end,
    a_login_granted_before_the_drain,
    a_login_leaves_older_connections,
    a_flush_shares_one_that_runs,
    a_flush_answered_at_once,
    a_flush_covers_what_came_meanwhile,
    a_failed_flush_counts,
    nothing_is_written_again,
    older_bytes_over_newer_ones,
    durable_bytes_are_written_again,
    durable_places_are_forgotten,
    writes_before_all_is_written_again,
    an_earlier_round_is_forgotten,
    paths_of_the_old_cache_go_on,
    a_failed_flush_leaves_the_cache_generation,
    a_failed_flush_cuts_nobody,
    what_the_disk_refused_is_read,
    a_restart_leaves_the_cache_generation,
    requests_before_the_epoch,
    an_epoch_counts_before_its_drain,
    a_fence_that_does_not_flush,
    a_comparison_beside_others,
    a_swap_that_is_not_durable,
    nothing_waits_for_a_sequence_number,
    a_new_path_does_not_declare,
    newer_bytes_beside_cancelled_ones,
    a_swap_is_sent_again,
    what_was_given_up_is_forgotten,
    requests_after_giving_up,
    what_was_told_is_given_up_too,
    a_logout_that_does_not_wait,
]
