"""What must be true of bytes on shared disks, seen from outside: who was told what, and when.

For each block of each server: the values that were ever written, in order (a lock lets only one
instance write at a time), which of them was told durable last, and which ones a read may give.

- A read gives the last value that its owner was told of, or one that is written meanwhile.
- After a FLUSH (or a durable write) was answered, the disk has what was told before it, or newer.
- No write reaches the cache after a newer one was told: not by a repetition, not by bytes that
  are brought back after a server's restart, whoever wrote the newer one.
- When a fence was answered, what it left in a block is on the disk.
- When an owner was put out, its block has one of the values since the last durable one; the first
  thing that the next owner sees settles which.
"""

from __future__ import annotations

from cluster.ids import Instance
from tests.sim.world import Violation


class Cell:
    """One block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values = [0]
        self.floor = self.newest = 0
        self.possible = {0}
        self.readers: list[set[int]] = []
        self.owner: Instance | None = None
        self.contested = False
        """Its last owner was put out, and nobody has seen since what it left."""
        self.put_out_in = 0
        """The epoch in which that was."""
        self.unflushed: int | None = None
        """The place of the newest value of its owner that a power cut may take."""

    def place(self, value: int) -> int:
        """Zero is written more than once: its newest place."""
        return len(self.values) - 1 - self.values[::-1].index(value)

    def submitted(self, value: int) -> int:
        """A write begins; gives its place."""
        self.values.append(value)
        self.possible.add(value)
        for allowed in self.readers:
            allowed.add(value)
        return len(self.values) - 1

    def told(self, writer: Instance, place: int, durable: bool) -> None:
        """Its writer knows that it was written."""
        if durable:
            self.floor = max(self.floor, place)
        if writer != self.owner:
            self._reopen()
            return
        self.newest = place
        self.possible = {self.values[place]}
        self.contested = False
        self.unflushed = None if durable else place

    def put_out(self, epoch: int) -> None:
        """The owner is no member any more."""
        self.put_out_in = epoch
        self.owner = None
        self.contested = True
        self.unflushed = None
        self._reopen()

    def _reopen(self) -> None:
        if self.contested:
            self.possible = set(self.values[self.floor :])

    def flushed(self, writer: Instance, place: int) -> None:
        """What was told up to that place is durable."""
        self.floor = max(self.floor, place)
        self._reopen()
        if self.owner == writer and self.unflushed is not None and self.unflushed <= place:
            self.unflushed = None

    def reading(self) -> set[int]:
        """A read begins; gives what it may find, which grows meanwhile."""
        allowed = set(self.possible)
        self.readers.append(allowed)
        return allowed

    def read(self, reader: Instance, allowed: set[int], value: int, idle: bool) -> None:
        """It has ended; `idle`: nothing was written here meanwhile by its owner."""
        self.abandon(allowed)
        if value not in allowed:
            raise Violation(
                f"{reader} reads {value} in {self.name}, not one of {sorted(allowed)} "
                f"(told {self.values[self.newest]}, durable {self.values[self.floor]})"
            )
        if self.contested and idle and self.owner == reader:
            self.contested = False
            self.newest = self.floor = self.place(value)
            self.possible = {value}

    def abandon(self, allowed: set[int]) -> None:
        """The reader has gone."""
        self.readers = [other for other in self.readers if other is not allowed]

    def lands(self, value: int, nexus: Instance) -> None:
        """A write reaches the cache of the server."""
        if value and self.place(value) < self.newest:
            raise Violation(
                f"{nexus} writes {value} into {self.name} after {self.values[self.newest]} was told"
            )

    def stored(self, value: int, place: int, what: str) -> None:
        """The disk has `value` when it must have that of `place` or a newer one."""
        if value not in self.values[place:]:
            raise Violation(
                f"{what}: {self.name} has {value} on the disk, told was {self.values[place]}"
            )


class Judge:
    """All blocks."""

    def __init__(self, servers: int, blocks: int) -> None:
        self.cells = {
            (server, block): Cell(f"block {block} of s{server}")
            for server in range(1, servers + 1)
            for block in range(blocks)
        }

    def lands(self, server: int, block: int, value: int, nexus: Instance) -> None:
        """A write reaches the cache of a server."""
        self.cells[server, block].lands(value, nexus)

    def put_out(self, gone: set[Instance], epoch: int) -> None:
        """These are no members any more."""
        for cell in self.cells.values():
            if cell.owner in gone:
                cell.put_out(epoch)

    def fenced(self, server: int, epochs: range, cached: list[int], stored: list[int]) -> None:
        """A server has answered the first install of these epochs."""
        for (name, block), cell in self.cells.items():
            if name != server:
                continue
            now, durable = cached[block], stored[block]
            if cell.contested and cell.put_out_in in epochs and now != durable:
                raise Violation(f"{cell.name} has {now} after the fence, {durable} on the disk")
