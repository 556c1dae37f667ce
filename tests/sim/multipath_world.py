"""Several instances, two servers, two networks: what a write is told is there, whatever fails.

The views, the coordinators and the servers are those of `fence_world`; every instance is a real
`ClientCore` for each server (`multipath_client`). Networks are cut in one or both directions and
heal, connections end early and late, servers are killed or lose power, flushes and writes fail,
nodes and instances are put out (dead, or alive and unaware), the volume's map changes, callers are
cancelled, devices are closed and opened again, and some give up what has waited for long.

`multipath_judge` has what must be true of the bytes. Besides:

- nothing of a barred instance executes after its fence was answered;
- nothing executes for an instance that works in an epoch which the server has not installed (R3);
- nothing executes for an older map of the volume than the one that is in force;
- when all faults are over every request ends, and every member writes on every server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import gnbd.client.lanes
import gnbd.client.retained
from cluster.ids import Instance
from tests.sim.fence_server import Server, View, Write
from tests.sim.fence_world import FenceWorld
from tests.sim.multipath_client import PATHS, Client
from tests.sim.multipath_judge import Cell, Judge
from tests.sim.multipath_server import BLOCKS, SWAPPED, DataServer, Job
from tests.sim.multipath_swaps import Chain
from tests.sim.streams import Pipe, Streams
from tests.sim.world import MS, LivenessFailure, Violation

RUN = 2_500 * MS
SETTLE = 6_000 * MS
ALL, GONE = 0, -1
"""Whom a cut concerns: every node, for a while or for good."""
SMALL = {
    (gnbd.client.retained, "RETAINED_MAX"): 10,
    (gnbd.client.retained, "OVERLAPS_SOUGHT_MAX"): 2,
    (gnbd.client.lanes, "LANE_REQUESTS_MAX"): 3,
}
"""So small that a short run meets the limits."""


class MultipathWorld(FenceWorld):
    """Clients, servers, networks and their faults."""

    def __init__(self, seed: int) -> None:
        self.judge = Judge(2, BLOCKS)
        self.sequence = self.minimum = 0
        self.reads = self.flushes = self.errors = self.moved = 0
        self.clients: dict[Instance, Client] = {}
        self.chains = {1: Chain(), 2: Chain()}
        self.swaps = self.unknown_swaps = self.cancelled = self.given_up = self.closed = 0
        self.raised_to: dict[int, int] = {}
        self.fenced_in: dict[int, int] = {}
        self._value = 0
        super().__init__(seed)
        self.streams = Streams(self.world)
        self.bad_flushes = 0.25 if seed % 3 == 0 else 0.03
        """So many of them fail: now and then one upon the other."""
        self.start_clients()

    def new_servers(self) -> list[Server]:
        return [DataServer(self, name) for name in (1, 2)]

    @property
    def data_servers(self) -> list[DataServer]:
        return [server for server in self.servers if isinstance(server, DataServer)]

    def value(self) -> int:
        """One that was never written before."""
        self._value += 1
        return self._value

    def start_clients(self) -> None:
        """Every member that has none gets one; who is none any more is out."""
        living = self.living()
        gone = {client.nexus for client in self.clients.values() if not client.out} - set(living)
        for nexus in living:
            if nexus not in self.clients:
                self.clients[nexus] = Client(self, nexus)
        for nexus in sorted(gone, key=str):
            client = self.clients[nexus]
            client.out = True
            if self.rng.random() < 0.5:
                client.die()
        self.judge.put_out(gone, self.views[-1].epoch)

    # --- network

    def connect(self, node: int, server: DataServer, path: int) -> Pipe | None:
        """A connection, if one can be made."""
        names = frozenset((who, server.name, path) for who in (GONE, ALL, node))
        pipe = Pipe(self.streams, names, server.name)
        if pipe.is_cut or not server.up:
            return None
        server.accept(pipe)
        return pipe

    # --- the checker

    def executes(self, server: Server, write: Write) -> None:
        super().executes(server, write)
        assert isinstance(write, Job)
        if write.call.required > server.admission.drained_epoch:
            raise Violation(
                f"{write.nexus} works in epoch {write.call.required}, s{server.name} has "
                f"{server.admission.drained_epoch}"
            )
        self.is_new_enough(server, write)

    def landed(self, server: Server, write: Write) -> None:
        super().landed(server, write)
        self.is_new_enough(server, write)

    def is_new_enough(self, server: Server, write: Write) -> None:
        """Works with the map that is in force."""
        assert isinstance(write, Job)
        if write.call.sequence < self.raised_to.get(server.name, 0):
            raise Violation(f"{write.nexus} uses s{server.name} with map {write.call.sequence}")

    def raised(self, server: Server, sequence: int) -> None:
        """A new map is in force on a server."""
        self.raised_to[server.name] = sequence

    def installed(self, server: Server, view: View) -> None:
        super().installed(server, view)
        assert isinstance(server, DataServer)
        epochs = range(self.fenced_in.get(server.name, 0) + 1, view.epoch + 1)
        self.fenced_in[server.name] = max(epochs.start - 1, view.epoch)
        self.judge.fenced(server.name, epochs, server.cached, server.stored)
        if self.faults and self.rng.random() < 0.02:
            self.later(40, lambda: self.lose_power(server))
        for client in self.clients.values():
            if client.alive and not client.out:
                self.later(20, self.note(client, server.name, view))

    def note(self, client: Client, name: int, view: View) -> Callable[[], None]:
        def told() -> None:
            if client.alive:
                client.devices[name].core.note_installed(view.epoch)
                client.devices[name].pump()

        return told

    def is_stored(self, cell: Cell, place: int, what: str) -> None:
        """The disk has it, or something newer."""
        for (name, block), other in self.judge.cells.items():
            if other is cell:
                cell.stored(self.data_servers[name - 1].stored[block], place, what)

    # --- faults

    def flush_fails(self) -> bool:
        return self.faults and self.rng.random() < self.bad_flushes

    def disk_fails(self) -> bool:
        return self.faults and self.rng.random() < 0.01

    def nemesis(self) -> None:
        if not self.faults:
            return
        server = self.rng.choice(self.data_servers)
        deed = self.rng.choices(
            (self.cut, self.kill, self.lose_power, self.put_out, self.change_map),
            (7, 2, 2, 2, 1),
        )[0]
        deed(server)
        self.later(110, self.nemesis)

    def cut(self, server: DataServer) -> None:
        """A network, for everybody or one node, in one direction or both."""
        node = self.rng.choice((ALL, *self.members))
        name = node, server.name, self.rng.randrange(PATHS)
        directions = self.rng.choice((("up",), ("down",), ("up", "down")))
        names = [(name, direction) for direction in directions]
        for each in names:
            self.streams.cut(each)
        self.later(150, lambda: self.streams.heal(*names))

    def lose_network(self) -> None:
        """One network of a server never comes back."""
        name = GONE, self.rng.choice(self.servers).name, self.rng.randrange(PATHS)
        for direction in ("up", "down"):
            self.streams.cut((name, direction))

    def saving(self, server: Server) -> None:
        """This world has its own times for a death."""

    def kill(self, server: DataServer) -> None:
        if server.up:
            server.crash()
            self.later(60, lambda: self.start(server))

    def lose_power(self, server: DataServer) -> None:
        if server.up:
            server.lose_power()
            self.later(120, lambda: self.start(server))

    def start(self, server: DataServer) -> None:
        server.boot()
        for pipe in self.streams.pipes:
            if pipe.server_name == server.name:
                pipe.server_is_back()

    def put_out(self, _server: DataServer) -> None:
        self.change_view()
        self.moved += 1
        epoch = self.views[-1].epoch
        self.start_clients()
        for client in self.clients.values():
            if client.alive and not client.out:
                for device in client.devices.values():
                    if self.rng.random() < 0.7:
                        device.core.set_epoch(epoch)

    def change_map(self, _server: DataServer) -> None:
        """Members suspend, declare it and resume; then older maps are refused."""
        self.sequence += 1
        for client in self.clients.values():
            client.suspended = True

    def enforce_map(self) -> None:
        """When every member has the newest map."""
        members = [client for client in self.clients.values() if not client.out]
        if any(client.suspended for client in members):
            return
        for server in self.data_servers:
            if server.up and server.sequence_min < self.sequence:
                self.minimum = self.sequence
                server.raise_minimum(self.sequence)

    # --- the course of things

    def act(self) -> None:
        """Timers of the servers."""
        for server in self.data_servers:
            if server.up:
                server.tick()
        self.enforce_map()
        self.look()
        self.later(15, self.act)

    def run(self) -> None:
        """Faults, then rest. Raises Violation or LivenessFailure."""
        for begin in (self.act, self.nemesis, self.coordinating):
            begin()
        if self.rng.random() < 0.3:
            self.world.at(self.rng.randrange(RUN), self.lose_network)
        self.world.run(RUN)
        self.faults = False
        rest = self.now
        self.streams.heal(*(cut for cut in self.streams.cuts if cut[0][0] != GONE))
        self.world.run(rest + SETTLE, lambda: self.now > rest + 1000 * MS and self.at_rest(rest))
        if not self.at_rest(rest):
            raise LivenessFailure(self.what_is_missing(rest))
        self.the_end()

    def at_rest(self, rest: int) -> bool:
        return not self.what_is_missing(rest)

    def what_is_missing(self, rest: int) -> str:
        for client in self.clients.values():
            if client.out and client.alive:
                return f"{client.nexus} does not know that it is out"
        for client in (client for client in self.clients.values() if not client.out):
            for server in self.data_servers:
                if self.landings.get((server.name, client.nexus), 0) < rest:
                    return f"{client.nexus} cannot write on s{server.name}"
            if any(begun < rest for begun in client.flying.values()):
                return f"{client.nexus} waits for an answer"
        return ""

    def the_end(self) -> None:
        """A last power cut of all servers takes nothing that was told durable."""
        for server in self.data_servers:
            server.lose_cache()
        for (name, block), cell in self.judge.cells.items():
            server = self.data_servers[name - 1]
            cell.stored(server.stored[block], cell.floor, "at the end")
        for server in self.data_servers:
            chain = self.chains[server.name]
            chain.read(server.stored[SWAPPED], chain.told)


@contextlib.contextmanager
def limits(seed: int) -> Iterator[None]:
    """Every other seed meets the limits of the client's memory."""
    before = {key: getattr(*key) for key in SMALL}
    if seed % 2:
        for (module, name), value in SMALL.items():
            setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def run(seed: int) -> MultipathWorld:
    """One seed."""
    with limits(seed):
        world = MultipathWorld(seed)
        world.run()
    return world
