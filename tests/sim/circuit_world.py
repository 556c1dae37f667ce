"""Mounts, the circuits between them and the judges of rule R9 in a small deterministic world.

Each node is a host: its clusterd looks as `node/circuits_io.py` does, with messages that take their
time. A mount can hang while its node runs. A circuit that breaks is noticed by each end later, and
comes back later than it could. Invariants: nobody goes unless its circuit to a member that runs was
down for the limit; of a circuit at most one end goes for it; and when the faults are
over, no circuit between two members is down for longer than the bound.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.timing import timing_of
from node.circuits import Circuits, Row, limit_ns, look_ns
from node.circuits_io import ANSWER_PART
from tests.sim.world import MS, SECOND, Host, LivenessFailure, Violation, World

TIMING = timing_of("fast")
LOOK = look_ns(TIMING)
LIMIT = limit_ns(TIMING)
HUNG_MAX = 4 * TIMING.dead_ms * MS
"""A member that hangs is put out by its progress stamps, here after so long."""
KNOWN_LATE = 800 * MS
NOTICED_LATE = 3 * SECOND
DIALLED_LATE = 7 * SECOND
BOUND = 3 * LIMIT
"""For one broken circuit after another: each end that goes changes the rows of others."""
RUN = 150 * SECOND

Answer = Callable[[dict[Instance, Row]], None]


class Mount:
    """A member: whom it knows, and whom it thinks that it reaches."""

    def __init__(self, me: Instance) -> None:
        self.me = me
        self.hung = False
        self.known: set[Instance] = set()
        self.reached: set[Instance] = set()
        self.connections: dict[Instance, int] = {}

    @property
    def row(self) -> Row:
        """Whom it does not reach."""
        return {one: self.connections.get(one, 0) for one in self.known - self.reached}


class Node(Host):
    """A clusterd with its judge; its mounts die with it."""

    def __init__(self, world: CircuitWorld, number: int) -> None:
        self.circuits = world
        self.mounts: dict[Instance, Mount] = {}
        self.numbers = 0
        self.judge = Circuits(TIMING)
        super().__init__(world.world, number)

    def started(self) -> None:
        """A new life, with new mounts."""
        self.judge = Circuits(TIMING)
        self.numbers = 0
        for _ in range(self.circuits.random.choice((1, 1, 1, 2))):
            self.mount()
        self.at(self.circuits.random.randrange(LOOK), self.look)

    def mount(self) -> None:
        """One more member."""
        self.numbers += 1
        me = Instance(NodeId(self.id), Incarnation(self.life), InstanceNo(self.numbers))
        self.circuits.born(self, Mount(me))

    def stopped(self) -> None:
        """Its mounts are gone at once; the others hear of it later."""
        for me in list(self.mounts):
            self.circuits.gone(me)

    def works(self) -> bool:
        """No node is ever out of its cluster here."""
        return True

    def rows(self, answer: Answer) -> None:
        """Ask the mounts of this node; those that hang do not answer in time."""
        asked = {me: mount for me, mount in self.mounts.items() if not mount.hung}
        delay = self.circuits.random.randrange(LOOK // ANSWER_PART)
        self.at(delay, lambda: answer({me: one.row for me, one in asked.items()}))

    def look(self) -> None:
        """One look: the mounts here, then the nodes of those that they miss."""
        begun_ns = self.clock
        self.rows(lambda mine: self.ask(begun_ns, mine))

    def ask(self, begun_ns: int, mine: dict[Instance, Row]) -> None:
        """The second half; a node that does not answer in time has no rows."""
        missed = {int(peer.node) for row in mine.values() for peer in row} - {self.id}
        rows, waiting, over = dict(mine), set(missed), [False]

        def finish() -> None:
            if not over[0]:
                over[0] = True
                self.looked(begun_ns, mine, rows)

        def answered(node: int, found: dict[Instance, Row]) -> None:
            if not over[0]:
                rows.update(found)
                waiting.discard(node)
                if not waiting:
                    finish()

        for node in sorted(missed):
            self.circuits.call(self, node, lambda found, node=node: answered(node, found))
        self.at(2 * LOOK // ANSWER_PART if missed else 0, finish)

    def looked(self, begun_ns: int, mine: dict[Instance, Row], rows: dict[Instance, Row]) -> None:
        """Judge; look again later."""
        doomed = self.judge.look(begun_ns, self.clock, self.works(), mine, rows)
        for me, peer in doomed.items():
            if me in self.mounts:
                self.circuits.put_out(me, peer)
        self.at(LOOK, self.look)


class CircuitWorld:
    """The nodes, the truth about the circuits, and who went."""

    def __init__(self, seed: int, *, broken: bool, trace: bool = False) -> None:
        self.world = World(seed, trace)
        self.random = self.world.rng
        self.breaks_for_long = broken
        self.faults = True
        self.down_since: dict[frozenset[Instance], int] = {}
        """Circuits between members that no connection is on, from when on."""
        self.blocked: set[frozenset[int]] = set()
        """Pairs of nodes between whose mounts nothing can connect."""
        self.back: dict[frozenset[Instance], tuple[int, int]] = {}
        """The last time that a circuit was down: from, to."""
        self.stopped: dict[Instance, tuple[int, int]] = {}
        """The last time that a mount or its node did not run: from, to (0: it lasts)."""
        self.died: dict[Instance, int] = {}
        self.out: list[tuple[Instance, Instance]] = []
        """Who went, and for whom."""
        self.nodes = [Node(self, number) for number in range(1, self.random.randrange(2, 6) + 1)]
        for node in self.nodes:
            node.boot()

    @property
    def now(self) -> int:
        return self.world.now

    def members(self) -> dict[Instance, Mount]:
        """Everybody that lives."""
        return {me: one for node in self.nodes for me, one in node.mounts.items()}

    def node_of(self, me: Instance) -> Node:
        return self.nodes[me.node - 1]

    def runs(self, me: Instance) -> bool:
        return not self.node_of(me).paused and not self.members()[me].hung

    # --- the group and its circuits

    def born(self, node: Node, mount: Mount) -> None:
        """A member; it and the others hear of each other at different times."""
        others = list(self.members())
        node.mounts[mount.me] = mount
        for other in others:
            self.down_since[frozenset((mount.me, other))] = self.now
            for one, peer in ((mount.me, other), (other, mount.me)):
                self.world.at(self.random.randrange(KNOWN_LATE), self.knows(one, peer))
            self.dial(mount.me, other)

    def knows(self, me: Instance, peer: Instance) -> Callable[[], None]:
        def hear() -> None:
            members = self.members()
            if me in members and peer in members:
                members[me].known.add(peer)

        return hear

    def gone(self, me: Instance) -> None:
        """A member has ended; the group says so later, the kernel of the others sooner."""
        self.node_of(me).mounts.pop(me)
        self.died[me] = self.now
        for pair in [pair for pair in self.down_since if me in pair]:
            del self.down_since[pair]
        for other, mount in self.members().items():
            self.world.at(self.random.randrange(NOTICED_LATE), self.notices(other, me))
            self.world.at(self.random.randrange(3 * SECOND), lambda m=mount: m.known.discard(me))

    def notices(self, me: Instance, peer: Instance) -> Callable[[], None]:
        """An end sees that its connection is gone, if it is."""

        def see() -> None:
            mount = self.members().get(me)
            connected = peer in self.members() and frozenset((me, peer)) not in self.down_since
            if mount is not None and not connected:
                mount.reached.discard(peer)

        return see

    def loses(self, one: Instance, other: Instance) -> None:
        """A connection breaks; each end notices when it does."""
        pair = frozenset((one, other))
        if pair not in self.down_since:
            self.down_since[pair] = self.now
            for me, peer in ((one, other), (other, one)):
                delay = self.random.choice((1, NOTICED_LATE))
                self.world.at(self.random.randrange(delay), self.notices(me, peer))

    def dial(self, one: Instance, other: Instance) -> None:
        """Connect sooner or later, when both run and nothing is in the way."""
        late = DIALLED_LATE if self.random.random() < 0.2 else SECOND

        def connect() -> None:
            members = self.members()
            pair = frozenset((one, other))
            if one not in members or other not in members or pair not in self.down_since:
                return
            known = other in members[one].known and one in members[other].known
            blocked = frozenset((int(one.node), int(other.node))) in self.blocked
            if not known or blocked or not self.runs(one) or not self.runs(other):
                self.world.at(200 * MS, connect)
                return
            self.back[pair] = self.down_since.pop(pair), self.now
            for me, peer in ((one, other), (other, one)):
                members[me].reached.add(peer)
                members[me].connections[peer] = members[me].connections.get(peer, 0) + 1

        self.world.at(self.random.randrange(late), connect)

    def call(self, source: Node, target: int, answer: Answer) -> None:
        """`instances.circuits`: there and back, each way late now and then."""

        def delay() -> int:
            slow = self.faults and self.random.random() < 0.05
            return self.random.randrange(2 * LOOK if slow else 50 * MS)

        def back(rows: dict[Instance, Row]) -> None:
            self.world.at(delay(), lambda: source.at(0, lambda: answer(rows)))

        def arrive() -> None:
            node = self.nodes[target - 1]
            if node.up:
                node.at(0, lambda: node.rows(back))

        self.world.at(delay(), arrive)

    # --- faults

    def nemesis(self) -> None:
        """One fault after another."""
        if not self.faults:
            return
        long = self.breaks_for_long and self.random.random() < 0.3
        fault = self.random.choice((self.break_some, self.break_some, self.hang, self.pause,
                                    self.crash))  # fmt: skip
        self.break_some(long=True) if long else fault()
        self.world.at(self.random.randrange(6 * SECOND), self.nemesis)

    def break_some(self, *, long: bool = False) -> None:
        """Nothing connects between two nodes, for good or for a while; or only once."""
        one, other = self.random.sample(self.nodes, 2)
        pair = frozenset((one.id, other.id))
        if not long and self.random.random() < 0.7:
            self.blocked.add(pair)
            self.world.at(self.random.randrange(LIMIT // 4), lambda: self.blocked.discard(pair))
        elif long:
            self.blocked.add(pair)
            lasts = self.random.choice((BOUND, 10 * RUN))
            self.world.at(lasts, lambda: self.blocked.discard(pair))
        self.world.log("world", f"no circuits {one.id}-{other.id}, {'long' if long else 'short'}")
        for me in one.mounts:
            for peer in other.mounts:
                self.loses(me, peer)
                self.dial(me, peer)
        if not long and self.random.random() < 0.4:
            self.world.at(self.random.randrange(2 * LOOK), lambda: self.stop_node(one))

    def hang(self) -> None:
        """A mount stops; its connections break when somebody waits for it."""
        members = self.members()
        if members:
            me = self.random.choice(sorted(members))
            self.world.log("world", f"{me} hangs")
            members[me].hung = True
            since = self.now
            self.stopped[me] = since, 0
            for peer in members:
                if peer != me and self.random.random() < 0.7:
                    self.loses(me, peer)
                    self.dial(me, peer)

            def end() -> None:
                mount = self.members().get(me)
                if mount is not None and mount.hung:
                    mount.hung = False
                    self.stopped[me] = since, self.now
                    if self.now - since >= HUNG_MAX:
                        self.ends(me)

            self.world.at(self.random.choice((LOOK, HUNG_MAX, 2 * LIMIT)), end)

    def pause(self) -> None:
        """The whole machine is suspended; it comes back with what it knew."""
        self.stop_node(self.random.choice(self.nodes))

    def stop_node(self, node: Node) -> None:
        if not node.up or node.paused:
            return
        node.pause()
        since, life = self.now, node.life
        self.stopped.update(dict.fromkeys(node.mounts, (since, 0)))

        def end() -> None:
            if node.life == life and node.up:
                self.stopped.update(dict.fromkeys(node.mounts, (since, self.now)))
                node.resume()

        self.world.at(self.random.randrange(2 * LIMIT), end)

    def crash(self) -> None:
        """A node loses power, or only its clusterd: its mounts end in either case."""
        node = self.random.choice(self.nodes)
        if node.up:
            node.crash()
            self.world.at(self.random.randrange(5 * SECOND), node.boot)

    # --- judgement

    def put_out(self, me: Instance, peer: Instance) -> None:
        """A judge says that one of its instances has to go, for its circuit to `peer`."""
        self.world.log("judge", f"{me} goes for {peer}")
        if (peer, me) in self.out:
            raise Violation(f"{me} and {peer} went for each other")
        self.out.append((me, peer))
        alive = peer in self.members()
        if not alive and self.now - self.died[peer] > 2 * LOOK:
            raise Violation(f"{me} goes for {peer}, which is dead")
        if alive and not (self.was_down(me, peer) and self.ran(peer) and self.ran(me)):
            raise Violation(f"{me} goes at {self.now / SECOND:.1f} s for {peer} without need")
        self.ends(me)

    def ends(self, me: Instance) -> None:
        """A mount is over; it is mounted again later, while there are faults."""
        node = self.node_of(me)
        life = node.life
        self.gone(me)

        def again() -> None:
            if node.up and node.life == life:
                node.mount()

        if self.faults:
            self.world.at(self.random.randrange(20 * SECOND), again)

    def was_down(self, me: Instance, peer: Instance) -> bool:
        """Whether their circuit was down for the limit, up to a look ago."""
        pair = frozenset((me, peer))
        since, until = self.back.get(pair, (0, 0))
        if pair in self.down_since:
            since, until = self.down_since[pair], self.now
        return until >= self.now - LOOK and until - since >= LIMIT - LIMIT // 100

    def ran(self, me: Instance) -> bool:
        """Whether a member ran in the time that counts, but for moments between two looks."""
        since, until = self.stopped.get(me, (0, self.now))
        stood = (until or self.now) - max(since, self.now - LIMIT)
        return me not in self.stopped or stood <= 3 * LOOK

    def run(self) -> None:
        """Faults, then rest. Raises Violation or LivenessFailure."""
        self.world.at(5 * SECOND, self.nemesis)
        self.world.run(RUN)
        self.faults = False
        if not self.breaks_for_long and self.out:
            raise Violation(f"no circuit was down for long, and these went: {self.out}")
        self.world.run(self.now + 3 * LIMIT)
        rest = self.now
        self.world.run(rest + BOUND)
        for pair, since in self.down_since.items():
            if self.now - max(since, rest) >= BOUND:
                one, other = sorted(pair)
                raise LivenessFailure(f"no circuit {one}-{other}, and both are members")


def run(seed: int, *, trace: bool = False) -> CircuitWorld:
    """One seed; every second one breaks circuits for good."""
    world = CircuitWorld(seed, broken=bool(seed % 2), trace=trace)
    world.run()
    return world
