"""fio on one mount, beside fio's nbd engine on a plain export of one of its servers and beside an
empty pyfuse3 file system; in turns, within one run. Nothing stands between the servers and their
files. The export is never flushed; the mount's writes are, every 32 MiB on each server (R7)."""

from __future__ import annotations

import json
import statistics

from bench import empty
from lab import hosts
from lab.topology import MOUNT_POINT, Host, Lab

ROUNDS = 3
RUNTIME_S = 3
FIRST = {
    "4k direct random read QD1": 3204,
    "4k direct random read QD16": 11421,
    "4k direct random write QD1": 3105,
    "4k direct random write QD16": 6181,
}
"""Of the first version."""
JOBS = {
    "1M direct read QD8": ["--rw=read", "--bs=1M", "--iodepth=8", "--size=256M"],
    "1M direct write QD8": ["--rw=write", "--bs=1M", "--iodepth=8", "--size=256M"],
    "4k direct random read QD1": ["--rw=randread", "--bs=4k", "--iodepth=1", "--size=256M"],
    "4k direct random read QD16": ["--rw=randread", "--bs=4k", "--iodepth=16", "--size=256M"],
    "4k direct random write QD1": ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--size=256M"],
    "4k direct random write QD16": ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=256M"],
}
COMMON = [
    "fio",
    "--output-format=json",
    "--name=bench",
    "--time_based",
    "--group_reporting",
    f"--runtime={RUNTIME_S}",
    "--norandommap",
    "--randrepeat=0",
]


def _rate(lab: Lab, node: Host, job: str, target: list[str]) -> float:
    """MiB/s for the 1M jobs, IOPS for the 4k jobs."""
    result = hosts.run(lab, node, *COMMON, *JOBS[job], *target, timeout_s=120)
    text = result.stdout
    side = json.loads(text[text.index("{") :])["jobs"][0]["read" if "read" in job else "write"]
    return side["bw_bytes"] / (1 << 20) if job.startswith("1M") else side["iops"]


def run(lab: Lab) -> dict:
    """Rates per job and target: medians over the rounds, and the ratios."""
    node, server = lab.nodes[0], lab.servers[0]
    path = f"{MOUNT_POINT}/bench-throughput"
    libaio = ["--ioengine=libaio", "--direct=1"]
    hosts.run(
        lab,
        node,
        *COMMON[:3],
        "--rw=write",
        "--bs=1M",
        "--size=256M",
        "--end_fsync=1",
        f"--filename={path}",
        timeout_s=300,
    )
    scratch = ["--ioengine=nbd", f"--uri=nbd://{server.address(1)}:10809/scratch"]
    # A hole is answered without a byte: what is read there has to be written first.
    hosts.run(lab, node, *COMMON[:3], "--rw=write", "--bs=1M", "--size=256M", *scratch)
    targets = {
        "mount": [*libaio, f"--filename={path}"],
        "nbd": scratch,
        "empty": [*libaio, f"--filename={empty.PATH}/f"],
    }
    samples: dict[str, dict[str, list[float]]] = {j: {t: [] for t in targets} for j in JOBS}
    with empty.mounted(lab, node):
        for _ in range(ROUNDS):
            for job in JOBS:
                for name, target in targets.items():
                    samples[job][name].append(_rate(lab, node, job, target))
    hosts.run(lab, node, "rm", "-f", path)
    result = {}
    for job, by_target in samples.items():
        medians = {t: statistics.median(v) for t, v in by_target.items()}
        base = min(medians["nbd"], medians["empty"]) if job.startswith("1M") else medians["empty"]
        result[job] = {
            **{t: round(v, 1) for t, v in medians.items()},
            "ratio": round(medians["mount"] / base, 3),
            "aim": 0.6 if job.startswith("1M") else 0.25,
            "first": FIRST.get(job, ""),
        }
    return result


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["job (MiB/s or IOPS)", "mount", "nbd engine", "empty pyfuse3", "ratio", "aim"]
    columns.append("first version; aim")
    table = []
    for job, r in result.items():
        values = [str(r[key]) for key in ("mount", "nbd", "empty", "ratio")]
        before = f"{r['first']}; >= {1.3 * r['first']:.0f}" if r["first"] else ""
        table.append([job, *values, f">= {r['aim']}", before])
    return columns, table
