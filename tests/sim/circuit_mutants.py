"""Bugs that rule R9 for circuits invites, put into ours one at a time.

Each must be caught by the world (`tests/sim/circuit_world.py`); `Patch` as in `dlm_mutants`.
"""

from __future__ import annotations

from collections.abc import Callable

from node.circuits import Circuits
from tests.sim.circuit_world import Node
from tests.sim.dlm_mutants import Patch


def nobody_is_judged(patch: Patch) -> None:
    """A circuit may be down for ever."""
    patch(Circuits, "look", lambda self, begun_ns, ended_ns, works, mine, rows: {})


def one_end_is_believed(patch: Patch) -> None:
    """A member that hangs or is dead has no row, and is missed all the same."""
    real = Circuits.look

    def mutant(self, begun_ns, ended_ns, works, mine, rows):
        rows = dict(rows)
        for me, row in mine.items():
            for peer in row:
                rows.setdefault(peer, {me: 0})
        return real(self, begun_ns, ended_ns, works, mine, rows)

    patch(Circuits, "look", mutant)


def both_ends_go(patch: Patch) -> None:
    """Each end takes itself for the worse one."""
    real = Circuits.look

    def mutant(self, begun_ns, ended_ns, works, mine, rows):
        found = real(self, begun_ns, ended_ns, works, mine, rows)
        for (me, peer), (since_ns, _rows) in self._down.items():
            if begun_ns - since_ns >= self._limit_ns:
                found.setdefault(me, peer)
        return found

    patch(Circuits, "look", mutant)


def a_late_judge_accuses(patch: Patch) -> None:
    """The time for which a node was suspended counts, and answers from before it are believed."""
    patch(Circuits, "_late", lambda self, begun_ns, ended_ns: False)


def a_mount_that_hangs_answers(patch: Patch) -> None:
    """clusterd answers from what a mount told it last, whether that mount still runs or not."""

    def mutant(self, answer):
        answer({me: mount.row for me, mount in self.mounts.items()})

    patch(Node, "rows", mutant)


MUTANTS: list[Callable[[Patch], None]] = [
    nobody_is_judged,
    one_end_is_believed,
    both_ends_go,
    a_late_judge_accuses,
    a_mount_that_hangs_answers,
]
