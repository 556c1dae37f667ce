"""Clusters with block servers: installs, votes of servers, volumes through the node."""

import subprocess
import sys

from node_harness import ROOT, Instance, Server, wait_until


def serve(cluster, count):
    servers = [Server(cluster, number) for number in range(1, count + 1)]
    for server in servers:
        server.configure()
        server.start()
    return servers


def installed(node):
    return node.status()["installed"]


def test_views_are_installed_also_on_a_server_that_was_away(cluster):
    first, second, third = cluster.up(3)
    one, two = serve(cluster, 2)
    wait_until(lambda: installed(first) == [129, 130], "both have installed")
    two.kill()
    wait_until(lambda: not first.status()["servers"][1]["up"], "s2 is seen down")
    second.kill()
    cluster.wait_view([1, 3])
    wait_until(lambda: installed(third) == [129] and installed(first) == [129], "s1 installed")
    two.start()
    wait_until(lambda: installed(third) == [129, 130], "s2 has caught up")
    one.kill()
    one.start()
    assert first.ctl("status").returncode == 0


def test_two_nodes_and_a_server_with_a_vote(cluster):
    first, second = cluster.up(2)
    serve(cluster, 1)
    first.ctl("voter", "add", "s1")
    assert [v["name"] for v in first.status()["voters"]] == ["n1", "n2", "s1"]
    wait_until(lambda: all(v["heard"] for v in first.status()["voters"]), "all voters echo")
    first.kill()
    cluster.wait_view([2])
    assert second.status()["quorate"]
    first.start()
    cluster.wait_view([1, 2])


def test_volume_commands_on_every_node_and_a_change_of_an_open_volume(cluster):
    first, second = cluster.up(2, voters=False)
    serve(cluster, 2)
    first.tool("cvm.cli", "pvcreate", "s1/disk0", "s2/disk0")
    second.tool("cvm.cli", "vgcreate", "vg0", "s1/disk0", "s2/disk0")
    first.tool("cvm.cli", "lvcreate", "-n", "vol0", "-i", "2", "-I", "64k", "-L", "64m", "vg0")
    assert "vol0" in second.tool("cvm.cli", "lvs")
    assert second.status()["volume_groups"][0]["name"] == "vg0"
    calls = []

    async def suspend(params):
        calls.append(("suspend", params["sequence"]))
        return {}

    async def resume(params):
        calls.append(("resume", params["map"]["size_bytes"]))
        return {}

    handlers = {"volume.suspend": suspend, "volume.resume": resume}
    opener = Instance(second, handlers=handlers)
    found = opener.call("volume.open", {"volume": "vg0/vol0", "mode": "sharedwrite"})
    assert found["size_bytes"] == 64 << 20
    first.tool("cvm.cli", "lvextend", "-L", "128m", "vg0/vol0")
    assert [name for name, _ in calls] == ["suspend", "resume"]
    assert calls[-1] == ("resume", 128 << 20)
    opener.stop(clean=False)
    first.tool("cvm.cli", "lvextend", "-L", "192m", "vg0/vol0")
    assert len(calls) == 2
    assert first.call("cvm.lvs", {"names": []}) == second.call("cvm.lvs", {"names": []})


def test_a_damaged_block_is_in_the_event_stream(cluster):
    """Found by a scrub on the storage host; every node says so."""
    (first,) = cluster.up(1)
    server = Server(cluster, 1)
    server.configure(size="16M", filters=(), more='integrity = "crc32c"\n')
    server.start()
    with open(server.base / "disk0", "r+b") as disk:
        disk.seek(8 << 20)
        disk.write(b"?")
    code = "from gnbd.control.cli import control_main; control_main()"
    arguments = ["-s", f"{server.base}/state/gnbd.sock", "scrub", "disk0", "--rate", "0", "--wait"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True)
    assert done.returncode == 11, done.stderr
    wait_until(lambda: first.events("disk.damaged"), "the event")
    (event,) = first.events("disk.damaged")
    assert event["text"] == f"server s1: export disk0: checksum mismatch at {8 << 20}"
