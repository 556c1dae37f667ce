"""The client's side of one NBD connection in C: headers, partial sends, replies, checksums.

`post` queues a request with the memory that it sends or fills; `send` and `receive` move bytes
straight between that memory and the socket, as many requests in one call as there are, and never
block. Memory is pinned until the reply, until `move` gives other memory in its place, or until
`close`: then nothing touches it any more.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any, Union

from native._native import ffi, lib

Buffer = bytes | bytearray | memoryview
Sums = Union["array[int]", memoryview]
NO_DATA, SENDS, RECEIVES = range(3)
TRAILER = 4
"""The checksums travel behind the data (with SENDS or RECEIVES)."""
COMPARES = 8
"""The error MISMATCH is followed by the place of the difference (u64), which is not told."""
BLOCK_BYTES = 4096
"""What one checksum covers, counted from where the request begins."""
REQUESTS_MAX = 1024
MISMATCH = 84
"""The error of a READ whose data is not what its trailer says, and of a comparison."""
_ENDED, _WRONG = -1, -2
_COUNTERS = ("service_ns", "replies", "failures", "read_bytes", "written_bytes")


class OutOfStepError(Exception):
    """The peer sent a reply that nobody waits for."""


class Link:
    """One connection in transmission; belongs to one thread."""

    __slots__ = ("_errors", "_link", "_pins", "_tags")

    def __init__(self, descriptor: int, first: bytes = b"") -> None:
        """`first`: what was received behind the handshake. Raises MemoryError."""
        link = lib.native_link_open(descriptor, first, len(first))
        if not link:
            raise MemoryError
        self._link = ffi.gc(link, lib.native_link_free)
        self._tags = lib.native_link_tags(self._link)
        self._errors = lib.native_link_errors(self._link)
        self._pins: dict[int, Any] = {}

    def post(
        self, tag: int, kind: int, flags: int, offset: int, length: int, ways: int = NO_DATA,
        data: Buffer | None = None, sums: Sums | None = None,
    ) -> int:  # fmt: skip
        """Queue a request that is `tag` to the caller; gives its place, for `move`. `data` is sent
        or filled according to `ways`, also if it is bytes, which only the maker of new ones may
        ask for. `sums` (one u32 for each block): checksums of what is sent, computed here, or of
        what was received, there with the reply. Raises ConnectionError after `close`."""
        memory = data if type(data) is bytes else _memory(data, length, ways)
        more = ffi.NULL if sums is None else _sums(sums, length)
        assert sums is not None or not ways & TRAILER
        link = self._link
        if not link:
            raise _ended()
        place = lib.native_link_post(link, tag, kind, flags, offset, length, ways, memory, more)
        if place < 0:
            raise BlockingIOError("too many requests are under way")
        self._pins[tag] = memory if sums is None else (memory, more)
        return place

    def move(
        self, place: int, tag: int, data: Buffer, length: int, sums: Sums | None = None
    ) -> bool:
        """The memory of a request is elsewhere from now on; False: it is not under way. What has
        been received of the data comes along; `sums` has to be the same one, or a copy."""
        memory, more = _memory(data, length, SENDS), _sums(sums, length)
        if not (self._link and lib.native_link_move(self._link, place, tag, memory, more)):
            return False
        self._pins[tag] = (memory, more)
        return True

    def send(self) -> bool:
        """True: something is left, the socket takes no more now. Raises ConnectionError."""
        link = self._link
        left = lib.native_link_send(link) if link else _ENDED
        if left < 0:
            raise _ended()
        return bool(left)

    def receive(self) -> Iterable[tuple[int, int]]:
        """Tag and NBD error of each request that is done now. Raises ConnectionError, and
        OutOfStepError; what was done before has been given then."""
        link = self._link
        return self._done(lib.native_link_receive(link) if link else _ENDED)

    def _done(self, count: int) -> Iterable[tuple[int, int]]:
        if count < 0:
            if count == _WRONG:
                raise OutOfStepError
            raise _ended()
        tags = ffi.unpack(self._tags, count)
        pins = self._pins
        for tag in tags:
            del pins[tag]
        return zip(tags, ffi.unpack(self._errors, count), strict=True)

    def counters(self) -> dict[str, int]:
        """`service_ns`: from `post` to the reply, lately; totals of the rest."""
        out = ffi.new("uint64_t[]", len(_COUNTERS))
        if self._link:
            lib.native_link_counters(self._link, out)
        return dict(zip(_COUNTERS, out, strict=True))

    def close(self) -> None:
        """Nothing of any request is touched any more. The socket stays the caller's."""
        link, self._link = self._link, None
        if link:
            ffi.release(link)
        self._pins.clear()


def _ended() -> ConnectionError:
    return ConnectionResetError("the connection has ended")


def _memory(data: Buffer | None, length: int, ways: int) -> Any:
    """Where C finds it; lives as long as the result."""
    if data is None:
        assert not ways
        return ffi.NULL
    assert len(data) >= length
    if type(data) is bytes:
        return data
    return ffi.from_buffer("uint8_t[]", data, require_writable=bool(ways & RECEIVES))


def _sums(sums: Sums | None, length: int) -> Any:
    if sums is None:
        return ffi.NULL
    assert sums.itemsize == 4
    assert len(sums) * BLOCK_BYTES >= length
    return ffi.from_buffer("uint32_t[]", sums, require_writable=True)
