"""What one path of a device has done. No I/O."""

from __future__ import annotations

from collections import Counter

import msgspec

from gnbd.client.lanes import Path


class PathStats(msgspec.Struct, frozen=True):
    """What one path has done since the device was opened, its pings included. `state`: up, standby
    or down; `service_us`: from the request to its reply, a moving average, 0 when down;
    `failures`: requests that the store refused; `repeated`: lost with the path and sent again."""

    state: str
    connections: int
    requests: int
    failures: int
    read_bytes: int
    written_bytes: int
    repeated: int
    service_us: float


def path_stats(path: Path, standby: bool, totals: Counter[str]) -> PathStats:
    """`totals`: of all its connections, see `native.link.Link.counters`."""
    lanes = len(path.lanes)
    return PathStats(
        state=("standby" if standby else "up") if lanes else "down",
        connections=lanes,
        requests=totals["replies"],
        failures=totals["failures"],
        read_bytes=totals["read_bytes"],
        written_bytes=totals["written_bytes"],
        repeated=path.repeated,
        service_us=totals["service_ns"] / max(1, lanes) / 1000,
    )
