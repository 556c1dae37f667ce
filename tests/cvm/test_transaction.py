"""A coordinator may die at any call: the next one finishes or undoes the change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import trio

from cluster.errors import StackError
from cvm.layout import VolumeMap
from tests.cvm.fakes import Cluster, Crash, Faults, open_on
from tests.cvm.test_manager import make_volume

VERBS = {
    "lvextend": {"volume": "vg0/vol0", "size": "+16m"},
    "lvcreate": {"vg": "vg0", "name": "vol1", "size": "8m"},
    "lvremove": {"volumes": ["vg0/gone"], "yes": True},
    "vgextend": {"vg": "vg0", "pvs": ["s3/disk0"]},
    "vgcreate": {"vg": "vg1", "pvs": ["s3/disk0"]},
    "vgremove": {"vgs": ["vg2"]},
}
MIB = 1 << 20
DISKS = {f"s{number}/disk0": 64 * MIB for number in range(1, 5)}


async def _prepared() -> Cluster:
    """A cluster where every verb of the table can be carried out, with a volume open twice."""
    cluster = Cluster(DISKS)
    await make_volume(cluster, "32m")
    manager = cluster.manager()
    await manager.call("lvcreate", {"vg": "vg0", "name": "gone", "size": "8m"})
    await manager.call("vgcreate", {"vg": "vg2", "pvs": ["s4/disk0"]})
    await manager.call("pvcreate", {"pvs": ["s3/disk0"]})
    await open_on(cluster, "vg0/vol0", 1)
    await open_on(cluster, "vg0/vol0", 2)
    return cluster


async def _attempt(cluster: Cluster, verb: str, faults: Faults) -> str:
    """Carry the verb out on node 1: ok, crash or error."""
    faults.observe = cluster.check_maps
    try:
        await cluster.manager(1, faults).call(verb, VERBS[verb])
    except Crash:
        return "crash"
    except StackError:
        return "error"
    return "ok"


async def _check_settled(cluster: Cluster) -> None:
    """Nobody is suspended, all maps are the committed one, and the VG can be changed again."""
    cluster.check_maps()
    manager = cluster.manager(3)
    maps: list[VolumeMap] = []
    for instance in cluster.instances:
        assert instance.open, "an instance stayed suspended"
        assert instance.map is not None
        maps.append(instance.map)
    assert len({(one.size_bytes, one.segments) for one in maps}) == 1
    for name, entry in cluster.entries().items():
        assert entry.change is None, f"{name} has an unfinished change"
        assert entry.sequence > 0
    [row] = (await manager.call("lvs", {"names": ["vg0/vol0"]}))["rows"]
    assert row["lv_size"] == maps[0].size_bytes
    await manager.call("lvextend", {"volume": "vg0/vol0", "size": "+8m"})
    assert all(one.map.size_bytes == row["lv_size"] + 8 * MIB for one in cluster.instances)


async def _call_count(verb: str) -> int:
    faults = Faults()
    assert await _attempt(await _prepared(), verb, faults) == "ok"
    return faults.count


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("when", ["crash_before", "crash_after"])
def test_crash_at_every_step_is_finished_or_undone(verb: str, when: str) -> None:
    async def scenario() -> None:
        for number in range(await _call_count(verb)):
            cluster = await _prepared()
            faults = Faults()
            setattr(faults, when, number)
            assert await _attempt(cluster, verb, faults) == "crash"
            for disk in cluster.disks.values():
                disk.crash(lambda piece: piece % 2 == 0, atom_bytes=4096)
            survivor = Faults()
            survivor.observe = cluster.check_maps
            await cluster.manager(2, survivor).recover()
            await _check_settled(cluster)

    trio.run(scenario)


def test_crash_of_the_survivor_too() -> None:
    """The one who takes over may die as well, at each of its own steps."""

    async def scenario() -> None:
        for first in range(await _call_count("lvextend")):
            for second in range(30):
                cluster = await _prepared()
                faults = Faults()
                faults.crash_after = first
                await _attempt(cluster, "lvextend", faults)
                again = Faults()
                again.crash_after = second
                again.observe = cluster.check_maps
                try:
                    await cluster.manager(2, again).recover()
                except Crash:
                    await cluster.manager(3).recover()
                    await _check_settled(cluster)
                    continue
                await _check_settled(cluster)
                break

    trio.run(scenario)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("when", ["fail_at", "fail_after"])
def test_failure_of_every_step_leaves_nobody_suspended(verb: str, when: str) -> None:
    """A call that fails, or whose answer is lost: the verb ends or says so; nothing hangs."""

    async def scenario() -> None:
        for number in range(await _call_count(verb)):
            cluster = await _prepared()
            before = cluster.entries()
            faults = Faults()
            setattr(faults, when, number)
            outcome = await _attempt(cluster, verb, faults)
            if outcome == "ok":
                assert cluster.entries() != before
            await cluster.manager(2).recover()
            await _check_settled(cluster)

    trio.run(scenario)


def test_a_late_commit_of_an_overtaken_coordinator_fails() -> None:
    """A coordinator that lost its lock without knowing cannot commit once somebody has taken its
    change over, however far that one has got."""

    async def scenario() -> None:
        for steps in range(1, 12):
            cluster = await _prepared()
            manager = cluster.manager(1)
            register = manager._node.register
            compare_and_set = register.compare_and_set
            outcomes = []

            async def slow(
                vg, expected, new, cluster=cluster, steps=steps, real=compare_and_set, out=outcomes
            ):
                if new is None or expected is None or new.sequence == expected.sequence:
                    return await real(vg, expected, new)
                cluster.locks.clear()
                overtaking = Faults()
                overtaking.crash_after = steps
                try:
                    await cluster.manager(2, overtaking).recover()
                except Crash:
                    pass
                out.append("compare_and_set" in overtaking.names)
                return await real(vg, expected, new)

            register.compare_and_set = slow
            if steps < 2:
                await manager.call("lvextend", VERBS["lvextend"])
            else:
                with pytest.raises(StackError, match="took over"):
                    await manager.call("lvextend", VERBS["lvextend"])
            assert outcomes == [steps >= 2]
            await cluster.manager(3).recover()
            await _check_settled(cluster)

    trio.run(scenario)


def test_a_group_that_cannot_be_settled_holds_up_no_other() -> None:
    async def scenario() -> None:
        cluster = await _prepared()
        await cluster.manager().call("lvcreate", {"vg": "vg2", "name": "vol0", "size": "8m"})
        away = await open_on(cluster, "vg2/vol0", 1)
        for volume in ("vg2/vol0", "vg0/vol0"):
            faults = Faults()
            faults.observe = partial(_end_suspended, cluster, faults, volume)
            with pytest.raises(Crash):
                await cluster.manager(1, faults).call("lvextend", {"volume": volume, "size": "+8m"})
        cluster.groups.sort(key=lambda group: group.name, reverse=True)
        cluster.away.add("s4/disk0")
        with pytest.raises(StackError, match="Cannot read the metadata"):
            await cluster.manager(2).recover()
        assert [one for one in cluster.instances if not one.open] == [away]
        cluster.away.clear()
        assert await cluster.manager(2).recover() == ["vg2"]
        assert away.open

    trio.run(scenario)


def _deliver(messages: list[Callable[[], None]]) -> None:
    for message in messages:
        with contextlib.suppress(StackError):
            message()


def test_a_late_message_of_an_overtaken_coordinator_moves_no_gate() -> None:
    """Whatever a coordinator has sent may arrive after the next one has settled its change, and
    again in the middle of the next change."""

    async def scenario() -> None:
        for number in range(await _call_count("lvextend")):
            cluster, sent, faults = await _prepared(), [], Faults()
            faults.post = lambda message, sent=sent: (sent.append(message), message())
            faults.crash_after = number
            await _attempt(cluster, "lvextend", faults)
            await cluster.manager(2).recover()
            _deliver(sent)
            assert all(one.open for one in cluster.instances), f"suspended, step {number}"
            third = Faults()
            third.observe = partial(_end_suspended, cluster, third, "vg0/vol0")
            with pytest.raises(Crash):
                await cluster.manager(3, third).call("lvextend", VERBS["lvextend"])
            _deliver(sent)
            assert not any(one.open for one in cluster.instances), f"resumed, step {number}"
            await cluster.manager(2).recover()
            await _check_settled(cluster)

    trio.run(scenario)


def _end_suspended(cluster: Cluster, faults: Faults, volume: str) -> None:
    """The coordinator ends as soon as everybody is suspended."""
    if not any(one.open for one in cluster.instances if one.opener.volume == volume):
        faults.crash_after = faults.count - 1
