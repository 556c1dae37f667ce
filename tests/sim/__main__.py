"""python -m tests.sim --seed S --until T [--trace] [--nodes N] [--servers N] [--mutant NAME]

Exit code: 0 well, 127 a core crashed, 128 no liveness after the faults, 129 an invariant is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback

from tests.sim.mutants import mutation
from tests.sim.scenario import Scenario
from tests.sim.world import LivenessFailure, Violation

CRASH, LIVENESS, CORRECTNESS = 127, 128, 129


def run(seed: int, arguments: argparse.Namespace) -> int:
    """One seed."""
    scenario = Scenario(seed, arguments.nodes, arguments.servers, arguments.trace)
    code, text = 0, "ok"
    begin = time.perf_counter()
    try:
        with mutation(arguments.mutant) if arguments.mutant else contextlib.nullcontext():
            scenario.run(arguments.until)
    except Violation as error:
        code, text = CORRECTNESS, f"VIOLATION {error}"
    except LivenessFailure as error:
        code, text = LIVENESS, f"LIVENESS {error}"
    except Exception:
        code, text = CRASH, "CRASH\n" + traceback.format_exc()
    if arguments.trace:
        print("\n".join(scenario.world.lines))
    world, checker = scenario.world, scenario.checker
    if code or not arguments.quiet:
        print(
            f"seed {seed}: {text} [{world.digest}] {world.now / 1e9:.1f} s simulated, "
            f"{world.events} events, {world.network.sent} messages, {len(checker.views)} views, "
            f"{checker.commits} writes, {checker.reads} cached reads, "
            f"{scenario.faults_seen} faults, {time.perf_counter() - begin:.2f} s"
        )
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.sim")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="this many, from --seed on")
    parser.add_argument("--until", type=float, default=30.0, help="seconds with faults")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--mutant", default="")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    worst = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        worst = max(worst, run(seed, arguments))
    return worst


if __name__ == "__main__":
    sys.exit(main())
