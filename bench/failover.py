"""The survivors' stall over power cuts of a node and crashes of a mount process."""

from __future__ import annotations

import statistics
import time

from lab import cluster, demo_faults, hosts
from lab.topology import Lab

CUTS = 10


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


def run(lab: Lab) -> dict:
    """Longest time between two acknowledged fsyncs of a survivor, seconds: p50 and max."""
    hosts.run(lab, lab.nodes[0], "mkdir", "-p", demo_faults.WORK)
    stalls: dict[str, list[float]] = {"power cut of a node": [], "crash of a mount process": []}
    for number in range(CUTS):
        cut = demo_faults.cut_node(lab, lab.nodes[1], f"bench-cut-{number}")
        stalls["power cut of a node"].append(cut.stall_s)
        cluster.start(lab, lab.nodes[1])
        stalls["crash of a mount process"].append(_crash_mount(lab, number))
        cluster.start(lab, lab.nodes[1])
    aims = {"power cut of a node": 3.0, "crash of a mount process": 1.0}
    return {
        name: {
            "p50_s": round(statistics.median(v), 2),
            "max_s": round(max(v), 2),
            "n": len(v),
            "aim_s": aims[name],
        }
        for name, v in stalls.items()
    }


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["survivors' stall", "p50 s", "max s", "runs", "aim"]
    return columns, [
        [k, str(r["p50_s"]), str(r["max_s"]), str(r["n"]), f"<= {r['aim_s']} s"]
        for k, r in result.items()
    ]
