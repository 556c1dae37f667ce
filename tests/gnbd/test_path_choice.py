"""Which connection takes a request: equal paths, slow ones, flapping ones. A mock clock."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ids import Epoch
from gnbd import protocol as p
from gnbd.client.core import ClientCore
from gnbd.client.lanes import LANE_REQUESTS_MAX, Lane, Path, Request
from gnbd.client.path_choice import (
    HEADER_COST_BYTES,
    LOSSES,
    PROBE_NS,
    SPREAD_BYTES,
    STANDBY_FIRST_NS,
    STANDBY_MAX_NS,
    WINDOW_NS,
    Ranking,
)

SECOND_NS = 1_000_000_000
LATENCY_NS = 500_000
SIZES = (4096, 1 << 20)


def opened(paths: int, lanes: int = 1, *, known: bool = False) -> ClientCore:
    core = ClientCore(paths, 1)
    for path in core.paths:
        core.logged_in(path, Epoch(1), 1, 1 << 30)
        for _ in range(lanes):
            core.lane_up(path, 0)
        if known:
            path.health.sample(False, 4096 + HEADER_COST_BYTES, 50_000, 1)
    return core


class Network:
    """Paths that carry so many nanoseconds per request and per byte, one request after another."""

    def __init__(self, core: ClientCore, request_ns: list[int], byte_ns: list[float]) -> None:
        self.core = core
        self.request_ns, self.byte_ns = request_ns, byte_ns
        self.now_ns = SECOND_NS
        self.free_ns = [0] * len(core.paths)
        self.under_way: list[tuple[int, Lane, Request]] = []
        self.taken: Counter[int] = Counter()

    def run(self, depth: int, size: int, duration_ns: int) -> int:
        """So many readers, each asking again as soon as it has its answer. Gives how much was
        done."""
        end_ns, done = self.now_ns + duration_ns, 0
        looked_ns = self.now_ns
        for _ in range(depth - len(self.under_way)):
            self.core.submit(Request(p.CMD_READ, 0, size))
        while self.now_ns < end_ns:
            for lane, request in self.core.assign(self.now_ns):
                index = lane.path.index
                begin_ns = max(self.now_ns, self.free_ns[index])
                self.free_ns[index] = begin_ns + int(request.length * self.byte_ns[index])
                done_ns = self.free_ns[index] + self.request_ns[index]
                self.under_way.append((done_ns, lane, request))
                self.taken[index] += 1
            self.under_way.sort(key=lambda item: item[0])
            self.now_ns, lane, request = self.under_way.pop(0)
            self.core.completed(lane, request.cookie, 0, self.now_ns)
            done += 1
            if self.now_ns - looked_ns > 50_000_000:
                looked_ns = self.now_ns
                self.core.look(self.now_ns)
            self.core.submit(Request(p.CMD_READ, 0, size))
        return done


def old_choice(lanes: list[Lane]) -> Lane | None:
    """The least loaded lane, in steps: how it was before anything was measured."""
    room = [(lane.bytes_in_flight + n * SPREAD_BYTES, n) for n, lane in enumerate(lanes)
            if lane.has_room()]  # fmt: skip
    return lanes[min(room)[1]] if room else None


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32))
def test_equal_paths_are_used_as_if_nothing_was_measured(seed):
    """Whatever the loads are, and paces that differ by less than the band."""
    chance = random.Random(seed)
    core = opened(chance.choice([1, 2, 3]), chance.choice([1, 2, 4]))
    lanes = [lane for path in core.paths for lane in path.lanes]
    for path in core.paths:
        path.health.sample(False, 1000, chance.randrange(1000, 2900), 1)
    for lane in lanes:
        for cookie in range(chance.choice([0, 1, 20, LANE_REQUESTS_MAX])):
            lane.in_flight[cookie] = Request(p.CMD_READ)
        lane.bytes_in_flight = chance.randrange(0, 1 << 21)
    assert Ranking(lanes, False, 2).choose(4096) is old_choice(lanes)


@pytest.mark.parametrize("size", SIZES)
def test_equal_paths_share(size):
    """A deep queue of large requests uses both, small ones stay together."""
    core = opened(2)
    network = Network(core, [LATENCY_NS] * 2, [1.0] * 2)
    network.run(32, size, SECOND_NS)
    if size == 4096:
        assert network.taken[1] == 1  # then it is known
    else:
        assert min(network.taken.values()) * 3 > max(network.taken.values())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("depth", [1, 8, 32])
def test_a_slow_path_gets_less_but_something(size, slow, depth):
    """It costs next to nothing against the good path alone, and is measured again each second."""
    alone = Network(opened(1), [LATENCY_NS], [1.0]).run(depth, size, 3 * SECOND_NS)
    core = opened(2)
    request_ns, byte_ns = [LATENCY_NS] * 2, [1.0] * 2
    request_ns[slow], byte_ns[slow] = 40 * LATENCY_NS, 30.0
    network = Network(core, request_ns, byte_ns)
    network.run(depth, size, SECOND_NS)
    network.taken.clear()
    both = network.run(depth, size, 3 * SECOND_NS)
    assert both > alone * 0.9
    if size > 4096 or slow == 0:  # else nothing ever needed the second path
        assert network.taken[slow] >= 3 * SECOND_NS // PROBE_NS - 1
        assert network.taken[slow] < network.taken[1 - slow] / 8


def test_a_path_that_is_fast_again_is_used_again():
    core = opened(2)
    network = Network(core, [100 * LATENCY_NS, LATENCY_NS], [1.0, 1.0])
    network.run(1, 4096, 5 * SECOND_NS)
    assert network.taken[1] > network.taken[0] * 20
    network.request_ns[0] = LATENCY_NS
    network.run(1, 4096, 2 * PROBE_NS)
    network.taken.clear()
    network.run(1, 4096, SECOND_NS)
    assert not network.taken[1]


def test_a_path_that_answers_nothing_is_left_before_it_is_lost():
    """What is on it waits; what comes later does not follow."""
    core = opened(2)
    Network(core, [LATENCY_NS] * 2, [1.0] * 2).run(1, 4096, SECOND_NS)
    now_ns = 5 * SECOND_NS
    core.submit(Request(p.CMD_READ, 0, 4096))
    waiting = [lane.path.index for lane, _ in core.assign(now_ns)]
    assert set(waiting) == {0}
    core.look(now_ns + 50_000_000)
    core.submit(Request(p.CMD_READ, 0, 4096))
    assert [lane.path.index for lane, _ in core.assign(now_ns + 50_000_000)] == [1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 1 << 32))
def test_nothing_waits_while_nothing_is_under_way(seed):
    """Whatever was measured and lost: with a connection up and nothing in flight, a request is
    sent; and bookkeeping of bytes comes to nothing in the end."""
    chance = random.Random(seed)
    core, now_ns = opened(2, 2), SECOND_NS
    for _ in range(200):
        now_ns += chance.choice([1000, 1_000_000, 100_000_000, SECOND_NS])
        path = chance.choice(core.paths)
        roll = chance.random()
        if roll < 0.1 and path.lanes:
            core.path_lost(path, now_ns)
        elif roll < 0.25 and not path.lanes:
            core.logged_in(path, Epoch(1), 1, 1 << 30)
            core.lane_up(path, now_ns)
        elif roll < 0.6:
            core.submit(Request(p.CMD_READ, 0, chance.choice(SIZES)))
        elif roll < 0.7:
            core.look(now_ns)
        else:
            lane = chance.choice(path.lanes) if path.lanes else None
            if lane and lane.in_flight:
                cookie = chance.choice(list(lane.in_flight))
                core.completed(lane, cookie, 0, now_ns)
        core.assign(now_ns)
        lanes = [lane for path in core.paths for lane in path.lanes]
        if lanes and not any(lane.in_flight for lane in lanes):
            assert not core.queue
        for lane in lanes:
            cost = sum(r.length + HEADER_COST_BYTES for r in lane.in_flight.values())
            assert lane.bytes_in_flight == cost


def flap(core: ClientCore, path: Path, now_ns: int) -> None:
    core.path_lost(path, now_ns)
    core.logged_in(path, Epoch(1), 1, 1 << 30)
    core.lane_up(path, now_ns)


def user(core: ClientCore, now_ns: int) -> int:
    """The path that takes a request now."""
    core.submit(Request(p.CMD_READ, 0, 4096))
    lane = core.assign_one(now_ns)
    assert lane is not None
    (cookie,) = lane.in_flight
    core.completed(lane, cookie, 0, now_ns + 50_000)
    return lane.path.index


def test_a_flapping_path_is_held_down_longer_and_longer():
    """Bounded; forgotten after a quiet window; another path takes over meanwhile."""
    core = opened(2, known=True)
    flapping, now_ns = core.paths[0], SECOND_NS
    pauses = []
    for count in range(1, LOSSES + 8):
        now_ns += 1_000_000
        flap(core, flapping, now_ns)
        pause_ns = flapping.health.standby_until_ns - now_ns
        assert user(core, now_ns) == (0 if count < LOSSES else 1)
        if count >= LOSSES:
            pauses.append(pause_ns)
            assert user(core, flapping.health.standby_until_ns - 1) == 1
            assert user(core, flapping.health.standby_until_ns) == 0
    assert pauses[:2] == [STANDBY_FIRST_NS, 2 * STANDBY_FIRST_NS]
    assert pauses == sorted(pauses)
    assert pauses[-1] == STANDBY_MAX_NS
    now_ns += WINDOW_NS + STANDBY_MAX_NS
    flap(core, flapping, now_ns)
    assert user(core, now_ns) == 0


def test_the_last_path_is_never_held_down():
    """Not while the other one is away, and not if all of them flap."""
    core = opened(2, known=True)
    now_ns = SECOND_NS
    for _ in range(LOSSES + 2):
        flap(core, core.paths[0], now_ns)
    assert user(core, now_ns) == 1
    core.path_lost(core.paths[1], now_ns)
    assert user(core, now_ns) == 0
    for _ in range(LOSSES + 2):
        flap(core, core.paths[1], now_ns)
    assert user(core, now_ns) in (0, 1)
