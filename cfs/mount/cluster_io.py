"""A mount in the cluster: instance, volume, lockspace, guard, and the recovery of dead members.

The group of a file system is its lockspace, `cfs:UUID`. Events of clusterd arrive in order and are
handled synchronously: views go to the volume (data is used in an epoch only on servers that have
installed it), group events to the mesh, the lockspace and `RecoveryCore`.

A member that is still mounting may be the lowest of its group, and what it waits for may hang on
the recovery of a dead one; so it can replay without a mounted file system: the dead one's list of
unlinked files then stays with the journal's slot, and is taken over by the mount that goes on.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import trio

from cfs import stage
from cfs.errors import CorruptionError, FsError
from cfs.file_locks import FileLocks
from cfs.fuse.interrupt_io import InterruptibleRuntime, RequestWaits
from cfs.fuse.pyfuse3_io import fuse
from cfs.lock_names import flock_lock_name, range_lock_name
from cfs.mount.guard_client_io import GuardSession, SharedInodeTable, attach
from cfs.mount.options import MountArguments
from cfs.mount.process_io import Mount
from cfs.mount.recovery import (
    Recovering,
    RecoveryAction,
    RecoveryCore,
    Release,
    Replay,
    replay_unmounted,
)
from cluster.control import GroupEvent, InstanceGranted, ViewInfo
from cluster.control_io import Session, open_session
from cluster.device import BlockDevice
from cluster.errors import StackError
from cluster.ids import Instance
from cluster.mesh_io import TrioMesh, open_mesh
from cluster.paths_io import boottime_ns
from cvm.target_io import VolumeClient, open_volume
from dlm.lockspace_io import LockspaceMember, join
from native.gate import Word

log = logging.getLogger("cfs.mount")

GATE_POLL_S = 0.005
STAMPS_PER_STALL = 8
LATE_LOOKS = 4
"""After a pause of the whole machine the guard gets a moment before anybody acts in its place."""
LEAVE_S = 5.0
MS = 1_000_000
CFS_VERBS = ("df", "journals", "grow", "sync", "counters", "losses", "waiting", "abandon")


class ClusterBackend:
    """Implements `cfs.mount.process_io.Backend`."""

    def __init__(self, arguments: MountArguments, mount: Mount) -> None:
        self.waits = RequestWaits()
        self.table = SharedInodeTable()
        self.volumes = VolumeClient()
        self.granted: InstanceGranted
        self.session: Session
        self.device: BlockDevice
        self.locks: LockspaceMember
        self._arguments = arguments
        self._mount = mount
        self._mesh: TrioMesh | None = None
        self._early: list[GroupEvent] = []
        self._recovery: RecoveryCore
        self._replaying = trio.Lock()
        self._nursery: trio.Nursery
        self._guard: GuardSession | None = None
        self._group = ""
        self._leaving = False

    @property
    def owner(self) -> Instance:
        return self.granted.instance

    @property
    def file_locks(self) -> FileLocks:
        return FileLocks(self.locks.flocks, self.locks.ranges)

    def is_barred(self, instance: Instance) -> bool:
        return self._recovery.gone(instance)

    def is_out(self) -> bool:
        return self._guard is not None and self._guard.gate.word() is Word.BARRED

    # -- beginning ---------------------------------------------------------------------------------

    def handlers(self) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
        """What clusterd may call."""
        found = dict(self.volumes.handlers())
        for verb in CFS_VERBS:
            found[f"cfs.{verb}"] = self._cfs_query(verb)
        for verb in ("spaces", "locks", "waiters", "why", "dump"):
            found[f"dlm.{verb}"] = self._dlm_query(verb)
        found["cfs.locks"] = self._file_locks
        found["dlm.circuits"] = self._circuits
        return found

    async def _circuits(self, _params: dict[str, Any]) -> Any:
        """Which members are not reached: clusterd judges who has to go (rule R9)."""
        return {"unreached": self._mesh.unreached() if self._mesh is not None else []}

    async def _file_locks(self, params: dict[str, Any]) -> Any:
        """Locks of the file `ino` on all nodes."""
        if not self._arguments.cluster_locks:
            raise StackError(
                f"{self._arguments.mountpoint} is mounted with locks=local", hint="see lslocks(8)"
            )
        ino = int(params["ino"])
        found = await self.locks.file_locks([flock_lock_name(ino), range_lock_name(ino)])
        names = {row["id"]: row["name"] for row in await self.session.call("cluster.nodes", {})}
        for row in found["locks"]:
            row["node"] = names.get(int(row["instance"].split(".")[0][1:]), "?")
        return found

    def _cfs_query(self, verb: str) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        async def answer(params: dict[str, Any]) -> Any:
            if self._mount.fs is None:
                raise StackError("the file system is still being mounted")
            try:
                found = await self._mount.query(verb, params)
            except FsError as error:
                raise StackError(f"{verb}: {error}") from error
            if verb == "abandon":  # and it is not to come back by itself
                place = {"mountpoint": self._arguments.mountpoint}
                await self.session.call("mounts.forget", place)
            return found

        return answer

    def _dlm_query(self, verb: str) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        async def answer(params: dict[str, Any]) -> Any:
            return await self.locks.query(verb, params)

        return answer

    async def open(self, session: Session, nursery: trio.Nursery) -> None:
        """Register, open the volume; the lockspace comes next."""
        self.session = session
        self._nursery = nursery
        parameters = {
            "kind": "mount", "title": self._arguments.volume, "pid": os.getpid(),
            "mountpoint": self._arguments.mountpoint,
        }  # fmt: skip
        answer = await session.call("instance.register", parameters)
        self.granted = msgspec.convert(answer, InstanceGranted)
        self._recovery = RecoveryCore(self.granted.instance)
        nursery.start_soon(self._watch_session)
        volume = self._arguments.volume
        self.device = await open_volume(
            session, volume, "sharedwrite", self.granted, nursery, self.volumes
        )
        superblock = await stage.read_superblock(self.device)
        self._group = f"cfs:{superblock.uuid.hex()}"

    async def leave_unused(self) -> None:
        """Nothing was written: this is no death that the cluster has to deal with."""
        self._leaving = True
        with trio.move_on_after(LEAVE_S, shield=True), contextlib.suppress(StackError):
            await self.session.call("instance.leave", {})

    async def addresses(self) -> list[str]:
        """Where this node's member processes listen: one address per network."""
        for row in await self.session.call("cluster.nodes", {}):
            if row["id"] == self.granted.instance.node:
                return [str(address) for address in row["addresses"]]
        raise StackError("clusterd does not know its own node")

    @contextlib.asynccontextmanager
    async def join(self) -> AsyncIterator[None]:
        """Be a member of the file system's group and lockspace."""
        addresses = await self.addresses()
        retry_ms = self.granted.timing.link_down_ms
        async with open_mesh(
            self.granted.instance, addresses, group=self._group, retry_ms=retry_ms
        ) as mesh:
            self._mesh = mesh
            async with join(mesh, self._group) as locks:
                self.locks = locks
                locks.on_recovered = lambda: self.tell(
                    "locks.recovered", "what the dead had mastered is rebuilt"
                )
                locks.cache.runtime = InterruptibleRuntime(locks.cache.runtime, self.waits)
                for event in self._early:
                    mesh.group_event(event)
                self._early.clear()
                parameters = {"group": self._group, "addresses": addresses, "port": mesh.port}
                await self.session.call("group.join", parameters)
                await locks.wait_member()
                yield

    # -- events ------------------------------------------------------------------------------------

    def on_event(self, name: str, data: Any) -> None:
        """An event of clusterd, in its order."""
        if name == "view":
            self.volumes.on_view(msgspec.convert(data, ViewInfo))
        elif name == "group":
            self._group_event(msgspec.convert(data, GroupEvent))
        elif name == "barred":
            self._mount.put_out(str(data["reason"]))

    def _group_event(self, event: GroupEvent) -> None:
        if self._mesh is None:
            self._early.append(event)
        else:
            self._mesh.group_event(event)
        self._perform(self._recovery.event(event))

    def _perform(self, actions: list[RecoveryAction]) -> None:
        for action in actions:
            match action:
                case Recovering(recovering):
                    self.recovering = recovering
                    if self._mount.fs is not None:
                        self._mount.fs.set_recovering(recovering)
                case Replay(dead):
                    self._nursery.start_soon(self._replay, dead)
                case Release(dead):
                    self._nursery.start_soon(self._release, dead)

    recovering = False

    async def _replay(self, dead: Instance) -> None:
        try:
            async with self._replaying:
                log.info("replaying the journals of %s", dead)
                fs = self._mount.fs
                if fs is not None:
                    count = await fs.recover(dead, self._recovery.dead)
                else:
                    count = await replay_unmounted(self.device, dead)
        except CorruptionError as error:
            # What it had locked stays locked; all else goes on. Nothing may be released unreplayed.
            log.error("the journal of %s is damaged: %s", dead, error)
            self.tell("journal.damaged", f"{dead} is not replayed: {error}; fsck.cfs")
            return
        except StackError as error:
            log.error("the replay for %s failed: %s", dead, error)
            self._recovery.failed(dead)
            raise
        log.info("replayed %d journals of %s", count, dead)
        self.tell("journal.replayed", f"{count} journals of {dead}", journals=count)
        self._perform(self._recovery.done(dead))

    def tell(self, name: str, text: str, **fields: int) -> None:
        """A line in the node's event stream."""
        self._nursery.start_soon(self._note, {"name": name, "text": text, "fields": fields})

    async def _note(self, parameters: dict[str, Any]) -> None:
        with contextlib.suppress(StackError):  # an event less; what matters is told elsewhere
            await self.session.call("instance.note", parameters)

    async def _release(self, dead: Instance) -> None:
        parameters = {"group": self._group, "instance": msgspec.to_builtins(dead)}
        await self.session.call("group.released", parameters)

    async def _watch_session(self) -> None:
        await self.session.closed.wait()
        if not self._leaving:
            self._mount.fail("clusterd is gone")

    # -- guard -------------------------------------------------------------------------------------

    async def mounted(self, mount: Mount) -> None:
        """Put the mount under guard before anything is answered."""
        assert mount.fs is not None
        mount.fs.set_recovering(self.recovering)
        session = mount.session
        self._guard = await attach(
            self.granted.guard_socket,
            self.granted.instance,
            session.minor,
            session.mountpoint,
            (session.descriptor, self.table.descriptor, fuse.requests_fd()),
        )
        fuse.set_gate(self._guard.gate)
        # The guard does the same; this is for the day when it dies together with clusterd.
        mount.after_abort = lambda: self.table.sweep(session.descriptor)
        self._nursery.start_soon(self._stamp, self._guard)
        await self.session.send_fds(
            "instance.fuse",
            {"connection": session.minor, "mountpoint": session.mountpoint},
            [session.descriptor],
        )
        if not self._arguments.foreground:  # there who started us looks after us
            parameters = {
                "volume": self._arguments.volume, "mountpoint": session.mountpoint,
                "options": list(self._arguments.options),
            }  # fmt: skip
            await self.session.call("instance.mounted", parameters)

    async def _stamp(self, guard: GuardSession) -> None:
        """Show progress; send what a closed gate has kept as soon as it opens."""
        timing = self.granted.timing
        pause_s = min(timing.heartbeat_ms, timing.dead_ms / STAMPS_PER_STALL) / 1000
        late_ns = timing.purge_ms * MS // 2
        late = 0
        while True:
            guard.gate.stamp()
            wait_s = GATE_POLL_S if fuse.gate_flush() else pause_s
            if guard.gate.word() is Word.OPEN:
                left_s = (guard.gate.lease_end() + late_ns - boottime_ns()) / 1e9
                late = late + 1 if left_s < 0 else 0
                if late > LATE_LOOKS:
                    # Guard and clusterd are both stuck; nobody else takes our pages back.
                    self._mount.put_out("the lease has lapsed and its guard does nothing")
                wait_s = min(wait_s, max(GATE_POLL_S, left_s))
            await trio.sleep(wait_s)

    # -- end ---------------------------------------------------------------------------------------

    async def end(self) -> None:
        """The file system is clean: give everything back in order."""
        fuse.set_gate(None)
        if self._guard is not None:
            await self._guard.detach()
            # Until the guard has swept, open files may still read cached pages: keep the locks.
            await self._guard.wait_closed()
        await self.locks.leave()
        await self.session.call("group.leave", {"group": self._group})
        await self.volumes.close(self.session, self._arguments.volume)
        self._leaving = True
        await self.session.call("instance.leave", {})


@contextlib.asynccontextmanager
async def open_cluster(arguments: MountArguments, mount: Mount) -> AsyncIterator[ClusterBackend]:
    """Everything below the file system, for the life of the mount."""
    backend = ClusterBackend(arguments, mount)
    async with open_session(None, backend.handlers(), backend.on_event) as session:
        async with trio.open_nursery() as nursery:
            try:
                await backend.open(session, nursery)
            except StackError:
                await backend.leave_unused()
                raise
            async with backend.join():
                yield backend
            nursery.cancel_scope.cancel()
