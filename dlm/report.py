"""What `dlmctl` shows: plain values for JSON, from one member's state.

`about` is what one member knows of a name; `explain` puts the answers of all members together
into the wait chain: who waits, who is in the way, and what those wait for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import UsageError
from cluster.ids import Instance
from cluster.locks import Mode
from dlm.cache import LockCache
from dlm.lockspace import Lockspace
from dlm.messages import NO_MODE
from dlm.resource import MasterLock, Resource

ROWS_MAX = 10_000
CHAIN_MAX = 16

Row = dict[str, Any]


def text(name: bytes) -> str:
    """A resource name for people: as it is if printable, else in hex."""
    plain = name.isascii() and name.decode("ascii").isprintable() and not name.startswith(b"0x")
    return name.decode("ascii") if plain else "0x" + name.hex()


def parse(name: str) -> bytes:
    """The inverse of `text`. Raises UsageError."""
    try:
        return bytes.fromhex(name[2:]) if name.startswith("0x") else name.encode("ascii")
    except ValueError as error:
        raise UsageError(f"{name!r} is no resource name") from error


def mode_name(mode: int) -> str | None:
    return Mode(mode).name if mode != NO_MODE else None


def space(group: str, core: Lockspace, cache: LockCache) -> Row:
    """One line of `dlmctl spaces`."""
    return {
        "space": group,
        "instance": str(core.me),
        "members": [str(one) for one in sorted(core.members)],
        "view": list(core.view),
        "recovery": core.recovery.phase,
        "dead": [str(one) for one in sorted(core.dead)],
        "silent": [str(one) for one in sorted(core.silent)],
        "cached": len(cache),
        "locks": len(core.owner.locks),
        "mastered": len(core.master.resources),
        "directory": len(core.directory.records),
        "leaving": core.recovery.leaving,
    }


def _lock(core: Lockspace, lock: MasterLock) -> Row:
    row: Row = {"owner": str(lock.owner), "mode": mode_name(lock.granted)}
    if lock.requested != NO_MODE:
        row["wants"] = mode_name(lock.requested)
        row["waited_ms"] = max(0, core.now_ns - lock.since_ns) // 1_000_000
    if lock.dead:
        row["dead"] = True
        row["assumed"] = lock.phantom
    return row


def resource(core: Lockspace, what: Resource) -> Row:
    """The queues of a resource mastered here."""
    return {
        "name": text(what.name),
        "master": str(core.me),
        "granted": [_lock(core, lock) for lock in what.granted],
        "converting": [_lock(core, lock) for lock in what.converting],
        "waiting": [_lock(core, lock) for lock in what.waiting],
        "lvb_valid": what.lvb_valid,
        "lvb_seq": what.lvb_seq,
    }


def locks(core: Lockspace, cache: LockCache) -> list[Row]:
    """What this process holds or wants."""
    rows: list[Row] = []
    for name, row in cache.describe():
        mine = core.owner.resources.get(name)
        known = mine.master if mine is not None else None
        rows.append({"name": text(name), **row, "master": str(known) if known else None})
        if len(rows) >= ROWS_MAX:
            break
    return rows


def waiting_for(core: Lockspace) -> list[str]:
    """The names that this process has asked for and not got."""
    found = {text(lock.resource.name) for lock in core.owner.locks.values() if lock.pending}
    return sorted(found)


def waiters(core: Lockspace) -> list[Row]:
    """The resources mastered here for which somebody waits."""
    rows = []
    for what in core.master.resources.values():
        if what.waiting or what.converting:
            rows.append(resource(core, what))
            if len(rows) >= ROWS_MAX:
                break
    return rows


def dump(core: Lockspace, cache: LockCache) -> Row:
    """Everything, bounded."""
    mastered = list(core.master.resources.values())[:ROWS_MAX]
    return {
        "mastered": [resource(core, what) for what in mastered],
        "locks": locks(core, cache),
        "waiting_for": waiting_for(core),
    }


def about(core: Lockspace, cache: LockCache, name: bytes) -> Row:
    """What this member knows of one name."""
    what = core.master.resources.get(name)
    mine = cache.find(name)
    return {
        "instance": str(core.me),
        "master": resource(core, what) if what is not None and not what.removing else None,
        "cache": mine.describe() if mine is not None else None,
        "waiting_for": waiting_for(core),
        "recovery": core.recovery.phase,
    }


def link(name: str, answers: Mapping[str, Row], silent: Sequence[Instance]) -> Row:
    """One link of the chain: the name, its master's queues, what the holders say."""
    master = next((row["master"] for row in answers.values() if row.get("master")), None)
    found: Row = {"name": name, "master": None, "granted": [], "waiting": [], "lines": []}
    if master is not None:
        waiting = [*master["converting"], *master["waiting"]]
        found |= {"master": master["master"], "granted": master["granted"], "waiting": waiting}
    found["asked_by"] = [
        owner for owner, row in answers.items() if name in row.get("waiting_for", ())
    ]
    found["no_answer"] = [str(one) for one in silent]
    found["lines"] = _lines(found, answers)
    return found


def _lines(found: Row, answers: Mapping[str, Row]) -> list[str]:
    lines = []
    for lock in found["waiting"]:
        held = f" (holds {lock['mode']})" if lock["mode"] else ""
        lines.append(f"{lock['owner']} waits for {lock['wants']}{held} for {lock['waited_ms']} ms")
    for lock in found["granted"]:
        line = f"{lock['owner']} holds {lock['mode']}"
        if lock.get("dead"):
            kept = "may have held it" if lock.get("assumed") else "held it"
            line += f": it is dead and {kept}; kept until its journal is replayed"
        cache = (answers.get(lock["owner"]) or {}).get("cache")
        if cache:
            state = [f"{cache['holders']} in use"]
            if cache["demoting"]:
                state.append("giving it up")
            elif cache["wanted_by"]:
                state.append("keeps it for its minimal time")
            line += f" ({', '.join(state)})"
        lines.append(line)
    if found["master"] is None and found["asked_by"]:
        lines.append("no member is its master at the moment: a recovery is under way")
    for one in found["no_answer"]:
        lines.append(f"{one} does not answer")
    return lines


def next_names(found: Row, answers: Mapping[str, Row]) -> list[str]:
    """What the holders of this link wait for themselves."""
    names: list[str] = []
    for lock in found["granted"]:
        row = answers.get(lock["owner"]) or {}
        names += [name for name in row.get("waiting_for", ()) if name not in names]
    return names
