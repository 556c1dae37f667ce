"""Total order of group changes: one node sequences, all acknowledge, views flush.

The sequencer of an epoch is the lowest member node of its view. It numbers operations (epoch, seq),
sends them to all member nodes, and an entry is delivered once every member node has acknowledged
it; so whatever anyone delivered is known to every survivor. A new view stops the old epoch: every
member sends what it has applied and what it has received beyond that (`GroupFlush`); the new
sequencer makes one order of it, ends it with the `ViewOp` of the new epoch, and sends it to all
(`GroupSync`); it is delivered like any entry. A node that is new takes the snapshot. If nobody has
one (all nodes were away), the groups start empty, but only after every lease of an earlier life has
surely ended.

Requests of a node are numbered, sent again until they come back as entries, and sequenced once.
"""

from __future__ import annotations

from collections import deque

import msgspec

from cluster.actions import Action, Notify, Reply, Send
from cluster.control import GroupEvent, MemberInfo, Timing
from cluster.core_events import GroupDelivery
from cluster.errors import BusyError, StackError
from cluster.group_state import EMPTY, apply_entry
from cluster.ids import Epoch, Instance
from cluster.messages import (
    Entry,
    GroupAck,
    GroupFlush,
    GroupOp,
    GroupOrder,
    GroupRequest,
    GroupsSnapshot,
    GroupState,
    GroupSync,
    ViewOp,
)
from cluster.state import ClusterState, member_of
from cluster.timing import MS, silence_wait_ns

LOG_MAX = 1024
BATCH_MAX = 128
REQUESTS_MAX = 1024
RESEND_DIVISOR = 3

GroupMessage = GroupRequest | GroupOrder | GroupAck | GroupFlush | GroupSync


class Waiting(msgspec.Struct, frozen=True):
    """A local request that has not come back yet."""

    number: int
    op: GroupOp
    request: int | None


class Sequencer:
    """What only the sequencer of an epoch has."""

    def __init__(self) -> None:
        self.flushes: dict[int, GroupFlush] = {}
        self.sync: GroupSync | None = None
        self.seen: dict[tuple[int, int], int] = {}
        self.log: deque[Entry] = deque()
        self.last_seq = 0
        self.committed = 0
        self.acked: dict[int, int] = {}
        self.delivered: dict[int, int] = {}


class Groups:
    """See the module. `step`-like methods return actions; messages to the own node are returned
    like all others and handed back by the caller."""

    def __init__(self, me: int, incarnation: int, timing: Timing) -> None:
        self.me = me
        self.incarnation = incarnation
        self.epoch = Epoch(0)
        self.snapshot: GroupsSnapshot | None = None
        self._members: list[MemberInfo] = []
        self._nodes: list[int] = []
        self._pending: list[Entry] = []
        self._synced = False
        self._committed = 0
        self._sequencer: Sequencer | None = None
        self._requests: deque[Waiting] = deque()
        self._number = 0
        self._resend_ns: int | None = None
        self._period_ns = timing.phase_ms * MS // RESEND_DIVISOR
        self._fresh_wait_ns = silence_wait_ns(timing)
        self._fresh_ns = 0

    # --- what the outside asks

    @property
    def leads(self) -> bool:
        """Whether this node is the sequencer of the current epoch."""
        return self._sequencer is not None

    @property
    def ready(self) -> bool:
        """Whether the current epoch has been flushed here."""
        return self._synced and self._committed >= 1

    def unsilent(self) -> list[Instance]:
        """Dead instances that are not yet silent, over all groups."""
        if self.snapshot is None:
            return []
        found = {i for g in self.snapshot.groups for i in g.dead if i not in g.silent}
        return sorted(found)

    def memberships(self, instance: Instance) -> list[str]:
        """The groups in which an instance is, or soon will be."""
        groups: list[GroupState] = self.snapshot.groups if self.snapshot is not None else []
        names = [g.name for g in groups if any(m.instance == instance for m in g.members)]
        return names

    def asked(self, op: GroupOp) -> bool:
        """Whether the same local operation is already under way."""
        return any(waiting.op == op for waiting in self._requests)

    def deadline(self) -> int | None:
        """When `tick` is wanted."""
        return self._resend_ns

    def check(self) -> None:
        """Assert the invariants."""
        positions = [(entry.epoch, entry.seq) for entry in self._pending]
        assert positions == sorted(set(positions))
        if self.snapshot is not None and positions:
            assert positions[0] > (self.snapshot.epoch, self.snapshot.seq)
        if self._sequencer is not None:
            assert self._sequencer.committed <= self._sequencer.last_seq
            assert self._nodes[0] == self.me

    # --- views

    def adopt(self, now_ns: int, state: ClusterState) -> list[Action]:
        """A newer decided value. A newer epoch stops the old order and starts the flush."""
        mine = member_of(state.members, self.me)
        if state.epoch <= self.epoch:
            return []
        self.epoch = state.epoch
        self._members = state.members
        self._nodes = sorted(int(member.node) for member in state.members)
        self._synced = False
        self._committed = 0
        self._sequencer = None
        self._resend_ns = None
        if mine is None or mine.incarnation != self.incarnation:
            self._nodes = []
            return []
        if self._nodes[0] == self.me:
            self._sequencer = Sequencer()
        self._fresh_ns = now_ns + self._fresh_wait_ns if state.epoch > 1 else now_ns
        return self._flush(now_ns)

    def _flush(self, now_ns: int) -> list[Action]:
        self._resend_ns = now_ns + self._period_ns
        return [Send(self._nodes[0], GroupFlush(self.epoch, self.snapshot, list(self._pending)))]

    # --- requests

    def request(self, now_ns: int, op: GroupOp, request: int | None) -> list[Action]:
        """A local operation; `request` gets a Reply when it has been delivered here."""
        if len(self._requests) >= REQUESTS_MAX:
            error = BusyError("too many group operations under way")
            return [] if request is None else [Reply(request, error=error)]
        self._number += 1
        waiting = Waiting(self._number, op, request)
        self._requests.append(waiting)
        if not self._nodes:
            return []
        self._resend_ns = self._resend_ns or now_ns + self._period_ns
        return [self._request_message(waiting)] if self._synced else []

    def _request_message(self, waiting: Waiting) -> Send:
        return Send(self._nodes[0], GroupRequest(self.epoch, waiting.number, waiting.op))

    # --- messages

    def received(self, now_ns: int, source: int, message: GroupMessage) -> list[Action]:
        """A message of another member node (or of ourselves)."""
        if message.epoch != self.epoch or source not in self._nodes:
            return []
        match message:
            case GroupSync():
                return self._take_sync(now_ns, source, message)
            case GroupOrder():
                return self._take_order(now_ns, source, message)
            case GroupFlush():
                return self._take_flush(now_ns, source, message)
            case GroupAck(_, seq, delivered):
                return self._take_ack(now_ns, source, seq, delivered)
            case GroupRequest(_, number, op):
                return self._take_request(now_ns, source, number, op)

    def tick(self, now_ns: int) -> list[Action]:
        """Send again what has not been answered."""
        if self._resend_ns is None or now_ns < self._resend_ns or not self._nodes:
            return []
        self._resend_ns = None
        actions: list[Action] = []
        if not self._synced:
            actions.extend(self._flush(now_ns))
        elif self._requests:
            actions.extend(
                self._request_message(waiting) for waiting in list(self._requests)[:BATCH_MAX]
            )
        if self._sequencer is not None:
            actions.extend(self._build_sync(now_ns, self._sequencer))
            actions.extend(self._resend_orders(self._sequencer))
        if actions:
            self._resend_ns = now_ns + self._period_ns
        return actions

    # --- the sequencer

    def _take_flush(self, now_ns: int, source: int, message: GroupFlush) -> list[Action]:
        sequencer = self._sequencer
        if sequencer is None:
            return []
        if sequencer.sync is not None:
            return [Send(source, sequencer.sync)]
        sequencer.flushes[source] = message
        return self._build_sync(now_ns, sequencer)

    def _build_sync(self, now_ns: int, sequencer: Sequencer) -> list[Action]:
        """With the flushes of all members: one order out of what they have."""
        if sequencer.sync is not None or sorted(sequencer.flushes) != self._nodes:
            return []
        flushes = [sequencer.flushes[node] for node in self._nodes]
        snapshots = [flush.snapshot for flush in flushes if flush.snapshot is not None]
        if not snapshots and now_ns < self._fresh_ns:
            self._resend_ns = min(self._resend_ns or self._fresh_ns, self._fresh_ns)
            return []
        base = min(snapshots, key=lambda s: (s.epoch, s.seq), default=EMPTY)
        found = {(entry.epoch, entry.seq): entry for f in flushes for entry in f.pending}
        start = (base.epoch, base.seq)
        entries = [found[position] for position in sorted(found) if position > start]
        entries.append(Entry(self.epoch, 1, self.me, self.incarnation, 0, ViewOp(self._members)))
        sequencer.sync = GroupSync(self.epoch, base, entries)
        sequencer.last_seq = 1
        sequencer.acked = dict.fromkeys(self._nodes, 0)
        sequencer.delivered = dict.fromkeys(self._nodes, 0)
        sequencer.seen = {(node, life): number for node, life, number in base.requests}
        for entry in entries:
            if entry.number:
                sequencer.seen[entry.node, entry.incarnation] = entry.number
        return [Send(node, sequencer.sync) for node in self._nodes]

    def _take_request(self, now_ns: int, source: int, number: int, op: GroupOp) -> list[Action]:
        sequencer = self._sequencer
        member = member_of(self._members, source)
        if sequencer is None or sequencer.sync is None or member is None:
            return []
        life = (source, int(member.incarnation))
        expected = sequencer.seen.get(life, 0) + 1
        if number != expected or len(sequencer.log) >= LOG_MAX:
            return []
        sequencer.seen[life] = number
        sequencer.last_seq += 1
        entry = Entry(self.epoch, sequencer.last_seq, *life, number, op)
        sequencer.log.append(entry)
        self._resend_ns = self._resend_ns or now_ns + self._period_ns
        order = GroupOrder(self.epoch, [entry], sequencer.committed)
        return [Send(node, order) for node in self._nodes]

    def _take_ack(self, now_ns: int, source: int, seq: int, delivered: int) -> list[Action]:
        sequencer = self._sequencer
        if sequencer is None or sequencer.sync is None:
            return []
        sequencer.acked[source] = max(sequencer.acked[source], seq)
        sequencer.delivered[source] = max(sequencer.delivered[source], delivered)
        committed = min(sequencer.acked.values())
        if committed <= sequencer.committed:
            return []
        sequencer.committed = committed
        while sequencer.log and sequencer.log[0].seq <= committed:
            sequencer.log.popleft()
        self._resend_ns = self._resend_ns or now_ns + self._period_ns
        return [Send(node, GroupOrder(self.epoch, [], committed)) for node in self._nodes]

    def _resend_orders(self, sequencer: Sequencer) -> list[Action]:
        if sequencer.sync is None:
            return []
        actions: list[Action] = []
        for node in self._nodes:
            acked = sequencer.acked[node]
            if acked == 0:
                actions.append(Send(node, sequencer.sync))
                continue
            entries = [entry for entry in sequencer.log if entry.seq > acked][:BATCH_MAX]
            if entries or sequencer.delivered[node] < sequencer.committed:
                actions.append(Send(node, GroupOrder(self.epoch, entries, sequencer.committed)))
        return actions

    # --- every member

    def _take_sync(self, now_ns: int, source: int, message: GroupSync) -> list[Action]:
        if source != self._nodes[0]:
            return []
        if not self._synced:
            if self.snapshot is None:
                self.snapshot = message.snapshot
            start = (self.snapshot.epoch, self.snapshot.seq)
            self._pending = [e for e in message.entries if (e.epoch, e.seq) > start]
            self._synced = True
            self._resend_ns = now_ns + self._period_ns
        requests = [self._request_message(waiting) for waiting in list(self._requests)[:BATCH_MAX]]
        return [self._ack(), *requests]

    def _take_order(self, now_ns: int, source: int, message: GroupOrder) -> list[Action]:
        if source != self._nodes[0] or not self._synced:
            return []
        for entry in message.entries:
            if entry.seq == self._last_seq() + 1:
                self._pending.append(entry)
        self._committed = max(self._committed, message.committed)
        delivered = self._deliver()
        return [*delivered, self._ack()]

    def _last_seq(self) -> int:
        if self._pending:
            return self._pending[-1].seq
        assert self.snapshot is not None
        return self.snapshot.seq

    def _ack(self) -> Send:
        assert self.snapshot is not None
        delivered = self.snapshot.seq if self.snapshot.epoch == self.epoch else 0
        return Send(self._nodes[0], GroupAck(self.epoch, self._last_seq(), delivered))

    def _deliver(self) -> list[Action]:
        """Apply what every member has; the events go to the local instances."""
        actions: list[Action] = []
        while self._committed and self._pending:
            entry = self._pending[0]
            if (entry.epoch, entry.seq) > (self.epoch, self._committed):
                break
            assert self.snapshot is not None
            del self._pending[0]
            applied = apply_entry(self.snapshot, entry)
            self.snapshot = applied.snapshot
            for event in applied.events:
                actions.extend(self._local(event))
            actions.extend(self._replies(entry, applied.done))
        return actions

    def _local(self, event: GroupEvent) -> list[Action]:
        life = (self.me, self.incarnation)
        return [
            Notify(GroupDelivery(member.instance.number, event))
            for member in event.members
            if (member.instance.node, member.instance.incarnation) == life
        ]

    def _replies(self, entry: Entry, done: bool) -> list[Action]:
        actions: list[Action] = []
        if (entry.node, entry.incarnation) != (self.me, self.incarnation):
            return []
        while self._requests and self._requests[0].number <= entry.number:
            waiting = self._requests.popleft()
            if waiting.request is None:
                continue
            error = None if done else StackError("the group does not allow that now")
            actions.append(Reply(waiting.request, error=error))
        return actions
