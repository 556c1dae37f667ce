"""Mutate, run, judge. Everything follows from the seed."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.fuzz.targets import Target

CORPUS = Path(__file__).with_name("corpus")
INPUT_BYTES_MAX = 1 << 17
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, 0xC0, 0xC1, 0xDF, 0xDD, 0x91, 0x81, 0x22, 0x7B, 0x5B)


class Finding(AssertionError):
    """An input that a target does not take as it must."""

    def __init__(self, name: str, data: bytes, error: BaseException) -> None:
        super().__init__(f"{name}: {type(error).__name__}: {error}; input {data[:64].hex()}...")
        self.name, self.data, self.error = name, data, error


def mutate(data: bytes, chooser: random.Random, others: list[bytes]) -> bytes:
    """Some small changes of one input."""
    made = bytearray(data)
    for _ in range(chooser.choice((1, 1, 2, 4, 16))):
        at = chooser.randrange(len(made) + 1)
        kind = chooser.randrange(8)
        if kind == 0 and made:
            made[at % len(made)] ^= 1 << chooser.randrange(8)
        elif kind == 1 and made:
            made[at % len(made)] = chooser.choice(INTERESTING)
        elif kind == 2:
            del made[at:]
        elif kind == 3:
            made[at:at] = chooser.randbytes(chooser.choice((1, 2, 4, 8, 64)))
        elif kind == 4:
            made[at : at + 4] = chooser.choice((0, 1, 2**31, 2**32 - 1, len(made))).to_bytes(
                4, chooser.choice(("big", "little"))
            )
        elif kind == 5:
            other = chooser.choice(others)
            made[at:] = other[chooser.randrange(len(other) + 1) :]
        elif kind == 6:
            made[at:at] = bytes([chooser.choice(INTERESTING)]) * chooser.choice((3, 300, 30_000))
        else:
            end = at + chooser.choice((1, 4, 32))
            del made[at:end]
    return bytes(made[:INPUT_BYTES_MAX])


def try_one(name: str, target: Target, data: bytes) -> None:
    """Raises Finding."""
    for given in (data, target.seal(data)) if target.seal else (data,):
        try:
            target.run(given)
        except target.allowed:
            pass
        except BaseException as error:
            raise Finding(name, given, error) from error


def kept(name: str) -> list[bytes]:
    """The corpus of a target: inputs that once were findings."""
    return [path.read_bytes() for path in sorted(CORPUS.glob(f"{name}-*"))]


def keep(finding: Finding) -> Path:
    """Put a finding into the corpus."""
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{finding.name}-{type(finding.error).__name__}-{len(kept(finding.name))}"
    path.write_bytes(finding.data)
    return path


def fuzz(name: str, target: Target, seed: int, seconds: float, count: int | None = None) -> int:
    """Run mutations until the time or the count is over; how many ran. Raises Finding."""
    chooser = random.Random(f"{seed}/{name}")
    pool = [*target.seeds, *kept(name)]
    done = 0
    end = time.monotonic() + seconds
    for data in pool:
        try_one(name, target, data)
    while (done < count) if count is not None else (time.monotonic() < end):
        try_one(name, target, mutate(chooser.choice(pool), chooser, pool))
        done += 1
    return done
