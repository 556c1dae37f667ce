"""The instances of this node: who is registered, what it may be called with. Pure bookkeeping."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.errors import BusyError, UsageError
from cluster.ids import INSTANCE_NO_MAX, InstanceNo

NO_METHOD = "no such method"
"""How the error of a session begins that does not know a verb."""
INSTANCES_MAX = 90
"""Heartbeats have room for 96: one that is not in them would get no lease."""


@dataclass(slots=True)
class LocalInstance:
    """One process that called `instance.register`. `session` is its control session."""

    number: InstanceNo
    kind: str
    title: str
    session: Any
    pid: int = 0
    mountpoint: str = ""
    leaving: bool = False
    over: bool = False
    groups: set[str] = field(default_factory=set)
    volumes: dict[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """For status."""
        return {
            "number": self.number,
            "kind": self.kind,
            "title": self.title,
            "pid": self.pid,
            "groups": sorted(self.groups),
            "volumes": sorted(self.volumes),
        }


class LocalInstances:
    """Numbers rise by one from 1 and are never used again in this life."""

    def __init__(self) -> None:
        self._next = 1
        self.by_number: dict[InstanceNo, LocalInstance] = {}

    def add(self, kind: str, title: str, session: Any, pid: int) -> LocalInstance:
        """Register a process."""
        if len(self.by_number) >= INSTANCES_MAX or self._next >= INSTANCE_NO_MAX:
            raise BusyError("too many instances on this node", hint="restart clusterd")
        instance = LocalInstance(InstanceNo(self._next), kind, title, session, pid)
        self._next += 1
        self.by_number[instance.number] = instance
        return instance

    def of_session(self, session: Any) -> LocalInstance:
        """The instance behind a session. Raises UsageError."""
        for instance in self.by_number.values():
            if instance.session is session:
                return instance
        raise UsageError("this session has not called instance.register")

    def live(self) -> list[LocalInstance]:
        """Those whose process is there, by number."""
        return [one for _, one in sorted(self.by_number.items()) if not one.over]
