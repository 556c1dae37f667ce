"""A change of a volume group as a state machine. Pure: events in, one action out.

The caller holds the VG's lock. The steps, and what a death after each of them leaves behind:

| step | action | if the coordinator dies now |
|---|---|---|
| read | `ReadEntry` | nothing happened |
| take over | `SetEntry` claim + 1 | the next one does it again |
| settle | `Resume` of what an unfinished change left, `SetEntry` change gone | same |
| plan | `MakePlan` | nothing happened |
| claim | `SetEntry` with the change noted, claim + 1 | the next one settles at the old map |
| raise | `RaiseMinimum` before freed extents are used again | same; harmless |
| write | `WriteSlots`: inactive slot of all PVs, flushed | same; the register does not name it |
| suspend | `Suspend`: all gates closed, nothing in flight (or barred) | same; they are resumed |
| commit | `SetEntry` sequence + 1 | the next one settles at the new map |
| resume | `Resume` at the new map | same |
| archive | `Archive` | same |
| clear | `SetEntry` change gone | nothing is left to do |

Invariant: while any gate of a volume is open under a new layout, the register has committed it and
no gate is open under the old one. Everyone who takes an unfinished change over, and a coordinator
that gives its own up, first raises `claim`: after that a late commit of the old coordinator fails,
and only then are instances resumed with the old map. Suspends and maps carry the claim, so that a
message of the old coordinator that an instance receives after that changes nothing either.

A compare-and-set whose outcome is unknown is settled by reading the register again; if that fails
too, the change stays noted there and instances stay suspended until somebody can decide.
"""

from __future__ import annotations

import enum

import msgspec

from cluster.errors import StackError
from cvm.metadata import VgRecord, encode_text, text_checksum
from cvm.seams import VgChange, VgEntry

REREADS_MAX = 8


class Plan(msgspec.Struct, frozen=True):
    """What a verb wants to change. `new` None removes the VG; `changed` False does nothing.

    `volumes`: LVs whose maps change while they may be open. `minimums`: (pv, sequence) to raise
    before the new metadata may use freed extents.
    """

    new: VgRecord | None
    changed: bool = True
    volumes: tuple[str, ...] = ()
    minimums: tuple[tuple[str, int], ...] = ()


# --- actions -----------------------------------------------------------------------------------


class ReadEntry(msgspec.Struct, frozen=True):
    """Read the VG's entry: answer `EntryRead`."""


class SetEntry(msgspec.Struct, frozen=True):
    """Compare and set the VG's entry: answer `EntrySet`."""

    expected: VgEntry | None
    new: VgEntry | None


class MakePlan(msgspec.Struct, frozen=True):
    """Load the metadata that the entry names and plan the change: answer `Planned`."""

    entry: VgEntry | None


class RaiseMinimum(msgspec.Struct, frozen=True):
    """Bring every open volume to the sequence of `entry`, then raise the PVs: answer `Done`."""

    entry: VgEntry
    minimums: tuple[tuple[str, int], ...]


class WriteSlots(msgspec.Struct, frozen=True):
    """Write the text to its slot on all PVs of `vg` and flush: answer `Done`."""

    vg: VgRecord
    text: bytes


class Suspend(msgspec.Struct, frozen=True):
    """Suspend all instances of the volumes: answer `Done`."""

    volumes: tuple[str, ...]
    sequence: int
    claim: int


class Resume(msgspec.Struct, frozen=True):
    """Resume all instances of the volumes at the metadata that `entry` names: answer `Done`."""

    volumes: tuple[str, ...]
    entry: VgEntry


class Archive(msgspec.Struct, frozen=True):
    """Keep the committed text in the archive of the PVs: answer `Done`."""

    vg: VgRecord
    text: bytes


class Finished(msgspec.Struct, frozen=True):
    """The end. `error` None: done. `warning`: done, but something was left."""

    entry: VgEntry | None
    error: StackError | None = None
    warning: str = ""


Action = (
    ReadEntry
    | SetEntry
    | MakePlan
    | RaiseMinimum
    | WriteSlots
    | Suspend
    | Resume
    | Archive
    | Finished
)


# --- events ------------------------------------------------------------------------------------


class EntryRead(msgspec.Struct, frozen=True):
    entry: VgEntry | None


class EntrySet(msgspec.Struct, frozen=True):
    replaced: bool


class Planned(msgspec.Struct, frozen=True):
    plan: Plan


class Done(msgspec.Struct, frozen=True):
    """The last action was carried out."""


class Failed(msgspec.Struct, frozen=True):
    """The last action failed; of a `SetEntry` the outcome is unknown."""

    error: StackError


Event = EntryRead | EntrySet | Planned | Done | Failed


class State(enum.Enum):
    """What the machine waits for."""

    READ = "read"
    TAKE_OVER = "take over"
    SETTLE = "settle"
    SETTLED = "settled"
    PLAN = "plan"
    CLAIM = "claim"
    RAISE = "raise"
    WRITE = "write"
    SUSPEND = "suspend"
    COMMIT = "commit"
    COMMIT_UNSURE = "commit unsure"
    RESUME = "resume"
    ARCHIVE = "archive"
    CLEAR = "clear"
    ABORT = "abort"
    ABORT_UNSURE = "abort unsure"
    ABORT_RESUME = "abort: resume"
    ABORT_CLEAR = "abort: clear"
    END = "end"


class Transaction:
    """One change of one VG. `start` gives the first action, `step` each next one.

    With `recover_only` it settles an unfinished change and plans nothing.
    """

    def __init__(self, vg: str, purpose: str, *, recover_only: bool = False) -> None:
        self.vg = vg
        self.purpose = purpose
        self.state = State.READ
        self._recover_only = recover_only
        self._entry: VgEntry | None = None
        self._wanted: VgEntry | None = None
        self._committed: VgEntry | None = None
        self._commit_tried = False
        self._plan: Plan | None = None
        self._text = b""
        self._error: StackError | None = None
        self._warning = ""
        self._rereads = 0

    def start(self) -> Action:
        return ReadEntry()

    def step(self, event: Event) -> Action:
        """The next action after the last one was answered with `event`."""
        assert self.state is not State.END, "the transaction has ended"
        match event:
            case Failed(error=error):
                return self._on_failed(error)
            case EntryRead(entry=entry):
                return self._on_read(entry)
            case EntrySet(replaced=True):
                return self._on_set()
            case EntrySet():
                return self._on_not_set()
            case Planned(plan=plan):
                assert self.state is State.PLAN
                return self._on_planned(plan)
            case Done():
                return self._on_done()

    # --- helpers -------------------------------------------------------------------------------

    def _finish(self, error: StackError | None = None) -> Finished:
        self.state = State.END
        return Finished(self._entry, error, self._warning)

    def _go(self, state: State, action: Action) -> Action:
        self.state = state
        return action

    def _set(self, state: State, new: VgEntry | None) -> Action:
        """Propose an entry; `_entry` becomes it when the register has it."""
        self._wanted = new
        return self._go(state, SetEntry(self._entry, new))

    def _claimed(self, change: VgChange | None) -> VgEntry:
        """The entry as it is, with the next claim."""
        assert self._entry is not None
        return msgspec.structs.replace(self._entry, claim=self._entry.claim + 1, change=change)

    def _lost(self) -> Finished:
        error = StackError(
            f'Another node took over the change of volume group "{self.vg}".',
            hint="run the command again",
        )
        return self._finish(self._error or error)

    # --- events --------------------------------------------------------------------------------

    def _on_read(self, entry: VgEntry | None) -> Action:
        match self.state:
            case State.READ:
                self._entry = entry
                if entry is not None and entry.change is not None:
                    return self._set(State.TAKE_OVER, self._claimed(entry.change))
                return self._after_settling()
            case State.COMMIT_UNSURE | State.ABORT_UNSURE:
                if self._commit_tried and entry == self._committed:
                    return self._on_commit()
                if self.state is State.ABORT_UNSURE and entry == self._wanted:
                    self._entry = entry
                    return self._on_aborted()
                if entry == self._entry:
                    return self._abort()
                return self._lost()
        raise AssertionError(f"entry read in state {self.state}")

    def _after_settling(self) -> Action:
        if self._recover_only:
            return self._finish()
        return self._go(State.PLAN, MakePlan(self._entry))

    def _on_planned(self, plan: Plan) -> Action:
        self._plan = plan
        if not plan.changed:
            return self._finish()
        if plan.new is not None:
            self._text = encode_text(plan.new)
        change = VgChange(self.purpose, plan.volumes)
        if self._entry is None:
            assert plan.new is not None
            claimed = VgEntry(self.vg, plan.new.uuid, 0, "", (), 1, change)
        else:
            claimed = self._claimed(change)
        return self._set(State.CLAIM, claimed)

    def _on_set(self) -> Action:
        """The register has what was proposed."""
        if self.state is State.COMMIT:
            return self._on_commit()
        self._entry = self._wanted
        match self.state:
            case State.TAKE_OVER:
                assert self._entry is not None
                assert self._entry.change is not None
                if self._entry.sequence == 0 or not self._entry.change.volumes:
                    return self._settled()
                return self._go(State.SETTLE, Resume(self._entry.change.volumes, self._entry))
            case State.SETTLED:
                return self._after_settling()
            case State.CLAIM:
                return self._on_claimed()
            case State.CLEAR:
                return self._finish()
            case State.ABORT:
                return self._on_aborted()
            case State.ABORT_CLEAR:
                return self._finish(self._error)
        raise AssertionError(f"entry set in state {self.state}")

    def _settled(self) -> Action:
        """Take the note of the unfinished change away; a VG that was never committed goes."""
        assert self._entry is not None
        gone = self._entry.sequence == 0
        cleared = None if gone else msgspec.structs.replace(self._entry, change=None)
        return self._set(State.SETTLED, cleared)

    def _on_claimed(self) -> Action:
        assert self._plan is not None
        assert self._entry is not None
        if self._plan.minimums:
            return self._go(State.RAISE, RaiseMinimum(self._entry, self._plan.minimums))
        return self._write()

    def _write(self) -> Action:
        assert self._plan is not None
        if self._plan.new is None:
            return self._commit()
        return self._go(State.WRITE, WriteSlots(self._plan.new, self._text))

    def _on_done(self) -> Action:
        assert self._plan is not None or self.state is State.SETTLE
        match self.state:
            case State.SETTLE:
                return self._settled()
            case State.RAISE:
                return self._write()
            case State.WRITE:
                assert self._plan is not None
                assert self._plan.new is not None
                assert self._entry is not None
                if self._plan.volumes:
                    suspend = Suspend(
                        self._plan.volumes, self._plan.new.sequence, self._entry.claim
                    )
                    return self._go(State.SUSPEND, suspend)
                return self._commit()
            case State.SUSPEND:
                return self._commit()
            case State.RESUME:
                return self._archive()
            case State.ARCHIVE:
                return self._clear()
            case State.ABORT_RESUME:
                return self._abort_clear()
        raise AssertionError(f"done in state {self.state}")

    def _commit(self) -> Action:
        assert self._plan is not None
        assert self._entry is not None
        new = self._plan.new
        if new is not None:
            self._committed = msgspec.structs.replace(
                self._entry,
                sequence=new.sequence,
                checksum=text_checksum(self._text),
                pvs=tuple(pv.name for pv in new.pvs),
            )
        self._commit_tried = True
        return self._set(State.COMMIT, self._committed)

    def _on_commit(self) -> Action:
        assert self._plan is not None
        self._entry = self._committed
        self._error = None
        if self._entry is None:
            return self._finish()
        if self._plan.volumes:
            return self._go(State.RESUME, Resume(self._plan.volumes, self._entry))
        return self._archive()

    def _archive(self) -> Action:
        assert self._plan is not None
        assert self._plan.new is not None
        return self._go(State.ARCHIVE, Archive(self._plan.new, self._text))

    def _clear(self) -> Action:
        assert self._entry is not None
        return self._set(State.CLEAR, msgspec.structs.replace(self._entry, change=None))

    # --- giving up -----------------------------------------------------------------------------

    def _abort(self) -> Action:
        """Raise the claim, so that no late commit can succeed, before anything is resumed."""
        assert self._entry is not None
        if self._entry.sequence == 0:
            return self._set(State.ABORT, None)
        return self._set(State.ABORT, self._claimed(self._entry.change))

    def _on_aborted(self) -> Action:
        if self._entry is None:
            return self._finish(self._error)
        assert self._plan is not None
        if self._plan.volumes:
            return self._go(State.ABORT_RESUME, Resume(self._plan.volumes, self._entry))
        return self._abort_clear()

    def _abort_clear(self) -> Action:
        assert self._entry is not None
        return self._set(State.ABORT_CLEAR, msgspec.structs.replace(self._entry, change=None))

    def _reread(self, state: State, error: StackError | None) -> Action:
        self._error = self._error or error
        self._rereads += 1
        if self._rereads > REREADS_MAX:
            return self._finish(self._error or StackError("the register does not settle"))
        return self._go(state, ReadEntry())

    def _on_not_set(self) -> Action:
        """The register holds something else: somebody else worked on this VG meanwhile."""
        if self.state in (State.TAKE_OVER, State.SETTLED):
            return self._reread(State.READ, None)
        if self.state is State.CLEAR:
            return self._finish()
        if self.state is State.ABORT:
            return self._reread(State.ABORT_UNSURE, None)
        return self._lost()

    def _on_failed(self, error: StackError) -> Action:
        match self.state:
            case State.READ | State.PLAN | State.TAKE_OVER | State.SETTLE | State.SETTLED:
                return self._finish(error)
            case State.CLAIM:
                self._error = error
                return self._finish(error)
            case State.RAISE | State.WRITE | State.SUSPEND:
                self._error = error
                return self._abort()
            case State.COMMIT:
                return self._reread(State.COMMIT_UNSURE, error)
            case State.ABORT:
                return self._reread(State.ABORT_UNSURE, error)
            case State.COMMIT_UNSURE | State.ABORT_UNSURE:
                return self._finish(_left(error))
            case State.RESUME | State.ABORT_RESUME | State.ABORT_CLEAR:
                return self._finish(_left(self._error or error))
            case State.ARCHIVE:
                self._warning = f"metadata could not be archived: {error.message}"
                return self._clear()
            case State.CLEAR:
                self._warning = f"the end of the change is not noted yet: {error.message}"
                return self._finish()
            case _:
                raise AssertionError(f"failure in state {self.state}")


def _left(error: StackError) -> StackError:
    return StackError(
        f"{error.message} (the change is left unfinished)",
        hint="the next command on this volume group finishes or undoes it: cvmctl status",
    )
