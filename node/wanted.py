"""The mounts that this node is to have, and when a lost one is tried again. Pure.

`mount.cfs` registers its mount here once it is there; a clean unmount takes it out. What is left
after a power cut, after this node was put out of the cluster, or after the mount process died, is
mounted again. A mount in the foreground (`-f`) is its caller's to restart and never listed.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import msgspec

from cluster.errors import BusyError, CorruptionError
from cluster.ids import InstanceNo
from cluster.timing import MS

WANTED_MAX = 64
RETRY_FIRST_NS = 1000 * MS
RETRY_MAX_NS = 60_000 * MS
SETTLED_NS = 60_000 * MS
"""A mount that lasted so long starts with the shortest pause when it is lost."""


class WantedMount(msgspec.Struct, frozen=True):
    """As on the command line of mount.cfs."""

    volume: str
    mountpoint: str
    options: list[str] = []


def encode_wanted(mounts: list[WantedMount]) -> bytes:
    """The file `mounts`: a JSON list."""
    return msgspec.json.format(msgspec.json.encode(mounts)) + b"\n"


def decode_wanted_untrusted(data: bytes) -> list[WantedMount]:
    """Raises CorruptionError."""
    try:
        return msgspec.json.decode(data, type=list[WantedMount])[:WANTED_MAX]
    except (msgspec.DecodeError, RecursionError) as error:
        raise CorruptionError(f"the list of mounts makes no sense: {error}") from error


@dataclass(slots=True)
class _Entry:
    mount: WantedMount
    instance: InstanceNo | None = None
    """Who serves it, in this life of the node."""
    since_ns: int = 0
    due_ns: int = 0
    pause_ns: int = 0
    busy: bool = False
    problem: str = ""


class Wanted:
    """All wanted mounts, by mount point."""

    def __init__(self, mounts: list[WantedMount]) -> None:
        self._entries = {mount.mountpoint: _Entry(mount) for mount in mounts}

    def mounts(self) -> list[WantedMount]:
        """What is to be kept on disk."""
        return [entry.mount for entry in self._entries.values()]

    def want(self, now_ns: int, mount: WantedMount, instance: InstanceNo) -> bool:
        """An instance has mounted it. True if the list changed. Raises BusyError."""
        entry = self._entries.get(mount.mountpoint)
        if entry is None:
            if len(self._entries) >= WANTED_MAX:
                raise BusyError("too many mounts on this node")
            entry = self._entries[mount.mountpoint] = _Entry(mount)
            changed = True
        else:
            changed = entry.mount != mount
            entry.mount = mount
        entry.instance, entry.since_ns, entry.problem = instance, now_ns, ""
        return changed

    def forget(self, mountpoint: str) -> bool:
        """It is not wanted any more. True if it was."""
        return self._entries.pop(mountpoint, None) is not None

    def left(self, instance: InstanceNo) -> bool:
        """An instance has unmounted. True if the list changed."""
        found = [at for at, entry in self._entries.items() if entry.instance == instance]
        for mountpoint in found:
            del self._entries[mountpoint]
        return bool(found)

    def died(self, now_ns: int, instance: InstanceNo) -> None:
        """An instance is over, and its mount with it."""
        for entry in self._entries.values():
            if entry.instance == instance:
                if now_ns - entry.since_ns >= SETTLED_NS:
                    entry.pause_ns = 0
                entry.instance = None
                entry.due_ns = now_ns + entry.pause_ns
                entry.pause_ns = self._longer(entry.pause_ns)

    def started(self, mountpoint: str) -> None:
        """An attempt to mount it is under way."""
        self._entries[mountpoint].busy = True

    def ended(self, now_ns: int, mountpoint: str, problem: str) -> bool:
        """The attempt has ended; "" if it is mounted. True if that is news."""
        entry = self._entries.get(mountpoint)
        if entry is None:
            return False
        entry.busy = False
        if not problem:
            return True
        entry.pause_ns = self._longer(entry.pause_ns)
        entry.due_ns = now_ns + entry.pause_ns
        news = problem != entry.problem
        entry.problem = problem
        return news

    def due(self, now_ns: int, taken: Set[str]) -> list[WantedMount]:
        """What to mount now. `taken` are the places of living mounts, whoever made them."""
        return [entry.mount for entry in self._lost(taken) if entry.due_ns <= now_ns]

    def deadline(self, taken: Set[str]) -> int | None:
        """When something becomes due."""
        return min((entry.due_ns for entry in self._lost(taken)), default=None)

    def _lost(self, taken: Set[str]) -> list[_Entry]:
        return [
            entry
            for at, entry in self._entries.items()
            if entry.instance is None and not entry.busy and at not in taken
        ]

    def rows(self) -> list[Mapping[str, Any]]:
        """For status: one row per wanted mount."""
        return [
            {
                "volume": entry.mount.volume,
                "mountpoint": entry.mount.mountpoint,
                "options": entry.mount.options,
                "instance": entry.instance,
                "problem": entry.problem,
            }
            for entry in self._entries.values()
        ]

    def _longer(self, pause_ns: int) -> int:
        return min(RETRY_MAX_NS, max(RETRY_FIRST_NS, 2 * pause_ns))
