"""The survivors' stall over power cuts of a node, crashes of a mount process, pulled cables."""

from __future__ import annotations

import statistics
import time

from lab import cluster, demo_faults, hosts
from lab.network import set_cable
from lab.topology import Lab

CUTS = 10
CABLE_OUT_S = 1.5
POWER_CUT, CRASH = "power cut of a node", "crash of a mount process"
CABLE = "cable of a server's network pulled"
AIMS = {CABLE: 0.3, POWER_CUT: 3.0, CRASH: 1.0}


def _crash_mount(lab: Lab, number: int) -> float:
    victim = lab.nodes[1]
    writers = demo_faults.start_writers(lab, f"bench-crash-{number}")
    survivors = [w for w in writers if w.node != victim]
    try:
        moment = time.monotonic()
        cluster.crash(lab, victim, "mount")
        demo_faults.wait_recovered(lab, lab.nodes[0], moment)
        recovered = time.monotonic()
        for writer in survivors:
            writer.wait_beyond(recovered, demo_faults.WARM_RECORDS)
    finally:
        for writer in writers:
            writer.stop()
    demo_faults.check_writers(lab, lab.nodes[0], writers)
    return max(w.stall_around(moment) for w in survivors)


def _pull_cable(lab: Lab, number: int) -> float:
    """One of a server's two networks goes silent, and comes back."""
    server = lab.servers[number % len(lab.servers)]
    network = 1 + number // len(lab.servers) % 2
    writers = demo_faults.start_writers(lab, f"bench-cable-{number}")
    try:
        moment = time.monotonic()
        set_cable(lab, server, network, up=False)
        for writer in writers:
            writer.wait_beyond(moment + CABLE_OUT_S, demo_faults.WARM_RECORDS)
        stalls = [w.stall_around(moment) for w in writers]
    finally:
        set_cable(lab, server, network, up=True)
        for writer in writers:
            writer.stop()
    demo_faults.check_writers(lab, lab.nodes[0], writers)
    return max(stalls)


def run(lab: Lab) -> dict:
    """Longest time between two acknowledged fsyncs of a survivor, seconds: p50 and max."""
    hosts.run(lab, lab.nodes[0], "mkdir", "-p", demo_faults.WORK)
    stalls: dict[str, list[float]] = {name: [] for name in AIMS}
    for number in range(CUTS):
        stalls[CABLE].append(_pull_cable(lab, number))
    for number in range(CUTS):
        cut = demo_faults.cut_node(lab, lab.nodes[1], f"bench-cut-{number}")
        stalls[POWER_CUT].append(cut.stall_s)
        cluster.start(lab, lab.nodes[1])
        stalls[CRASH].append(_crash_mount(lab, number))
        cluster.start(lab, lab.nodes[1])
    return {
        name: {
            "p50_s": round(statistics.median(v), 2),
            "max_s": round(max(v), 2),
            "n": len(v),
            "aim_s": AIMS[name],
        }
        for name, v in stalls.items()
    }


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["longest stall of a writer", "p50 s", "max s", "runs", "aim"]
    return columns, [
        [k, str(r["p50_s"]), str(r["max_s"]), str(r["n"]), f"<= {r['aim_s']} s"]
        for k, r in result.items()
    ]
