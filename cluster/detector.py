"""clusterguard's core: heartbeats, echoes, failure detection, leases, vouching.

Every heartbeat goes to every configured node and every voter over every network; each is answered
by an echo on the same network, so a link that works one way only counts as dead on both ends. A
peer is alive while it is heard *and* hears us on some network within T_dead. Our own lateness
extends all deadlines by as much (a stalled observer accuses nobody). The guard does not judge: it
tells `Sighting` to clusterd, which decides.

As a voter's guard it vouches (`VouchBook`); for its own instances it keeps leases (`LeaseBook`).
"""

from __future__ import annotations

from cluster.actions import Action, Datagram, Notify, Tick
from cluster.control import Timing
from cluster.guard_events import (
    ClusterdDied,
    Facts,
    Heard,
    LeaseEnd,
    LocalPurged,
    Peer,
    Progress,
    Sighting,
    Vouch,
)
from cluster.ids import SERVER_ID_MIN, Incarnation, InstanceNo, NodeId, VoterId
from cluster.lease import LeaseBook, VouchBook
from cluster.links import PeerRecord
from cluster.messages import Beat, Echo, Heartbeat
from cluster.timing import MS, stall_ns

GuardEvent = Tick | Facts | Vouch | Heard | Progress | LocalPurged | ClusterdDied

PURGED_MAX = 64
INSTANCES_MAX = 96


class GuardCore:
    """Actions: `Datagram`; `Notify` of LeaseEnd, Sighting, Vouched. Built once per life of the
    guard; `start_ns` is now. Sends nothing before the first `Facts`, vouches for nobody before the
    first `Vouch`."""

    def __init__(
        self, me: NodeId, incarnation: Incarnation, timing: Timing, start_ns: int,
        networks: int = 2,
    ) -> None:  # fmt: skip
        self.me = me
        self.incarnation = incarnation
        self.timing = timing
        self.networks = networks
        self._facts: Facts | None = None
        self._vouches = VouchBook(timing, start_ns)
        self._leases = LeaseBook(timing)
        self._peers: dict[int, PeerRecord] = {}
        self._voters_ns: dict[int, int] = {}
        self._witness_ns: dict[tuple[int, int], int] = {}
        self._sent_ns: dict[int, int] = {}
        self._sequence = 0
        self._ages_ms: dict[int, int] = {}
        self._purged: list[InstanceNo] = []
        self._clusterd_dead = False
        self._next_ns = start_ns
        self._late_ms = 0
        self._sighting: Sighting | None = None
        self._seen_ns = start_ns

    # --- the core

    def step(self, now_ns: int, event: GuardEvent) -> list[Action]:
        """One event."""
        match event:
            case Heard():
                return self._heard(now_ns, event)
            case Facts():
                self._facts = event
                numbers = event.instances
                self._leases.configure(event.config_epoch, event.electorates, numbers)
                self._drop_unknown(event)
                return self._lease_actions()
            case Vouch():
                return [Notify(self._vouches.vouch(now_ns, event))]
            case Progress(ages_ms):
                self._ages_ms = {int(number): age for number, age in ages_ms}
                return []
            case LocalPurged(numbers):
                fresh = [number for number in numbers if number not in self._purged]
                self._purged = [*self._purged, *fresh][-PURGED_MAX:]
                return self._beat(now_ns)
            case ClusterdDied():
                self._clusterd_dead = True
                return self._beat(now_ns)
            case _:
                return self._tick(now_ns)

    def deadline(self) -> int | None:
        """The next heartbeat, or the moment a peer falls silent."""
        times = [peer.expires_ns(self.timing) for peer in self._peers.values()]
        pending = [time for time in times if time is not None and time > self._seen_ns]
        return min([self._next_ns, *pending])

    def check(self) -> None:
        """Assert the invariants."""
        assert len(self._sent_ns) <= self._sent_max
        assert self.me not in self._peers

    def lease_end_ns(self, number: int) -> int:
        """End of the lease of a local instance."""
        return self._leases.end_ns(number)

    @property
    def _sent_max(self) -> int:
        return 4 * self.timing.dead_ms // self.timing.heartbeat_ms + 16

    def _drop_unknown(self, facts: Facts) -> None:
        for node in list(self._peers):
            if node not in facts.nodes:
                del self._peers[node]

    # --- sending

    def _tick(self, now_ns: int) -> list[Action]:
        if now_ns < self._next_ns:
            return self._sight(now_ns)
        period_ns = self.timing.heartbeat_ms * MS
        late_ns = now_ns - self._next_ns
        self._late_ms = 0
        if late_ns > period_ns // 2 and self._facts is not None and self._sequence:
            self._late_ms = late_ns // MS
            for peer in self._peers.values():
                peer.extend(late_ns)
        self._next_ns = now_ns + period_ns
        return [*self._beat(now_ns), *self._sight(now_ns)]

    def _beat(self, now_ns: int) -> list[Action]:
        facts = self._facts
        if facts is None:
            return []
        self._sequence += 1
        self._sent_ns[self._sequence] = now_ns
        while len(self._sent_ns) > self._sent_max:
            del self._sent_ns[min(self._sent_ns)]
        heartbeat = self._heartbeat(now_ns, facts)
        voters = sorted({int(voter) for voters in facts.electorates for voter in voters})
        if self.me in voters and not self._clusterd_dead:
            vouched = self._vouches.echo(now_ns, heartbeat)
            self._leases.echoed(self.me, heartbeat.config_epoch, now_ns, vouched)
            self._voters_ns[self.me] = now_ns
        servers = [voter for voter in voters if voter >= SERVER_ID_MIN]
        targets = [int(node) for node in facts.nodes if node != self.me] + servers
        actions: list[Action] = [
            Datagram(target, network, heartbeat)
            for target in targets
            for network in range(self.networks)
        ]
        return [*actions, *self._lease_actions()]

    def _heartbeat(self, now_ns: int, facts: Facts) -> Heartbeat:
        beats = [
            Beat(number, self._ages_ms.get(number, 0)) for number in facts.instances[:INSTANCES_MAX]
        ]
        reach = 1 << self.me
        for node, peer in self._peers.items():
            if peer.is_alive(now_ns, self.timing) and node not in facts.cut:
                reach |= 1 << node
        servers = 0
        for server in facts.reached_servers:
            servers |= 1 << (server - SERVER_ID_MIN)
        return Heartbeat(
            node=self.me, incarnation=self.incarnation, sequence=self._sequence,
            epoch=facts.epoch, version=facts.version, config_epoch=facts.config_epoch,
            instances=[] if self._clusterd_dead else beats, purged=self._purged, reach=reach,
            servers=servers, late_ms=self._late_ms, clusterd_dead=self._clusterd_dead,
        )  # fmt: skip

    # --- hearing

    def _heard(self, now_ns: int, event: Heard) -> list[Action]:
        message = event.message
        if isinstance(message, Heartbeat) and message.node == event.source != self.me:
            return self._heard_heartbeat(now_ns, event.network, message)
        if isinstance(message, Echo) and message.sender == event.source:
            return self._heard_echo(now_ns, event.network, message, event.incarnation)
        return []

    def _heard_heartbeat(self, now_ns: int, network: int, heartbeat: Heartbeat) -> list[Action]:
        if self._facts is None or heartbeat.node not in self._facts.nodes:
            return []
        peer = self._peers.get(heartbeat.node)
        if peer is None or heartbeat.incarnation > peer.incarnation:
            peer = PeerRecord(heartbeat.incarnation, self.networks)
            self._peers[heartbeat.node] = peer
        if heartbeat.incarnation < peer.incarnation:
            return []
        news = _is_news(peer, heartbeat)
        peer.heard(now_ns, network, heartbeat)
        voter = any(VoterId(self.me) in voters for voters in self._facts.electorates)
        vouched = self._vouches.echo(now_ns, heartbeat) if not self._clusterd_dead else []
        hears = [
            (node, record.incarnation)
            for node, record in sorted(self._peers.items())
            if record.is_heard(now_ns, self.timing) and not record.announced_dead
        ]
        echo = Echo(
            sender=self.me, sequence=heartbeat.sequence, incarnation=heartbeat.incarnation,
            config_epoch=heartbeat.config_epoch, voter=voter, vouched=vouched, hears=hears,
        )  # fmt: skip
        sight = self._sight(now_ns) if news else []
        return [Datagram(heartbeat.node, network, echo), *sight]

    def _heard_echo(
        self, now_ns: int, network: int, echo: Echo, sender_life: Incarnation
    ) -> list[Action]:
        sent_ns = self._sent_ns.get(echo.sequence)
        if echo.incarnation != self.incarnation or sent_ns is None or self._facts is None:
            return []
        peer = self._peers.get(echo.sender)
        news = False
        if peer is not None and peer.incarnation == sender_life:
            news = not peer.is_alive(now_ns, self.timing)
            peer.echoed(network, sent_ns)
        for node, life in echo.hears:
            self._witness_ns[node, life] = max(self._witness_ns.get((node, life), 0), now_ns)
        if any(echo.sender in voters for voters in self._facts.electorates):
            news = news or echo.sender not in self._voters_ns
            self._voters_ns[echo.sender] = max(self._voters_ns.get(echo.sender, 0), sent_ns)
            self._leases.echoed(echo.sender, echo.config_epoch, sent_ns, echo.vouched)
        return [*self._lease_actions(), *(self._sight(now_ns) if news else [])]

    def _lease_actions(self) -> list[Action]:
        if self._clusterd_dead:
            return []
        return [Notify(LeaseEnd(number, end_ns)) for number, end_ns in self._leases.renewed()]

    # --- what clusterd is told

    def _sight(self, now_ns: int) -> list[Action]:
        if self._facts is None:
            return []
        self._seen_ns = now_ns
        dead_ns = self.timing.dead_ms * MS
        for key, seen_ns in list(self._witness_ns.items()):
            if now_ns - seen_ns >= dead_ns:
                del self._witness_ns[key]
        limit_ms = stall_ns(self.timing) // MS
        sighting = Sighting(
            peers=[self._peer(now_ns, node) for node in sorted(self._peers)],
            voters=sorted(
                voter for voter, at in self._voters_ns.items() if now_ns - at < dead_ns
            ),
            witnessed=sorted(self._witness_ns),
            stalled=[
                InstanceNo(number)
                for number, age in sorted(self._ages_ms.items())
                if age > limit_ms and number in self._facts.instances
            ],
            late_ms=self._late_ms,
        )  # fmt: skip
        if sighting == self._sighting:
            return []
        self._sighting = sighting
        return [Notify(sighting)]

    def _peer(self, now_ns: int, node: int) -> Peer:
        record = self._peers[node]
        for link in record.links:
            link.update(now_ns, self.timing.link_down_ms * MS)
        heartbeat = record.newest
        assert heartbeat is not None
        limit_ms = stall_ns(self.timing) // MS
        return Peer(
            node=NodeId(node), incarnation=Incarnation(record.incarnation),
            alive=record.is_alive(now_ns, self.timing), epoch=heartbeat.epoch,
            version=heartbeat.version, config_epoch=heartbeat.config_epoch,
            reach=[bit for bit in range(65) if heartbeat.reach >> bit & 1],
            servers=[SERVER_ID_MIN + bit for bit in range(64) if heartbeat.servers >> bit & 1],
            running=[beat.number for beat in heartbeat.instances],
            stalled=[b.number for b in heartbeat.instances if b.stamp_age_ms > limit_ms],
            purged=heartbeat.purged, links=[link.up for link in record.links],
        )  # fmt: skip


def _is_news(peer: PeerRecord, heartbeat: Heartbeat) -> bool:
    """Whether clusterd should hear of this heartbeat before the next tick."""
    old = peer.newest
    return old is None or (heartbeat.sequence > old.sequence and (
        (old.epoch, old.version, old.reach, old.servers, old.purged, old.clusterd_dead)
        != (
            heartbeat.epoch, heartbeat.version, heartbeat.reach, heartbeat.servers,
            heartbeat.purged, heartbeat.clusterd_dead,
        )
    ))  # fmt: skip
