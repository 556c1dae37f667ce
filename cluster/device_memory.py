"""A block device in memory that can lose what was not flushed.

For unit tests, simulations and crash-point tests of everything that writes through `BlockDevice`.
Storage is sparse (64-KiB chunks), so a device of many GiB costs only what was written.

Readers see every completed write at once (the `current` image). A second image holds what is
durable; between the two stand the unflushed writes, in order. `crash(keep)` throws away the
unflushed writes that `keep` does not choose, as a power cut does: any subset may survive, cut into
pieces of `atom_bytes` if asked, in the original order. With `log_writes` every write and flush is
also recorded, so that a test can rebuild the device as of any prefix (`image_after`).
Requests complete without a pause unless a `hook` is given; it is awaited before each request takes
effect, and may raise, yield or wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from cluster.device import Buffer, Read, Written

CHUNK_BYTES = 64 * 1024
SECTOR_BYTES = 512
UNFLUSHED_WRITES_MAX = 1 << 16
"""Beyond this many the oldest become durable by themselves, as in a real cache."""

Hook = Callable[[str, int, int], Awaitable[None]]
"""Called with (kind, offset_bytes, length_bytes); kind is read, write, flush, discard or zero."""


class LoggedWrite(msgspec.Struct, frozen=True):
    """One completed write. A discard and a write of zeroes are logged as zeroes."""

    offset_bytes: int
    data: bytes
    fua: bool = False


class LoggedFlush(msgspec.Struct, frozen=True):
    """The first `covered` entries of the log are durable (a write that completed while the flush
    was under way may stand between them and this entry)."""

    covered: int


class LoggedAnswer(msgspec.Struct, frozen=True):
    """The FUA write at `position` has been answered: from here on it is durable. A crash before
    may tear it like any other."""

    position: int


LogEntry = LoggedWrite | LoggedFlush | LoggedAnswer


def durable_positions(log: Sequence[LogEntry], count: int) -> frozenset[int]:
    """Which of the first `count` entries are writes that no crash after them undoes."""
    covered = max((e.covered for e in log[:count] if isinstance(e, LoggedFlush)), default=0)
    answered = {e.position for e in log[:count] if isinstance(e, LoggedAnswer)}
    return frozenset(answered | set(range(covered)))


class SparseImage:
    """Bytes addressed by offset; what was never written reads as zeroes."""

    __slots__ = ("_chunks",)

    def __init__(self) -> None:
        self._chunks: dict[int, bytearray] = {}

    def copy(self) -> SparseImage:
        twin = SparseImage()
        twin._chunks = {number: bytearray(chunk) for number, chunk in self._chunks.items()}
        return twin

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        number, start = divmod(offset_bytes, CHUNK_BYTES)
        if start + length_bytes <= CHUNK_BYTES:
            chunk = self._chunks.get(number)
            return (
                bytes(length_bytes) if chunk is None else bytes(chunk[start : start + length_bytes])
            )
        pieces = []
        while length_bytes:
            number, start = divmod(offset_bytes, CHUNK_BYTES)
            size = min(length_bytes, CHUNK_BYTES - start)
            chunk = self._chunks.get(number)
            pieces.append(bytes(size) if chunk is None else bytes(chunk[start : start + size]))
            offset_bytes += size
            length_bytes -= size
        return b"".join(pieces)

    def write(self, offset_bytes: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            number, start = divmod(offset_bytes + done, CHUNK_BYTES)
            size = min(len(view) - done, CHUNK_BYTES - start)
            chunk = self._chunks.get(number)
            if chunk is None:
                chunk = self._chunks[number] = bytearray(CHUNK_BYTES)
            chunk[start : start + size] = view[done : done + size]
            done += size

    def zero(self, offset_bytes: int, length_bytes: int) -> None:
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            number, start = divmod(offset_bytes, CHUNK_BYTES)
            size = min(end - offset_bytes, CHUNK_BYTES - start)
            if size == CHUNK_BYTES:
                self._chunks.pop(number, None)
            elif number in self._chunks:
                self._chunks[number][start : start + size] = bytes(size)
            offset_bytes += size


class MemoryDevice:
    """A `BlockDevice` in memory; see the module's text."""

    def __init__(
        self, size_bytes: int, *, log_writes: bool = False, hook: Hook | None = None
    ) -> None:
        assert size_bytes > 0
        assert size_bytes % SECTOR_BYTES == 0
        self._size_bytes = size_bytes
        self._current = SparseImage()
        self._durable = SparseImage()
        self._unflushed: list[LoggedWrite] = []
        self._log_writes = log_writes
        self.log: list[LogEntry] = []
        self.hook = hook
        self.flush_count = 0
        self.crash_count = 0

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def unflushed_count(self) -> int:
        return len(self._unflushed)

    def grow(self, size_bytes: int) -> None:
        """Make the device larger; the new part reads as zeroes."""
        assert size_bytes >= self._size_bytes
        self._size_bytes = size_bytes

    def crash(self, keep: Callable[[int], bool] | None = None, *, atom_bytes: int = 0) -> None:
        """Lose unflushed writes, except the pieces for whose running number `keep` is true.

        With `atom_bytes` each write is cut into pieces of that size which survive one by one (a
        torn write); otherwise a write survives whole or not at all. FUA writes always survive.
        """
        number = 0
        for entry in self._unflushed:
            step = atom_bytes or max(len(entry.data), 1)
            for start in range(0, len(entry.data), step):
                if entry.fua or (keep is not None and keep(number)):
                    piece = entry.data[start : start + step]
                    self._durable.write(entry.offset_bytes + start, piece)
                number += 1
        self._unflushed.clear()
        self._current = self._durable.copy()
        self.crash_count += 1

    def snapshot(self) -> MemoryDevice:
        """An independent device with the same current content, all of it durable."""
        twin = MemoryDevice(self._size_bytes)
        twin._current = self._current.copy()
        twin._durable = self._current.copy()
        return twin

    def _check(self, offset_bytes: int, length_bytes: int) -> None:
        assert offset_bytes % SECTOR_BYTES == 0, f"offset {offset_bytes} is not aligned"
        assert length_bytes % SECTOR_BYTES == 0, f"length {length_bytes} is not aligned"
        assert offset_bytes >= 0, "negative offset"
        assert offset_bytes + length_bytes <= self._size_bytes, "beyond the end of the device"

    async def _enter(self, kind: str, offset_bytes: int, length_bytes: int) -> None:
        if self.hook is not None:
            await self.hook(kind, offset_bytes, length_bytes)

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        self._check(offset_bytes, length_bytes)
        await self._enter("read", offset_bytes, length_bytes)
        return self._current.read(offset_bytes, length_bytes)

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [await self.read(offset, length) for offset, length in ranges]

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        length = memoryview(data).nbytes
        self._check(offset_bytes, length)
        await self._enter("write", offset_bytes, length)
        self._apply(LoggedWrite(offset_bytes, bytes(data), fua))
        if fua and self._log_writes:
            self.log.append(LoggedAnswer(len(self.log) - 1))

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        for offset, data in parts:
            await self.write(offset, data, fua=fua)

    def can_start(self) -> bool:
        return self.hook is None

    def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None:
        self._check(offset_bytes, length_bytes)
        done(None, [self._current.read(offset_bytes, length_bytes)])

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        for offset, data in parts:
            self._check(offset, memoryview(data).nbytes)
            self._apply(LoggedWrite(offset, bytes(data)))
        done(None)

    def _apply(self, entry: LoggedWrite) -> None:
        self._current.write(entry.offset_bytes, entry.data)
        self._unflushed.append(entry)
        if self._log_writes:
            self.log.append(entry)
        if len(self._unflushed) > UNFLUSHED_WRITES_MAX:
            oldest = self._unflushed[: UNFLUSHED_WRITES_MAX // 2]
            del self._unflushed[: UNFLUSHED_WRITES_MAX // 2]
            for old in oldest:
                self._durable.write(old.offset_bytes, old.data)

    async def flush(self) -> None:
        covered = len(self._unflushed)
        logged = len(self.log)
        crashes = self.crash_count
        await self._enter("flush", 0, 0)
        if self.crash_count != crashes:
            covered = 0
        for entry in self._unflushed[:covered]:
            self._durable.write(entry.offset_bytes, entry.data)
        del self._unflushed[:covered]
        self.flush_count += 1
        if self._log_writes:
            self.log.append(LoggedFlush(logged))

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        self._check(offset_bytes, length_bytes)
        await self._enter("discard", offset_bytes, length_bytes)
        self._zero(offset_bytes, length_bytes)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        self._check(offset_bytes, length_bytes)
        await self._enter("zero", offset_bytes, length_bytes)
        self._zero(offset_bytes, length_bytes)

    def _zero(self, offset_bytes: int, length_bytes: int) -> None:
        """Zero chunk by chunk, and only chunks that hold something in either image."""
        end = offset_bytes + length_bytes
        while offset_bytes < end:
            size = min(end - offset_bytes, CHUNK_BYTES - offset_bytes % CHUNK_BYTES)
            number = offset_bytes // CHUNK_BYTES
            if number in self._current._chunks or number in self._durable._chunks:
                self._apply(LoggedWrite(offset_bytes, bytes(size)))
            offset_bytes += size


def image_after(
    size_bytes: int, log: Sequence[LogEntry], count: int, keep: Callable[[int], bool] | None = None
) -> MemoryDevice:
    """Rebuild the device as a crash after the first `count` log entries leaves it.

    Writes that are durable by then survive; of the other ones those that `keep` chooses (all of
    them when it is None), by position in the log.
    """
    durable = durable_positions(log, count)
    device = MemoryDevice(size_bytes)
    for position in range(count):
        entry = log[position]
        if isinstance(entry, LoggedWrite) and (
            position in durable or keep is None or keep(position)
        ):
            device._current.write(entry.offset_bytes, entry.data)
    device._durable = device._current.copy()
    return device
