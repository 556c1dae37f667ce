"""fencectl on real nodes: methods and levels, history, explanations, fences by hand."""

import json
import signal
import subprocess
import sys

from node_harness import ROOT, Server, wait_until


def fencectl(node, *args, code=0):
    """Run fencectl; its output."""
    program = "from node.fence_cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        env=node.environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, f"{args}: {done.stdout}{done.stderr}\n{node.logs()}"
    return done.stdout + done.stderr


def explained(node, name):
    """The record of a fence, once there is a verdict."""

    def record():
        found = json.loads(fencectl(node, "explain", name, "--json"))
        return found if found["verdict"] else None

    wait_until(lambda: node.call("fence.explain", {"name": name})["verdict"], f"{name} is fenced")
    return record()


def serve(cluster, count):
    servers = [Server(cluster, number) for number in range(1, count + 1)]
    for server in servers:
        server.configure()
        server.start()
    return servers


def configure(node, text):
    (node.base / "state" / "fencing.toml").write_text(text)


def test_a_power_cut_is_explained_on_every_survivor(cluster):
    """What was seen, by whom it was decided, and the proof of the block servers."""
    first, second, third = cluster.up(3)
    serve(cluster, 2)
    wait_until(lambda: first.status()["installed"] == [129, 130], "both have installed")
    second.kill()
    cluster.wait_view([1, 3])
    for node in (first, third):
        record = explained(node, "n2")
        assert (record["name"], record["incarnation"], record["reason"]) == ("n2", 1, "expelled")
        assert (record["verdict"], record["level"], record["tried_by"]) == ("proven", 1, "n1")
        assert [link["up"] for link in record["links"]] == [False, False]
        assert all(link["since_ms"] > 0 for link in record["links"])
        assert not record["alive"]
        assert record["seen_by"] == node.name
        assert record["lease_ms"] is not None
        (attempt,) = record["attempts"]
        assert attempt["method"] == "servers"
        assert "s1, s2 installed view" in attempt["text"]
    screen = fencectl(third, "explain", "n2")
    assert "network 1: NO heartbeats for" in screen
    assert "proven by level 1" in screen
    assert len(screen.splitlines()) < 24
    assert "proven (level 1)" in fencectl(first, "history")
    second.start()
    cluster.wait_view([1, 2, 3])
    assert json.loads(fencectl(first, "explain", "n2", "--json"))["now"] == 2
    assert "no fence of n1" in fencectl(second, "explain", "n1", code=7)
    # The history outlives the daemon.
    third.kill()
    third.start()
    cluster.wait_view([1, 2, 3])
    assert json.loads(fencectl(third, "explain", "n2", "--json"))["verdict"] == "proven"
    # A damaged history is told, and is no reason not to serve.
    third.kill()
    path = third.base / "state" / "fences"
    path.write_bytes(path.read_bytes()[:-1])
    third.start()
    cluster.wait_view([1, 2, 3])
    assert any("history of fences begins anew" in text for text in third.status()["problems"])
    assert "no fence of n2" in fencectl(third, "explain", "n2", code=7)


def test_a_node_that_is_fenced_by_hand_stays_out_until_it_is_let_in(cluster):
    first, _second, third = cluster.up(3)
    (server,) = serve(cluster, 1)
    configure(first, 'levels = [["servers", "self"]]\n')
    assert "--yes" in fencectl(first, "fence", "n3", code=4)
    assert "itself" in fencectl(first, "fence", "n1", "--yes", code=4)
    assert "no node is called n9" in fencectl(first, "fence", "n9", "--yes", code=7)
    first.ctl("invite", "n4", "--id", "4", "--address", "127.9.9.9", "--address", "127.9.9.8")
    held = fencectl(first, "fence", "n4", "--yes")
    assert held == "n4 was no member; it is held out from now on\n"
    fencectl(first, "unfence", "n4")
    text = fencectl(first, "fence", "n3", "--yes", "--reason", "smoke")
    assert "n3 is fenced: n3 runs life 2, begun after its guard had ended life 1" in text
    attempts = explained(first, "n3")["attempts"]
    assert [one["method"] for one in attempts] == ["servers", "self"]
    assert "s1 installed view" in attempts[0]["text"]
    cluster.wait_view([1, 2])
    wait_until(lambda: third.status()["node"]["incarnation"] == 2, "n3 has begun a new life")
    wait_until(
        lambda: {n["name"]: n["state"] for n in first.status()["nodes"]}["n3"] == "held out",
        "n3 is shown as held out",
    )
    told = "an operator holds n3 out of the cluster until: fencectl unfence n3"
    wait_until(lambda: told in third.status()["problems"], "n3 says why it is out")
    # It is heard, and would be let in at once if nobody held it out: another change goes by.
    wait_until(lambda: first.call("cluster.nodes")[2]["networks"] == ["up", "up"], "n3 is heard")
    first.ctl("voter", "add", server.name)
    assert sorted(first.members()) == [1, 2]
    assert "held out by an operator (fencectl unfence): n3" in fencectl(first, "status")
    record = explained(first, "n3")
    assert record["reason"] == "operator on n1: smoke"
    assert record["held"]
    wait_until(lambda: explained(first, "n3")["alive"], "n3 is heard")
    assert fencectl(first, "unfence", "n3") == "n3 may come back\n"
    cluster.wait_view([1, 2, 3])
    assert fencectl(first, "unfence", "n3") == "n3 was not held out\n"
    wait_until(lambda: not third.status()["problems"], "that is over")
    assert "s1" in fencectl(first, "keys")
    assert "disk0" in fencectl(first, "reservation", "--export", "disk0")
    missing = fencectl(first, "keys", "--export", "nothing", code=7)
    assert "no server has an export nothing" in missing


def test_levels_retries_and_the_next_level(cluster, tmp_path):
    """A server that is away proves nothing; the agent of the next level does; then by hand."""
    first, second, third = cluster.up(3)
    (server,) = serve(cluster, 1)
    status = tmp_path / "status"
    status.write_text("on")
    agent = f'kind = "agent"\nagent = "fence_dummy"\nparameters = {{ status_file = "{status}" }}\n'
    servers = '[methods.servers]\nkind = "servers"\nretries = 1\ntimeout_ms = 300\nretry_ms = 50\n'
    configure(first, f'levels = [["servers"], ["dummy"]]\n{servers}[methods.dummy]\n{agent}')
    server.kill()
    wait_until(lambda: not first.status()["servers"][0]["up"], "s1 is seen down")
    second.kill()
    cluster.wait_view([1, 3])
    record = explained(third, "n2")
    assert (record["verdict"], record["level"]) == ("proven", 2)
    rows = [(one["level"], one["method"], one["number"]) for one in record["attempts"]]
    assert rows == [(1, "servers", 1), (1, "servers", 2), (2, "dummy", 1)]
    assert "not installed view" in record["attempts"][0]["text"]
    assert record["attempts"][2]["text"] == "fence_dummy: off, and plug n2 is off"
    assert status.read_text() == "off"
    second.start()
    cluster.wait_view([1, 2, 3])

    configure(first, 'levels = [["manual"]]\n')
    third.kill()
    cluster.wait_view([1, 2])
    wait_until(lambda: first.call("fence.status")["under_way"] == ["n3"], "n3 is being fenced")
    assert "is not n3" in fencectl(first, "confirm", "n3", "--typed", "n2", code=2)
    assert "nothing waits here" in fencectl(second, "confirm", "n3", "--typed", "n3", code=7)
    fencectl(first, "confirm", "n3", "--typed", "n3")
    assert explained(second, "n3")["attempts"][0]["text"] == "an operator has typed its name"


def test_a_server_that_is_away_holds_the_proof_back(cluster):
    """No proof while one server may still let the dead node's requests through; then both."""
    first, second, third = cluster.up(3)
    one, two = serve(cluster, 2)
    wait_until(lambda: first.status()["installed"] == [129, 130], "both have installed")
    for server in (one, two):
        first.ctl("voter", "add", server.name)
    two.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not first.status()["servers"][1]["up"], "s2 is seen down")
    second.kill()
    cluster.wait_view([1, 3])
    wait_until(lambda: third.status()["installed"] == [129], "s1 has installed")
    assert "n2" in fencectl(first, "status", code=3)
    assert first.call("fence.status")["under_way"] == ["n2"]
    assert first.call("fence.status")["missing"] == [two.name]
    assert first.call("fence.explain", {"name": "n2"})["verdict"] == ""
    assert "being tried" in fencectl(third, "explain", "n2")
    unknown = fencectl(third, "fence", "n2", "--yes", "--wait", "0", code=1)
    assert "no verdict of the methods is known yet" in unknown
    two.process.send_signal(signal.SIGCONT)
    record = explained(third, "n2")
    assert record["verdict"] == "proven"
    assert f"{one.name}, {two.name} installed view" in record["attempts"][-1]["text"]
    assert "n2 is fenced: s1, s2 installed view" in fencectl(third, "fence", "n2", "--yes")


def test_no_block_server_proves_nothing(cluster):
    """Nobody bars the dead node, so the next level has its turn."""
    first, second, _third = cluster.up(3)
    once = '[methods.servers]\nkind = "servers"\nretries = 0\n'
    configure(first, f'levels = [["servers"], ["self"]]\n{once}')
    second.kill()
    cluster.wait_view([1, 3])
    second.start()
    attempts = explained(first, "n2")["attempts"]
    assert [(one["method"], one["verdict"]) for one in attempts] == [
        ("servers", "failed"), ("self", "proven"),
    ]  # fmt: skip
    assert attempts[0]["text"] == "the cluster has no block server that could bar it"


def test_a_wrong_configuration_is_told_and_the_servers_go_on(cluster):
    first, second, _third = cluster.up(3)
    serve(cluster, 1)
    configure(first, 'levels = [["pdu"]]\n')
    second.kill()
    cluster.wait_view([1, 3])
    assert explained(first, "n2")["verdict"] == "proven"
    (problem,) = first.status()["problems"]
    assert "a level names the method pdu, which has no table" in problem
