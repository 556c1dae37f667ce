"""The client's bookkeeping: intervals, retained writes, and random histories of faults."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UnreachableError
from cluster.ids import Epoch
from gnbd import protocol as p
from gnbd.client.core import ClientCore
from gnbd.client.failures import Patience, UnknownOutcomeError
from gnbd.client.lanes import LANE_BYTES_MAX, Lane, Request
from gnbd.client.retained import OVERLAPS_SOUGHT_MAX, Piece, Retained, owned
from gnbd.intervals import IntervalSet

ranges = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted)


@given(st.lists(st.tuples(st.booleans(), ranges), max_size=40), ranges)
def test_intervals_agree_with_a_set(steps, probe):
    """Add, remove and pieces do what a set of integers does."""
    intervals, model = IntervalSet(), set()
    for add, (start, end) in steps:
        (intervals.add if add else intervals.remove)(start, end)
        (model.update if add else model.difference_update)(range(start, end))
        intervals.check()
        assert {x for s, e in intervals for x in range(s, e)} == model
    assert intervals.total() == len(model)
    start, end = probe
    pieces = intervals.pieces(start, end)
    assert [x for s, e, _ in pieces for x in range(s, e)] == list(range(start, end))
    for s, e, inside in pieces:
        assert all((x in model) == inside for x in range(s, e))


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans(), st.booleans()),
        max_size=30,
    )
)
def test_overlay_is_the_newest_of_everything(writes):
    """A server that kept the durable writes only has all of them after the overlay was written to
    it, in any order."""
    retained, disk, again = Retained(), bytearray(64), bytearray(64)
    for number, (offset, length, zero, durable) in enumerate(writes, 1):
        data = None if zero else bytes([number]) * length
        disk[offset : offset + length] = data or bytes(length)
        if durable:
            again[offset : offset + length] = data or bytes(length)
        retained.add(Piece(offset, length, data), durable=durable)
    pieces = retained.overlay()
    random.Random(1).shuffle(pieces)
    for piece in pieces:
        again[piece.offset : piece.offset + piece.length] = piece.data or bytes(piece.length)
    assert again == disk


def test_what_is_durable_is_never_sent_again():
    """Another client may have written there since."""
    retained = Retained()
    retained.add(Piece(0, 8, b"a" * 8), durable=True)
    assert len(retained) == 0
    retained.add(Piece(0, 8, b"b" * 8))
    retained.add(Piece(8, 8, b"c" * 8), durable=True)
    retained.add(Piece(4, 8, b"d" * 8), durable=True)
    assert [(p.offset, bytes(p.data)) for p in retained.overlay()] == [(0, b"b" * 4)]
    assert retained.bytes == 8


def test_a_durable_write_after_a_flush_was_sent_is_not_sent_again():
    """The flush covers the older write there, not the newer one, which needs none."""
    retained = Retained()
    retained.add(Piece(0, 8, b"a" * 8))
    mark = retained.mark()
    retained.add(Piece(0, 8, b"b" * 8), durable=True)
    retained.drop(mark)
    assert retained.overlay() == []


def test_a_durable_write_beside_many_others_is_not_sent_again():
    retained = Retained()
    for number in range(OVERLAPS_SOUGHT_MAX + 1):
        retained.add(Piece(100 + number, 1, b"a"))
    retained.add(Piece(0, 8, b"b" * 8), durable=True)
    assert all(piece.offset >= 100 for piece in retained.overlay())


def test_owned_copies_only_what_can_change():
    """bytes and read-only views of bytes are kept, everything else is copied."""
    data = b"x" * 10
    assert owned(data) is data
    view = memoryview(data)[2:5]
    assert owned(view) is view
    changing = bytearray(data)
    copy = owned(memoryview(changing))
    changing[0] = 0
    assert copy == data


WIDTH = 8


class World:
    """A server that keeps the rules, in memory, with faults; connections deliver in any order
    between lanes, and what is on the way when a path breaks may still arrive until it is
    drained."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.core = ClientCore(2, 1)
        self.disk: dict[int, int] = {}
        self.durable: dict[int, int] = {}
        self.cache_generation = 1
        self.pipes: dict[int, list] = {}
        self.dead: set[int] = set()
        self.lanes: list = []
        self.lingering: list[tuple[int, int, Request]] = []
        self.acknowledged: dict[int, int] = {}
        self.busy: set[int] = set()
        self.version = 0
        self.maybe: dict[int, set[int]] = {}
        """Versions that were given up, since the last acknowledged one."""
        self.now_ns = 1 << 40

    def tick(self) -> int:
        """Time passes: now and then enough for a path to come back from standby."""
        self.now_ns += self.chance.choice([1000, 1_000_000, 3_000_000_000])
        return self.now_ns

    def connect(self, path) -> None:
        """LOGIN: the server forgets what lingers of older generations, then answers."""
        self.lingering = [
            x for x in self.lingering if not (x[0] == path.index and x[1] < path.generation)
        ]
        for other in self.core.logged_in(path, Epoch(1), self.cache_generation, 1 << 20):
            self.break_path(other)
        lane = self.core.lane_up(path, self.tick())
        self.pipes[id(lane)] = []
        self.lanes.append(lane)  # keeps the id in use

    def break_path(self, path) -> None:
        """What was sent and not answered may still reach the disk."""
        for lane in path.lanes:
            pipe = self.pipes.pop(id(lane))
            for request, executed in pipe:
                if not executed and id(lane) not in self.dead:
                    self.lingering.append((path.index, path.generation, request))
        self.core.path_lost(path, self.tick())
        self.core.check()

    def execute(self, request: Request) -> None:
        if request.kind == p.CMD_WRITE:
            for at in range(0, request.length, WIDTH):
                self.disk[request.offset + at] = int(bytes(request.data)[at : at + WIDTH])
        elif request.kind == p.CMD_FLUSH:
            self.durable = dict(self.disk)

    def crash(self) -> None:
        """The server dies. The client does not know yet: replies that were on the way still come,
        what it sends vanishes."""
        self.disk = dict(self.durable)
        self.cache_generation += 1
        self.lingering = []
        for pipe in self.pipes.values():
            pipe[:] = [(request, True) for request, executed in pipe if executed]
        self.dead |= set(self.pipes)

    def lose_cache(self) -> None:
        """A failed fdatasync: the cache is gone, the process lives on, the connections end; what
        was received may still be executed until it is drained."""
        self.disk = dict(self.durable)
        self.cache_generation += 1
        for path in self.core.paths:
            for lane in path.lanes:
                pipe = self.pipes[id(lane)]
                if id(lane) not in self.dead:
                    late = [
                        (path.index, path.generation, r) for r, executed in pipe if not executed
                    ]
                    self.lingering += late
                pipe[:] = [(request, True) for request, executed in pipe if executed]
        self.dead |= set(self.pipes)

    def send(self) -> None:
        for lane, request in self.core.assign(self.tick()):
            self.pipes[id(lane)].append((request, False))
        for drain in self.core.drains():
            if id(drain.lane) in self.dead:
                continue
            gone = drain.path.index, drain.generation
            self.lingering = [
                x for x in self.lingering if not (x[0] == gone[0] and x[1] <= gone[1])
            ]
            self.core.drained(drain.path, drain.generation)

    def write(self) -> None:
        free = [o for o in range(0, 8 * WIDTH, WIDTH) if o not in self.busy]
        if not free or self.core.failed:
            return
        offset, self.version = self.chance.choice(free), self.version + 1
        self.busy.add(offset)
        world, version = self, self.version

        class Done:
            def done(self, error) -> None:
                world.busy.discard(offset)
                if error is None:
                    world.acknowledged[offset] = version
                    world.maybe.pop(offset, None)
                else:
                    assert isinstance(error, UnreachableError)
                    world.maybe.setdefault(offset, set()).add(version)

        data = str(version).encode().ljust(WIDTH)
        self.core.submit(Request(p.CMD_WRITE, offset, len(data), data, waiter=Done()))

    def flush(self) -> None:
        if self.core.failed:
            return
        seen = dict(self.acknowledged)
        world = self

        class Done:
            def done(self, error) -> None:
                assert error is None or isinstance(error, UnreachableError)
                for offset, version in seen.items() if error is None else ():
                    assert world.durable.get(offset, 0) >= version, "a flush lied"

        self.core.submit(Request(p.CMD_FLUSH, waiter=Done()))

    def progress(self) -> None:
        """Execute or answer something, anywhere."""
        path = self.chance.choice(self.core.paths)
        if not path.lanes:
            return
        lane = path.lanes[0]
        pipe = self.pipes[id(lane)]
        for index, (request, executed) in enumerate(pipe):
            if not executed:
                if id(lane) in self.dead:
                    continue
                self.execute(request)
                pipe[index] = (request, True)
                if self.chance.random() < 0.5:
                    return
            if executed or self.chance.random() < 0.7:
                pipe.pop(index)
                self.core.completed(lane, request.cookie, 0, self.tick())
                return

    def linger(self) -> None:
        """A request of a broken connection is executed late."""
        if self.lingering:
            index = self.chance.randrange(len(self.lingering))
            self.execute(self.lingering.pop(index)[2])

    def give_up(self) -> None:
        """Fail after: all is cut, the callers go on, what was sent may still arrive."""
        for path in self.core.paths:
            if path.lanes:
                self.break_path(path)
        self.core.fail("for too long")
        self.core.check()
        with pytest.raises(UnreachableError):
            self.core.submit(Request(p.CMD_READ, 0, 512))

    def settle(self) -> None:
        for _ in range(10_000):
            for path in self.core.paths:
                if path.lanes and id(path.lanes[0]) in self.dead:
                    self.break_path(path)
                if not path.lanes:
                    self.connect(path)
            self.send()
            self.progress()
            if not self.core.all_requests() and not self.core.failed:
                return
        raise AssertionError("it does not come to rest")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([0, 0.01]))
def test_no_acknowledged_byte_is_lost(seed, give_up):
    """Random faults: a living client's acknowledged writes are all there in the end, a flush never
    lies, and no late request overwrites newer data."""
    world = World(seed)
    steps = [world.write] * 6 + [world.progress] * 8 + [world.flush, world.linger, world.linger]
    for _ in range(150):
        roll = world.chance.random()
        if roll < 0.01:
            world.crash()
        elif roll < 0.02:
            world.lose_cache()
        elif roll < 0.02 + give_up:
            world.give_up()
        elif roll < 0.06:
            path = world.chance.choice(world.core.paths)
            if path.lanes:
                world.break_path(path)
        elif roll < 0.25:
            path = world.chance.choice(world.core.paths)
            if not path.lanes:
                world.connect(path)
        else:
            world.chance.choice(steps)()
        world.send()
        world.core.check()
    world.settle()
    while world.lingering:
        world.linger()
    for offset, version in world.acknowledged.items():
        assert world.disk[offset] in {version} | world.maybe.get(offset, set())


@pytest.mark.parametrize("installed", [0, 1])
def test_nothing_is_sent_before_the_epoch(installed):
    """R3 in the core: assign gives nothing, not even repetitions, below the required epoch."""
    core = ClientCore(1, 1)
    core.set_epoch(Epoch(2))
    core.logged_in(core.paths[0], Epoch(installed), 1, 4096)
    core.lane_up(core.paths[0], 0)
    core.submit(Request(p.CMD_READ, 0, 512))
    assert core.assign(0) == []
    core.note_installed(Epoch(2))
    assert len(core.assign(0)) == 1


def test_nothing_waits_behind_a_flush_that_can_go_elsewhere():
    """A connection executes in order. Where there is no other one, a flush takes no room."""
    core = ClientCore(2, 1)
    for path in core.paths:
        core.logged_in(path, Epoch(1), 1, 1 << 30)
    core.lane_up(core.paths[0], 0)

    def lane_of(*arguments: int) -> Lane:
        core.submit(Request(*arguments))
        ((lane, _),) = core.assign(0)
        return lane

    for _ in range(8):
        assert lane_of(p.CMD_FLUSH).path is core.paths[0]
    assert lane_of(p.CMD_READ, 0, 512).path is core.paths[0]
    core.lane_up(core.paths[1], 0)
    assert [lane_of(p.CMD_READ, 0, 512).path.index for _ in range(3)] == [1, 1, 1]
    lane = core.paths[0].lanes[0]
    for cookie in [c for c, r in lane.in_flight.items() if r.kind == p.CMD_FLUSH]:
        core.completed(lane, cookie, 0, 0)
    assert lane.bytes_in_flight < 4096
    assert lane_of(p.CMD_READ, 0, 512) is lane


def test_old_repetitions_hold_new_writes_back():
    """A repetition of an earlier round that sits undrained on another path keeps the gate shut:
    it could land on top of a newer write (R6 and R7 together)."""
    core = ClientCore(2, 1)
    first, second = core.paths

    def write(version: bytes) -> None:
        core.submit(Request(p.CMD_WRITE, 0, 1, version))

    core.logged_in(first, Epoch(1), 1, 4096)
    lane = core.lane_up(first, 0)
    write(b"1")
    ((_, request),) = core.assign(0)
    core.completed(lane, request.cookie, 0, 0)
    core.path_lost(first, 0)
    core.logged_in(first, Epoch(1), 2, 4096)
    core.lane_up(first, 0)
    ((_, repetition),) = core.assign(0)
    assert repetition.round == 1
    assert core.logged_in(second, Epoch(1), 3, 4096) == [first]
    core.path_lost(first, 0)
    lane = core.lane_up(second, 0)
    write(b"2")
    ((_, again),) = core.assign(0)
    assert again.round == 2
    core.completed(lane, again.cookie, 0, 0)
    assert core.assign(0) == []
    (drain,) = core.drains()
    core.drained(drain.path, drain.generation)
    ((_, fresh),) = core.assign(0)
    assert fresh.data == b"2"


def test_a_drain_frees_only_what_it_drained():
    """The answer to a DRAIN may come when a later generation of that path has been lost as well."""
    core = ClientCore(2, 1)
    first, second = core.paths
    core.logged_in(first, Epoch(1), 1, 4096)
    core.lane_up(first, 0)
    core.submit(Request(p.CMD_READ, 0, 512))
    assert len(core.assign(0)) == 1
    core.path_lost(first, 0)
    core.logged_in(second, Epoch(1), 1, 4096)
    core.lane_up(second, 0)
    (drain,) = core.drains()
    core.logged_in(first, Epoch(1), 1, 4096)
    core.lane_up(first, 0)
    core.path_lost(second, 0)
    assert len(core.assign(0)) == 1
    core.path_lost(first, 0)
    core.drained(drain.path, drain.generation)
    assert core.queue == core.urgent == type(core.queue)()
    core.check()


def test_a_sequence_number_goes_before_what_is_written_again():
    """The server refuses what belongs to an older map of the volume: both would wait for ever. A
    second restart does not lose it."""
    core = ClientCore(1, 1)
    (path,) = core.paths
    core.logged_in(path, Epoch(1), 1, 4096)
    lane = core.lane_up(path, 0)
    core.submit(Request(p.CMD_WRITE, 0, 1, b"1"))
    ((_, write),) = core.assign(0)
    core.completed(lane, write.cookie, 0, 0)
    core.path_lost(path, 0)
    core.logged_in(path, Epoch(1), 2, 4096)
    lane = core.lane_up(path, 0)
    ((_, again),) = core.assign(0)
    core.completed(lane, again.cookie, p.ESTALE, 0)
    assert core.assign(0) == []
    assert core.all_requests() == [again]
    core.look(0)
    core.submit(Request(p.CMD_SEQUENCE, 5))
    core.submit(Request(p.CMD_READ, 0, 1))
    lane.bytes_in_flight = LANE_BYTES_MAX
    assert core.assign(0) == []
    core.path_lost(path, 0)
    core.logged_in(path, Epoch(1), 3, 4096)
    core.lane_up(path, 0)
    sent = core.assign(0)
    assert [r.kind for _, r in sent] == [p.CMD_SEQUENCE, p.CMD_WRITE]
    for sent_on, request in sent:
        core.completed(sent_on, request.cookie, 0, 0)
    assert [r.kind for _, r in core.assign(0)] == [p.CMD_READ]


def test_nothing_overtakes_a_sequence_number():
    """After SEQUENCE nothing younger is sent before its answer, on no lane, not even when the
    path of the SEQUENCE is lost."""
    core = ClientCore(2, 1)
    lanes = []
    for path in core.paths:
        core.logged_in(path, Epoch(1), 1, 4096)
        lanes.append(core.lane_up(path, 0))
    core.submit(Request(p.CMD_READ, 0, 512))
    core.submit(Request(p.CMD_SEQUENCE, 5))
    core.submit(Request(p.CMD_READ, 512, 512))
    assert [r.kind for _, r in core.assign(0)] == [p.CMD_READ, p.CMD_SEQUENCE]
    lost = next(lane for lane in lanes if any(r.offset == 5 for r in lane.in_flight.values()))
    core.path_lost(lost.path, 0)
    assert core.assign(0) == []
    (drain,) = core.drains()
    core.drained(drain.path, drain.generation)
    sent = core.assign(0)
    assert [r.offset for _, r in sent] == [0, 5]
    for lane, request in sent:
        core.completed(lane, request.cookie, 0, 0)
    assert [r.offset for _, r in core.assign(0)] == [512]


@settings(max_examples=200)
@given(st.integers(0, 1 << 32))
def test_patience(seed):
    """What has waited for the limit and an eighth more is told, nothing before the limit, and
    nothing that is answered."""
    chance = random.Random(seed)
    limit_ns = 800
    patience = Patience(limit_ns)
    now_ns, newest = 0, 0
    waiting: dict[int, int] = {}
    looked_ns = 0
    for _ in range(100):
        now_ns += chance.choice([1, 30, 100])
        if chance.random() < 0.5:
            newest += 1
            waiting[newest] = now_ns
        if waiting and chance.random() < 0.4:
            del waiting[chance.choice(list(waiting))]
        regular = now_ns - looked_ns <= limit_ns // 8
        looked_ns = now_ns
        told = patience.look(now_ns, newest, min(waiting, default=None))
        age_ns = max((now_ns - since for since in waiting.values()), default=0)
        assert not told or age_ns >= limit_ns
        assert told or not regular or age_ns < limit_ns + limit_ns // 4


def test_a_compare_and_write_is_not_sent_twice():
    """Its answer is lost: its caller learns that when it is sure not to be executed any more."""
    core = ClientCore(2, 1)
    for path in core.paths:
        core.logged_in(path, Epoch(1), 1, 4096)
        core.lane_up(path, 0)
    told = []

    class Caller:
        def done(self, error) -> None:
            told.append(error)

    core.submit(Request(p.CMD_COMPARE_AND_WRITE, 0, 1024, bytes(1024), waiter=Caller()))
    ((lane, _),) = core.assign(0)
    core.path_lost(lane.path, 0)
    assert not told
    (drain,) = core.drains()
    core.drained(drain.path, drain.generation)
    assert [type(error) for error in told] == [UnknownOutcomeError]
    assert core.assign(0) == []


def two_paths() -> tuple[ClientCore, list]:
    """A device with one connection on each of its paths."""
    core = ClientCore(2, 1)
    for path in core.paths:
        core.logged_in(path, Epoch(1), 1, 4096)
        core.lane_up(path, 0)
    return core, core.paths


@pytest.mark.parametrize("is_lost", [False, True])
def test_bytes_of_a_cancelled_writer_come_before_newer_ones(is_lost):
    """It may write the same place again, and is told that this was done: the older write must not
    be under way any more. Other places do not wait."""
    core, paths = two_paths()
    old = Request(p.CMD_WRITE, 512, 512, b"o" * 512, waiter=Counted())
    core.submit(old)
    ((lane, _),) = core.assign(0)
    core.forsake(old)
    new = Request(p.CMD_WRITE, 0, 1024, b"n" * 1024, waiter=Counted())
    elsewhere = Request(p.CMD_WRITE, 1024, 512, b"e" * 512, waiter=Counted())
    core.submit(elsewhere)
    assert core.assign_one(0) is None
    ((other, _),) = core.assign(0)
    core.submit(new)
    core.submit(Request(p.CMD_READ, 0, 512))
    assert core.assign(0) == []
    core.completed(other, elsewhere.cookie, 0, 0)
    if is_lost:
        core.path_lost(lane.path, 0)
        assert core.assign(0) == []
        (drain,) = core.drains()
        core.drained(drain.path, drain.generation)
        ((lane, again),) = core.assign(0)
        assert again is old
    core.check()
    core.completed(lane, old.cookie, 0, 0)
    assert new in [request for _, request in core.assign(0)]
    assert not any(path.stranded for path in paths)


def test_what_a_cancelled_writer_has_merged_is_waited_for_too():
    """One part of what went out as one has lost its caller."""
    core, _ = two_paths()
    parts = [Request(p.CMD_WRITE, at, 512, b"o" * 512, waiter=Counted()) for at in (0, 512)]
    for part in parts:
        core.submit(part)
    ((lane, whole),) = core.assign(0)
    assert whole.parts == parts
    core.forsake(parts[1])
    for offset in (1024, 512):
        core.submit(Request(p.CMD_WRITE, offset, 512, b"n" * 512, waiter=Counted()))
    first, newer = core.queue
    assert [request for _, request in core.assign(0)] == [first]
    core.completed(lane, whole.cookie, 0, 0)
    assert [request for _, request in core.assign(0)] == [newer]
    assert parts[0].waiter is None and parts[1].waiter is None  # noqa: PT018


class Counted:
    """Somebody waits."""

    def done(self, error) -> None: ...
