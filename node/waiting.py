"""What the mounts of this node wait for, and what would end it, for `clusterctl status`. Pure.

Only what this clusterd knows is said: quorum, servers without a session, dead members that no
survivor has released yet; what is left is a lock, about which the lock manager is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from cluster.ids import Instance
from cluster.messages import GroupState
from cluster.state import ClusterState, node_of
from cvm.entries import entries_of

WAITING_MS = 1000
"""A request that waits shorter than this is not worth a line."""

Row = dict[str, Any]


class Reason(msgspec.Struct, frozen=True):
    """`what` is waited for, and what `ends` it: half sentences."""

    what: str
    ends: str


def quorum_reason(voters: Sequence[Row]) -> Reason:
    """No quorum. `voters`: rows of `node.status.voter_rows`."""
    counted = [voter for voter in voters if not voter["leaving"]]
    missing = [voter["name"] for voter in counted if not voter["heard"]]
    needed = len(counted) // 2 + 1 - (len(counted) - len(missing))
    names = ", ".join(missing) or "none"
    what = f"no quorum: {len(counted) - len(missing)} of {len(counted)} voters heard"
    if needed <= 0:
        return Reason(what, "the voters decide a view with this node")
    return Reason(f"{what}, missing: {names}", f"{needed} of {names} back")


def server_reasons(
    state: ClusterState, volumes: Iterable[str], problems: dict[int, str]
) -> list[Reason]:
    """Servers under the volume groups of `volumes` that this node has no session with."""
    groups = {volume.partition("/")[0] for volume in volumes}
    entries = entries_of([group for group in state.volume_groups if group.name in groups])
    used = {pv.partition("/")[0] for entry in entries.values() for pv in entry.pvs}
    return [
        Reason(f"storage server {server.name} is away: {problem}", f"{server.name} back")
        for server in state.servers
        if server.name in used and (problem := problems.get(server.id, ""))
    ]


def recovery_reasons(
    state: ClusterState, mine: Iterable[str], groups: Sequence[GroupState]
) -> list[Reason]:
    """Dead members of the groups `mine` whose journals are not replayed."""
    names = set(mine)
    dead = sorted({one for group in groups if group.name in names for one in group.dead})
    return [
        Reason(
            f"recovery of a mount of {_node(state, one)} ({one})",
            "a survivor has replayed its journal"
            if any(one in group.silent for group in groups)
            else "it is certain that it writes no more: its lease ends, the servers shut it out",
        )
        for one in dead
    ]


def _node(state: ClusterState, one: Instance) -> str:
    info = node_of(state, one.node)
    return info.name if info is not None else f"node {one.node}"


def lock_reason(why: Sequence[Row]) -> Reason | None:
    """From the wait chain of one lock (`dlm.why`)."""
    if not why:
        return None
    holders = [f"{lock['owner']} ({lock['mode']})" for lock in why[0]["granted"]]
    if not holders:
        return None
    name = why[0]["name"]
    return Reason(
        f"lock {name}, held by {', '.join(holders)}", f"they give it up: dlmctl why {name}"
    )


def waiting_row(title: str, mountpoint: str, requests: Sequence[Row]) -> Row | None:
    """One mount's line, without reasons; None if nothing waits long. `requests`: `cfs.waiting`."""
    long = [row for row in requests if row["waited_ms"] >= WAITING_MS]
    if not long:
        return None
    oldest = max(long, key=lambda row: row["waited_ms"])
    return {
        "title": title,
        "mountpoint": mountpoint,
        "requests": len(long),
        "oldest": {key: oldest[key] for key in ("operation", "ino", "thread", "waited_ms")},
    }


def waiting_lines(rows: Sequence[Row]) -> list[str]:
    """For people."""
    lines = []
    for row in rows:
        place = row["mountpoint"] or row["title"]
        if "oldest" not in row:
            lines.append(f"{place}: {row['problem']}")
        else:
            oldest = row["oldest"]
            lines.append(
                f"{place}: {row['requests']} requests wait, the oldest: {oldest['operation']} of "
                f"inode {oldest['ino']} for {oldest['waited_ms'] // 1000} s"
            )
        lines += [f"  for {one['what']}; ends when: {one['ends']}" for one in row["reasons"]]
    return lines
