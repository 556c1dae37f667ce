"""How long a node that was paused as a whole reads old cached bytes after its resume (rule G3)."""

from __future__ import annotations

import statistics

from lab import stale
from lab.topology import Lab

PAUSES = 10
AIM_MS = 50.0


def run(lab: Lab) -> dict:
    """Milliseconds from the resume to the last read that still gave the old version."""
    victim = lab.nodes[2]
    results = [stale.pause(lab, victim, f"bench-pause-{number}") for number in range(PAUSES)]
    found: dict = {how: sorted(result.stale_ms[how] for result in results) for how in stale.WAYS}
    return {
        **{
            how: {"p50_ms": statistics.median(values), "max_ms": values[-1], "n": len(values)}
            for how, values in found.items()
        },
        "refused_writes": sum(result.refused_writes for result in results),
        "back_s": statistics.median(result.back_s for result in results),
    }


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["old bytes after a resume", "p50 ms", "max ms", "pauses", "aim"]
    return columns, [
        [how, f"{r['p50_ms']:.1f}", f"{r['max_ms']:.1f}", str(r["n"]), f"<= {AIM_MS:.0f} ms"]
        for how, r in result.items()
        if isinstance(r, dict)
    ]
