"""Rule R8: leases of instances, what a voter vouches for, and when a dead instance is silent.

- `VouchBook` (a voter): whom it echoes, and when it last did. It stops before the accept of a value
  that bars is answered, because `vouch` is called between the two.
- `LeaseBook` (a node): per instance and voter the send time of the newest heartbeat that came back;
  the lease ends T_lease after the oldest among the newest ones of a majority of each electorate.
- `SilenceBook` (whoever releases locks): a dead instance is silent at PURGED, or strictly later
  than the youngest last echo among the voters that accepted its bar + 1.01 T_lease + purge budget,
  and that long after any change of voters.
"""

from __future__ import annotations

from collections import deque

import msgspec

from cluster.control import MemberInfo, Timing
from cluster.guard_events import Vouch, Vouched
from cluster.ids import Instance, InstanceNo, VoterId
from cluster.messages import DecidedNotice, EchoAge, Heartbeat
from cluster.proposer import VoterAges
from cluster.state import ClusterState, admits, bars
from cluster.timing import MS, silence_wait_ns

FORGET_DEAD_TIMES = 8
PURGED_MAX = 4096
BARS_MAX = 64


class VouchBook:
    """A voter's side. Vouches for nobody before the first `vouch`."""

    def __init__(self, timing: Timing, start_ns: int) -> None:
        self._forget_ns = FORGET_DEAD_TIMES * timing.dead_ms * MS
        self._floor_ns = start_ns
        self._config_epoch = 0
        self._members: list[MemberInfo] | None = None
        self._last_ns: dict[Instance, int] = {}

    def vouch(self, now_ns: int, vouch: Vouch) -> Vouched:
        """A value was accepted (durably, not yet answered)."""
        self._config_epoch = vouch.config_epoch
        self._members = vouch.members
        self._forget(now_ns)
        ages = [
            EchoAge(instance, now_ns - last_ns)
            for instance, last_ns in sorted(self._last_ns.items())
            if not admits(vouch.members, instance)
        ]
        return Vouched(vouch.token, ages, now_ns - self._floor_ns)

    def echo(self, now_ns: int, heartbeat: Heartbeat) -> list[InstanceNo]:
        """The instances of a heartbeat that this voter vouches for, now."""
        if self._members is None or heartbeat.config_epoch < self._config_epoch:
            return []
        vouched = []
        for beat in heartbeat.instances:
            instance = Instance(heartbeat.node, heartbeat.incarnation, beat.number)
            if admits(self._members, instance):
                self._last_ns[instance] = now_ns
                vouched.append(beat.number)
        return vouched

    def _forget(self, now_ns: int) -> None:
        """Old echoes merge into the age that counts for all others; it only gets younger."""
        for instance, last_ns in list(self._last_ns.items()):
            if now_ns - last_ns > self._forget_ns:
                del self._last_ns[instance]
                self._floor_ns = max(self._floor_ns, last_ns)


class LeaseBook:
    """A node's side: from echoes to lease ends."""

    def __init__(self, timing: Timing) -> None:
        self._lease_ns = timing.lease_ms * MS
        self._config_epoch = -1
        self._electorates: list[list[VoterId]] = []
        self._newest_ns: dict[tuple[int, int], int] = {}
        self._end_ns: dict[int, int] = {}

    def configure(
        self, config_epoch: int, electorates: list[list[VoterId]], instances: list[InstanceNo]
    ) -> None:
        """Who has to vouch, for whom. Echoes of another config_epoch count for nothing."""
        if config_epoch != self._config_epoch:
            self._newest_ns.clear()
        self._config_epoch = config_epoch
        self._electorates = electorates
        for voter, number in list(self._newest_ns):
            if number not in instances:
                del self._newest_ns[voter, number]
        for number in list(self._end_ns):
            if number not in instances:
                del self._end_ns[number]
        for number in instances:
            self._end_ns.setdefault(number, 0)

    def echoed(
        self, voter: int, config_epoch: int, sent_ns: int, vouched: list[InstanceNo]
    ) -> None:
        """A voter's echo of our heartbeat that was sent at `sent_ns`."""
        if config_epoch != self._config_epoch:
            return
        for number in vouched:
            if number in self._end_ns:
                key = (voter, number)
                self._newest_ns[key] = max(self._newest_ns.get(key, 0), sent_ns)

    def renewed(self) -> list[tuple[InstanceNo, int]]:
        """The leases that have grown: (instance, new end)."""
        grown = []
        for number in sorted(self._end_ns):
            end_ns = self._end(number)
            if end_ns > self._end_ns[number]:
                self._end_ns[number] = end_ns
                grown.append((InstanceNo(number), end_ns))
        return grown

    def end_ns(self, number: int) -> int:
        """End of the lease of a local instance, 0 if it never had one."""
        return self._end_ns.get(number, 0)

    def _end(self, number: int) -> int:
        ends = [self._majority_ns(voters, number) for voters in self._electorates]
        oldest_ns = min(ends, default=0)
        return oldest_ns + self._lease_ns if oldest_ns else 0

    def _majority_ns(self, voters: list[VoterId], number: int) -> int:
        times = sorted((self._newest_ns.get((voter, number), 0) for voter in voters), reverse=True)
        return times[len(voters) // 2] if times else 0


class Bar(msgspec.Struct, frozen=True):
    """A decided value and upper bounds, on our clock, of the last echoes of whom it bars."""

    state: ClusterState
    echo_ns: dict[Instance, int]
    rest_ns: int


def bar_of_answers(state: ClusterState, answers: list[VoterAges]) -> Bar:
    """From the answers of the majority that accepted the value."""
    instances = sorted({entry.instance for answer in answers for entry in answer.ages})
    rest = [answer.received_ns - answer.start_age_ns for answer in answers]
    echo_ns = {
        instance: max(_last_echo_ns(answer, instance) for answer in answers)
        for instance in instances
    }
    return Bar(state, echo_ns, max(rest))


def bar_of_notice(now_ns: int, notice: DecidedNotice) -> Bar:
    """From another member's notice."""
    echo_ns = {entry.instance: now_ns - entry.age_ns for entry in notice.ages}
    return Bar(notice.state, echo_ns, now_ns - notice.rest_age_ns)


def notice_of_bar(now_ns: int, bar: Bar) -> DecidedNotice:
    """The notice for the other members."""
    ages = [EchoAge(instance, now_ns - at) for instance, at in sorted(bar.echo_ns.items())]
    return DecidedNotice(bar.state, ages, now_ns - bar.rest_ns)


class SilenceBook:
    """Which dead instances can neither write nor show old cached bytes any more."""

    def __init__(self, timing: Timing) -> None:
        self._wait_ns = silence_wait_ns(timing)
        self._config: tuple[int, bool] | None = None
        self._config_ns = 0
        self._bars: deque[Bar] = deque(maxlen=BARS_MAX)
        self._purged: dict[Instance, None] = {}

    def decided(self, now_ns: int, state: ClusterState, bar: Bar | None) -> None:
        """A newer decided value. Without a bar counts from now. A new set of voters restarts every
        wait (also the first value seen in this life: we do not know when they changed)."""
        config = (state.config_epoch, bool(state.old_voters))
        if config != self._config:
            self._config = config
            self._config_ns = now_ns
        self._bars.append(bar if bar is not None else Bar(state, {}, now_ns))

    def purged(self, instance: Instance) -> bool:
        """PURGED was reported. True if that is news."""
        if instance in self._purged:
            return False
        if len(self._purged) >= PURGED_MAX:
            del self._purged[next(iter(self._purged))]
        self._purged[instance] = None
        return True

    def silent_ns(self, dead: Instance) -> int | None:
        """When `dead` is silent by time; 0 if it is purged; None while it is not barred.

        A value that has not seen its life yet says nothing about its echoes."""
        bounds = [bar.echo_ns.get(dead, bar.rest_ns) for bar in self._bars if bars(bar.state, dead)]
        if not bounds:
            return None
        if dead in self._purged:
            return 0
        return max(min(bounds), self._config_ns) + self._wait_ns + 1


def _last_echo_ns(answer: VoterAges, dead: Instance) -> int:
    for entry in answer.ages:
        if entry.instance == dead:
            return answer.received_ns - entry.age_ns
    return answer.received_ns - answer.start_age_ns
