"""What has to be done so that a running server has the exports of a changed file. Pure.

Connections stay: only what is not in the file any more loses them. Exports that `gnbdctl add` made
are not the file's business. What cannot be changed while in use refuses the whole reload.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from cluster.errors import ConfigError
from gnbd.exports import Export, ServerConfig

_OF_THE_DISK = ("path", "access", "read_only", "direct")
_OF_THE_PROCESS = (
    "state_dir", "listen", "port", "heartbeat_port", "unix_sockets", "unix_mode", "connections_max",
    "memory_max", "metrics",
)  # fmt: skip


class Plan(msgspec.Struct):
    """`change`: (before, after) of exports that stay."""

    add: list[Export]
    remove: list[str]
    change: list[tuple[Export, Export]]

    def summary(self) -> str:
        """One sentence for people."""
        parts = []
        for word, names in (
            ("added", [e.name for e in self.add]),
            ("removed", self.remove),
            ("changed", [after.name for _, after in self.change]),
        ):
            if names:
                parts.append(f"{word} {', '.join(sorted(names))}")
        return "; ".join(parts) or "nothing has changed"


def plan_reload(before: ServerConfig, after: ServerConfig, by_hand: Iterable[str] = ()) -> Plan:
    """From the file as it was to the file as it is. `by_hand`: names that `gnbdctl add` took.
    Raises ConfigError if a part of it cannot be had without a restart."""
    for field in _OF_THE_PROCESS:
        if getattr(before, field) != getattr(after, field):
            raise ConfigError(f"{field} has changed", hint="that needs a restart of the server")
    old = {e.name: e for e in before.exports}
    new = {e.name: e for e in after.exports}
    for name in by_hand:
        if name in new:
            raise ConfigError(f"export {name!r} was made by gnbdctl", hint="remove it there first")
    plan = Plan([e for n, e in new.items() if n not in old], [n for n in old if n not in new], [])
    for name in old.keys() & new.keys():
        if old[name] != new[name]:
            _check_change(old[name], new[name])
            plan.change.append((old[name], new[name]))
    return plan


def _check_change(before: Export, after: Export) -> None:
    hint = f"remove export {before.name!r} from the file, reload, put it back, reload"
    for field in _OF_THE_DISK:
        if getattr(before, field) != getattr(after, field):
            raise ConfigError(
                f"{field} of export {before.name!r} cannot change while it is served", hint=hint
            )
    volatile = any("volatile" in f for f in (*before.filters, *after.filters))
    if volatile and before.filters != after.filters:
        raise ConfigError(
            f"filters of export {before.name!r} cannot change around 'volatile'", hint=hint
        )
    size, wanted = before.size_bytes, after.size_bytes
    if wanted != size and (wanted is None or (size is not None and wanted < size)):
        raise ConfigError(f"export {before.name!r} only grows", hint=hint)
