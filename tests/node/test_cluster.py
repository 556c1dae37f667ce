"""Whole clusters of real processes: birth, join, death, restart, leave, instances, groups."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from node_harness import WAIT_S, Instance, wait_until

from cluster.control import Call, encode_line
from cluster.errors import StackError

JUDGED_S = 150.0
"""A judge of circuits that is late on a loaded machine begins anew."""


def test_three_nodes_and_a_power_cut(cluster):
    first, second, third = cluster.up(3)
    assert [v["name"] for v in first.status()["voters"]] == ["n1", "n2", "n3"]
    begin = time.monotonic()
    second.kill()
    cluster.wait_view([1, 3])
    print(f"new view after {time.monotonic() - begin:.2f} s")
    fences = first.status()["fences"]
    assert (fences[-1]["name"], fences[-1]["instance"]) == ("n2", None)
    second.start()
    cluster.wait_view([1, 2, 3])
    lives = {m["name"]: m["incarnation"] for m in third.status()["members"]}
    assert lives == {"n1": 1, "n2": 2, "n3": 1}
    epochs = {n.status()["epoch"] for n in (first, second, third)}
    assert len(epochs) == 1


def test_restart_within_the_suspicion_time(cluster):
    first, second, _third = cluster.up(3)
    second.kill()
    second.start()
    cluster.wait_view([1, 2, 3])
    wait_until(
        lambda: {m["id"]: m["incarnation"] for m in first.status()["members"]}[2] == 2,
        "the new life is in the view",
    )


GUARD_ENDS_SLOWLY = """
import atexit, sys, time
if "clusterguard" in sys.orig_argv:
    atexit.register(time.sleep, 600)
"""


def test_a_guard_that_ends_is_not_in_the_way_of_the_next_one(cluster, tmp_path):
    """When it has given its lock back its ports are free, although its interpreter still ends."""
    (tmp_path / "sitecustomize.py").write_text(GUARD_ENDS_SLOWLY)
    node = cluster.node(1)
    node.more_path = [tmp_path]
    cluster.found()
    old = node.guard
    try:
        node.process.kill()
        node.process.wait()
        node.start()
        assert os.path.exists(f"/proc/{old}")
        wait_until(lambda: node.members() == [1], "it is a member again")
    finally:
        os.kill(old, signal.SIGKILL)


def voters(node):
    return [row["name"] for row in node.status()["voters"]]


def unheard(node, name):
    """Whether a voter answers no more, as far as this node knows."""
    return not next(row["heard"] for row in node.status()["voters"] if row["name"] == name)


@pytest.mark.parametrize("long_ago", [False, True])
def test_clean_leave_and_return(cluster, long_ago):
    """Who stays can decide, whether the other one has left just now or long ago."""
    first, second, third = cluster.up(3)
    assert third.ctl("leave").stdout == "left; clusterd ends\n"
    third.process.wait(WAIT_S)
    cluster.wait_view([1, 2])
    assert voters(first) == ["n1", "n2", "n3"]
    if long_ago:
        wait_until(lambda: unheard(second, "n3"), "n3 is not heard as a voter any more")
    assert "votes given up: n3, n2" in second.ctl("leave").stdout
    second.process.wait(WAIT_S)
    cluster.wait_view([1])
    assert voters(first) == ["n1"]
    second.start()
    cluster.wait_view([1, 2])


def test_coordinator_dies(cluster):
    first, second, third = cluster.up(3)
    first.kill()
    cluster.wait_view([2, 3])
    third.kill()
    wait_until(lambda: not second.status()["quorate"], "one of three is not quorate")
    assert second.ctl("status", check=False).returncode == 3
    third.start()
    cluster.wait_view([2, 3])
    first.start()
    cluster.wait_view([1, 2, 3])


def test_guard_death_is_node_death(cluster):
    _first, second, _third = cluster.up(3)
    os.kill(second.guard, signal.SIGKILL)
    second.process.wait(60)
    cluster.wait_view([1, 3])


def test_stopped_node_comes_back_with_a_new_life(cluster):
    """A node that is paused beyond its lease was put out; it starts anew by itself."""
    first, second, _third = cluster.up(3)
    for pid in (second.process.pid, second.guard):
        os.kill(pid, signal.SIGSTOP)
    cluster.wait_view([1, 3])
    for pid in (second.guard, second.process.pid):
        os.kill(pid, signal.SIGCONT)
    cluster.wait_view([1, 2, 3])
    lives = {m["name"]: m["incarnation"] for m in first.status()["members"]}
    assert lives["n2"] > 1


def test_recover_after_a_lost_majority(cluster):
    first, second, third = cluster.up(3)
    second.kill()
    third.kill()
    wait_until(lambda: not first.status()["quorate"], "quorum is lost")
    assert first.ctl("recover", "wrong", "--voters", "n1", "--yes", check=False).returncode == 4
    assert first.ctl("recover", "test", "--voters", "n1", check=False).returncode == 4
    epoch = first.status()["epoch"]
    first.ctl("recover", "test", "--voters", "n1", "--yes")
    wait_until(lambda: first.members() == [1], "the recovered node is quorate")
    assert first.status()["epoch"] > epoch + 1000


def order(instance):
    return [(e["epoch"], e["seq"], e["kind"]) for e in instance.group_events()]


def test_group_of_instances_and_the_death_of_one(cluster):
    nodes = cluster.up(3)
    members = [Instance(node, "g", 100 + node.number) for node in nodes]
    wait_until(
        lambda: all(len(m.group_events()[-1]["members"]) == 3 for m in members),
        "all have the group view of three",
    )
    assert len({m.group_events()[-1]["mesh_key"] for m in members}) == 1
    dead = members[1].granted["instance"]
    members[1].stop(clean=False)
    survivors = [members[0], members[2]]
    wait_until(lambda: all(m.group_events("silent") for m in survivors), "the dead one is silent")
    failed = [e for e in survivors[0].group_events("view") if e["failed"]]
    assert failed[-1]["failed"] == [dead]
    survivors[0].call("group.released", {"group": "g", "instance": dead})
    wait_until(
        lambda: all(m.group_events("released") for m in survivors), "the dead one is released"
    )
    tails = [order(m)[-4:] for m in survivors]
    assert tails[0] == tails[1]
    assert survivors[0].group_events()[-1]["dead"] == []
    view = nodes[0].status()
    member = next(m for m in view["members"] if m["name"] == "n2")
    assert dead[2] not in member["live"]
    assert dead[2] < member["next"]


def test_of_two_members_without_a_circuit_one_is_put_out(cluster):
    """Both say that no connection of their mesh comes about: the greater one goes and hears why."""
    unreached = {}

    async def circuits(which):
        return {"unreached": unreached[which]}

    nodes = cluster.up(2)
    members = [
        Instance(node, "g", handlers={"dlm.circuits": lambda _params, n=node.number: circuits(n)})
        for node in nodes
    ]
    lower, greater = members
    wait_until(lambda: len(lower.group_events("view")[-1]["members"]) == 2, "both are members")
    unreached.update({1: [[greater.granted["instance"], 1]], 2: [[lower.granted["instance"], 1]]})
    wait_until(
        lambda: any(name == "barred" for name, _ in greater.events),
        "the greater is barred",
        JUDGED_S,
    )
    wait_until(lambda: len(lower.group_events("view")[-1]["members"]) == 1, "the group knows it")
    assert not any(name == "barred" for name, _ in lower.events)
    assert any("no circuit leads to n1." in e["text"] for e in nodes[1].events("instance.died"))
    lower.stop(clean=True)
    greater.stop(clean=False)


def test_group_survives_a_power_cut(cluster):
    nodes = cluster.up(3)
    members = [Instance(node, "g", 100 + node.number) for node in nodes]
    wait_until(
        lambda: all(len(m.group_events()[-1]["members"]) == 3 for m in members), "view of three"
    )
    begin = time.monotonic()
    nodes[2].kill()
    dead = members[2].granted["instance"]
    survivors = members[:2]
    wait_until(lambda: all(m.group_events("silent") for m in survivors), "silent")
    print(f"silent after {time.monotonic() - begin:.2f} s")
    assert all(e["subject"] == dead for m in survivors for e in m.group_events("silent"))


def test_clean_leave_of_an_instance_needs_no_view(cluster):
    nodes = cluster.up(2, voters=False)
    members = [Instance(node, "g", 100 + node.number) for node in nodes]
    wait_until(
        lambda: all(len(m.group_events()[-1]["members"]) == 2 for m in members), "view of two"
    )
    epoch = nodes[0].status()["epoch"]
    left = members[1].granted["instance"]
    members[1].stop(clean=True)
    wait_until(lambda: members[0].group_events()[-1]["left"] == [left], "it left")
    assert nodes[0].status()["epoch"] == epoch
    assert nodes[1].status()["instances"] == []


def test_calls_are_forwarded_to_instances(cluster):
    nodes = cluster.up(2, voters=False)
    members = [Instance(node) for node in nodes]
    rows = nodes[0].call("dlm.echo", {"text": "x"})
    assert [row["result"]["echo"] for row in rows] == ["x"]
    rows = nodes[0].call("dlm.echo", {"text": "y", "all": True})
    assert [row["node"] for row in rows] == ["n1", "n2"]
    one = nodes[0].call("dlm.echo", {"text": "z", "mountpoint": "/m"})
    assert one == {"echo": "z", "instance": members[0].granted["instance"]}
    assert nodes[0].call("dlm.nothing", {}) == []
    with pytest.raises(StackError, match="nothing of this cluster"):
        nodes[0].call("dlm.echo", {"text": "z", "mountpoint": "/other"})


def test_the_last_node_leaves_and_comes_back(cluster):
    node = cluster.found()
    node.ctl("leave")
    assert node.process.wait(60) == 0
    node.start()
    wait_until(lambda: node.members() == [1], "back")
    os.kill(node.process.pid, signal.SIGTERM)
    assert node.process.wait(60) == 0


def test_leave_is_refused_while_something_is_mounted(cluster):
    node = cluster.found()
    instance = Instance(node)
    refused = node.ctl("leave", check=False)
    assert (refused.returncode, "/m" in refused.stderr) == (5, True)
    instance.stop(clean=True)
    node.ctl("leave")
    assert node.process.wait(60) == 0


def test_events_and_screens(cluster):
    node = cluster.found()
    names = [json.loads(line)["event"] for line in node.ctl("events", "--json").stdout.split("\n")
             if line]  # fmt: skip
    assert names[0] == "node.started"
    assert "view.decided" in names
    assert "n1 *" in node.ctl("status").stdout
    assert "member" in node.ctl("nodes").stdout
    assert "nobody was put out" in node.tool("node.fence_cli", "history")
    wrong = node.ctl("voter", "add", "nobody", check=False)
    assert (wrong.returncode, "nobody" in wrong.stderr) == (7, True)
    status = subprocess.run(
        [sys.executable, "-c", "import sys; import node.cli; print('trio' in sys.modules)"],
        env=node.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert status.stdout.strip() == "False"


def test_a_member_that_hangs_before_it_is_guarded_is_put_out(cluster):
    """It has joined its group, so others wait for it; it has no progress stamp yet."""
    nodes = cluster.up(2, voters=False)
    survivor = Instance(nodes[0], "g", 101)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(nodes[1].run_dir / "clusterd.sock"))
        sock.sendall(encode_line(Call(1, "instance.register", {"kind": "mount"})))
        granted = b""
        while b'"secret"' not in granted:
            granted += sock.recv(4096)
        place = {"group": "g", "addresses": nodes[1].addresses, "port": 102}
        sock.sendall(encode_line(Call(2, "group.join", place)))
        wait_until(lambda: len(survivor.group_events()[-1]["members"]) == 2, "it has joined")
        wait_until(lambda: survivor.group_events("silent"), "it is put out")
        assert nodes[1].events("instance.died")
    assert not [name for name, _ in survivor.events if name == "barred"]
