"""Mounts of the simulation: instances that hold one cluster-wide lock, write, and cache.

A small lock protocol over the group events stands for the lock manager. The lowest member is the
holder, once every other member has said that it does not hold, and nobody dead is unreleased. The
holder writes only after every member dropped its cache and every dead one is silent. Others cache
after a grant. A replay (one write per server) by the lowest member comes before `released`. The
kernel cache of a dead mount goes on being read until the guard has purged it: that is what leases
are for (rules R4, R8, G1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from cluster.actions import Reply
from cluster.control import GroupEvent, GroupMember
from cluster.core_events import (
    GroupJoin,
    GroupLeave,
    GroupReleased,
    InstanceEnded,
    InstancesPurged,
    InstanceStarted,
    ServerUp,
    StateChanged,
)
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from tests.sim.checker import Checker
from tests.sim.cluster_host import NodeHost
from tests.sim.server_host import DataReply, DataRequest
from tests.sim.world import MS

GROUP = "fs"
RETRY = 60 * MS
WORK = 50 * MS
WRITE_SHARE = 0.3
READ = 30 * MS
CHAT = 100 * MS


class Peer(msgspec.Struct, frozen=True, tag="peer"):
    """Between mounts. `kind`: ask (do you hold?), free, revoke, revoked, want, grant."""

    kind: str
    source: Instance
    target: Instance
    epoch: int
    seq: int
    token: int = 0
    round: int = 0
    server: int = 0


AppMessage = Peer | DataReply


class Mount:
    """One instance."""

    def __init__(self, mounts: Mounts, instance: Instance) -> None:
        self.mounts = mounts
        self.host = mounts.host
        self.checker = mounts.checker
        self.me = instance
        self.alive = True
        self.members: list[Instance] = []
        self.dead: list[Instance] = []
        self.silent: list[Instance] = []
        self.epoch = 0
        self.position = (0, 0)
        self.lowest_since: tuple[int, int] | None = None
        self.free: set[Instance] = set()
        self.asks: list[Peer] = []
        self.token = 0
        self.round = 0
        self.revoked: set[Instance] = set()
        self.write_id = 0
        self.writing = False
        self.write_server = 0
        self.busy = False
        self.newest_revoke = (0, 0)
        self.reading: dict[int, tuple[int, int]] = {}
        self.cache: dict[int, int] = {}
        self.lease_end = 0
        self.purge_delay = 0
        self.replays: dict[Instance, dict[int, int]] = {}
        self.releasing: dict[Instance, int] = {}
        self.leaving = False
        self.stuck = False

    # --- group

    def group_event(self, event: GroupEvent) -> None:
        """The next event of the group."""
        self.members = sorted(member.instance for member in event.members)
        self.dead, self.silent = event.dead, event.silent
        self.epoch = event.epoch
        self.position = (event.epoch, event.seq)
        self.free &= set(self.members)
        if not self.members or self.members[0] != self.me:
            self.lowest_since = None
            self.free.clear()
        elif self.lowest_since is None:
            self.lowest_since = self.position
        for subject in list(self.replays):
            if subject not in self.dead:
                del self.replays[subject]
        self.work()

    def work(self) -> None:
        """Whatever can go on."""
        if not self.alive:
            return
        if self.token and self.lowest_since is None and not self.busy:
            self.token = 0
        for ask in list(self.asks):
            if (ask.epoch, ask.seq) <= self.position and not self.token and not self.busy:
                self.asks.remove(ask)
                self._send("free", ask.source, ask.epoch, ask.seq)
        self._replay()
        if self.lowest_since is not None and not self.token:
            missing = [m for m in self.members if m != self.me and m not in self.free]
            for member in missing:
                self._send("ask", member, *self.lowest_since)
            if not missing and not self.dead and not self.leaving:
                self.token = self.checker.acquired(self.me, self.epoch)
                self.round = 0

    def _send(self, kind: str, target: Instance, epoch: int, seq: int, **fields: Any) -> None:
        message = Peer(kind, self.me, target, epoch, seq, **fields)
        data = msgspec.msgpack.encode(message)
        self.host.world.network.session(self.host.id, target.node, "app", data)

    # --- replay

    def _replay(self) -> None:
        if not self.members or self.members[0] != self.me:
            return
        for subject in self.silent:
            done = self.replays.setdefault(subject, {})
            servers = self.mounts.servers
            waiting = [server for server in servers if done.get(server, 0) < self.epoch]
            if not waiting and subject not in self.releasing:
                number = self.mounts.request()
                self.releasing[subject] = number
                self.host.core_step(GroupReleased(number, GROUP, subject, self.me))
            for server in waiting:
                self.mounts.data(self, server, False, 0, 0, self._replayed(subject, server))

    def _replayed(self, subject: Instance, server: int) -> Callable[[DataReply], None]:
        epoch = self.epoch

        def done(reply: DataReply) -> None:
            if reply.status == "ok" and subject in self.replays:
                self.replays[subject][server] = epoch

        return done

    # --- messages

    def message(self, message: Peer) -> None:
        """From another mount."""
        if not self.alive or message.source not in self.members:
            if message.kind == "ask" and self.alive:
                self._ask(message)
            return
        match message.kind:
            case "ask":
                self._ask(message)
            case "free":
                if (message.epoch, message.seq) == self.lowest_since:
                    self.free.add(message.source)
            case "revoke":
                key = (message.token, message.round)
                self.newest_revoke = max(self.newest_revoke, key)
                self.cache.clear()
                self.reading.clear()
                self._send(
                    "revoked", message.source, *self.position,
                    token=message.token, round=message.round,
                )  # fmt: skip
            case "revoked":
                if (message.token, message.round) == (self.token, self.round):
                    self.revoked.add(message.source)
            case "want":
                if self.token and not self.busy:
                    self._send(
                        "grant", message.source, *self.position,
                        token=self.token, round=self.round, server=message.server,
                    )  # fmt: skip
            case "grant":
                if (message.token, message.round) >= self.newest_revoke:
                    self._fetch(message)
        self.work()

    def _ask(self, message: Peer) -> None:
        if all(ask.source != message.source or ask != message for ask in self.asks):
            self.asks = [ask for ask in self.asks if ask.source != message.source]
            self.asks.append(message)
        self.work()

    # --- writing

    def turn(self) -> None:
        """The holder's next step of a write; a reader's wish."""
        if not self.alive:
            return
        self.work()
        if not self.mounts.servers:
            return
        if self.token:
            idle = not self.busy and self.lowest_since is not None and not self.leaving
            if idle and self.host.world.rng.random() < WRITE_SHARE:
                self.busy = True
                self.round += 1
                self.revoked = set()
                self.cache.clear()
                self.reading.clear()
                self.write_server = self.mounts.choose_server()
            if self.busy:
                self._push()
        elif self.members and self.me in self.members:
            for server in self.mounts.servers:
                if server not in self.cache:
                    self._send("want", self.members[0], *self.position, server=server)

    def _push(self) -> None:
        waiting = [m for m in self.members if m != self.me and m not in self.revoked]
        for member in waiting:
            self._send("revoke", member, *self.position, token=self.token, round=self.round)
        if waiting or any(instance not in self.silent for instance in self.dead):
            return
        value = self.token * 100_000 + self.round
        if self.host.clock < self.lease_end:
            sent = self.mounts.data(self, self.write_server, True, value, self.token, self._written)
            self.write_id = sent or self.write_id
            self.writing = True

    def _written(self, reply: DataReply) -> None:
        # An earlier copy is refused once a later one was executed: only the last answer counts.
        if reply.status != "ok" or reply.id != self.write_id or not self.busy or not self.alive:
            return
        self.busy = self.writing = False
        self.checker.commits += 1
        self.work()

    # --- caching

    def _fetch(self, grant: Peer) -> None:
        key = (grant.token, grant.round)
        if self.host.clock >= self.lease_end or self.leaving:
            return
        self.reading[grant.server] = key

        def done(reply: DataReply) -> None:
            fresh = self.reading.get(grant.server) == key
            if reply.status == "ok" and self.alive and fresh:
                del self.reading[grant.server]
                if self.host.clock < self.lease_end:
                    self.cache[grant.server] = reply.value

        self.mounts.data(self, grant.server, False, 0, 0, done)

    def read_cache(self) -> None:
        """An application reads; the kernel serves it while the guard has not purged."""
        if self.host.clock >= self.lease_end + self.purge_delay:
            self.cache.clear()
            self.reading.clear()
        for server, value in sorted(self.cache.items()):
            self.checker.cached_read(self.me, server, value)

    def lease(self, end_ns: int) -> None:
        """The guard renews; after a lapse it has purged first."""
        if self.host.clock >= self.lease_end:
            self.cache.clear()
            self.reading.clear()
            budget = self.host.timing.purge_ms * MS
            self.purge_delay = self.host.world.rng.randrange(budget * 9 // 10)
        self.lease_end = end_ns

    def die(self) -> None:
        """The process is gone; the kernel's cache stays."""
        self.alive = False


class Mounts:
    """The application of one node: starts mounts, kills them, passes messages."""

    def __init__(self, host: NodeHost, checker: Checker) -> None:
        self.host = host
        self.checker = checker
        self.mounts: dict[int, Mount] = {}
        self.servers: list[int] = []
        self.wanted = 1
        self._number = 0
        self._request = 1000
        self._calls: dict[int, Callable[[DataReply], None]] = {}
        self._leaves: dict[int, int] = {}
        self._chats: dict[int, bool] = {}
        self._chatting: dict[int, int] = {}
        host.application = self

    def request(self) -> int:
        """A request number."""
        self._request += 1
        return self._request

    # --- life

    def started(self) -> None:
        self.mounts = {}
        self._number = 0
        self._calls = {}
        self._leaves = {}
        for server in self.all_servers():
            self.host.at(5 * MS, lambda server=server: self.host.core_step(ServerUp(server)))
        self._chats = {}
        self._chatting = {}
        self._tick_work()
        self._tick_read()
        self._tick_chat()

    def all_servers(self) -> list[int]:
        return sorted(host for host in self.host.world.hosts if host > 128)

    def stopped(self) -> None:
        self.mounts = {}

    def choose_server(self) -> int:
        return self.servers[self.host.world.rng.randrange(len(self.servers))]

    def _tick_work(self) -> None:
        for mount in list(self.mounts.values()):
            mount.turn()
        self._start_missing()
        self.host.at(WORK + self.host.world.rng.randrange(10 * MS), self._tick_work)

    def _tick_chat(self) -> None:
        """Instances come to and go from a second group all the time (order of events)."""
        for number, mount in sorted(self.mounts.items()):
            if mount.alive and mount.members and not mount.leaving and number not in self._chatting:
                self._chat(number, mount)
        self.host.at(CHAT + self.host.world.rng.randrange(CHAT), self._tick_chat)

    def _chat(self, number: int, mount: Mount) -> None:
        request = self.request()
        self._chatting[number] = request
        here = self._chats.get(number, False)
        self._chats[number] = not here
        if here:
            self.checker.left(mount.me, "chat")
            self.host.core_step(GroupLeave(request, "chat", mount.me))
        else:
            member = GroupMember(mount.me, "x", ["10.0.0.9"], 1)
            self.host.core_step(GroupJoin(request, "chat", member))

    def _tick_read(self) -> None:
        for mount in list(self.mounts.values()):
            mount.read_cache()
        self.host.at(READ, self._tick_read)

    def _start_missing(self) -> None:
        view = self.host.view
        living = [mount for mount in self.mounts.values() if mount.alive]
        if view is None or not view.admitted or self.host.barred_life:
            return
        if len(living) < self.wanted and self.host.core is not None:
            self._start()

    def _start(self) -> None:
        self._number += 1
        number = InstanceNo(self._number)
        node, life = NodeId(self.host.id), Incarnation(self.host.incarnation)
        mount = Mount(self, Instance(node, life, number))
        self.mounts[number] = mount
        self.host.core_step(InstanceStarted(number))
        member = GroupMember(mount.me, f"node{node}", [f"10.0.0.{node}"], 7000 + number)
        self.host.core_step(GroupJoin(self.request(), GROUP, member))

    def kill(self, number: int, purge_after: int | None) -> None:
        """A mount process dies; the guard purges after a while (or only the lease ends it)."""
        mount = self.mounts[number]
        mount.die()
        mount.stuck = purge_after is None
        self.host.core_step(InstanceEnded(InstanceNo(number), clean=False, reason="killed"))
        if purge_after is not None:
            self.host.at(purge_after, lambda: self._purge(number))

    def _purge(self, number: int) -> None:
        mount = self.mounts.get(number)
        if mount is not None:
            mount.cache.clear()
            self.host.purged([InstanceNo(number)])
            self.host.core_step(InstancesPurged([InstanceNo(number)]))

    def leave(self, number: int) -> bool:
        """A clean unmount, if it holds nothing just now."""
        mount = self.mounts.get(number)
        if mount is None or not mount.alive or mount.busy or mount.replays or not mount.members:
            return False
        if self._chats.get(number) or number in self._chatting:
            return False
        mount.leaving = True
        mount.token = 0
        mount.cache.clear()
        mount.reading.clear()
        request = self.request()
        self._leaves[request] = number
        self.host.core_step(GroupLeave(request, GROUP, mount.me))
        return True

    # --- events of the cluster core

    def changed(self, change: StateChanged) -> None:
        self.servers = [int(server.id) for server in change.state.servers]
        for mount in list(self.mounts.values()):
            mount.work()

    def group_event(self, number: InstanceNo, event: GroupEvent) -> None:
        mount = self.mounts.get(number)
        if mount is not None and mount.alive and event.group == GROUP:
            mount.group_event(event)

    def barred(self, numbers: list[InstanceNo]) -> None:
        for number in sorted(self.mounts) if 0 in numbers else sorted(numbers):
            mount = self.mounts.get(number)
            if mount is not None:
                mount.die()
                if not mount.stuck:
                    delay = self.host.world.rng.randrange(200 * MS)
                    self.host.at(delay, partial(self._purge, number))

    def lease(self, number: InstanceNo, end_ns: int) -> None:
        mount = self.mounts.get(number)
        if mount is not None:
            mount.lease(end_ns)

    def reply(self, reply: Reply) -> None:
        for mount in self.mounts.values():
            for subject, request in list(mount.releasing.items()):
                if request == reply.request:
                    del mount.releasing[subject]
        for number, request in list(self._chatting.items()):
            if request == reply.request:
                del self._chatting[number]
        number = self._leaves.pop(reply.request, None)
        if number is None or number not in self.mounts:
            return
        self.mounts[number].die()
        self.host.core_step(InstanceEnded(InstanceNo(number), clean=True))

    # --- data

    def data(
        self, mount: Mount, server: int, write: bool, value: int, token: int,
        done: Callable[[DataReply], None],
    ) -> int | None:  # fmt: skip
        """One request, if the client knows that the server has installed its epoch (rule R3)."""
        if not self.may_use(mount, server):
            return None
        number = self.request()
        self._calls[number] = done
        request = DataRequest(number, mount.me, mount.epoch, write, value, token)
        data = msgspec.msgpack.encode(request)
        self.host.world.network.session(self.host.id, server, "app", data)
        self.host.at(20 * RETRY, lambda: self._forget(number))
        return number

    def _forget(self, number: int) -> None:
        self._calls.pop(number, None)

    def may_use(self, mount: Mount, server: int) -> bool:
        """Rule R3 in the client."""
        view = self.host.view
        return view is not None and view.view.epoch >= mount.epoch and server in view.view.installed

    def message(self, source: int, data: bytes) -> None:
        message = msgspec.msgpack.decode(data, type=AppMessage)
        if isinstance(message, DataReply):
            call = self._calls.pop(message.id, None)
            mount = self.mounts.get(message.to.number)
            if call is not None and mount is not None and mount.me == message.to:
                if message.status == "barred" and mount.alive:
                    mount.die()
                    self.host.core_step(InstanceEnded(mount.me.number, clean=False))
                else:
                    call(message)
            return
        mount = self.mounts.get(message.target.number)
        if mount is not None and mount.me == message.target:
            mount.message(message)
