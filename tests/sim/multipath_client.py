"""Instances that use disks over several paths: the real `ClientCore` in a shell as `client_io` is.

Which lane takes a request is drawn: no rule may rest on that choice. An instance writes and reads
only blocks whose lock it has; before a lock goes everything in its block is durable, by a FLUSH or
because the last write was a durable one.

A write whose caller was cancelled, or which was given up (some devices wait for so long only), may
land or not, until a later write to its block has been told: until then the lock stays. Now and then
all writers of a device are cancelled and it is closed, and opened anew: once LOGOUT is answered
nothing of the old one lands, and the locks go.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster.errors import DeviceError, StackError, UnreachableError
from cluster.ids import Instance
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.client.core import ClientCore
from gnbd.client.failures import Patience
from gnbd.client.lanes import Lane, Path, Request
from tests.sim.multipath_judge import Cell
from tests.sim.multipath_server import (
    BLOCKS,
    WIDTH,
    Call,
    DataServer,
    Go,
    GoAnswer,
    Hello,
    LoginAnswer,
    Reply,
)
from tests.sim.multipath_swaps import CoreSwapper, Swapper
from tests.sim.streams import CLOSE, Pipe
from tests.sim.world import MS, Violation

if TYPE_CHECKING:
    from tests.sim.multipath_world import MultipathWorld

PATHS = 2
PATH_MS = 80
GIVE_UP_MS = 150
RETRY_MS = 25
FLYING_MAX = 24


class AnyLane:
    """A `gnbd.client.path_choice.Ranking` without an order."""

    probe = None

    def __init__(self, lanes: list[Lane], world: MultipathWorld) -> None:
        self.lanes, self.world = lanes, world

    def first(self) -> Lane:
        return self.world.rng.choice(self.lanes)

    def choose(self, _length_bytes: int) -> Lane | None:
        free = [lane for lane in self.lanes if lane.has_room()]
        return self.world.rng.choice(free) if free else None


class Core(ClientCore):
    """With any lane that has room, now and then with the one that is best."""

    world: MultipathWorld

    def _ranking(self, request: Request, now_ns: int) -> Any:
        if self.world.rng.random() < 0.2:
            return super()._ranking(request, now_ns)
        return AnyLane([lane for path in self.paths for lane in path.lanes], self.world)


class Line:
    """One path of a device: its connections, and which attempt they belong to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempt = 0
        self.pipes: list[Pipe] = []
        self.wanted = 1
        self.granted: LoginAnswer | None = None


class Done:
    """A waiter that calls."""

    def __init__(self, call: Callable[[StackError | None], None]) -> None:
        self.done = call


class Device:
    """One server as one instance sees it."""

    def __init__(self, client: Client, server: DataServer) -> None:
        self.client, self.server = client, server
        self.world = client.world
        self.core = Core(PATHS, self.world.now)
        self.core.world = self.world
        self.lines = [Line(path) for path in self.core.paths]
        self.pipe_of: dict[Lane, Pipe] = {}
        self.declared = self.world.sequence
        """The map it works with."""
        limited = self.world.rng.random() < 0.3
        self.patience = Patience(GIVE_UP_MS * MS) if limited else None
        self.leaves_by: Lane | None = None
        """LOGOUT is on its way there."""
        for line in self.lines:
            self.world.later(5, self.attempting(line, 0))

    @property
    def declared_at_login(self) -> int:
        return self.declared

    @property
    def is_in_doubt(self) -> bool:
        """Something is under way for which nobody waits; a new map does (as `cvm/target_io.py`)."""
        return bool(self.core.failed or self.core._forsaken)

    # --- requests

    def submit(self, request: Request) -> None:
        """Raises BarredError, UnreachableError."""
        self.core.submit(request)
        lane = self.core.assign_one(self.world.now)
        if lane is None:
            self.pump()
        else:
            self.post(lane, request)

    def pump(self) -> None:
        for drain in self.core.drains():
            waiter = Done(self.drained(drain.path, drain.generation))
            request = Request(p.CMD_DRAIN, drain.generation, drain.path.index, waiter=waiter)
            self.core.place_private(drain.lane, request)
            self.post(drain.lane, request)
        for lane, request in self.core.assign(self.world.now):
            self.post(lane, request)
        self.core.check()

    def drained(self, path: Path, generation: int) -> Callable[[StackError | None], None]:
        def done(error: StackError | None) -> None:
            if error is None:
                self.core.drained(path, generation)

        return done

    def post(self, lane: Lane, request: Request) -> None:
        data = b"" if request.data is None else bytes(request.data)
        own = request.round or request.kind == p.CMD_FLUSH  # may be under way while it declares
        call = Call(
            request.kind, request.cookie, request.offset, request.length, data, request.flags,
            self.core.required, p.SEQUENCE_MAX if own else self.declared,
        )  # fmt: skip
        self.pipe_of[lane].up.send(call)

    def ping(self, lane: Lane) -> None:
        request = Request(p.CMD_PING, length=p.SIZE.size)
        self.core.place_private(lane, request)
        self.post(lane, request)

    # --- paths

    def attempting(self, line: Line, attempt: int) -> Callable[[], None]:
        def begin() -> None:
            if line.attempt == attempt and self.client.alive and self.core.barred is None:
                self.connect(line)

        return begin

    def connect(self, line: Line) -> None:
        """The next connection of a path."""
        server = self.server
        pipe = self.world.connect(self.client.nexus.node, server, line.path.index)
        if pipe is None:
            self.lose(line)
            return
        line.pipes.append(pipe)
        pipe.down.receiver = lambda message: self.receive(line, pipe, message)
        pipe.up.send(
            Hello(self.client.nexus, line.path.index, line.path.generation, self.declared_at_login)
        )

    def receive(self, line: Line, pipe: Pipe, message: object) -> None:
        if not self.client.alive:
            return
        match message:
            case LoginAnswer():
                self.login_answer(line, pipe, message)
            case GoAnswer(size_bytes):
                self.entered(line, pipe, size_bytes)
            case Reply():
                lane = next(lane for lane, of in self.pipe_of.items() if of is pipe)
                request = lane.in_flight[message.cookie]
                request.result = message.data
                self.core.completed(lane, message.cookie, message.error, self.world.now)
                if self.client.devices[self.server.name] is self:
                    self.pump()
            case _:
                assert message is CLOSE
                self.lose(line)

    def login_answer(self, line: Line, pipe: Pipe, answer: LoginAnswer) -> None:
        match answer.status:
            case m.LOGIN_OK:
                line.granted = answer
                pipe.up.send(Go())
                return
            case m.LOGIN_BARRED:
                self.core.bar("barred")
                self.client.barred()
            case m.LOGIN_OLD_GENERATION:
                self.core.generation_floor(line.path, answer.generation)
        self.lose(line)

    def entered(self, line: Line, pipe: Pipe, size_bytes: int) -> None:
        answer = line.granted
        assert answer is not None
        try:
            cut = self.core.logged_in(line.path, answer.epoch, answer.cache_generation, size_bytes)
        except StackError:
            self.lose(line)
            return
        for other in cut:
            self.lose(self.lines[other.index])
        self.pipe_of[self.core.lane_up(line.path, self.world.now)] = pipe
        if len(line.pipes) < line.wanted:
            self.connect(line)
        self.pump()

    def lose(self, line: Line) -> None:
        """The path ends; another attempt follows."""
        line.attempt += 1
        line.wanted = self.world.rng.choice((1, 2))
        for lane in line.path.lanes:
            del self.pipe_of[lane]
            if lane is self.leaves_by:
                self.leaves_by = None
        for pipe in line.pipes:
            pipe.client_closes()
        line.pipes = []
        self.core.path_lost(line.path, self.world.now)
        if self.client.alive:
            self.world.later(RETRY_MS, self.attempting(line, line.attempt))
            self.pump()

    def log_out(self) -> None:
        """As `GnbdDevice.aclose`. It may get no answer: then the device is used as before."""
        lane = next((lane for line in self.lines for lane in line.path.lanes), None)
        if lane is not None and self.leaves_by is None:
            self.leaves_by = lane
            request = Request(p.CMD_LOGOUT, waiter=Done(lambda _error: self.close()))
            self.core.place_private(lane, request)
            self.post(lane, request)

    def close(self) -> None:
        for line in self.lines:
            line.attempt += 1
            for pipe in line.pipes:
                pipe.client_closes()
        self.client.closed(self)

    def check_paths(self) -> None:
        """Give up what has been silent for so long; ask now and then."""
        if self.patience and self.patience.look(self.world.now, *self.core.waiting()):
            for line in self.lines:
                if line.path.lanes:
                    self.lose(line)
            self.core.fail("not served")
            self.world.given_up += 1
        self.core.look(self.world.now)
        self.pump()
        for line in self.lines:
            silent = any(pipe.silence_ms() > PATH_MS for pipe in line.pipes)
            if silent or (self.world.faults and self.world.rng.random() < 0.01):
                self.lose(line)
            for lane in line.path.lanes:
                if self.world.rng.random() < 0.1:
                    self.ping(lane)


class Client:
    """One process of one node."""

    def __init__(self, world: MultipathWorld, nexus: Instance) -> None:
        self.world, self.nexus = world, nexus
        self.alive = True
        self.out = False
        """No member any more; it may not know that."""
        self.devices = {server.name: Device(self, server) for server in world.data_servers}
        self.swappers = [Swapper(self, device) for device in self.devices.values()]
        self.core_swappers = {name: CoreSwapper(self, name) for name in self.devices}
        self.writes: dict[Request, tuple[int, list[Cell]]] = {}
        """Of `flying`: server and blocks."""
        self.doubtful: set[Cell] = set()
        """Has a write that nobody waits for any more, and no later one that was told."""
        self.closing: Device | None = None
        self.busy: dict[Cell, int] = {}
        self.flying: dict[Request, int] = {}
        """Since when each is waited for."""
        self.told: dict[Cell, int] = {}
        """The place of what it was told of last in each block."""
        self.suspended = False
        """Finishes what it has begun, for a new map of the volume."""
        world.later(10, self.act)
        world.later(20, self.look)

    def look(self) -> None:
        """Its timers."""
        if self.alive:
            for device in self.devices.values():
                device.check_paths()
            self.world.later(20, self.look)

    def die(self) -> None:
        """The process is killed; its kernel closes what it had, or its power goes."""
        self.alive = False
        closes = self.world.rng.random() < 0.5
        for device in self.devices.values():
            for line in device.lines:
                for pipe in line.pipes:
                    pipe.down.receiver = None
                    if closes:
                        pipe.client_closes()

    def barred(self) -> None:
        """A server says that this is the end."""
        if not self.out:
            raise Violation(f"{self.nexus} is barred although it is a member")
        self.alive = False

    # --- what it does

    def act(self) -> None:
        if not self.alive:
            return
        rng = self.world.rng
        name = rng.choice(list(self.devices))
        deed = rng.choices(
            (self.lock, self.release, self.write, self.read, self.flush, self.cancel, self.swap,
             self.close), (6, 3, 10, 6, 0.5, 0.5, 1, 0.2),
        )[0]  # fmt: skip
        if self.closing:
            self.go_on_closing(self.closing)
        elif self.suspended:
            self.resume()
        elif len(self.flying) < FLYING_MAX and not self.devices[name].core.failed:
            deed(name)
        self.world.later(4, self.act)

    def mine(self, name: int) -> list[int]:
        """Blocks whose lock it has."""
        cells = self.world.judge.cells
        return [b for b in range(BLOCKS) if cells[name, b].owner == self.nexus]

    def lock(self, name: int) -> None:
        """Take a lock that is free. Who was put out is not waited for: rule R3 is enough."""
        cells = self.world.judge.cells
        free = [b for b in range(BLOCKS) if cells[name, b].owner is None]
        if self.out or not free:
            return
        cell = cells[name, self.world.rng.choice(free)]
        self.devices[name].core.set_epoch(self.world.views[-1].epoch)
        cell.owner = self.nexus

    def release(self, name: int) -> None:
        """Give a lock back."""
        for block in self.mine(name):
            cell = self.world.judge.cells[name, block]
            free = cell not in self.busy and cell not in self.doubtful
            if free and cell.unflushed is None and not cell.contested:
                cell.owner = None
                self.told.pop(cell, None)
                return

    def some(self, name: int) -> range:
        """Neighbouring blocks that are its own and idle."""
        cells = self.world.judge.cells
        free = [b for b in self.mine(name) if cells[name, b] not in self.busy]
        if not free:
            return range(0)
        first = last = self.world.rng.choice(free)
        while last + 1 in free and last - first < 2 and self.world.rng.random() < 0.5:
            last += 1
        return range(first, last + 1)

    def submit(
        self, name: int, request: Request, done: Callable[[StackError | None], None]
    ) -> None:
        device = self.devices[name]
        sequence = device.declared

        def over(error: StackError | None) -> None:
            del self.flying[request]
            self.writes.pop(request, None)
            stale = error is not None and "volume map" in str(error)
            if stale and sequence >= self.world.minimum:
                raise Violation(f"{self.nexus} is called stale with sequence {sequence}")
            if error is not None and "reservation conflict" in str(error):
                raise Violation(f"{self.nexus}: {error}")
            done(error)

        self.flying[request] = self.world.now
        request.waiter = Done(over)
        device.submit(request)

    def write(self, name: int) -> None:
        blocks = self.some(name)
        if not blocks:
            return
        rng = self.world.rng
        cells = [self.world.judge.cells[name, block] for block in blocks]
        zeroes, durable = rng.random() < 0.1, rng.random() < 0.35
        values = [0 if zeroes else self.world.value() for _ in blocks]
        places = [cell.submitted(value) for cell, value in zip(cells, values, strict=True)]
        self.busy.update(zip(cells, places, strict=True))

        def done(error: StackError | None) -> None:
            for cell, place in zip(cells, places, strict=True):
                del self.busy[cell]
                if error is None:
                    self.wrote(name, cell, place, durable)
                elif isinstance(error, DeviceError):
                    self.world.errors += 1
                elif isinstance(error, UnreachableError):
                    self.doubtful.add(cell)

        data = b"".join(value.to_bytes(WIDTH, "big") for value in values)
        kind = p.CMD_WRITE_ZEROES if zeroes else p.CMD_WRITE
        flags = p.CMD_FLAG_FUA if durable else 0
        request = Request(kind, blocks[0] * WIDTH, len(data), None if zeroes else data, flags)
        self.writes[request] = name, cells
        self.submit(name, request, done)

    def cancel(self, name: int) -> None:
        """The caller of a write goes on with something else."""
        found = [request for request, (server, _) in self.writes.items() if server == name]
        if found:
            self.forsake(name, self.world.rng.choice(found))

    def forsake(self, name: int, request: Request) -> None:
        self.devices[name].core.forsake(request)
        del self.flying[request]
        _, cells = self.writes.pop(request)
        for cell in cells:
            del self.busy[cell]
            self.doubtful.add(cell)
        self.world.cancelled += 1

    def close(self, name: int) -> None:
        """No more requests of this client, until the device is open again."""
        self.closing = self.devices[name]
        self.flush(name)
        for request in [r for r, (server, _) in self.writes.items() if server == name]:
            self.forsake(name, request)

    def go_on_closing(self, device: Device) -> None:
        name = device.server.name
        cells = [self.world.judge.cells[name, block] for block in self.mine(name)]
        if device.leaves_by is not None or self.flying:
            return
        if self.out or device.core.failed or any(cell.unflushed is not None for cell in cells):
            self.closing = None
            return
        device.log_out()
        if device.leaves_by is None:
            self.closing = None

    def closed(self, device: Device) -> None:
        """LOGOUT was answered."""
        self.closing = None
        self.world.closed += 1
        name = device.server.name
        for block in self.mine(name):
            cell = self.world.judge.cells[name, block]
            if not cell.contested:
                cell.owner = None
                self.doubtful.discard(cell)
                self.told.pop(cell, None)
        fresh = self.devices[name] = Device(self, device.server)
        fresh.core.set_epoch(device.core.required)
        fresh.declared = device.declared

    def swap(self, name: int) -> None:
        self.core_swappers[name].go_on()

    def wrote(self, name: int, cell: Cell, place: int, durable: bool) -> None:
        cell.told(self.nexus, place, durable)
        self.doubtful.discard(cell)
        self.told[cell] = place
        if durable:
            self.world.is_stored(cell, place, f"{self.nexus} after a durable write")

    def read(self, name: int) -> None:
        blocks = self.some(name)
        if not blocks:
            return
        cells = [self.world.judge.cells[name, block] for block in blocks]
        begun = [len(cell.values) for cell in cells]
        allowed = [cell.reading() for cell in cells]
        request = Request(p.CMD_READ, blocks[0] * WIDTH, len(blocks) * WIDTH)

        def done(error: StackError | None) -> None:
            for index, cell in enumerate(cells):
                if error is not None:
                    cell.abandon(allowed[index])
                    continue
                part = request.result[index * WIDTH : (index + 1) * WIDTH]
                idle = len(cell.values) == begun[index] and cell not in self.doubtful
                cell.read(self.nexus, allowed[index], int.from_bytes(part, "big"), idle)
                self.world.reads += 1

        self.submit(name, request, done)

    def flush(self, name: int) -> None:
        cells = [self.world.judge.cells[name, block] for block in range(BLOCKS)]
        before = {cell: self.told[cell] for cell in cells if cell in self.told}

        def done(error: StackError | None) -> None:
            if error is not None:
                return
            self.world.flushes += 1
            for cell, place in before.items():
                cell.flushed(self.nexus, place)
                self.world.is_stored(cell, place, f"{self.nexus} after a flush")

        self.submit(name, Request(p.CMD_FLUSH), done)

    def resume(self) -> None:
        """Work with the newest map from now on. The answers are waited for, or not: a server may
        be away for long."""
        if self.flying or any(device.is_in_doubt for device in self.devices.values()):
            return
        self.suspended = False
        for name, device in self.devices.items():
            device.declared = self.world.sequence
            request = Request(p.CMD_SEQUENCE, device.declared)
            self.submit(name, request, self.declaration_ended)

    def declaration_ended(self, error: StackError | None) -> None:
        """Given up: once more, before anything else."""
        self.suspended = self.suspended or isinstance(error, UnreachableError)
