"""What must hold, after every step.

- The register is linearizable: one value per version, a legal chain, no read older than what was
  finished before it began, no two successful compare-and-swaps on one version of a volume group.
- One view per epoch.
- A node that an operator put out is no member before the operator lets it in.
- No write executes under a lock grant that is older than a grant that a later holder got.
- No data is used on a server that has not installed the epoch of the user.
- No cached read shows anything but the newest value.
- An instance hears of a view before it hears a group event of that view's epoch.
- Group events are the same everywhere, and no receiver misses one between its first and last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cluster.actions import Reply
from cluster.control import GroupEvent
from cluster.core_events import StateChanged
from cluster.ids import Instance
from cluster.state import (
    ClusterState,
    StateError,
    check_transition,
    encode_state,
    member_of,
)
from tests.sim.world import Violation, World

if TYPE_CHECKING:
    from tests.sim.server_host import DataRequest


class Checker:
    """Sees everything, knows real time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.values: dict[int, bytes] = {}
        self.states: dict[int, ClusterState] = {}
        self.views: dict[int, bytes] = {}
        self.newest_done = 0
        self.floors: dict[tuple[int, int, int], int] = {}
        self.group_sequences: dict[tuple[str, int], str] = {}
        self.server_epochs: dict[int, int] = {}
        self.tokens: list[tuple[Instance, int]] = []
        self.cells: dict[int, int] = {}
        self.events: dict[str, dict[tuple[int, int], bytes]] = {}
        self.receivers: dict[tuple[str, int, int, int], list[tuple[int, int]]] = {}
        self.leaving: set[tuple[str, int, int, int]] = set()
        self.commits = 0
        self.reads = 0
        self.outcomes: dict[tuple[int, int, int], Reply] = {}
        self.shown: dict[tuple[int, int], int] = {}
        self.held: dict[int, int] = {}
        """Nodes that an operator put out, and the version that did it."""

    # --- register

    def decided(self, state: ClusterState, who: str) -> None:
        """Somebody holds this value for decided."""
        data = encode_state(state)
        known = self.values.setdefault(state.version, data)
        if known != data:
            raise Violation(f"{who}: two values of version {state.version}")
        self.states[state.version] = state
        for old, new in ((state.version - 1, state.version), (state.version, state.version + 1)):
            if old in self.states and new in self.states:
                try:
                    check_transition(self.states[old], self.states[new])
                except StateError as error:
                    raise Violation(f"{who}: illegal step to version {new}: {error}") from error
        for node, version in self.held.items():
            if state.version >= version and member_of(state.members, node) is not None:
                raise Violation(f"{who}: n{node} is a member of version {state.version}, but held")
        members = msgspec.msgpack.encode([state.members, state.tombstones])
        if self.views.setdefault(state.epoch, members) != members:
            raise Violation(f"{who}: two views of epoch {state.epoch}")

    def state_changed(self, node: int, life: int, change: StateChanged) -> None:
        self.decided(change.state, f"n{node}.{life}")
        self.shown[node, life] = int(change.view.epoch)

    def began(self, node: int, life: int, request: int) -> None:
        """A register operation starts now."""
        self.floors[node, life, request] = self.newest_done

    def outcome(self, node: int, life: int, action: Reply) -> None:
        self.outcomes[node, life, action.request] = action
        floor = self.floors.pop((node, life, action.request), None)
        if floor is None or not isinstance(action.result, ClusterState):
            return
        state = action.result
        self.decided(state, f"n{node}.{life}")
        if state.version < floor:
            raise Violation(
                f"n{node}.{life}: read version {state.version} after {floor} was finished"
            )
        self.newest_done = max(self.newest_done, state.version)

    def sequence_won(self, name: str, expected: int, who: str) -> None:
        """A compare-and-swap of a volume group succeeded."""
        other = self.group_sequences.setdefault((name, expected), who)
        if other != who:
            raise Violation(f"{who} and {other} both changed {name} from {expected}")

    # --- servers and locks

    def installed(self, server: int, epoch: int) -> None:
        """A server bars by this epoch from now on."""
        if epoch < self.server_epochs.get(server, 0):
            raise Violation(f"server {server} went back to epoch {epoch}")
        self.server_epochs[server] = epoch

    def acquired(self, instance: Instance, epoch: int) -> int:
        """A mount holds the lock now; gives its grant number."""
        self.tokens.append((instance, epoch))
        self.world.log("lock", f"grant {len(self.tokens)} to {instance} in epoch {epoch}")
        return len(self.tokens)

    def executed(self, server: int, server_epoch: int, request: DataRequest) -> None:
        """A server carries a request out."""
        if server_epoch < request.epoch:
            raise Violation(
                f"{request.instance} uses server {server} of epoch {server_epoch} in epoch "
                f"{request.epoch}"
            )
        if not request.write:
            return
        if request.token < len(self.tokens):
            holder, epoch = self.tokens[-1]
            raise Violation(
                f"write of {request.instance} under grant {request.token} executed at {server} "
                f"after grant {len(self.tokens)} of {holder} in epoch {epoch}"
            )
        self.cells[server] = request.value

    def cached_read(self, instance: Instance, server: int, value: int) -> None:
        """An application reads from a kernel cache."""
        self.reads += 1
        newest = self.cells.get(server, 0)
        if value != newest:
            raise Violation(f"{instance} reads {value} of {server} from its cache, it is {newest}")

    # --- groups

    def delivered(self, node: int, life: int, number: int, event: GroupEvent) -> None:
        group, position = event.group, (int(event.epoch), event.seq)
        if self.shown.get((node, life), 0) < event.epoch:
            raise Violation(f"n{node}.{life}.{number}: {group} {position} before its view")
        data = msgspec.msgpack.encode(event)
        if self.events.setdefault(group, {}).setdefault(position, data) != data:
            raise Violation(f"n{node}.{life}.{number}: another event {position} of {group}")
        got = self.receivers.setdefault((group, node, life, number), [])
        if got and got[-1] >= position:
            raise Violation(f"n{node}.{life}.{number}: event {position} after {got[-1]}")
        me = Instance(node, life, number)  # type: ignore[arg-type]
        if (group, node, life, number) in self.leaving and me in event.joined:
            self.leaving.discard((group, node, life, number))
            self._check_sequence((group, node, life, number), got)
            got.clear()
        if not got and (event.kind != "view" or me not in event.joined):
            raise Violation(f"{me}: its first event does not contain its entry")
        got.append(position)

    def left(self, instance: Instance, group: str) -> None:
        """An instance leaves: what it gets after a later entry is a new sequence."""
        key = (group, instance.node, instance.incarnation, instance.number)
        self.leaving.add(key)

    def finish(self) -> None:
        """At the end: nobody missed an event in between."""
        for key, got in self.receivers.items():
            self._check_sequence(key, got)

    def _check_sequence(self, key: tuple[str, int, int, int], got: list[tuple[int, int]]) -> None:
        between = [p for p in self.events[key[0]] if got[0] <= p <= got[-1]]
        if len(between) != len(got):
            missed = sorted(position for position in between if position not in got)
            raise Violation(f"n{key[1]}.{key[2]}.{key[3]} missed {missed} of {key[0]}")
