"""A block server of the simulation that executes late, dies and comes back, with one export.

The real cores (`fencing.admission`, `fencing.reservations`, `fencing.store`) run in what does what
`gnbd/server/service_io.py` does: a request waits in a queue, its access is looked at when it begins
to execute, it is in flight for a while, then it changes the disk. Saving takes time and a crash may
come before it is done. `FenceWorld` uses it as it is; `multipath_server` puts bytes, connections
and a page cache on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import msgspec

from cluster.control import MemberInfo
from cluster.errors import CorruptionError
from cluster.ids import Epoch, Incarnation, Instance, NodeId
from fencing import admission as a
from fencing import store
from fencing.reservations import WRITE, Request, Reservations, ServiceAction, Status
from tests.sim.world import Violation

if TYPE_CHECKING:
    from tests.sim.fence_world import FenceWorld

DEAD_MS = 400
ALL_REGISTRANTS = 7


class Write(msgspec.Struct):
    """A write on its way. `word` is what the access was when it came in."""

    nexus: Instance
    path: int
    word: int = 0
    need: int = WRITE


class View(msgspec.Struct, frozen=True):
    """A decided view."""

    epoch: Epoch
    members: list[MemberInfo]
    tombstones: dict[NodeId, Incarnation]


def key_of(nexus: Instance) -> int:
    """Every nexus has a key of its own."""
    return nexus.node << 32 | nexus.incarnation << 16 | nexus.number + 1


class Server:
    """A block server with one export."""

    QUEUE_MS, LATE_MS = 8, 300
    """How long requests wait, and some of them."""

    def __init__(self, world: FenceWorld, name: int) -> None:
        self.world, self.name = world, name
        self.disk = bytearray(store.encode_file(store.encode_state(store.ServerState()))[0])
        self.cache: dict[int, bytes] = {}
        """Sectors that only its host's kernel has: a killed life had not made them durable."""
        self.life = 0
        self.up = False
        self.boot()

    # --- life

    def load(self) -> store.ServerState:
        """What a start finds."""
        data = bytearray(self.disk)
        for at, sector in self.cache.items():
            data[at : at + store.SECTOR_BYTES] = sector
        try:
            state, self.place = store.decode_file_untrusted(bytes(data))
        except CorruptionError as error:
            raise Violation(f"s{self.name} cannot start: {error}") from error
        return state

    def settle(self) -> None:
        """A start makes what it has found durable, before it writes or answers anything."""
        for at, sector in self.cache.items():
            self.disk[at : at + store.SECTOR_BYTES] = sector
        self.cache.clear()

    def boot(self) -> None:
        """A new life begins."""
        state = self.load()
        self.settle()
        self.saving = b""
        self.has_saved = False
        self.life += 1
        self.up = True
        export = state.exports.get("disk", store.ExportState())
        self.table = Reservations(export.reservations)
        self.admission = a.Admission(state.record, self.world.now)
        self.flying: list[Write] = []
        self.words: dict[Instance, int] = {}
        self.waiting: list[tuple[list[Write], Callable[[], None]]] = []
        self.opened = False
        self.busy = False
        self.sequence_min = export.sequence_min

    def crash(self) -> None:
        """What is in flight may still land, at once. A kill, or a power cut."""
        if self.world.rng.random() < 0.5:
            self.leave()
        else:
            self.tear()
            self.cut_power()
        for write in self.flying:
            if self.world.rng.random() < 0.5:
                self.effect(write)
        self.up = False

    def leave(self) -> None:
        """The first sectors of a state that is being saved are in the cache, mostly all of them."""
        sectors = len(self.saving) // store.SECTOR_BYTES
        if self.world.rng.random() < 0.3:
            sectors = self.world.rng.randrange(sectors + 1)
        for at in range(0, sectors * store.SECTOR_BYTES, store.SECTOR_BYTES):
            sector = self.saving[at : at + store.SECTOR_BYTES]
            self.cache[self.place.offset + at] = sector

    def tear(self) -> None:
        """Any sectors of a state that is being saved are on the disk."""
        for at in range(0, len(self.saving), store.SECTOR_BYTES):
            if self.world.rng.random() < 0.5:
                self.write(self.saving, at)

    def cut_power(self) -> None:
        """Any sectors of what is in the cache are on the disk; the others are gone."""
        for at, sector in self.cache.items():
            if self.world.rng.random() < 0.5:
                self.disk[at : at + store.SECTOR_BYTES] = sector
        self.cache.clear()

    def later(self, mean_ms: float, action: Callable[[], None]) -> None:
        """In this life."""
        life = self.life
        self.world.later(mean_ms, lambda: action() if self.up and self.life == life else None)

    def save(self, record: a.InstallRecord | None, table: Reservations,
             then: Callable[[], None]) -> None:  # fmt: skip
        """Durable, then `then`."""
        export = store.ExportState(table.stored_state(), self.sequence_min)
        payload = store.encode_state(store.ServerState(self.life, record, {"disk": export}))
        data = store.encode_slot(payload, self.place)
        assert data is not None
        assert not self.saving
        self.saving = data

        def done() -> None:
            for at in range(0, len(data), store.SECTOR_BYTES):
                self.write(data, at)
            self.saving = b""
            self.place = self.place.after()
            then()

        self.later(4, done)
        self.world.saving(self)
        self.has_saved = True

    def write(self, data: bytes, at: int) -> None:
        """One sector of a state reaches the disk."""
        to = self.place.offset + at
        self.disk[to : to + store.SECTOR_BYTES] = data[at : at + store.SECTOR_BYTES]
        self.cache.pop(to, None)

    # --- requests

    def word(self, nexus: Instance) -> int:
        """The access of a nexus now."""
        return self.words.get(nexus, 0)

    def refresh(self) -> None:
        """Store the access words anew."""
        self.words = {
            nexus: self.table.access(nexus)
            for nexus in self.world.everybody
            if self.admission.serving and self.admission.verdict(nexus) is a.Verdict.ADMITTED
        }

    def receive(self, write: Write) -> None:
        """It waits in the queue of its connection."""
        write.word = self.word(write.nexus)
        mean_ms = self.LATE_MS if self.world.rng.random() < 0.1 else self.QUEUE_MS
        self.later(mean_ms, lambda: self.execute(write))

    def access(self, write: Write) -> int:
        """Rule R5: as it is when the request executes."""
        return self.word(write.nexus)

    def execute(self, write: Write) -> None:
        """In, look, act, out."""
        self.tick()
        if not self.access(write) & write.need:
            self.rejected(write)
            return
        self.world.executes(self, write)
        self.flying.append(write)
        self.begin(write)

    def rejected(self, write: Write) -> None:
        """It may not (for subclasses)."""

    def begin(self, write: Write) -> None:
        """It is in flight for a while."""
        self.later(25, lambda: self.land(write))

    def effect(self, write: Write) -> None:
        """It changes the disk."""
        self.world.landed(self, write)

    def land(self, write: Write) -> None:
        """It takes effect and leaves."""
        self.effect(write)
        self.flying.remove(write)
        for writes, then in list(self.waiting):
            if write in writes:
                writes.remove(write)
            if not writes:
                self.waiting.remove((writes, then))
                then()

    def drain(self, then: Callable[[], None]) -> None:
        """`then` when nothing of whom has no access any more is in flight."""
        self.wait_for(self.revoked(), then)

    def wait_for(self, writes: Iterable[Write], then: Callable[[], None]) -> None:
        """`then` when these are not in flight any more."""
        writes = list(writes)
        if writes:
            self.waiting.append((writes, then))
        else:
            then()

    def revoked(self) -> list[Write]:
        """What a drain waits for."""
        return [write for write in self.flying if not self.word(write.nexus) & write.need]

    # --- installs

    def heard(self, node: int, incarnation: int) -> None:
        """Any authenticated message."""
        self.admission.step(self.world.now, a.Heard(NodeId(node), Incarnation(incarnation)))

    def tick(self) -> None:
        """Rule R3's second line."""
        if self.admission.step(self.world.now, a.Tick()):
            self.refresh()

    def install(self, sender: tuple[int, int], view: View) -> None:
        """From a coordinator; one at a time, it asks again."""
        self.heard(*sender)
        if self.busy:
            return
        event = a.InstallRequested(
            NodeId(sender[0]), Incarnation(sender[1]), view.epoch, view.members, view.tombstones,
            DEAD_MS,
        )  # fmt: skip
        self.perform(view, event)

    def perform(self, view: View, event: a.Event) -> None:
        """Carry out what the core asks for, in order."""
        for action in self.admission.step(self.world.now, event):
            match action:
                case a.Persist(record):
                    self.busy = True
                    table = self.table.copy()
                    table.drop(
                        {n for n in table.keys if a.verdict_of(record, n) is not a.Verdict.ADMITTED}
                    )
                    self.save(record, table, self.persisted(view, record, table))
                case a.Revoke(epoch):
                    self.refresh()
                    self.drain(self.drained(view, epoch))
                case a.Answer():
                    self.refresh()
                    self.busy = False
                    self.opened = True
                    self.world.installed(self, view)
                case a.Refuse():
                    self.world.refused += 1
        self.admission.check()

    def persisted(
        self, view: View, record: a.InstallRecord, table: Reservations
    ) -> Callable[[], None]:
        def done() -> None:
            self.table = table
            self.perform(view, a.Persisted(record))

        return done

    def drained(self, view: View, epoch: Epoch) -> Callable[[], None]:
        return lambda: self.perform(view, a.Drained(epoch))

    # --- reservations

    def may_register(self, nexus: Instance) -> bool:
        """A barred instance is registered nowhere."""
        return self.admission.serving and self.admission.verdict(nexus) is a.Verdict.ADMITTED

    def login(self, nexus: Instance) -> None:
        """Registers, and holds the export for all registrants."""
        self.tick()
        if not self.may_register(nexus) or self.busy:
            return
        self.world.asked(self, nexus)
        table = self.table.copy()
        table.hold_for_all(nexus, key_of(nexus))
        self.change(table, lambda: self.world.holds(self))

    def preempt(self, nexus: Instance, victim: Instance) -> None:
        """PREEMPT AND ABORT."""
        self.tick()
        if not self.may_register(nexus) or self.busy:
            return
        table = self.table.copy()
        action = int(ServiceAction.PREEMPT_AND_ABORT)
        outcome = table.execute(
            Request(nexus, action, key_of(nexus), key_of(victim), ALL_REGISTRANTS)
        )
        if outcome.status is not Status.GOOD:
            return

        serial = self.world.serial()

        def answer() -> None:
            self.world.preempted(self, victim, serial)

        def in_force() -> None:
            self.world.removes(self, victim, serial)
            (self.drain if outcome.drain else lambda then: then())(answer)

        self.change(table, in_force)

    def change(self, table: Reservations, then: Callable[[], None]) -> None:
        """Durable, in force, and then `then`."""
        self.busy = True

        def done() -> None:
            self.table = table
            self.busy = False
            self.refresh()
            then()

        self.save(self.admission.record, table, done)
