"""The life of a mount: open the volume, mount the file system, serve it, end it.

The order of the beginning: locks, file system (replays journals), FUSE mount, guard (leases), and
only then is the mount reported as done. The order of the end after an unmount: the kernel sends
nothing more, the file system writes everything and leaves a clean journal, the locks go back, the
volume closes, the cluster is told. When the file system fails or this instance is barred: the
connection is aborted at once, nothing is written any more, the process ends.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

import trio

from cfs.attributes import MountOptions
from cfs.file_locks import FileLocks
from cfs.filesystem import FileSystem
from cfs.fuse.interrupt_io import RequestWaits
from cfs.fuse.kernel_cache_io import InodeTable, KernelCaches
from cfs.fuse.pyfuse3_io import fuse
from cfs.mount.options import MountArguments
from cfs.mount.session_io import FuseSession
from cfs.mount.system_io import StatusPipe, note_process, settle_memory
from cfs.mount.tasks_io import describe_tasks
from cfs.operations.extension_io import Extensions
from cfs.operations.handlers_io import CfsOperations
from cfs.seams import Environment, Runtime
from cluster.device import BlockDevice
from cluster.errors import BarredError
from cluster.ids import Instance
from cluster.locks import LockManager, Mode
from cluster.paths_io import run_dir
from native.requests import Opcode

log = logging.getLogger("cfs.mount")

BUSY_RETRY_S = 0.5
CONNECTION_POLL_S = 0.5
CONNECTION_GRACE_S = 2.0
ABANDON_ANSWER_S = 0.2
EXIT_OK = 0
EXIT_ABORTED = 1
Query = Callable[[str, dict[str, Any]], Awaitable[Any]]


class Backend(Protocol):
    """Where a mount's blocks and locks come from: a cluster, or one machine alone."""

    @property
    def device(self) -> BlockDevice: ...

    @property
    def locks(self) -> LockManager: ...

    @property
    def owner(self) -> Instance: ...

    @property
    def table(self) -> InodeTable: ...

    @property
    def waits(self) -> RequestWaits: ...

    @property
    def file_locks(self) -> FileLocks | None:
        """Locks of files that hold in the whole cluster; None: the kernel's are enough."""
        ...

    def is_barred(self, instance: Instance) -> bool: ...

    def tell(self, name: str, text: str, **fields: int) -> None:
        """A line in the node's event stream, if there is one. Synchronous; must not raise."""
        ...

    def is_out(self) -> bool:
        """Whether this instance is barred: it must write nothing more, not even to end cleanly."""
        ...

    async def mounted(self, mount: Mount) -> None:
        """The kernel has the mount: put it under guard. Nothing is answered yet."""
        ...

    async def end(self) -> None:
        """Everything is written: give locks and volume back, say good-bye."""
        ...


OpenBackend = Callable[[MountArguments, "Mount"], AbstractAsyncContextManager[Backend]]
MakeFileSystem = Callable[
    [BlockDevice, LockManager, Environment, MountOptions], Awaitable[FileSystem]
]
MakeRuntime = Callable[[trio.Nursery], Runtime]


class KernelBridge:
    """The file system's way to the kernel caches, which exist only once it is mounted."""

    def __init__(self, mount: Mount) -> None:
        self.caches: KernelCaches | None = None
        self._mount = mount

    async def revoke(self, ino: int, mode: Mode) -> None:
        if self.caches is not None:
            await self.caches.revoke(ino, mode)

    def granted(self, ino: int, mode: Mode) -> None:
        if self.caches is not None:
            self.caches.granted(ino, mode)

    def changed(self, ino: int, offset: int, length: int) -> None:
        """Appends are placed by the operations, which settle what the kernel believed."""

    def attributes_changed(self, ino: int) -> None:
        if self.caches is not None:
            self.caches.attributes_changed(ino)

    def failed(self, error: BaseException) -> None:
        if isinstance(error, BarredError):  # a server said so before clusterd did
            self._mount.put_out(str(error))
        else:
            self._mount.fail(f"the file system cannot go on: {error}")


class MountEnvironment:
    """Implements `cfs.seams.Environment`."""

    def __init__(self, runtime: Runtime, bridge: KernelBridge, backend: Backend) -> None:
        self.runtime = runtime
        self.kernel = bridge
        self.owner = backend.owner
        self.is_barred = backend.is_barred
        self._tell = backend.tell

    def damaged(self, block: int, text: str) -> None:
        log.error(text)
        self._tell("fs.damaged", text, block=block)

    def wall_clock_ns(self) -> int:
        return time.time_ns()


class Mount:
    """What the parts of a mount process share."""

    def __init__(self, arguments: MountArguments) -> None:
        self.arguments = arguments
        self.session = FuseSession(arguments)
        self.fs: FileSystem | None = None
        self.operations: CfsOperations | None = None
        self.caches: KernelCaches | None = None
        self.failure = ""
        # An aborted connection still lets open files read cached pages: what drops them.
        self.after_abort: Callable[[], None] = lambda: None
        self.stopping = trio.Event()
        self._scope = trio.CancelScope()
        self._note: Path | None = None

    def fail(self, reason: str) -> None:
        """End at once without writing: the connection is aborted, the process exits."""
        if not self.failure:
            self.failure = reason or "unknown"
            log.error("mount of %s aborted: %s", self.arguments.volume, reason)
            self.session.abort()
            self.after_abort()
            self._scope.cancel()

    def put_out(self, reason: str) -> None:
        """This instance is barred for ever: nothing that it writes is executed any more."""
        self.fail(f"this instance was put out of the cluster: {reason}")

    def stop(self) -> None:
        """End cleanly as soon as the kernel lets go of the mount."""
        self.stopping.set()

    def counters(self) -> dict[str, int]:
        """Requests by operation, and what the revocations did."""
        assert self.operations is not None
        assert self.caches is not None
        caches = self.caches
        return {
            **self.operations.counters,
            "requests": sum(self.operations.counters.values()),
            "launder_waits": self.operations.launder_waits,
            "errors": self.operations.errors,
            "revocations": caches.revocations,
            "notifications": caches.notifications,
            "revoke_stalls": caches.stalls,
            "revoke_served": caches.served,
            "revoke_rounds_max": caches.rounds_max,
            "revoke_detours": caches.detours,
            "inodes": len(caches.inodes),
            "handles": len(self.operations.handles),
            "damage_met": self.operations.fs.damage_met,
        }

    async def query(self, verb: str, params: dict[str, Any]) -> Any:
        """Answer `cfs.<verb>`."""
        assert self.fs is not None
        if verb == "counters":
            return self.counters()
        if verb == "waiting":
            return self.waiting()
        if verb == "abandon":
            lost = await self.fs.query("losses", params)
            trio.lowlevel.spawn_system_task(self._abandon)
            return lost
        return await self.fs.query(verb, params)

    def waiting(self) -> list[dict[str, Any]]:
        """The requests that this mount has not answered yet: operation, inode, thread (0: the
        kernel), for how long, and whether only the answer is kept back (no lease)."""
        now_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        known = Opcode.__members__.values()
        return [
            {
                "operation": Opcode(r.opcode).name.lower() if r.opcode in known else str(r.opcode),
                "ino": r.inode,
                "thread": r.pid,
                "waited_ms": max(0, now_ns - r.start_ns) // 1_000_000,
                "answer_kept": r.answered,
            }
            for r in fuse.pending_requests()
        ]

    async def _abandon(self) -> None:
        """End without writing, when whoever asked for it has been answered."""
        await trio.sleep(ABANDON_ANSWER_S)
        self.fail("abandoned by the administrator")

    async def run(
        self,
        open_backend: OpenBackend,
        make_filesystem: MakeFileSystem,
        make_runtime: MakeRuntime,
        status: StatusPipe,
    ) -> int:
        """Mount, serve, end; returns the exit code."""
        with self._scope:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._watch_for_hangs)
                    async with open_backend(self.arguments, self) as backend:
                        environment = MountEnvironment(
                            make_runtime(nursery), KernelBridge(self), backend
                        )
                        await self._live(backend, environment, make_filesystem, status)
                        await self._end(backend)
                    nursery.cancel_scope.cancel()
            finally:
                self.session.close()
        return EXIT_ABORTED if self.failure else EXIT_OK

    async def _watch_for_hangs(self, task_status: trio.TaskStatus[None]) -> None:
        """SIGUSR2 tells where every task is; it works until the very end."""
        with trio.open_signal_receiver(signal.SIGUSR2) as signals:
            task_status.started()
            async for _ in signals:
                log.info("tasks\n%s", "\n".join(describe_tasks()))

    async def _live(
        self,
        backend: Backend,
        environment: MountEnvironment,
        make_filesystem: MakeFileSystem,
        status: StatusPipe,
    ) -> None:
        options = MountOptions(
            commit_interval_ms=self.arguments.commit_ms,
            read_only=self.arguments.read_only,
            access_times=self.arguments.access_times,
        )
        fs = await make_filesystem(backend.device, backend.locks, environment, options)
        self.fs = fs
        # The mount system call needs operations, the caches need the mounted descriptor.
        caches = KernelCaches(backend.table, fs.root_ino)
        operations = CfsOperations(fs, caches, backend.waits)
        operations.mmap_coherent = self.arguments.mmap_coherent
        if self.arguments.cluster_locks:
            operations.file_locks = backend.file_locks
        extensions = Extensions(operations, operations.extensions())
        self.session.open(operations)
        notifier = self.session.make_notifier()
        notifier.start()
        notifier.probe()
        caches.connect(notifier)
        self.caches, self.operations = caches, operations
        environment.kernel.caches = caches
        note = note_process(run_dir(), self.session.minor)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._watch_signals)  # a signal now must not kill us
                nursery.start_soon(backend.waits.run)
                nursery.start_soon(self._stop_when_asked)
                nursery.start_soon(self._watch_connection)
                if self.arguments.test_demote_ms:
                    nursery.start_soon(demote_at_random, backend.locks, caches, self.arguments)
                # Nothing is answered, so nothing is cached, before the guard can take it back.
                await backend.mounted(self)
                await nursery.start(extensions.run)
                nursery.start_soon(self._serve, extensions, nursery.cancel_scope)
                settle_memory()
                status.report(0)
                log.info("%s is mounted at %s", self.arguments.volume, self.session.mountpoint)
        finally:
            environment.kernel.caches = None  # the kernel caches nothing of us any more
            notifier.stop()
            self._note = note

    async def _serve(self, extensions: Extensions, scope: trio.CancelScope) -> None:
        try:
            await self.session.serve(extensions)
        except OSError as error:
            self.fail(f"the FUSE connection broke: {error}")
        scope.cancel()

    async def _watch_signals(self, task_status: trio.TaskStatus[None]) -> None:
        asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        with trio.open_signal_receiver(*asked) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGUSR1:
                    log.info("counters %s", json.dumps(self.counters()))
                    continue
                if self.stopping.is_set():
                    await self._let_go()
                self.stop()

    async def _stop_when_asked(self) -> None:
        await self.stopping.wait()
        while error := await self.session.try_unmount():
            log.warning("%s is busy: %s", self.session.mountpoint, os.strerror(error))
            await trio.sleep(BUSY_RETRY_S)

    async def _let_go(self) -> None:
        """A second signal: stop although the mount is in use. Nothing written is lost; whoever
        still uses it gets ENOTCONN."""
        assert self.caches is not None
        for number, inode in list(self.caches.inodes.items()):
            if inode.writers:
                await self.caches.drop_all_pages(number)
        self.session.terminate()

    async def _watch_connection(self) -> None:
        """An abort from outside (`umount -f`, the guard) leaves requests in handlers that nobody
        waits for; if they do not end by themselves the process does."""
        while True:
            await trio.sleep(CONNECTION_POLL_S)
            if self.session.is_broken() and self._requests_stuck():
                await trio.sleep(CONNECTION_GRACE_S)
                if self._requests_stuck():
                    self.fail("the connection was aborted")

    def _requests_stuck(self) -> bool:
        assert self.operations is not None
        return bool(self.operations.waits.requests)

    async def _end(self, backend: Backend) -> None:
        """The kernel has let go; leave everything in order."""
        if not self.failure and backend.is_out():
            self.put_out("its guard has ended the mount")
        if self.failure:
            return
        assert self.fs is not None
        # Handles that the kernel never released (an aborted connection) still hold references.
        assert self.operations is not None
        for handle in list(self.operations.handles.values()):
            if not handle.removed:
                self.fs.close_ref(handle.inode.number)
        self.operations.handles.clear()
        await self.fs.unmount()
        await backend.end()
        if self._note is not None:
            self._note.unlink(missing_ok=True)


async def demote_at_random(
    locks: LockManager, caches: KernelCaches, arguments: MountArguments
) -> None:
    """For tests: another member that keeps asking for the locks of inodes the kernel knows."""
    from cfs.lock_names import inode_lock_name

    chooser = random.Random(0)
    while True:
        await trio.sleep(arguments.test_demote_ms / 1000)
        numbers = list(caches.inodes)
        if numbers:
            await locks.drop(inode_lock_name(chooser.choice(numbers)))
