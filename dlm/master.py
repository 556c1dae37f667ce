"""The master's and the directory's side: the resources that this member decides about.

A request that reaches a member that is not the master is answered by `Redirect`; by the directory
member of the name with the master, or with the asker itself, which thereby becomes the master.
An empty resource is given up with `Remove`; until the directory has answered, requests for it are
held, so nobody is sent in circles between a directory that says "you" and a master that says "no".

Invariants: a resource in `resources` is decided about by nobody else in this view; `locks` has
exactly the live locks of all resources here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from cluster.ids import Instance
from dlm.messages import (
    NO_MODE,
    Cancel,
    Convert,
    Redirect,
    Remove,
    Removed,
    Reply,
    Request,
    Unlock,
)
from dlm.modes import Result
from dlm.owner import Knowledge
from dlm.resource import Effect, MasterLock, Parked, Resource

if TYPE_CHECKING:
    from dlm.lockspace import Lockspace


class MasterSide:
    """All resources mastered here, and this member's directory answers."""

    def __init__(self, space: Lockspace) -> None:
        self._space = space
        self.resources: dict[bytes, Resource] = {}
        self.locks: dict[tuple[Instance, int], MasterLock] = {}
        self.early: list[Parked] = []
        self._parked: dict[tuple[Instance, int], Request] = {}
        self._out: list[Effect] = []

    # Requests that cannot be answered yet. They may be withdrawn meanwhile.

    def park(self, where: list[Parked], source: Instance, message: Request) -> None:
        self._parked[source, message.lock] = message
        where.append((source, message))

    def unpark(self, some: list[Parked]) -> list[Parked]:
        """Those of `some` that still want an answer, from members."""
        wanted = []
        for source, message in some:
            if self._parked.get((source, message.lock)) is message:
                del self._parked[source, message.lock]
                if source in self._space.members:
                    wanted.append((source, message))
        return wanted

    # Messages of owners.

    def request(self, source: Instance, message: Request) -> None:
        resource = self.resources.get(message.name)
        if resource is None:
            self._find_master(source, message)
        elif resource.removing:
            self.park(resource.held, source, message)
        else:
            self._request_here(resource, source, message)

    def _request_here(self, resource: Resource, source: Instance, message: Request) -> None:
        key = (source, message.lock)
        lock = self.locks.get(key)
        if lock is not None:
            if lock.last is not None and lock.last.op == message.op == lock.op:
                self._space.post(source, lock.last)
            return
        lock = MasterLock(resource, source, message.lock, self._space.now_ns - message.age_ns)
        lock.op = message.op
        self._grants_from(resource)
        if resource.request(lock, message.mode, message.flags, probe=message.probe):
            self.locks[key] = lock
        self._send(resource)

    def convert(self, source: Instance, message: Convert) -> None:
        lock = self.locks.get((source, message.lock))
        if lock is None or message.op <= lock.op:
            self._repeat(lock, source, message.op)
            return
        lock.op = message.op
        lock.since_ns = self._space.now_ns
        self._grants_from(lock.resource)
        lock.resource.convert(lock, message.mode, message.flags, message.lvb)
        self._send(lock.resource)

    def unlock(self, source: Instance, message: Unlock) -> None:
        lock = self.locks.pop((source, message.lock), None)
        if lock is None:
            self._parked.pop((source, message.lock), None)
            gone = Reply(message.lock, message.op, 0, Result.UNLOCKED, NO_MODE)
            self._space.post(source, gone)
            return
        lock.op = message.op
        resource = lock.resource
        self._grants_from(resource)
        resource.unlock(lock, message.flags, message.lvb)
        self._send(resource)

    def cancel(self, source: Instance, message: Cancel) -> None:
        lock = self.locks.get((source, message.lock))
        if lock is None and self._parked.pop((source, message.lock), None) is not None:
            cancelled = Reply(message.lock, message.op, 0, Result.CANCELLED, NO_MODE)
            self._space.post(source, cancelled)
        if lock is None or lock.op != message.op:
            return
        resource = lock.resource
        self._grants_from(resource)
        if not resource.cancel(lock):
            del self.locks[source, message.lock]
        self._send(resource)

    def _repeat(self, lock: MasterLock | None, source: Instance, op: int) -> None:
        if lock is not None and lock.last is not None and lock.last.op == op:
            self._space.post(source, lock.last)

    def _grants_from(self, resource: Resource) -> None:
        epoch, seq = self._space.view
        resource.epoch = epoch
        resource.grants = max(resource.grants, seq << 32)

    def _send(self, resource: Resource) -> None:
        space = self._space
        for lock, message in self._out:
            space.post(lock.owner, message)
        self._out.clear()
        if resource.empty:
            self._give_up(resource)

    def _give_up(self, resource: Resource) -> None:
        space = self._space
        if resource.removing or space.frozen:
            return
        owner = space.directory.owner(resource.slot)
        if owner == space.me:
            space.directory.floor = max(space.directory.floor, resource.grants)
            del self.resources[resource.name]
        else:
            resource.removing = True
            space.post(owner, Remove(resource.name, resource.grants))

    # The directory.

    def _find_master(self, source: Instance, message: Request) -> None:
        space = self._space
        slot = space.slot_of(message.name)
        if space.directory.owner(slot) != space.me:
            mine = space.owner.resources.get(message.name)
            if mine is not None and mine.knowledge is Knowledge.PROBING and source != space.me:
                # Perhaps the directory has just made us the master and its word is under way.
                self.park(self.early, source, message)
            else:
                space.post(source, Redirect(message.lock, message.op, message.name, None))
            return
        record = space.directory.records.get(message.name)
        lost = record is not None and record not in space.members
        if slot in space.directory.unsettled or (lost and space.recovery.busy):
            space.recovery.hold(source, message)
            return
        blockers = set(space.directory.blockers.get(slot, ())) if record is None or lost else set()
        if lost:
            blockers |= space.dead
        if blockers:
            space.directory.records.pop(message.name, None)
            resource = self.create(message.name, space.directory.floor)
            for dead in sorted(blockers):
                resource.add_phantom(dead, silent=dead in space.silent)
            self._request_here(resource, source, message)
            return
        if record is None or lost:
            record = source
            if source == space.me:
                space.directory.records.pop(message.name, None)
                resource = self.create(message.name, space.directory.floor)
                self._request_here(resource, source, message)
                return
            space.directory.records[message.name] = source
        floor = space.directory.floor
        space.post(source, Redirect(message.lock, message.op, message.name, record, floor))

    def create(self, name: bytes, floor: int) -> Resource:
        resource = Resource(name, self._space.slot_of(name), self._out)
        resource.grants = floor
        self.resources[name] = resource
        self._grants_from(resource)
        return resource

    def become(self, name: bytes, floor: int) -> None:
        """The directory says that we are the master of `name`."""
        resource = self.resources.get(name)
        if resource is None:
            self.create(name, floor)

    def settle_unused(self, name: bytes) -> None:
        """We were made the master for a request that is no more."""
        resource = self.resources.get(name)
        if resource is not None and resource.empty:
            self._give_up(resource)

    def answer_early(self) -> None:
        """A question of ours about a master was answered: look again at those who waited for it."""
        waiting, self.early = self.early, []
        for source, message in self.unpark(waiting):
            self.request(source, message)

    def remove(self, source: Instance, message: Remove) -> None:
        directory = self._space.directory
        directory.floor = max(directory.floor, message.floor)
        if directory.records.get(message.name) == source:
            del directory.records[message.name]
        self._space.post(source, Removed(message.name))

    def removed(self, message: Removed) -> None:
        resource = self.resources.get(message.name)
        if resource is not None and resource.removing:
            self.drop(resource)

    def drop(self, resource: Resource) -> None:
        """The directory has no record of it; whoever was held asks the directory again."""
        assert resource.empty
        del self.resources[resource.name]
        held, resource.held = resource.held, []
        for source, message in self.unpark(held):
            self._space.post(source, Redirect(message.lock, message.op, message.name, None))

    # Deaths.

    def members_gone(self, failed: Iterable[Instance], left: Iterable[Instance]) -> None:
        failed, left = list(failed), list(left)
        if not failed and not left:
            return
        for resource in list(self.resources.values()):
            self._grants_from(resource)
            for owner in failed:
                self._forget(resource.owner_died(owner))
            for owner in left:
                self._forget(resource.owner_gone(owner, write_modes=True))
            self._drop_dead_keys(resource)
            self._send(resource)

    def owner_silent(self, owner: Instance, *, write_modes: bool) -> None:
        """What a dead member held goes: all of it, or what it cannot have written under."""
        for resource in list(self.resources.values()):
            self._grants_from(resource)
            if resource.owner_gone(owner, write_modes=write_modes):
                self._send(resource)

    def _forget(self, locks: Iterable[MasterLock]) -> None:
        for lock in locks:
            self.locks.pop((lock.owner, lock.number), None)

    def _drop_dead_keys(self, resource: Resource) -> None:
        for lock in resource.granted:
            if lock.dead:
                self.locks.pop((lock.owner, lock.number), None)

    def check(self) -> None:
        count = 0
        for name, resource in self.resources.items():
            assert resource.name == name
            resource.check()
            for lock in resource.locks():
                if not lock.dead:
                    count += 1
                    assert self.locks[lock.owner, lock.number] is lock
            assert not (resource.removing and not resource.empty)
        assert count == len(self.locks), (count, len(self.locks))
