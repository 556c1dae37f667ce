"""The verbs over in-memory disks, register and instances."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from cluster.device_memory import MemoryDevice
from cluster.errors import BusyError, RefusedError, StackError, UsageError
from cvm.layout import same_layout
from cvm.seams import Opener
from tests.cvm.fakes import MIB, Cluster, instance_of, open_on


def run(scenario) -> None:
    trio.run(scenario)


async def make_vg(cluster: Cluster) -> None:
    manager = cluster.manager()
    await manager.call("pvcreate", {"pvs": ["s1/disk0", "s2/disk0"]})
    await manager.call("vgcreate", {"vg": "vg0", "pvs": ["s1/disk0", "s2/disk0"]})


async def make_volume(cluster: Cluster, size: str = "64m", stripes: int = 2) -> None:
    await make_vg(cluster)
    params = {"vg": "vg0", "name": "vol0", "size": size, "stripes": stripes, "stripe_size": "64k"}
    await cluster.manager().call("lvcreate", params)


def test_the_usual_way() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        manager = cluster.manager()
        answer = await manager.call("pvcreate", {"pvs": ["s1/disk0", "s2/disk0"]})
        assert answer["messages"][0] == 'Physical volume "s1/disk0" successfully created.'
        answer = await manager.call("vgcreate", {"vg": "vg0", "pvs": ["s1/disk0", "s2/disk0"]})
        assert answer["messages"] == ['Volume group "vg0" successfully created']
        params = {"vg": "vg0", "name": "vol0", "size": "50m", "stripes": 2, "stripe_size": "64"}
        answer = await manager.call("lvcreate", params)
        assert answer["messages"] == [
            "Rounding size (13 extents) up to stripe boundary size (14 extents).",
            'Logical volume "vol0" created.',
        ]
        other = cluster.manager(2)
        [vg] = (await other.call("vgs", {}))["rows"]
        assert (vg["pv_count"], vg["lv_count"], vg["vg_free"]) == (2, 1, (62 - 14) * 4 * MIB)
        [lv] = (await other.call("lvs", {"names": ["vg0/vol0"]}))["rows"]
        assert (lv["lv_size"], lv["stripes"], lv["stripe_size"]) == (56 * MIB, 2, 64 * 1024)
        assert lv["devices"] == "s1/disk0(0),s2/disk0(0)"
        with pytest.raises(RefusedError):
            await manager.call("lvremove", {"volumes": ["vg0/vol0"]})
        await manager.call("lvremove", {"volumes": ["vg0/vol0"], "yes": True})
        await manager.call("vgremove", {"vgs": ["vg0"]})
        await manager.call("pvremove", {"pvs": ["s1/disk0", "s2/disk0"]})
        assert cluster.entries() == {}
        assert (await manager.call("pvs", {}))["rows"] == []

    run(scenario)


def test_extend_of_an_open_volume_reaches_all_and_moves_nothing() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        first = await open_on(cluster, "vg0/vol0", 1)
        second = await open_on(cluster, "vg0/vol0", 2)
        old = first.map
        answer = await cluster.manager(2).call("lvextend", {"volume": "vg0/vol0", "size": "+32m"})
        assert answer["messages"][0] == (
            "Size of logical volume vg0/vol0 changed from 64.00 MiB (16 extents) "
            "to 96.00 MiB (24 extents)."
        )
        assert first.open
        assert second.open
        assert first.map == second.map
        assert old is not None
        assert first.map is not None
        assert first.map.size_bytes == 96 * MIB
        assert not same_layout(old, first.map)
        assert first.map.segments[0].stripes == old.segments[0].stripes
        assert cluster.entries()["vg0"].change is None

    run(scenario)


def test_refusals_name_what_to_do() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        await open_on(cluster, "vg0/vol0", 1)
        manager = cluster.manager(2)
        bad: list[tuple[str, dict, type[StackError], str]] = [
            ("lvremove", {"volumes": ["vg0/vol0"], "yes": True}, BusyError, "in use"),
            ("vgremove", {"vgs": ["vg0"], "yes": True}, BusyError, "in use"),
            ("pvremove", {"pvs": ["s1/disk0"]}, BusyError, "used by VG"),
            ("pvcreate", {"pvs": ["s1/disk0"], "yes": True}, BusyError, "already in"),
            ("pvcreate", {"pvs": ["s9/disk0"]}, StackError, "No device found"),
            ("vgcreate", {"vg": "vg0", "pvs": ["s1/disk0"]}, StackError, "already exists"),
            ("vgcreate", {"vg": "a b", "pvs": ["s1/disk0"]}, UsageError, "invalid"),
            ("vgextend", {"vg": "vg9", "pvs": ["s1/disk0"]}, StackError, "not found"),
            ("lvcreate", {"vg": "vg0", "name": "vol0", "size": "4m"}, StackError, "exists"),
            ("lvcreate", {"vg": "vg0", "size": "1t"}, StackError, "insufficient free space"),
            ("lvcreate", {"vg": "vg0", "size": "4m", "stripes": 3}, StackError, "Insufficient"),
            ("lvcreate", {"vg": "vg0"}, UsageError, "either size or extents"),
            ("lvcreate", {"vg": "vg0", "size": "4m", "wrong": 1}, UsageError, "wrong"),
            ("lvextend", {"volume": "vg0/vol0", "size": "4m"}, StackError, "not larger"),
            ("lvextend", {"volume": "vol0", "size": "4m"}, UsageError, "not a volume name"),
            ("lvs", {"names": ["vg0/none"]}, StackError, "Failed to find"),
            ("nonsense", {}, UsageError, "No such command"),
        ]
        for verb, params, kind, text in bad:
            with pytest.raises(kind, match=text):
                await manager.call(verb, params)
        assert cluster.entries()["vg0"].sequence == 2

    run(scenario)


def test_dry_run_changes_nothing() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        manager = cluster.manager()
        params = {"vg": "vg0", "pvs": ["s1/disk0"], "dry_run": True}
        answer = await manager.call("vgcreate", params)
        assert answer["messages"][-1] == 'Volume group "vg0" successfully created'
        assert cluster.entries() == {}
        await make_volume(cluster)
        before = cluster.entries()
        for verb, more in {
            "lvcreate": {"vg": "vg0", "extents": "100%FREE"},
            "lvextend": {"volume": "vg0/vol0", "size": "+4m"},
            "lvremove": {"volumes": ["vg0"]},
            "vgremove": {"vgs": ["vg0"]},
        }.items():
            assert (await manager.call(verb, {**more, "dry_run": True}))["messages"]
        assert cluster.entries() == before

    run(scenario)


def test_modes_exclude_each_other_as_locks_do() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        await open_on(cluster, "vg0/vol0", 1)
        manager = cluster.manager(2)

        def opener(mode: str, node: int = 2) -> Opener:
            return Opener("vg0/vol0", instance_of(node, 7), f"n{node}", mode, "mkfs")

        for mode in ("readonly", "exclusivewrite", "exclusive"):
            with pytest.raises(BusyError, match="sharedwrite"):
                await manager.open_volume(opener(mode))
        await manager.open_volume(opener("sharedread"))
        with pytest.raises(UsageError):
            await manager.open_volume(opener("loud"))
        await manager.call("activate", {"volume": "vg0/vol0"})
        [row] = (await manager.call("lvs", {}))["rows"]
        assert (row["lv_attr"], row["lv_open_count"]) == ("-wi-ao----", 3)
        with pytest.raises(BusyError):
            await manager.call("deactivate", {"volume": "vg0/vol0"})
        await manager.close_volume("vg0/vol0", instance_of(2, 7))
        await manager.call("deactivate", {"volume": "vg0/vol0"})

    run(scenario)


def test_activation_reserves_the_volume_for_its_node() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        await cluster.manager(1).call("activate", {"volume": "vg0/vol0", "mode": "exclusive"})
        mine = Opener("vg0/vol0", instance_of(1, 3), "n1", "exclusive", "mkfs")
        await cluster.manager(1).open_volume(mine)
        with pytest.raises(BusyError):
            await open_on(cluster, "vg0/vol0", 2)

    run(scenario)


def test_freed_extents_are_used_again_only_behind_a_raised_minimum() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        manager = cluster.manager()
        await manager.call("lvcreate", {"vg": "vg0", "name": "other", "size": "4m"})
        other = await open_on(cluster, "vg0/other", 2)
        await manager.call("lvremove", {"volumes": ["vg0/vol0"], "yes": True})
        freed = cluster.entries()["vg0"].sequence
        assert cluster.minimums == {}
        await manager.call("lvcreate", {"vg": "vg0", "name": "again", "size": "8m", "stripes": 2})
        assert cluster.minimums == {"s1/disk0": freed, "s2/disk0": freed}
        assert other.map is not None
        assert other.map.sequence >= freed
        cluster.minimums.clear()
        await manager.call("lvcreate", {"vg": "vg0", "name": "more", "size": "8m", "stripes": 2})
        assert cluster.minimums == {}

    run(scenario)


def test_a_group_of_disks_that_another_group_had_is_not_too_old_for_their_servers() -> None:
    """vgcreate begins above the minimum that is left on its PVs, vgextend rises above it, and the
    metadata that counts is not written over."""

    async def scenario() -> None:
        for more in range(4):
            cluster = Cluster({f"s{number}/disk0": 64 * MIB for number in range(1, 4)})
            await make_volume(cluster, "32m")
            manager = cluster.manager()
            for _ in range(more):
                await manager.call("lvcreate", {"vg": "vg0", "name": "", "size": "4m"})
            await manager.call("lvremove", {"volumes": ["vg0"], "yes": True})
            again = {"vg": "vg0", "name": "again", "size": "8m", "stripes": 2}
            await manager.call("lvcreate", again)
            await manager.call("vgremove", {"vgs": ["vg0"], "yes": True})
            await manager.call("vgcreate", {"vg": "vg1", "pvs": ["s3/disk0"]})
            await manager.call("vgcreate", {"vg": "vg2", "pvs": ["s2/disk0"]})
            before = cluster.entries()["vg1"].sequence
            await manager.call("vgextend", {"vg": "vg1", "pvs": ["s1/disk0"]})
            assert (cluster.entries()["vg1"].sequence - before) % 2 == 1
            for vg, pv in (("vg1", "s1/disk0"), ("vg2", "s2/disk0")):
                params = {"vg": vg, "name": "vol0", "size": "8m", "pvs": [pv]}
                await manager.call("lvcreate", params)
                opened = await open_on(cluster, f"{vg}/vol0", 2)
                assert opened.map is not None
                assert opened.map.sequence >= cluster.minimums[pv]

    run(scenario)


def test_a_pv_that_does_not_answer_is_shown_and_stops_changes_only() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        cluster.away.add("s1/disk0")
        manager = cluster.manager(3)
        rows = (await manager.call("pvs", {}))["rows"]
        assert [row["pv_attr"] for row in rows] == ["a-m", "a--"]
        await open_on(cluster, "vg0/vol0", 3)
        [status] = (await manager.call("status", {}))["rows"]
        assert (status["state"], status["lvs"][0]["state"]) == ("DEGRADED", "DEGRADED")
        with pytest.raises(StackError, match="does not answer"):
            await manager.call("lvextend", {"volume": "vg0/vol0", "size": "+8m"})
        cluster.away.clear()
        await manager.call("lvextend", {"volume": "vg0/vol0", "size": "+8m"})
        assert all(one.open for one in cluster.instances)

    run(scenario)


class SlowDisk(MemoryDevice):
    """Zeroes are written when it is told to, also if their caller has gone: as by our client, while
    the server is away."""

    def __init__(self, size_bytes: int, nursery: trio.Nursery) -> None:
        super().__init__(size_bytes)
        self._nursery = nursery
        self.asked, self.told = trio.Event(), trio.Event()

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        done = trio.Event()

        async def carry_out() -> None:
            await self.told.wait()
            await MemoryDevice.write_zeroes(self, offset_bytes, length_bytes)
            done.set()

        self._nursery.start_soon(carry_out)
        self.asked.set()
        await done.wait()


def test_what_an_interrupted_command_has_sent_comes_over_nothing_later() -> None:
    """pvcreate is interrupted while its server does not answer. The next user of the disk waits."""

    async def scenario() -> None:
        cluster = Cluster()
        async with trio.open_nursery() as nursery:
            disk = cluster.disks["s1/disk0"] = SlowDisk(128 * MIB, nursery)
            interrupted, ended = trio.CancelScope(), trio.Event()

            async def first() -> None:
                with interrupted:
                    await cluster.manager(1).call("pvcreate", {"pvs": ["s1/disk0"]})

            async def second() -> None:
                await cluster.manager(2).call("vgcreate", {"vg": "vg0", "pvs": ["s1/disk0"]})
                ended.set()

            nursery.start_soon(first)
            await disk.asked.wait()
            interrupted.cancel()
            disk.write_zeroes = partial(MemoryDevice.write_zeroes, disk)  # it answers the others
            nursery.start_soon(second)
            with trio.fail_after(30):
                while not (ended.is_set() or cluster.locks["pvs"].statistics().tasks_waiting):  # noqa: ASYNC110
                    await trio.sleep(0.001)
            disk.told.set()
        [row] = (await cluster.manager(3).call("pvs", {}))["rows"][:1]
        assert (row["pv_name"], row["vg_name"], row["pv_attr"]) == ("s1/disk0", "vg0", "a--")
        await cluster.manager(3).call("lvcreate", {"vg": "vg0", "name": "vol0", "size": "8m"})

    run(scenario)


def test_a_disk_that_has_another_name_now_is_not_taken_for_a_free_one() -> None:
    """Its export was renamed, or two servers show it: the group that has it would lose its data."""

    async def scenario() -> None:
        for verb, params in (
            ("pvcreate", {"pvs": ["s3/new"], "yes": True}),
            ("pvremove", {"pvs": ["s3/new"], "yes": True}),
            ("vgcreate", {"vg": "vg1", "pvs": ["s3/new"], "yes": True}),
            ("vgextend", {"vg": "vg0", "pvs": ["s3/new"], "yes": True}),
        ):
            cluster = Cluster({f"s{number}/disk0": 64 * MIB for number in range(1, 4)})
            await make_volume(cluster, "32m")
            cluster.disks["s3/new"] = cluster.disks["s1/disk0"]
            before = cluster.disks["s1/disk0"].snapshot()
            with pytest.raises(BusyError, match='physical volume "s1/disk0" of volume group "vg0"'):
                await cluster.manager().call(verb, params)
            whole = before.size_bytes
            assert await before.read(0, whole) == await cluster.disks["s3/new"].read(0, whole)

    run(scenario)


def test_copies_of_a_disk_are_not_two_disks() -> None:
    async def scenario() -> None:
        cluster = Cluster({f"s{number}/disk0": 64 * MIB for number in range(1, 3)})
        manager = cluster.manager()
        await manager.call("pvcreate", {"pvs": ["s1/disk0"]})
        cluster.disks["s2/disk0"] = cluster.disks["s1/disk0"].snapshot()
        pvs = ["s1/disk0", "s2/disk0"]
        with pytest.raises(RefusedError, match="one label"):
            await manager.call("vgcreate", {"vg": "vg0", "pvs": pvs})
        await manager.call("pvcreate", {"pvs": ["s2/disk0"]})
        await manager.call("vgcreate", {"vg": "vg0", "pvs": pvs})

    run(scenario)


def test_a_device_with_foreign_data_needs_yes() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        partition = bytes.fromhex("0000020083000201 00080000 00100000")
        sector = bytes(446) + partition + bytes(48) + b"\x55\xaa"
        await cluster.disks["s1/disk0"].write(0, sector)
        with pytest.raises(RefusedError, match="dos partition table"):
            await cluster.manager().call("pvcreate", {"pvs": ["s1/disk0"]})
        await cluster.manager().call("pvcreate", {"pvs": ["s1/disk0"], "yes": True})

    run(scenario)


def test_metadata_survives_a_power_cut_of_a_server() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        for disk in cluster.disks.values():
            disk.crash()
        [row] = (await cluster.manager(2).call("lvs", {}))["rows"]
        assert row["lv_size"] == 64 * MIB

    run(scenario)


def test_history_keeps_every_version() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_volume(cluster)
        await cluster.manager().call("lvextend", {"volume": "vg0/vol0", "extents": "+4"})
        versions = (await cluster.manager(2).call("history", {"vg": "vg0"}))["versions"]
        assert [one["sequence"] for one in versions] == [1, 2, 3]
        assert versions[1]["description"] == "lvcreate vg0/vol0"

    run(scenario)


def test_two_nodes_changing_one_group_take_turns() -> None:
    async def scenario() -> None:
        cluster = Cluster()
        await make_vg(cluster)
        async with trio.open_nursery() as nursery:
            for number in range(6):
                params = {"vg": "vg0", "name": f"v{number}", "size": "8m"}
                nursery.start_soon(cluster.manager(1 + number % 3).call, "lvcreate", params)
        rows = (await cluster.manager().call("lvs", {}))["rows"]
        assert len(rows) == 6
        assert cluster.entries()["vg0"].sequence == 7

    run(scenario)
