"""clusterctl status says what mounts wait for, and what would end it."""

import json

from node_harness import Instance, wait_until

from cluster.ids import Incarnation, InstanceNo, NodeId
from cluster.ids import Instance as Name
from cluster.messages import GroupState
from cluster.state import NodeInfo, ServerInfo, VolumeGroup, initial_state
from node.waiting import (
    lock_reason,
    quorum_reason,
    recovery_reasons,
    server_reasons,
    waiting_lines,
    waiting_row,
)

ENTRY = {"name": "vg0", "uuid": "u", "sequence": 1, "checksum": "c", "pvs": ["s1/disk0"]}


def state():
    made = initial_state("ab" * 16, "test", "fast", NodeInfo(NodeId(1), "n1", ["127.0.0.1"]))
    made.servers.extend(
        ServerInfo(id=128 + n, name=f"s{n}", addresses=["127.0.0.1"], port=1) for n in (1, 2)
    )
    made.volume_groups.append(VolumeGroup(uuid="u", name="vg0", sequence=1, data=ENTRY))
    return made


def request(operation, waited_ms):
    return {"operation": operation, "ino": 7, "thread": 9, "waited_ms": waited_ms}


def test_only_what_waits_long_counts():
    assert waiting_row("t", "/m", [request("read", 999)]) is None
    row = waiting_row(
        "t", "/m", [request("read", 1500), request("write", 4000), request("read", 5)]
    )
    assert (row["requests"], row["oldest"]["operation"]) == (2, "write")


def test_missing_voters_are_named():
    voters = [{"name": f"n{n}", "heard": n == 1, "leaving": n == 4} for n in (1, 2, 3, 4)]
    reason = quorum_reason(voters)
    assert reason.what == "no quorum: 1 of 3 voters heard, missing: n2, n3"
    assert reason.ends == "1 of n2, n3 back"


def test_only_servers_under_the_volume_are_named():
    away = {129: "refused", 130: "refused"}
    (reason,) = server_reasons(state(), ["vg0/vol0"], away)
    assert (reason.what, reason.ends) == ("storage server s1 is away: refused", "s1 back")
    assert server_reasons(state(), ["vg1/vol0"], away) == []
    assert server_reasons(state(), ["vg0/vol0"], {129: ""}) == []


def test_the_dead_are_named():
    dead = Name(NodeId(1), Incarnation(1), InstanceNo(4))
    groups = [GroupState("cfs:a", [], dead=[dead], silent=[dead]), GroupState("cfs:b", [])]
    (reason,) = recovery_reasons(state(), ["cfs:a"], groups)
    assert "n1" in reason.what
    assert "replayed" in reason.ends
    assert recovery_reasons(state(), ["cfs:b"], groups) == []
    (reason,) = recovery_reasons(state(), ["cfs:a"], [GroupState("cfs:a", [], dead=[dead])])
    assert "lease" in reason.ends


def test_the_holder_of_a_lock_is_named():
    link = {"name": "I07", "granted": [{"owner": "2.1.1", "mode": "EX"}]}
    assert lock_reason([link]).what == "lock I07, held by 2.1.1 (EX)"
    assert lock_reason([{**link, "granted": []}]) is None
    assert lock_reason([]) is None


def test_status_asks_the_mounts_and_names_the_missing_voters(cluster):
    """With quorum it is a lock; without, the voters that are away; then nothing."""
    requests = [request("write", 3000)]
    why = [{"name": "I07", "granted": [{"owner": "2.1.1", "mode": "EX"}]}]

    async def waiting(_params):
        return requests

    async def waiters(_params):
        return {"waiting_for": ["I07"]}

    async def explain(_params):
        return why

    first, second, third = cluster.up(3)
    handlers = {"cfs.waiting": waiting, "dlm.waiters": waiters, "dlm.why": explain}
    Instance(first, handlers=handlers)
    Instance(first)  # one that knows no such question is none that waits
    (row,) = json.loads(first.ctl("status", "--json").stdout)["waiting"]
    assert row["oldest"]["operation"] == "write"
    assert row["reasons"][0]["what"] == "lock I07, held by 2.1.1 (EX)"
    second.kill()
    third.kill()
    wait_until(lambda: not first.status()["quorate"], "quorum is lost")
    shown = first.ctl("status", check=False).stdout
    assert "1 requests wait, the oldest: write of inode 7 for 3 s" in shown
    assert "missing: n2, n3; ends when: 1 of n2, n3 back" in shown
    requests.clear()
    assert first.status()["waiting"] == []


def test_a_mount_without_an_answer_is_shown():
    row = {"title": "t", "mountpoint": "/m", "problem": "does not answer", "reasons": []}
    assert waiting_lines([row]) == ["/m: does not answer"]
