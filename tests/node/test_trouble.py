"""What a node meets at its start and at work: a full disk, another key, an old state directory."""

import re
import subprocess
import sys

from node_harness import ROOT, wait_until

from cluster.errors import EXIT_NO_SPACE
from node.problems import PROBLEMS_MAX, Problems
from tests.hostile.disks import small_disk


def problems(node):
    return node.status()["problems"]


def test_no_place_for_the_state_of_a_node(cluster):
    """A running voter falls silent, says why, and acknowledges nothing; with room it goes on. A
    start without room ends with one sentence."""
    node = cluster.node(1)
    with small_disk(node.base / "state") as disk:
        cluster.found()
        incarnation = node.status()["node"]["incarnation"]
        disk.fill()
        words = ["-m", "node.cli", "invite", "n2", "--id", "2", "--address", "127.9.9.9"]
        invite = subprocess.Popen(
            [sys.executable, *words], env=node.environment, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        cluster.started.append(invite)
        (problem,) = wait_until(lambda: problems(node), "the full disk is told")
        assert re.search("acceptor: No space left on device; this node does not vote", problem)
        assert f"PROBLEM: {problem}" in node.ctl("status", check=False).stdout
        assert problem in [event["text"] for event in node.events()]
        assert invite.poll() is None
        disk.make_room()
        wait_until(lambda: not problems(node), "the problem is over")
        assert invite.wait(60) == 0
        assert node.members() == [1]
        assert node.status()["node"]["incarnation"] == incarnation

        node.kill()
        node.start()
        assert any(one["name"] == "n2" for one in node.status()["nodes"]), "it was acknowledged"
        node.kill()
        disk.fill()
        done = subprocess.run(node.command(), env=node.environment, capture_output=True, text=True,
                              cwd=node.base.parent, timeout=60, check=False)  # fmt: skip
        assert done.returncode == EXIT_NO_SPACE, done.stderr
        assert re.fullmatch(
            r"clusterd: cannot write \S+/incarnation: No space left on device\n(  hint: .*\n)?",
            done.stderr,
        )
        disk.make_room()
        node.start()
        wait_until(lambda: node.members() == [1], "the node is back")


def test_what_a_node_cannot_note_it_notes_when_there_is_room(cluster):
    """Neither the register's newest value nor a fence is forgotten because the disk was full."""
    cluster.found()
    second = cluster.node(2)
    state = second.base / "state"
    with small_disk(state) as disk:
        cluster.join(2)
        third = cluster.join(3)
        known = (state / "known").read_bytes()
        disk.fill()
        third.kill()
        wait_until(lambda: len(problems(second)) == 2, "both files are told")
        assert all("No space left on device" in text for text in problems(second))
        assert (state / "known").read_bytes() == known
        disk.make_room()
        wait_until(lambda: not problems(second), "the problems are over")
        assert (state / "known").read_bytes() != known
        assert (state / "fences").exists()
        second.kill()


def test_a_voter_with_another_key_is_named_on_both_sides(cluster):
    """Nobody is quorate, and each side says why. The one with the wrong key does not dial."""
    first, second = cluster.up(2)
    first.kill()
    config = first.base / "state" / "node.toml"
    config.write_text(re.sub('key = "[0-9a-f]{64}"', f'key = "{"9" * 64}"', config.read_text()))
    first.start()
    refused = "n1 hangs up on this node; it may use another cluster key"
    wait_until(lambda: refused in problems(second), refused)
    other = "n2 uses another cluster key than this node"
    wait_until(lambda: other in problems(first), other)
    assert first.members() == second.members() == []


def test_a_node_with_another_key_is_named_on_both_sides(cluster):
    """It is not let in, and each side says who uses another key."""
    first, second = cluster.up(2, voters=False)
    second.kill()
    cluster.wait_view([1])
    config = second.base / "state" / "node.toml"
    right = config.read_text()
    config.write_text(re.sub('key = "[0-9a-f]{64}"', f'key = "{"9" * 64}"', right))
    second.start()
    for node, other in ((first, second), (second, first)):
        text = f"{other.name} uses another cluster key than this node"
        wait_until(lambda node=node, text=text: text in problems(node), text)
        assert f"PROBLEM: {text}\n" in node.ctl("status", check=False).stdout
        assert text in [event["text"] for event in node.events("note")]
    assert first.members() == [1]
    assert second.members() == []
    second.kill()
    config.write_text(right)
    second.start()
    cluster.wait_view([1, 2])
    wait_until(lambda: not problems(first), "the key is forgotten")


def test_a_node_with_an_older_configuration_catches_up(cluster):
    """Its copy of the register is from before the voters, nodes and lives of today."""
    _first, second = cluster.up(2, voters=False)
    known = second.base / "state" / "known"
    wait_until(lambda: second.status()["nodes"][1]["voter"] is False, "the register is known")
    old = known.read_bytes()
    second.kill()
    cluster.wait_view([1])
    third = cluster.join(3)
    third.ctl("voter", "add", "n3")
    third.ctl("voter", "remove", "n1")
    epoch = third.status()["config_epoch"]
    known.write_bytes(old)
    (second.base / "state" / "incarnation").write_text("0\n")
    second.start()
    cluster.wait_view([1, 2, 3])
    wait_until(lambda: second.status()["config_epoch"] == epoch, "the configuration is known")
    assert [voter["name"] for voter in second.status()["voters"]] == ["n3"]


def test_problems_are_told_once_and_end():
    """One is new once, lasts until it is cleared or not repeated, and their number is bounded."""
    kept = Problems()
    assert kept.found(0, "disk", "full")
    assert not kept.found(1, "disk", "full")
    assert kept.found(2, "disk", "fuller")
    assert kept.found(3, "key", "another", 10)
    assert not kept.found(8, "key", "another", 10)
    assert kept.texts(17) == ["fuller", "another"]
    assert kept.texts(18) == ["fuller"]
    assert kept.over("disk")
    assert not kept.over("disk")
    assert kept.texts(19) == []
    for number in range(2 * PROBLEMS_MAX):
        kept.found(20, str(number), "x")
    assert len(kept.texts(20)) == PROBLEMS_MAX
