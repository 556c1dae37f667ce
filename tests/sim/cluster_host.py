"""A node of the simulation: guard, acceptor and cluster core in one crash domain.

Durable: the incarnation counter, the acceptor's record, the newest value known. Writing the
acceptor's record takes time; a crash in between loses it, or not. What runs above the cluster core
(mounts, lock managers) is an `Application`: it gets the deliveries of its node.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import msgspec

from cluster.actions import Action, Datagram, Notify, Persist, Received, Reply, Send, Tick
from cluster.control import GroupEvent, Timing
from cluster.core import ClusterCore
from cluster.core_events import (
    Barred,
    Circuits,
    GroupDelivery,
    Report,
    StateChanged,
    TakeIncarnation,
)
from cluster.detector import GuardCore
from cluster.guard_events import (
    ClusterdDied,
    Facts,
    Heard,
    LeaseEnd,
    LocalPurged,
    Progress,
    Sighting,
    Vouch,
    Vouched,
)
from cluster.ids import Incarnation, InstanceNo, NodeId
from cluster.messages import (
    ACCEPTOR_MESSAGES,
    Message,
    decode_message_untrusted,
    encode_message,
)
from cluster.register import Acceptor
from cluster.state import ClusterState, decode_state_untrusted, encode_state
from tests.sim.world import MS, Host, World

DISK_MEAN = 2 * MS
DISK_LATE = 0.01
DISK_LATE_MAX = 800 * MS


class Observer(Protocol):
    """Whoever checks invariants."""

    def state_changed(self, node: int, life: int, change: StateChanged) -> None: ...

    def outcome(self, node: int, life: int, action: Reply) -> None: ...

    def delivered(self, node: int, life: int, number: int, event: GroupEvent) -> None: ...


class Application(Protocol):
    """What runs on a node above the cluster core."""

    def started(self) -> None: ...

    def stopped(self) -> None: ...

    def changed(self, change: StateChanged) -> None: ...

    def group_event(self, number: InstanceNo, event: GroupEvent) -> None: ...

    def barred(self, numbers: list[InstanceNo]) -> None: ...

    def lease(self, number: InstanceNo, end_ns: int) -> None: ...

    def message(self, source: int, data: bytes) -> None: ...

    def reply(self, reply: Reply) -> None: ...


class VoterShell:
    """Runs an acceptor: durable writes take time, actions stay in order."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.store: bytes | None = None
        self.acceptor: Acceptor | None = None
        self._queue: deque[Action] = deque()
        self._writing = False
        self.perform: Any = None

    def start(self, boot: int) -> None:
        """A new life on the durable store."""
        self._queue.clear()
        self._writing = False
        self.acceptor = Acceptor(boot, self.store)
        self._take(self.acceptor.start())

    def step(self, event: Received | Vouched) -> None:
        if self.acceptor is None:
            return
        self._take(self.acceptor.step(self.host.clock, event))
        self.acceptor.check()

    def _take(self, actions: list[Action]) -> None:
        self._queue.extend(actions)
        self._work()

    def _work(self) -> None:
        while self._queue and not self._writing:
            action = self._queue.popleft()
            if not isinstance(action, Persist):
                self.perform(action)
                continue
            self._writing = True
            rng = self.host.world.rng
            delay = int(rng.expovariate(1 / DISK_MEAN))
            if rng.random() < DISK_LATE and self.host.world.network.late:
                delay += rng.randrange(DISK_LATE_MAX)
            record = action.record
            self.host.world.at(delay // 2, partial(self._on_disk, record))
            self.host.at(delay, self._written)

    def _on_disk(self, record: bytes) -> None:
        """Durable before anyone is told; also when the host crashes in between (or it is lost)."""
        if self._writing and self.host.up:
            self.store = record

    def _written(self) -> None:
        self._writing = False
        self._work()


class NodeHost(Host):
    """A cluster node."""

    def __init__(
        self, world: World, node: int, timing: Timing, known: ClusterState, observer: Observer
    ) -> None:
        super().__init__(world, node)
        self.timing = timing
        self.known = encode_state(known)
        self.incarnation = 0
        self.observer = observer
        self.voter = VoterShell(self)
        self.voter.perform = self._perform
        self.application: Application | None = None
        self.core: ClusterCore | None = None
        self.guard: GuardCore | None = None
        self.view: StateChanged | None = None
        self.barred_life = False
        self._core_ns: int | None = None
        self._guard_ns: int | None = None
        self._stuck: list[Callable[[], None]] | None = None
        self._stamp = 0
        self._circuits: list[tuple[NodeId, Incarnation]] | None = None
        self.restart_delay = 300 * MS

    # --- life

    def started(self) -> None:
        self.incarnation += 1
        self._start_cores()

    def _start_cores(self) -> None:
        me, life = NodeId(self.id), Incarnation(self.incarnation)
        now = self.clock
        self.view = None
        self._stuck = None
        self._stamp = now
        self._circuits = None
        self.barred_life = False
        self._core_ns = self._guard_ns = None
        self.guard = GuardCore(me, life, self.timing, now)
        known = decode_state_untrusted(self.known)
        self.core = ClusterCore(me, life, self.timing, known, now)
        self.voter.start(self.incarnation)
        if self.application is not None:
            self.application.started()
        self.core_step(Tick())
        self.guard_step(Tick())

    def stopped(self) -> None:
        self.core = None
        self.guard = None
        if self.application is not None:
            self.application.stopped()

    def reboot(self) -> None:
        """A barred life ends and a new one begins (what systemd would do)."""
        self.crash()
        self.world.at(self.restart_delay, self.boot_if_down)

    def clusterd_crash(self) -> None:
        """Only clusterd dies: the guard announces it, purges the mounts, and ends (rule G4)."""
        if not self.up or self.paused or self.core is None or self.guard is None:
            return
        self.world.log(f"n{self.id}", "clusterd dies")
        numbers = list(self.core.membership.local)
        self.core = None
        self.voter.acceptor = None
        self.guard_step(ClusterdDied())
        if self.application is not None:
            self.application.barred(numbers)
        self.at(400 * MS, self.reboot)

    def stick(self) -> None:
        """clusterd hangs; the guard goes on (rule R9)."""
        if self.up and not self.paused and self._stuck is None and self.core is not None:
            self.world.log(f"n{self.id}", "clusterd hangs")
            self._stuck = []

    def unstick(self) -> None:
        """clusterd goes on with what has waited."""
        if self._stuck is None or not self.up:
            return
        self.world.log(f"n{self.id}", "clusterd goes on")
        held, self._stuck = self._stuck, None
        for action in held:
            action()

    def boot_if_down(self) -> None:
        """Boot, unless somebody else already did."""
        if not self.up:
            self.boot()

    # --- driving

    def core_step(self, event: Any) -> None:
        """One event of the cluster core."""
        if self.core is None:
            return
        if self._stuck is not None:
            self._stuck.append(lambda: self.core_step(event))
            return
        core = self.core
        self._stamp = self.clock
        actions = core.step(self.clock, event)
        core.check()
        for action in actions:
            if self.core is not core:
                return
            self._perform(action)
        if self.core is core:
            self._core_ns = self._arm(core.deadline(), self._core_ns, "core")

    def guard_step(self, event: Any) -> None:
        """One event of the guard."""
        if self.guard is None:
            return
        guard = self.guard
        for action in guard.step(self.clock, event):
            if self.guard is not guard:
                return
            self._perform(action)
        guard.check()
        self._guard_ns = self._arm(guard.deadline(), self._guard_ns, "guard")

    def _arm(self, deadline: int | None, armed: int | None, which: str) -> int | None:
        if deadline is None:
            return armed
        if armed is not None and self.clock < armed <= deadline:
            return armed
        jitter = self.world.rng.randrange(200_000)
        self.at(deadline - self.clock + jitter, lambda: self._timer(which))
        return deadline

    def _timer(self, which: str) -> None:
        if which == "core":
            self._core_ns = None
            self._look_at_circuits()
            self.core_step(Tick())
        else:
            self._guard_ns = None
            if self.guard is not None:
                numbers = self.core.membership.local if self.core is not None else []
                stamp_ms = (self.clock - self._stamp) // MS
                ages = [(number, stamp_ms if number == 0 else 0) for number in numbers]
                self.guard.step(self.clock, Progress(ages))
            self.guard_step(Tick())

    def _look_at_circuits(self) -> None:
        up = [
            (NodeId(other.id), Incarnation(other.incarnation))
            for _, other in sorted(self.world.hosts.items())
            if isinstance(other, NodeHost) and other is not self and self._connected(other)
        ]
        if up != self._circuits:
            self._circuits = up
            self.core_step(Circuits(up))

    def _connected(self, other: NodeHost) -> bool:
        network = self.world.network
        lives = other.up and not other.paused and other.core is not None and other._stuck is None
        cut = network.is_cut(self.id, other.id) or network.is_cut(other.id, self.id)
        return lives and not cut and not network.is_broken(self.id, other.id)

    def receive(self, source: int, channel: str, data: bytes) -> None:
        if channel == "app":
            if self.application is not None:
                self.application.message(source, data)
            return
        kind, network, life = channel.split(":")
        message = decode_message_untrusted(data)
        if kind == "udp":
            self.guard_step(Heard(int(network), source, Incarnation(int(life)), message))
        elif isinstance(message, ACCEPTOR_MESSAGES):
            if self._stuck is not None:
                self._stuck.append(lambda: self.voter.step(Received(source, message)))
            else:
                self.voter.step(Received(source, message))
        else:
            self.core_step(Received(source, message, int(life)))

    # --- performing

    def _perform(self, action: Action) -> None:
        match action:
            case Send(target, message):
                data = encode_message(message)
                self.world.network.session(self.id, target, f"tcp:0:{self.incarnation}", data)
            case Datagram(target, network, message):
                self._datagram(target, network, message)
            case Notify(event):
                self._notify(event)
            case Reply():
                self.observer.outcome(self.id, self.incarnation, action)
                if self.application is not None:
                    self.application.reply(action)
            case Persist():
                raise AssertionError("only the acceptor persists")

    def _datagram(self, target: int, network: int, message: Message) -> None:
        data = encode_message(message)
        assert len(data) <= 1400, len(data)
        channel = f"udp:{network}:{self.incarnation}"
        self.world.network.datagram(self.id, target, network, channel, data)

    def _notify(self, event: object) -> None:
        match event:
            case Facts():
                self.guard_step(recode(event, Facts))
            case Sighting():
                self.core_step(recode(event, Sighting))
            case Vouch():
                self.guard_step(recode(event, Vouch))
            case Vouched():
                self.voter.step(recode(event, Vouched))
            case LeaseEnd(number, end_ns):
                if self.application is not None:
                    self.application.lease(number, end_ns)
            case StateChanged():
                self._changed(event)
            case Barred(numbers, reason):
                self._barred(numbers, reason)
            case TakeIncarnation(incarnation):
                self.world.log(f"n{self.id}", f"takes incarnation {incarnation}")
                self.incarnation = incarnation
                self._start_cores()
            case GroupDelivery(number, group_event):
                event_copy = recode(group_event, GroupEvent)
                self.observer.delivered(self.id, self.incarnation, number, event_copy)
                if self.application is not None:
                    self.application.group_event(number, event_copy)
            case Report(kind, data):
                self.world.log(f"n{self.id}", f"{kind} {data}")

    def _changed(self, change: StateChanged) -> None:
        self.known = encode_state(change.state)
        self.view = change
        self.observer.state_changed(self.id, self.incarnation, change)
        if self.application is not None:
            self.application.changed(change)

    def _barred(self, numbers: list[InstanceNo], reason: str) -> None:
        self.world.log(f"n{self.id}", f"barred {numbers}: {reason}")
        if self.application is not None:
            self.application.barred(numbers)
        if 0 in numbers:
            self.barred_life = True
            self.at(50 * MS, self.reboot)

    def purged(self, numbers: list[InstanceNo]) -> None:
        """The guard has purged these instances."""
        self.guard_step(LocalPurged(numbers))


def recode(value: Any, kind: type[Any]) -> Any:
    """Through the encoding, as over a pipe."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind)
