"""Seeded bugs: each takes one rule out of the cores (never a flag in product code), and the
simulation must notice. `MUTANTS` maps a name to a list of (object, attribute, replacement).

A mutant that survives means a redundant rule or a missing checker. Known survivors, and why they
are not in the table:
- a server that serves after a restart without an install: rule R3 in the client covers it (the
  server's own stop is the second line);
- `silent` before the servers have installed: the client waits for the install by itself (R3);
- a wish that compares node ids only, members that never read when a peer's heartbeat shows a newer
  value, a node that keeps its incarnation over a restart: each alone is covered by a second rule
  (a restarted node is not alive for a moment; notices and servers also tell; the first read of a
  life takes a new incarnation);
- detection without echoes, or without the allowance for our own lateness: only slower or more
  views, never wrong ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

import cluster.core
import cluster.groups
import cluster.lease
import cluster.proposer
import cluster.state
from cluster.actions import Persist
from cluster.guard_events import Vouched
from cluster.ids import Instance
from cluster.lease import LeaseBook, SilenceBook, VouchBook
from cluster.membership import Membership
from cluster.proposer import Decided, Proposer
from cluster.register import Acceptor
from cluster.servers import Servers
from cluster.state import admits
from fencing.admission import Admission, Verdict
from tests.sim.cluster_host import NodeHost
from tests.sim.mounts import Mounts

Patch = tuple[Any, str, Any]


def _without_persist(method: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def patched(self: Acceptor, *arguments: Any) -> list[Any]:
        actions = method(self, *arguments)
        return [action for action in actions if not isinstance(action, Persist)]

    return patched


def _one_vote(voters: list[int], answered: list[int]) -> bool:
    return any(voter in answered for voter in voters)


def _own_value(self: Proposer, base: Any) -> Any:
    operation = self._operation
    if isinstance(operation, cluster.proposer.Propose):
        return operation.value
    return base


def _first_answer(self: Proposer, now_ns: int, source: int, message: Any) -> list[Any]:
    """A read that believes the first voter that answers."""
    if message.value is None:
        return []
    return self._finish(now_ns, Decided(message.value, []))


_vouch = VouchBook.vouch


def _echo_goes_on(self: VouchBook, now_ns: int, vouch: Any) -> Vouched:
    members = self._members
    vouched = _vouch(self, now_ns, vouch)
    if members is not None:
        self._members = members + [m for m in vouch.members if m not in members]
    return vouched


def _oldest_echo(state: Any, answers: Any) -> Any:
    instances = sorted({entry.instance for answer in answers for entry in answer.ages})
    rest = [answer.received_ns - answer.start_age_ns for answer in answers]
    echo_ns = {i: min(cluster.lease._last_echo_ns(a, i) for a in answers) for i in instances}
    return cluster.lease.Bar(state, echo_ns, min(rest))


def _unseen_counts_as_barred(state: Any, instance: Instance) -> bool:
    return not admits(state.members, instance)


def _one_echo(self: LeaseBook, voters: list[int], number: int) -> int:
    return max((self._newest_ns.get((voter, number), 0) for voter in voters), default=0)


_lease_init = LeaseBook.__init__


def _long_lease(self: LeaseBook, timing: Any) -> None:
    _lease_init(self, timing)
    self._lease_ns *= 3


_commit_of = cluster.groups.Groups._take_ack


def _deliver_at_once(self: Any, now_ns: int, source: int, seq: int, delivered: int) -> Any:
    if self._sequencer is not None:
        for node in self._nodes:
            self._sequencer.acked[node] = max(self._sequencer.acked.get(node, 0), seq)
    return _commit_of(self, now_ns, source, seq, delivered)


_build = cluster.groups.Groups._build_sync


def _flush_forgets(self: Any, now_ns: int, sequencer: Any) -> Any:
    """Entries that were received but not delivered are lost in the flush."""
    for node, flush in list(sequencer.flushes.items()):
        sequencer.flushes[node] = msgspec.structs.replace(flush, pending=[])
    return _build(self, now_ns, sequencer)


def _same_incarnation(self: NodeHost) -> None:
    self.incarnation = max(self.incarnation, 1)
    self._start_cores()


_servers_answered = Servers.answered


def _deaf(self: Servers, *arguments: Any) -> bool:
    _servers_answered(self, *arguments)
    return False


def _numbers_above_next_live(member: Any, change: Any, epoch: Any, fences: Any) -> Any:
    dead = [i.number for i in change.dead if i.node == member.node]
    live = [number for number in member.live if number not in dead]
    return msgspec.structs.replace(member, live=live)


_servers_due = Servers.due


def _install_once(self: Servers, now_ns: int, state: Any) -> Any:
    actions = _servers_due(self, now_ns, state)
    for action in actions:
        self._records[action.to].next_ns = now_ns + 10**15
    return actions


def _purged_lie(self: Mounts, number: int) -> None:
    """PURGED is reported, but the kernel still serves the pages."""
    from cluster.core_events import InstancesPurged
    from cluster.ids import InstanceNo

    self.host.purged([InstanceNo(number)])
    self.host.core_step(InstancesPurged([InstanceNo(number)]))


def _fresh_sync(self: Any, now_ns: int, sequencer: Any) -> Any:
    """The new sequencer takes the state of one member, not the newest of all."""
    if sequencer.sync is None and sequencer.flushes:
        first = sequencer.flushes[min(sequencer.flushes)]
        for node in self._nodes:
            sequencer.flushes.setdefault(node, first)
    return _build(self, now_ns, sequencer)


_hold_fields = cluster.state._hold_fields


def _out_and_not_held(state: Any, change: Any) -> dict[str, Any]:
    fields = _hold_fields(state, change)
    fields.pop("held", None)
    return fields


def _eligible_though_held(self: Membership, now_ns: int, peer: Any) -> bool:
    held, self.state = self.state, msgspec.structs.replace(self.state, held=[])
    try:
        return _eligible(self, now_ns, peer)
    finally:
        self.state = held


_eligible = Membership.eligible


def _any_transition(old: Any, new: Any) -> None:
    """Nobody looks whether a value may follow another one."""


MUTANTS: dict[str, list[Patch]] = {
    "acceptor-accept-not-durable": [
        (Acceptor, "_accept", _without_persist(Acceptor._accept)),
        (Acceptor, "_prepare", _without_persist(Acceptor._prepare)),
    ],
    "acceptor-keeps-no-promise": [(Acceptor, "_refusal", lambda *_: None)],
    "register-one-vote": [(cluster.proposer, "is_majority", _one_vote)],
    "proposer-ignores-accepted": [(Proposer, "_choose", _own_value)],
    "read-believes-first": [(Proposer, "_current", _first_answer)],
    "echo-goes-on-after-accept": [(VouchBook, "vouch", _echo_goes_on)],
    "silent-at-once": [(SilenceBook, "silent_ns", lambda self, dead: 0)],
    "silent-after-oldest-echo": [(cluster.core, "bar_of_answers", _oldest_echo)],
    "unseen-life-counts-as-barred": [(cluster.lease, "bars", _unseen_counts_as_barred)],
    "lease-from-one-echo": [(LeaseBook, "_majority_ns", _one_echo)],
    "lease-too-long": [(LeaseBook, "__init__", _long_lease)],
    "purged-before-purge": [(Mounts, "_purge", _purged_lie)],
    "server-bars-nobody": [(Admission, "verdict", lambda self, instance: Verdict.ADMITTED)],
    "server-takes-old-install": [(Admission, "_objection", lambda *_: "")],
    "client-without-installed": [(Mounts, "may_use", lambda *_: True)],
    "groups-deliver-at-once": [(cluster.groups.Groups, "_take_ack", _deliver_at_once)],
    "groups-flush-forgets": [(cluster.groups.Groups, "_build_sync", _flush_forgets)],
    "groups-flush-of-one": [(cluster.groups.Groups, "_build_sync", _fresh_sync)],
    "same-incarnation": [
        (NodeHost, "started", _same_incarnation),
        (cluster.core.ClusterCore, "_first_value", lambda *_: []),
    ],
    "next-not-raised": [(cluster.state, "_without_dead", _numbers_above_next_live)],
    "install-once": [(Servers, "due", _install_once)],
    "circuits-do-not-count": [(Membership, "cut", lambda self, now_ns: [])],
    "held-is-forgotten": [(cluster.state, "_hold_fields", _out_and_not_held)],
    "held-is-let-in": [
        (Membership, "eligible", _eligible_though_held),
        (cluster.state, "check_transition", _any_transition),
    ],
    "no-catching-up": [
        (Membership, "behind", lambda self: False),
        (cluster.core.ClusterCore, "_to_nodes", lambda *_: []),
        (Servers, "answered", _deaf),
    ],
}


_LEASE = ("_isolate_reader", "_kill_reader", "_kill_reader", "_kill_mount")
_ORDER = ("_lossy", "_crash_sequencer", "_crash_sequencer")
_VOTE = ("_all_off", "_lossy", "_quick_restart", "_split", "_pause_node")
_HOLD = ("_hold_node", "_hold_node", "_crash_node", "_lossy")

FOCUS: dict[str, tuple[str, ...]] = {
    "circuits-do-not-count": ("_break_circuit",),
    "acceptor-accept-not-durable": ("_all_off",),
    "acceptor-keeps-no-promise": _VOTE,
    "register-one-vote": _VOTE,
    "proposer-ignores-accepted": _VOTE,
    "read-believes-first": _VOTE,
    "echo-goes-on-after-accept": ("_stick_clusterd",),
    "silent-at-once": _LEASE,
    "silent-after-oldest-echo": ("_isolate_reader", "_kill_reader"),
    "unseen-life-counts-as-barred": ("_isolate_reader",),
    "lease-from-one-echo": ("_isolate_reader",),
    "lease-too-long": _LEASE,
    "server-bars-nobody": ("_kill_holder",),
    "held-is-forgotten": _HOLD,
    "held-is-let-in": _HOLD,
    "groups-deliver-at-once": _ORDER,
    "groups-flush-forgets": _ORDER,
    "groups-flush-of-one": ("_lossy", "_quick_restart", "_crash_sequencer", "_kill_mount"),
}
"""The faults that concern a mutant, so that it is found fast; all faults for the others."""


@contextlib.contextmanager
def mutation(name: str) -> Iterator[None]:
    """The named bug is in the cores while the context lasts."""
    saved = [
        (target, attribute, getattr(target, attribute)) for target, attribute, _ in MUTANTS[name]
    ]
    for target, attribute, replacement in MUTANTS[name]:
        setattr(target, attribute, replacement)
    try:
        yield
    finally:
        for target, attribute, original in saved:
            setattr(target, attribute, original)
