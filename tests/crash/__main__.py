"""`python -m tests.crash`: the crash-point campaign.

    python -m tests.crash record DIR --seed 1 --changes 2000    run the workload, keep the logs
    python -m tests.crash record DIR --kill --power             a mount dies, a server loses power
    python -m tests.crash check DIR                             every prefix, several disks each
    python -m tests.crash check DIR --share 3/8                 an eighth of the points
    python -m tests.crash check DIR --points 200                some points only
    python -m tests.crash check DIR --at 1234                   one point again
    python -m tests.crash run --seed 1                          both, in a temporary directory
    python -m tests.crash pure --seed 1 --rounds 100            the cores alone, in memory

`record` needs root, FUSE and the addresses 127/8. The exit code is 1 if a disk was wrong.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.crash.verify import Verifier

SHOWN_EVERY_S = 10.0


def check_points(
    verifier: Verifier,
    *,
    points: int,
    at: int,
    share: str,
    variants: int,
    seed: int,
    failures_max: int = 5,
) -> bool:
    """Check and report; True if all disks were right."""
    chosen = list(verifier.points())
    total = len(chosen)
    if at >= 0:
        chosen = [at]
    elif points:
        chosen = sorted(random.Random(seed).sample(chosen, min(points, total)))
    part, _, parts = share.partition("/")
    chosen = chosen[int(part) - 1 :: int(parts)]
    click.echo(f"{total} prefixes, {len(chosen)} of them chosen, seed {seed}")
    begin = shown = time.monotonic()
    images = bad = 0
    for failure in verifier.run(chosen, variants, seed):
        images += 1
        if failure is not None:
            bad += 1
            click.echo(f"WRONG: {failure}")
            if bad >= failures_max:
                break
        if time.monotonic() - shown > SHOWN_EVERY_S:
            shown = time.monotonic()
            click.echo(f"{images} disks checked in {shown - begin:.0f} s, {bad} wrong")
    click.echo(f"{images} disks in {time.monotonic() - begin:.1f} s: {bad} wrong")
    return not bad


@click.group()
def app() -> None:
    """Crash points of a recorded workload."""


@app.command()
@click.argument("base", type=click.Path(path_type=Path))
@click.option("--seed", default=1)
@click.option("--changes", default=2000)
@click.option("--nodes", default=3)
@click.option("--kill", is_flag=True, help="Kill a mount process on the way.")
@click.option("--power", is_flag=True, help="Cut the power of a server on the way.")
def record(base: Path, seed: int, changes: int, nodes: int, kill: bool, power: bool) -> None:
    """Run the workload on a cluster of real processes."""
    from tests.crash.record import record as run_record

    base.mkdir(parents=True)
    begin = time.monotonic()
    run_record(base, seed, changes=changes, nodes=nodes, kill=kill, power=power)
    sizes = {path.name: path.stat().st_size for path in base.glob("s*.log")}
    click.echo(f"{changes} changes in {time.monotonic() - begin:.1f} s, logs {sizes}")


@app.command()
@click.argument("base", type=click.Path(path_type=Path, exists=True))
@click.option("--points", default=0, help="How many, chosen at random; 0: all.")
@click.option("--at", default=-1, help="This one only.")
@click.option("--share", default="1/1", help="Which part of the points, e.g. 2/8.")
@click.option("--variants", default=7, help="Disks made for each point.")
@click.option("--seed", default=1)
def check(base: Path, points: int, at: int, share: str, variants: int, seed: int) -> None:
    """Mount, replay, check and compare the disks of a recording."""
    good = check_points(
        Verifier.load(base), points=points, at=at, share=share, variants=variants, seed=seed
    )
    sys.exit(0 if good else 1)


@app.command()
@click.option("--seed", default=1)
@click.option("--changes", default=2000)
@click.option("--points", default=0)
@click.option("--variants", default=7)
@click.option("--kill", is_flag=True)
@click.option("--power", is_flag=True)
def run(seed: int, changes: int, points: int, variants: int, kill: bool, power: bool) -> None:
    """Record and check."""
    from tests.crash.record import record as run_record

    with tempfile.TemporaryDirectory(prefix="cfs-crash-") as name:
        base = Path(name)
        run_record(base, seed, changes=changes, kill=kill, power=power)
        good = check_points(
            Verifier.load(base), points=points, at=-1, share="1/1", variants=variants, seed=seed
        )
    sys.exit(0 if good else 1)


@app.command()
@click.option("--seed", default=1)
@click.option("--rounds", default=1, help="So many seeds, one after another.")
@click.option("--changes", default=300)
@click.option("--points", default=0)
@click.option("--at", default=-1)
@click.option("--variants", default=7)
@click.option("--mounts", default=3)
@click.option("--kill/--no-kill", default=None, help="Kill a mount half way (default: by seed).")
def pure(
    seed: int,
    rounds: int,
    changes: int,
    points: int,
    at: int,
    variants: int,
    mounts: int,
    kill: bool | None,
) -> None:
    """The workload on the cores alone, in memory; many seeds in little time. With every fourth seed
    the mount that recovers a killed one is killed as well."""
    from tests.crash.pure import run_pure

    bad = 0
    for each in range(seed, seed + rounds):
        doomed = each % 2 == 0 if kill is None else kill
        again = doomed and mounts > 2 and not each % 4
        recorded = run_pure(each, changes=changes, mounts=mounts, kill=doomed, again=again)
        good = check_points(
            Verifier(*recorded), points=points, at=at, share="1/1", variants=variants, seed=each
        )
        bad += not good
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    app()
