"""Real software under power cuts: a database that all nodes write."""

from __future__ import annotations

from lab import cluster, demo_database, hosts
from lab.demo_work import WORK
from lab.topology import Lab


def test_an_sqlite_database_survives_a_power_cut(ready: Lab) -> None:
    """Every acknowledged commit once, nothing half, integrity_check; also the dead node's."""
    hosts.run(ready, ready.nodes[0], "mkdir", "-p", WORK)
    victim = ready.nodes[1]
    result = demo_database.cut_node(ready, victim, "test.sqlite")
    print(result)
    assert all(count >= demo_database.WARM_COMMITS for count in result.acknowledged.values())
    cluster.start(ready, victim)
    assert cluster.is_mounted(ready, victim)
