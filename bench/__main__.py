"""`python -m bench`: measure on a lab of its own; prints tables, writes JSON (and the docs page).

Timings are noisy: what is compared is measured in turns within one run, and the tables give ratios
or distributions.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import click

from bench import (
    changes,
    failover,
    locks,
    metadata,
    pause,
    ranges,
    syncs,
    throughput,
    trees,
    warm,
)
from lab import cluster
from lab.topology import LabState

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = {
    "throughput": (throughput, "Throughput of one mount"),
    "warm": (warm, "Warm caches"),
    "metadata": (metadata, "Small operations"),
    "trees": (trees, "Trees of small files"),
    "syncs": (syncs, "Write and fsync"),
    "changes": (changes, "Change seen by another node"),
    "locks": (locks, "Locks"),
    "ranges": (ranges, "Byte ranges handed from process to process"),
    "failover": (failover, "Stall of the survivors, profile fast"),
    "pause": (pause, "A node paused beyond its lease"),
}


def _markdown(results: dict, command: str) -> str:
    lines = [
        "# Benchmarks",
        "",
        f"Made by `{command}` on Linux {platform.release()}, Python {platform.python_version()}, "
        f"all hosts as namespaces of one machine with 2 cores.",
        "",
    ]
    for name, result in results.items():
        module, title = SECTIONS[name]
        columns, table = module.rows(result)
        lines += [f"## {title}", "", "| " + " | ".join(columns) + " |"]
        lines += ["|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in table] + [""]
    lines += (Path(__file__).parent / "notes.md").read_text().splitlines()
    return "\n".join(lines)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(sorted(SECTIONS)), help="Some sections.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), default=ROOT / "bench.json")
@click.option("--write-docs", is_flag=True, help="Rewrite docs/benchmarks.md.")
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), default=Path("/var/tmp/cfs-bench")
)
def main(only: tuple[str, ...], json_path: Path, write_docs: bool, directory: Path) -> None:
    """Run the benchmarks."""
    lab = cluster.create(directory, LabState(3, 2, "4G", "fast", volatile=False))
    results = {}
    try:
        cluster.up(lab)
        for name in only or SECTIONS:
            print(f"bench: {name}", file=sys.stderr, flush=True)
            results[name] = SECTIONS[name][0].run(lab)
            cluster.up(lab)
    finally:
        cluster.down(directory)
        json_path.write_text(json.dumps(results, indent=2) + "\n")
    command = "python -m bench" + "".join(f" --only {name}" for name in only)
    text = _markdown(results, "make bench" if not only else command)
    print(text)
    if write_docs:
        (ROOT / "docs" / "benchmarks.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
