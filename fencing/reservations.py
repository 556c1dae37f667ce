"""SCSI-3 persistent reservations of one export, as a pure machine over values.

The nexus is an `Instance` (a process of one life of a node), never a socket: registrations outlive
connections. Who may read and write under which type stands in a table, `ACCESS`.

| rule | clause of SPC-4 (revision 17) |
|---|---|
| registering, key 0, REGISTER AND IGNORE EXISTING KEY | 5.7.7 |
| REGISTER AND MOVE | 5.7.8 |
| reserving, who holds | 5.7.9, 5.7.10 |
| releasing; unregistering, also of the holder | 5.7.11.2, 5.7.11.3 |
| PREEMPT: of a reservation; of registrations only | 5.7.11.4.3, 5.7.11.4.4 |
| PREEMPT AND ABORT | 5.7.11.5 |
| CLEAR | 5.7.11.6 |
| kept through a loss of power (APTPL) | 5.7.5 |
| who may do what under which type | 5.7.1 |
| unit attentions: 2A/03 after CLEAR; 2A/04 when a reservation of registrants ends or its type changes; 2A/05 for preempted registrations | 5.7.11.6; 5.7.11.2, 5.7.11.3, 5.7.11.4.3; 5.7.11.4 |
| the generation | 6.13.2 |
| READ KEYS, READ RESERVATION, REPORT CAPABILITIES, READ FULL STATUS | 6.13.2 to 6.13.5 |

The generation counts successful REGISTER, REGISTER AND IGNORE EXISTING KEY, REGISTER AND MOVE,
CLEAR and both PREEMPTs, wraps at 32 bits and is not kept over a restart; RESERVE and RELEASE do not
count. Everything else is kept when the last successful registration asked for it (`aptpl`). SPC
lets a preempted nexus register again; what stops a dead instance for ever are the bars
(`admission`).
"""  # noqa: E501

from __future__ import annotations

import enum

import msgspec

from cluster.ids import Instance

GENERATION_MODULUS = 1 << 32
REGISTRATIONS_MAX = 4096


class ReservationType(enum.IntEnum):
    """SPC codes."""

    NONE = 0
    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6
    WRITE_EXCLUSIVE_ALL_REGISTRANTS = 7
    EXCLUSIVE_ACCESS_ALL_REGISTRANTS = 8


class ServiceAction(enum.IntEnum):
    """PERSISTENT RESERVE OUT service actions, SPC codes."""

    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_AND_ABORT = 5
    REGISTER_AND_IGNORE = 6
    REGISTER_AND_MOVE = 7


class Status(enum.IntEnum):
    """SCSI status codes."""

    GOOD = 0
    CHECK_CONDITION = 2
    RESERVATION_CONFLICT = 0x18


READ = 1
WRITE = 2

# type -> (holder, registered, not registered); bits READ and WRITE
ACCESS: dict[ReservationType, tuple[int, int, int]] = {
    ReservationType.NONE: (READ | WRITE, READ | WRITE, READ | WRITE),
    ReservationType.WRITE_EXCLUSIVE: (READ | WRITE, READ, READ),
    ReservationType.EXCLUSIVE_ACCESS: (READ | WRITE, 0, 0),
    ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY: (READ | WRITE, READ | WRITE, READ),
    ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY: (READ | WRITE, READ | WRITE, 0),
    ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS: (READ | WRITE, READ | WRITE, READ),
    ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS: (READ | WRITE, READ | WRITE, 0),
}
ALL_REGISTRANTS = frozenset(
    {
        ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS,
        ReservationType.EXCLUSIVE_ACCESS_ALL_REGISTRANTS,
    }
)
# Types whose end is told to the other registrants (unit attention 2A/04).
TELLS_RELEASE = ALL_REGISTRANTS | {
    ReservationType.WRITE_EXCLUSIVE_REGISTRANTS_ONLY,
    ReservationType.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY,
}
TYPE_MASK = 0xEA01
"""REPORT CAPABILITIES, bytes 4 and 5: all six types."""

INVALID_FIELD_IN_CDB = 0x2400
INVALID_FIELD_IN_LIST = 0x2600
INVALID_RELEASE = 0x2604
INSUFFICIENT_RESOURCES = 0x5504
RESERVATIONS_PREEMPTED = 0x2A03
RESERVATIONS_RELEASED = 0x2A04
REGISTRATIONS_PREEMPTED = 0x2A05


class Request(msgspec.Struct, frozen=True):
    """One PERSISTENT RESERVE OUT. `key` is the reservation key, `service_key` the service action
    reservation key of SPC; `target` and `unregister` belong to REGISTER AND MOVE."""

    nexus: Instance
    action: int
    key: int = 0
    service_key: int = 0
    type: int = 0
    scope: int = 0
    aptpl: bool = False
    target: Instance | None = None
    unregister: bool = False


class Attention(msgspec.Struct, frozen=True, array_like=True):
    """A unit attention for a nexus; `code` is ASC << 8 | ASCQ."""

    nexus: Instance
    code: int


class Outcome(msgspec.Struct, frozen=True):
    """What a PERSISTENT RESERVE OUT did. `removed` lost their registration; `drain` says that the
    requests of `removed` must have left the server before the status is given."""

    status: Status
    sense: int = 0
    changed: bool = False
    attentions: tuple[Attention, ...] = ()
    removed: tuple[Instance, ...] = ()
    drain: bool = False


class Registration(msgspec.Struct, frozen=True, array_like=True):
    nexus: Instance
    key: int


class Capabilities(msgspec.Struct, frozen=True):
    """REPORT CAPABILITIES. Not capable of: SPC-2 reservations beside these (CRH), registering for
    other ports (SIP_C, ATP_C: a nexus is the same over all paths anyway)."""

    persists_capable: bool
    persists_active: bool
    type_mask: int


class FullStatus(msgspec.Struct, frozen=True, array_like=True):
    """READ FULL STATUS of one registration; `type` 0: it holds nothing."""

    nexus: Instance
    key: int
    holder: bool
    type: int


class ReservationState(msgspec.Struct, frozen=True):
    """What is stored of one export."""

    registrations: list[Registration] = []
    holder: Instance | None = None
    type: int = 0


CONFLICT = Outcome(Status.RESERVATION_CONFLICT)


def check_condition(code: int) -> Outcome:
    return Outcome(Status.CHECK_CONDITION, sense=code)


class Reservations:
    """The reservation table of one export; `execute` changes it, `copy` gives one to try on."""

    def __init__(self, state: ReservationState | None = None) -> None:
        state = state or ReservationState()
        self.keys: dict[Instance, int] = {r.nexus: r.key for r in state.registrations}
        self.holder = state.holder
        self.type = ReservationType(state.type)
        self.generation = 0
        self.aptpl = state != ReservationState()  # only with it anything was stored

    def copy(self) -> Reservations:
        twin = Reservations(self.state())
        twin.generation = self.generation
        twin.aptpl = self.aptpl
        return twin

    def state(self) -> ReservationState:
        """Everything that may outlive a restart."""
        registrations = [Registration(n, k) for n, k in sorted(self.keys.items())]
        return ReservationState(registrations, self.holder, int(self.type))

    def stored_state(self) -> ReservationState:
        """What does outlive a restart: nothing without APTPL."""
        return self.state() if self.aptpl else ReservationState()

    def access(self, nexus: Instance | None) -> int:
        """READ and WRITE bits of a nexus (None: anonymous, never registered)."""
        holder, registered, other = ACCESS[self.type]
        if nexus is None or nexus not in self.keys:
            return other
        return holder if self.is_holder(nexus) else registered

    def is_holder(self, nexus: Instance) -> bool:
        if self.type in ALL_REGISTRANTS:
            return nexus in self.keys
        return self.type is not ReservationType.NONE and nexus == self.holder

    def read_keys(self) -> tuple[int, list[int]]:
        """PERSISTENT RESERVE IN, READ KEYS: generation and keys, one per registration."""
        return self.generation, [key for _, key in sorted(self.keys.items())]

    def read_reservation(self) -> tuple[int, int, ReservationType] | None:
        """READ RESERVATION: generation, key of the holder (0 if all registrants hold), type."""
        if self.type is ReservationType.NONE:
            return None
        key = 0 if self.type in ALL_REGISTRANTS or self.holder is None else self.keys[self.holder]
        return self.generation, key, self.type

    def report_capabilities(self) -> Capabilities:
        """REPORT CAPABILITIES."""
        return Capabilities(True, self.aptpl, TYPE_MASK)

    def read_full_status(self) -> tuple[int, list[FullStatus]]:
        """READ FULL STATUS: generation, and every registration."""
        return self.generation, [
            FullStatus(n, key, self.is_holder(n), int(self.type) if self.is_holder(n) else 0)
            for n, key in sorted(self.keys.items())
        ]

    def execute(self, request: Request) -> Outcome:
        """Do one PERSISTENT RESERVE OUT. The table is changed only when the status is GOOD."""
        try:
            action = ServiceAction(request.action)
        except ValueError:
            return check_condition(INVALID_FIELD_IN_CDB)
        match action:
            case ServiceAction.REGISTER | ServiceAction.REGISTER_AND_IGNORE:
                return self._register(request, action is ServiceAction.REGISTER_AND_IGNORE)
        if self.keys.get(request.nexus) != request.key:
            return CONFLICT
        match action:
            case ServiceAction.RESERVE:
                return self._reserve(request)
            case ServiceAction.RELEASE:
                return self._release(request)
            case ServiceAction.CLEAR:
                return self._clear(request)
            case ServiceAction.REGISTER_AND_MOVE:
                return self._move(request)
            case _:
                return self._preempt(request, action is ServiceAction.PREEMPT_AND_ABORT)

    def drop(self, gone: set[Instance]) -> list[Attention]:
        """Take the registrations of barred instances away, as PREEMPT would; a reservation that
        every registrant holds stays, so that the export never opens to strangers."""
        before = dict(self.keys)
        for nexus in gone:
            self.keys.pop(nexus, None)
        if self.holder in gone and self.type not in ALL_REGISTRANTS:
            ended = self.type
            self._end_reservation()
            if ended in TELLS_RELEASE:
                return [Attention(n, RESERVATIONS_RELEASED) for n in sorted(self.keys)]
        if len(before) != len(self.keys):
            self.holder = None if self.type in ALL_REGISTRANTS else self.holder
        return []

    def hold_for_all(self, nexus: Instance, key: int) -> bool:
        """What the cluster does at LOGIN: register the nexus, and hold the export for all
        registrants if nothing holds it. True if the table changed."""
        changed = self.keys.get(nexus) != key
        if changed:
            if len(self.keys) >= REGISTRATIONS_MAX:
                return False
            self.keys[nexus] = key
            self._count()
        if self.type is ReservationType.NONE:
            self.type = ReservationType.WRITE_EXCLUSIVE_ALL_REGISTRANTS
            changed = True
        self.aptpl = True
        return changed

    def check(self) -> None:
        assert 0 not in self.keys.values()
        if self.type is ReservationType.NONE or self.type in ALL_REGISTRANTS:
            assert self.holder is None
        else:
            assert self.holder in self.keys

    def _count(self) -> None:
        self.generation = (self.generation + 1) % GENERATION_MODULUS

    def _end_reservation(self) -> None:
        self.holder = None
        self.type = ReservationType.NONE

    def _begin_reservation(self, nexus: Instance, kind: ReservationType) -> None:
        self.type = kind
        self.holder = None if kind in ALL_REGISTRANTS else nexus

    def _others(self, nexus: Instance, code: int) -> tuple[Attention, ...]:
        return tuple(Attention(n, code) for n in sorted(self.keys) if n != nexus)

    def _register(self, request: Request, ignore: bool) -> Outcome:
        nexus = request.nexus
        known = self.keys.get(nexus)
        if not ignore and request.key != (known or 0):
            return CONFLICT
        if known is None:
            if request.service_key == 0:
                return Outcome(Status.GOOD)
            if len(self.keys) >= REGISTRATIONS_MAX:
                return check_condition(INSUFFICIENT_RESOURCES)
        attentions: tuple[Attention, ...] = ()
        removed: tuple[Instance, ...] = ()
        if request.service_key:
            self.keys[nexus] = request.service_key
        else:
            attentions = self._unregister(nexus)
            removed = (nexus,)
        self.aptpl = request.aptpl
        self._count()
        return Outcome(Status.GOOD, changed=True, attentions=attentions, removed=removed)

    def _move(self, request: Request) -> Outcome:
        """The reservation goes to another nexus, with its type; that is registered by it."""
        target = request.target
        if self.type in ALL_REGISTRANTS or not self.is_holder(request.nexus):
            return CONFLICT
        if not request.service_key or target is None or target == request.nexus:
            return check_condition(INVALID_FIELD_IN_LIST)
        if target not in self.keys and len(self.keys) >= REGISTRATIONS_MAX:
            return check_condition(INSUFFICIENT_RESOURCES)
        self.keys[target] = request.service_key
        self.holder = target
        removed: tuple[Instance, ...] = ()
        if request.unregister:
            del self.keys[request.nexus]
            removed = (request.nexus,)
        self.aptpl = request.aptpl
        self._count()
        return Outcome(Status.GOOD, changed=True, removed=removed)

    def _unregister(self, nexus: Instance) -> tuple[Attention, ...]:
        held = self.is_holder(nexus)
        del self.keys[nexus]
        if not held or (self.type in ALL_REGISTRANTS and self.keys):
            return ()
        kind = self.type
        self._end_reservation()
        return self._others(nexus, RESERVATIONS_RELEASED) if kind in TELLS_RELEASE else ()

    def _reserve(self, request: Request) -> Outcome:
        kind = self._wanted_type(request)
        if kind is None:
            return check_condition(INVALID_FIELD_IN_CDB)
        if self.type is ReservationType.NONE:
            self._begin_reservation(request.nexus, kind)
            return Outcome(Status.GOOD, changed=True)
        same = self.is_holder(request.nexus) and self.type is kind
        return Outcome(Status.GOOD) if same else CONFLICT

    def _release(self, request: Request) -> Outcome:
        if self.type is ReservationType.NONE or not self.is_holder(request.nexus):
            return Outcome(Status.GOOD)
        if request.type != self.type or request.scope != 0:
            return check_condition(INVALID_RELEASE)
        kind = self.type
        self._end_reservation()
        tell = kind in TELLS_RELEASE
        attentions = self._others(request.nexus, RESERVATIONS_RELEASED) if tell else ()
        return Outcome(Status.GOOD, changed=True, attentions=attentions)

    def _clear(self, request: Request) -> Outcome:
        attentions = self._others(request.nexus, RESERVATIONS_PREEMPTED)
        removed = tuple(sorted(self.keys))
        self.keys.clear()
        self._end_reservation()
        self._count()
        return Outcome(Status.GOOD, changed=True, attentions=attentions, removed=removed)

    def _wanted_type(self, request: Request) -> ReservationType | None:
        if request.scope != 0 or request.type not in ACCESS or not request.type:
            return None
        return ReservationType(request.type)

    def _preempt(self, request: Request, abort: bool) -> Outcome:
        nexus, victim_key = request.nexus, request.service_key
        all_hold = self.type in ALL_REGISTRANTS
        if victim_key == 0 and not all_hold:
            return check_condition(INVALID_FIELD_IN_LIST)
        everyone = victim_key == 0
        if everyone:
            victims = {n for n in self.keys if n != nexus}
        else:
            victims = {n for n, key in self.keys.items() if key == victim_key}
            if not victims:
                return CONFLICT
        # With all registrants holding, a key of some of them removes just those.
        takes = everyone or (
            not all_hold and self.holder is not None and self.keys[self.holder] == victim_key
        )
        attentions: list[Attention] = []
        if takes:
            kind = self._wanted_type(request)
            if kind is None:
                return check_condition(INVALID_FIELD_IN_CDB)
            before = self.type
            victims.discard(nexus)
        removed = tuple(sorted(victims))
        for victim in removed:
            del self.keys[victim]
        if takes:
            assert kind is not None
            self._begin_reservation(nexus, kind)
            if kind is not before:
                attentions += self._others(nexus, RESERVATIONS_RELEASED)
        elif all_hold and not self.keys:
            self._end_reservation()
        attentions += [Attention(n, REGISTRATIONS_PREEMPTED) for n in removed if n != nexus]
        self._count()
        return Outcome(
            Status.GOOD, changed=True, attentions=tuple(attentions), removed=removed, drain=abort
        )
