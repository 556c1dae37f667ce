"""A step of the demonstration: one SQLite database that every node writes while one loses power."""

from __future__ import annotations

import time

import msgspec

from cluster.errors import StackError
from lab import cluster, hosts
from lab.demo_faults import STALL_LIMIT_S, Writer
from lab.demo_work import WORK, Results, program
from lab.report import Reporter
from lab.topology import Host, Lab

WARM_COMMITS = 5
"""Of each node before the cut, and again of each survivor after it."""


class DatabaseResult(msgspec.Struct):
    """What became of the database."""

    acknowledged: dict[str, int]
    """Commits that had returned, by node."""
    found: dict[str, int]
    total: int
    stall_s: float
    """The longest time in which a survivor had no commit, from the cut on."""


def cut_node(lab: Lab, victim: Host, name: str) -> DatabaseResult:
    """All nodes count up in one database; a node loses power. Raises StackError unless the
    database is whole and holds each commit that was acknowledged, and of the dead node at most
    the one more that was under way."""
    path = f"{WORK}/{name}"
    reader = next(node for node in lab.nodes if node != victim)
    program(lab, reader, "database-create", path)
    writers = [Writer(lab, node, "database-writer", path) for node in lab.nodes]
    survivors = [writer for writer in writers if writer.node != victim]
    try:
        for writer in writers:
            writer.wait_beyond(0.0, WARM_COMMITS)
        moment = time.monotonic()
        cluster.power_cut(lab, victim)
        # Each of them: whoever goes on has got past what the dead one had locked and half written.
        for writer in survivors:
            writer.wait_beyond(time.monotonic(), WARM_COMMITS)
        for writer in survivors:
            writer.finish()
    finally:
        for writer in writers:
            writer.stop()
    checked = program(lab, reader, "database-check", path)
    result = DatabaseResult(
        {writer.node.name: len(writer.times) for writer in writers},
        {node.name: checked["writers"].get(str(node.index), 0) for node in lab.nodes},
        checked["total"],
        max(writer.stall_around(moment) for writer in survivors),
    )
    for node in lab.nodes:
        lost = result.acknowledged[node.name] - result.found[node.name]
        if lost not in ((0, -1) if node == victim else (0,)):
            raise StackError(f"{node.name}: {lost} acknowledged commits are not in the database")
    return result


def database(lab: Lab, report: Reporter) -> Results:
    """One database for all nodes."""
    victim = lab.nodes[1]
    report.say(f"all nodes count up in one SQLite database; power cut of {victim.name}")
    result = cut_node(lab, victim, "counter.sqlite")
    rows = [[name, str(n), str(result.found[name])] for name, n in result.acknowledged.items()]
    report.table(
        "the database after the power cut of n2", ["node", "commits acknowledged", "found"], rows
    )
    cluster.start(lab, victim)
    hosts.wait_for(lambda: cluster.is_mounted(lab, victim), STALL_LIMIT_S, f"{victim.name} is back")
    return [
        ("SQLite database written by all nodes, power cut of n2", "whole, integrity_check ok"),
        ("commits in it", f"{result.total}, none of the acknowledged lost"),
        ("longest time without a commit of a survivor", f"{result.stall_s:.1f} s"),
    ]
