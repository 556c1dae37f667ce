"""The block server of `fence_server` with bytes: connections, a page cache, a disk, flushes.

It keeps the rules of `service_io.py` and `flushes_io.py` of `gnbd/server` and those of the C
transmission: LOGIN closes and drains older generations of its path before it is answered, DRAIN
does so for another path and LOGOUT for all of the nexus, what waits on a connection that was shut
is discarded, one flush runs at a time, and when one has failed the cache generation rises and
everybody is cut off before another begins. It is more disorderly than they are: requests of one
connection execute beside each other.

The cache survives the end of the process. A power cut leaves of each block the durable version or
any later one. A process that is killed while it writes leaves any part of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from cluster.ids import Epoch, Instance
from fencing import admission as a
from fencing.reservations import READ, WRITE
from gnbd import messages as m
from gnbd import protocol as p
from tests.sim.fence_server import Server, View, Write, key_of
from tests.sim.streams import CLOSE, Pipe

if TYPE_CHECKING:
    from tests.sim.multipath_world import MultipathWorld

BLOCKS = 9
SWAPPED = BLOCKS
"""The block behind them is for COMPARE AND WRITE."""
WIDTH = 8
SIZE_BYTES = BLOCKS * WIDTH
STALE = 1 << 8
"""Access word of a nexus whose volume map is too old."""
CACHE_GENERATION_ERRORS = 1 << 16


class Hello(msgspec.Struct):
    """LOGIN."""

    nexus: Instance
    path: int
    generation: int
    sequence: int


class LoginAnswer(msgspec.Struct):
    status: int
    epoch: Epoch = Epoch(0)
    generation: int = 0
    cache_generation: int = 0


class Go(msgspec.Struct):
    """The client enters transmission."""


class GoAnswer(msgspec.Struct):
    size_bytes: int


class Reply(msgspec.Struct):
    cookie: int
    error: int
    data: bytes


class Call(msgspec.Struct):
    """A request as the client sends it. `required` and `sequence` are what it works with: for the
    judge, not for the server."""

    kind: int
    cookie: int
    offset: int
    length: int
    data: bytes
    flags: int
    required: Epoch
    sequence: int


class Job(Write, eq=False, kw_only=True):
    """A request at the server."""

    end: End
    call: Call
    error: int = 0
    result: bytes = b""

    @property
    def blocks(self) -> range:
        first = self.call.offset // WIDTH
        if self.call.kind == p.CMD_COMPARE_AND_WRITE:
            return range(first, first + 1)
        return range(first, first + self.call.length // WIDTH)


class End:
    """A connection as the server sees it."""

    def __init__(self, server: DataServer, pipe: Pipe) -> None:
        self.server, self.pipe = server, pipe
        self.nexus: Instance | None = None
        self.path = self.generation = 0
        self.closing = False
        pipe.up.receiver = self.receive

    def receive(self, message: object) -> None:
        if not self.closing:
            self.server.message(self, message)

    def send(self, message: object) -> None:
        if not self.closing:
            self.pipe.down.send(message)

    def shut(self) -> None:
        """What has not begun is discarded."""
        if not self.closing:
            self.closing = True
            self.pipe.server_closes()


class NexusPath(msgspec.Struct):
    generation: int = 0
    ends: list[End] = []


class Flush(msgspec.Struct, eq=False):
    """Who waits for the same flush. `end`: of the leader, told before it is cut."""

    end: End | None
    then: list[Callable[[bool], None]]


class DataServer(Server):
    """A block server with one export of a few blocks."""

    world: MultipathWorld
    QUEUE_MS, LATE_MS = 2, 120

    def __init__(self, world: MultipathWorld, name: int) -> None:
        self.cached = [0] * (BLOCKS + 1)
        self.stored = [0] * (BLOCKS + 1)
        self.dirty: list[list[int]] = [[] for _ in self.cached]
        self.refused: set[int] = set()
        """Pages that are not on the disk, and nobody will write them there."""
        self.host_up = True
        self.ends: list[End] = []
        super().__init__(world, name)

    # --- life

    def boot(self) -> None:
        self.host_up = True
        self.ends = []
        self.paths: dict[tuple[Instance, int], NexusPath] = {}
        self.sequences: dict[Instance, int] = {}
        self.flushing: Flush | None = None
        self.next_flush: Flush | None = None
        self.alone: Job | None = None
        """A COMPARE AND WRITE that executes, or waits for what does."""
        self.held: list[Job] = []
        super().boot()
        self.cache_generation = self.life * CACHE_GENERATION_ERRORS

    def crash(self) -> None:
        """The process is killed."""
        self.tear()
        for job in self.flying:
            assert isinstance(job, Job)
            if job.call.kind in (p.CMD_WRITE, p.CMD_WRITE_ZEROES):
                self.world.landed(self, job)
                self.put(job, partly=True)
        self.up = False
        for end in self.ends:
            if not end.closing:
                end.closing = True
                end.pipe.server_dies(silently=not self.host_up)

    def lose_power(self) -> None:
        """The host stops."""
        self.host_up = False
        if self.up:
            self.crash()
        self.lose_cache()

    def lose_cache(self) -> None:
        """What was not flushed is there or not."""
        self.drop_refused()
        for block in range(len(self.cached)):
            self.cached[block] = self.world.rng.choice([self.stored[block], *self.dirty[block]])
            self.stored[block] = self.cached[block]
            self.dirty[block] = []

    # --- connections

    def accept(self, pipe: Pipe) -> None:
        self.ends.append(End(self, pipe))

    def message(self, end: End, message: object) -> None:
        match message:
            case Hello():
                self.later(1, lambda: self.hello(end, message))
            case Go():
                end.send(GoAnswer(SIZE_BYTES))
            case Call() if end.nexus is not None:
                kind = message.kind
                private = kind in (p.CMD_DRAIN, p.CMD_SEQUENCE, p.CMD_PING, p.CMD_LOGOUT)
                job = Job(end.nexus, end.path, end=end, call=message,
                          need=READ if kind == p.CMD_READ else WRITE)  # fmt: skip
                if private:
                    late = self.world.rng.random() < 0.1
                    self.later(150 if late else 2, lambda: self.private(job))
                else:
                    self.receive(job)
            case _:  # what was received before it still executes
                assert message is CLOSE or end.nexus is None

    def locked(self, action: Callable[[], None]) -> None:
        """When nothing is being saved."""
        if self.busy:
            self.later(2, lambda: self.locked(action))
        else:
            action()

    def refusal(self, hello: Hello) -> LoginAnswer | None:
        self.tick()
        verdict = self.admission.verdict(hello.nexus)
        if verdict is a.Verdict.BARRED:
            return LoginAnswer(m.LOGIN_BARRED)
        if not self.admission.serving:
            return LoginAnswer(m.LOGIN_NOT_SERVING)
        if verdict is a.Verdict.UNKNOWN:
            return LoginAnswer(m.LOGIN_UNKNOWN)
        path = self.paths.get((hello.nexus, hello.path))
        if path is not None and hello.generation < path.generation:
            return LoginAnswer(m.LOGIN_OLD_GENERATION, generation=path.generation)
        return None

    def hello(self, end: End, hello: Hello) -> None:
        """Rule R6: answered when older generations of the path are drained."""
        if self.busy:
            self.later(2, lambda: self.hello(end, hello))
            return
        refused = self.refusal(hello)
        if refused is not None:
            end.send(refused)
            return
        self.world.asked(self, hello.nexus)
        table = self.table.copy()
        if table.hold_for_all(hello.nexus, key_of(hello.nexus)):
            self.change(table, lambda: self.bind(end, hello))
        else:
            self.bind(end, hello)

    def bind(self, end: End, hello: Hello) -> None:
        self.world.holds(self)
        nexus = hello.nexus
        self.sequences[nexus] = max(self.sequences.get(nexus, 0), hello.sequence)
        path = self.paths.setdefault((nexus, hello.path), NexusPath())
        path.generation = hello.generation
        victims = [old for old in path.ends if old.generation < hello.generation]
        path.ends.append(end)
        end.nexus, end.path, end.generation = nexus, hello.path, hello.generation
        self.refresh()
        self.expel(victims, lambda: self.granted(end, hello))

    def granted(self, end: End, hello: Hello) -> None:
        answer = self.refusal(hello) or LoginAnswer(
            m.LOGIN_OK, self.admission.drained_epoch, hello.generation, self.cache_generation
        )
        end.send(answer)

    def expel(self, victims: list[End], then: Callable[[], None]) -> None:
        """Cut them off; `then` when nothing of them executes any more."""
        for victim in victims:
            victim.shut()
        self.wait_for([job for job in self.flying if job.end in victims], then)

    def refresh(self) -> None:
        """Who may do nothing is cut off."""
        super().refresh()
        for nexus, word in self.words.items():
            if word and self.sequences.get(nexus, 0) < self.sequence_min:
                self.words[nexus] = STALE
        for end in self.ends:
            if end.nexus is not None and not self.word(end.nexus):
                end.shut()

    # --- private commands

    def private(self, job: Job) -> None:
        end, call = job.end, job.call
        if end.closing:
            return
        match call.kind:
            case p.CMD_DRAIN:
                self.locked(lambda: self.drain_path(job, call.length, call.offset))
            case p.CMD_SEQUENCE:
                self.locked(lambda: self.declare(job))
            case p.CMD_LOGOUT:
                self.locked(lambda: self.log_out(job))
            case _:
                end.send(Reply(call.cookie, 0, p.SIZE.pack(SIZE_BYTES)))

    def declare(self, job: Job) -> None:
        self.sequences[job.nexus] = job.call.offset
        self.refresh()
        job.end.send(Reply(job.call.cookie, 0, b""))

    def log_out(self, job: Job) -> None:
        """The registration goes, not durably; what has not begun of its own connection, too, is
        discarded."""
        if job.end.closing:
            return
        mine = [end for end in self.ends if end.nexus == job.nexus]
        self.table.drop({job.nexus})
        self.sequences.pop(job.nexus, None)
        job.end.closing = True
        self.refresh()

        def answer() -> None:
            job.end.pipe.down.send(Reply(job.call.cookie, 0, b""))
            job.end.pipe.server_closes()

        self.expel(mine, answer)

    def drain_path(self, job: Job, path_id: int, generation: int) -> None:
        """Nothing sent there up to that generation executes after the answer."""
        if path_id == job.end.path and generation >= job.end.generation:
            job.end.send(Reply(job.call.cookie, p.EINVAL, b""))
            return
        path = self.paths.setdefault((job.nexus, path_id), NexusPath())
        path.generation = max(path.generation, generation + 1)
        victims = self.drained_ends(path, generation)
        self.expel(victims, lambda: job.end.send(Reply(job.call.cookie, 0, b"")))

    def drained_ends(self, path: NexusPath, generation: int) -> list[End]:
        return [end for end in path.ends if end.generation <= generation]

    # --- data

    def execute(self, write: Write) -> None:
        assert isinstance(write, Job)
        if write.end.closing:
            self.not_alone(write)
        elif self.may_enter(write):
            super().execute(write)

    def may_enter(self, job: Job) -> bool:
        """COMPARE AND WRITE waits until nothing executes, and meanwhile nothing else begins."""
        if self.alone is job:
            return True
        if self.alone is not None:
            self.held.append(job)
            return False
        if job.call.kind != p.CMD_COMPARE_AND_WRITE:
            return True
        self.alone = job
        self.wait_for(self.flying, lambda: self.execute(job))
        return False

    def not_alone(self, job: Job) -> None:
        """This one has ended."""
        if self.alone is job:
            self.alone = None
            held, self.held = self.held, []
            for other in held:
                self.later(1, partial(self.execute, other))

    def rejected(self, write: Write) -> None:
        assert isinstance(write, Job)
        self.not_alone(write)
        error = p.ESTALE if self.word(write.nexus) == STALE else p.EPERM
        write.end.send(Reply(write.call.cookie, error, b""))

    def begin(self, write: Write) -> None:
        assert isinstance(write, Job)
        if write.call.kind == p.CMD_COMPARE_AND_WRITE:
            same = self.cached[SWAPPED].to_bytes(WIDTH, "big") == write.call.data[:WIDTH]
            write.error = 0 if same else p.EMISCOMPARE
        if write.call.kind == p.CMD_FLUSH:
            self.flush(write.end, lambda good: self.flushed(write, good))
        else:
            slow = self.world.rng.random() < 0.1
            self.later(80 if slow else 2, lambda: self.land(write))

    def flushed(self, job: Job, good: bool) -> None:
        job.error = 0 if good else p.EIO
        if job in self.flying:
            self.land(job)

    def effect(self, write: Write) -> None:
        assert isinstance(write, Job)
        self.world.landed(self, write)
        call = write.call
        match call.kind:
            case p.CMD_READ:
                values = [self.cached[block] for block in write.blocks]
                write.result = b"".join(value.to_bytes(WIDTH, "big") for value in values)
            case p.CMD_COMPARE_AND_WRITE:
                self.not_alone(write)
                if not write.error:
                    self.put(write)
            case p.CMD_WRITE | p.CMD_WRITE_ZEROES:
                if self.world.disk_fails():
                    self.put(write, partly=True)
                    write.error = p.EIO
                else:
                    self.put(write)
        durable = bool(call.flags & p.CMD_FLAG_FUA)
        if durable and write.error == p.EIO:
            self.lose_dirty()
            self.cut_off(write.end)
        write.end.send(Reply(call.cookie, write.error, write.result))
        if write.error == p.EIO and (durable or call.kind == p.CMD_FLUSH):
            write.end.shut()

    def put(self, job: Job, partly: bool = False) -> None:
        """The bytes go into the cache; durable ones to the disk as well."""
        call = job.call
        for index, block in enumerate(job.blocks):
            if partly and self.world.rng.random() < 0.5:
                continue
            data = call.data[WIDTH:] if call.kind == p.CMD_COMPARE_AND_WRITE else call.data
            value = int.from_bytes(data[index * WIDTH : (index + 1) * WIDTH], "big")
            if block < BLOCKS:
                self.world.judge.lands(self.name, block, value, job.nexus)
            self.cached[block] = value
            self.dirty[block].append(value)
            self.refused.discard(block)
            if call.flags & p.CMD_FLAG_FUA and not partly:
                self.stored[block] = value
                self.dirty[block] = []

    # --- flushes

    def flush(self, end: End | None, then: Callable[[bool], None]) -> None:
        """One at a time; who comes meanwhile shares the next one."""
        if self.flushing is None:
            self.flushing = Flush(end, [then])
            self.begin_flush()
        elif self.next_flush is None:
            self.next_flush = Flush(end, [then])
        else:
            self.next_flush.then.append(then)

    def begin_flush(self) -> None:
        marks = [(list(versions), value) for versions, value in
                 zip(self.dirty, self.cached, strict=True)]  # fmt: skip
        self.later(15, lambda: self.end_flush(marks))

    def end_flush(self, marks: list[tuple[list[int], int]]) -> None:
        flush = self.flushing
        assert flush is not None
        good = not self.world.flush_fails()
        if good:
            for block, (versions, value) in enumerate(marks):
                if versions and self.dirty[block][: len(versions)] == versions:
                    self.stored[block] = value
                    del self.dirty[block][: len(versions)]
        else:
            self.lose_dirty()
            self.cut_off(flush.end)
        self.flushing, self.next_flush = self.next_flush, None
        if self.flushing is not None:
            self.begin_flush()
        for then in flush.then:
            then(good)

    def lose_dirty(self) -> None:
        """The kernel could not write some pages, and believes that they are on the disk."""
        for block in range(len(self.cached)):
            if self.dirty[block]:
                if self.world.rng.random() < 0.5:
                    self.refused.add(block)
                else:
                    self.stored[block] = self.cached[block]
                self.dirty[block] = []
        self.drop_refused()

    def drop_refused(self) -> None:
        """They are read from the disk again."""
        for block in self.refused:
            self.cached[block] = self.stored[block]
        self.refused = set()

    def cut_off(self, own: End | None) -> None:
        """Acknowledged writes may be lost: all clients log in anew and see it."""
        self.cache_generation += 1
        for end in self.ends:
            if end.nexus is not None and end is not own:
                end.shut()

    # --- installs

    def drained(self, view: View, epoch: Epoch) -> Callable[[], None]:
        """What the barred wrote is durable before the answer."""

        def flushed(good: bool) -> None:
            if good:
                self.perform(view, a.Drained(epoch))
            else:
                self.busy = False

        return lambda: self.flush(None, flushed)

    # --- sequence numbers

    def raise_minimum(self, sequence: int) -> None:
        """Nothing of who works with an older map executes after the answer."""
        self.locked(lambda: self.raise_now(sequence))

    def raise_now(self, sequence: int) -> None:
        if sequence <= self.sequence_min:
            return
        self.sequence_min = sequence

        def in_force() -> None:
            self.drain(lambda: self.world.raised(self, sequence))

        self.change(self.table.copy(), in_force)
