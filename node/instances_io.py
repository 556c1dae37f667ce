"""Control methods of instances (mounts, mkfs, fsck, workers), and calls to them.

A session that closes without `instance.leave` is the death of its instance. So is the silence of a
member of a group that is not under guard (it still mounts, or is about to end): others may wait for
it, and no progress stamp tells whether it runs. It is called, and any answer will do.

Calls from elsewhere
(`dlm.*`, `cfs.*`) are passed on to the local instances: with `mountpoint` (or `instance`, a
number) in the parameters to that one, whose result is returned as it is; otherwise to every
instance that knows the method, as a list of `{"instance", "node", "kind", "title", "result"}` (or
`"error"`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import trio

from cfs.mount.system_io import mounted_minor
from cluster.control import GroupMember, InstanceGranted
from cluster.control_io import Handler, Session
from cluster.core_events import GroupJoin, GroupLeave, GroupReleased, InstanceStarted
from cluster.errors import (
    BusyError,
    NotFoundError,
    StackError,
    UnreachableError,
    UsageError,
)
from cluster.events import EventName
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from cluster.paths_io import guard_socket
from cluster.timing import stall_ns
from cluster.wire import instance_secret
from node.circuits_io import CircuitWatch
from node.clusterd_io import Clusterd
from node.instances import NO_METHOD, LocalInstance
from node.remount_io import Remounts
from node.volumes_io import Volumes
from node.wanted import WantedMount

REGISTER_WAIT_S = 60.0
FORWARD_TIMEOUT_S = 30.0
SILENT_STALLS = 2
TEXT_MAX = 1000
FIELDS_MAX = 32


class Instances:
    """The instance part of the control socket."""

    def __init__(self, daemon: Clusterd, volumes: Volumes, remounts: Remounts) -> None:
        self._daemon = daemon
        self._volumes = volumes
        self._remounts = remounts
        self._asked: set[InstanceNo] = set()
        self._circuits = CircuitWatch(daemon)
        daemon.transport.methods["instances.call"] = self._call_from_node

    def handlers(self, session: Session) -> Mapping[str, Handler]:
        """The methods of one session."""

        def bound(method: Any) -> Handler:
            async def handler(params: dict[str, Any]) -> Any:
                instance = self._daemon.instances.of_session(session)
                return await method(instance, params)

            return handler

        async def register(params: dict[str, Any]) -> Any:
            return await self._register(session, params)

        return {
            "instance.register": register,
            "instance.leave": bound(self._leave),
            "instance.fuse": bound(self._fuse),
            "instance.note": bound(self._note),
            "instance.mounted": bound(self._mounted),
            "group.join": bound(self._group_join),
            "group.leave": bound(self._group_leave),
            "group.released": bound(self._group_released),
            "volume.open": bound(self._volumes.open),
            "volume.close": bound(self._volumes.close),
        }

    def detach(self, session: Session) -> None:
        """The session has closed."""
        for instance in list(self._daemon.instances.by_number.values()):
            if instance.session is session:
                self._daemon.end_instance(instance, clean=False, reason="its process ended")

    async def watch(self) -> None:
        """Put out members of groups that are not under guard and do not answer, and those that no
        circuit connects with the others, for ever."""
        period_s = self._daemon.timing.dead_ms / 1000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._circuits.run)
            while True:
                for one in self._daemon.instances.live():
                    unguarded = one.groups and not self._daemon.guard.mountpoint(one.number)
                    if unguarded and one.number not in self._asked:
                        self._asked.add(one.number)
                        nursery.start_soon(self._ping, one)
                await trio.sleep(period_s)

    async def _ping(self, local: LocalInstance) -> None:
        limit_s = SILENT_STALLS * stall_ns(self._daemon.timing) / 1e9
        with trio.move_on_after(limit_s) as scope:
            with contextlib.suppress(StackError):
                await local.session.call("instance.ping", {})
        self._asked.discard(local.number)
        if scope.cancelled_caught:
            self._daemon.end_instance(local, clean=False, reason="it does not answer")

    async def _register(self, session: Session, params: dict[str, Any]) -> InstanceGranted:
        daemon = self._daemon
        if any(one.session is session for one in daemon.instances.by_number.values()):
            raise UsageError("this session has an instance already")
        await daemon.wait_admitted(float(params.get("timeout_s", REGISTER_WAIT_S)))
        if session.closed.is_set():
            raise UnreachableError("the session has closed")
        kind, title = str(params["kind"]), str(params.get("title", ""))
        mountpoint = str(params.get("mountpoint", ""))
        self._refuse_second_mount(mountpoint)
        local = daemon.instances.add(kind, title, session, int(params.get("pid", 0)))
        local.mountpoint = mountpoint
        daemon.step(InstanceStarted(local.number))
        daemon.note(EventName.INSTANCE_STARTED, f"{kind} {title} started", instance=local.number)
        instance = daemon.instance(local.number)
        key = bytes.fromhex(daemon.config.cluster.key)
        return InstanceGranted(
            instance=instance,
            node_name=daemon.config.node.name,
            cluster_id=daemon.config.cluster.id,
            cluster_name=daemon.config.cluster.name,
            secret=instance_secret(key, daemon.cluster_id, instance).hex(),
            timing=daemon.timing,
            servers=daemon.state.servers,
            view=daemon.view,
            guard_socket=str(guard_socket()),
            tls=daemon.config.tls,
        )

    def _refuse_second_mount(self, mountpoint: str) -> None:
        """Two at one place hide each other. A mount that was lazily taken out of the tree, or that
        is over, is in nobody's way."""
        guard = self._daemon.guard
        for one in self._daemon.instances.live():
            if mountpoint and one.mountpoint == mountpoint:
                connection = guard.connection(one.number)
                if connection in (None, mounted_minor(mountpoint)):
                    state = "being mounted" if connection is None else "mounted"
                    raise BusyError(f"{one.title} is {state} at {mountpoint} already")

    async def _mounted(self, local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        """The mount is there; it is to come back whenever it is lost."""
        options = [str(option) for option in params["options"]]
        self._remounts.mounted(
            local.number, WantedMount(str(params["volume"]), str(params["mountpoint"]), options)
        )
        return {}

    async def _leave(self, local: LocalInstance, _params: dict[str, Any]) -> dict[str, Any]:
        """Clean stop: out of its groups and volumes first, then out."""
        local.leaving = True
        for group in sorted(local.groups):
            await self._group_leave(local, {"group": group})
        for volume in sorted(local.volumes):
            await self._volumes.close(local, {"volume": volume})
        instance = self._daemon.instance(local.number)
        self._daemon.end_instance(local, clean=True, reason="left")
        assert self._daemon.nursery is not None
        self._daemon.nursery.start_soon(self._forget_on_servers, instance)
        return {}

    async def _forget_on_servers(self, instance: Instance) -> None:
        """Its registrations may go; if a server does not hear of it, they are only clutter."""
        for server in self._daemon.servers.infos():
            if self._daemon.servers.is_up(server.id):
                try:
                    await self._daemon.servers.ask(
                        server.id, lambda control: control.leave(instance), "leave"
                    )
                except StackError:
                    continue

    async def _fuse(self, _local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        """A duplicate of the FUSE descriptor comes to us through the guard as well; this one only
        proves that it can be had, and is closed again."""
        for fd in params["fds"]:
            os.fstat(fd)
        return {}

    async def _note(self, local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        """An event of the instance for the event stream: `{"name", "text", "fields"}`."""
        name, text = str(params["name"])[:64], str(params.get("text", ""))[:TEXT_MAX]
        given = params.get("fields")
        fields = given if isinstance(given, dict) and len(given) <= FIELDS_MAX else {}
        self._daemon.note(name, text, **{**fields, "instance": local.number})
        return {}

    # --- groups

    async def _group_join(self, local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        group = str(params["group"])
        daemon = self._daemon
        member = GroupMember(
            daemon.instance(local.number),
            daemon.config.node.name,
            [str(address) for address in params["addresses"]] or daemon.config.node.addresses,
            int(params["port"]),
        )
        local.groups.add(group)
        await daemon.ask(lambda n: GroupJoin(n, group, member))
        return {}

    async def _group_leave(self, local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        group = str(params["group"])
        instance = self._daemon.instance(local.number)
        await self._daemon.ask(lambda n: GroupLeave(n, group, instance))
        local.groups.discard(group)
        return {}

    async def _group_released(self, local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        group, subject = str(params["group"]), _instance(params["instance"])
        me = self._daemon.instance(local.number)
        await self._daemon.ask(lambda n: GroupReleased(n, group, subject, me))
        return {}

    # --- calls to instances

    async def forward(self, method: str, params: dict[str, Any]) -> Any:
        """A `dlm.*` or `cfs.*` call of a tool. With `all` in the parameters: on every member."""
        params = {key: value for key, value in params.items() if key != "fds"}
        if not params.pop("all", False):
            return await self._call_local(method, params)
        found: list[Any] = []
        for member in self._daemon.view.members:
            rows = await self._daemon.transport.call(
                member.node, "instances.call", {"method": method, "params": params}
            )
            found += rows if isinstance(rows, list) else [rows]
        return found

    async def _call_from_node(self, _source: NodeId, params: dict[str, Any]) -> Any:
        return await self._call_local(str(params["method"]), dict(params["params"]))

    def _chosen(self, params: dict[str, Any]) -> LocalInstance | None:
        live = self._daemon.instances.live()
        if "instance" in params and isinstance(params["instance"], int):
            for one in live:
                if one.number == params["instance"]:
                    return one
            raise NotFoundError(f"no instance {params['instance']} on this node")
        if "mountpoint" in params:
            wanted = os.path.normpath(str(params["mountpoint"]))
            for one in live:
                at = self._daemon.guard.mountpoint(one.number)
                if wanted in (os.path.normpath(at) if at else "", one.title):
                    return one
            raise NotFoundError(
                f"nothing of this cluster is mounted at {wanted} on this node",
                hint="see: clusterctl status",
            )
        return None

    async def _call_local(self, method: str, params: dict[str, Any]) -> Any:
        chosen = self._chosen(params)
        if chosen is not None:
            return await self._call_one(chosen, method, params)
        rows: list[dict[str, Any]] = []

        async def one(local: LocalInstance) -> None:
            row: dict[str, Any] = {
                "instance": self._daemon.instance(local.number),
                "node": self._daemon.config.node.name,
                "kind": local.kind,
                "title": local.title,
            }
            try:
                row["result"] = await self._call_one(local, method, params)
            except StackError as error:
                if error.message.startswith(NO_METHOD):
                    return
                row["error"] = {"message": error.message, "hint": error.hint}
            rows.append(row)

        async with trio.open_nursery() as nursery:
            for local in self._daemon.instances.live():
                nursery.start_soon(one, local)
        return sorted(rows, key=lambda row: row["instance"])

    async def _call_one(self, local: LocalInstance, method: str, params: dict[str, Any]) -> Any:
        with trio.move_on_after(FORWARD_TIMEOUT_S):
            return await local.session.call(method, params)
        raise BusyError(f"{local.kind} {local.title} does not answer {method}")


def _instance(value: Any) -> Instance:
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise UsageError("an instance is [node, incarnation, number]")
    node, incarnation, number = (int(part) for part in value)
    return Instance(NodeId(node), Incarnation(incarnation), InstanceNo(number))
