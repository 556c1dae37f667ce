"""One knob (the profile), everything else derived and checked.

T_lease + purge < T_dead (a node that is expelled has dropped its caches by itself before), with
1 % for the difference of clock rates.
"""

from __future__ import annotations

from cluster.control import Timing
from cluster.errors import UsageError

MS = 1_000_000
PROFILES = ("fast", "default", "patient")
RANK_MS = 100
CLOCK_RATE_PERCENT = 101


def timing_of(profile: str) -> Timing:
    """The timing of a profile: `fast`, `default` or `patient`. Raises UsageError."""
    rows = {
        "fast": Timing(
            heartbeat_ms=100, link_down_ms=300, lease_ms=700, dead_ms=1000,
            stable_ms=100, phase_ms=500, purge_ms=250,
        ),
        "default": Timing(
            heartbeat_ms=200, link_down_ms=600, lease_ms=2000, dead_ms=3000,
            stable_ms=200, phase_ms=1000, purge_ms=800,
        ),
        "patient": Timing(
            heartbeat_ms=500, link_down_ms=2000, lease_ms=7000, dead_ms=10_000,
            stable_ms=500, phase_ms=3000, purge_ms=2500,
        ),
    }  # fmt: skip
    timing = rows.get(profile)
    if timing is None:
        raise UsageError(f"unknown profile {profile}", hint=f"one of: {', '.join(PROFILES)}")
    assert timing.lease_ms * CLOCK_RATE_PERCENT // 100 + timing.purge_ms < timing.dead_ms
    assert 3 * timing.heartbeat_ms <= timing.link_down_ms
    return timing


def silence_wait_ns(timing: Timing) -> int:
    """Rule R8: how long after a voter's last echo a lease and its purge have surely ended."""
    return timing.lease_ms * MS * CLOCK_RATE_PERCENT // 100 + timing.purge_ms * MS + 1


def stall_ns(timing: Timing) -> int:
    """Rule R9: T_stall."""
    return 2 * timing.dead_ms * MS
