"""What `clusterctl status` and `nodes` show, as plain data. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cluster.control import ViewInfo
from cluster.guard_events import Peer, Sighting
from cluster.ids import NodeId, VoterId
from cluster.state import ClusterState, all_voters, member_of, node_of

FENCES_SHOWN = 10
LOCK_PREFIX = "lock:"


class Local(msgspec.Struct, frozen=True):
    """What only this clusterd knows. `servers`: id -> why there is no session ("" = there is)."""

    node: NodeId
    incarnation: int
    admitted: bool
    connected: Mapping[int, Sequence[int]]
    servers: Mapping[int, str]
    instances: Sequence[dict[str, Any]]
    voter_ready: bool
    wanted: Sequence[Mapping[str, Any]] = ()


def _peer(sighting: Sighting | None, node: int) -> Peer | None:
    if sighting is None:
        return None
    return next((peer for peer in sighting.peers if peer.node == node), None)


def node_rows(
    state: ClusterState, view: ViewInfo, local: Local, sighting: Sighting | None
) -> list[dict[str, Any]]:
    """One row per configured node."""
    rows = []
    for info in state.nodes:
        member = member_of(view.members, info.id)
        peer = _peer(sighting, info.id)
        here = info.id == local.node
        if member is not None:
            condition = "member" if here or (peer is not None and peer.alive) else "suspect"
        else:
            condition = "joining" if here or (peer is not None and peer.alive) else "down"
            condition = "held out" if info.id in state.held else condition
        rows.append(
            {
                "id": info.id,
                "name": info.name,
                "addresses": info.addresses,
                "state": condition,
                "local": here,
                "voter": VoterId(info.id) in state.voters,
                "incarnation": member.incarnation if member is not None else None,
                "instances": _instances(member, peer, local if here else None),
                "networks": _networks(info.addresses, peer, here),
                "control": list(local.connected.get(info.id, [])),
            }
        )
    return rows


def _instances(member: Any, peer: Peer | None, local: Local | None) -> list[int]:
    if local is not None:
        return [int(row["number"]) for row in local.instances]
    if member is None or peer is None or peer.incarnation != member.incarnation:
        return []
    return [int(number) for number in peer.running if number != 0]


def _networks(addresses: list[str], peer: Peer | None, here: bool) -> list[str]:
    if here:
        return ["up"] * len(addresses)
    if peer is None:
        return ["down"] * len(addresses)
    return ["up" if up else "down" for up in peer.links]


def voter_rows(
    state: ClusterState, local: Local, sighting: Sighting | None
) -> list[dict[str, Any]]:
    """One row per voter of the register."""
    names = {int(node.id): node.name for node in state.nodes}
    names |= {int(server.id): server.name for server in state.servers}
    heard = set(sighting.voters) if sighting is not None else set()
    return [
        {
            "id": voter,
            "name": names.get(int(voter), f"voter {voter}"),
            "kind": "node" if node_of(state, voter) is not None else "server",
            "heard": voter in heard or (voter == VoterId(local.node) and local.voter_ready),
            "leaving": voter not in state.voters,
        }
        for voter in all_voters(state)
    ]


def server_rows(state: ClusterState, view: ViewInfo, local: Local) -> list[dict[str, Any]]:
    """One row per block server."""
    return [
        {
            "id": server.id,
            "name": server.name,
            "addresses": server.addresses,
            "port": server.port,
            "up": local.servers.get(server.id) == "",
            "installed": server.id in view.installed,
            "voter": VoterId(server.id) in state.voters,
            "problem": local.servers.get(server.id, "not connected"),
        }
        for server in state.servers
    ]


def fence_rows(state: ClusterState, limit: int) -> list[dict[str, Any]]:
    """Who was put out, newest last."""
    return [
        {
            "epoch": fence.epoch,
            "node": fence.node,
            "name": info.name if (info := node_of(state, fence.node)) else str(fence.node),
            "incarnation": fence.incarnation,
            "instance": None if fence.number < 0 else fence.number,
            "reason": fence.reason,
        }
        for fence in state.fences[-limit:]
    ]


def build_status(
    state: ClusterState, view: ViewInfo, local: Local, sighting: Sighting | None
) -> dict[str, Any]:
    """Everything on one screen."""
    info = node_of(state, local.node)
    return {
        "cluster": {"id": state.cluster_id, "name": state.name, "profile": state.profile},
        "node": {
            "id": local.node,
            "name": info.name if info is not None else str(local.node),
            "incarnation": local.incarnation,
            "admitted": local.admitted,
        },
        "quorate": view.quorate,
        "epoch": view.epoch,
        "version": state.version,
        "config_epoch": state.config_epoch,
        "members": [
            {
                "id": member.node,
                "name": member.name,
                "incarnation": member.incarnation,
                "live": list(member.live),
                "next": member.next,
            }
            for member in view.members
        ],
        "nodes": node_rows(state, view, local, sighting),
        "voters": voter_rows(state, local, sighting),
        "servers": server_rows(state, view, local),
        "installed": list(view.installed),
        "instances": list(local.instances),
        "mounts": [dict(row) for row in local.wanted],
        "volume_groups": [
            {"name": group.name, "sequence": group.data.get("sequence", group.sequence)}
            for group in state.volume_groups
            if not group.name.startswith(LOCK_PREFIX)
        ],
        "fences": fence_rows(state, FENCES_SHOWN),
    }
