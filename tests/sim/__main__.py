"""python -m tests.sim --seed S --until T [--trace] [--nodes N] [--servers N] [--mutant NAME]
python -m tests.sim --world circuits|fence|multipath --seed S --seeds N

Exit code: 0 well, 127 a core crashed, 128 no liveness after the faults, 129 an invariant is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable

from tests.sim import circuit_world, fence_world, multipath_world
from tests.sim.mutants import mutation
from tests.sim.scenario import Scenario
from tests.sim.world import LivenessFailure, Violation

CRASH, LIVENESS, CORRECTNESS = 127, 128, 129
SMALL_WORLDS = {
    "circuits": circuit_world.run, "fence": fence_world.run, "multipath": multipath_world.run,
}  # fmt: skip


def verdict(action: Callable[[], object]) -> tuple[int, str]:
    """Exit code and text."""
    try:
        action()
    except Violation as error:
        return CORRECTNESS, f"VIOLATION {error}"
    except LivenessFailure as error:
        return LIVENESS, f"LIVENESS {error}"
    except Exception:
        return CRASH, "CRASH\n" + traceback.format_exc()
    return 0, "ok"


def run_small(seed: int, arguments: argparse.Namespace) -> int:
    """One seed of a world that has no options."""
    begin = time.perf_counter()
    code, text = verdict(lambda: SMALL_WORLDS[arguments.world](seed))
    if code or not arguments.quiet:
        print(f"seed {seed}: {text}, {time.perf_counter() - begin:.2f} s", flush=True)
    return code


def run(seed: int, arguments: argparse.Namespace) -> int:
    """One seed."""
    scenario = Scenario(seed, arguments.nodes, arguments.servers, arguments.trace)
    begin = time.perf_counter()
    with mutation(arguments.mutant) if arguments.mutant else contextlib.nullcontext():
        code, text = verdict(lambda: scenario.run(arguments.until))
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
    parser.add_argument("--world", choices=("cluster", *SMALL_WORLDS), default="cluster")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1, help="this many, from --seed on")
    parser.add_argument("--until", type=float, default=30.0, help="seconds with faults")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--mutant", default="")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    one = run_small if arguments.world in SMALL_WORLDS else run
    worst = 0
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        worst = max(worst, one(seed, arguments))
    return worst


if __name__ == "__main__":
    sys.exit(main())
