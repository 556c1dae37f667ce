"""What a member knows of its lockspace, as plain data for `dlmctl`. Pure."""

from __future__ import annotations

import string
from typing import Any

from cluster.locks import Mode
from dlm.lockspace import Lockspace
from dlm.messages import NO_MODE
from dlm.owner import OwnerLock
from dlm.resource import MasterLock, Resource

ROWS_MAX = 10_000
_PRINTABLE = frozenset(string.printable.encode()) - frozenset(b"\t\n\r\x0b\x0c")


def mode_name(mode: int) -> str:
    """NL .. EX, or "-" for none."""
    return "-" if mode == NO_MODE else Mode(mode).name


def show_name(name: bytes) -> str:
    """A resource name for people: as it is if printable, else in hex."""
    return name.decode() if set(name) <= _PRINTABLE else "0x" + name.hex()


def parse_name(text: str) -> bytes:
    """The inverse of `show_name`. Raises ValueError."""
    return bytes.fromhex(text[2:]) if text.startswith("0x") else text.encode()


def space_row(space: Lockspace, title: str) -> dict[str, Any]:
    """One line of `dlmctl spaces`."""
    return {
        "space": title,
        "member": str(space.me),
        "view": list(space.view),
        "members": [str(one) for one in sorted(space.members)],
        "dead": [str(one) for one in sorted(space.dead)],
        "recovery": space.recovery.phase,
        "locks": len(space.owner.locks),
        "mastered": len(space.master.resources),
    }


def _own_row(space: Lockspace, lock: OwnerLock) -> dict[str, Any]:
    master = lock.resource.master
    return {
        "name": show_name(lock.resource.name),
        "lock": lock.number,
        "granted": mode_name(lock.mode),
        "wanted": mode_name(lock.wanted) if lock.pending else "-",
        "master": str(master) if master is not None else "?",
        "waited_ms": (space.now_ns - lock.since_ns) // 1_000_000 if lock.pending else 0,
    }


def own_locks(space: Lockspace, *, waiting: bool = False) -> list[dict[str, Any]]:
    """The locks of this process, or only those that wait."""
    chosen = (lock for lock in space.owner.locks.values() if not waiting or lock.pending)
    return [_own_row(space, lock) for lock, _ in zip(chosen, range(ROWS_MAX), strict=False)]


def _master_row(lock: MasterLock, queue: str) -> dict[str, Any]:
    return {
        "owner": str(lock.owner),
        "lock": lock.number,
        "queue": queue,
        "granted": mode_name(lock.granted),
        "requested": mode_name(lock.requested),
        "dead": lock.dead,
        "phantom": lock.phantom,
        "told": lock.told != 0,
    }


def resource_row(resource: Resource) -> dict[str, Any]:
    """A resource at its master: its queues in order."""
    rows = [_master_row(lock, "granted") for lock in resource.granted]
    rows += [_master_row(lock, "converting") for lock in resource.converting]
    rows += [_master_row(lock, "waiting") for lock in resource.waiting]
    return {"name": show_name(resource.name), "lvb_valid": resource.lvb_valid, "locks": rows}


def about(space: Lockspace, name: bytes) -> dict[str, Any]:
    """What this member knows of one name."""
    resource = space.master.resources.get(name)
    known = space.owner.resources.get(name)
    locks = [] if known is None else [_own_row(space, lock) for lock in known.locks.values()]
    return {
        "member": str(space.me),
        "resource": None if resource is None else resource_row(resource),
        "locks": locks,
        "recovery": space.recovery.phase,
    }


def everything(space: Lockspace, title: str) -> dict[str, Any]:
    """`dlmctl dump`: bounded."""
    resources = zip(space.master.resources.values(), range(ROWS_MAX), strict=False)
    return {
        **space_row(space, title),
        "own": own_locks(space),
        "resources": [resource_row(resource) for resource, _ in resources],
    }
