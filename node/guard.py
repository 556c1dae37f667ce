"""The guard's decisions about mounts: lapse, purge, abort, death (rules G2-G4). Pure.

A mount is in one of these states:

| state | meaning | leaves it by |
|---|---|---|
| OPEN | lease in force, gate open | lease end -> DRAINING |
| DRAINING | word LAPSED, replies in flight are counted out | zero in flight -> SWEEPING |
| SWEEPING | the kernel drops all pages and attributes | done -> CLEAN |
| CLEAN | word CLOSED, the kernel caches nothing | lease renewed -> OPEN |
| ABORTING | word BARRED, connection aborted, last sweep runs | done -> PURGED, or forgotten |
| PURGED | dead, reported | detached |

A mount that says good-bye is aborted and swept as well: after a lazy unmount, or an abort from
outside, processes that still have files open could read its pages for ever.

A lapsed mount that is not CLEAN within its budget is aborted. A lease that is renewed before the
lapse was even noticed needs no purge: voters vouch only for who was never barred, so no lock was
lost. A renewed lease opens the gate only after a running sweep has ended. BARRED is final.
The word tells clusterd whether a purge is due (LAPSED) or done (CLOSED), should the guard stop.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from cluster.control import Timing
from cluster.ids import InstanceNo

MOUNTS_MAX = 1024
MS = 1_000_000
DRAIN_POLL_NS = 2 * MS
ABORT_PERCENT = 60
WORD_CLOSED = 0
WORD_OPEN = 1
WORD_LAPSED = 2
WORD_BARRED = 3


class State(enum.Enum):
    """See the module."""

    OPEN = "open"
    DRAINING = "draining"
    SWEEPING = "sweeping"
    CLEAN = "clean"
    ABORTING = "aborting"
    PURGED = "purged"


# --- in


class Attached(msgspec.Struct, frozen=True):
    """A mount has handed over its descriptors. Its gate is closed until its lease arrives."""

    number: InstanceNo


class LeaseMoved(msgspec.Struct, frozen=True):
    """The lease core says that the lease lasts until `end_ns`."""

    number: InstanceNo
    end_ns: int


class Swept(msgspec.Struct, frozen=True):
    """A sweep has ended; `gone`: the connection does not exist any more."""

    number: InstanceNo
    gone: bool


class Bar(msgspec.Struct, frozen=True):
    """Dead or barred for ever: abort, sweep, report."""

    number: InstanceNo
    reason: str


class Left(msgspec.Struct, frozen=True):
    """The mount says that it has unmounted: abort, sweep, forget."""

    number: InstanceNo


class Detached(msgspec.Struct, frozen=True):
    """clusterd knows it no more: forget it."""

    number: InstanceNo


class Tick(msgspec.Struct, frozen=True):
    """Time has passed; `in_flight` as read from the gates of the mounts that are DRAINING."""

    in_flight: Mapping[InstanceNo, int]


GuardEvent = Attached | LeaseMoved | Swept | Bar | Left | Detached | Tick


# --- out


class StoreLease(msgspec.Struct, frozen=True):
    """Write the lease end to the page."""

    number: InstanceNo
    end_ns: int


class StoreWord(msgspec.Struct, frozen=True):
    """Write the access word."""

    number: InstanceNo
    word: int


class Sweep(msgspec.Struct, frozen=True):
    """Invalidate all inodes in threads; answer with `Swept`."""

    number: InstanceNo


class Abort(msgspec.Struct, frozen=True):
    """Abort the FUSE connection, now. Without a reason nobody needs to hear of it."""

    number: InstanceNo
    reason: str


class Lapsed(msgspec.Struct, frozen=True):
    """For the event log."""

    number: InstanceNo


class Renewed(msgspec.Struct, frozen=True):
    """For the event log."""

    number: InstanceNo


class Purged(msgspec.Struct, frozen=True):
    """The mount is aborted and the kernel caches nothing of it any more. `reason` is why."""

    number: InstanceNo
    reason: str


class Forget(msgspec.Struct, frozen=True):
    """Close the descriptors."""

    number: InstanceNo


GuardAction = StoreLease | StoreWord | Sweep | Abort | Lapsed | Renewed | Purged | Forget


@dataclass(slots=True)
class _Mount:
    state: State = State.CLEAN
    lease_end_ns: int = 0
    lapsed_at_ns: int = 0
    sweeping: bool = False
    sweep_after_abort: bool = False
    leaving: bool = False
    reason: str = ""


class MountGuard:
    """All mounts of a node."""

    def __init__(self, timing: Timing) -> None:
        self._abort_ns = timing.purge_ms * MS * ABORT_PERCENT // 100
        self._leases: dict[InstanceNo, int] = {}
        self._barred: set[InstanceNo] = set()
        self.mounts: dict[InstanceNo, _Mount] = {}

    def step(self, now_ns: int, event: GuardEvent) -> list[GuardAction]:
        """The only way in."""
        match event:
            case Attached(number):
                assert len(self.mounts) < MOUNTS_MAX
                assert number not in self._barred
                self.mounts[number] = _Mount()
                return self._lease(now_ns, number, self._leases.get(number, 0))
            case LeaseMoved(number, end_ns):
                self._leases[number] = end_ns
                return self._lease(now_ns, number, end_ns)
            case Swept(number, gone):
                return self._swept(now_ns, number, gone)
            case Bar(number, reason):
                self._barred.add(number)
                return self._bar(number, reason)
            case Left(number):
                return self._left(number)
            case Detached(number):
                self._leases.pop(number, None)
                found = self.mounts.get(number)
                if found is None or found.leaving:
                    return []
                del self.mounts[number]
                return [Forget(number)]
            case Tick(in_flight):
                actions: list[GuardAction] = []
                for number in list(self.mounts):
                    actions += self._tick(now_ns, number, in_flight.get(number, 0))
                return actions

    def _lease(self, now_ns: int, number: InstanceNo, end_ns: int) -> list[GuardAction]:
        mount = self.mounts.get(number)
        if mount is None or mount.state in (State.ABORTING, State.PURGED):
            return []
        mount.lease_end_ns = end_ns
        actions: list[GuardAction] = [StoreLease(number, end_ns)]
        return actions + self._open(now_ns, number, mount)

    def _open(self, now_ns: int, number: InstanceNo, mount: _Mount) -> list[GuardAction]:
        if mount.state is not State.CLEAN or now_ns >= mount.lease_end_ns:
            return []
        mount.state = State.OPEN
        return [StoreWord(number, WORD_OPEN), Renewed(number)]

    def _tick(self, now_ns: int, number: InstanceNo, in_flight: int) -> list[GuardAction]:
        mount = self.mounts[number]
        actions: list[GuardAction] = []
        if mount.state is State.OPEN and now_ns >= mount.lease_end_ns:
            mount.state = State.DRAINING
            mount.lapsed_at_ns = now_ns
            # The gate says for certain who is inside only after the word is stored: next tick.
            return [StoreWord(number, WORD_LAPSED), Lapsed(number)]
        if mount.state is State.DRAINING and in_flight == 0:
            mount.state = State.SWEEPING
            mount.sweeping = True
            actions.append(Sweep(number))
        late = now_ns >= mount.lapsed_at_ns + self._abort_ns
        if mount.state in (State.DRAINING, State.SWEEPING) and late:
            actions += self._bar(number, "the purge after a lapsed lease took too long")
        return actions

    def _swept(self, now_ns: int, number: InstanceNo, gone: bool) -> list[GuardAction]:
        mount = self.mounts.get(number)
        if mount is None:
            return []
        mount.sweeping = False
        if mount.state is State.ABORTING:
            if mount.sweep_after_abort:
                return self._purged(number, mount)
            # This sweep began before the abort; what it passed may have come back: once more.
            mount.sweep_after_abort = True
            mount.sweeping = True
            return [Sweep(number)]
        assert mount.state is State.SWEEPING
        if gone:
            return self._bar(number, "the kernel refuses to drop its caches")
        mount.state = State.CLEAN
        return self._open(now_ns, number, mount) or [StoreWord(number, WORD_CLOSED)]

    def _bar(self, number: InstanceNo, reason: str) -> list[GuardAction]:
        mount = self.mounts.get(number)
        if mount is None:
            return [Purged(number, reason)]
        mount.leaving = False
        mount.reason = mount.reason or reason
        return self._abort(number, mount)

    def _left(self, number: InstanceNo) -> list[GuardAction]:
        mount = self.mounts.get(number)
        if mount is None or mount.state in (State.ABORTING, State.PURGED):
            return []
        mount.leaving = True
        return self._abort(number, mount)

    def _purged(self, number: InstanceNo, mount: _Mount) -> list[GuardAction]:
        """The sweep after the abort has ended."""
        if mount.leaving:
            del self.mounts[number]
            return [Forget(number)]
        mount.state = State.PURGED
        return [Purged(number, mount.reason)]

    def _abort(self, number: InstanceNo, mount: _Mount) -> list[GuardAction]:
        if mount.state in (State.ABORTING, State.PURGED):
            return []
        mount.state = State.ABORTING
        actions: list[GuardAction] = [StoreWord(number, WORD_BARRED), Abort(number, mount.reason)]
        if not mount.sweeping:
            mount.sweep_after_abort = True
            mount.sweeping = True
            actions.append(Sweep(number))
        return actions

    def is_barred(self, number: InstanceNo) -> bool:
        """Whether this instance is over: it was or will be reported as purged."""
        return number in self._barred

    def deadline(self) -> int | None:
        """When a `Tick` is wanted."""
        times: list[int] = []
        for mount in self.mounts.values():
            if mount.state is State.OPEN:
                times.append(mount.lease_end_ns)
            elif mount.state is State.DRAINING:
                times.append(mount.lapsed_at_ns)
            elif mount.state is State.SWEEPING:
                times.append(mount.lapsed_at_ns + self._abort_ns)
        return min(times, default=None)

    def draining(self) -> list[InstanceNo]:
        """The mounts whose count of replies in flight the next `Tick` must bring."""
        return [n for n, mount in self.mounts.items() if mount.state is State.DRAINING]

    def settled(self) -> bool:
        """Whether nothing is left to abort or purge."""
        return all(mount.state is State.PURGED for mount in self.mounts.values())

    def check(self) -> None:
        """Assert the invariants."""
        for mount in self.mounts.values():
            assert mount.sweeping == (mount.state in (State.SWEEPING, State.ABORTING)), (
                "a sweep runs exactly in these states"
            )
