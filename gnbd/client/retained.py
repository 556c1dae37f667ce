"""What a client wrote since the last FLUSH, so that a server's crash loses nothing of it (R7).

Invariant: every completed write that is not certainly durable is in here, newest last. Of a FUA
write only the place is kept, where an older write may overlap it: sending that one again would undo
it.

What is durable is never sent again, whatever else is in here. So a client whose writes to a block
are all durable may let another client write that block: a restart of the server brings nothing old
back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from cluster.device import Buffer
from gnbd.intervals import IntervalSet

RETAINED_BYTES_MAX = 64 << 20
RETAINED_MAX = 1 << 16
OVERLAPS_SOUGHT_MAX = 64
"""In longer queues the place of a FUA write is kept without a look for older ones."""


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Bytes to write again; `data` None means zeroes. `durable`: not to be written again, and
    nothing older there either."""

    offset: int
    length: int
    data: Buffer | None
    durable: bool = False


def is_fixed(data: Buffer) -> bool:
    """Nobody can change these bytes."""
    if isinstance(data, memoryview):
        return data.readonly and isinstance(data.obj, bytes)
    return isinstance(data, bytes)


def owned(data: Buffer) -> Buffer:
    """The same bytes, safe from changes by the caller: a copy only if they can change."""
    return data if is_fixed(data) else bytes(data)


def split(piece: Piece, limit: int) -> Iterator[Piece]:
    """Parts that one request may carry."""
    for start in range(0, piece.length, limit):
        length = min(limit, piece.length - start)
        data = None if piece.data is None else memoryview(piece.data)[start : start + length]
        yield Piece(piece.offset + start, length, data)


class Retained:
    """A queue of completed writes, dropped from the front by FLUSH."""

    def __init__(self) -> None:
        self._pieces: deque[Piece] = deque()
        self._dropped = 0
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._pieces)

    def add(self, piece: Piece, *, durable: bool = False) -> None:
        """A write has completed; `durable`: it was a FUA write."""
        if durable:
            if not self.may_overlap(piece.offset, piece.length):
                return
            piece = Piece(piece.offset, piece.length, None, durable=True)
        self._pieces.append(piece)
        if piece.data is not None:
            self.bytes += piece.length

    def may_overlap(self, offset: int, length: int) -> bool:
        """Whether something in here is of that place."""
        if len(self._pieces) > OVERLAPS_SOUGHT_MAX:
            return True
        end = offset + length
        return any(p.offset < end and offset < p.offset + p.length for p in self._pieces)

    def mark(self) -> int:
        """What a FLUSH that is sent now covers."""
        return self._dropped + len(self._pieces)

    def drop(self, mark: int) -> None:
        """The FLUSH with that mark has succeeded."""
        while self._dropped < mark:
            piece = self._pieces.popleft()
            self._dropped += 1
            if piece.data is not None:
                self.bytes -= piece.length

    def wants_flush(self) -> bool:
        """Time for a FLUSH of our own."""
        return self.bytes * 2 >= RETAINED_BYTES_MAX or len(self._pieces) * 2 >= RETAINED_MAX

    def is_full(self) -> bool:
        """No new write before a FLUSH."""
        return self.bytes >= RETAINED_BYTES_MAX or len(self._pieces) >= RETAINED_MAX

    def overlay(self) -> list[Piece]:
        """The newest bytes of every range that may not be durable, without overlaps: may be sent in
        any order."""
        seen = IntervalSet()
        result: list[Piece] = []
        for piece in reversed(self._pieces):
            end = piece.offset + piece.length
            for start, stop, covered in seen.pieces(piece.offset, end):
                if covered or piece.durable:
                    continue
                part: Buffer | None = None
                if piece.data is not None:
                    part = memoryview(piece.data)[start - piece.offset : stop - piece.offset]
                result.append(Piece(start, stop - start, part))
            seen.add(piece.offset, end)
        return result
