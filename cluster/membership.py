"""Who is in the cluster: what a node wishes for, when it may propose it, what it does then.

Invariants:
- a node acts on decided values only; it proposes only on the newest one that it knows, and only
  while that value admits it. A node that is not admitted waits for a member to let it in; it
  proposes its own entry only when no admitted life can be alive: each is replaced by a newer one,
  or neither this node nor any voter nor peer that it hears has heard it for T_dead, and no circuit
  leads to it;
- the death of an instance of this node is proposed at once; everything else when the wish has been
  stable for T_stable, by the lowest admitted id of the wish first, by others rank * 100 ms later;
- a wish is compared with the decided view, never with an earlier wish (a node left behind in an old
  epoch with the same members must still move on);
- a node that an operator holds out is in nobody's wish, nor in its own;
- a life that was admitted and is not any more is barred for ever; its incarnation never comes back.

Sits between the guard's `Sighting` and the `Proposer`; `core.ClusterCore` wires it.
"""

from __future__ import annotations

import msgspec

from cluster.control import Timing
from cluster.guard_events import Peer, Sighting
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.state import (
    ClusterState,
    ViewChange,
    admits,
    highest_incarnation,
    is_quorum,
    member_of,
    node_of,
)
from cluster.timing import MS, RANK_MS
from cluster.views import best_clique

NO_SIGHTING = Sighting(peers=[], voters=[], witnessed=[], stalled=[], late_ms=0)


class Wish(msgspec.Struct, frozen=True):
    """The view that this node would decide now. `dead` are instances of kept lives."""

    members: dict[NodeId, Incarnation]
    dead: list[Instance]


class Membership:
    """The judgement; it sends nothing itself."""

    def __init__(
        self, me: NodeId, incarnation: Incarnation, timing: Timing, known: ClusterState,
        start_ns: int,
    ) -> None:  # fmt: skip
        self.me = me
        self.incarnation = incarnation
        self.timing = timing
        self.state = known
        self.sighting = NO_SIGHTING
        self.was_admitted = False
        self.leaving = False
        self.local: list[InstanceNo] = [InstanceNo(0)]
        self.dead_local: dict[InstanceNo, str] = {}
        self.reported: dict[Instance, list[InstanceNo]] = {}
        self._listening_ns: int | None = None
        """Since when the guard listens; a machine under load starts it late."""
        self._wish: Wish | None = None
        self._wish_ns = start_ns
        self._missing_ns: dict[tuple[int, int], int] = {}
        self.circuits: dict[NodeId, Incarnation] | None = None
        """The lives that a circuit of the control mesh leads to; None: not told yet."""
        self._cut_ns: dict[NodeId, int] = {}

    # --- facts

    @property
    def admitted(self) -> bool:
        """Whether the decided value admits this life."""
        return admits(self.state.members, Instance(self.me, self.incarnation, InstanceNo(0)))

    @property
    def quorate(self) -> bool:
        """Whether the register can be decided, as far as the echoes of the voters tell."""
        return self.admitted and is_quorum(self.state, self.sighting.voters)

    def take_sighting(self, now_ns: int, sighting: Sighting) -> None:
        """What the guard hears."""
        self.sighting = sighting
        if self._listening_ns is None:
            self._listening_ns = now_ns

    def behind(self) -> bool:
        """Whether a peer knows a newer value."""
        return any(peer.version > self.state.version for peer in self.sighting.peers)

    def barred_numbers(self) -> list[InstanceNo]:
        """Local instances that the decided value bars; [0] for the whole life."""
        if not self.was_admitted:
            return []
        if not self.admitted:
            return [InstanceNo(0)]
        return [
            number
            for number in self.local
            if not admits(self.state.members, Instance(self.me, self.incarnation, number))
        ]

    # --- the wish

    def eligible(self, now_ns: int, peer: Peer) -> bool:
        """Whether a peer may be in the wish: its life is admitted, or configured and fresh."""
        if not peer.alive or InstanceNo(0) in peer.stalled:
            return False
        member = member_of(self.state.members, peer.node)
        if member is not None and member.incarnation == peer.incarnation:
            return not self._misses_server(now_ns, int(peer.node))
        if peer.node in self.state.held:
            return False
        fresh = peer.incarnation > highest_incarnation(self.state, peer.node)
        return fresh and node_of(self.state, peer.node) is not None

    def note_servers(self, now_ns: int, reached: list[int]) -> None:
        """Rule R9: since when each member misses a server that most members reach."""
        rows = {int(p.node): p.servers for p in self.sighting.peers if p.alive}
        rows = {n: row for n, row in rows.items() if member_of(self.state.members, n) is not None}
        rows[self.me] = reached
        missing = {
            (node, int(server.id))
            for server in self.state.servers
            if 2 * sum(1 for row in rows.values() if server.id in row) > len(rows)
            for node, row in rows.items()
            if server.id not in row
        }
        for key in list(self._missing_ns):
            if key not in missing:
                del self._missing_ns[key]
        for key in sorted(missing):
            self._missing_ns.setdefault(key, now_ns)

    def _misses_server(self, now_ns: int, node: int) -> bool:
        limit_ns = 2 * self.timing.dead_ms * MS
        return any(n == node and now_ns - at >= limit_ns for (n, _), at in self._missing_ns.items())

    def note_circuits(self, now_ns: int) -> None:
        """Rule R9: since when a peer is heard although no circuit leads to it. Without a quorum
        nobody can be put out, so no time passes."""
        down = {peer.node for peer in self.sighting.peers if peer.alive}
        if self.circuits is None or not self.quorate:
            down = set()
        else:
            down -= self.circuits.keys()
        self._cut_ns = {node: self._cut_ns.get(node, now_ns) for node in sorted(down)}

    def cut(self, now_ns: int) -> list[NodeId]:
        """The peers that this node does not reach, whatever the heartbeats say: members after
        T_dead, others at once (nobody is let in to be put out again)."""
        return [
            node
            for node, since_ns in self._cut_ns.items()
            if member_of(self.state.members, node) is None
            or now_ns - since_ns >= self.timing.dead_ms * MS
        ]

    def wish(self, now_ns: int) -> Wish:
        """The view that this node would decide now."""
        cut = self.cut(now_ns)
        peers = {
            int(p.node): p
            for p in self.sighting.peers
            if p.node not in cut and self.eligible(now_ns, p)
        }
        reach = {node: _mask(peer.reach) for node, peer in peers.items()}
        reach[self.me] = _mask([*(n for n, p in peers.items() if p.alive), self.me])
        lives = {node: int(peer.incarnation) for node, peer in peers.items()}
        lives[self.me] = self.incarnation
        present = [
            int(member.node)
            for member in self.state.members
            if lives.get(member.node) == member.incarnation
        ]
        clique = best_clique(self.me, sorted(peers), present, reach)
        members = {
            NodeId(node): peer.incarnation
            for node, peer in sorted(peers.items())
            if clique >> node & 1
        }
        if not self.leaving and self.me not in self.state.held:
            members[self.me] = self.incarnation
        members = {node: members[node] for node in sorted(members)}
        return Wish(members, self._dead_instances(members))

    def _dead_instances(self, members: dict[NodeId, Incarnation]) -> list[Instance]:
        dead = [Instance(self.me, self.incarnation, number) for number in self.dead_local]
        dead += [
            Instance(self.me, self.incarnation, number)
            for number in self.sighting.stalled
            if number and number in self.local
        ]
        for peer in self.sighting.peers:
            dead += [Instance(peer.node, peer.incarnation, n) for n in peer.stalled if n]
        dead += list(self.reported)
        return sorted(
            {
                instance
                for instance in dead
                if members.get(instance.node) == instance.incarnation
                and admits(self.state.members, instance)
            }
        )

    def refresh(self, now_ns: int) -> None:
        """Look again what we wish for; a changed wish starts its time anew."""
        wish = self.wish(now_ns)
        if wish != self._wish:
            self._wish = wish
            self._wish_ns = now_ns

    def adopt(self, now_ns: int, state: ClusterState) -> None:
        """A newer decided value."""
        if state.epoch != self.state.epoch:
            self._wish_ns = now_ns
        self.state = state
        # It may have been admitted and removed without having seen either.
        known = highest_incarnation(state, self.me) >= self.incarnation
        self.was_admitted = self.was_admitted or known
        for instance in list(self.reported):
            if not admits(state.members, instance):
                del self.reported[instance]
        for number in list(self.dead_local):
            if not admits(state.members, Instance(self.me, self.incarnation, number)):
                del self.dead_local[number]

    # --- proposing

    def proposal(self, now_ns: int) -> ViewChange | None:
        """The view change to propose now, if it is our turn."""
        if self._wish is None or (self.was_admitted and not self.admitted):
            return None
        if self.admitted and not self.quorate:
            return None
        if self.me in self.state.held:
            return None
        present = {member.node: member.incarnation for member in self.state.members}
        dead = [Instance(self.me, self.incarnation, number) for number in sorted(self.dead_local)]
        if self.admitted and self._ripe(now_ns) and self._differs():
            return self._change(self._wish.members, self._wish.dead, "expelled")
        if self.admitted and (dead or self.leaving):
            if self.leaving:
                present.pop(self.me, None)
                dead = []
            return self._change(present, dead, "left" if self.leaving else "died")
        if not self.admitted and not self.leaving and self._ripe(now_ns) and self._all_dead(now_ns):
            return self._change(self._wish.members, [], "cold start")
        return None

    def _change(
        self, members: dict[NodeId, Incarnation], dead: list[Instance], reason: str
    ) -> ViewChange:
        running: dict[NodeId, list[InstanceNo]] = {}
        for peer in self.sighting.peers:
            running[peer.node] = peer.running
        for instance, numbers in self.reported.items():
            running[instance.node] = numbers
        running[self.me] = [n for n in self.local if n not in self.dead_local]
        nodes = {instance.node for instance in dead}
        if self.me in nodes and dead:
            reasons = [self.dead_local[i.number] for i in dead if i.number in self.dead_local]
            reason = next((text for text in reasons if text), reason)
        return ViewChange(
            members=members, dead=dead,
            running={node: running[node] for node in sorted(nodes) if node in running},
            reason=reason,
        )  # fmt: skip

    def _differs(self) -> bool:
        assert self._wish is not None
        present = {member.node: member.incarnation for member in self.state.members}
        return self._wish.members != present or bool(self._wish.dead)

    def _rank(self) -> int:
        """Our place among those who may propose this wish."""
        assert self._wish is not None
        nodes = [
            node
            for node, life in self._wish.members.items()
            if not self.admitted or admits(self.state.members, Instance(node, life, InstanceNo(0)))
        ]
        return sum(1 for node in nodes if node < self.me)

    def _ripe_ns(self) -> int:
        return self._wish_ns + self.timing.stable_ms * MS + self._rank() * RANK_MS * MS

    def _ripe(self, now_ns: int) -> bool:
        return now_ns >= self._ripe_ns()

    def _all_dead(self, now_ns: int) -> bool:
        """Nobody whom the register admits can be alive (a cold start)."""
        heard = {int(peer.node): peer for peer in self.sighting.peers}
        since_ns = now_ns if self._listening_ns is None else self._listening_ns
        waited = now_ns - since_ns >= self.timing.dead_ms * MS
        for member in self.state.members:
            if member.node == self.me:
                continue
            peer = heard.get(member.node)
            if peer is not None and peer.incarnation > member.incarnation:
                continue
            if peer is not None and peer.incarnation == member.incarnation and peer.alive:
                return False
            if self.circuits is not None and self.circuits.get(member.node) == member.incarnation:
                return False  # its heartbeats are late (a starved guard), but it answers
            witnessed = (int(member.node), int(member.incarnation)) in self.sighting.witnessed
            if witnessed or not waited:
                return False
        return True

    def deadline(self) -> int | None:
        """When a proposal may become ripe."""
        if self._wish is None or (self.was_admitted and not self.admitted):
            return None
        if not self._differs():
            return None
        if not self.admitted:
            since_ns = self._wish_ns if self._listening_ns is None else self._listening_ns
            return max(self._ripe_ns(), since_ns + self.timing.dead_ms * MS)
        return self._ripe_ns()


def _mask(nodes: list[int]) -> int:
    mask = 0
    for node in nodes:
        mask |= 1 << node
    return mask
