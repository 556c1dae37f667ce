"""Check crash points of a recording."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import trio

from cfs.filesystem import FileSystem
from cfs.fsck.checker import check
from tests.cfs.harness import QUIET, mounted, tree_of
from tests.crash.disk import Image, RamVolume, Timeline, second_crash
from tests.crash.record import Recording, load
from tests.crash.things import KINDS, Attributed, History, Thing
from tests.crash.writelog import Entry, Translator, merged, read_map

SECOND = 0.2
SECOND_CACHED = 0.8
"""So many of the disks are cut (again) while they are replayed: most where the servers have
something in their caches, for nothing else shows what a replay takes for durable."""


class Failure(msgspec.Struct, frozen=True):
    """One disk that does not hold what was promised."""

    point: int
    how: str
    problems: list[str]

    def __str__(self) -> str:
        return f"point {self.point}, {self.how}: " + "; ".join(self.problems[:8])


class Verdict(msgspec.Struct):
    points: int = 0
    images: int = 0
    failures: list[Failure] = []


class Verifier:
    """A recording made ready for checks."""

    def __init__(self, recording: Recording, entries: list[Entry], size_bytes: int) -> None:
        self.entries = entries
        self.size_bytes = size_bytes
        self.things: list[Thing] = [KINDS[h.kind](h) for h in recording.things]
        begin_ns = recording.begin_ns
        self.first = next(i for i, e in enumerate(self.entries) if e.at_ns >= begin_ns)

    @classmethod
    def load(cls, base: Path) -> Verifier:
        """From the directory that `tests.crash.record` left."""
        recording = load(base)
        logs = {server: [base / name for name in names] for server, names in recording.logs.items()}
        volume_map = read_map(next(iter(logs.values()))[0], recording.volume)
        return cls(recording, merged(logs, Translator(volume_map)), volume_map.size_bytes)

    def points(self) -> range:
        """Every prefix since the file system was made."""
        return range(self.first, len(self.entries) + 1)

    def run(self, points: list[int], variants: int, seed: int) -> Iterator[Failure | None]:
        """Check some points (rising); yields after each disk."""
        timeline = Timeline(self.entries, self.size_bytes)
        for point in points:
            timeline.advance(point)
            rng = random.Random(f"{seed} {point}")
            for image in timeline.images(rng, variants):
                problems = trio.run(self._check, image, timeline.crash_ns, rng)
                yield Failure(point, image.how, problems) if problems else None

    async def _check(self, image: Image, crash_ns: int, rng: random.Random) -> list[str]:
        volume = image.volume
        before = image.durable or volume.copy()
        problems = await self._mount_and_look(volume, crash_ns)
        if not problems and rng.random() < (SECOND_CACHED if image.cached else SECOND):
            again = second_crash(volume, before, rng, image.cached)
            found = await self._mount_and_look(again, crash_ns)
            problems = [f"after a second crash: {problem}" for problem in found]
        return problems

    async def _mount_and_look(self, volume: RamVolume, crash_ns: int) -> list[str]:
        problems = await self._fsck(volume, "before the replay")
        if problems:
            return problems
        try:
            async with mounted(volume, QUIET) as fs:  # type: ignore[arg-type]
                tree = await tree_of(fs)
                await self._add_attributes(fs, tree)
                problems += self._wrong(tree, crash_ns)
                problems += await self._fsck(volume, "after the replay")
                made = await fs.create(fs.root_ino, b"after %d" % len(tree), 0o644, 0, 0)
                await fs.write(made.ino, 0, b"x" * 10_000)
        except Exception as error:
            return [*problems, f"mounted and in use: {error!r}"]
        return problems or await self._fsck(volume, "at the end")

    async def _add_attributes(self, fs: FileSystem, tree: dict[bytes, object]) -> None:
        for thing in self.things:
            if isinstance(thing, Attributed) and b"/" + thing.name.encode() in tree:
                ino = fs.root_ino
                for name in thing.name.encode().split(b"/"):
                    ino = (await fs.lookup(ino, name)).ino
                for name in await fs.listxattr(ino):
                    value = await fs.getxattr(ino, name)
                    tree[b"/" + thing.name.encode() + b"\0" + name] = (value,)

    async def _fsck(self, volume: RamVolume, when: str) -> list[str]:
        report = await check(volume)
        return [f"fsck {when}: {error}" for error in report.errors[:5]]

    def _wrong(self, tree: dict[bytes, object], crash_ns: int) -> list[str]:
        problems = []
        for thing in self.things:
            history: History = thing.history
            if history.is_ready(crash_ns):
                allowed = history.allowed(crash_ns)
                what = thing.wrong(tree, allowed)  # type: ignore[arg-type]
                if what:
                    few = allowed if len(allowed) < 8 else [*allowed[:4], "...", *allowed[-3:]]
                    problems.append(f"{thing.name}: {what}; allowed: {few}")
        return problems
