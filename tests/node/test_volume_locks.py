"""Locks of volume groups at a clusterd whose register cannot be decided."""

from __future__ import annotations

import pytest
import trio

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from node.volumes_io import Volumes


class Daemon:
    nursery: trio.Nursery


def holder(later) -> Volumes:
    """It has any lock that it wants, and can give none back."""
    volumes = object.__new__(Volumes)
    volumes._daemon = Daemon()
    volumes._me = Instance(NodeId(1), Incarnation(1), InstanceNo(0))

    async def take(*_arguments) -> bool:
        return True

    async def never(*_arguments) -> bool:
        await trio.sleep_forever()
        raise AssertionError

    async def in_background(name, _mine) -> None:
        later.append(name)

    volumes._try_lock, volumes._swap, volumes._unlock_later = take, never, in_background
    return volumes


@pytest.mark.trio
async def test_who_ends_does_not_wait_for_ever_to_give_a_lock_back(autojump_clock):
    """clusterd stayed, with its socket and without its work, when its guard died under a change."""
    volumes = holder([])
    async with trio.open_nursery() as nursery:
        volumes._daemon.nursery = nursery
    with trio.move_on_after(1) as scope:
        async with volumes.lock("vg0"):
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.trio
async def test_who_goes_on_gives_it_back_later(autojump_clock):
    """The caller is answered meanwhile, or has gone."""
    later = []
    volumes = holder(later)
    async with trio.open_nursery() as nursery:
        volumes._daemon.nursery = nursery
        async with volumes.lock("vg0"):
            pass
        with trio.move_on_after(1):
            async with volumes.lock("vg0"):
                await trio.sleep_forever()
    assert len(later) == 2
    assert later[0].endswith("vg0")
