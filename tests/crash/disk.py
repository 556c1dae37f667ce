"""The volume as a crash may leave it.

`Timeline` walks through the merged log. At each moment it knows what is certainly on the disks and
which writes of each server may or may not be: any of them, in pieces of a sector, for nothing but a
flush orders them. A durable write (FUA) that the crash meets on its way may be there in part.
`images` makes disks of that: all, nothing, one server behind, prefixes of each, any sectors, all
but one write, only one write.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec

from cluster.device import Buffer
from gnbd.server.filters.log_io import LOG_FLUSH, LOG_OPEN, LOG_WRITE
from tests.crash.writelog import Entry, Piece

BLOCK = 4096
SECTOR = 512
_ZERO = bytes(BLOCK)


class RamVolume:
    """A `BlockDevice`: blocks of its own over blocks that it shares and never changes."""

    def __init__(self, size_bytes: int, below: dict[int, bytes]) -> None:
        self._size_bytes = size_bytes
        self._below = below
        self._own: dict[int, bytes] = {}
        self.log: list[tuple[int, bytes, bool] | None] = []
        """Writes in order, and whether each is durable by itself; None is a flush."""

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def block(self, number: int) -> bytes:
        found = self._own.get(number)
        return self._below.get(number, _ZERO) if found is None else found

    def put(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            number, within = divmod(offset + done, BLOCK)
            size = min(BLOCK - within, len(view) - done)
            piece = bytes(view[done : done + size])
            if size != BLOCK:
                old = self.block(number)
                piece = old[:within] + piece + old[within + size :]
            self._own[number] = piece
            done += size

    def copy(self) -> RamVolume:
        """Another one with the same content and an empty log."""
        twin = RamVolume(self._size_bytes, self._below)
        twin._own = dict(self._own)
        return twin

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        assert offset_bytes + length_bytes <= self._size_bytes
        first, within = divmod(offset_bytes, BLOCK)
        count = -(-(within + length_bytes) // BLOCK)
        data = b"".join(self.block(number) for number in range(first, first + count))
        return data if len(data) == length_bytes else data[within : within + length_bytes]

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [await self.read(offset, length) for offset, length in ranges]

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        assert offset_bytes + len(data) <= self._size_bytes
        kept = bytes(data)
        self.log.append((offset_bytes, kept, fua))
        self.put(offset_bytes, kept)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        for offset, data in parts:
            await self.write(offset, data, fua=fua)

    async def flush(self) -> None:
        self.log.append(None)

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        await self.write_zeroes(offset_bytes, length_bytes)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        await self.write(offset_bytes, bytes(length_bytes))


class Image(msgspec.Struct, frozen=True):
    """One disk after one crash, and how it came about. If the servers have kept their power, so
    that it is in their caches, `durable` is what would be left without them."""

    how: str
    volume: RamVolume
    durable: RamVolume | None = None
    cached: list[Piece] = []


class Timeline:
    """What is on the disks and what may be, entry by entry."""

    def __init__(self, entries: list[Entry], size_bytes: int) -> None:
        self.entries = entries
        self.size_bytes = size_bytes
        self.position = 0
        self._durable = RamVolume(size_bytes, {})
        self.pending: dict[int, list[Entry]] = {entry.server: [] for entry in entries}

    def advance(self, position: int) -> None:
        """Go on until `position` entries have been executed."""
        assert position >= self.position
        for entry in self.entries[self.position : position]:
            self._execute(entry)
        self.position = position

    def _execute(self, entry: Entry) -> None:
        waiting = self.pending[entry.server]
        if entry.operation == LOG_WRITE:
            if entry.fua:
                # Its bytes are durable; what waits for the same place was written before it.
                for offset, data in entry.pieces:
                    self._durable.put(offset, data)
                for earlier in waiting:
                    earlier.pieces = [
                        piece for piece in earlier.pieces if not _overlaps(piece, entry.pieces)
                    ]
            elif entry.pieces:
                waiting.append(entry)
        elif entry.operation == LOG_FLUSH:
            covered = [each for each in waiting if each.at_ns < entry.arrived_ns]
            for each in covered:
                for offset, data in each.pieces:
                    self._durable.put(offset, data)
            del waiting[: len(covered)]
        elif entry.operation == LOG_OPEN:
            waiting.clear()

    @property
    def crash_ns(self) -> int:
        """The moment just before the next entry."""
        if self.position < len(self.entries):
            return self.entries[self.position].at_ns
        return 1 << 62

    @property
    def open_writes(self) -> int:
        """How many writes no flush has covered."""
        return sum(len(waiting) for waiting in self.pending.values())

    def images(self, rng: random.Random, count: int) -> Iterator[Image]:
        """Up to `count` different disks: the plain cases first, then chosen ones."""
        whole = self._image({s: len(w) for s, w in self.pending.items()})
        writes = [entry for waiting in self.pending.values() for entry in waiting]
        cached = [piece for entry in writes for piece in entry.pieces]
        yield Image("all", whole, self._durable.copy(), cached)
        made = 1
        if self._next_is_durable and made < count:
            yield self._torn(rng)
            made += 1
        if not self.open_writes:
            return
        for how, keep in self._plain_cases():
            if made < count:
                yield Image(how, self._image(keep))
                made += 1
        while made < count:
            yield self._chosen(rng)
            made += 1

    @property
    def _next_is_durable(self) -> bool:
        following = self.entries[self.position : self.position + 1]
        return any(entry.operation == LOG_WRITE and entry.fua for entry in following)

    def _torn(self, rng: random.Random) -> Image:
        """Some sectors of the durable write that is under way, and a part of all others."""
        keep = {s: rng.choice([0, len(w)]) for s, w in self.pending.items()}
        volume = self._image(keep)
        for offset, data in self.entries[self.position].pieces:
            for start in range(0, len(data), SECTOR):
                if rng.random() < 0.5:
                    volume.put(offset + start, data[start : start + SECTOR])
        return Image(f"torn, with {keep}", volume)

    def _plain_cases(self) -> Iterator[tuple[str, dict[int, int]]]:
        yield "nothing", dict.fromkeys(self.pending, 0)
        busy = [server for server, waiting in self.pending.items() if waiting]
        if len(busy) > 1:
            for behind in busy:
                keep = {s: len(w) for s, w in self.pending.items()}
                keep[behind] = 0
                yield f"server {behind} behind", keep

    def _image(self, keep: dict[int, int]) -> RamVolume:
        volume = self._durable.copy()
        for server, count in keep.items():
            for entry in self.pending[server][:count]:
                for offset, data in entry.pieces:
                    volume.put(offset, data)
        return volume

    def _chosen(self, rng: random.Random) -> Image:
        how = rng.choice(["prefixes", "sectors", "sectors", "without one", "only one"])
        if how == "prefixes":
            keep = {s: rng.randint(0, len(w)) for s, w in self.pending.items()}
            return Image(f"prefixes {keep}", self._image(keep))
        volume = self._durable.copy()
        writes = [entry for waiting in self.pending.values() for entry in waiting]
        one = rng.randrange(len(writes))
        share = rng.choice([0.1, 0.5, 0.9])
        for number, entry in enumerate(writes):
            if (how == "without one" and number == one) or (how == "only one" and number != one):
                continue
            for offset, data in entry.pieces:
                if how != "sectors":
                    volume.put(offset, data)
                    continue
                for start in range(0, len(data), SECTOR):
                    if rng.random() < share:
                        volume.put(offset + start, data[start : start + SECTOR])
        return Image(f"{how} {share if how == 'sectors' else one}", volume)


def _overlaps(piece: Piece, others: list[Piece]) -> bool:
    start, end = piece[0], piece[0] + len(piece[1])
    return any(start < offset + len(data) and offset < end for offset, data in others)


def second_crash(
    volume: RamVolume, before: RamVolume, rng: random.Random, cached: Sequence[Piece] = ()
) -> RamVolume:
    """A crash while `volume`, which was `before` and `cached` on top of it, was being replayed: any
    point of what that wrote, with any of the sectors that no flush covers."""
    log = [*((*piece, False) for piece in cached), *volume.log]
    stop = rng.randint(len(cached), len(log))
    covered = max((i for i, entry in enumerate(log[:stop]) if entry is None), default=0)
    again = before.copy()
    for position, entry in enumerate(log[:stop]):
        if entry is None:
            continue
        offset, data, fua = entry
        for start in range(0, len(data), SECTOR):
            if fua or position < covered or rng.random() < 0.5:
                again.put(offset + start, data[start : start + SECTOR])
    return again
