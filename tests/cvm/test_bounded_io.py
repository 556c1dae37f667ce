"""A command that is interrupted keeps its lock until what it has sent to a disk is done."""

import pytest
import trio
import trio.testing

from cluster.device_memory import MemoryDevice
from cvm.bounded_io import BoundedDevice

BLOCK = bytes(4096)
CALLS = {
    "write": (0, BLOCK),
    "write_many": ([(0, BLOCK)],),
    "write_zeroes": (0, 4096),
    "discard": (0, 4096),
}


@pytest.mark.trio
@pytest.mark.parametrize("name", CALLS)
async def test_who_is_interrupted_waits_for_what_changes_bytes(name, monkeypatch):
    told, done = trio.Event(), []
    disk = MemoryDevice(1 << 20)

    async def slow(*_arguments, **_more):
        await told.wait()
        done.append(name)

    monkeypatch.setattr(disk, name, slow)
    device, scope = BoundedDevice("s1/disk0", disk), trio.CancelScope()

    async def command():
        with scope:
            await getattr(device, name)(*CALLS[name])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(command)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert not done
        told.set()
    assert done == [name]
