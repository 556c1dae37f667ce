"""Rule R8: vouching, leases, silence."""

from __future__ import annotations

import msgspec
import pytest

from cluster.actions import MS
from cluster.control import MemberInfo
from cluster.errors import UsageError
from cluster.guard_events import Vouch
from cluster.ids import Instance
from cluster.lease import LeaseBook, SilenceBook, VouchBook, bar_of_answers, notice_of_bar
from cluster.messages import Beat, EchoAge, Heartbeat
from cluster.proposer import VoterAges
from cluster.state import NodeInfo, ViewChange, apply_change, initial_state
from cluster.timing import PROFILES, silence_wait_ns, timing_of
from cluster.voter import VoterEcho

TIMING = timing_of("fast")
SECOND = 1000 * MS
WAIT = silence_wait_ns(TIMING)


def heartbeat(node=2, incarnation=1, instances=(0, 1), config_epoch=1, sequence=1):
    return Heartbeat(
        node=node, incarnation=incarnation, sequence=sequence, epoch=1, version=1,
        config_epoch=config_epoch, instances=[Beat(n, 0) for n in instances], purged=[],
        reach=0, servers=0, late_ms=0,
    )  # fmt: skip


def member(node, incarnation=1, live=(0,), following=1):
    return MemberInfo(node, incarnation, list(live), following)


def state(members, config_epoch=1):
    first = initial_state("00" * 16, "x", "fast", NodeInfo(1, "n1", []))
    nodes = [NodeInfo(n, f"n{n}", []) for n in (1, 2, 3)]
    first = msgspec.structs.replace(first, nodes=nodes, config_epoch=config_epoch)
    return apply_change(first, ViewChange(members), "w")


# --- profiles


@pytest.mark.parametrize("profile", PROFILES)
def test_a_lease_and_its_purge_end_before_the_expulsion(profile):
    timing = timing_of(profile)
    assert timing.lease_ms + timing.purge_ms < timing.dead_ms


def test_an_unknown_profile_is_refused():
    with pytest.raises(UsageError):
        timing_of("furious")


# --- voter


def test_nobody_is_vouched_for_before_the_first_value():
    assert VouchBook(TIMING, 0).echo(5, heartbeat()) == []


def test_a_voter_vouches_for_whom_its_newest_value_admits():
    book = VouchBook(TIMING, 0)
    book.vouch(0, Vouch(1, 1, [member(2, live=[0], following=2)]))
    assert book.echo(5, heartbeat(instances=(0, 1, 2))) == [0, 2]
    assert book.echo(5, heartbeat(incarnation=2)) == []
    assert book.echo(5, heartbeat(node=3)) == []


def test_a_bar_stops_the_echo_and_tells_its_age():
    book = VouchBook(TIMING, 0)
    book.vouch(0, Vouch(1, 1, [member(2)]))
    assert book.echo(100, heartbeat()) == [0, 1]
    answer = book.vouch(250, Vouch(2, 1, [member(2, live=[0], following=2)]))
    assert answer.ages == [EchoAge(Instance(2, 1, 1), 150)]
    assert answer.start_age_ns == 250
    assert book.echo(300, heartbeat()) == [0]


def test_heartbeats_of_older_configurations_are_not_echoed():
    book = VouchBook(TIMING, 0)
    book.vouch(0, Vouch(1, 3, [member(2)]))
    assert book.echo(5, heartbeat(config_epoch=2)) == []
    assert book.echo(5, heartbeat(config_epoch=3)) == [0, 1]


def test_a_restarted_voter_counts_from_its_start():
    book = VouchBook(TIMING, 1000)
    answer = book.vouch(1500, Vouch(1, 1, []))
    assert (answer.ages, answer.start_age_ns) == ([], 500)


def test_forgotten_echoes_only_make_the_common_age_younger():
    book = VouchBook(TIMING, 0)
    book.vouch(0, Vouch(1, 1, [member(2)]))
    book.echo(100, heartbeat())
    late = 100 * SECOND
    answer = book.vouch(late, Vouch(2, 1, []))
    assert answer.ages == []
    assert answer.start_age_ns == late - 100


def test_a_server_with_a_vote_tells_whom_it_hears():
    voter = VoterEcho(129, TIMING, 0)
    assert voter.heartbeat(5, heartbeat(node=2)).hears == [(2, 1)]
    echo = voter.heartbeat(6, heartbeat(node=3, incarnation=4))
    assert echo.hears == [(2, 1), (3, 4)]
    assert (echo.voter, echo.vouched) == (True, [])
    assert voter.heartbeat(2 * SECOND, heartbeat(node=3, incarnation=4)).hears == [(3, 4)]


# --- lease


def lease_book(electorates=((1, 2, 3),), config_epoch=1):
    book = LeaseBook(TIMING)
    book.configure(config_epoch, [list(voters) for voters in electorates], [0, 1])
    return book


def test_a_lease_needs_a_majority_and_counts_from_the_older_send_time():
    book = lease_book()
    book.echoed(1, 1, 500, [0, 1])
    assert book.renewed() == []
    book.echoed(2, 1, 300, [1])
    assert book.renewed() == [(1, 300 + TIMING.lease_ms * MS)]
    book.echoed(3, 1, 400, [1])
    assert book.renewed() == [(1, 400 + TIMING.lease_ms * MS)]
    assert book.end_ns(0) == 0


def test_both_electorates_count_during_a_change_of_voters():
    book = lease_book(electorates=((1, 2), (1,)))
    book.echoed(1, 1, 500, [0])
    assert book.renewed() == []
    book.echoed(2, 1, 400, [0])
    assert book.renewed() == [(0, 400 + TIMING.lease_ms * MS)]


def test_echoes_of_another_configuration_count_for_nothing():
    book = lease_book()
    book.echoed(1, 2, 500, [0])
    book.echoed(2, 2, 500, [0])
    assert book.renewed() == []
    book.echoed(1, 1, 500, [0])
    book.configure(2, [[1, 2, 3]], [0, 1])
    book.echoed(2, 2, 500, [0])
    assert book.renewed() == []


def test_a_lease_never_goes_back_and_ends_with_its_instance():
    book = lease_book(electorates=((1,),))
    book.echoed(1, 1, 500, [1])
    end = book.renewed()
    book.echoed(1, 1, 400, [1])
    assert book.renewed() == []
    book.configure(2, [[1]], [0, 1])
    assert book.end_ns(1) == end[0][1]
    book.configure(2, [[1]], [0])
    assert book.end_ns(1) == 0


# --- silence

DEAD = Instance(2, 1, 1)


def test_silent_after_the_youngest_echo_of_the_majority():
    book = SilenceBook(TIMING)
    book.decided(0, state({1: 1, 2: 1}), None)
    assert book.silent_ns(DEAD) is None
    answers = [
        VoterAges(1, 10 * SECOND, [EchoAge(DEAD, 900 * MS)], 9 * SECOND),
        VoterAges(2, 10 * SECOND, [EchoAge(DEAD, 300 * MS)], 9 * SECOND),
    ]
    out = apply_change(state({1: 1, 2: 1}), ViewChange({1: 1}), "w")
    book.decided(10 * SECOND, out, bar_of_answers(out, answers))
    assert book.silent_ns(DEAD) == 9700 * MS + WAIT + 1


def test_a_voter_that_never_echoed_it_counts_with_its_start():
    out = apply_change(state({1: 1, 2: 1}), ViewChange({1: 1}), "w")
    answers = [
        VoterAges(1, 10 * SECOND, [EchoAge(DEAD, 900 * MS)], 9 * SECOND),
        VoterAges(3, 10 * SECOND, [], 200 * MS),
    ]
    bar = bar_of_answers(out, answers)
    assert bar.echo_ns == {DEAD: 9800 * MS}
    notice = notice_of_bar(10_100 * MS, bar)
    assert notice.ages == [EchoAge(DEAD, 300 * MS)]
    assert notice.rest_age_ns == 300 * MS


def test_without_answers_it_counts_from_now():
    book = SilenceBook(TIMING)
    book.decided(0, state({1: 1, 2: 1}), None)
    book.decided(5 * SECOND, apply_change(state({1: 1, 2: 1}), ViewChange({1: 1}), "w"), None)
    assert book.silent_ns(DEAD) == 5 * SECOND + WAIT + 1


def test_a_change_of_voters_starts_every_wait_anew():
    book = SilenceBook(TIMING)
    before = state({1: 1, 2: 1})
    book.decided(0, before, None)
    out = apply_change(before, ViewChange({1: 1}), "w")
    book.decided(5 * SECOND, out, None)
    other = msgspec.structs.replace(out, config_epoch=2, version=out.version + 1)
    book.decided(6 * SECOND, other, None)
    assert book.silent_ns(DEAD) == 6 * SECOND + WAIT + 1


def test_purged_is_silent_at_once_but_only_when_barred():
    book = SilenceBook(TIMING)
    book.decided(0, state({1: 1, 2: 1}), None)
    assert book.purged(DEAD)
    assert not book.purged(DEAD)
    assert book.silent_ns(DEAD) is None
    book.decided(5, apply_change(state({1: 1, 2: 1}), ViewChange({1: 1}), "w"), None)
    assert book.silent_ns(DEAD) == 0


def test_a_value_from_before_its_first_life_says_nothing():
    book = SilenceBook(TIMING)
    first = state({1: 1})
    book.decided(0, first, None)
    joined = apply_change(first, ViewChange({1: 1, 2: 1}), "w")
    book.decided(5 * SECOND, joined, None)
    book.decided(9 * SECOND, apply_change(joined, ViewChange({1: 1}), "x"), None)
    assert book.silent_ns(DEAD) == 9 * SECOND + WAIT + 1
