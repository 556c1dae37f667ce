"""clusterd's core: proposer, membership, servers and groups behind one `step`. See ClusterCore.

It wires, it does not judge: outcomes of the proposer become the newest decided value; that goes to
membership, servers, silence book and groups; membership's proposals and the commands go to the
proposer, one at a time; dead instances of groups become `silent` here (rules R4, R8).
"""

from __future__ import annotations

from collections import deque

import msgspec

from cluster.actions import Action, Notify, Received, Reply, Send, Tick
from cluster.commands import Commands
from cluster.control import Timing, ViewInfo
from cluster.core_events import (
    Barred,
    Circuits,
    Command,
    GroupJoin,
    GroupLeave,
    GroupReleased,
    InstanceEnded,
    InstancesPurged,
    InstanceStarted,
    Leave,
    ReadState,
    Report,
    ServerDown,
    ServerUp,
    StateChanged,
    Stay,
    TakeIncarnation,
)
from cluster.errors import NotQuorateError
from cluster.groups import Groups
from cluster.guard_events import Facts, Sighting
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.lease import Bar, SilenceBook, bar_of_answers, bar_of_notice, notice_of_bar
from cluster.membership import Membership
from cluster.messages import (
    DeathReport,
    DecidedNotice,
    GroupAck,
    GroupFlush,
    GroupOrder,
    GroupRequest,
    GroupSync,
    Installed,
    JoinOp,
    LeaveOp,
    PurgedNotice,
    ReleasedOp,
    SilentOp,
)
from cluster.proposer import Conflict, Decided, Done, Propose, Proposer, Read
from cluster.servers import Servers
from cluster.state import (
    ClusterState,
    FinishVoterChange,
    apply_change,
    electorates,
    highest_incarnation,
)
from cluster.timing import MS, RANK_MS

CoreEvent = (
    Tick | Received | Sighting | InstanceStarted | InstanceEnded | InstancesPurged | ServerUp
    | ServerDown | Circuits | Command | ReadState | Leave | Stay | GroupJoin | GroupLeave
    | GroupReleased
)  # fmt: skip

READS_MAX = 64
LOOPS_MAX = 10_000
OPERATION_PHASES = 2


class Operation(msgspec.Struct, frozen=True):
    """What an operation of the proposer was for."""

    kind: str
    since_ns: int
    reply: int | None = None


class ClusterCore:
    """Everything that clusterd decides. Built once per life.

    `known` is the newest value of the register that this node has ever seen (kept in the state
    directory, or from the join token with at least cluster_id, voters, nodes, servers and
    config_epoch right): it says where the voters are, nothing more. Store `StateChanged.state` for
    the next start. Nothing is said by heartbeat before the register was read once.

    Actions: `Send` (messages to nodes; register messages to voters, nodes or servers; `Install` to
    servers), `Notify` of StateChanged, Facts (for the guard), Barred, TakeIncarnation,
    GroupDelivery, Report; `Reply`. No Persist. A `Send` to a voter that is this node itself goes to
    the local Acceptor (its answers come back as `Received`); other messages to itself do not leave.
    """

    def __init__(
        self, me: NodeId, incarnation: Incarnation, timing: Timing, known: ClusterState,
        start_ns: int,
    ) -> None:  # fmt: skip
        self.me = me
        self.incarnation = incarnation
        self.timing = timing
        self.membership = Membership(me, incarnation, timing, known, start_ns)
        self.proposer = Proposer(me, incarnation, timing, known)
        self.servers = Servers(me, incarnation, timing)
        self.groups = Groups(me, incarnation, timing)
        self.silence = SilenceBook(timing)
        self.commands = Commands()
        self._operations: dict[int, Operation] = {}
        self._serial = 0
        self._fresh = False
        self._stopped = False
        self._want_read = False
        self._leave: int | None = None
        self._barred: list[InstanceNo] = []
        self._facts: Facts | None = None
        self._shown: tuple[object, ...] | None = None
        self._was_quorate = False
        self._joint_ns: int | None = None
        self._alive: list[tuple[int, int]] = []
        self._tick_ns = start_ns

    @property
    def state(self) -> ClusterState:
        """The newest decided value that this node knows."""
        return self.membership.state

    @property
    def stopped(self) -> bool:
        """This life is over: barred, left, or it must start anew with another incarnation."""
        return self._stopped

    def step(self, now_ns: int, event: CoreEvent) -> list[Action]:
        """One event."""
        queue: deque[Action] = deque(self._event(now_ns, event))
        actions: list[Action] = []
        for _ in range(LOOPS_MAX):
            if not queue:
                queue.extend(self._advance(now_ns))
                if not queue:
                    break
            action = queue.popleft()
            loops = isinstance(action, Send) and action.to == self.me
            if loops and isinstance(action, Send) and isinstance(action.message, LOOPED):
                queue.extend(self._event(now_ns, Received(self.me, action.message)))
            else:
                actions.append(action)
        else:
            raise AssertionError("the core does not come to rest")
        return actions

    def deadline(self) -> int | None:
        """When `Tick` is wanted."""
        if self._stopped:
            return None
        times = [
            self._tick_ns + self.timing.heartbeat_ms * MS,
            self.proposer.deadline(),
            self.groups.deadline(),
            self.commands.deadline(),
            self.servers.deadline() if self.membership.admitted else None,
            self._silent_deadline(),
        ]
        ripe_ns = self.membership.deadline()
        if ripe_ns is not None and ripe_ns > self._tick_ns:
            times.append(ripe_ns)
        return min(time for time in times if time is not None)

    def check(self) -> None:
        """Assert the invariants."""
        self.proposer.check()
        self.groups.check()
        assert len(self._operations) <= READS_MAX + 4

    # --- events

    def _event(self, now_ns: int, event: CoreEvent) -> list[Action]:
        self._tick_ns = max(self._tick_ns, now_ns)
        if self._stopped:
            return self._after_the_end(event)
        match event:
            case Received(source, message):
                return self._received(now_ns, source, message)
            case Sighting():
                return self._sighting(now_ns, event)
            case InstanceStarted(number):
                self.membership.local.append(number)
            case InstanceEnded():
                return self._instance_ended(event)
            case InstancesPurged(numbers):
                return self._purged(numbers)
            case ServerUp(server):
                self.servers.up(now_ns, server)
            case ServerDown(server):
                self.servers.down(server)
            case Circuits(up):
                self.membership.circuits = dict(up)
            case Command():
                return self.commands.add(now_ns, event)
            case ReadState(request, timeout_ms):
                return self._read(now_ns, "read", now_ns + timeout_ms * MS, request)
            case Leave(request):
                self._leave = request
                self.membership.leaving = True
            case Stay():
                self._leave = None
                self.membership.leaving = False
            case GroupJoin(request, group, member):
                return self.groups.request(now_ns, JoinOp(group, member), request)
            case GroupLeave(request, group, instance):
                return self.groups.request(now_ns, LeaveOp(group, instance), request)
            case GroupReleased(request, group, subject, by):
                return self.groups.request(now_ns, ReleasedOp(group, subject, by), request)
            case Tick():
                return [
                    *self.proposer.step(now_ns, event),
                    *self.groups.tick(now_ns),
                    *self.commands.expire(now_ns),
                ]
        return []

    def _after_the_end(self, event: CoreEvent) -> list[Action]:
        """A barred life still says what is purged, and refuses everything else."""
        if isinstance(event, InstancesPurged):
            return self._purged(event.numbers)
        request = getattr(event, "request", None)
        if isinstance(request, int):
            return [Reply(request, error=NotQuorateError("this node is not a member"))]
        return []

    def _received(self, now_ns: int, source: int, message: object) -> list[Action]:
        match message:
            case DecidedNotice():
                if not self._fresh:
                    return []
                bar = bar_of_notice(now_ns, message)
                return self._adopt(now_ns, message.state, bar)
            case Installed():
                newer = self.servers.answered(now_ns, source, message, self.state.epoch)
                self._want_read = self._want_read or newer
                return []
            case PurgedNotice(instances):
                for instance in instances:
                    self.silence.purged(instance)
                return []
            case DeathReport(instance, running):
                if instance.node == source:
                    self.membership.reported[instance] = running
                return []
            case GroupRequest() | GroupOrder() | GroupAck() | GroupFlush() | GroupSync():
                return self.groups.received(now_ns, source, message)
            case _:
                return self.proposer.step(now_ns, Received(source, message))

    def _sighting(self, now_ns: int, sighting: Sighting) -> list[Action]:
        self.membership.take_sighting(now_ns, sighting)
        for peer in sighting.peers:
            for number in peer.purged:
                self.silence.purged(Instance(peer.node, peer.incarnation, number))
        alive = [(int(peer.node), int(peer.incarnation)) for peer in sighting.peers if peer.alive]
        lost = [key for key in self._alive if key not in alive]
        come = [key for key in alive if key not in self._alive]
        self._alive = alive
        return [
            *(Notify(Report("suspect", {"node": n, "incarnation": i})) for n, i in lost),
            *(Notify(Report("alive", {"node": n, "incarnation": i})) for n, i in come),
        ]

    def _instance_ended(self, event: InstanceEnded) -> list[Action]:
        membership = self.membership
        if event.number not in membership.local or event.number == 0:
            return []
        instance = Instance(self.me, self.incarnation, event.number)
        if event.clean and not self.groups.memberships(instance):
            membership.local.remove(event.number)
            return []
        membership.dead_local.setdefault(event.number, event.reason or "died")
        running = [n for n in membership.local if n not in membership.dead_local]
        return self._to_nodes(DeathReport(instance, running))

    def _purged(self, numbers: list[InstanceNo]) -> list[Action]:
        instances = [Instance(self.me, self.incarnation, number) for number in numbers]
        news = [instance for instance in instances if self.silence.purged(instance)]
        return self._to_nodes(PurgedNotice(news)) if news else []

    def _to_nodes(self, message: DeathReport | PurgedNotice | DecidedNotice) -> list[Action]:
        return [Send(node.id, message) for node in self.state.nodes if node.id != self.me]

    # --- the register

    def _read(self, now_ns: int, kind: str, until_ns: int, reply: int | None) -> list[Action]:
        if len(self._operations) >= READS_MAX:
            error = NotQuorateError("too many reads of the register under way")
            return [] if reply is None else [Reply(reply, error=error)]
        self._serial += 1
        self._operations[self._serial] = Operation(kind, now_ns, reply)
        return self.proposer.step(now_ns, Read(self._serial, until_ns))

    def _propose(self, now_ns: int, kind: str, value: ClusterState) -> list[Action]:
        self._serial += 1
        self._operations[self._serial] = Operation(kind, now_ns)
        until_ns = now_ns + OPERATION_PHASES * self.timing.phase_ms * MS
        return self.proposer.step(
            now_ns, Propose(self._serial, self.state.version, value, until_ns)
        )

    def _under_way(self, *kinds: str) -> bool:
        return any(operation.kind in kinds for operation in self._operations.values())

    def _done(self, now_ns: int, done: Done) -> list[Action]:
        operation = self._operations.pop(done.request)
        outcome = done.outcome
        if not isinstance(outcome, Decided | Conflict):
            if operation.reply is None:
                return []
            return [Reply(operation.reply, error=NotQuorateError("no majority of voters answers"))]
        bar = bar_of_answers(outcome.value, outcome.ages) if outcome.ages else None
        newer = outcome.value.version > self.state.version
        actions: list[Action] = []
        if not self._fresh:
            actions.extend(self._first_value(outcome.value))
            if self._stopped:
                return actions
        actions.extend(self._adopt(now_ns, outcome.value, bar))
        self._fresh = True
        self.commands.was_read(operation.since_ns)
        proposed = operation.kind not in ("read", "refresh")
        if proposed and newer and isinstance(outcome, Decided):
            spread = bar or Bar(outcome.value, {}, now_ns)
            actions.extend(self._to_nodes(notice_of_bar(now_ns, spread)))
        if operation.reply is not None:
            actions.append(Reply(operation.reply, result=outcome.value))
        return actions

    def _first_value(self, state: ClusterState) -> list[Action]:
        """Nobody has heard of this life before its first read: if the register knows its
        incarnation, it is not ours."""
        highest = highest_incarnation(state, self.me)
        if highest < self.incarnation:
            return []
        self._stopped = True
        return [Notify(TakeIncarnation(Incarnation(highest + 1)))]

    def _adopt(self, now_ns: int, state: ClusterState, bar: Bar | None) -> list[Action]:
        """A decided value; news if its version is higher, or if it is the first of this life."""
        if self._fresh and state.version <= self.state.version:
            return []
        news = state.epoch != self.state.epoch
        self.membership.adopt(now_ns, state)
        self.silence.decided(now_ns, state, bar)
        self.servers.configure(now_ns, state)
        self.proposer.known = state
        if not state.old_voters:
            self._joint_ns = None
        elif self._joint_ns is None:
            self._joint_ns = now_ns
        # The view first: who hears of a death must already use data by the new view alone (R3).
        actions = [*self._show(now_ns), *self.groups.adopt(now_ns, state)]
        if news:
            lives = {str(m.node): int(m.incarnation) for m in state.members}
            report = Report("view", {"epoch": int(state.epoch), "members": lives})
            actions.insert(0, Notify(report))
        return actions

    # --- what follows

    def _advance(self, now_ns: int) -> list[Action]:
        """Whatever the newest facts call for; called again until nothing comes."""
        if self._stopped:
            return []
        actions: list[Action] = []
        for done in self.proposer.take_done():
            actions.extend(self._done(now_ns, done))
        if actions:
            return actions
        actions.extend(self._end_of_life())
        if self._stopped:
            return actions
        reached = self.servers.reached(now_ns)
        self.membership.note_circuits(now_ns)
        if self.membership.admitted:
            self.membership.note_servers(now_ns, [int(server) for server in reached])
            actions.extend(self.servers.due(now_ns, self.state))
            actions.extend(self._silent(now_ns))
        self.membership.refresh(now_ns)
        actions.extend(self._proposals(now_ns))
        actions.extend(self._reads(now_ns))
        actions.extend(self._show(now_ns))
        return actions

    def _end_of_life(self) -> list[Action]:
        actions: list[Action] = []
        if self._leave is not None and self._fresh and not self.membership.admitted:
            self._stopped = True
            return [Reply(self._leave, result=self.state)]
        barred = [n for n in self.membership.barred_numbers() if n not in self._barred]
        if barred:
            self._barred.extend(barred)
            local = self.membership.local
            self.membership.local = [n for n in local if n == 0 or n not in barred]
            reason = self.state.fences[-1].reason if self.state.fences else ""
            actions.append(Notify(Barred(barred, reason)))
        if InstanceNo(0) in barred:
            actions.append(self._state_changed([], False))
            self._stopped = True
        return actions

    def _reads(self, now_ns: int) -> list[Action]:
        quorate = self.membership.quorate
        self._want_read = self._want_read or (quorate and not self._was_quorate)
        self._was_quorate = quorate
        wanted = (
            not self._fresh
            or self._want_read
            or self.membership.behind()
            or self.commands.wants_read
        )
        if not wanted or self._under_way("refresh"):
            return []
        self._want_read = False
        until_ns = now_ns + OPERATION_PHASES * self.timing.phase_ms * MS
        return self._read(now_ns, "refresh", until_ns, None)

    def _proposals(self, now_ns: int) -> list[Action]:
        if not self._fresh or self._under_way("view", "command", "finish"):
            return []
        writer = f"n{self.me}.{self.incarnation}.{self._serial}"
        change = self.membership.proposal(now_ns)
        if change is not None:
            value = apply_change(self.state, change, writer)
            if value is not self.state:
                return self._propose(now_ns, "view", value)
        if not self.membership.admitted:
            return []
        next_value, actions = self.commands.next_value(self.state, writer)
        if next_value is not None:
            return [*actions, *self._propose(now_ns, "command", next_value)]
        if self._joint_ns is not None and self.membership.quorate:
            rank = sum(1 for member in self.state.members if member.node < self.me)
            patience_ms = self.timing.dead_ms + rank * RANK_MS
            if now_ns >= self._joint_ns + patience_ms * MS:
                value = apply_change(self.state, FinishVoterChange(), writer)
                return [*actions, *self._propose(now_ns, "finish", value)]
        return actions

    def _silent(self, now_ns: int) -> list[Action]:
        """Dead instances that can do nothing any more (the sequencer's business)."""
        if not self.groups.leads or not self.groups.ready:
            return []
        actions: list[Action] = []
        settled = self.servers.settled(now_ns, self.state.epoch)
        for dead in self.groups.unsilent():
            at_ns = self.silence.silent_ns(dead)
            operation = SilentOp(dead)
            if at_ns is None or now_ns < at_ns or not settled or self.groups.asked(operation):
                continue
            actions.append(Notify(Report("silent", {"instance": str(dead)})))
            actions.extend(self.groups.request(now_ns, operation, None))
        return actions

    def _silent_deadline(self) -> int | None:
        if not self.groups.leads:
            return None
        times = [self.silence.silent_ns(dead) for dead in self.groups.unsilent()]
        future = [time for time in times if time is not None and time > self._tick_ns]
        return min(future, default=None)

    def _show(self, now_ns: int) -> list[Action]:
        """Tell the guard and the instances what has changed."""
        actions: list[Action] = []
        if not self._fresh:
            return []
        state = self.state
        facts = Facts(
            epoch=state.epoch, version=state.version, config_epoch=state.config_epoch,
            electorates=electorates(state), nodes=[node.id for node in state.nodes],
            reached_servers=self.servers.reached(now_ns), instances=list(self.membership.local),
            members=state.members, cut=self.membership.cut(now_ns),
        )  # fmt: skip
        if facts != self._facts:
            self._facts = facts
            actions.append(Notify(facts))
        installed = self.servers.installed(state.epoch)
        quorate = self.membership.quorate
        shown = (state.version, tuple(installed), quorate, self.membership.admitted)
        if shown != self._shown:
            self._shown = shown
            actions.append(self._state_changed([int(s) for s in installed], quorate))
        return actions

    def _state_changed(self, installed: list[int], quorate: bool) -> Notify:
        state = self.state
        servers = [server.id for server in state.servers if server.id in installed]
        view = ViewInfo(state.epoch, state.members, servers, quorate)
        return Notify(StateChanged(state, view, self.membership.admitted))


LOOPED = (
    DecidedNotice, PurgedNotice, DeathReport, GroupRequest, GroupOrder, GroupAck, GroupFlush,
    GroupSync,
)  # fmt: skip
