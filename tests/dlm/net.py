"""Lockspace cores on wires that the test moves by hand."""

from collections import deque

from cluster.control import GroupEvent, GroupMember
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from dlm.directory import slot_of, slot_table
from dlm.engine import Completion
from dlm.lockspace import Blocking, Left, Lockspace, Send
from dlm.messages import decode_untrusted


def instance(node, number=1, incarnation=1):
    return Instance(NodeId(node), Incarnation(incarnation), InstanceNo(number))


class Never:
    """An event that does not come; whoever waits stays where he is."""

    def set(self):
        pass

    def wait(self):
        return self

    def __await__(self):
        yield


class FrozenRuntime:
    """Tasks and timers are only written down."""

    def __init__(self):
        self.time_ns = 0
        self.spawned = []

    def now_ns(self):
        return self.time_ns

    def wakeup(self):
        return Never()

    def spawn(self, work):
        self.spawned.append(work)
        return True

    def call_at(self, when_ns, callback):
        pass


class Net:
    """Members 1..count in one view; `at(n)` is the lockspace of member n."""

    def __init__(self, count):
        self.spaces = {}
        self.links = {}
        self.events = {}
        self.view_members = []
        self.dead = []
        self.silent = []
        self.seq = 0
        for node in range(1, count + 1):
            self.add(instance(node))
        self.view()
        self.settle()

    def add(self, me):
        self.spaces[me] = Lockspace(me)
        self.events[me] = []
        self.view_members = sorted([*self.view_members, me])

    def at(self, node):
        return self.spaces[instance(node)]

    # Group events.

    def emit(self, kind, to=None, **fields):
        self.seq += 1
        event = GroupEvent(
            "g", Epoch(1), self.seq, kind,
            [GroupMember(one, f"n{one.node}", [], 0) for one in self.view_members],
            dead=list(self.dead), silent=list(self.silent), **fields,
        )  # fmt: skip
        for me in list(self.spaces) if to is None else to:
            self.spaces[me].group_event(event)
            self.collect(me)
        return event

    def view(self, to=None, **fields):
        return self.emit("view", to, **fields)

    def give(self, node, event):
        """Hand an event that was held back to one member."""
        self.spaces[instance(node)].group_event(event)
        self.collect(instance(node))

    def crash(self, node, to=None, lose=True):
        """The member dies; what it had sent is lost, or still arrives."""
        me = instance(node)
        del self.spaces[me]
        if lose:
            for key in self.links:
                if key[0] == me:
                    self.links[key].clear()
        self.dead.append(me)
        self.view_members.remove(me)
        return self.view(to, failed=[me])

    def make_silent(self, node):
        self.silent.append(instance(node))
        self.emit("silent", subject=instance(node))

    def release(self, node):
        me = instance(node)
        self.dead.remove(me)
        self.silent = [one for one in self.silent if one != me]
        self.emit("released", subject=me)

    # Wires.

    def collect(self, me):
        for action in self.spaces[me].take():
            if isinstance(action, Send):
                self.links.setdefault((me, action.to), deque()).append(action.payload)
            else:
                self.events[me].append(action)

    def deliver(self, source, to, count=1):
        """Carry payloads from one member to another."""
        link = self.links.get((instance(source), instance(to)), deque())
        for _ in range(min(count, len(link))):
            payload = link.popleft()
            if instance(to) in self.spaces:
                self.spaces[instance(to)].receive(instance(source), payload)
                self.collect(instance(to))

    def pending(self, source, to):
        """Messages under way on one wire."""
        link = self.links.get((instance(source), instance(to)), ())
        return [m for payload in link for m in decode_untrusted(payload).messages]

    def settle(self):
        moved = True
        while moved:
            moved = False
            for source, to in list(self.links):
                if self.links[source, to]:
                    moved = True
                    self.deliver_any(source, to)
        for space in self.spaces.values():
            space.check()

    def deliver_any(self, source, to):
        payload = self.links[source, to].popleft()
        if to in self.spaces:
            self.spaces[to].receive(source, payload)
            self.collect(to)

    # Operations.

    def lock(self, node, name, mode, flags=0, settle=True):
        number = self.at(node).lock(name, mode, flags)
        self.collect(instance(node))
        if settle:
            self.settle()
        return number

    def convert(self, node, lock, mode, flags=0, lvb=None, settle=True):
        result = self.at(node).convert(lock, mode, flags, lvb)
        self.collect(instance(node))
        if settle:
            self.settle()
        return result

    def unlock(self, node, lock, flags=0, lvb=None, settle=True):
        result = self.at(node).unlock(lock, flags, lvb)
        self.collect(instance(node))
        if settle:
            self.settle()
        return result

    def cancel(self, node, lock, settle=True):
        result = self.at(node).cancel(lock)
        self.collect(instance(node))
        if settle:
            self.settle()
        return result

    # What was said.

    def done(self, node, lock):
        return [
            e for e in self.events[instance(node)] if isinstance(e, Completion) and e.lock == lock
        ]

    def results(self, node, lock):
        return [e.result for e in self.done(node, lock)]

    def blocked(self, node, lock):
        return [
            e for e in self.events[instance(node)] if isinstance(e, Blocking) and e.lock == lock
        ]

    def left(self, node):
        return any(isinstance(e, Left) for e in self.events[instance(node)])

    def mode(self, node, lock):
        return self.at(node).owner.locks[lock].mode

    def master_of(self, name):
        found = [
            me
            for me, space in self.spaces.items()
            if name in space.master.resources and not space.master.resources[name].removing
        ]
        assert len(found) <= 1, found
        return found[0] if found else None

    def resource(self, name):
        return self.spaces[self.master_of(name)].master.resources[name]

    def name_for(self, directory, tag=b"r", among=None):
        """A name whose directory member is `directory` (in a view of `among`)."""
        table = slot_table(among or self.view_members)
        number = 0
        while True:
            name = tag + b"%d" % number
            if table[slot_of(name)] == instance(directory):
                return name
            number += 1
