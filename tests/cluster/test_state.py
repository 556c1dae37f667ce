"""The register's value: each change, and rule R2."""

from __future__ import annotations

import msgspec
import pytest

from cluster.control import MemberInfo, ServerInfo
from cluster.errors import RefusedError, UsageError
from cluster.ids import Instance
from cluster.state import (
    AddNode,
    AddServer,
    FinishVoterChange,
    ForgetNode,
    HoldNode,
    NodeInfo,
    RemoveServer,
    SetVolumeGroup,
    StartVoterChange,
    StateError,
    ViewChange,
    VolumeGroup,
    admits,
    apply_change,
    bars,
    check_transition,
    decode_state_untrusted,
    encode_state,
    highest_incarnation,
    initial_state,
    is_quorum,
    recovered_state,
    votes_to_drop,
)


def node(number):
    return NodeInfo(number, f"n{number}", [f"10.0.0.{number}"])


def three():
    state = initial_state("00" * 16, "demo", "fast", node(1))
    for number in (2, 3):
        state = apply_change(state, AddNode(node(number)), f"w{number}")
    return apply_change(state, ViewChange({1: 1, 2: 1, 3: 1}), "view")


def test_birth_admits_nobody():
    state = initial_state("00" * 16, "demo", "fast", node(1))
    assert (state.epoch, state.version, state.members) == (0, 1, [])
    assert is_quorum(state, [1])


def test_encoding_round_trip():
    assert decode_state_untrusted(encode_state(three())) == three()


def test_an_operator_holds_a_node_out():
    """Out in the same step, not back before the operator's word; repeats change nothing."""
    state = apply_change(three(), HoldNode(2, hold=True, reason="operator"), "w")
    assert (state.epoch, state.held) == (2, [2])
    assert [m.node for m in state.members] == [1, 3]
    assert (state.fences[-1].node, state.fences[-1].reason) == (2, "operator")
    assert apply_change(state, HoldNode(2, hold=True), "x") is state
    with pytest.raises(StateError, match="holds it out"):
        apply_change(state, ViewChange({1: 1, 2: 2, 3: 1}), "x")
    free = apply_change(state, HoldNode(2, hold=False), "x")
    assert (free.epoch, free.held) == (2, [])
    assert apply_change(free, HoldNode(2, hold=False), "y") is free
    assert apply_change(free, ViewChange({1: 1, 2: 2, 3: 1}), "y").epoch == 3
    gone = apply_change(state, ForgetNode(2), "x")
    assert gone.held == []


def test_holding_out_has_limits():
    state = apply_change(three(), ViewChange({1: 1}), "w")
    with pytest.raises(RefusedError, match="last member"):
        apply_change(state, HoldNode(1, hold=True), "x")
    with pytest.raises(StateError, match="not configured"):
        apply_change(state, HoldNode(9, hold=True), "x")
    away = apply_change(state, HoldNode(3, hold=True), "x")
    assert (away.epoch, away.held) == (state.epoch, [3])


def test_join_and_removal_leave_a_tombstone():
    state = apply_change(three(), ViewChange({1: 1, 3: 1}, reason="gone"), "w")
    assert state.epoch == 2
    assert highest_incarnation(state, 2) == 1
    assert bars(state, Instance(2, 1, 0))
    assert not bars(state, Instance(2, 2, 0))
    with pytest.raises(StateError, match="used incarnation"):
        apply_change(state, ViewChange({1: 1, 2: 1, 3: 1}), "w")
    again = apply_change(state, ViewChange({1: 1, 2: 2, 3: 1}), "w")
    assert admits(again.members, Instance(2, 2, 0))
    assert again.tombstones == []


def test_restart_replaces_the_life_in_one_view():
    state = apply_change(three(), ViewChange({1: 1, 2: 5, 3: 1}), "w")
    assert bars(state, Instance(2, 1, 0))
    assert admits(state.members, Instance(2, 5, 7))
    assert state.fences[-1].node == 2


def test_death_of_an_instance_that_nobody_ever_saw():
    dead = Instance(2, 1, 5)
    state = apply_change(
        three(), ViewChange({1: 1, 2: 1, 3: 1}, dead=[dead], running={2: [3, 6]}), "w"
    )
    member = state.members[1]
    assert (member.live, member.next) == ([0, 3], 6)
    assert [admits(state.members, Instance(2, 1, n)) for n in range(8)] == [
        True, False, False, True, False, False, True, True,
    ]  # fmt: skip


def test_admitted_set_only_shrinks():
    state = apply_change(three(), ViewChange({1: 1, 2: 1, 3: 1}, dead=[Instance(2, 1, 5)]), "w")
    grown = msgspec.structs.replace(state.members[1], live=[0, 5])
    new = msgspec.structs.replace(
        state, version=state.version + 1, epoch=state.epoch + 1,
        members=[state.members[0], grown, state.members[2]],
    )  # fmt: skip
    with pytest.raises(StateError, match="grew"):
        check_transition(state, new)
    lower = msgspec.structs.replace(new, members=[
        state.members[0], MemberInfo(2, 1, [0], 3, "n2"), state.members[2],
    ])  # fmt: skip
    with pytest.raises(StateError, match="grew"):
        check_transition(state, lower)


def test_same_view_is_no_change():
    state = three()
    assert apply_change(state, ViewChange({1: 1, 2: 1, 3: 1}), "w") is state


def test_a_view_needs_configured_nodes():
    with pytest.raises(StateError, match="not configured"):
        apply_change(three(), ViewChange({1: 1, 9: 1}), "w")


def test_voters_change_in_two_steps():
    state = apply_change(three(), StartVoterChange(add=2), "a")
    assert (state.voters, state.old_voters, state.config_epoch) == ([1, 2], [1], 2)
    assert not is_quorum(state, [1])
    assert is_quorum(state, [1, 2])
    with pytest.raises(StateError, match="not finished"):
        apply_change(state, StartVoterChange(add=3), "b")
    state = apply_change(state, FinishVoterChange(), "c")
    assert (state.voters, state.old_voters, state.config_epoch) == ([1, 2], [], 2)
    assert apply_change(state, FinishVoterChange(), "d") is state
    assert apply_change(state, StartVoterChange(add=2), "d") is state


def test_the_last_voter_stays():
    with pytest.raises(RefusedError):
        apply_change(three(), StartVoterChange(remove=1), "a")


@pytest.mark.parametrize("count", range(1, 8))
def test_who_stays_can_decide_when_one_leaves(count):
    """For all sets of voters who answer: each step can be decided, and what is left as well."""
    state = initial_state("00" * 16, "demo", "fast", node(1))
    for number in range(2, count + 1):
        state = apply_change(state, AddNode(node(number)), "w")
        state = apply_change(state, StartVoterChange(add=number), "w")
        state = apply_change(state, FinishVoterChange(), "w")
    for mask in range(1 << count):
        present = [number for number in range(1, count + 1) if mask >> number - 1 & 1]
        for leaver in present:
            stay = [number for number in present if number != leaver]
            after = state
            for vote in votes_to_drop(state, leaver, present):
                after = apply_change(after, StartVoterChange(remove=vote), "w")
                assert is_quorum(after, present)
                after = apply_change(after, FinishVoterChange(), "w")
            assert is_quorum(after, stay) == (is_quorum(state, present) and bool(stay))
            assert is_quorum(state, stay) <= (after is state)


def test_of_those_who_are_away_a_node_loses_its_vote_before_a_server():
    state = msgspec.structs.replace(three(), voters=[1, 2, 3, 129, 130])
    assert votes_to_drop(state, 2, [1, 2, 129]) == [3, 2]
    assert votes_to_drop(state, 2, [1, 2, 3, 129]) == []
    assert votes_to_drop(three(), 2, [1, 2]) == []


def test_voters_must_be_configured():
    with pytest.raises(UsageError):
        apply_change(three(), StartVoterChange(add=150), "a")


def test_servers():
    server = ServerInfo(129, "s1", ["10.0.1.1"])
    state = apply_change(three(), AddServer(server), "a")
    assert apply_change(state, AddServer(server), "b") is state
    with pytest.raises(UsageError):
        apply_change(state, AddServer(ServerInfo(130, "s1", ["10.0.1.2"])), "b")
    voting = apply_change(state, StartVoterChange(add=129), "c")
    with pytest.raises(RefusedError):
        apply_change(voting, RemoveServer(129), "d")
    assert apply_change(state, RemoveServer(129), "d").servers == []
    group = VolumeGroup("a", "vg0", 1, {"pvs": ["s1/disk0", "s2/disk0"]})
    using = apply_change(state, SetVolumeGroup("a", 0, group), "d")
    with pytest.raises(RefusedError, match="volume group vg0"):
        apply_change(using, RemoveServer(129), "e")
    assert apply_change(using, RemoveServer(129, lost=True), "e").servers == []


def test_nodes():
    state = three()
    assert apply_change(state, AddNode(node(2)), "w") is state
    with pytest.raises(UsageError, match="already called"):
        apply_change(state, AddNode(NodeInfo(4, "n2", [])), "w")
    with pytest.raises(UsageError, match="in use"):
        apply_change(state, AddNode(NodeInfo(2, "other", [])), "w")
    with pytest.raises(UsageError, match="node id"):
        apply_change(state, AddNode(NodeInfo(65, "x", [])), "w")
    with pytest.raises(RefusedError, match="member"):
        apply_change(state, ForgetNode(2), "w")
    out = apply_change(state, ViewChange({1: 1, 3: 1}), "w")
    gone = apply_change(out, ForgetNode(2), "w")
    assert [info.id for info in gone.nodes] == [1, 3]
    assert highest_incarnation(gone, 2) == 1


def test_volume_group_is_a_compare_and_swap():
    group = VolumeGroup("u", "vg0", 1)
    state = apply_change(three(), SetVolumeGroup("u", 0, group), "a")
    assert apply_change(state, SetVolumeGroup("u", 0, group), "a") is state
    with pytest.raises(StateError, match="has changed"):
        apply_change(state, SetVolumeGroup("u", 0, VolumeGroup("u", "vg0", 1, {"x": 1})), "a")
    with pytest.raises(UsageError, match="exists"):
        apply_change(state, SetVolumeGroup("v", 0, VolumeGroup("v", "vg0", 1)), "a")
    with pytest.raises(StateError, match="grows"):
        apply_change(state, SetVolumeGroup("u", 1, VolumeGroup("u", "vg0", 1, {"x": 1})), "a")
    assert apply_change(state, SetVolumeGroup("u", 1, None), "a").volume_groups == []


def test_recovery_bars_every_life():
    state = recovered_state(three(), [3], {}, "w")
    assert (state.epoch, state.voters, state.members) == (1001, [3], [])
    assert all(bars(state, Instance(n, 1, 0)) for n in (1, 2, 3))


def test_recovery_lets_in_whom_it_makes_a_voter():
    """Nobody else could: who is held out decides nothing, not even that it may come back."""
    state = three()
    for number in (2, 3):
        state = apply_change(state, HoldNode(number, hold=True), f"w{number}")
    assert recovered_state(state, [3], {}, "w").held == [2]


def test_a_value_that_is_too_large_is_refused():
    data = {"x": "y" * 70_000}
    with pytest.raises(StateError, match="too large"):
        apply_change(three(), SetVolumeGroup("u", 0, VolumeGroup("u", "v", 1, data)), "a")
