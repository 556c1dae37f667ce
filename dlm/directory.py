"""The directory: who is the master of a name.

Names hash into SLOTS slots; rendezvous hashing gives each slot to a member, so a leave moves only
the slots of who left and a join takes its share from everybody. The directory member of a slot
keeps a record for each name in it that somebody else masters. The first user of a name becomes
its master. A slot that changed hands is *unsettled* until its new owner has said that all masters
have told it their names (recovery, `Recovered`): until then it answers no question.

A slot carries the dead members that may have known names in it that nobody else knows
(`blockers`): such a name is mastered by the directory member itself and stays blocked by phantoms
until those are released.
"""

from __future__ import annotations

import array
import hashlib
import sys
import zlib
from collections.abc import Iterable, Sequence

from cluster.ids import Instance

SLOTS = 4096
_WEIGHTS_MAX = 1024

_weights: dict[Instance, array.array[int]] = {}


def slot_of(name: bytes) -> int:
    """Names that differ in their first or their last byte only share a slot: the locks of one
    object, and of its neighbours, have one directory member. So whoever may choose a new object can
    take one whose locks need no message (`Directory.is_home`)."""
    return zlib.crc32(name[1:-1] or name) % SLOTS


def _weight_row(member: Instance) -> array.array[int]:
    row = _weights.get(member)
    if row is None:
        text = f"slots|{member.node}|{member.incarnation}|{member.number}".encode()
        row = array.array("Q", hashlib.shake_128(text).digest(8 * SLOTS))
        if sys.byteorder == "big":
            row.byteswap()
        if len(_weights) >= _WEIGHTS_MAX:
            _weights.clear()
        _weights[member] = row
    return row


def slot_table(members: Sequence[Instance]) -> list[Instance]:
    """The owner of each slot: whose weight is the highest; the same for everybody."""
    ordered = sorted(members)
    rows = [_weight_row(member) for member in ordered]
    if len(rows) == 1:
        return ordered * SLOTS
    return [ordered[column.index(max(column))] for column in zip(*rows, strict=True)]


class Directory:
    """One member's share of the directory, and the table that all members share."""

    def __init__(self, me: Instance) -> None:
        self.me = me
        self.table: list[Instance] = []
        self.records: dict[bytes, Instance] = {}
        self.blockers: dict[int, set[Instance]] = {}
        self.unsettled: dict[int, tuple[int, int]] = {}
        self.floor = 0

    def owner(self, slot: int) -> Instance:
        return self.table[slot]

    def is_home(self, slot: int) -> bool:
        """Whether this member alone says who masters a name in the slot that nobody uses."""
        return (
            bool(self.table)
            and self.table[slot] == self.me
            and slot not in self.unsettled
            and slot not in self.blockers
        )

    def install(
        self, members: Sequence[Instance], view: tuple[int, int], dead: Iterable[Instance]
    ) -> None:
        """Take the table of a new view. `dead`: all failed members that are not released."""
        table = slot_table(members)
        before = self.table
        lost = set(dead)
        moved = [slot for slot in range(SLOTS) if not before or table[slot] != before[slot]]
        for slot in moved:
            self.unsettled[slot] = view
        if lost:
            # A dead member may have been made a master here and have told nobody but the former
            # directory member: so also where a move was under way.
            for slot in self.unsettled:
                self.blockers.setdefault(slot, set()).update(lost)
        self.table = table
        mine = self.me
        stale = [
            name
            for name in self.records
            if table[slot := slot_of(name)] != mine or slot in self.unsettled
        ]
        for name in stale:
            del self.records[name]

    def settled(self, owner: Instance, view: tuple[int, int]) -> None:
        """`owner` has opened what it got up to `view`."""
        for slot in [
            slot
            for slot, since in self.unsettled.items()
            if since <= view and self.table[slot] == owner
        ]:
            del self.unsettled[slot]

    def released(self, dead: Iterable[Instance]) -> None:
        """Only `dead` are still unreleased."""
        left = set(dead)
        for slot in list(self.blockers):
            self.blockers[slot] &= left
            if not self.blockers[slot]:
                del self.blockers[slot]

    def forget_lost(self, members: Iterable[Instance]) -> None:
        """Nobody dead is kept any more, and all survivors have told what they hold: a name whose
        master is gone is free. Not before: a survivor may still bring it back."""
        if self.records:
            alive = set(members)
            self.records = {n: m for n, m in self.records.items() if m in alive}

    def check(self, members: Sequence[Instance]) -> None:
        for name in self.records:
            assert self.table[slot_of(name)] == self.me
        assert not members or self.table[0] in members
