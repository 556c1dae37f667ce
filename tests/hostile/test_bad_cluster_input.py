"""Bad input to a running cluster of one node and one block server; the register stays as it is."""

from __future__ import annotations

import re
import shlex

import pytest

from tests.hostile.tools import one_sentence, run
from tests.node import harness

ROWS = [
    ("clusterctl forget n9", 7, "no node is called n9.*clusterctl nodes"),
    ("clusterctl voter add n9", 7, "neither a node nor a server is called n9"),
    ("clusterctl voter remove n1", 4, "last voter"),
    ("clusterctl forget n1", 4, "n1|node 1"),
    ("clusterctl server remove s9", 7, "no server is called s9"),
    ("clusterctl invite n2 --id 1 --address 127.9.9.9", 2, "id 1 is already in use by node n1"),
    ("clusterctl invite n1 --id 2 --address 127.9.9.9", 2, "already called n1"),
    ("clusterctl invite n2 --id 2 --address {n1}", 2, "is the address of node n1"),
    ("clusterctl invite n2 --id 2 --address n2.local", 2, "n2.local"),
    ("clusterctl invite 'n 2' --id 2 --address 127.9.9.9", 2, "name"),
    ("clusterctl server add s1 --id 130 --address 127.9.9.9", 2, "s1 already has id 129"),
    ("clusterctl server add s2 --id 129 --address 127.9.9.9", 2, "s1 already has id 129"),
    ("clusterctl recover test --voters n1 --yes", 4, "majority of the voters answers"),
    ("clusterctl recover other --voters n1 --yes", 4, "name must be typed.*recover test"),
    ("cfsctl df /nowhere", 7, "/nowhere"),
    ("dlmctl why I1", 7, "no lockspace"),
    ("gnbdctl --config {wrong} -s s1 exports", 8, "does not believe this key"),
    ("gnbdctl -s s9 exports", 7, "no server is called s9.*s1"),
    ("gnbdctl -s s1 keys nothing", 7, "no export 'nothing'"),
    ("gnbdctl -s s1 filter nothing add volatile", 7, "no export 'nothing'"),
    ("cvmctl pvcreate s9/disk0", 5, "No device found.*s1/disk0"),
    ("cvmctl pvcreate nonsense", 5, "No device found"),
    ("cvmctl pvremove s1/disk0", 5, "No PV found"),
    ("cvmctl vgcreate vg0 s1/none", 5, "No device found"),
    ("cvmctl vgcreate 'v g' s1/disk0", 3, "invalid"),
    ("cvmctl vgcreate -s 3x vg0 s1/disk0", 3, "3x"),
    ("cvmctl vgcreate vg0 s1/disk0 s1/disk0", 3, "named twice"),
    ("cvmctl vgremove vg9", 5, "vg9"),
    ("cvmctl lvcreate -n vol0 -L 1g vg9", 5, "vg9"),
    ("cvmctl lvextend -L +1g vg9/vol0", 5, "vg9"),
    ("cvmctl lvremove -y vg9/vol0", 5, "vg9"),
    ("cvmctl activate vg9/vol0", 5, "vg9"),
    ("cvmctl history vg9", 5, "vg9"),
    ("mkfs.cfs vg9/vol0", 1, "vg9"),
    ("fsck.cfs vg9/vol0", 8, "vg9"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    cluster = harness.Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        node = cluster.found()
        server = harness.Server(cluster, 1)
        server.configure()
        server.start()
        yield node
    finally:
        cluster.close()


def test_bad_input(world, monkeypatch):
    """The table above; all failures at once."""
    for name, value in world.environment.items():
        if name.startswith("CFS_"):
            monkeypatch.setenv(name, value)
    failed = []
    config = (world.base / "state/node.toml").read_text()
    wrong = world.base / "wrong.toml"
    wrong.write_text(re.sub('key = "[0-9a-f]{64}"', f'key = "{"9" * 64}"', config))
    before = configuration(world)
    for typed, code, words in ROWS:
        typed = typed.replace("{n1}", world.addresses[0]).replace("{wrong}", str(wrong))
        tool, *arguments = shlex.split(typed)
        ended = run(tool, *arguments)
        try:
            text = one_sentence(tool, ended)
            assert ended.code == code, (ended.code, text)
            assert re.search(words, text, re.DOTALL), text
            assert configuration(world) == before
        except AssertionError as error:
            failed.append(f"{typed}: {error}")
    assert not failed, "\n".join(failed)


def configuration(node) -> object:
    status = node.status()
    kept = ("nodes", "servers", "voters", "config_epoch", "volume_groups")
    rows = {name: status.get(name) for name in kept}
    for row in [*(rows["nodes"] or []), *(rows["servers"] or [])]:
        for name in list(row):
            if name not in ("id", "name", "addresses", "port"):
                del row[name]
    return rows
