"""The best clique, and what a membership wishes and proposes."""

from __future__ import annotations

import itertools
import random

import msgspec

from cluster.actions import MS
from cluster.guard_events import Peer, Sighting
from cluster.ids import Instance
from cluster.membership import Membership
from cluster.state import NodeInfo, ViewChange, apply_change, initial_state
from cluster.timing import timing_of
from cluster.views import best_clique

TIMING = timing_of("fast")
SECOND = 1000 * MS


def mask(nodes):
    return sum(1 << node for node in nodes)


def brute_force(me, candidates, members, reach):
    best = (0, 0, 0), 0
    others = [n for n in candidates if n != me]
    for size in range(len(others) + 1):
        for chosen in itertools.combinations(others, size):
            clique = [me, *chosen]
            if all(reach.get(a, 0) >> b & 1 for a, b in itertools.permutations(clique, 2)):
                low = sum(1 << (64 - n) for n in clique)
                rank = (len(set(clique) & set(members)), len(clique), low)
                best = max(best, (rank, mask(clique)))
    return best[1]


def test_against_brute_force():
    rng = random.Random(1)
    for _ in range(300):
        nodes = list(range(1, rng.randrange(2, 9)))
        reach = {n: mask([m for m in nodes if m == n or rng.random() < 0.7]) for n in nodes}
        members = [n for n in nodes if rng.random() < 0.5]
        me = rng.choice(nodes)
        assert best_clique(me, nodes, members, reach) == brute_force(me, nodes, members, reach)


def test_sixty_four_nodes_with_many_broken_pairs_end_soon():
    rng = random.Random(2)
    nodes = list(range(1, 65))
    broken = {tuple(sorted(rng.sample(nodes, 2))) for _ in range(400)}
    reach = {n: mask([m for m in nodes if (min(n, m), max(n, m)) not in broken]) for n in nodes}
    clique = best_clique(1, nodes, nodes, reach)
    chosen = [n for n in nodes if clique >> n & 1]
    assert 1 in chosen
    assert all(reach[a] >> b & 1 for a, b in itertools.permutations(chosen, 2))


def test_a_joiner_drives_no_member_out():
    reach = {1: mask([1, 2, 3, 4]), 2: mask([1, 2]), 3: mask([1, 3, 4]), 4: mask([1, 3, 4])}
    assert best_clique(1, [1, 2, 3, 4], [1, 2], reach) == mask([1, 2])


# --- membership


def decided(members):
    state = initial_state("00" * 16, "x", "fast", NodeInfo(1, "n1", []))
    nodes = [NodeInfo(n, f"n{n}", []) for n in (1, 2, 3)]
    state = msgspec.structs.replace(state, nodes=nodes, voters=[1, 2, 3])
    return apply_change(state, ViewChange(members), "w") if members else state


def peer(node, incarnation=1, alive=True, **fields):
    plain = Peer(
        node=node, incarnation=incarnation, alive=alive, epoch=1, version=1, config_epoch=1,
        reach=[1, 2, 3], servers=[], running=[0], stalled=[], purged=[], links=[True, True],
    )  # fmt: skip
    return msgspec.structs.replace(plain, **fields)


def sighting(*peers, voters=(1, 2, 3), witnessed=()):
    return Sighting(
        peers=list(peers), voters=list(voters), witnessed=list(witnessed), stalled=[], late_ms=0
    )


def membership(state, me=1, incarnation=1):
    core = Membership(me, incarnation, TIMING, decided({}), 0)
    core.adopt(0, state)
    return core


def proposals(core, times_ms):
    found = []
    for at in times_ms:
        core.refresh(at * MS)
        found.append(core.proposal(at * MS))
    return found


def test_nothing_to_propose_when_all_are_there():
    core = membership(decided({1: 1, 2: 1, 3: 1}))
    core.sighting = sighting(peer(2), peer(3))
    assert proposals(core, [0, 500, 5000]) == [None] * 3


def test_the_lowest_proposes_first_and_others_later():
    for me, ready in ((1, 100), (2, 200)):
        core = membership(decided({1: 1, 2: 1, 3: 1}), me)
        core.sighting = sighting(peer(3 - me), peer(3, alive=False))
        early, late = proposals(core, [0, ready - 1])[1], proposals(core, [ready])[0]
        assert early is None
        assert late.members == {1: 1, 2: 1}


def test_a_changed_wish_starts_its_time_anew():
    core = membership(decided({1: 1, 2: 1, 3: 1}))
    core.sighting = sighting(peer(2), peer(3, alive=False))
    assert proposals(core, [0, 90]) == [None, None]
    core.sighting = sighting(peer(2), peer(3))
    assert proposals(core, [95]) == [None]
    core.sighting = sighting(peer(2, alive=False), peer(3))
    assert proposals(core, [98, 150]) == [None, None]
    assert proposals(core, [198])[0].members == {1: 1, 3: 1}


def test_a_restart_inside_the_suspicion_time_gives_a_view():
    core = membership(decided({1: 1, 2: 1, 3: 1}))
    core.sighting = sighting(peer(2, incarnation=2), peer(3))
    assert proposals(core, [0, 100])[1].members == {1: 1, 2: 2, 3: 1}


def test_a_barred_life_is_not_let_in_again():
    core = membership(decided({1: 1, 3: 1}))
    out = apply_change(decided({1: 1, 2: 1, 3: 1}), ViewChange({1: 1, 3: 1}), "x")
    core.adopt(1, out)
    core.sighting = sighting(peer(2), peer(3))
    assert proposals(core, [1, 5000]) == [None, None]


def test_no_quorum_no_proposal():
    core = membership(decided({1: 1, 2: 1, 3: 1}))
    core.sighting = sighting(peer(2, alive=False), peer(3, alive=False), voters=(1,))
    assert not core.quorate
    assert proposals(core, [0, 5000]) == [None, None]


def test_the_death_of_an_own_instance_is_proposed_at_once():
    core = membership(decided({1: 1, 2: 1, 3: 1}), me=3)
    core.local += [1, 2]
    core.dead_local[1] = "killed"
    core.sighting = sighting(peer(1), peer(2))
    change = proposals(core, [0])[0]
    assert change.dead == [Instance(3, 1, 1)]
    assert change.running == {3: [0, 2]}
    assert change.reason == "killed"


def test_a_stalled_instance_is_expelled_and_a_stalled_clusterd_with_its_node():
    core = membership(decided({1: 1, 2: 1, 3: 1}))
    core.sighting = sighting(peer(2, stalled=[4], running=[0, 4]), peer(3, stalled=[0]))
    change = proposals(core, [0, 100])[1]
    assert change.members == {1: 1, 2: 1}
    assert change.dead == [Instance(2, 1, 4)]


def test_cold_start_waits_until_nobody_admitted_can_be_alive():
    core = Membership(1, 2, TIMING, decided({}), 0)
    core.adopt(0, decided({1: 1, 2: 1}))
    assert not core.was_admitted
    # Nothing was heard so far because nobody listened: the guard starts late.
    assert proposals(core, [0, 999, 5000]) == [None, None, None]
    core.take_sighting(5100 * MS, sighting())
    assert proposals(core, [5100, 6099]) == [None, None]
    assert proposals(core, [6100])[0].members == {1: 2}
    core.sighting = sighting(witnessed=[(2, 1)])
    assert proposals(core, [7000, 8000]) == [None, None]
    core.sighting = sighting(peer(2, incarnation=2))
    assert proposals(core, [8001, 8200])[1].members == {1: 2, 2: 2}


def test_a_node_that_is_not_admitted_waits_for_a_living_member():
    core = Membership(1, 2, TIMING, decided({}), 0)
    core.adopt(0, decided({2: 1, 3: 1}))
    core.sighting = sighting(peer(2), peer(3))
    assert proposals(core, [0, 5000]) == [None, None]


def test_a_life_that_was_removed_is_barred():
    core = membership(decided({1: 1, 2: 1, 3: 1}))
    assert core.barred_numbers() == []
    core.adopt(5, apply_change(core.state, ViewChange({2: 1, 3: 1}), "x"))
    assert core.barred_numbers() == [0]
    assert proposals(core, [10, 5000]) == [None, None]


def test_a_life_that_was_removed_unseen_is_barred_too():
    core = Membership(1, 1, TIMING, decided({}), 0)
    joined = decided({1: 1, 2: 1})
    core.adopt(5, apply_change(joined, ViewChange({2: 1}), "x"))
    assert core.barred_numbers() == [0]


def test_a_member_that_misses_a_server_most_reach_is_expelled():
    from cluster.control import ServerInfo
    from cluster.ids import ServerId

    state = decided({1: 1, 2: 1, 3: 1})
    state = msgspec.structs.replace(state, servers=[ServerInfo(ServerId(129), "s1", [])])
    core = membership(state)
    core.sighting = sighting(peer(2, servers=[129]), peer(3))
    core.note_servers(0, [129])
    core.note_servers(1999 * MS, [129])
    assert proposals(core, [1999]) == [None]
    core.note_servers(2000 * MS, [129])
    assert proposals(core, [2000, 2100])[1].members == {1: 1, 2: 1}


def test_leaving_takes_only_oneself_out():
    core = membership(decided({1: 1, 2: 1, 3: 1}), me=2)
    core.sighting = sighting(peer(1), peer(3))
    core.leaving = True
    assert proposals(core, [0])[0].members == {1: 1, 3: 1}
