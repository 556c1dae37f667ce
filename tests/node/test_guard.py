"""The guard's decisions about mounts, as a table of small histories."""

import random

from cluster.timing import PROFILES, timing_of
from node import guard as g
from node import guard_io

TIMING = timing_of("fast")
MS = 1_000_000
ABORT = TIMING.purge_ms * MS * g.ABORT_PERCENT // 100


def opened(core, end=1000 * MS):
    core.step(0, g.Attached(7))
    return core.step(0, g.LeaseMoved(7, end))


def test_gate_opens_with_the_first_lease():
    core = g.MountGuard(TIMING)
    assert core.step(0, g.Attached(7)) == [g.StoreLease(7, 0)]
    actions = core.step(0, g.LeaseMoved(7, 1000))
    assert actions == [g.StoreLease(7, 1000), g.StoreWord(7, g.WORD_OPEN), g.Renewed(7)]


def test_lapse_counts_out_then_sweeps_then_renews():
    core = g.MountGuard(TIMING)
    opened(core)
    end = 1000 * MS
    assert core.step(end - 1, g.Tick({})) == []
    assert core.step(end, g.Tick({})) == [g.StoreWord(7, g.WORD_LAPSED), g.Lapsed(7)]
    assert core.step(end + MS, g.Tick({7: 2})) == []
    assert core.step(end + 2 * MS, g.Tick({7: 0})) == [g.Sweep(7)]
    renewed = core.step(end + 3 * MS, g.LeaseMoved(7, end + 500 * MS))
    assert renewed == [g.StoreLease(7, end + 500 * MS)]
    opens = core.step(end + 4 * MS, g.Swept(7, gone=False))
    assert opens == [g.StoreWord(7, g.WORD_OPEN), g.Renewed(7)]


def test_the_word_tells_when_nothing_is_left_to_purge():
    core = g.MountGuard(TIMING)
    opened(core)
    core.step(1000 * MS, g.Tick({}))
    core.step(1000 * MS, g.Tick({7: 0}))
    assert core.step(1001 * MS, g.Swept(7, gone=False)) == [g.StoreWord(7, g.WORD_CLOSED)]
    renewed = core.step(1002 * MS, g.LeaseMoved(7, 2000 * MS))
    assert renewed[1:] == [g.StoreWord(7, g.WORD_OPEN), g.Renewed(7)]


def test_reply_in_flight_beyond_the_budget_is_aborted():
    core = g.MountGuard(TIMING)
    opened(core)
    end = 1000 * MS
    core.step(end, g.Tick({}))
    assert core.step(end + ABORT - 1, g.Tick({7: 1})) == []
    actions = core.step(end + ABORT, g.Tick({7: 1}))
    assert actions[0] == g.StoreWord(7, g.WORD_BARRED)
    assert [type(a) for a in actions[1:]] == [g.Abort, g.Sweep]
    assert [type(a) for a in core.step(end + ABORT, g.Swept(7, gone=False))] == [g.Purged]


def test_sweep_that_hangs_is_aborted_and_done_again():
    """The sweep that began before the abort proves nothing: another one follows it."""
    core = g.MountGuard(TIMING)
    opened(core)
    end = 1000 * MS
    core.step(end, g.Tick({}))
    core.step(end, g.Tick({7: 0}))
    actions = core.step(end + ABORT, g.Tick({}))
    assert [type(a) for a in actions] == [g.StoreWord, g.Abort]
    assert core.step(end + ABORT, g.Swept(7, gone=False)) == [g.Sweep(7)]
    assert [type(a) for a in core.step(end + ABORT, g.Swept(7, gone=False))] == [g.Purged]


def test_barred_is_final():
    core = g.MountGuard(TIMING)
    opened(core)
    actions = core.step(0, g.Bar(7, "dead"))
    assert [type(a) for a in actions] == [g.StoreWord, g.Abort, g.Sweep]
    assert core.step(0, g.LeaseMoved(7, 5000 * MS)) == []
    assert core.step(0, g.Swept(7, gone=True)) == [g.Purged(7, "dead")]
    assert core.is_barred(7)
    assert core.step(0, g.Bar(7, "again")) == []
    assert core.settled()
    assert core.step(0, g.Detached(7)) == [g.Forget(7)]


def test_instance_without_a_mount_is_purged_at_once():
    """And it never attaches afterwards: PURGED was said."""
    core = g.MountGuard(TIMING)
    assert not core.is_barred(9)
    assert core.step(0, g.Bar(9, "mkfs died")) == [g.Purged(9, "mkfs died")]
    assert core.is_barred(9)


def test_a_sweep_that_fails_leaves_nothing_clean():
    core = g.MountGuard(TIMING)
    opened(core)
    end = 1000 * MS
    core.step(end, g.Tick({}))
    core.step(end, g.Tick({7: 0}))
    actions = core.step(end, g.Swept(7, gone=True))
    assert [type(a) for a in actions] == [g.StoreWord, g.Abort, g.Sweep]


def test_a_mount_that_leaves_is_swept_before_it_is_forgotten():
    core = g.MountGuard(TIMING)
    opened(core)
    actions = core.step(0, g.Left(7))
    assert actions == [g.StoreWord(7, g.WORD_BARRED), g.Abort(7, ""), g.Sweep(7)]
    assert core.step(0, g.Detached(7)) == []
    assert core.step(0, g.Swept(7, gone=False)) == [g.Forget(7)]
    assert core.settled()


def test_a_mount_that_dies_while_it_leaves_is_reported():
    core = g.MountGuard(TIMING)
    opened(core)
    core.step(0, g.Left(7))
    assert core.step(0, g.Bar(7, "died")) == []
    assert core.step(0, g.Swept(7, gone=False)) == [g.Purged(7, "died")]


def test_random_histories_never_open_without_a_lease():
    """The word is OPEN only while the lease lasts (as of the last tick) and never after BARRED."""
    for seed in range(300):
        rng = random.Random(seed)
        core = g.MountGuard(TIMING)
        core.step(0, g.Attached(7))
        now, end, word, barred, sweeps = 0, 0, 0, False, 0
        for _ in range(200):
            now += rng.randrange(60 * MS)
            kind = rng.randrange(12)
            if kind == 0:
                event = g.Bar(7, "x")
            elif kind < 5:
                end = max(end, now + rng.randrange(-200, 700) * MS)
                event = g.LeaseMoved(7, end)
            elif kind < 7 and sweeps:
                sweeps -= 1
                event = g.Swept(7, gone=rng.random() < 0.2)
            else:
                event = g.Tick({7: rng.randrange(2)})
            for action in core.step(now, event):
                if isinstance(action, g.StoreWord):
                    assert not barred
                    word = action.word
                    barred = word == g.WORD_BARRED
                elif isinstance(action, g.Sweep):
                    assert word != g.WORD_OPEN
                    sweeps += 1
                elif isinstance(action, g.Purged):
                    assert sweeps == 0
            if isinstance(event, g.Tick) and now >= end:
                assert word != g.WORD_OPEN
            assert sweeps <= 1
            core.check()


def test_the_next_guard_waits_for_a_stuck_one():
    """Longer than that one stays, in every profile."""
    for timing in map(timing_of, PROFILES):
        assert guard_io.lock_wait_s(timing) * 1e9 > guard_io.stuck_exit_ns(timing)
