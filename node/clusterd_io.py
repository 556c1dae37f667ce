"""clusterd: the cores of a node and the world around them.

    guard <-> Clusterd <-> control mesh (other clusterds), sessions with the block servers
                 |
       control socket (instances, command-line tools)

`perform` carries out what the core wants; nothing is decided here. Two runners: the acceptor (its
store is durable before its answers leave) and the core (proposer, membership, groups).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import trio

from cluster.actions import Action, Notify, Received, Reply, Send
from cluster.config import NodeConfig
from cluster.control import GroupEvent, ViewInfo
from cluster.control_io import Session
from cluster.core import ClusterCore
from cluster.core_events import (
    Barred,
    Circuits,
    Command,
    GroupDelivery,
    InstanceEnded,
    InstancesPurged,
    ReadState,
    Report,
    StateChanged,
    TakeIncarnation,
)
from cluster.errors import NotQuorateError, ProtocolError, StackError
from cluster.events import EventLog, EventName, EventRecord
from cluster.guard_events import Facts, Sighting, Vouch, Vouched
from cluster.identity import Identity
from cluster.ids import SERVER_ID_MIN, Epoch, Incarnation, Instance, InstanceNo, NodeId
from cluster.messages import (
    ACCEPTOR_MESSAGES,
    FenceReport,
    Message,
    decode_message_untrusted,
    encode_message,
)
from cluster.paths_io import boottime_ns, run_dir
from cluster.register import Acceptor, Record, Replace, Replaced
from cluster.runner_io import STORE_RETRY_S, Runner
from cluster.state import Change, ClusterState
from cluster.timing import timing_of
from cluster.transport_io import Transport
from cluster.wire import KEY_ID, Keys, derived_key
from fencing.records import LinkBook
from gnbd.control.session import Peer
from node.files_io import NodeFiles
from node.guard_link_io import GuardLink
from node.guard_messages import (
    WRONG_KEY_REPEAT_S,
    BarLocal,
    Ended,
    FromGuard,
    LeaseChanged,
    MountAttached,
    MountLost,
    Peers,
    PurgedLocal,
    Settings,
    WrongKey,
)
from node.instances import LocalInstance, LocalInstances
from node.problems import Problems
from node.reports import describe_report
from node.screen import events_line
from node.servers_io import ServerLinks

T = TypeVar("T")
CLUSTERD = InstanceNo(0)
FOLLOWERS_MAX = 64
GROUPS_NOTED_MAX = 256
COMMAND_S = 15.0
RESTART_WAIT_FACTOR = 3
LAST_LIFE = "CFS_LAST_LIFE"
"""In the environment of a restart: why the last life of this node ended."""


class RestartNeeded(Exception):
    """This life is over; the process starts anew with a higher incarnation."""

    def __init__(self, reason: str, guard: GuardLink) -> None:
        super().__init__(reason)
        self.guard = guard


class Clusterd:
    """Everything of one life of a node."""

    def __init__(self, files: NodeFiles, config: NodeConfig, incarnation: Incarnation) -> None:
        self.files = files
        self.config = config
        self.incarnation = incarnation
        self.me = config.node.id
        self.state: ClusterState = files.known()
        self.timing = timing_of(self.state.profile)
        self.view = ViewInfo(Epoch(0), [], [], quorate=False)
        self.admitted = False
        self.sighting: Sighting | None = None
        self.links = LinkBook()
        self.log = EventLog(config.node.name)
        self.problems = Problems()
        self.followers: set[Session] = set()
        self.instances = LocalInstances()
        self.changed = trio.Event()
        self.group_sink: Callable[[GroupEvent], None] = lambda _event: None
        self.on_instance_over: Callable[[InstanceNo, bool], None] = lambda _number, _clean: None
        self.on_fence_report: Callable[[FenceReport], None] = lambda _report: None
        self.nursery: trio.Nursery | None = None
        self._requests: dict[int, tuple[trio.Event, list[Reply]]] = {}
        self._request = 0
        self._unsaved: ClusterState | None = None
        self._over = ""
        self._replaced = trio.Event()
        self._purged: set[InstanceNo] = set()
        self._noted: dict[str, tuple[int, int]] = {}
        self.keys = Keys(KEY_ID, {KEY_ID: bytes.fromhex(config.cluster.key)})
        self.cluster_id = bytes.fromhex(config.cluster.id)
        identity = Identity(self.me, self.cluster_id, incarnation, self.keys)
        self.guard = GuardLink(self._settings(), self._guard_said)
        self.transport = Transport(
            identity, config.node.addresses, config.ports.control, self.timing, self._received
        )
        self.transport.on_circuits = lambda up: self.step(Circuits(sorted(up.items())))
        self.transport.on_wrong_key = self._wrong_key
        self.transport.on_refused = lambda node: self._repeated(
            node, "hangs up on this node; it may use another cluster key"
        )
        self.transport.epochs = lambda: (self.state.epoch, self.state.config_epoch)
        self.core = ClusterCore(self.me, incarnation, self.timing, self.state, boottime_ns())
        self._core = Runner(self.core, self._perform, None)
        self.acceptor = Acceptor(incarnation, files.acceptor_record())
        self._acceptor = Runner(
            self.acceptor, self._perform_acceptor, files.acceptor,
            lambda text: self.problem("acceptor", text and f"{text}; this node does not vote"),
        )  # fmt: skip
        peer = Peer(self.me, self.cluster_id, incarnation)
        self.servers = ServerLinks(self.keys, peer, self.timing, self.step, self.note)

    def _settings(self) -> Settings:
        config = self.config
        return Settings(
            node=self.me,
            incarnation=self.incarnation,
            cluster_id=config.cluster.id,
            key=config.cluster.key,
            addresses=config.node.addresses,
            port=config.ports.heartbeat,
            run_dir=str(run_dir()),
            timing=self.timing,
        )

    def instance(self, number: InstanceNo) -> Instance:
        """A local instance by number."""
        return Instance(self.me, self.incarnation, number)

    # --- life

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until this life is over."""
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            await nursery.start(self.guard.run)
            self._know(self.state)
            await nursery.start(self.transport.run)
            await nursery.start(self.servers.run)
            await nursery.start(self._acceptor.run)
            await nursery.start(self._core.run)
            nursery.start_soon(self._save_loop)
            for action in self.acceptor.start():
                self._perform_acceptor(action)
            text = f"{self.config.node.name} started, incarnation {self.incarnation}"
            over = os.environ.pop(LAST_LIFE, "")
            self.note(
                EventName.NODE_STARTED,
                f"{text}; before: {over}" if over else text,
                incarnation=self.incarnation,
            )
            task_status.started()

    def _know(self, state: ClusterState) -> None:
        """Connect to whom the newest value names."""
        nodes = {node.id: node.addresses for node in state.nodes}
        self.transport.set_peers(nodes)
        self.servers.set_servers(state.servers)
        addresses = {int(node.id): node.addresses for node in state.nodes}
        addresses |= {int(server.id): server.addresses for server in state.servers}
        self.guard.send(Peers(addresses))

    async def _save_loop(self) -> None:
        """Keep the newest value on disk; a hint, so it need not be ordered with anything."""
        while True:
            while (state := self._unsaved) is None:
                await self.wait_changed()
            self._unsaved = None
            await self.store("known", self.files.save_known, state)

    async def store(self, key: str, save: Callable[[T], None], what: T) -> None:
        """Write one of this node's files, in a thread; tells why it cannot, and tries again until
        it can."""
        while True:
            try:
                await trio.to_thread.run_sync(save, what)
            except StackError as error:
                self.problem(key, error.message)
                await trio.sleep(STORE_RETRY_S)
            else:
                self.problem(key, "")
                return

    def note(self, name: str, text: str, /, **fields: Any) -> EventRecord:
        """Add to the event log and tell the followers."""
        clock = (boottime_ns(), time.time_ns() // 1_000_000)
        record = self.log.add(clock, name, text, self.state.epoch, fields)
        print(events_line(msgspec.to_builtins(record)), file=sys.stderr, flush=True)
        for session in list(self.followers):
            if session.closed.is_set():
                self.followers.discard(session)
            else:
                session.event("event", record)
        return record

    def problem(self, key: str, text: str, lasts_ns: int | None = None) -> None:
        """Tell once, in the events and as long as it lasts in the status, what is wrong; with an
        empty text that it is over."""
        if not text:
            if self.problems.over(key):
                self.note(EventName.NOTE, f"over: {key}")
        elif self.problems.found(boottime_ns(), key, text, lasts_ns):
            self.note(EventName.NOTE, text)

    def signal(self) -> None:
        """Wake everyone who waits for a change of what is known here."""
        self.changed.set()
        self.changed = trio.Event()

    async def wait_changed(self) -> None:
        """Wait for the next `signal`."""
        await self.changed.wait()

    async def replace_record(self, record: Record) -> None:
        """The acceptor goes on from this record; return when it is durable."""
        self._replaced = trio.Event()
        self._acceptor.step(Replace(record))
        await self._replaced.wait()

    # --- cores

    def step(self, event: Any) -> None:
        """Feed the core."""
        self._core.step(event)

    async def ask(self, make: Callable[[int], Any]) -> Any:
        """Feed a request and wait for its reply. Raises its error."""
        self._request += 1
        number = self._request
        slot: tuple[trio.Event, list[Reply]] = (trio.Event(), [])
        self._requests[number] = slot
        try:
            self.step(make(number))
            await slot[0].wait()
        finally:
            del self._requests[number]
        reply = slot[1][0]
        if reply.error is not None:
            raise reply.error
        return reply.result

    async def command(self, change: Change, timeout_s: float = COMMAND_S) -> ClusterState:
        """Change the register. Raises what forbids it, or NotQuorateError."""
        result = await self.ask(lambda n: Command(n, change, int(timeout_s * 1000)))
        assert isinstance(result, ClusterState)
        return result

    async def read_state(self, timeout_s: float = COMMAND_S) -> ClusterState:
        """The decided value, linearizable. Raises NotQuorateError."""
        result = await self.ask(lambda n: ReadState(n, int(timeout_s * 1000)))
        assert isinstance(result, ClusterState)
        return result

    async def wait_admitted(self, timeout_s: float) -> None:
        """Wait until this life is a member of a quorate cluster. Raises NotQuorateError."""
        with trio.move_on_after(timeout_s):
            while not (self.admitted and self.view.quorate):
                await self.wait_changed()
            return
        raise NotQuorateError(f"{self.config.node.name} is not a member of a quorate cluster")

    def _perform(self, action: Action) -> None:
        match action:
            case Send(to, message):
                self._send(to, message)
            case Notify(event):
                self._notified(event)
            case Reply(request):
                slot = self._requests.get(request)
                if slot is not None and not slot[1]:
                    slot[1].append(action)
                    slot[0].set()
            case _:
                raise AssertionError(f"the core asks for {action}")

    def _perform_acceptor(self, action: Action) -> None:
        match action:
            case Send(to, message):
                if to == self.me:
                    self.step(Received(to, message, self.incarnation))
                else:
                    self.transport.send(NodeId(to), encode_message(message))
            case Notify(event) if isinstance(event, Vouch):
                self.guard.send(event)
            case Notify(Replaced()):
                self._replaced.set()
            case _:
                raise AssertionError(f"the acceptor asks for {action}")

    def _send(self, to: int, message: Message) -> None:
        if to == self.me:
            self._route(NodeId(to), self.incarnation, message)
        elif to >= SERVER_ID_MIN:
            self.servers.send(to, message)
        else:
            self.transport.send(NodeId(to), encode_message(message))

    def _received(self, node: NodeId, incarnation: Incarnation, body: bytes) -> None:
        try:
            message = decode_message_untrusted(body)
        except ProtocolError:
            return
        self._route(node, incarnation, message)

    def _route(self, source: NodeId, incarnation: Incarnation, message: Message) -> None:
        if isinstance(message, FenceReport):
            self.on_fence_report(message)
            return
        runner = self._acceptor if isinstance(message, ACCEPTOR_MESSAGES) else self._core
        runner.step(Received(source, message, incarnation))

    def _notified(self, event: object) -> None:
        match event:
            case Facts():
                self.guard.send(event)
            case StateChanged():
                self._state_changed(event)
            case GroupDelivery(to, group_event):
                self._deliver(to, group_event)
            case Barred(numbers, reason):
                self._barred(numbers, reason)
            case TakeIncarnation(incarnation):
                self.files.set_incarnation(Incarnation(incarnation - 1))
                self._end_life(f"the register knows incarnation {incarnation - 1} of this node")
            case Report(kind, data):
                name, text = describe_report(kind, data, self.state)
                self.note(name, text, **data)
            case _:
                raise AssertionError(f"the core tells {event}")

    def _state_changed(self, event: StateChanged) -> None:
        before = self.view
        if event.state.version != self.state.version:
            self._unsaved = event.state
        self.state = event.state
        self.view = event.view
        self.admitted = event.admitted
        self._know(event.state)
        if before.quorate != event.view.quorate:
            name = EventName.QUORUM_GAINED if event.view.quorate else EventName.QUORUM_LOST
            self.note(name, name.replace(".", " "))
        for server in event.view.installed:
            if event.view.epoch != before.epoch or server not in before.installed:
                self.note(EventName.SERVER_INSTALLED, f"server {server} has installed the view",
                          server=int(server))  # fmt: skip
        if before != event.view:
            for instance in self.instances.live():
                if not instance.session.closed.is_set():
                    instance.session.event("view", event.view)
        self.signal()

    def group_key(self, group: str) -> str:
        """The key of a group's mesh, hex: the same on every node, no secret of the cluster."""
        return derived_key(bytes.fromhex(self.config.cluster.key), f"mesh|{group}").hex()

    def _note_group(self, event: GroupEvent) -> None:
        """Once per event, however many local members it has."""
        place = (int(event.epoch), event.seq)
        if self._noted.get(event.group, (0, 0)) >= place:
            return
        self._noted.pop(event.group, None)
        self._noted[event.group] = place
        while len(self._noted) > GROUPS_NOTED_MAX:
            del self._noted[next(iter(self._noted))]
        about = {
            "view": f"members {', '.join(str(m.instance) for m in event.members)}",
            "silent": f"{event.subject} is silent: its journal may be replayed",
            "released": f"{event.subject} is released: its journal has been replayed",
        }.get(event.kind, event.kind)
        failed = [str(one) for one in event.failed]
        self.note(f"group.{event.kind}", f"{event.group}: {about}", group=event.group,
                  seq=event.seq, failed=failed)  # fmt: skip

    def _deliver(self, to: InstanceNo, event: GroupEvent) -> None:
        filled = msgspec.structs.replace(event, mesh_key=self.group_key(event.group))
        self._note_group(event)
        if to == CLUSTERD:
            self.group_sink(filled)
            return
        instance = self.instances.by_number.get(to)
        if instance is not None and not instance.session.closed.is_set():
            instance.session.event("group", filled)

    # --- instances

    def end_instance(self, instance: LocalInstance, *, clean: bool, reason: str) -> None:
        """The instance is over. Unclean: guard aborts and purges, the register bars it."""
        if instance.over:
            return
        instance.over = True
        number = instance.number
        if clean:
            del self.instances.by_number[number]
            self.guard.send(Ended(number))
            self.guard.forget(number)
            self.note(EventName.INSTANCE_LEFT, f"{instance.kind} {instance.title} ended",
                      instance=number)  # fmt: skip
        else:
            self.guard.send(BarLocal([number], reason))
            self.note(EventName.INSTANCE_DIED, f"{instance.kind} {instance.title}: {reason}",
                      instance=number)  # fmt: skip
        self.step(InstanceEnded(number, clean, reason))
        self.on_instance_over(number, clean)
        self.signal()

    def put_out(self, instance: LocalInstance, reason: str) -> None:
        """The instance is over although its process runs: it is told."""
        if not instance.session.closed.is_set():
            instance.session.event("barred", {"reason": reason})
        self.end_instance(instance, clean=False, reason=reason)

    def _barred(self, numbers: list[InstanceNo], reason: str) -> None:
        self.note(EventName.BARRED, f"barred: {reason}", instances=list(numbers))
        whole = CLUSTERD in numbers
        local = self.instances.live()
        for instance in local if whole else [i for i in local if i.number in numbers]:
            self.put_out(instance, reason)
        if whole:
            self._end_life(f"this life was put out of the cluster: {reason}")

    def _end_life(self, reason: str) -> None:
        if not self._over:
            self._over = reason
            assert self.nursery is not None
            self.nursery.start_soon(self._restart)

    async def _restart(self) -> None:
        """Wait for the purge of all mounts, bounded, then start anew."""
        print(f"clusterd: {self._over}; starting anew", file=sys.stderr, flush=True)
        with trio.move_on_after(RESTART_WAIT_FACTOR * self.timing.dead_ms / 1000):
            while not all(n in self._purged for n in self.instances.by_number):
                await self.wait_changed()
        raise RestartNeeded(self._over, self.guard)

    # --- guard

    def _guard_said(self, message: FromGuard) -> None:
        match message:
            case Sighting():
                self.sighting = message
                self.links.note(boottime_ns(), message)
                self.step(message)
            case Vouched():
                self._acceptor.step(message)
            case PurgedLocal(number, reason):
                self._purged.add(number)
                self.note(EventName.INSTANCE_PURGED, f"instance {number} purged", instance=number)
                self.step(InstancesPurged([number]))
                self._forget_purged(number)
            case MountLost(number, reason):
                lost = self.instances.by_number.get(number)
                if lost is not None:
                    self.end_instance(lost, clean=False, reason=reason)
            case LeaseChanged(number, is_open):
                name = EventName.LEASE_RENEWED if is_open else EventName.LEASE_LAPSED
                self.note(name, f"instance {number}", instance=number)
            case WrongKey(peer):
                self._wrong_key(peer)
            case MountAttached(instance, connection, mountpoint):
                self.note(EventName.NOTE, f"mount {mountpoint} attached to the guard",
                          instance=instance.number, connection=connection)  # fmt: skip
            case _:
                pass
        self.signal()

    def _wrong_key(self, peer: int) -> None:
        self._repeated(peer, "uses another cluster key than this node")

    def _repeated(self, peer: int, what: str) -> None:
        """A problem with a peer that is told again and again while it lasts."""
        names = {int(node.id): node.name for node in self.state.nodes}
        names |= {int(server.id): server.name for server in self.state.servers}
        text = f"{names.get(peer, f'peer {peer}')} {what}"
        self.problem(f"{peer} {what}", text, 3 * WRONG_KEY_REPEAT_S * 1_000_000_000)

    def _forget_purged(self, number: InstanceNo) -> None:
        instance = self.instances.by_number.get(number)
        if instance is not None and instance.over:
            del self.instances.by_number[number]
            self.guard.send(Ended(number))
            self.guard.forget(number)


def restart_process(restart: RestartNeeded) -> None:
    """Replace this process by a new clusterd with the same arguments, after the guard's purge."""
    restart.guard.end()
    os.environ[LAST_LIFE] = str(restart)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError:
        traceback.print_exc()
        os._exit(1)
