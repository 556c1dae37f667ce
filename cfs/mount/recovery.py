"""Who replays the journals of dead members, decided from the group's events alone.

Order after a death (rule R4): the group hears of the view without the dead instance, later that it
is *silent*, then its lowest member replays its journals and says so, then the group hears that it
is *released*. The dead and silent lists are in every event, so that whoever is lowest after the
next death starts again; a replay is repeatable. Members order by instance.

Invariants: a replay is started only for a silent instance, only by the lowest member, at most once
at a time; while anybody is dead the file system is `recovering` (no freed block is used again).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from cfs import stage
from cfs.replay import Replayer
from cluster.control import GroupEvent
from cluster.device import BlockDevice
from cluster.ids import Instance


class Recovering(msgspec.Struct, frozen=True):
    """Tell the file system whether some dead member is not yet released."""

    recovering: bool


class Replay(msgspec.Struct, frozen=True):
    """Replay the journals of this dead instance, then call `done`."""

    dead: Instance


class Release(msgspec.Struct, frozen=True):
    """Tell the group that the journals of this instance are replayed."""

    dead: Instance


RecoveryAction = Recovering | Replay | Release


@dataclass(slots=True)
class RecoveryCore:
    """The state of one member."""

    me: Instance
    members: frozenset[Instance] = frozenset()
    dead: frozenset[Instance] = frozenset()
    silent: frozenset[Instance] = frozenset()
    running: set[Instance] = field(default_factory=set)
    finished: set[Instance] = field(default_factory=set)
    recovering: bool = False

    def event(self, event: GroupEvent) -> list[RecoveryAction]:
        """Take the next event of the group."""
        self.members = frozenset(member.instance for member in event.members)
        self.dead = frozenset(event.dead)
        self.silent = frozenset(event.silent)
        if event.kind == "view":
            self.dead |= frozenset(event.failed)
        if event.kind == "released" and event.subject is not None:
            self.dead -= {event.subject}
            self.silent -= {event.subject}
            self.finished.discard(event.subject)
        if event.kind == "silent" and event.subject is not None:
            self.silent |= {event.subject} & self.dead
        return self._decide()

    def done(self, dead: Instance) -> list[RecoveryAction]:
        """A replay has ended well."""
        self.running.discard(dead)
        self.finished.add(dead)
        return [Release(dead), *self._decide()]

    def failed(self, dead: Instance) -> None:
        """A replay has ended badly; the next event starts it again."""
        self.running.discard(dead)

    def gone(self, instance: Instance) -> bool:
        """Whether nobody needs to replay for `instance` any more: neither member nor dead."""
        return instance not in self.members and instance not in self.dead

    def _decide(self) -> list[RecoveryAction]:
        actions: list[RecoveryAction] = []
        if bool(self.dead) != self.recovering:
            self.recovering = bool(self.dead)
            actions.append(Recovering(self.recovering))
        if self.members and self.me == min(self.members):
            for dead in sorted(self.silent - self.running - self.finished):
                self.running.add(dead)
                actions.append(Replay(dead))
        self.check()
        return actions

    def check(self) -> None:
        """Assert the invariants."""
        assert not self.running & self.finished
        assert self.silent <= self.dead


async def replay_unmounted(device: BlockDevice, dead: Instance) -> int:
    """Replay the journals of a dead instance without a mounted file system; how many."""
    superblock = await stage.read_superblock(device)
    replayer = Replayer(device, superblock)
    journals = await stage.journals_of(device, replayer, superblock.fs, dead)
    for place, header in journals:
        await replayer.replay(place, header)
        await replayer.finish(place, header)
    return len(journals)
