"""What happens when the membership changes: three rounds, and only what is concerned waits.

At a view every member drops what the failed held back, and takes the new slot table at once.
1. `Sync`: the last word of the old view. When all have said it, nothing of the old view is under
   way between survivors.
2. Masters tell the new directory members of slots that moved (`DirPush`); owners tell the directory
   member of a name whose master is gone, which is the new master by rule, what they hold and want
   (`LockPush`); then `Pushed`.
3. When all have pushed, a new master builds its resources: granted modes as the owners say, then
   for each dead member that is not released a *phantom* of the strongest mode that the survivors'
   locks leave room for, then the waiting by age. It says `Recovered`; owners then send what
   came up meanwhile.
A failure in between starts again with the new view; pushes that were not confirmed by `Recovered`
are made again, and a member that did not finish throws its half-built resources away, so both
sides agree on who knows what (a link is first in, first out: a `Recovered` of the old view comes
before the `Sync` of the new one).

Everything else goes on all the time. What stays blocked until `released` are phantoms and the
locks of the dead at masters that survived; read modes go at `silent`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.control import GroupEvent
from cluster.ids import Instance
from dlm.messages import (
    LVB_CURRENT,
    LVB_INVALID,
    NO_MODE,
    PUSH_LOCKS_MAX,
    Convert,
    DirPush,
    LeaveAck,
    LeaveMark,
    LockPush,
    LvbNote,
    Pushed,
    PushedLock,
    Recovered,
    Request,
    Sync,
)
from dlm.modes import LVB_ZERO, MODES
from dlm.resource import MasterLock, Parked

if TYPE_CHECKING:
    from dlm.lockspace import Lockspace
    from dlm.resource import Resource


class Recovery:
    """The rounds of the present view, and a clean leave."""

    def __init__(self, space: Lockspace) -> None:
        self._space = space
        self.phase = "idle"
        self._synced: set[Instance] = set()
        self._pushed: set[Instance] = set()
        self._building: dict[bytes, list[tuple[Instance, PushedLock]]] = {}
        self._held: list[Parked] = []
        # Who was dead when this recovery, with all its restarts, began; some may be released now.
        self._doubts: set[Instance] = set()
        self.leaving = False
        self._round = 0
        self._acks: set[Instance] | None = None

    @property
    def busy(self) -> bool:
        return self.phase != "idle"

    def hold(self, source: Instance, message: Request) -> None:
        """A question that only the end of the recovery can answer."""
        self._space.master.park(self._held, source, message)

    def install(self, event: GroupEvent) -> None:
        """Take a view: the members and the slot table are new from now on."""
        space = self._space
        members = frozenset(member.instance for member in event.members)
        gone = space.members - members
        space.members = members
        space.directory.install(sorted(members), space.view, space.dead)
        doubts = space.dead | {one for one in gone if one not in event.left}
        self._doubts = doubts | self._doubts if self.busy else doubts
        self.phase = "sync"
        self._synced, self._pushed = {space.me}, {space.me}
        self._building.clear()
        self._acks = None
        failed = [one for one in gone if one in space.dead]
        space.master.members_gone(failed, [one for one in gone if one not in space.dead])
        space.owner.view_changed(members)
        space.master.answer_early()
        self._to_others(Sync())
        self._after_sync()

    def _to_others(self, message: Sync | Pushed | Recovered | LeaveMark) -> None:
        space = self._space
        for member in sorted(space.members):
            if member != space.me:
                space.post(member, message)

    # Round 1 and 2.

    def sync(self, source: Instance, view: tuple[int, int]) -> None:
        if view == self._space.view:
            self._synced.add(source)
            self._after_sync()

    def _after_sync(self) -> None:
        space = self._space
        if self.phase != "sync" or not self._synced >= space.members:
            return
        self.phase = "push"
        self._push_names()
        self._push_locks()
        self._to_others(Pushed())
        self._after_pushed()

    def _push_names(self) -> None:
        space = self._space
        unsettled = space.directory.unsettled
        if not unsettled:
            return
        names: dict[Instance, list[bytes]] = {}
        for resource in list(space.master.resources.values()):
            if resource.slot not in unsettled:
                continue
            if resource.removing:
                space.master.drop(resource)
                continue
            target = space.directory.owner(resource.slot)
            if target != space.me:
                names.setdefault(target, []).append(resource.name)
        for target, some in names.items():
            for start in range(0, len(some), PUSH_LOCKS_MAX):
                space.post(target, DirPush(some[start : start + PUSH_LOCKS_MAX]))

    def _push_locks(self) -> None:
        space = self._space
        locks: dict[Instance, list[PushedLock]] = {}
        for target, lock in space.owner.pushes(space.view):
            locks.setdefault(target, []).append(lock)
        for target, some in locks.items():
            for start in range(0, len(some), PUSH_LOCKS_MAX):
                part = some[start : start + PUSH_LOCKS_MAX]
                if target == space.me:
                    self.lock_push(space.me, LockPush(part), space.view)
                else:
                    space.post(target, LockPush(part))

    def dir_push(self, source: Instance, message: DirPush, view: tuple[int, int]) -> None:
        if view == self._space.view:
            for name in message.names:
                self._space.directory.records[name] = source

    def lock_push(self, source: Instance, message: LockPush, view: tuple[int, int]) -> None:
        if view == self._space.view:
            for lock in message.locks:
                self._building.setdefault(lock.name, []).append((source, lock))

    def pushed(self, source: Instance, view: tuple[int, int]) -> None:
        if view == self._space.view:
            self._pushed.add(source)
            self._after_pushed()

    # Round 3.

    def _after_pushed(self) -> None:
        space = self._space
        if self.phase != "push" or not self._pushed >= space.members:
            return
        self.phase = "idle"
        self._to_others(Recovered())
        building, self._building = self._building, {}
        rebuilt = []
        for name, pushes in building.items():
            if not self._has_master(name):
                space.directory.records.pop(name, None)
                self._rebuild(name, pushes)
            rebuilt.append((name, pushes))
        self.recovered(space.me, space.view)
        self._forget_lost()
        held, self._held = self._held, []
        if not space.frozen:
            for name, pushes in rebuilt:
                self._ask_again(name, pushes)
            for source, message in space.master.unpark(held):
                space.master.request(source, message)
        self.leave_if_quiet()

    def _has_master(self, name: bytes) -> bool:
        """Whoever pushed this only waited, at a member that had given the name up."""
        space = self._space
        return name in space.master.resources or space.directory.records.get(name) in space.members

    def _rebuild(self, name: bytes, pushes: list[tuple[Instance, PushedLock]]) -> None:
        space = self._space
        resource = space.master.create(name, space.directory.floor)
        for source, push in pushes:
            if push.granted != NO_MODE:
                lock = MasterLock(resource, source, push.lock, space.now_ns)
                # The operation that is wanted, if any, comes after this one.
                lock.op = push.op - 1 if push.requested != NO_MODE else push.op
                resource.adopt(lock, push.granted)
                space.master.locks[source, push.lock] = lock
        self._choose_lvb(resource, [push for _source, push in pushes])
        for dead in sorted(self._doubts | space.dead):
            kept = dead in space.dead
            resource.add_phantom(dead, silent=dead in space.silent or not kept, released=not kept)
        for source, push in pushes:
            if push.had != push.granted:
                resource.give_back(space.master.locks[source, push.lock], MODES[push.had])

    def _choose_lvb(self, resource: Resource, pushes: list[PushedLock]) -> None:
        """The newest value; valid only if it is known to be the last one written. (A phantom that
        could have written it makes it invalid afterwards.)"""
        resource.lvb_seq = max(push.lvb_seq for push in pushes)
        known = [push for push in pushes if push.lvb_known]
        if not known:
            return
        best = max(known, key=lambda push: (push.lvb_seq, push.lvb_known == LVB_INVALID))
        resource.lvb = best.lvb or LVB_ZERO
        newest = best.lvb_seq == resource.lvb_seq
        resource.lvb_valid = newest and best.lvb_known == LVB_CURRENT and best.lvb is not None

    def _ask_again(self, name: bytes, pushes: list[tuple[Instance, PushedLock]]) -> None:
        """What the owners were waiting for, the oldest first, by the ordinary rules."""
        master = self._space.master
        wanting = [item for item in pushes if item[1].requested != NO_MODE]
        wanting.sort(key=lambda item: (-item[1].age_ns, item[0], item[1].lock))
        for source, push in wanting:
            if push.granted != NO_MODE:
                mode = MODES[push.requested]
                master.convert(source, Convert(push.lock, push.op, mode, push.flags))
        for source, push in wanting:
            if push.granted == NO_MODE:
                mode, age_ns = MODES[push.requested], push.age_ns
                request = Request(push.lock, push.op, push.name, mode, push.flags, False, age_ns)
                master.request(source, request)
        master.settle_unused(name)

    def recovered(self, source: Instance, view: tuple[int, int]) -> None:
        """`source` has opened what it took over."""
        self._space.directory.settled(source, view)
        self._space.owner.settled(source, view)

    # Silence and release of the dead.

    def silent(self, subject: Instance) -> None:
        self._space.master.owner_silent(subject, write_modes=False)

    def released(self, subject: Instance) -> None:
        space = self._space
        space.directory.released(space.dead)
        space.master.owner_silent(subject, write_modes=True)
        self._forget_lost()

    def _forget_lost(self) -> None:
        space = self._space
        if not self.busy and not space.dead:
            space.directory.forget_lost(space.members)

    # A clean leave.

    def leave_if_quiet(self) -> None:
        """All our locks are back: stop deciding, hand the value blocks to who has an interest,
        and go when everybody has them. What is asked of us meanwhile is asked again of our heirs
        after the view without us."""
        space = self._space
        if not self.leaving or self.busy or self._acks is not None or not space.owner.quiet():
            return
        space.frozen = True
        self._round += 1
        self._acks = {space.me}
        for resource in space.master.resources.values():
            for lock in resource.locks():
                if not lock.dead:
                    note = LvbNote(lock.number, resource.lvb, resource.lvb_seq, resource.lvb_valid)
                    space.post(lock.owner, note)
        self._to_others(LeaveMark(self._round))
        self._leave_when_heard()

    def leave_ack(self, source: Instance, message: LeaveAck) -> None:
        if self._acks is not None and message.round == self._round:
            self._acks.add(source)
            self._leave_when_heard()

    def _leave_when_heard(self) -> None:
        if self._acks is not None and self._acks >= self._space.members:
            self._space.may_leave()
