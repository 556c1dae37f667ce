"""A block server of the simulation: the fencing core, one cell of data, optionally a vote.

Requests wait in a queue and are checked when they execute (rule R5; one step of the heap is
atomic here, so nothing is in flight between check and effect). The cell is always durable: what
FLUSH means is the business of other tests.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cluster.actions import Action, Notify, Received, Send
from cluster.control import Timing
from cluster.guard_events import Vouch, Vouched
from cluster.ids import Incarnation, Instance, NodeId
from cluster.messages import (
    ACCEPTOR_MESSAGES,
    Heartbeat,
    Install,
    Installed,
    decode_message_untrusted,
    encode_message,
)
from cluster.voter import VoterEcho
from fencing import admission
from tests.sim.checker import Checker
from tests.sim.cluster_host import VoterShell, recode
from tests.sim.world import MS, Host, World

INSTALL_MEAN = 2 * MS
QUEUE_MEAN = 3 * MS
QUEUE_LATE = 0.12
QUEUE_LATE_MAX = 1500 * MS


class DataRequest(msgspec.Struct, frozen=True, tag="request"):
    """From a mount: read or write the cell. `token` names the lock grant under which it writes."""

    id: int
    instance: Instance
    epoch: int
    write: bool
    value: int
    token: int


class DataReply(msgspec.Struct, frozen=True, tag="reply"):
    """`status`: ok, barred (final), wait (ask again)."""

    id: int
    to: Instance
    status: str
    value: int


class ServerHost(Host):
    """A storage host."""

    def __init__(self, world: World, server: int, timing: Timing, checker: Checker) -> None:
        super().__init__(world, server)
        self.timing = timing
        self.checker = checker
        self.record: admission.InstallRecord | None = None
        self.cell = 0
        self.boots = 0
        self._installing = False
        self.voter = VoterShell(self)
        self.voter.perform = self._perform
        self.admission = admission.Admission(None, 0)
        self.echo: VoterEcho | None = None
        self.last_id: dict[Instance, int] = {}

    def started(self) -> None:
        self.boots += 1
        self._installing = False
        self.admission = admission.Admission(self.record, self.clock)
        self.echo = VoterEcho(self.id, self.timing, self.clock)
        self.voter.start(self.boots)

    def stopped(self) -> None:
        self.echo = None

    # --- messages

    def receive(self, source: int, channel: str, data: bytes) -> None:
        if channel == "app":
            request = msgspec.msgpack.decode(data, type=DataRequest)
            rng = self.world.rng
            delay = int(rng.expovariate(1 / QUEUE_MEAN))
            if rng.random() < QUEUE_LATE and self.world.network.late:
                delay += rng.randrange(QUEUE_LATE_MAX)
            self.at(delay, lambda: self._execute(source, request))
            return
        kind, network, life = channel.split(":")
        message = decode_message_untrusted(data)
        if kind == "udp" and isinstance(message, Heartbeat):
            assert self.echo is not None
            echo = self.echo.heartbeat(self.clock, message)
            self._udp(source, int(network), encode_message(echo))
        elif isinstance(message, ACCEPTOR_MESSAGES):
            self.voter.step(Received(source, message))
        elif isinstance(message, Install):
            self._install(source, Incarnation(int(life)), message)

    def _udp(self, target: int, network: int, data: bytes) -> None:
        self.world.network.datagram(self.id, target, network, f"udp:{network}:0", data)

    def _perform(self, action: Action) -> None:
        match action:
            case Send(target, message):
                self.world.network.session(self.id, target, "tcp:0:0", encode_message(message))
            case Notify(event):
                assert isinstance(event, Vouch)
                assert self.echo is not None
                vouched = self.echo.vouch(self.clock, recode(event, Vouch))
                self.voter.step(recode(vouched, Vouched))
            case _:
                raise AssertionError(action)

    # --- install

    def _install(self, source: int, life: Incarnation, message: Install) -> None:
        stones = {stone.node: stone.incarnation for stone in message.tombstones}
        event = admission.InstallRequested(
            sender=message.sender, sender_incarnation=message.incarnation, epoch=message.epoch,
            members=message.members, tombstones=stones, dead_ms=message.dead_ms,
        )  # fmt: skip
        self.admission.step(self.clock, admission.Heard(NodeId(source), message.incarnation))
        if self.admission.is_in_force(
            message.sender, message.incarnation, message.epoch, message.members
        ):
            self._answer(source, Installed(message.request, message.epoch))
            return
        if not self._installing:  # one at a time; the sender asks again
            self._admission_step(source, message, event)

    def _admission_step(self, source: int, message: Install, event: admission.Event) -> None:
        for action in self.admission.step(self.clock, event):
            match action:
                case admission.Refuse(reason, epoch):
                    self._answer(source, Installed(message.request, epoch, reason))
                case admission.Persist(record):
                    self._installing = True
                    delay = int(self.world.rng.expovariate(1 / INSTALL_MEAN))
                    self.at(delay, self._persisted(source, message, record))
                case admission.Revoke(epoch):
                    self.checker.installed(self.id, epoch)
                    self._admission_step(source, message, admission.Drained(epoch))
                case admission.Answer(epoch):
                    self._answer(source, Installed(message.request, epoch))
                case admission.StopServing():
                    pass
        self.admission.check()

    def _persisted(
        self, source: int, message: Install, record: admission.InstallRecord
    ) -> Callable[[], None]:
        def done() -> None:
            self.record = record
            self._installing = False
            self._admission_step(source, message, admission.Persisted(record))

        return done

    def _answer(self, target: int, message: Installed) -> None:
        self.world.network.session(self.id, target, "tcp:0:0", encode_message(message))

    # --- data

    def _execute(self, source: int, request: DataRequest) -> None:
        self.admission.step(self.clock, admission.Tick())
        verdict = self.admission.verdict(request.instance)
        if request.write and request.id <= self.last_id.get(request.instance, 0):
            return  # an earlier copy of what was sent again: its connection is closed (rule R6)
        if verdict is admission.Verdict.BARRED:
            status = "barred"
        elif verdict is admission.Verdict.ADMITTED and self.admission.serving:
            status = "ok"
            self.checker.executed(self.id, self.admission.epoch, request)
            if request.write:
                self.last_id[request.instance] = request.id
                self.cell = request.value
        else:
            status = "wait"
        reply = DataReply(request.id, request.instance, status, self.cell)
        data = msgspec.msgpack.encode(reply)
        self.world.network.session(self.id, source, "app", data)
