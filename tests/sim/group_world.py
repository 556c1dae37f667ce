"""A process group and its network in one deterministic world: what worlds of lockspaces share.

Every step is one choice of the seed. Links are first in, first out; nothing between survivors is
lost; a dead member's links lose a random tail. Members take the events of the group one by one,
each when its turn comes.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass
from typing import Generic, TypeVar

from cluster.control import GroupEvent, GroupMember
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from dlm.lockspace import Lockspace
from tests.sim.world import Violation

STEPS_MAX = 100_000


@dataclass(eq=False)
class GroupProcess:
    """A process with its lockspace. `position`: how many events of the group it has taken."""

    space: Lockspace
    position: int
    leaving: bool = False


Member = TypeVar("Member", bound=GroupProcess)


class GroupWorld(Generic[Member]):
    """Members, links, and the log of the group's events, driven by one seed."""

    trace: list[str] | None = None

    def __init__(self, seed: int, names: list[bytes], members: int, *, faults: bool) -> None:
        self.random = random.Random(seed)
        self.names = names
        self.size = members
        self.faults = faults
        self.steps = 0
        self.births = 0
        self.members: dict[Instance, Member] = {}
        self.links: dict[tuple[Instance, Instance], deque[bytes]] = {}
        self.log: list[GroupEvent] = []
        self.view: list[Instance] = []
        self.dead: list[Instance] = []
        self.silent: list[Instance] = []

    def note(self, text: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.steps}: {text}")

    # What a world of its own has to say.

    def start(self, me: Instance) -> Member:
        """A new process."""
        raise NotImplementedError

    def bury(self, victim: Instance, member: Member) -> None:
        """Write down what a process holds that has just died."""
        raise NotImplementedError

    def receive(self, to: Instance, source: Instance, payload: bytes) -> None:
        """Hand a payload to a member."""
        raise NotImplementedError

    def group_event(self, to: Instance, event: GroupEvent) -> None:
        """Hand the next event of the group to a member."""
        raise NotImplementedError

    def check(self) -> None:
        """The invariants; raises Violation or AssertionError."""
        raise NotImplementedError

    # The group.

    def birth(self) -> None:
        """A new process joins."""
        self.births += 1
        node = NodeId(1 + self.births % 4)
        me = Instance(node, Incarnation(1 + self.births // 4), InstanceNo(1))
        self.members[me] = self.start(me)
        self.view = sorted([*self.view, me])
        self.event("view", joined=[me])

    def event(self, kind: str, **fields: object) -> None:
        """The next event of the group, for everybody."""
        members = [GroupMember(one, f"n{one.node}", [], 0) for one in self.view]
        made = GroupEvent(
            "sim", Epoch(1), len(self.log) + 1, kind, members,
            dead=list(self.dead), silent=list(self.silent), **fields,
        )  # fmt: skip
        self.log.append(made)

    def crash(self, victim: Instance) -> None:
        """The process is dead; what it had sent may or may not arrive."""
        self.bury(victim, self.members.pop(victim))
        for (source, _to), link in self.links.items():
            if source == victim:
                for _ in range(self.random.randint(0, len(link))):
                    link.pop()
        self.dead.append(victim)
        self.view.remove(victim)
        self.note(f"crash {victim}")
        self.event("view", failed=[victim])

    def silence(self, subject: Instance) -> None:
        self.silent.append(subject)
        self.event("silent", subject=subject)

    def release(self, subject: Instance) -> None:
        self.silent.remove(subject)
        self.dead.remove(subject)
        self.event("released", subject=subject)

    def left(self, me: Instance) -> None:
        """A member has handed everything over."""
        if me in self.view:
            self.note(f"{me} left")
            self.view.remove(me)
            self.members.pop(me)
            self.event("view", left=[me])

    def ready(self) -> list[Member]:
        """Members that may ask for something."""
        return [one for one in self.members.values() if one.space.members and not one.leaving]

    # The network.

    def send(self, source: Instance, to: Instance, payload: bytes) -> None:
        self.links.setdefault((source, to), deque()).append(payload)

    def moves(self) -> list[tuple[str, object]]:
        """What the network and the group could do now."""
        ready: list[tuple[str, object]] = [
            ("link", key) for key, link in self.links.items() if link and key[1] in self.members
        ]
        ready += [("event", me) for me, one in self.members.items() if one.position < len(self.log)]
        return ready

    def move(self, kind: str, what) -> None:
        if kind == "link":
            source, to = what
            self.receive(to, source, self.links[source, to].popleft())
        else:
            member = self.members[what]
            event = self.log[member.position]
            member.position += 1
            self.group_event(what, event)

    # The end.

    def drain(self) -> None:
        """Until nobody has anything to say."""
        for _ in range(STEPS_MAX):
            self.steps += 1
            moves = self.moves()
            if not moves:
                return
            self.move(*self.random.choice(moves))
            self.check()
        raise Violation("L1: the members never stop talking")

    def end_faults(self) -> None:
        """Nobody dies any more, and the dead are released."""
        self.faults = False
        self.drain()
        for one in list(self.dead):
            if one not in self.silent:
                self.silence(one)
            self.release(one)
        self.drain()
