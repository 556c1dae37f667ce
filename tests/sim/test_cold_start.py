"""A node that starts while the only member is not heard, but answers: it waits to be let in."""

from __future__ import annotations

import pytest

from cluster.membership import Membership
from tests.sim.scenario import Scenario
from tests.sim.world import MS, SECOND, Violation

MUTE = 5 * SECOND
"""Longer than any wait before a cold start."""


def start_beside_a_mute_member(seed: int) -> None:
    """The second node loses its power, the first goes on alone; its guard is starved (no heartbeat
    comes out) while the second starts. Raises Violation if that puts the first one out."""
    scenario = Scenario(seed, nodes=2, servers=1)
    world, (first, second) = scenario.world, scenario.nodes
    scenario.start()

    def members(node) -> list[int]:
        return [int(m.node) for m in node.view.state.members] if node.view is not None else []

    assert world.run(20 * SECOND, lambda: members(first) == [1, 2])
    second.crash()
    assert world.run(40 * SECOND, lambda: members(first) == [1])
    life = first.incarnation
    world.network.muted.add(first.id)
    world.run(world.now + first.timing.dead_ms * MS)
    second.boot()
    world.run(world.now + MUTE)
    world.network.muted.clear()
    if first.incarnation != life or members(second) == [2]:
        raise Violation("a member that answers was put out by a cold start")
    assert world.run(world.now + 20 * SECOND, lambda: members(first) == members(second) == [1, 2])
    assert first.incarnation == life


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_member_that_answers_is_not_put_out_by_a_start(seed):
    start_beside_a_mute_member(seed)


def test_heartbeats_alone_would_put_it_out(monkeypatch):
    """The rule is needed."""
    take = Membership._all_dead

    def blind(self, now_ns):
        self.circuits = None
        return take(self, now_ns)

    monkeypatch.setattr(Membership, "_all_dead", blind)
    with pytest.raises(Violation):
        start_beside_a_mute_member(1)


def test_a_dead_member_is_put_out_by_a_start():
    """Nobody answers: the second node starts alone (with the server's vote)."""
    scenario = Scenario(1, nodes=2, servers=1)
    world, (first, second) = scenario.world, scenario.nodes
    scenario.start()
    assert world.run(20 * SECOND, lambda: second.view is not None and second.view.admitted)
    first.crash()
    second.crash()
    second.boot()
    assert world.run(
        world.now + 20 * SECOND, lambda: second.view is not None and second.view.admitted
    )
