"""Builds the harnesses and runs them; a finding is kept in the corpus, which every test run
replays."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "native" / "src"
HARNESSES = ("harness", "link_harness")
"""Of the server's transmission and of the client's."""
FLAGS = [
    "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip
TEXT_MAX = 6000


class Finding(AssertionError):
    """An input that the C code does not take as it must."""


def build(directory: Path, harness: str) -> Path:
    """A harness with the C sources of the transmission, under both sanitizers."""
    program = directory / harness
    sources = [HERE / f"{harness}.c", *sorted(NATIVE.glob("nbd_*.c")), NATIVE / "crc32c.c"]
    command = [os.environ.get("CC", "gcc"), *FLAGS, *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def corpus(program: Path) -> Path:
    """Where the inputs of a harness are kept."""
    return HERE / ("corpus" if program.name == "harness" else "link_corpus")


def build_power(directory: Path) -> Path:
    """The integrity area on two disks in memory that lose power (power.c)."""
    program = directory / "power"
    sources = [*(NATIVE / f"nbd_{n}.c" for n in ("file", "integrity", "integrity_data")),
               NATIVE / "crc32c.c"]  # fmt: skip
    disks = [f"-D{call}=power_{call}" for call in ("pread", "pwritev2", "lseek")]
    command = [
        os.environ.get("CC", "gcc"),
        *FLAGS,
        "-DINTEGRITY_REGION_BYTES=131072",
        "-DINTEGRITY_PIECE_BLOCKS=32",
        *disks,
    ]
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
    files = sorted(corpus(program).iterdir())
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
        raise Finding(f"it hangs; kept as {_keep(program, current, seed)}") from stuck
    if done.returncode:
        raise Finding(f"kept as {_keep(program, current, seed)}\n{done.stderr[:TEXT_MAX]}")


def _keep(program: Path, current: Path, seed: int) -> Path:
    folder = corpus(program)
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(current, folder / f"found-{seed}"))
