"""Members with what is built on the lock manager's engine, on wires that the test moves by hand."""

from collections import deque

from cluster.control import GroupEvent, GroupMember
from cluster.ids import Epoch
from dlm.dispatcher import Dispatcher
from dlm.flocks import Flocks
from dlm.lockspace import Changed, Lockspace, Ranged
from dlm.range_locks import RangeLocks
from tests.dlm.net import instance


class Clock:
    """A runtime whose time the test moves."""

    def __init__(self):
        self.time_ns = 0
        self.timers = []

    def now_ns(self):
        return self.time_ns

    def call_at(self, when_ns, callback):
        self.timers.append((when_ns, callback))

    def advance(self, nanoseconds):
        """Let time pass; call what was to be called."""
        self.time_ns += nanoseconds
        due = [timer for timer in self.timers if timer[0] <= self.time_ns]
        self.timers = [timer for timer in self.timers if timer[0] > self.time_ns]
        for _when, callback in due:
            callback()


class Member:
    """One process."""

    def __init__(self, net, me):
        self.me = me
        self.space = Lockspace(me)
        self.api = Dispatcher(
            self.space,
            lambda to, payload: net.links.setdefault((me, to), deque()).append(payload),
            net.clock.now_ns,
            self.other,
        )
        self.flocks = Flocks(self.api)
        self.ranges = RangeLocks(me, self.api, self.api.tell, net.clock)

    def other(self, action):
        if isinstance(action, Ranged):
            self.ranges.receive(action.source, action.message)
        elif isinstance(action, Changed):
            self.ranges.changed(action)


class ServiceNet:
    """Members 1..count in one view; `at(n)` is member n."""

    def __init__(self, count):
        self.members = {}
        self.links = {}
        self.view = []
        self.dead = []
        self.silent = []
        self.seq = 0
        self.clock = Clock()
        for node in range(1, count + 1):
            self.join(node, settle=False)
        self.settle()

    def at(self, node):
        return self.members[instance(node)]

    # The group.

    def emit(self, kind, **fields):
        self.seq += 1
        event = GroupEvent(
            "g", Epoch(1), self.seq, kind,
            [GroupMember(one, f"n{one.node}", [], 0) for one in self.view],
            dead=list(self.dead), silent=list(self.silent), **fields,
        )  # fmt: skip
        for member in list(self.members.values()):
            member.api.group_event(event)

    def join(self, node, settle=True):
        me = instance(node)
        self.members[me] = Member(self, me)
        self.view = sorted([*self.view, me])
        self.emit("view", joined=[me])
        if settle:
            self.settle()

    def crash(self, node, settle=True):
        me = instance(node)
        del self.members[me]
        for key in self.links:
            if key[0] == me:
                self.links[key].clear()
        self.dead.append(me)
        self.view.remove(me)
        self.emit("view", failed=[me])
        if settle:
            self.settle()

    def leave(self, node):
        """A clean leave, as a member process does it."""
        me = instance(node)
        self.at(node).ranges.leave()
        self.at(node).api.leave()
        self.settle()
        del self.members[me]
        self.view.remove(me)
        self.emit("view", left=[me])
        self.settle()

    def make_silent(self, node):
        self.silent.append(instance(node))
        self.emit("silent", subject=instance(node))
        self.settle()

    def release(self, node):
        self.dead.remove(instance(node))
        self.silent = [one for one in self.silent if one != instance(node)]
        self.emit("released", subject=instance(node))
        self.settle()

    # Wires.

    def deliver(self, source, to, count=99):
        """Carry payloads from one member to another."""
        link = self.links.get((instance(source), instance(to)), deque())
        for _ in range(min(count, len(link))):
            payload = link.popleft()
            if instance(to) in self.members:
                self.at(to).api.receive(instance(source), payload)

    def settle(self):
        while any(self.links.values()):
            for (source, to), link in list(self.links.items()):
                while link:
                    payload = link.popleft()
                    if to in self.members:
                        self.members[to].api.receive(source, payload)

    def busy(self):
        """Payloads under way."""
        return sum(map(len, self.links.values()))
