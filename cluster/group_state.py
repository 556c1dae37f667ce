"""Process groups as a replicated value: one pure function applies a sequenced entry.

Every node applies the same entries in the same order and so has the same groups; the events for the
member processes fall out of it. An instance that is barred by a view is `dead` in its groups until
a survivor has replayed its journal (`released`); `silent` are those of the dead that can do nothing
any more (rule R8).
"""

from __future__ import annotations

import msgspec

from cluster.control import GroupEvent, MemberInfo
from cluster.ids import Epoch, Instance
from cluster.messages import (
    Entry,
    GroupsSnapshot,
    GroupState,
    JoinOp,
    LeaveOp,
    ReleasedOp,
    SilentOp,
    ViewOp,
)
from cluster.state import admits

EMPTY = GroupsSnapshot(epoch=Epoch(0), seq=0, groups=[], requests=[], admitted=[])


class Applied(msgspec.Struct):
    """The new snapshot, the events (one per touched group), and whether the operation was legal."""

    snapshot: GroupsSnapshot
    events: list[GroupEvent]
    done: bool = True


def apply_entry(snapshot: GroupsSnapshot, entry: Entry) -> Applied:
    """The groups after one more entry."""
    assert (entry.epoch, entry.seq) > (snapshot.epoch, snapshot.seq)
    groups = {group.name: group for group in snapshot.groups}
    admitted = snapshot.admitted
    match entry.op:
        case JoinOp():
            done, events = _join(groups, admitted, entry, entry.op)
        case LeaveOp(name, instance):
            done, events = _leave(groups, entry, name, instance)
        case SilentOp(instance):
            done, events = _silent(groups, entry, instance)
        case ReleasedOp():
            done, events = _released(groups, entry, entry.op)
        case ViewOp(admitted):
            done, events = _view(groups, entry, admitted)
    kept = [groups[name] for name in sorted(groups) if groups[name].members or groups[name].dead]
    new = GroupsSnapshot(
        epoch=entry.epoch, seq=entry.seq, groups=kept, admitted=admitted,
        requests=_requests(snapshot, entry, admitted),
    )  # fmt: skip
    return Applied(new, events, done)


def _requests(
    snapshot: GroupsSnapshot, entry: Entry, admitted: list[MemberInfo]
) -> list[tuple[int, int, int]]:
    newest = {(node, life): number for node, life, number in snapshot.requests}
    if entry.number:
        newest[entry.node, entry.incarnation] = entry.number
    lives = [(int(member.node), int(member.incarnation)) for member in admitted]
    return [(*life, newest[life]) for life in sorted(lives) if life in newest]


def _event(entry: Entry, group: GroupState, kind: str) -> GroupEvent:
    return GroupEvent(
        group=group.name, epoch=entry.epoch, seq=entry.seq, kind=kind, members=group.members,
        dead=group.dead, silent=group.silent,
    )  # fmt: skip


def _join(
    groups: dict[str, GroupState], admitted: list[MemberInfo], entry: Entry, op: JoinOp
) -> tuple[bool, list[GroupEvent]]:
    group = groups.get(op.group, GroupState(op.group, []))
    instance = op.member.instance
    if not admits(admitted, instance) or instance in group.dead:
        return False, []
    if any(member.instance == instance for member in group.members):
        return True, []
    members = sorted([*group.members, op.member], key=lambda member: member.instance)
    group = msgspec.structs.replace(group, members=members)
    groups[op.group] = group
    return True, [msgspec.structs.replace(_event(entry, group, "view"), joined=[instance])]


def _leave(
    groups: dict[str, GroupState], entry: Entry, name: str, instance: Instance
) -> tuple[bool, list[GroupEvent]]:
    group = groups.get(name)
    if group is None or all(member.instance != instance for member in group.members):
        return True, []
    members = [member for member in group.members if member.instance != instance]
    group = msgspec.structs.replace(group, members=members)
    groups[name] = group
    return True, [msgspec.structs.replace(_event(entry, group, "view"), left=[instance])]


def _silent(
    groups: dict[str, GroupState], entry: Entry, instance: Instance
) -> tuple[bool, list[GroupEvent]]:
    events = []
    for name in sorted(groups):
        group = groups[name]
        if instance not in group.dead or instance in group.silent:
            continue
        group = msgspec.structs.replace(group, silent=sorted([*group.silent, instance]))
        groups[name] = group
        event = _event(entry, group, "silent")
        events.append(msgspec.structs.replace(event, subject=instance))
    return True, events


def _released(
    groups: dict[str, GroupState], entry: Entry, op: ReleasedOp
) -> tuple[bool, list[GroupEvent]]:
    group = groups.get(op.group)
    if group is None or op.subject not in group.dead:
        return True, []
    by_member = any(member.instance == op.by for member in group.members)
    if op.subject not in group.silent or not by_member:
        return False, []
    group = msgspec.structs.replace(
        group,
        dead=[instance for instance in group.dead if instance != op.subject],
        silent=[instance for instance in group.silent if instance != op.subject],
    )
    groups[op.group] = group
    return True, [msgspec.structs.replace(_event(entry, group, "released"), subject=op.subject)]


def _view(
    groups: dict[str, GroupState], entry: Entry, admitted: list[MemberInfo]
) -> tuple[bool, list[GroupEvent]]:
    events = []
    for name in sorted(groups):
        group = groups[name]
        failed = [m.instance for m in group.members if not admits(admitted, m.instance)]
        group = msgspec.structs.replace(
            group,
            members=[member for member in group.members if member.instance not in failed],
            dead=sorted([*group.dead, *failed]),
        )
        groups[name] = group
        event = _event(entry, group, "view")
        events.append(msgspec.structs.replace(event, failed=failed))
    return True, events
