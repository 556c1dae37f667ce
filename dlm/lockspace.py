"""One member of a lockspace: the owner's, the master's and the directory's side, and recovery.

A pure state machine. Operations and messages go in (`lock`, `convert`, `unlock`, `cancel`,
`receive`, `group_event`); `take()` gives the actions in order: `Send`, `Completion`, `Blocking`,
`Left`. Messages to this member itself never leave the process and are handled before the call
returns, so a lock whose master is here is granted at once.

Views: every payload carries the sender's view. A later one than ours waits until we have it (the
mesh sees to that as well); an earlier one is valid until its sender has said `Sync`; anything from
somebody who is not in our view is dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, get_args

import msgspec

from cluster.control import GroupEvent
from cluster.ids import Instance
from cluster.locks import Mode
from dlm import messages as m
from dlm.directory import Directory, slot_of
from dlm.engine import Completion
from dlm.master import MasterSide
from dlm.messages import Batch, Message
from dlm.modes import NAME_BYTES_MAX, Flags, Result
from dlm.owner import OwnerSide
from dlm.recovery import Recovery

FUTURE_MAX = 1 << 16


class Send(msgspec.Struct, frozen=True, gc=False):
    """One payload for another member."""

    to: Instance
    payload: bytes


class Blocking(msgspec.Struct, frozen=True, gc=False):
    """A lock of ours is in the way: the highest blocked mode and the bit set of all of them."""

    lock: int
    mode: Mode
    waiting: int


class Left(msgspec.Struct, frozen=True):
    """Everything is handed over; the process may leave the group."""


class Asked(msgspec.Struct, frozen=True):
    """`dlmctl` on another member wants to know about a name."""

    source: Instance
    id: int
    name: bytes


class Answered(msgspec.Struct, frozen=True):
    """What another member knows."""

    source: Instance
    id: int
    text: bytes


class Ranged(msgspec.Struct, frozen=True, gc=False):
    """A message about byte ranges, for `dlm.range_locks`."""

    source: Instance
    message: m.RangeMessage


class Changed(msgspec.Struct, frozen=True, gc=False):
    """The members, the failed ones whose journals are not replayed, and the silent ones of these;
    at its place among the messages."""

    members: frozenset[Instance]
    dead: frozenset[Instance]
    silent: frozenset[Instance]


LocalEvent = Completion | Blocking | Left | Asked | Answered | Ranged | Changed
Action = Send | LocalEvent


class Lockspace:
    """The member `me` of one lockspace."""

    def __init__(self, me: Instance) -> None:
        self.me = me
        self.now_ns = 0
        self.view = (0, 0)
        self.members: frozenset[Instance] = frozenset()
        self.dead: set[Instance] = set()
        self.silent: set[Instance] = set()
        self.frozen = False
        self.barred = False
        self.events: deque[LocalEvent] = deque()
        self.directory = Directory(me)
        self.owner = OwnerSide(self)
        self.master = MasterSide(self)
        self.recovery = Recovery(self)
        self._outbox: dict[Instance, list[Message]] = {}
        self._local: deque[Message] = deque()
        self._sends: list[Send] = []
        self._future: list[tuple[Instance, Batch]] = []
        self._handlers: dict[type, Callable[[Instance, Any, tuple[int, int]], None]] = {
            m.Request: lambda source, message, _view: self.master.request(source, message),
            m.Convert: lambda source, message, _view: self.master.convert(source, message),
            m.Unlock: lambda source, message, _view: self.master.unlock(source, message),
            m.Cancel: lambda source, message, _view: self.master.cancel(source, message),
            m.Reply: lambda source, message, _view: self._reply(source, message),
            m.Bast: lambda source, message, _view: self.owner.bast(source, message),
            m.Redirect: lambda source, message, _view: self._redirect(source, message),
            m.LvbNote: lambda source, message, _view: self.owner.note(source, message),
            m.Remove: lambda source, message, _view: self.master.remove(source, message),
            m.Removed: lambda _source, message, _view: self.master.removed(message),
            m.Sync: lambda source, _message, view: self.recovery.sync(source, view),
            m.DirPush: self.recovery.dir_push,
            m.LockPush: self.recovery.lock_push,
            m.Pushed: lambda source, _message, view: self.recovery.pushed(source, view),
            m.Recovered: lambda source, _message, view: self.recovery.recovered(source, view),
            m.LeaveMark: self._leave_mark,
            m.LeaveAck: lambda source, message, _view: self.recovery.leave_ack(source, message),
            m.Query: lambda source, q, _view: self.events.append(Asked(source, q.id, q.name)),
            m.Answer: lambda source, a, _view: self.events.append(Answered(source, a.id, a.text)),
        }
        for kind in get_args(m.RangeMessage):
            self._handlers[kind] = self._ranged

    # Operations of this process. Nothing but GRANTED means: no completion will come.

    def lock(self, name: bytes, mode: Mode, flags: int = Flags.NONE) -> int | None:
        """Ask for a new lock; its number, or None if the request makes no sense."""
        if not 0 < len(name) <= NAME_BYTES_MAX or not self._open():
            return None
        number = self.owner.lock(name, mode, flags)
        self._pump()
        return number

    def convert(
        self, lock: int, mode: Mode, flags: int = Flags.NONE, lvb: bytes | None = None
    ) -> Result:
        if not self._open():
            return Result.NO_LOCK
        result = self.owner.convert(lock, mode, flags, lvb)
        self._pump()
        return result

    def unlock(self, lock: int, flags: int = Flags.NONE, lvb: bytes | None = None) -> Result:
        if not self._open():
            return Result.NO_LOCK
        result = self.owner.unlock(lock, flags, lvb)
        self._pump()
        return result

    def cancel(self, lock: int) -> Result:
        if not self._open():
            return Result.NO_LOCK
        result = self.owner.cancel(lock)
        self._pump()
        return result

    def leave(self) -> None:
        """Give all locks back and hand over; `Left` follows."""
        self.recovery.leaving = True
        for lock in list(self.owner.locks.values()):
            if not lock.gone:
                self.owner.unlock(lock.number, Flags.FORCEUNLOCK | Flags.IVVALBLK, None)
        self._pump()
        self.recovery.leave_if_quiet()
        self._pump()

    def bar(self) -> None:
        """This instance is out for ever: it grants, asks and answers nothing any more."""
        self.barred = True
        self._outbox.clear()
        self._sends.clear()

    def ask(self, query: int, name: bytes) -> None:
        """Ask all members about a name; `Answered` follows once per member."""
        for member in sorted(self.members):
            self.post(member, m.Query(query, name))
        self._pump()

    def answer(self, to: Instance, query: int, text: bytes) -> None:
        self.post(to, m.Answer(query, text))
        self._pump()

    def is_home(self, name: bytes) -> bool:
        return self.directory.is_home(slot_of(name))

    def _open(self) -> bool:
        return bool(self.members) and not self.barred and not self.recovery.leaving

    # The world.

    def receive(self, source: Instance, payload: bytes) -> None:
        """A payload of another member. Raises ProtocolError if it is none of ours."""
        batch = m.decode_untrusted(payload)
        if (batch.epoch, batch.seq) > self.view:
            if len(self._future) < FUTURE_MAX:
                self._future.append((source, batch))
            return
        self._take_in(source, batch)
        self._pump()

    def _take_in(self, source: Instance, batch: Batch) -> None:
        if source not in self.members or self.barred:
            return
        view = (batch.epoch, batch.seq)
        for message in batch.messages:
            self._handle(source, message, view)

    def group_event(self, event: GroupEvent) -> None:
        """The next event of the process group."""
        if (event.epoch, event.seq) <= self.view or self.barred:
            return
        self._seal()
        dead, silent = self.dead, self.silent
        self.dead, self.silent = {*event.dead, *event.failed}, set(event.silent)
        if event.kind == "view":
            self.view = (event.epoch, event.seq)
            if any(member.instance == self.me for member in event.members):
                self.recovery.install(event)
        self.events.append(Changed(self.members, frozenset(self.dead), frozenset(self.silent)))
        # By comparison, not by the subject: a member may be told of several changes at once.
        for one in sorted(self.silent - silent):
            self.recovery.silent(one)
        for one in sorted(dead - self.dead):
            self.recovery.released(one)
        self._pump()
        self._take_held()

    def _take_held(self) -> None:
        future, self._future = self._future, []
        for source, batch in future:
            if (batch.epoch, batch.seq) > self.view:
                self._future.append((source, batch))
            else:
                self._take_in(source, batch)
        self._pump()

    def take(self) -> list[Action]:
        """All actions since the last call, in order."""
        self._seal()
        actions: list[Action] = [*self._sends, *self.events]
        self._sends.clear()
        self.events.clear()
        return actions

    def tell(self, to: Instance, message: m.RangeMessage) -> None:
        """Send a message about byte ranges to another member."""
        self.post(to, message)

    # For the parts.

    @staticmethod
    def slot_of(name: bytes) -> int:
        return slot_of(name)

    def post(self, to: Instance, message: Message) -> None:
        """Queue a message; one to ourselves is handled before the present call returns."""
        if to == self.me:
            self._local.append(message)
        elif to in self.members:
            self._outbox.setdefault(to, []).append(message)

    def blocking(self, lock: int, mode: Mode, waiting: int) -> None:
        self.events.append(Blocking(lock, mode, waiting))

    def may_leave(self) -> None:
        self.events.append(Left())

    def _reply(self, source: Instance, message: m.Reply) -> None:
        self.owner.reply(source, message)
        if self.master.early:
            self.master.answer_early()

    def _redirect(self, source: Instance, message: m.Redirect) -> None:
        self.owner.redirect(source, message)
        if message.master == self.me:
            name = message.name
            mine = self.owner.resources.get(name)
            if mine is None or not any(lock.pending for lock in mine.locks.values()):
                self.master.settle_unused(name)
        if self.master.early:
            self.master.answer_early()

    def _ranged(self, source: Instance, message: m.RangeMessage, _view: tuple[int, int]) -> None:
        self.events.append(Ranged(source, message))

    def _leave_mark(self, source: Instance, message: m.LeaveMark, _view: tuple[int, int]) -> None:
        self.post(source, m.LeaveAck(message.round))

    def _handle(self, source: Instance, message: Message, view: tuple[int, int]) -> None:
        if self.frozen and isinstance(
            message, m.Request | m.Convert | m.Unlock | m.Cancel | m.Remove
        ):
            return
        self._handlers[type(message)](source, message, view)

    def _pump(self) -> None:
        local = self._local
        while local:
            self._handle(self.me, local.popleft(), self.view)
        if self.recovery.leaving:
            self.recovery.leave_if_quiet()
            while local:
                self._handle(self.me, local.popleft(), self.view)

    def _seal(self) -> None:
        """Encode what is queued under the view it was said in."""
        if not self._outbox:
            return
        epoch, seq = self.view
        for to, some in self._outbox.items():
            self._sends.append(Send(to, m.encode(Batch(epoch, seq, some))))
        self._outbox.clear()

    def check(self) -> None:
        """Assert the invariants of this member."""
        self.owner.check()
        self.master.check()
        self.directory.check(sorted(self.members))
