"""Asks this node's mounts what waits in them, each for a short time."""

from __future__ import annotations

from typing import Any

import msgspec
import trio

from cluster.errors import StackError
from node.clusterd_io import Clusterd
from node.instances import NO_METHOD, LocalInstance
from node.status import Local, voter_rows
from node.waiting import (
    Reason,
    Row,
    lock_reason,
    quorum_reason,
    recovery_reasons,
    server_reasons,
    waiting_row,
)

ANSWER_S = 1.0
WHY_S = 3.0
UNKNOWN = Reason("something that clusterd does not know of", "see: cfsctl waiting MOUNT")


async def waiting_rows(daemon: Clusterd, local: Local) -> list[Row]:
    """A row per mount of this node with requests that wait, or that does not answer."""
    rows: list[tuple[int, Row]] = []

    async def ask(one: LocalInstance) -> None:
        row = await _row(daemon, one, local)
        if row is not None:
            rows.append((one.number, row))

    async with trio.open_nursery() as nursery:
        for one in daemon.instances.live():
            if one.kind == "mount":
                nursery.start_soon(ask, one)
    return [row for _number, row in sorted(rows, key=lambda pair: pair[0])]


async def _row(daemon: Clusterd, one: LocalInstance, local: Local) -> Row | None:
    mountpoint = daemon.guard.mountpoint(one.number) or ""
    row: Row | None = {"title": one.title, "mountpoint": mountpoint, "problem": "does not answer"}
    with trio.move_on_after(ANSWER_S):
        try:
            requests = await one.session.call("cfs.waiting", {})
            row = waiting_row(one.title, mountpoint, requests)
        except StackError as error:
            if error.message.startswith(NO_METHOD):
                return None
            row = {"title": one.title, "mountpoint": mountpoint, "problem": error.message}
    if row is not None:
        row["reasons"] = [
            msgspec.to_builtins(each) for each in await _reasons(daemon, one, local, row)
        ]
    return row


async def _reasons(daemon: Clusterd, one: LocalInstance, local: Local, row: Row) -> list[Reason]:
    state = daemon.state
    if not daemon.view.quorate:
        return [quorum_reason(voter_rows(state, local, daemon.sighting))]
    snapshot = daemon.core.groups.snapshot
    found = server_reasons(state, one.volumes, dict(local.servers))
    found += recovery_reasons(state, one.groups, snapshot.groups if snapshot is not None else [])
    if found or "oldest" not in row:
        return found
    lock = None
    with trio.move_on_after(WHY_S):
        try:
            lock = lock_reason(await _why(one))
        except StackError:
            lock = None
    return [lock or UNKNOWN]


async def _why(one: LocalInstance) -> list[dict[str, Any]]:
    names = (await one.session.call("dlm.waiters", {}))["waiting_for"]
    return list(await one.session.call("dlm.why", {"name": names[0]})) if names else []
