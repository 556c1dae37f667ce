"""A member of a lockspace that measures. `python -m bench.lock_member first|second`, on two nodes.

`second` makes itself master of some names and then gives way; `first` measures and prints JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import msgspec
import trio

from cluster.control import GroupEvent, InstanceGranted
from cluster.control_io import open_session
from cluster.locks import Mode
from cluster.mesh_io import open_mesh
from dlm.lockspace_io import LockspaceMember, join

GROUP = "bench"
HITS = 200_000
ROUNDS = 2000
HANDOVERS = 300


def percentiles(samples_ns: list[int]) -> dict[str, float]:
    ordered = sorted(samples_ns)
    return {
        "p50": round(statistics.median(ordered) / 1000, 1),
        "p99": round(ordered[len(ordered) * 99 // 100] / 1000, 1),
    }


async def new_and_unlock(member: LockspaceMember, prefix: str) -> list[int]:
    """New lock and unlock of names with a prefix, one after another; nanoseconds each."""
    samples = []
    for number in range(ROUNDS):
        begin = time.perf_counter_ns()
        lock = await member.acquire(f"{prefix}{number}".encode(), Mode.CR)
        lock.unlock()
        samples.append(time.perf_counter_ns() - begin)
    return samples


async def handovers(member: LockspaceMember) -> list[int]:
    """EX taken away from the other member and back; both sides ask without pause."""
    samples = []
    lock = member.get(b"handover")
    for _ in range(HANDOVERS):
        begin = time.perf_counter_ns()
        await lock.hold(Mode.EX)
        lock.release(Mode.EX)
        samples.append(time.perf_counter_ns() - begin)
        await member.drop(b"handover")
    return samples


async def measure(member: LockspaceMember) -> None:
    lock = member.get(b"hit")
    await lock.hold(Mode.EX)
    lock.release(Mode.EX)
    begin = time.perf_counter_ns()
    for _ in range(HITS):
        lock.try_hold(Mode.EX)
        lock.release(Mode.EX)
    hit = (time.perf_counter_ns() - begin) / HITS / 1000
    local = await new_and_unlock(member, "own")
    remote = await new_and_unlock(member, "theirs")
    result = {
        "cached hit": {"p50": round(hit, 2), "p99": round(hit, 2)},
        "new and unlock, first use": percentiles(local),
        "new and unlock, master elsewhere": percentiles(remote),
        "hand-over of EX": percentiles(await handovers(member)),
    }
    print(json.dumps(result), flush=True)


async def serve(member: LockspaceMember) -> None:
    """Be the master of the names of the other's test, then compete for the hand-over."""
    for number in range(ROUNDS):
        lock = member.get(f"theirs{number}".encode())
        await lock.hold(Mode.CR)
        lock.release(Mode.CR)
    print("ready", flush=True)
    while True:
        lock = member.get(b"handover")
        await lock.hold(Mode.EX)
        lock.release(Mode.EX)
        await trio.sleep(0.0005)


async def main(role: str) -> None:
    early: list[GroupEvent] = []
    feed = early.append

    def on_event(name, data) -> None:
        if name == "group":
            feed(msgspec.convert(data, GroupEvent))

    async with open_session(None, {}, on_event) as session:
        answer = await session.call("instance.register", {"kind": "bench", "title": "bench"})
        granted = msgspec.convert(answer, InstanceGranted)
        rows = await session.call("cluster.nodes", {})
        addresses = next(r["addresses"] for r in rows if r["id"] == granted.instance.node)
        async with open_mesh(granted.instance, addresses, group=GROUP) as mesh:
            async with join(mesh, GROUP) as member:
                feed = mesh.group_event
                for event in early:
                    mesh.group_event(event)
                parameters = {"group": GROUP, "addresses": addresses, "port": mesh.port}
                await session.call("group.join", parameters)
                await member.wait_member()
                await (measure if role == "first" else serve)(member)


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
