"""The core's `Runtime` on trio, and an `Environment` for mounts and tools."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable

import trio

from cfs.seams import Event, KernelCache, NoKernel, Runtime
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId

log = logging.getLogger("cfs")

TOOL = Instance(NodeId(0), Incarnation(0), InstanceNo(1))


class TrioRuntime:
    """Tasks in one nursery, which the mount keeps open until after `FileSystem.unmount`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def event(self) -> Event:
        return trio.Event()

    def spawn(self, task: Callable[[], Awaitable[None]], name: str) -> None:
        self._nursery.start_soon(task, name=f"cfs {name}")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def now_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class TrioEnvironment:
    """An `Environment` with the real clock. `is_barred` false for everyone: a mount in a cluster
    gives its own."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        owner: Instance = TOOL,
        kernel: KernelCache | None = None,
        is_barred: Callable[[Instance], bool] = lambda instance: False,
    ) -> None:
        self.runtime = runtime
        self.owner = owner
        self.kernel: KernelCache = kernel or NoKernel()
        self._is_barred = is_barred

    def wall_clock_ns(self) -> int:
        return time.time_ns()

    def damaged(self, block: int, text: str) -> None:
        log.error(text)

    def is_barred(self, instance: Instance) -> bool:
        return self._is_barred(instance)
