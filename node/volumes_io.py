"""The node under the volume manager: register, locks, devices, and the openers of volumes.

Implements the protocols of cvm/seams.py. Volume groups live in the register's value (`data` of a
`VolumeGroup` is the VgEntry; its `sequence` counts the changes of the entry). The locks of the
volume manager are entries of the register too: a lock whose holder is not admitted any more, and
barred on every server that answers, is free; so no lock outlives its node, and none is taken over
before the fence.

Openers are known to the clusterd of their node; questions about all of them go to every member. A
member that cannot be asked must be out of the register and barred on the servers, or the command
fails. A dead local opener counts until it is barred.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import msgspec
import trio

from cluster.control import ServerInfo
from cluster.control_io import run_all
from cluster.device import BlockDevice
from cluster.errors import BusyError, StackError, UnreachableError, UsageError
from cluster.events import EventName
from cluster.ids import Instance, InstanceNo, NodeId, ServerId
from cluster.signatures_io import signature
from cluster.state import (
    ClusterState,
    SetVolumeGroup,
    StateError,
    VolumeGroup,
    admits,
    member_of,
)
from cluster.wire import instance_secret
from cvm.bounded_io import BoundedDevice
from cvm.layout import VolumeMap
from cvm.manager import Identity, Manager, Node
from cvm.seams import ExportInfo, Opener, VgEntry
from gnbd.client.device_io import GnbdDevice, Options, open_device
from node.clusterd_io import CLUSTERD, Clusterd
from node.instances import LocalInstance

LOCK_PREFIX = "lock:"
LOCK_WAIT_S = 60.0
UNLOCK_WAIT_S = 5.0
"""Then it goes on in the background. A clusterd that ends decides nothing any more."""
LOCK_POLL_S = 0.2
SUSPEND_TIMEOUT_S = 60.0
CALL_TIMEOUT_S = 10.0
FENCE_WAIT_S = 30.0
OPEN_DEVICE_S = 20.0
RECOVER_POLL_S = 2.0
DEVICES_MAX = 1024


def _group(state: ClusterState, name: str) -> VolumeGroup | None:
    return next((group for group in state.volume_groups if group.name == name), None)


class Volumes:
    """Implements VgRegister, PhysicalDevices, VolumeInstances and VgLocks for one clusterd."""

    def __init__(self, daemon: Clusterd) -> None:
        self._daemon = daemon
        self._me = daemon.instance(CLUSTERD)
        self._devices: dict[str, GnbdDevice] = {}
        self._opening = trio.Lock()
        self._openers: dict[tuple[str, Instance], Opener] = {}
        identity = Identity(self._me, daemon.config.node.name, daemon.config.cluster.id)
        self.manager = Manager(Node(identity, self, Devices(self), self, self, _new_uuid))
        methods = daemon.transport.methods
        methods["volumes.openers"] = self._openers_here
        methods["volumes.suspend"] = self._suspend_here
        methods["volumes.resume"] = self._resume_here

    async def run(self) -> None:
        """Finish what a dead coordinator left, once it is fenced; keep the devices of clusterd at
        the epoch."""
        while True:
            with trio.move_on_after(RECOVER_POLL_S):
                await self._daemon.wait_changed()
            view = self._daemon.view
            for device in self._devices.values():
                device.set_epoch(view.epoch)
                if device.server.id in view.installed:
                    device.note_installed(view.epoch)
            self._drop_dead_openers()
            coordinator = min((m.node for m in view.members), default=None)
            if coordinator != self._daemon.me or not (view.quorate and self._settled()):
                continue
            if self._has_abandoned_change():
                try:
                    settled = await self.manager.recover()
                except StackError as error:
                    self._daemon.note(EventName.NOTE, f"volume recovery: {error.message}")
                else:
                    for name in settled:
                        self._daemon.note(EventName.VOLUME_CHANGED, f"{name}: change settled")

    def _has_abandoned_change(self) -> bool:
        """A change is noted in the register, but no admitted holder has the lock of its group."""
        state = self._daemon.state
        for group in state.volume_groups:
            if group.data.get("change") is not None:
                held = _group(state, f"{LOCK_PREFIX}vg/{group.name}")
                if held is None or not admits(state.members, Instance(*held.data["holder"])):
                    return True
        return False

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """`cvm.<verb>` of the control socket."""
        await self._daemon.wait_admitted(CALL_TIMEOUT_S)
        body = {key: value for key, value in params.items() if key != "fds"}
        return await self.manager.call(method.removeprefix("cvm."), body)

    # --- control methods of instances

    async def open(self, local: LocalInstance, params: dict[str, Any]) -> VolumeMap:
        """`volume.open`: record the opener, give the map."""
        volume, mode = str(params["volume"]), str(params.get("mode", "sharedwrite"))
        opener = Opener(
            volume, self._daemon.instance(local.number), self._daemon.config.node.name, mode,
            f"{local.kind} {local.title}".strip(),
        )  # fmt: skip
        found = await self.manager.open_volume(opener)
        local.volumes[volume] = mode
        return found

    async def close(self, local: LocalInstance, params: dict[str, Any]) -> dict[str, Any]:
        """`volume.close`."""
        volume = str(params["volume"])
        await self.manager.close_volume(volume, self._daemon.instance(local.number))
        local.volumes.pop(volume, None)
        return {}

    # --- VgRegister

    async def read(self) -> dict[str, VgEntry]:
        """See cvm.seams.VgRegister."""
        state = await self._daemon.read_state()
        return {
            group.name: msgspec.convert(group.data, VgEntry)
            for group in state.volume_groups
            if not group.name.startswith(LOCK_PREFIX)
        }

    async def compare_and_set(self, vg: str, expected: VgEntry | None, new: VgEntry | None) -> bool:
        """See cvm.seams.VgRegister."""
        before = None if expected is None else msgspec.to_builtins(expected)
        after = None if new is None else msgspec.to_builtins(new)
        uuid = new.uuid if new is not None else (expected.uuid if expected is not None else "")
        return await self._swap(vg, uuid, before, after)

    async def _swap(
        self, name: str, uuid: str, before: dict[str, Any] | None, after: dict[str, Any] | None
    ) -> bool:
        """Replace the data of one entry if it is `before`."""
        present = _group(await self._daemon.read_state(), name)
        # What came from the wire and what we made differ in tuple and list: compare as data.
        found = None if present is None else msgspec.to_builtins(present.data)
        if _plain(found) != _plain(before):
            return False
        expected = present.sequence if present is not None else 0
        group = None if after is None else VolumeGroup(uuid, name, expected + 1, after)
        key = present.uuid if present is not None else uuid
        if present is not None and group is not None:
            group = msgspec.structs.replace(group, uuid=present.uuid)
        try:
            await self._daemon.command(SetVolumeGroup(key, expected, group))
        except (StateError, UsageError):
            return False
        return True

    # --- VgLocks

    def lock(self, name: str) -> AbstractAsyncContextManager[None]:
        """See cvm.seams.VgLocks."""
        return self._locked(LOCK_PREFIX + name)

    @asynccontextmanager
    async def _locked(self, name: str) -> AsyncIterator[None]:
        mine = {"holder": list(msgspec.to_builtins(self._me)), "ticket": _new_uuid()}
        with trio.move_on_after(LOCK_WAIT_S) as scope:
            while not await self._try_lock(name, mine):
                with trio.move_on_after(LOCK_POLL_S):
                    await self._daemon.wait_changed()
        if scope.cancelled_caught:
            holder = _group(self._daemon.state, name)
            who = holder.data.get("holder") if holder is not None else None
            raise BusyError(f"{name.removeprefix(LOCK_PREFIX)} is locked by {_who(who)}")
        try:
            yield
        finally:
            with trio.move_on_after(UNLOCK_WAIT_S, shield=True) as scope:
                await self._unlock(name, mine)
            if scope.cancelled_caught:
                self._go_on_unlocking(name, mine)

    async def _try_lock(self, name: str, mine: dict[str, Any]) -> bool:
        state = await self._daemon.read_state()
        present = _group(state, name)
        if present is not None:
            node, incarnation, number = present.data["holder"]
            holder = Instance(node, incarnation, number)
            if admits(state.members, holder) or not self._settled():
                return False
        before = None if present is None else present.data
        return await self._swap(name, f"{name}:{mine['ticket']}", before, mine)

    async def _unlock(self, name: str, mine: dict[str, Any]) -> None:
        """Give a lock back; if the register cannot be decided now, go on trying in background."""
        try:
            await self._swap(name, "", mine, None)
        except StackError:
            self._go_on_unlocking(name, mine)

    def _go_on_unlocking(self, name: str, mine: dict[str, Any]) -> None:
        """Unless this clusterd ends: others take the lock of who is out."""
        assert self._daemon.nursery is not None
        with contextlib.suppress(RuntimeError):  # its nursery is closed
            self._daemon.nursery.start_soon(self._unlock_later, name, mine)

    async def _unlock_later(self, name: str, mine: dict[str, Any]) -> None:
        while True:
            await trio.sleep(1)
            try:
                await self._swap(name, "", mine, None)
            except StackError:
                continue
            return

    def _settled(self) -> bool:
        """Whether every server that answers has installed the newest epoch."""
        view = self._daemon.view
        up = [s.id for s in self._daemon.servers.infos() if self._daemon.servers.is_up(s.id)]
        return view.epoch == self._daemon.state.epoch and all(s in view.installed for s in up)

    async def _wait_settled(self) -> None:
        with trio.move_on_after(FENCE_WAIT_S):
            while not self._settled():
                await self._daemon.wait_changed()
            return
        raise StackError("a server has not installed the newest view", hint="clusterctl status")

    # --- PhysicalDevices

    def servers(self) -> list[ServerInfo]:
        """See cvm.seams.PhysicalDevices."""
        return self._daemon.state.servers

    def _server(self, pv: str) -> tuple[ServerInfo, str]:
        name, _, export = pv.partition("/")
        for server in self._daemon.state.servers:
            if server.name == name and export:
                return server, export
        raise UsageError(f"{pv} is no PV: PVs are named SERVER/EXPORT", hint="cvmctl pvs")

    async def open_pv(self, pv: str) -> GnbdDevice:
        """The device of a PV, opened once and kept."""
        async with self._opening:
            if pv in self._devices:
                return self._devices[pv]
            if len(self._devices) >= DEVICES_MAX:
                raise BusyError("too many PVs are open")
            server, export = self._server(pv)
            key = bytes.fromhex(self._daemon.config.cluster.key)
            secret = instance_secret(key, self._daemon.cluster_id, self._me)
            assert self._daemon.nursery is not None
            with trio.move_on_after(OPEN_DEVICE_S):
                options = Options(tls=self._daemon.config.tls)
                device = await open_device(
                    server, export, self._me, secret, self._daemon.nursery, options
                )
                device.set_epoch(self._daemon.view.epoch)
                self._devices[pv] = device
                return device
            raise UnreachableError(f"{pv} does not answer", hint="see: clusterctl status")

    async def exports(self) -> list[ExportInfo]:
        """See cvm.seams.PhysicalDevices."""
        found: list[ExportInfo] = []

        async def one(server: ServerInfo) -> None:
            try:
                reports = await self._daemon.servers.ask(
                    server.id, lambda control: control.exports(), "exports"
                )
            except StackError:
                return
            found.extend(
                ExportInfo(
                    f"{server.name}/{r.name}",
                    server.id,
                    r.name,
                    r.size_bytes,
                    sequence_min=r.sequence_min,
                )
                for r in reports
                if r.access == "cluster"
            )

        await run_all([partial(one, server) for server in self._daemon.state.servers])
        return sorted(found, key=lambda export: export.pv)

    async def raise_minimum(self, pv: str, sequence: int) -> None:
        """See cvm.seams.PhysicalDevices."""
        server, export = self._server(pv)
        await self._daemon.servers.ask(
            ServerId(server.id), lambda control: control.raise_minimum(export, sequence), "minimum"
        )

    # --- VolumeInstances

    async def opened(self, opener: Opener) -> None:
        """See cvm.seams.VolumeInstances."""
        self._openers[opener.volume, opener.instance] = opener

    async def closed(self, volume: str, instance: Instance) -> None:
        """See cvm.seams.VolumeInstances."""
        self._openers.pop((volume, instance), None)

    def _drop_dead_openers(self) -> None:
        """A dead local opener counts until it is barred on the servers."""
        if not self._settled():
            return
        for key in list(self._openers):
            if not admits(self._daemon.state.members, key[1]):
                del self._openers[key]

    async def openers(self, volume: str) -> list[Opener]:
        """See cvm.seams.VolumeInstances."""
        rows = await self._on_all("volumes.openers", {"volume": volume})
        return [msgspec.convert(row, Opener) for found in rows for row in found]

    async def suspend_all(self, volume: str, sequence: int, claim: int) -> None:
        """See cvm.seams.VolumeInstances."""
        params = {"volume": volume, "sequence": sequence, "claim": claim}
        await self._on_all("volumes.suspend", params)
        await self._wait_settled()
        self._daemon.note(EventName.VOLUME_SUSPENDED, f"{volume} suspended", sequence=sequence)

    async def resume_all(self, volume: str, volume_map: VolumeMap) -> None:
        """See cvm.seams.VolumeInstances."""
        params = {"volume": volume, "map": msgspec.to_builtins(volume_map)}
        await self._on_all("volumes.resume", params)
        self._daemon.note(EventName.VOLUME_RESUMED, f"{volume} resumed")

    async def _on_all(self, method: str, params: dict[str, Any]) -> list[Any]:
        """Call every member; who cannot be asked must be out of the register by then."""
        results: list[Any] = []

        async def one(node: NodeId) -> None:
            with trio.move_on_after(SUSPEND_TIMEOUT_S):
                results.extend(await self._ask_member(node, method, params))
                return
            raise UnreachableError(f"node {node} does not answer {method}")

        members = list((await self._daemon.read_state()).members)
        await run_all([partial(one, member.node) for member in members])
        return results

    async def _ask_member(self, node: NodeId, method: str, params: dict[str, Any]) -> list[Any]:
        """The answer of a member; nothing as soon as it is out of the register."""
        answers: list[Any] = []
        errors: list[StackError] = []

        async def ask(scope: trio.CancelScope) -> None:
            while True:
                try:
                    transport = self._daemon.transport
                    answers.append(await transport.call(node, method, params, SUSPEND_TIMEOUT_S))
                except UnreachableError:
                    await trio.sleep(LOCK_POLL_S)
                    continue
                except StackError as error:
                    errors.append(error)
                scope.cancel()
                return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, nursery.cancel_scope)
            while member_of(self._daemon.state.members, node) is not None:
                await self._daemon.wait_changed()
            nursery.cancel_scope.cancel()
        if errors:
            raise errors[0]
        return answers

    def _local(self, volume: str) -> list[Opener]:
        return [
            opener
            for (name, _), opener in sorted(self._openers.items())
            if name == volume or not volume
        ]

    async def _openers_here(self, _source: NodeId, params: dict[str, Any]) -> list[Opener]:
        return self._local(str(params["volume"]))

    async def _suspend_here(self, _source: NodeId, params: dict[str, Any]) -> None:
        await self._each_here("volume.suspend", params)

    async def _resume_here(self, _source: NodeId, params: dict[str, Any]) -> None:
        await self._each_here("volume.resume", params)

    async def _each_here(self, method: str, params: dict[str, Any]) -> None:
        """Call every local opener; one that dies meanwhile must be barred before we answer."""

        async def one(number: InstanceNo) -> None:
            local = self._daemon.instances.by_number.get(number)
            if local is not None and not local.over:
                try:
                    await local.session.call(method, params)
                except UnreachableError:
                    pass
                else:
                    return
            gone = self._daemon.instance(number)
            while any(key[1] == gone for key in self._openers):
                self._drop_dead_openers()
                await self._daemon.wait_changed()

        numbers = {opener.instance.number for opener in self._local(str(params["volume"]))}
        await run_all([partial(one, number) for number in sorted(numbers) if number != CLUSTERD])


class Devices:
    """PhysicalDevices: `open` of the protocol is the volume manager's, not an instance's."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes

    async def open(self, pv: str) -> BlockDevice:
        """See cvm.seams.PhysicalDevices."""
        return BoundedDevice(pv, await self._volumes.open_pv(pv))

    async def signature(self, pv: str) -> str:
        """See cvm.seams.PhysicalDevices."""
        return await signature(await self.open(pv))

    async def exports(self) -> list[ExportInfo]:
        """See cvm.seams.PhysicalDevices."""
        return await self._volumes.exports()

    def servers(self) -> list[ServerInfo]:
        """See cvm.seams.PhysicalDevices."""
        return self._volumes.servers()

    async def raise_minimum(self, pv: str, sequence: int) -> None:
        """See cvm.seams.PhysicalDevices."""
        await self._volumes.raise_minimum(pv, sequence)


def _plain(value: Any) -> bytes:
    return msgspec.json.encode(value, order="sorted")


def _who(holder: Any) -> str:
    return f"n{holder[0]}.{holder[1]}.{holder[2]}" if isinstance(holder, list) else "somebody"


def _new_uuid() -> str:
    return secrets.token_hex(16)
