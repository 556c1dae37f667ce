"""What a caller asks for as requests that are not too long. No I/O."""

from __future__ import annotations

from array import array

from cluster.device import Buffer
from gnbd import protocol as p
from gnbd.client.lanes import Request, Waiter
from native.link import BLOCK_BYTES

REQUEST_BYTES_MAX = 4 << 20


def chunks(offset: int, length: int, limit: int = REQUEST_BYTES_MAX) -> list[tuple[int, int]]:
    """(offset, length) of parts no longer than `limit`."""
    return [(offset + at, min(limit, length - at)) for at in range(0, length, limit)]


def flat(data: Buffer) -> Buffer:
    """What can be sent as it lies; its length is that of its bytes. Raises TypeError for the
    rest."""
    if isinstance(data, bytes | bytearray):
        return data
    view = memoryview(data)
    if not view.c_contiguous:
        raise TypeError("what is written must lie in one piece")
    return view if view.ndim == view.itemsize == 1 else view.cast("B")


def reads_into(
    offset: int, view: memoryview, waiter: Waiter, sums: array[int] | None = None
) -> list[Request]:
    """Of the bytes of `view`; `sums` has room for their checksums."""
    requests = []
    for start, length in chunks(0, len(view)):
        request = Request(p.CMD_READ, offset + start, length, waiter=waiter)
        request.into = view[start : start + length]
        request.wanted = _part(sums, start, length)
        requests.append(request)
    return requests


def writes(
    offset: int, data: Buffer, flags: int, waiter: Waiter, sums: array[int] | None = None
) -> list[Request]:
    """Of `data`; `sums` has room for their checksums. Raises TypeError."""
    data = flat(data)
    view = data if len(data) <= REQUEST_BYTES_MAX else memoryview(data)
    requests = []
    for start, length in chunks(0, len(data)) or [(0, 0)]:
        piece = view if length == len(data) else view[start : start + length]
        request = Request(p.CMD_WRITE, offset + start, length, piece, flags, waiter)
        request.wanted = _part(sums, start, length)
        requests.append(request)
    return requests


def _part(sums: array[int] | None, start: int, length: int) -> memoryview | None:
    """Of the checksums of a request that is one of several."""
    if sums is None:
        return None
    return memoryview(sums)[start // BLOCK_BYTES : -(-(start + length) // BLOCK_BYTES)]
