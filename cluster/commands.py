"""Changes of the register that somebody asked for: tried on the newest value until decided.

An answer (done, or refused) is judged only on a value that was read or decided after the command
came: what this node knew before may be old. A change of voters is done when its second step is
decided.
"""

from __future__ import annotations

from collections import deque

from cluster.actions import Action, Reply
from cluster.core_events import Command
from cluster.errors import BusyError, NotQuorateError, StackError
from cluster.state import (
    ClusterState,
    FinishVoterChange,
    StartVoterChange,
    apply_change,
)
from cluster.timing import MS

COMMANDS_MAX = 64


class PendingCommand:
    """One command under way."""

    def __init__(self, now_ns: int, command: Command, until_ns: int) -> None:
        self.command = command
        self.since_ns = now_ns
        self.until_ns = until_ns
        self.judged_fresh = False


class Commands:
    """The queue. The head is worked on; `next_value` says what to propose for it."""

    def __init__(self) -> None:
        self._queue: deque[PendingCommand] = deque()

    def add(self, now_ns: int, command: Command) -> list[Action]:
        """A new command."""
        if len(self._queue) >= COMMANDS_MAX:
            return [Reply(command.request, error=BusyError("too many changes under way"))]
        until_ns = now_ns + command.timeout_ms * MS
        self._queue.append(PendingCommand(now_ns, command, until_ns))
        return []

    def expire(self, now_ns: int) -> list[Action]:
        """Answer those whose time is over."""
        late = [pending for pending in self._queue if now_ns >= pending.until_ns]
        for pending in late:
            self._queue.remove(pending)
        error = "the change could not be decided in time (it may still happen)"
        return [Reply(pending.command.request, error=NotQuorateError(error)) for pending in late]

    def deadline(self) -> int | None:
        """When the next one expires."""
        return min((pending.until_ns for pending in self._queue), default=None)

    @property
    def busy(self) -> bool:
        return bool(self._queue)

    @property
    def wants_read(self) -> bool:
        """The head could be answered, but by a value that may be old."""
        return bool(self._queue) and self._queue[0].judged_fresh is False and self._refused

    _refused = False

    def was_read(self, since_ns: int) -> None:
        """An operation of the register that began at `since_ns` has given a value."""
        for pending in self._queue:
            if pending.since_ns <= since_ns:
                pending.judged_fresh = True
        self._refused = False

    def next_value(
        self, state: ClusterState, writer: str
    ) -> tuple[ClusterState | None, list[Action]]:
        """What to propose now for the head of the queue; replies to those that are done."""
        actions: list[Action] = []
        while self._queue and not self._refused:
            pending = self._queue[0]
            try:
                value = self._value(pending, state, writer)
            except StackError as error:
                if not pending.judged_fresh:
                    self._refused = True
                    break
                actions.append(Reply(pending.command.request, error=error))
                self._queue.popleft()
                continue
            if value is not state:
                return value, actions
            if not pending.judged_fresh:
                self._refused = True
                break
            actions.append(Reply(pending.command.request, result=state))
            self._queue.popleft()
        return None, actions

    @staticmethod
    def _value(pending: PendingCommand, state: ClusterState, writer: str) -> ClusterState:
        change = pending.command.change
        if isinstance(change, StartVoterChange) and state.old_voters:
            return apply_change(state, FinishVoterChange(), writer)
        return apply_change(state, change, writer)
