"""Builds the harness and runs it; a finding is kept in the corpus, which every test run replays."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "native" / "src"
CORPUS = HERE / "corpus"
FLAGS = [
    "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
TEXT_MAX = 6000


class Finding(AssertionError):
    """An input that the C code does not take as it must."""


def build(directory: Path) -> Path:
    """The harness with the C sources of the transmission, under both sanitizers."""
    program = directory / "harness"
    sources = [*sorted(NATIVE.glob("nbd_*.c")), NATIVE / "crc32c.c"]
    command = [os.environ.get("CC", "gcc"), *FLAGS, str(HERE / "harness.c"), *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)
    return program


def build_power(directory: Path) -> Path:
    """The integrity area on two disks in memory that lose power (power.c)."""
    program = directory / "power"
    sources = [*(NATIVE / f"nbd_{n}.c" for n in ("file", "integrity", "integrity_data")),
               NATIVE / "crc32c.c"]  # fmt: skip
    disks = [f"-D{call}=power_{call}" for call in ("pread", "pwritev2", "lseek")]
    command = [os.environ.get("CC", "gcc"), *FLAGS, "-DINTEGRITY_REGION_BYTES=131072", *disks]
    subprocess.run(
        [*command, str(HERE / "power.c"), *map(str, sources), "-o", str(program)], check=True
    )
    return program


def cut_power(program: Path, seed: int, count: int, timeout_s: float) -> str:
    """`count` lives that follow from the seed; gives what was met. Raises Finding."""
    done = _call(program, timeout_s, seed, count)
    if done.returncode:
        raise Finding(f"seed {seed}: {done.stdout[-TEXT_MAX:]}\n{done.stderr[:TEXT_MAX]}")
    return done.stdout


def _call(program: Path, timeout_s: float, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s
    )


def replay(program: Path) -> int:
    """All inputs that were kept; how many. Raises Finding."""
    files = sorted(CORPUS.iterdir())
    for file in files:
        done = _call(program, 60, "replay", file)
        if done.returncode:
            raise Finding(f"{file.name}: {done.stderr[:TEXT_MAX]}")
    return len(files)


def run(program: Path, seed: int, count: int, timeout_s: float) -> None:
    """`count` inputs that follow from the seed. Raises Finding; the input is in the corpus then."""
    current = program.parent / f"current-{seed}"
    try:
        done = _call(program, timeout_s, "run", seed, count, current)
    except subprocess.TimeoutExpired as stuck:
        raise Finding(f"it hangs; kept as {_keep(current, seed)}") from stuck
    if done.returncode:
        raise Finding(f"kept as {_keep(current, seed)}\n{done.stderr[:TEXT_MAX]}")


def _keep(current: Path, seed: int) -> Path:
    CORPUS.mkdir(exist_ok=True)
    return Path(shutil.copy(current, CORPUS / f"found-{seed}"))
