"""The value of the register: everything that the cluster decides, and how it may change.

`ClusterState` is one value with a version. A change is a pure function old -> new; whoever wants
it proposes `new` with compare-and-swap on `old.version`. Every function here checks rule R2:

- the keep-list (`members`) changes only together with `epoch + 1`;
- per incarnation the admitted set only shrinks and `next` only grows;
- a removed node leaves a tombstone with its highest incarnation, and comes back only above it;
- a node that an operator put out (`held`) does not come back before the operator lets it;
- voters change one at a time, through a joint phase (`old_voters` not empty) in which both
  majorities are needed; `config_epoch` rises by one at the start of a change.

Encoded as msgpack, at most `STATE_BYTES_MAX`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from cluster.control import MemberInfo, ServerInfo
from cluster.decoding import decode_untrusted
from cluster.errors import RefusedError, StackError, UsageError
from cluster.ids import (
    INSTANCE_NO_MAX,
    NODE_ID_MAX,
    SERVER_ID_MAX,
    SERVER_ID_MIN,
    Epoch,
    Incarnation,
    Instance,
    InstanceNo,
    NodeId,
    ServerId,
    VoterId,
)

STATE_BYTES_MAX = 64 << 10
FENCES_MAX = 64
RECOVER_EPOCHS = 1000
WHOLE_NODE = -1


class NodeInfo(msgspec.Struct, frozen=True):
    """A configured node: one address per network, in the order of the networks."""

    id: NodeId
    name: str
    addresses: list[str]


class Tombstone(msgspec.Struct, frozen=True, array_like=True):
    """The highest incarnation of a node that is not in the keep-list."""

    node: NodeId
    incarnation: Incarnation


class Fence(msgspec.Struct, frozen=True):
    """History: who was put out, when and why. `number` is -1 for a whole node."""

    epoch: Epoch
    node: NodeId
    incarnation: Incarnation
    number: int
    reason: str


class VolumeGroup(msgspec.Struct, frozen=True):
    """What the register holds of a volume group: the metadata sequence number that counts, and
    small facts that must be decided (leg states)."""

    uuid: str
    name: str
    sequence: int
    data: dict[str, Any] = {}


class ClusterState(msgspec.Struct, frozen=True):
    """The value of the register. `writer` names the proposal that made it, unique for ever."""

    cluster_id: str
    name: str
    profile: str
    version: int
    writer: str
    config_epoch: int
    voters: list[VoterId]
    old_voters: list[VoterId]
    nodes: list[NodeInfo]
    servers: list[ServerInfo]
    epoch: Epoch
    members: list[MemberInfo]
    tombstones: list[Tombstone] = []
    volume_groups: list[VolumeGroup] = []
    fences: list[Fence] = []
    held: list[NodeId] = []


class StateError(StackError):
    """A change breaks a rule of the register's value."""


class ViewChange(msgspec.Struct, frozen=True, tag="view"):
    """One new view. `members` is the whole wanted set, node -> incarnation. `dead` are instances
    of kept lives that died; `running` lists per node of `dead` its instances that go on."""

    members: dict[NodeId, Incarnation]
    dead: list[Instance] = []
    running: dict[NodeId, list[InstanceNo]] = {}
    reason: str = ""


class AddNode(msgspec.Struct, frozen=True, tag="add_node"):
    """Configure a node (invite). Idempotent."""

    node: NodeInfo


class ForgetNode(msgspec.Struct, frozen=True, tag="forget_node"):
    """Take a node that is neither member nor voter out of the configuration."""

    node: NodeId


class HoldNode(msgspec.Struct, frozen=True, tag="hold"):
    """By an operator's word: put a node out and keep it out, or let it come back. Idempotent."""

    node: NodeId
    hold: bool
    reason: str = ""


class AddServer(msgspec.Struct, frozen=True, tag="add_server"):
    """Configure a block server. Idempotent."""

    server: ServerInfo


class RemoveServer(msgspec.Struct, frozen=True, tag="remove_server"):
    """Nobody installs views on it any more, so it soon serves nobody: refused while volume groups
    have PVs there, unless `lost` says that the disks are gone anyhow."""

    server: ServerId
    lost: bool = False


class StartVoterChange(msgspec.Struct, frozen=True, tag="voters"):
    """First step: `add` or `remove` one voter; the joint phase begins."""

    add: VoterId | None = None
    remove: VoterId | None = None


class FinishVoterChange(msgspec.Struct, frozen=True, tag="voters_done"):
    """Second step: the value is rewritten under the new voters alone."""


class SetVolumeGroup(msgspec.Struct, frozen=True, tag="vg"):
    """Compare-and-swap of one volume group: `expected` is its present sequence number (0: it does
    not exist). `group` None deletes it."""

    uuid: str
    expected: int
    group: VolumeGroup | None


class SetProfile(msgspec.Struct, frozen=True, tag="profile"):
    profile: str


Change = (
    ViewChange
    | AddNode
    | ForgetNode
    | HoldNode
    | AddServer
    | RemoveServer
    | StartVoterChange
    | FinishVoterChange
    | SetVolumeGroup
    | SetProfile
)


def initial_state(cluster_id: str, name: str, profile: str, node: NodeInfo) -> ClusterState:
    """Birth: config_epoch 1, epoch 0, nobody admitted yet, this node the only voter."""
    return ClusterState(
        cluster_id=cluster_id, name=name, profile=profile, version=1, writer="init",
        config_epoch=1, voters=[VoterId(node.id)], old_voters=[], nodes=[node], servers=[],
        epoch=Epoch(0), members=[],
    )  # fmt: skip


def member_of(members: list[MemberInfo], node: int) -> MemberInfo | None:
    """The keep-list line of a node."""
    for member in members:
        if member.node == node:
            return member
    return None


def admits(members: list[MemberInfo], instance: Instance) -> bool:
    """Whether the keep-list admits an instance; if not it is barred (rule R2)."""
    member = member_of(members, instance.node)
    if member is None or member.incarnation != instance.incarnation:
        return False
    return instance.number in member.live or instance.number >= member.next


def bars(state: ClusterState, instance: Instance) -> bool:
    """Whether an instance is barred for ever by this value. A life that this value has never seen
    is neither admitted nor barred: a later value may admit it."""
    if highest_incarnation(state, instance.node) < instance.incarnation:
        return False
    return not admits(state.members, instance)


def highest_incarnation(state: ClusterState, node: int) -> Incarnation:
    """The highest incarnation of a node that the register has ever seen, 0 for none."""
    member = member_of(state.members, node)
    highest = int(member.incarnation) if member is not None else 0
    for stone in state.tombstones:
        if stone.node == node:
            highest = max(highest, stone.incarnation)
    return Incarnation(highest)


def node_of(state: ClusterState, node: int) -> NodeInfo | None:
    """The configuration of a node."""
    for info in state.nodes:
        if info.id == node:
            return info
    return None


def electorates(state: ClusterState) -> list[list[VoterId]]:
    """The voter sets of each of which a majority is needed."""
    return [state.voters, state.old_voters] if state.old_voters else [state.voters]


def all_voters(state: ClusterState) -> list[VoterId]:
    """Voters of both phases, ascending."""
    return sorted({*state.voters, *state.old_voters})


def is_majority(voters: list[VoterId], answered: Collection[int]) -> bool:
    """Whether `answered` holds a majority of `voters`."""
    return 2 * sum(1 for voter in voters if voter in answered) > len(voters)


def is_quorum(state: ClusterState, answered: list[int]) -> bool:
    """Whether `answered` can decide the register under this configuration."""
    return all(is_majority(voters, answered) for voters in electorates(state))


def votes_to_drop(
    state: ClusterState, leaver: VoterId, present: Collection[VoterId]
) -> list[VoterId]:
    """Whose votes must go, one after the other, so that those of `present` who stay can decide
    without `leaver`. Empty when they can anyway, or could not even with it."""
    stay = [voter for voter in state.voters if voter in present and voter != leaver]
    if not stay or leaver not in state.voters or is_majority(state.voters, stay):
        return []
    if not is_majority(state.voters, [*stay, leaver]):
        return []
    if len(state.voters) % 2 == 0:
        return [leaver]
    # One vote less does not make the majority of an odd number smaller: somebody who is away
    # loses his first (a node before a server).
    away = [voter for voter in state.voters if voter not in present]
    return [away[0], leaver]


def apply_change(state: ClusterState, change: Change, writer: str) -> ClusterState:
    """The state after one change, or `state` itself if the change is already there.

    Raises StateError or UsageError when the change is not allowed.
    """
    fields = _changed_fields(state, change)
    if not fields:
        return state
    new = msgspec.structs.replace(state, version=state.version + 1, writer=writer, **fields)
    check_transition(state, new)
    return new


def _changed_fields(state: ClusterState, change: Change) -> dict[str, Any]:
    match change:
        case ViewChange():
            return _view_fields(state, change)
        case AddNode(node):
            return _add_node_fields(state, node)
        case ForgetNode(node_id):
            return _forget_node_fields(state, node_id)
        case HoldNode():
            return _hold_fields(state, change)
        case AddServer(server):
            return _add_server_fields(state, server)
        case RemoveServer():
            return _remove_server_fields(state, change)
        case StartVoterChange(add, remove):
            return _voter_fields(state, add, remove)
        case FinishVoterChange():
            return {"old_voters": []} if state.old_voters else {}
        case SetVolumeGroup():
            return _volume_group_fields(state, change)
        case SetProfile(profile):
            return {"profile": profile} if profile != state.profile else {}


def _view_fields(state: ClusterState, change: ViewChange) -> dict[str, Any]:
    epoch = Epoch(state.epoch + 1)
    members: list[MemberInfo] = []
    stones = {stone.node: stone.incarnation for stone in state.tombstones}
    fences: list[Fence] = []
    for node in sorted({*change.members, *(member.node for member in state.members)}):
        old = member_of(state.members, node)
        wanted = change.members.get(node)
        if old is not None and wanted != old.incarnation:
            stones[node] = old.incarnation
            fences.append(Fence(epoch, node, old.incarnation, WHOLE_NODE, change.reason))
        if wanted is None:
            continue
        if old is not None and wanted == old.incarnation:
            members.append(_without_dead(old, change, epoch, fences))
            continue
        info = node_of(state, node)
        if info is None:
            raise StateError(f"node {node} is not configured")
        if wanted <= stones.get(node, 0):
            raise StateError(f"node {node} wants to join with used incarnation {wanted}")
        members.append(
            MemberInfo(node, wanted, live=[InstanceNo(0)], next=InstanceNo(1), name=info.name)
        )
        stones.pop(node, None)
    if members == state.members:
        return {}
    return {
        "epoch": epoch,
        "members": members,
        "tombstones": [Tombstone(node, stones[node]) for node in sorted(stones)],
        "fences": [*state.fences, *fences][-FENCES_MAX:],
    }


def _hold_fields(state: ClusterState, change: HoldNode) -> dict[str, Any]:
    others = [node for node in state.held if node != change.node]
    if not change.hold:
        return {"held": others} if change.node in state.held else {}
    if node_of(state, change.node) is None:
        raise StateError(f"node {change.node} is not configured")
    held = {} if change.node in state.held else {"held": sorted([*others, change.node])}
    if member_of(state.members, change.node) is None:
        return held
    kept = {m.node: m.incarnation for m in state.members if m.node != change.node}
    if not kept:
        raise RefusedError("the last member of the cluster cannot be put out")
    return {**held, **_view_fields(state, ViewChange(kept, reason=change.reason))}


def _without_dead(
    member: MemberInfo, change: ViewChange, epoch: Epoch, fences: list[Fence]
) -> MemberInfo:
    """The keep-list line with the dead instances out: those below the new `next` that go on
    running are listed, everyone else below it is barred."""
    dead = [
        instance.number
        for instance in sorted(change.dead)
        if (instance.node, instance.incarnation) == (member.node, member.incarnation)
        and admits([member], instance)
    ]
    if not dead:
        return member
    assert 0 not in dead, "the death of clusterd is the death of its node"
    limit = max(int(member.next), max(dead) + 1)
    if limit > INSTANCE_NO_MAX:
        raise StateError(f"node {member.node} has used up its instance numbers")
    running = sorted({InstanceNo(0), *change.running.get(member.node, member.live)})
    live = [
        number
        for number in running
        if number < limit
        and number not in dead
        and (number in member.live or number >= member.next)
    ]
    fences.extend(
        Fence(epoch, member.node, member.incarnation, number, change.reason) for number in dead
    )
    return msgspec.structs.replace(member, live=live, next=InstanceNo(limit))


def _add_node_fields(state: ClusterState, node: NodeInfo) -> dict[str, Any]:
    if not 1 <= node.id <= NODE_ID_MAX:
        raise UsageError(f"a node id is 1..{NODE_ID_MAX}, not {node.id}")
    for other in state.nodes:
        if other == node:
            return {}
        if other.id != node.id and other.name == node.name:
            raise UsageError(f"node {other.id} is already called {node.name}")
        if other.id == node.id and other.name != node.name:
            raise UsageError(f"id {node.id} is already in use by node {other.name}")
        shared = sorted({*other.addresses} & {*node.addresses}) if other.id != node.id else []
        if shared:
            raise UsageError(f"{', '.join(shared)} is the address of node {other.name}")
    nodes = [other for other in state.nodes if other.id != node.id]
    return {"nodes": sorted([*nodes, node], key=lambda info: info.id)}


def _forget_node_fields(state: ClusterState, node: NodeId) -> dict[str, Any]:
    if member_of(state.members, node) is not None:
        raise RefusedError(f"node {node} is a member", hint="stop it first")
    if VoterId(node) in all_voters(state):
        raise RefusedError(f"node {node} is a voter", hint="clusterctl voter remove first")
    nodes = [info for info in state.nodes if info.id != node]
    held = [other for other in state.held if other != node]
    return {"nodes": nodes, "held": held} if len(nodes) != len(state.nodes) else {}


def _add_server_fields(state: ClusterState, server: ServerInfo) -> dict[str, Any]:
    if not SERVER_ID_MIN <= server.id <= SERVER_ID_MAX:
        raise UsageError(f"a server id is {SERVER_ID_MIN}..{SERVER_ID_MAX}, not {server.id}")
    for other in state.servers:
        if other == server:
            return {}
        if (other.id == server.id) != (other.name == server.name):
            raise UsageError(f"server {other.name} already has id {other.id}")
    servers = [other for other in state.servers if other.id != server.id]
    return {"servers": sorted([*servers, server], key=lambda info: info.id)}


def _remove_server_fields(state: ClusterState, change: RemoveServer) -> dict[str, Any]:
    if VoterId(change.server) in all_voters(state):
        raise RefusedError("the server is a voter", hint="clusterctl voter remove first")
    gone = next((server for server in state.servers if server.id == change.server), None)
    if gone is None:
        return {}
    using = [
        group.name
        for group in state.volume_groups
        if any(pv.partition("/")[0] == gone.name for pv in group.data.get("pvs", ()))
    ]
    if using and not change.lost:
        raise RefusedError(
            f"server {gone.name} has physical volumes of volume group {', '.join(using)}",
            hint="their volumes would freeze; if its disks are lost for good, say --force",
        )
    return {"servers": [server for server in state.servers if server is not gone]}


def _voter_fields(
    state: ClusterState, add: VoterId | None, remove: VoterId | None
) -> dict[str, Any]:
    if state.old_voters:
        raise StateError("another change of voters is not finished")
    if (add is None) == (remove is None):
        raise UsageError("add or remove exactly one voter")
    if add is not None:
        if add in state.voters:
            return {}
        known = [*(int(info.id) for info in state.nodes), *(int(info.id) for info in state.servers)]
        if add not in known:
            raise UsageError(f"voter {add} is neither a node nor a server")
        voters = sorted([*state.voters, add])
    else:
        if remove not in state.voters:
            return {}
        voters = [voter for voter in state.voters if voter != remove]
        if not voters:
            raise RefusedError("the last voter cannot be removed")
    return {
        "voters": voters,
        "old_voters": state.voters,
        "config_epoch": state.config_epoch + 1,
    }


def _volume_group_fields(state: ClusterState, change: SetVolumeGroup) -> dict[str, Any]:
    present = next((group for group in state.volume_groups if group.uuid == change.uuid), None)
    if present == change.group:
        return {}
    if (present.sequence if present is not None else 0) != change.expected:
        raise StateError(f"volume group {change.uuid} has changed", hint="read it again")
    others = [group for group in state.volume_groups if group.uuid != change.uuid]
    if change.group is None:
        return {"volume_groups": others}
    if any(group.name == change.group.name for group in others):
        raise UsageError(f"a volume group called {change.group.name} exists")
    if change.group.uuid != change.uuid or change.group.sequence <= change.expected:
        raise StateError("a volume group's sequence number only grows")
    return {"volume_groups": sorted([*others, change.group], key=lambda group: group.uuid)}


def check_transition(old: ClusterState, new: ClusterState) -> None:
    """Raise StateError unless `new` may follow `old` (rule R2 and the rules of voters)."""
    if new.version != old.version + 1 or new.cluster_id != old.cluster_id:
        raise StateError("not the next version")
    _check_members(old, new)
    if new.voters != old.voters:
        if old.old_voters or new.old_voters != old.voters:
            raise StateError("voters change only through a joint phase")
        if new.config_epoch != old.config_epoch + 1:
            raise StateError("a change of voters raises config_epoch by one")
        if len({*new.voters} ^ {*old.voters}) != 1:
            raise StateError("one voter at a time")
    elif new.config_epoch != old.config_epoch or new.old_voters not in ([], old.old_voters):
        raise StateError("configuration without a change of voters")
    if len(encode_state(new)) > STATE_BYTES_MAX:
        raise StateError("the register's value would be too large")


def _check_members(old: ClusterState, new: ClusterState) -> None:
    if new.members == old.members:
        if new.epoch != old.epoch:
            raise StateError("an epoch without a new keep-list")
        return
    if new.epoch != old.epoch + 1:
        raise StateError("a new keep-list needs the next epoch")
    for was in old.members:
        now = member_of(new.members, was.node)
        if now is None or now.incarnation != was.incarnation:
            if highest_incarnation(new, was.node) < was.incarnation:
                raise StateError(f"node {was.node} vanished without a tombstone")
            continue
        grown = [n for n in now.live if n not in was.live and n < was.next]
        if now.next < was.next or grown or any(n >= now.next for n in now.live):
            raise StateError(f"the admitted set of node {was.node} grew")
    for now in new.members:
        was_member = member_of(old.members, now.node)
        joined = was_member is None or was_member.incarnation != now.incarnation
        if joined and now.node in new.held:
            raise StateError(f"node {now.node} came back although an operator holds it out")
        if joined and now.incarnation <= highest_incarnation(old, now.node):
            raise StateError(f"node {now.node} came back with a used incarnation")


def recovered_state(
    state: ClusterState, voters: list[VoterId], sequences: dict[str, int], writer: str
) -> ClusterState:
    """After a lost majority (typed by the operator): a far higher epoch, nobody admitted, all
    incarnations dead, the given voters (none of them held out any more: there may be nobody else
    to let them in), volume-group sequences as found on the disks."""
    stones = {stone.node: stone.incarnation for stone in state.tombstones}
    for member in state.members:
        stones[member.node] = max(stones.get(member.node, Incarnation(0)), member.incarnation)
    groups = [
        msgspec.structs.replace(group, sequence=max(group.sequence, sequences.get(group.uuid, 0)))
        for group in state.volume_groups
    ]
    return msgspec.structs.replace(
        state, version=state.version + RECOVER_EPOCHS, writer=writer,
        config_epoch=state.config_epoch + RECOVER_EPOCHS, voters=sorted(voters), old_voters=[],
        epoch=Epoch(state.epoch + RECOVER_EPOCHS), members=[],
        tombstones=[Tombstone(node, stones[node]) for node in sorted(stones)],
        volume_groups=groups, held=[node for node in state.held if VoterId(node) not in voters],
    )  # fmt: skip


def encode_state(state: ClusterState) -> bytes:
    """The register's value as msgpack."""
    return msgspec.msgpack.encode(state)


_decoder = msgspec.msgpack.Decoder(ClusterState)


def decode_state_untrusted(data: bytes) -> ClusterState:
    """The inverse of `encode_state`. Raises ProtocolError."""
    return decode_untrusted(_decoder, data, "value of the register")
