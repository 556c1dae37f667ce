"""Circuits between members of a group that stay down while both ends are heard (rule R9). Pure.

A lock request to a member that no connection of the mesh leads to waits for ever, so one end has to
go. Each clusterd judges its own instances. It looks every few seconds: its instances and, when one
of them misses somebody, those of the missed ones' nodes answer which members they do not reach,
their *row*. A circuit is down in a look when the rows of both ends say so; what has no row (frozen,
dead, leaving, of another life, behind a clusterd that does not answer) is the business of other
rules.

The end that goes is the one that misses more members; of two that miss as many, the greater
instance. It goes when both rows were the same in every look for the time `limit_ns`. Both ends
compare the same two rows, so the other one stays: in a look after the end of somebody its row is
missing. Nobody is accused by a judge that is late itself: a look that took, or came, too long makes
all time begin anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.control import Timing
from cluster.ids import Instance
from cluster.timing import MS, stall_ns

LOOK_MIN_MS = 3000
"""Who answers must do so within a part of a look, also on a busy machine."""
DOWN_MIN_MS = 15_000
"""Twice what one attempt to connect may take (cluster/channel_io.py: 2 s, 5 s, then a pause)."""

Row = Mapping[Instance, int]
"""Whom a member does not reach, and how many connections there have been: a circuit that was up
between two looks makes another row."""
Rows = Mapping[Instance, Row]


def look_ns(timing: Timing) -> int:
    """The time between two looks, and the most that one may take."""
    return max(timing.dead_ms, LOOK_MIN_MS) * MS


def limit_ns(timing: Timing) -> int:
    """How long a circuit is down before an end goes: longer than a process may hang (T_stall)."""
    return max(stall_ns(timing) + 2 * timing.dead_ms * MS, DOWN_MIN_MS * MS)


class Circuits:
    """What the looks of one clusterd have found."""

    def __init__(self, timing: Timing) -> None:
        self._look_ns = look_ns(timing)
        self._limit_ns = limit_ns(timing)
        self._looked_ns = 0
        self._down: dict[tuple[Instance, Instance], tuple[int, tuple[Row, Row]]] = {}

    def look(
        self, begun_ns: int, ended_ns: int, works: bool, mine: Rows, rows: Rows
    ) -> dict[Instance, Instance]:
        """Who of this node has to go, and for its circuit to whom.

        `mine` are the rows of its instances, `rows` those and the ones of other nodes. They were
        asked for after `begun_ns` and were there at `ended_ns`. `works`: this node is a member of a
        quorate cluster.
        """
        late = self._late(begun_ns, ended_ns)
        self._looked_ns = ended_ns
        before = {} if late or not works else self._down
        self._down = {}
        found: dict[Instance, Instance] = {}
        for me, peer in sorted((me, peer) for me, row in mine.items() for peer in row):
            both = mine[me], rows.get(peer, {})
            if me not in both[1]:
                continue
            since_ns, were = before.get((me, peer), (ended_ns, both))
            since_ns = since_ns if were == both else ended_ns
            self._down[me, peer] = since_ns, both
            worse = (len(both[0]), me) > (len(both[1]), peer)
            if worse and begun_ns - since_ns >= self._limit_ns:
                found.setdefault(me, peer)
        return found

    def _late(self, begun_ns: int, ended_ns: int) -> bool:
        """Whether this judge was held up: it may have missed what the others saw."""
        took_ns, pause_ns = ended_ns - begun_ns, begun_ns - self._looked_ns
        return took_ns > self._look_ns or pause_ns > 2 * self._look_ns
