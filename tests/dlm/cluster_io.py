"""Lock caches of several members in one trio process, over the in-memory mesh."""

from __future__ import annotations

import contextlib

import trio

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.mesh_memory import MemoryHub
from dlm.lockspace_io import join


def instance(node, number=1, incarnation=1):
    return Instance(NodeId(node), Incarnation(incarnation), InstanceNo(number))


class Hub:
    """A hub that is pumped by a task whenever the scheduler is idle."""

    def __init__(self):
        self.hub = MemoryHub("test")
        self.members = {}
        self.running = True

    async def pump(self):
        while self.running:
            self.hub.settle()
            await trio.lowlevel.checkpoint()

    def names(self):
        return sorted(self.members)

    def crash(self, me):
        self.hub.crash(me)
        self.members.pop(me, None)
        self.hub.view(self.names())

    def left(self, me):
        self.members.pop(me)
        self.hub.view(self.names(), failed=False)


@contextlib.asynccontextmanager
async def cluster(count, **options):
    """`count` members that have joined one after the other."""
    hub = Hub()
    async with contextlib.AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(hub.pump)
        for node in range(1, count + 1):
            me = instance(node)
            mesh = hub.hub.mesh(me)
            hub.members[me] = await stack.enter_async_context(join(mesh, "test", **options))
            hub.hub.view(hub.names())
        for member in list(hub.members.values()):
            await member.wait_member()
        try:
            yield hub, list(hub.members.values())
        finally:
            hub.running = False
            nursery.cancel_scope.cancel()


async def until(condition, seconds=10):
    """Wait for a condition, with a deadline."""
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.001)
