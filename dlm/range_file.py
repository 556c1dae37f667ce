"""What `dlm.range_locks` knows of one name, and the operations on it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from cluster.ids import Instance
from cluster.locks import Mode
from dlm import messages as m
from dlm.engine import Completion
from dlm.modes import Result
from dlm.ranges import RangeTable

if TYPE_CHECKING:
    from dlm.range_locks import RangeLocks

UNLOCK: Final = 2
"""A kind of operation, beside READ and WRITE."""


class Role(enum.Enum):
    """What this member is for a name."""

    NONE = 0
    GUEST = 1
    ENLISTING = 2
    KEEPER = 3


class Operation(msgspec.Struct, eq=False):
    """A lock, an unlock or a test of an owner of this member. `done` is called once, unless the
    operation is abandoned; `result` and, after a test or AGAIN, `conflict` tell how it ended."""

    file: RangeFile
    number: int
    key: int
    start: int
    end: int
    kind: int
    done: Callable[[Operation], None] | None
    pid: int = 0
    wait: bool = False
    test: bool = False
    since_ns: int = 0
    due_ns: int = 0
    chased_ns: int = 0
    rounds: int = 0
    result: Result | None = None
    conflict: m.RangeConflict | None = None
    sent: bool = False
    abandoned: bool = False
    deadlock: bool = False
    withdrawn: bool = False


Done = Callable[[Operation], None]


class Question(msgspec.Struct, eq=False):
    """A try or a test that finds something in its way: `missing` have to say that this is so."""

    source: Instance
    one: m.RangeLock | Operation
    missing: set[Instance]


class RangeFile:
    """What this member knows of one name; the client of its EX."""

    __slots__ = (
        "abandoned", "asking", "cancelling", "doubt", "early", "foreign_uses", "guests", "keeper",
        "lock", "missing", "name", "operations", "own_used_ns", "questions", "role", "service",
        "table", "tenure",
    )  # fmt: skip

    def __init__(self, service: RangeLocks, name: bytes) -> None:
        self.service = service
        self.name = name
        self.role = Role.NONE
        self.keeper: Instance | None = None
        self.tenure: tuple[int, int] = (0, 0)
        self.table = RangeTable()
        """A keeper's: of everybody. Otherwise the locks of our own owners."""
        self.operations: dict[int, Operation] = {}
        """Not ended, in their order."""
        self.abandoned = 0
        """How many of them were given up while the keeper had them."""
        self.lock = 0
        self.asking = False
        self.cancelling = False
        self.missing: set[Instance] = set()
        self.doubt: set[Instance] = set()
        self.early: list[tuple[Instance, m.RangeLock | m.RangeUnlock | m.RangeCancel]] = []
        self.questions: dict[int, Question] = {}
        self.guests: set[Instance] = set()
        self.foreign_uses = 0
        self.own_used_ns = 0

    @property
    def idle(self) -> bool:
        """Nobody holds or wants anything that we know of."""
        return self.table.empty and not self.operations and self.role is not Role.ENLISTING

    def may_follow(self, tenure: tuple[int, int]) -> bool:
        """Whether who says that it keeps the name in `tenure` is to be believed. While we hold EX
        nobody else does; if it is otherwise we are out of the group and have not heard of it."""
        return tenure > self.tenure and self.role in (Role.NONE, Role.GUEST)

    def completed(self, completion: Completion) -> None:
        self.service.on_completed(self, completion)

    def blocking(self, mode: Mode, waiting: int) -> None:
        self.service.on_wanted(self)
