"""A cluster in the world, its operator, its nemesis, and the question whether it came to rest."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from cluster.actions import Reply
from cluster.control import ServerInfo
from cluster.core_events import Command, ReadState
from cluster.ids import NodeId, ServerId, VoterId
from cluster.register import birth_record
from cluster.state import (
    ClusterState,
    HoldNode,
    NodeInfo,
    SetVolumeGroup,
    StartVoterChange,
    VolumeGroup,
    electorates,
    initial_state,
)
from cluster.timing import timing_of
from tests.sim.checker import Checker
from tests.sim.cluster_host import NodeHost
from tests.sim.mounts import GROUP, Mounts
from tests.sim.server_host import ServerHost
from tests.sim.world import MS, SECOND, Host, LivenessFailure, Violation, World

SETTLE_MAX = 40 * SECOND
CIRCUIT_JUDGED = 6 * SECOND


class Scenario:
    """`nodes` nodes and `servers` servers; voters: all nodes, or two nodes and the first server.
    `focus` names the faults of the nemesis; without it all of them."""

    def __init__(
        self, seed: int, nodes: int = 3, servers: int = 2, trace: bool = False,
        focus: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self.world = World(seed, trace)
        self.rng = self.world.rng
        self.checker = Checker(self.world)
        self.timing = timing_of("fast")
        state = self._first_state(nodes, servers)
        self.nodes = [
            NodeHost(self.world, n + 1, self.timing, state, self.checker) for n in range(nodes)
        ]
        self.mounts = [Mounts(node, self.checker) for node in self.nodes]
        self.servers = [
            ServerHost(self.world, 129 + n, self.timing, self.checker) for n in range(servers)
        ]
        for host in [*self.nodes, *self.servers]:
            if host.id in state.voters:
                host.voter.store = birth_record(state)
        self.faults = True
        self.faults_seen = 0
        self._focus = focus
        self._sequence: dict[str, int] = {}
        self._disturbed = -1000 * SECOND
        """When the nemesis did something else than to break a circuit."""
        self._request = 0
        self._holding = False
        self.holds = 0

    def _first_state(self, nodes: int, servers: int) -> ClusterState:
        infos = [
            NodeInfo(NodeId(n + 1), f"n{n + 1}", [f"10.0.0.{n + 1}", f"10.1.0.{n + 1}"])
            for n in range(nodes)
        ]
        server_infos = [
            ServerInfo(ServerId(129 + n), f"s{n + 1}", [f"10.0.1.{n + 1}", f"10.1.1.{n + 1}"])
            for n in range(servers)
        ]
        voters = [VoterId(n + 1) for n in range(nodes)]
        if nodes % 2 == 0 and servers:
            voters.append(VoterId(129))
        state = initial_state("00" * 16, "sim", "fast", infos[0])
        return msgspec.structs.replace(state, nodes=infos, servers=server_infos, voters=voters)

    # --- running

    def start(self) -> None:
        """Boot everything within half a second."""
        for host in [*self.servers, *self.nodes]:
            self.world.at(self.rng.randrange(500 * MS), host.boot)

    def run(self, seconds: float) -> None:
        """With faults for `seconds`, then without until everything works again."""
        self.start()
        self.world.at(SECOND, self._nemesis)
        self.world.at(SECOND, self._operator)
        self.world.run(int(seconds * SECOND))
        self.settle()

    def settle(self) -> None:
        """No faults any more: the cluster must come to rest and work."""
        self.faults = False
        world = self.world
        world.log("sim", "all faults end")
        world.network.heal()
        for host in [*self.servers, *self.nodes]:
            if host.paused:
                host.resume()
            if isinstance(host, NodeHost):
                host.unstick()
            if not host.up:
                host.boot()
        commits = self.checker.commits
        self._want_commits = commits + 5
        if not world.run(world.now + SETTLE_MAX, self.at_rest):
            raise LivenessFailure(f"not at rest: {self.why_not()}")
        self.checker.finish()

    _want_commits = 0

    def at_rest(self) -> bool:
        """Everything works."""
        return not self.why_not()

    def why_not(self) -> str:
        """What still does not work."""
        states = [node.view for node in self.nodes]
        for node, change in zip(self.nodes, states, strict=True):
            if change is None or not change.admitted or not change.view.quorate:
                return f"n{node.id} is no quorate member"
            if len(change.view.installed) != len(self.servers):
                return f"n{node.id} has installed {change.view.installed}"
            if len(change.state.members) != len(self.nodes):
                return f"n{node.id} sees {len(change.state.members)} members"
        if len({change.state.version for change in states if change is not None}) != 1:
            return "versions differ"
        snapshots = [node.core.groups.snapshot for node in self.nodes if node.core is not None]
        groups = [s.groups if s is not None else None for s in snapshots]
        if any(group != groups[0] for group in groups) or not groups[0]:
            return "groups differ"
        if len(groups[0]) > 2:
            return "a group that nobody knows"
        fs = next(group for group in groups[0] if group.name == GROUP)
        if fs.dead or len(fs.members) != sum(m.wanted for m in self.mounts):
            return f"dead {fs.dead}, {len(fs.members)} mounts"
        if self.checker.commits < self._want_commits:
            return "no writes"
        return ""

    # --- the operator

    def _operator(self) -> None:
        """Changes volume groups and voters, reads the register."""
        if not self.faults:
            return
        self.world.at(self.rng.randrange(100 * MS, 900 * MS), self._operator)
        node = self.nodes[self.rng.randrange(len(self.nodes))]
        if node.core is None or node.paused:
            return
        self._request += 1
        request = self._request
        kind = self.rng.random()
        self.checker.began(node.id, node.incarnation, request)
        if kind < 0.4:
            node.core_step(ReadState(request, 3000))
        elif kind < 0.9:
            self._change_group(node, request)
        else:
            self._change_voters(node, request)

    def _change_group(self, node: NodeHost, request: int) -> None:
        assert node.core is not None
        name = f"vg{self.rng.randrange(2)}"
        present = [g for g in node.core.state.volume_groups if g.uuid == name]
        expected = present[0].sequence if present else 0
        who = f"n{node.id}.{node.incarnation}.{request}"
        group = VolumeGroup(name, name, expected + 1, {"who": who})
        node.core_step(Command(request, SetVolumeGroup(name, expected, group), 3000))
        life = node.incarnation
        self.world.at(4 * SECOND, lambda: self._judge_group(node.id, life, request, group, who))

    def _judge_group(
        self, node: int, life: int, request: int, group: VolumeGroup, who: str
    ) -> None:
        reply = self.checker.outcomes.get((node, life, request))
        if isinstance(reply, Reply) and isinstance(reply.result, ClusterState):
            self.checker.sequence_won(group.uuid, group.sequence - 1, who)

    def _change_voters(self, node: NodeHost, request: int) -> None:
        assert node.core is not None
        state = node.core.state
        spare = VoterId(129)
        if not self.servers:
            return
        if (spare in state.voters and len(state.voters) % 2 == 0) or len(state.voters) > 4:
            change = StartVoterChange(remove=spare)
        elif spare not in state.voters:
            change = StartVoterChange(add=spare)
        else:
            change = StartVoterChange(remove=spare)
        if not state.old_voters:
            self.world.log("op", f"{change} on n{node.id}")
            node.core_step(Command(request, change, 5000))

    def _hold_node(self) -> None:
        """The operator puts a node out, and lets it in again later. A fault for `focus`."""
        asked, out = self.rng.sample(self.nodes, 2)
        if asked.core is None or asked.paused or self._holding:
            return
        self._holding = True
        self._request += 1
        request, life = self._request, asked.incarnation
        self.world.log("op", f"n{asked.id} holds n{out.id} out")
        asked.core_step(Command(request, HoldNode(NodeId(out.id), hold=True), 3000))
        self.world.at(4 * SECOND, lambda: self._judge_hold(asked.id, life, request, out.id))
        self.world.at(self.rng.randrange(5, 9) * SECOND, lambda: self._let_in(out.id))

    def _judge_hold(self, node: int, life: int, request: int, out: int) -> None:
        reply = self.checker.outcomes.get((node, life, request))
        if isinstance(reply, Reply) and isinstance(reply.result, ClusterState):
            self.checker.held[out] = reply.result.version
            self.holds += 1

    def _let_in(self, out: int) -> None:
        """Asked again and again: an operation that was given up may still be decided."""
        self.checker.held.pop(out, None)
        self._holding = False
        self.world.at(SECOND, lambda: self._let_in_again(out))

    def _let_in_again(self, out: int) -> None:
        for node in self.nodes:
            if not self._holding and node.core is not None and out in node.core.state.held:
                self._request += 1
                change = HoldNode(NodeId(out), hold=False)
                node.core_step(Command(self._request, change, 3000))
        self.world.at(SECOND, lambda: self._let_in_again(out))

    # --- the nemesis

    def _nemesis(self) -> None:
        """One fault, and when the next comes."""
        if not self.faults:
            return
        rng = self.rng
        self.faults_seen += 1
        kinds = [
            self._cut_link, self._split, self._one_way, self._pause_node, self._crash_node,
            self._kill_mount, self._kill_mount, self._leave_mount, self._crash_server,
            self._pause_server, self._away_server, self._clusterd_dies, self._quick_restart,
            *[self._kill_holder] * 4, self._crash_sequencer, self._all_off,
            self._lossy, self._stick_clusterd, *[self._isolate_reader] * 3,
            *[self._kill_reader] * 3, self._break_circuit,
        ]  # fmt: skip
        if self._focus:
            kinds = [getattr(self, name) for name in self._focus]
        kind = kinds[rng.randrange(len(kinds))]
        if kind != self._break_circuit:
            self._disturbed = self.world.now
        kind()
        if rng.random() < 0.6:
            self.world.at(rng.randrange(200 * MS, 4000 * MS), self._heal_cuts)
        self.world.at(rng.randrange(100 * MS, 2500 * MS), self._nemesis)

    def _lossy(self) -> None:
        """Bad cables for a while."""
        self.world.network.loss = 0.15
        self.world.at(2 * SECOND, self._less_lossy)

    def _less_lossy(self) -> None:
        self.world.network.loss = 0.01 if self.faults else 0.0

    def _heal_cuts(self) -> None:
        self.world.network.cuts.clear()

    def _ids(self) -> list[int]:
        return [host.id for host in [*self.nodes, *self.servers]]

    def _break_circuit(self) -> None:
        """No session between two nodes that hear each other, short or long. If nothing else has
        happened meanwhile, a long one must have put one of them out (rule R9)."""
        network, began = self.world.network, self.world.now
        if network.broken or len(self.nodes) < 2:
            return
        one, other = self.rng.sample([node.id for node in self.nodes], 2)
        network.broken.add((one, other))
        long = self.rng.random() < 0.5
        self.world.log("nemesis", f"no circuit {one}-{other}, {'long' if long else 'short'}")

        def end() -> None:
            if long and (one, other) in network.broken and self._disturbed < began - SECOND:
                self._judge_circuit(one, other)
            network.broken.discard((one, other))

        self.world.at(CIRCUIT_JUDGED if long else self.rng.randrange(800 * MS), end)

    def _judge_circuit(self, one: int, other: int) -> None:
        views = [node.view for node in self.nodes if node.view is not None]
        newest = max(views, key=lambda change: change.state.version)
        members = {int(member.node) for member in newest.state.members}
        if {one, other} <= members and any(self._may_decide(n, newest.state) for n in members):
            raise Violation(f"n{one} and n{other} are members without a circuit")

    def _may_decide(self, node: int, state: ClusterState) -> bool:
        broken = self.world.network.is_broken
        return all(
            2 * sum(1 for voter in voters if not broken(node, voter)) > len(voters)
            for voters in electorates(state)
        )

    def _some_node(self) -> NodeHost:
        return self.nodes[self.rng.randrange(len(self.nodes))]

    def _some_server(self) -> ServerHost:
        return self.servers[self.rng.randrange(len(self.servers))]

    def _cut_link(self) -> None:
        ids = self._ids()
        a, b = self.rng.sample(ids, 2)
        networks = [self.rng.randrange(2)] if self.rng.random() < 0.5 else [0, 1]
        self.world.network.cut([a], [b], networks)
        self.world.network.cut([b], [a], networks)
        self.world.log("nemesis", f"cut {a}-{b} {networks}")

    def _split(self) -> None:
        ids = self._ids()
        side = [host for host in ids if self.rng.random() < 0.5]
        rest = [host for host in ids if host not in side]
        self.world.network.cut(side, rest, [0, 1])
        self.world.network.cut(rest, side, [0, 1])
        self.world.log("nemesis", f"split {side} | {rest}")

    def _one_way(self) -> None:
        node = self._some_node().id
        targets = [host for host in self._ids() if self.rng.random() < 0.7]
        if self.rng.random() < 0.5:
            self.world.network.cut([node], targets, [0, 1])
        else:
            self.world.network.cut(targets, [node], [0, 1])
        self.world.log("nemesis", f"one way {node} {targets}")

    def _pause_node(self) -> None:
        node = self._some_node()
        node.pause()
        self.world.at(self.rng.randrange(100 * MS, 4000 * MS), node.resume)

    def _crash_node(self) -> None:
        node = self._some_node()
        node.crash()
        self.world.at(self.rng.randrange(100 * MS, 5000 * MS), node.boot_if_down)

    def _quick_restart(self) -> None:
        """Back inside the suspicion time."""
        node = self._some_node()
        node.crash()
        self.world.at(self.rng.randrange(10 * MS, 300 * MS), node.boot_if_down)

    def _clusterd_dies(self) -> None:
        self._some_node().clusterd_crash()

    def _kill_mount(self) -> None:
        mounts = self.mounts[self.rng.randrange(len(self.mounts))]
        if not mounts.host.up or mounts.host.paused:
            return
        living = [number for number, mount in sorted(mounts.mounts.items()) if mount.alive]
        if living:
            after = self.rng.randrange(300 * MS) if self.rng.random() < 0.5 else None
            number = living[self.rng.randrange(len(living))]
            self.world.log("nemesis", f"kill mount {number} of n{mounts.host.id}, purge {after}")
            mounts.kill(number, after)

    def _kill_holder(self, tries: int = 200) -> None:
        """The writer dies in the middle of a write."""
        for mounts in self.mounts:
            for number, mount in sorted(mounts.mounts.items()):
                host = mounts.host
                if mount.alive and mount.token and mount.writing and host.up and not host.paused:
                    after = self.rng.choice([1 * MS, 1 * MS, 20 * MS, None])
                    self.world.log("nemesis", f"kill holder {mount.me}, purge {after}")
                    mounts.kill(number, after)
                    return
        if tries and self.faults:
            self.world.at(2 * MS, lambda: self._kill_holder(tries - 1))

    def _kill_reader(self) -> None:
        """A mount dies whose pages the kernel still serves."""
        for mounts in self.mounts:
            for number, mount in sorted(mounts.mounts.items()):
                host = mounts.host
                if mount.alive and mount.cache and host.up and not host.paused:
                    after = self.rng.choice([100 * MS, None, None])
                    self.world.log("nemesis", f"kill reader {mount.me}, purge {after}")
                    mounts.kill(number, after)
                    return

    def _crash_sequencer(self) -> None:
        """Power cut of the node that orders the groups."""
        for node in self.nodes:
            if node.up and node.core is not None and node.core.groups.leads:
                node.crash()
                self.world.at(self.rng.randrange(100 * MS, 2000 * MS), node.boot_if_down)
                return

    def _all_off(self) -> None:
        """Power cut of the whole site, sometimes."""
        if self.rng.random() < 0.5:
            return
        for host in [*self.nodes, *self.servers]:
            host.crash()
            self.world.at(self.rng.randrange(100 * MS, 1500 * MS), self._boot(host))

    def _isolate_reader(self) -> None:
        """A node that caches loses everybody, or all but one."""
        for mounts in self.mounts:
            if any(mount.cache and not mount.token for mount in mounts.mounts.values()):
                node = mounts.host.id
                others = [host for host in self._ids() if host != node]
                if self.rng.random() < 0.7:
                    others.remove(self.rng.choice([n for n in others if n < 129]))
                self.world.network.cut([node], others, [0, 1])
                self.world.network.cut(others, [node], [0, 1])
                self.world.log("nemesis", f"isolate {node} from {others}")
                return

    def _stick_clusterd(self) -> None:
        node = self._some_node()
        node.stick()
        life = node.life
        delay = self.rng.randrange(200 * MS, 6000 * MS)
        self.world.at(delay, lambda: node.unstick() if node.life == life else None)

    def _leave_mount(self) -> None:
        mounts = self.mounts[self.rng.randrange(len(self.mounts))]
        if mounts.host.up and not mounts.host.paused:
            for number in sorted(mounts.mounts):
                if mounts.leave(number):
                    self.world.log("nemesis", f"mount {number} of n{mounts.host.id} leaves")
                    return

    def _crash_server(self) -> None:
        if self.servers:
            server = self._some_server()
            server.crash()
            self.world.at(self.rng.randrange(50 * MS, 4000 * MS), self._boot(server))

    def _pause_server(self) -> None:
        if self.servers:
            server = self._some_server()
            server.pause()
            self.world.at(self.rng.randrange(100 * MS, 4000 * MS), server.resume)

    def _away_server(self) -> None:
        """A server misses epochs: cut from all nodes for a while."""
        if self.servers:
            server = self._some_server().id
            nodes = [node.id for node in self.nodes]
            self.world.network.cut([server], nodes, [0, 1])
            self.world.network.cut(nodes, [server], [0, 1])
            self.world.log("nemesis", f"server {server} is away")

    @staticmethod
    def _boot(server: Host) -> Callable[[], None]:
        def boot() -> None:
            if not server.up:
                server.boot()

        return boot


def run_one(
    seed: int, seconds: float = 30.0, nodes: int = 3, servers: int = 2, trace: bool = False
) -> Scenario:
    """One run. Raises Violation or LivenessFailure."""
    scenario = Scenario(seed, nodes, servers, trace)
    scenario.run(seconds)
    return scenario
