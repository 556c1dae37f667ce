"""Small requests that touch and wait side by side go out as one. Pure.

Only neighbours in the queue are merged, so nothing overtakes anything: a FLUSH, a SEQUENCE, a write
with other flags between two of them keeps them apart. Up to PART_BYTES_MAX a copy costs less than
a request does, here and at the server. If the whole fails, its parts are sent again, each alone, so
that an error is told to who it belongs to: none of them was acknowledged, and the same bytes twice
are the same bytes.
"""

from __future__ import annotations

from collections import deque

from gnbd import protocol as p
from gnbd.client.lanes import Request

PART_BYTES_MAX = 16 << 10
MERGED_BYTES_MAX = 128 << 10
_KINDS = frozenset({p.CMD_READ, p.CMD_WRITE})


def _may_merge(request: Request) -> bool:
    return (
        request.kind in _KINDS
        and 0 < request.length <= PART_BYTES_MAX
        and request.wanted is None
        and not (request.round or request.parts or request.is_part)
    )


def merged(first: Request, queue: deque[Request]) -> Request:
    """`first`, or one request for it and for those at the head of the queue that go on where it
    ends: they are taken out."""
    if not queue or not _may_merge(first):
        return first
    parts, end = [first], first.offset + first.length
    while queue:
        request = queue[0]
        if (
            request.offset != end
            or (request.kind, request.flags) != (first.kind, first.flags)
            or not _may_merge(request)
            or end + request.length - first.offset > MERGED_BYTES_MAX
        ):
            break
        parts.append(queue.popleft())
        end += request.length
    if len(parts) == 1:
        return first
    data = b"".join(part.data for part in parts if part.data is not None)
    whole = Request(first.kind, first.offset, end - first.offset, data or None, first.flags)
    whole.order = first.order
    whole.parts = parts
    for part in parts:
        part.is_part = True
    return whole
