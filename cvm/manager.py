"""The verbs of the volume manager, as `clusterd` serves them. Plain async over narrow protocols.

`Manager.call(verb, params)` is the one door: parameters are checked there, and every refusal is a
`StackError` with a hint. Commands that change something run a `Transaction` under the VG's lock;
those that take PVs in or out also hold the lock `pvs`, always before the VG's.

After the death of a node, and when quorum is back, the node calls `recover`: it finishes or undoes
what a dead coordinator left, so that no instance stays suspended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import msgspec

from cluster.errors import BusyError, CorruptionError, RefusedError, StackError, UsageError
from cluster.ids import Instance
from cvm import requests
from cvm.layout import VolumeMap
from cvm.metadata import (
    DATA_OFFSET_BYTES,
    PvLabel,
    PvRecord,
    VgRecord,
    build_map,
    check_name,
)
from cvm.modes import check_mode, conflict
from cvm.planning import (
    LvCreate,
    LvExtend,
    Outcome,
    Planner,
    need_lv,
    need_vg,
    plan_lvcreate,
    plan_lvextend,
    plan_lvremove,
    plan_vgcreate,
    plan_vgextend,
    plan_vgremove,
    split_volume,
)
from cvm.rows import Rows
from cvm.seams import (
    Opener,
    PhysicalDevices,
    VgEntry,
    VgLocks,
    VgRegister,
    VolumeInstances,
)
from cvm.store import MetadataStore
from cvm.transaction import (
    Action,
    Archive,
    Done,
    EntryRead,
    EntrySet,
    Event,
    Failed,
    Finished,
    MakePlan,
    Plan,
    Planned,
    RaiseMinimum,
    ReadEntry,
    Resume,
    SetEntry,
    Suspend,
    Transaction,
    WriteSlots,
)

PVS_LOCK = "pvs"
Params = dict[str, Any]
Result = dict[str, Any]
Verb = Callable[[Params], Awaitable[Result]]
T = TypeVar("T")


class Identity(msgspec.Struct, frozen=True):
    """This node, and the cluster it is in (32 hex digits)."""

    instance: Instance
    node_name: str
    cluster_id: str


class Node(msgspec.Struct, frozen=True):
    """What the node gives to the volume manager; see cvm/seams.py. `new_uuid`: 32 hex digits."""

    identity: Identity
    register: VgRegister
    devices: PhysicalDevices
    instances: VolumeInstances
    locks: VgLocks
    new_uuid: Callable[[], str]


def convert(params: Params, kind: type[T]) -> T:
    """Parameters of a verb as a struct. Raises UsageError that names the parameter."""
    try:
        return msgspec.convert(params, kind, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"Invalid parameters: {error}.") from error


def vg_lock(vg: str) -> str:
    return f"vg/{vg}"


def _remove_plan(vg: str) -> Planner:
    return lambda record: plan_vgremove(need_vg(record, vg))


class Manager:
    """The volume manager of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._me = node.identity
        self._store = MetadataStore(node.devices)
        self._rows = Rows(node.register, node.devices, node.instances, self._store)
        self._verbs: dict[str, Verb] = {
            "pvcreate": self._pvcreate,
            "pvremove": self._pvremove,
            "vgcreate": self._vgcreate,
            "vgextend": self._vgextend,
            "vgremove": self._vgremove,
            "lvcreate": self._lvcreate,
            "lvextend": self._lvextend,
            "lvremove": self._lvremove,
            "activate": self._activate,
            "deactivate": self._deactivate,
            "pvs": self._rows.pvs,
            "vgs": self._rows.vgs,
            "lvs": self._rows.lvs,
            "status": self._rows.status,
            "history": self._history,
            "recover": self._recover,
        }

    async def call(self, verb: str, params: Params) -> Result:
        """Carry out a verb of the control socket (`cvm.<verb>`)."""
        handler = self._verbs.get(verb)
        if handler is None:
            raise UsageError(f"No such command: {verb}.", hint="see: cvmctl --help")
        return await handler(params)

    # --- transactions --------------------------------------------------------------------------

    async def _change(
        self, vg: str, purpose: str, planner: Planner, *, dry_run: bool = False
    ) -> list[str]:
        """Run one change of a VG whose lock is held; return the messages for the user."""
        outcomes: list[Outcome] = []

        def plan(record: VgRecord | None) -> Plan:
            outcome = planner(record)
            outcomes.append(outcome)
            if dry_run:
                return msgspec.structs.replace(outcome.plan, changed=False)
            return outcome.plan

        end = await self._run(Transaction(vg, purpose), plan)
        warning = [f"WARNING: {end.warning}"] if end.warning else []
        return [*outcomes[0].messages, *warning]

    async def _run(
        self, transaction: Transaction, plan: Callable[[VgRecord | None], Plan]
    ) -> Finished:
        """Carry out the transaction's actions until it ends. Raises its error."""
        action = transaction.start()
        while not isinstance(action, Finished):
            try:
                event = await self._perform(transaction.vg, action, plan)
            except StackError as error:
                event = Failed(error)
            action = transaction.step(event)
        if action.error is not None:
            raise action.error
        return action

    async def _perform(
        self, vg: str, action: Action, plan: Callable[[VgRecord | None], Plan]
    ) -> Event:
        node = self._node
        match action:
            case ReadEntry():
                return EntryRead((await node.register.read()).get(vg))
            case SetEntry(expected=expected, new=new):
                return EntrySet(await node.register.compare_and_set(vg, expected, new))
            case MakePlan(entry=entry):
                return Planned(plan(None if entry is None else await self._store.load(entry)))
            case RaiseMinimum(entry=entry, minimums=minimums):
                await self._raise_minimums(entry, minimums)
            case WriteSlots(vg=record, text=text):
                await self._store.write_slots(record, text)
            case Suspend(volumes=volumes, sequence=sequence, claim=claim):
                for name in volumes:
                    await node.instances.suspend_all(f"{vg}/{name}", sequence, claim)
            case Resume(volumes=volumes, entry=entry):
                await self._resume(entry, volumes)
            case Archive(vg=record, text=text):
                await self._store.archive(record, text)
            case Finished():
                raise AssertionError("the end needs no action")
        return Done()

    def _map(self, entry: VgEntry, record: VgRecord, name: str) -> VolumeMap:
        servers = tuple(self._node.devices.servers())
        return build_map(record, need_lv(record, name), servers, entry.claim)

    async def _resume(self, entry: VgEntry, volumes: tuple[str, ...]) -> None:
        record = await self._store.load(entry)
        for name in volumes:
            if record.lv(name) is not None:
                volume_map = self._map(entry, record, name)
                await self._node.instances.resume_all(f"{entry.name}/{name}", volume_map)

    async def _raise_minimums(self, entry: VgEntry, minimums: tuple[tuple[str, int], ...]) -> None:
        """Bring all open volumes of the VG to its sequence first: nobody live is shut out."""
        opened = {opener.volume for opener in await self._node.instances.openers("")}
        record = await self._store.load(entry)
        names = tuple(lv.name for lv in record.lvs if f"{entry.name}/{lv.name}" in opened)
        await self._resume(entry, names)
        for pv, sequence in minimums:
            await self._node.devices.raise_minimum(pv, sequence)

    async def _settle(self, vg: str) -> VgEntry:
        """The entry of an existing VG whose lock is held, after finishing what was left."""
        end = await self._run(Transaction(vg, "recover", recover_only=True), lambda _: Plan(None))
        if end.entry is None:
            need_vg(None, vg)
        assert end.entry is not None
        return end.entry

    async def _recover(self, _params: Params) -> Result:
        settled = await self.recover()
        return {"messages": [f'Volume group "{vg}": unfinished change settled.' for vg in settled]}

    async def recover(self) -> list[str]:
        """Finish or undo the changes that dead coordinators left; the names of their VGs. One that
        cannot be settled holds up no other; its error is raised at the end."""
        settled: list[str] = []
        errors: list[StackError] = []
        for vg, entry in (await self._node.register.read()).items():
            if entry.change is not None:
                try:
                    async with self._node.locks.lock(vg_lock(vg)):
                        transaction = Transaction(vg, "recover", recover_only=True)
                        await self._run(transaction, lambda _: Plan(None))
                except StackError as error:
                    errors.append(error)
                else:
                    settled.append(vg)
        if errors:
            raise errors[0]
        return settled

    # --- PVs -----------------------------------------------------------------------------------

    async def _vg_of(self, pv: str) -> str:
        for name, entry in (await self._node.register.read()).items():
            if pv in entry.pvs:
                return name
        return ""

    async def _known_export(self, pv: str) -> None:
        exports = await self._node.devices.exports()
        export = next((one for one in exports if one.pv == pv), None)
        if export is None:
            names = ", ".join(sorted(one.pv for one in exports)) or "none"
            raise StackError(
                f'No device found for "{pv}".',
                hint=f"PVs are named SERVER/EXPORT; exports of this cluster: {names}",
            )
        if not export.reachable:
            raise StackError(
                f'Device "{pv}" does not answer.', hint="see: clusterctl status, gnbdctl"
            )

    async def _check_usable(self, pv: str, *, overwrite: bool) -> PvLabel | None:
        """Raise unless `pv` may become a PV; its label if it is a free PV of this cluster."""
        vg = await self._vg_of(pv)
        if vg:
            raise BusyError(
                f'Physical volume "{pv}" is already in volume group "{vg}".',
                hint=f"see: cvmctl vgs {vg}",
            )
        await self._known_export(pv)
        label, what = None, "physical volume with a damaged label"
        with contextlib.suppress(CorruptionError):
            label = await self._store.read_label(pv)
            if label is not None and label.cluster_id == self._me.cluster_id:
                await self._check_free(pv, label)
                return label
            what = f"physical volume of another cluster ({label.cluster_id})" if label else ""
        what = what or await self._node.devices.signature(pv)
        if what and not overwrite:
            raise RefusedError(f'"{pv}" holds data: {what}.', hint="say --yes to overwrite it")
        return None

    async def _check_free(self, pv: str, label: PvLabel) -> None:
        await self._store.check_free(pv, label, (await self._node.register.read()).values())

    async def _make_pv(self, pv: str) -> PvLabel:
        size = await self._store.device_bytes(pv)
        if size < 2 * DATA_OFFSET_BYTES:
            raise StackError(f'Device "{pv}" is too small ({size} bytes).', hint="at least 8m")
        label = PvLabel(
            uuid=self._node.new_uuid(),
            cluster_id=self._me.cluster_id,
            device_bytes=size,
            data_offset_bytes=DATA_OFFSET_BYTES,
            name=pv,
        )
        await self._store.write_label(label)
        return label

    async def _pvcreate(self, params: Params) -> Result:
        request = convert(params, requests.Pvs)
        messages = []
        async with self._node.locks.lock(PVS_LOCK):
            for pv in request.pvs:
                await self._check_usable(pv, overwrite=request.yes)
            for pv in request.pvs:
                if not request.dry_run:
                    await self._make_pv(pv)
                messages.append(f'Physical volume "{pv}" successfully created.')
        return {"messages": messages}

    async def _pvremove(self, params: Params) -> Result:
        request = convert(params, requests.Pvs)
        messages = []
        async with self._node.locks.lock(PVS_LOCK):
            for pv in request.pvs:
                vg = await self._vg_of(pv)
                if vg:
                    raise BusyError(
                        f'PV "{pv}" is used by VG "{vg}" so please use vgremove first.',
                        hint=f"see: cvmctl vgs {vg}",
                    )
                await self._known_export(pv)
                label = await self._store.read_label(pv)
                if label is None:
                    raise StackError(f'No PV found on device "{pv}".', hint="see: cvmctl pvs")
                await self._check_free(pv, label)
            for pv in request.pvs:
                if not request.dry_run:
                    await self._store.wipe_label(pv)
                messages.append(f'Labels on physical volume "{pv}" successfully wiped.')
        return {"messages": messages}

    async def _take_pvs(
        self, request: requests.VgCreate | requests.VgExtend
    ) -> tuple[list[PvRecord], list[str]]:
        """Records of PVs that go into a VG; devices that are no PVs yet become ones."""
        if len(set(request.pvs)) != len(request.pvs):
            raise UsageError("A physical volume is named twice.")
        labels = [await self._check_usable(pv, overwrite=request.yes) for pv in request.pvs]
        uuids = [label.uuid for label in labels if label is not None]
        if len(set(uuids)) != len(uuids):
            raise RefusedError(
                "Two of these devices have one label: they are one disk, or a copy of another.",
                hint="give a copy a label of its own: cvmctl pvcreate",
            )
        exports = {export.pv: export for export in await self._node.devices.exports()}
        records, messages = [], []
        for pv, known in zip(request.pvs, labels, strict=True):
            label = known
            if label is None:
                messages.append(f'Physical volume "{pv}" successfully created.')
                label = (
                    PvLabel("0" * 32, self._me.cluster_id, exports[pv].size_bytes, 0, pv)
                    if request.dry_run
                    else await self._make_pv(pv)
                )
            records.append(
                PvRecord(
                    name=pv,
                    uuid=label.uuid,
                    server=exports[pv].server,
                    export=exports[pv].export,
                    device_bytes=await self._store.device_bytes(pv),
                    data_offset_bytes=DATA_OFFSET_BYTES,
                    extent_count=0,
                    minimum_sequence=exports[pv].sequence_min,
                )
            )
        return records, messages

    # --- VGs -----------------------------------------------------------------------------------

    async def _vgcreate(self, params: Params) -> Result:
        request = convert(params, requests.VgCreate)
        check_name("New volume group", request.vg)
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._node.locks.lock(PVS_LOCK))
            await held.enter_async_context(self._node.locks.lock(vg_lock(request.vg)))
            existing = (await self._node.register.read()).get(request.vg)
            if existing is not None and existing.sequence > 0:
                raise StackError(
                    f"A volume group called {request.vg} already exists.", hint="see: cvmctl vgs"
                )
            pvs, messages = await self._take_pvs(request)
            uuid = self._node.new_uuid()
            purpose = f"vgcreate {request.vg} {' '.join(request.pvs)}"

            def plan(_record: VgRecord | None) -> Outcome:
                return plan_vgcreate(
                    request.vg, uuid, pvs, request.extent_size, purpose, self._me.node_name
                )

            messages += await self._change(request.vg, purpose, plan, dry_run=request.dry_run)
        return {"messages": messages}

    async def _vgextend(self, params: Params) -> Result:
        request = convert(params, requests.VgExtend)
        async with AsyncExitStack() as held:
            await held.enter_async_context(self._node.locks.lock(PVS_LOCK))
            await held.enter_async_context(self._node.locks.lock(vg_lock(request.vg)))
            await self._settle(request.vg)
            pvs, messages = await self._take_pvs(request)
            purpose = f"vgextend {request.vg} {' '.join(request.pvs)}"

            def plan(record: VgRecord | None) -> Outcome:
                found = need_vg(record, request.vg)
                return plan_vgextend(found, pvs, purpose, self._me.node_name)

            messages += await self._change(request.vg, purpose, plan, dry_run=request.dry_run)
        return {"messages": messages}

    async def _vgremove(self, params: Params) -> Result:
        request = convert(params, requests.Vgs)
        messages: list[str] = []
        for vg in request.vgs:
            async with AsyncExitStack() as held:
                await held.enter_async_context(self._node.locks.lock(PVS_LOCK))
                await held.enter_async_context(self._node.locks.lock(vg_lock(vg)))
                record = await self._store.load(await self._settle(vg))
                names = [lv.name for lv in record.lvs]
                await self._check_unused(vg, names)
                if names and not (request.yes or request.dry_run):
                    raise RefusedError(
                        f'Volume group "{vg}" contains {len(names)} logical volumes: '
                        f"{', '.join(names)}.",
                        hint="say --yes to remove them and their data",
                    )
                messages += await self._change(
                    vg, f"vgremove {vg}", _remove_plan(vg), dry_run=request.dry_run
                )
        return {"messages": messages}

    async def _history(self, params: Params) -> Result:
        """Archived versions of a VG, with their whole text."""
        request = convert(params, requests.Vg)
        entry = (await self._node.register.read()).get(request.vg)
        if entry is None:
            need_vg(None, request.vg)
        assert entry is not None
        return {"versions": msgspec.to_builtins(await self._store.history(entry))}

    # --- LVs -----------------------------------------------------------------------------------

    async def _lvcreate(self, params: Params) -> Result:
        request = convert(params, LvCreate)
        uuid = self._node.new_uuid()

        def plan(record: VgRecord | None) -> Outcome:
            found = need_vg(record, request.vg)
            return plan_lvcreate(found, request, uuid, self._me.node_name)

        purpose = f"lvcreate {request.vg}/{request.name}"
        async with self._node.locks.lock(vg_lock(request.vg)):
            messages = await self._change(request.vg, purpose, plan, dry_run=request.dry_run)
        return {"messages": messages}

    async def _lvextend(self, params: Params) -> Result:
        request = convert(params, LvExtend)
        vg, _ = split_volume(request.volume)

        def plan(record: VgRecord | None) -> Outcome:
            return plan_lvextend(need_vg(record, vg), request, self._me.node_name)

        async with self._node.locks.lock(vg_lock(vg)):
            messages = await self._change(
                vg, f"lvextend {request.volume}", plan, dry_run=request.dry_run
            )
        return {"messages": messages}

    async def _check_unused(self, vg: str, names: list[str]) -> None:
        """Raise BusyError that names who has one of the volumes open or active."""
        for opener in await self._node.instances.openers(""):
            for name in names:
                if opener.volume == f"{vg}/{name}":
                    raise BusyError(
                        f"Logical volume {opener.volume} in use.",
                        hint=f"{opener.title or 'instance'} {opener.instance} on "
                        f"{opener.node_name} has it ({opener.mode})",
                    )

    async def _lvremove(self, params: Params) -> Result:
        """Remove volumes; `VG` alone means all of its volumes."""
        request = convert(params, requests.Volumes)
        by_vg: dict[str, list[str]] = {}
        for volume in request.volumes:
            if "/" in volume:
                vg, name = split_volume(volume)
                by_vg.setdefault(vg, []).append(name)
            else:
                by_vg.setdefault(volume, []).append("")
        messages: list[str] = []
        for vg, names in by_vg.items():
            async with self._node.locks.lock(vg_lock(vg)):
                messages += await self._lvremove_of(vg, names, request)
        return {"messages": messages}

    async def _lvremove_of(self, vg: str, names: list[str], request: requests.Volumes) -> list[str]:
        record = await self._store.load(await self._settle(vg))
        if "" in names:
            names = [lv.name for lv in record.lvs]
        names = list(dict.fromkeys(names))
        for name in names:
            need_lv(record, name)
        if not names:
            return []
        await self._check_unused(vg, names)
        if not (request.yes or request.dry_run):
            raise RefusedError(
                f"Do you really want to remove logical volume {vg}/{f', {vg}/'.join(names)}?",
                hint="say --yes to remove it and its data",
            )
        return await self._change(
            vg,
            f"lvremove {' '.join(names)}",
            lambda found: plan_lvremove(need_vg(found, vg), names, self._me.node_name),
            dry_run=request.dry_run,
        )

    # --- opening -------------------------------------------------------------------------------

    async def open_volume(self, opener: Opener) -> VolumeMap:
        """Record an opener and give it the map that counts. Raises BusyError on a mode conflict.

        Under the VG's lock, so that no change is under way: whoever is recorded takes part in the
        next one.
        """
        check_mode(opener.mode)
        vg, name = split_volume(opener.volume)
        async with self._node.locks.lock(vg_lock(vg)):
            entry = await self._settle(vg)
            record = await self._store.load(entry)
            need_lv(record, name)
            for other in await self._node.instances.openers(opener.volume):
                if conflict(opener, other):
                    raise BusyError(
                        f"Logical volume {opener.volume} is open in mode {other.mode}.",
                        hint=f"{other.title or 'instance'} {other.instance} on "
                        f"{other.node_name} has it",
                    )
            await self._node.instances.opened(opener)
            return self._map(entry, record, name)

    async def close_volume(self, volume: str, instance: Instance) -> None:
        """Forget an opener. Needs no lock: a change that still counts it finds it gone."""
        await self._node.instances.closed(volume, instance)

    async def _activate(self, params: Params) -> Result:
        request = convert(params, requests.Activate)
        opener = Opener(
            request.volume, self._me.instance, self._me.node_name, request.mode, "activation"
        )
        if not request.dry_run:
            await self.open_volume(opener)
        text = f'Logical volume "{request.volume}" active on {self._me.node_name} ({request.mode}).'
        return {"messages": [text]}

    async def _deactivate(self, params: Params) -> Result:
        request = convert(params, requests.Activate)
        split_volume(request.volume)
        for opener in await self._node.instances.openers(request.volume):
            same_node = opener.node_name == self._me.node_name
            if same_node and opener.instance != self._me.instance:
                raise BusyError(
                    f"Logical volume {request.volume} in use.",
                    hint=f"{opener.title or 'instance'} {opener.instance} on this node has it",
                )
        if not request.dry_run:
            await self.close_volume(request.volume, self._me.instance)
        text = f'Logical volume "{request.volume}" not active on {self._me.node_name}.'
        return {"messages": [text]}
