"""Trees of small files: untar, git add, git status warm and on a node that has not seen them."""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import xfs
from lab import hosts
from lab.topology import MOUNT_POINT, Host, Lab

FILES = 3000
PER_DIRECTORY = 50
SIZES = (200, 1500, 3000, 6000, 12000)
SEED = 20
GIT = [
    "git", "-c", "user.name=bench", "-c", "user.email=bench@example.org", "-c", "gc.auto=0",
    "-c", "safe.directory=*", "-C",
]  # fmt: skip
AIMS = {"untar of 3000 files": "<= 3"}

Work = Callable[..., float]


def _archive(lab: Lab) -> Path:
    """A tar of FILES files in directories of PER_DIRECTORY."""
    path = lab.directory / "bench-tree.tar"
    draw = random.Random(SEED)
    with tarfile.open(path, "w") as tar:
        for number in range(FILES):
            data = draw.randbytes(draw.choice(SIZES))
            info = tarfile.TarInfo(f"tree/d{number // PER_DIRECTORY}/f{number}")
            info.size = len(data)
            info.mtime = 1_700_000_000 + number
            tar.addfile(info, io.BytesIO(data))
    return path


def _on(lab: Lab, node: Host) -> Work:
    def work(*argv: str) -> float:
        begin = time.perf_counter()
        hosts.run(lab, node, *argv, timeout_s=600)
        return time.perf_counter() - begin

    return work


def _here(*argv: str) -> float:
    begin = time.perf_counter()
    subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - begin


def _tree(archive: Path, top: str, first: Work, second: Work | None) -> dict[str, float]:
    tree = f"{top}/tree"
    first("mkdir", "-p", top)
    seconds = {f"untar of {FILES} files": first("tar", "-C", top, "-xf", str(archive))}
    first(*GIT, tree, "init", "-q")
    seconds["git add"] = first(*GIT, tree, "add", "-A")
    seconds["git commit"] = first(*GIT, tree, "commit", "-qm", "bench")
    first(*GIT, tree, "status", "--short")
    seconds["git status, warm"] = first(*GIT, tree, "status", "--short")
    if second is not None:
        seconds["git status, other node, cold"] = second(*GIT, tree, "status", "--short")
        seconds["git status, other node, warm"] = second(*GIT, tree, "status", "--short")
        seconds["ls -lR, other node"] = second("ls", "-lR", tree)
    seconds["rm -r"] = first("rm", "-r", tree)
    return seconds


def run(lab: Lab) -> dict:
    """Seconds."""
    archive = _archive(lab)
    nodes = lab.nodes
    result = {"one node": _tree(archive, f"{MOUNT_POINT}/bench-tree", *map(_on, [lab] * 2, nodes))}
    with xfs.mounted(lab) as top:
        result["xfs"] = _tree(archive, top, _here, None)
    return {k: {v: round(s, 2) for v, s in d.items()} for k, d in result.items()}


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["seconds", *result, "aim"]
    table = [
        [name, *(str(result[k].get(name, "")) for k in result), AIMS.get(name, "")]
        for name in result["one node"]
    ]
    return columns, table
