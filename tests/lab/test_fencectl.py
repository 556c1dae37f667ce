"""Fences of nodes with mounts, by a power cut and by hand, and what fencectl says of them."""

from __future__ import annotations

import json

from lab import cluster, hosts
from lab.topology import MOUNT_POINT, Host, Lab


def fencectl(lab: Lab, node: Host, *arguments: str) -> str:
    return hosts.run(lab, node, "fencectl", *arguments).stdout


def explained(lab: Lab, node: Host, name: str) -> dict:
    """The newest record of a fence, with a verdict."""

    def record() -> dict:
        done = hosts.run(lab, node, "fencectl", "explain", name, "--json", check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {"verdict": ""}

    hosts.wait_for(lambda: bool(record()["verdict"]), 90, f"{name} is fenced")
    return record()


def test_a_power_cut_is_explained(ready: Lab) -> None:
    """Every survivor says what it saw, and names the proof of both servers."""
    first, second, victim = ready.nodes
    cluster.power_cut(ready, victim)
    life = None
    for node in (first, second):
        record = explained(ready, node, victim.name)
        life = life or record["incarnation"]
        assert record["incarnation"] == life
        assert (record["verdict"], record["tried_by"]) == ("proven", first.name)
        assert [link["up"] for link in record["links"]] == [False, False]
        assert "s1, s2 installed view" in record["attempts"][-1]["text"]
        screen = fencectl(ready, node, "explain", victim.name)
        assert "NO heartbeats" in screen
        assert "drained its requests" in screen
    assert victim.name in fencectl(ready, second, "history")
    cluster.start(ready, victim)
    assert cluster.is_mounted(ready, victim)


def test_a_mount_of_a_node_that_is_fenced_by_hand_ends_and_comes_back_when_let_in(
    ready: Lab,
) -> None:
    """The node lives and is connected, and yet not one write of it executes until it is let in."""
    first, _second, victim = ready.nodes
    path = f"{MOUNT_POINT}/fenced"
    hosts.run(ready, victim, "sh", "-c", f"echo before > {path}; sync {path}")
    said = fencectl(ready, first, "fence", victim.name, "--yes", "--reason", "maintenance")
    assert f"{victim.name} is fenced: s1, s2 installed view" in said
    late = hosts.run(ready, victim, "sh", "-c", f"echo after > {path}", check=False)
    assert hosts.run(ready, first, "cat", path).stdout == "before\n"
    assert late.returncode != 0 or not cluster.is_mounted(ready, victim)
    hosts.wait_for(lambda: held(ready, first) == [victim.name], 90, "it is shown as held out")
    keys = json.loads(fencectl(ready, first, "keys", "--json"))
    assert {row["server"] for row in keys} == {"s1", "s2"}
    registered = {one[0][0] for row in keys for one in row["registrations"]}
    assert 3 not in registered
    record = explained(ready, first, victim.name)
    assert record["reason"] == "operator on n1: maintenance"
    assert record["alive"]
    fencectl(ready, first, "unfence", victim.name)
    cluster.wait_mounted(ready, victim)
    assert hosts.run(ready, victim, "cat", path).stdout == "before\n"
    assert held(ready, first) == []


def held(lab: Lab, node: Host) -> list[str]:
    done = hosts.run(lab, node, "fencectl", "status", "--json", check=False)
    return list(json.loads(done.stdout)["held"])
