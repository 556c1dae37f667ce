"""The data path of one open volume: a `BlockDevice` over the legs of its map.

Every request passes a gate. `suspend` closes it and returns when nothing is in flight; requests
that come meanwhile wait without an error. `resume` switches to the given map and opens the gate, so
every request is done under exactly one map. A map older than the one in use is ignored, and so is
what a coordinator of a change had sent before another one took its change over (`claim`).

A request is split into contiguous runs per leg (cvm/layout.py), one vectored call per leg, all legs
at once. `flush` goes to those legs only that hold writes of this device since their last flush; the
first one, and the first after a view change, to all of them, because a survivor that replays a dead
instance's journal must also make durable what the dead one had written.

`VolumeClient` is what a mount uses: it opens volumes through clusterd, answers clusterd's
`volume.suspend` and `volume.resume`, and hands views on to the legs (rule: data is used in an epoch
only on servers that have installed it).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar, runtime_checkable

import trio

from cluster.control import InstanceGranted, ServerInfo, ViewInfo
from cluster.device import BlockDevice, Buffer, PromptDevice, Read, Written
from cluster.errors import StackError
from cluster.ids import Epoch, ServerId
from cvm.gathered import GatheredRead, GatheredWrite, worst
from cvm.layout import (
    Layout,
    Leg,
    Run,
    VolumeMap,
    WriteRun,
    assemble,
    decode_map_untrusted,
    joined,
    map_legs,
    same_layout,
)
from cvm.metadata import is_label_of

OPEN_VOLUMES_MAX = 64
IDLE_POLL_S = 0.002
DECLARE_S = 1.0

T = TypeVar("T")
OpenLeg = Callable[[Leg, VolumeMap], Awaitable[BlockDevice]]
Handler = Callable[[dict[str, Any]], Awaitable[Any]]


@runtime_checkable
class EpochDevice(Protocol):
    """A leg on a block server, which serves an epoch only once it has installed it."""

    def set_epoch(self, required: Epoch) -> None: ...

    def note_installed(self, epoch: Epoch) -> None: ...


@runtime_checkable
class StatusDevice(Protocol):
    """A leg that carries requests to their end also when their caller was cancelled; `status()`
    says under `pending` how many are not finished."""

    def status(self) -> dict[str, object]: ...


@runtime_checkable
class SequencedDevice(Protocol):
    """A leg whose server wants to know how new the map of this nexus is."""

    async def set_sequence(self, sequence: int) -> None: ...


class Session(Protocol):
    """The control session to clusterd, as far as it is needed here."""

    async def call(self, method: str, params: dict[str, Any]) -> Any: ...


class _LegState:
    """A leg device and how much of what was written there is durable."""

    __slots__ = ("device", "flushed", "sequence", "server", "written")

    def __init__(self, device: BlockDevice, server: ServerId) -> None:
        self.device = device
        self.server = server
        self.written = 1
        self.flushed = 0
        self.sequence = 0


async def _all(calls: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Run the calls at once; raise one of their errors after all have ended."""
    if len(calls) == 1:
        await calls[0]()
        return
    errors: list[Exception] = []

    async def run(call: Callable[[], Awaitable[None]]) -> None:
        try:
            await call()
        except Exception as error:
            errors.append(error)

    async with trio.open_nursery() as nursery:
        for call in calls[1:]:
            nursery.start_soon(run, call)
        await run(calls[0])
    if errors:
        raise worst(errors)


class VolumeDevice:
    """A `BlockDevice` over the legs of a volume. Without a map yet, requests wait."""

    def __init__(self, name: str, open_leg: OpenLeg) -> None:
        self.name = name
        self._open_leg = open_leg
        self._map: VolumeMap | None = None
        self._layout: Layout | None = None
        self._legs: dict[str, _LegState] = {}
        self._order: list[_LegState] = []
        self._prompt: list[PromptDevice] = []
        """The legs in the same order, if all can be asked without a task."""
        self._claim = 0
        self._suspended = False
        self._closed = True
        self._in_flight = 0
        self._in_doubt = False
        self._opened = trio.Event()
        self._drained: trio.Event | None = None
        self._switching = trio.Lock()
        self._epoch = Epoch(0)
        self._installed: frozenset[int] = frozenset()
        self._failure: StackError | None = None

    # --- what the layers above see -------------------------------------------------------------

    @property
    def map(self) -> VolumeMap:
        assert self._map is not None, "the volume is not open yet"
        return self._map

    @property
    def size_bytes(self) -> int:
        return self.map.size_bytes

    @property
    def suspended(self) -> bool:
        return self._suspended

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def legs(self) -> dict[str, BlockDevice]:
        """The leg devices by PV name."""
        return {pv: state.device for pv, state in self._legs.items()}

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        layout = self._enter_now() or await self._enter()
        try:
            place = layout.locate(offset_bytes, length_bytes)
            if place is not None:
                return await self._order[place[0]].device.read(place[1], length_bytes)
            return (await self._read_runs(layout, [(offset_bytes, length_bytes)]))[0]
        finally:
            self._leave()

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if len(ranges) == 1:
            return [await self.read(*ranges[0])]
        layout = await self._enter()
        try:
            return await self._read_runs(layout, ranges)
        finally:
            self._leave()

    async def write(self, offset_bytes: int, data: Buffer, *, fua: bool = False) -> None:
        layout = self._enter_now() or await self._enter()
        try:
            place = layout.locate(offset_bytes, memoryview(data).nbytes)
            if place is None:
                await self._write_runs(layout, [(offset_bytes, data)], fua)
                return
            state = self._order[place[0]]
            try:
                await state.device.write(place[1], data, fua=fua)
            finally:
                if not fua:
                    state.written += 1  # also after an error: a part may have been written
        except trio.Cancelled:
            self._in_doubt = True
            raise
        finally:
            self._leave()

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        if len(parts) == 1:
            await self.write(parts[0][0], parts[0][1], fua=fua)
            return
        layout = await self._enter()
        try:
            await self._write_runs(layout, parts, fua)
        except trio.Cancelled:
            self._in_doubt = True
            raise
        finally:
            self._leave()

    async def flush(self) -> None:
        """Make durable on all legs what this device completed before; see the module's text."""
        await self._enter()
        try:
            dirty = [state for state in self._legs.values() if state.written > state.flushed]
            if dirty:
                await _all([partial(_flush_leg, state) for state in dirty])
        finally:
            self._leave()

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        await self._each_run(offset_bytes, length_bytes, "discard")

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        await self._each_run(offset_bytes, length_bytes, "write_zeroes")

    # --- without a task ------------------------------------------------------------------------

    def can_start(self) -> bool:
        """The gate is open, and the legs can start as well."""
        if self._closed or not self._prompt:
            return False
        return all(leg.can_start() for leg in self._prompt)

    def start_read(self, offset_bytes: int, length_bytes: int, done: Read) -> None:
        layout = self._layout
        assert layout is not None and not self._closed  # noqa: PT018
        self._in_flight += 1

        def ended(error: Exception | None, pieces: list[Buffer]) -> None:
            self._leave()
            done(error, pieces)

        place = layout.locate(offset_bytes, length_bytes)
        if place is not None:
            self._prompt[place[0]].start_read(place[1], length_bytes, ended)
            return
        gathered = GatheredRead(layout.plan_reads([(offset_bytes, length_bytes)]), ended)
        for number, index, (start, length) in gathered.runs:
            self._prompt[number].start_read(start, length, gathered.taker(number, index))

    def start_write(self, parts: Sequence[tuple[int, Buffer]], done: Written) -> None:
        layout = self._layout
        assert layout is not None and not self._closed  # noqa: PT018
        self._in_flight += 1

        def ended(error: Exception | None) -> None:
            self._leave()
            done(error)

        plan = layout.plan_writes(parts)
        gathered = GatheredWrite(len(plan), ended)
        for number, runs in plan.items():
            gathered_leg = partial(self._wrote, self._order[number], gathered)
            self._prompt[number].start_write(joined(runs), gathered_leg)

    @staticmethod
    def _wrote(state: _LegState, gathered: GatheredWrite, error: Exception | None) -> None:
        state.written += 1  # also after an error: a part may have been written
        gathered.took(error)

    # --- legs ----------------------------------------------------------------------------------

    async def _read_runs(self, layout: Layout, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        plan = layout.plan_reads(ranges)
        data: dict[int, list[bytes]] = {}

        async def read_leg(number: int, runs: list[Run]) -> None:
            data[number] = await self._order[number].device.read_many(runs)

        if plan.runs:
            await _all([partial(read_leg, number, runs) for number, runs in plan.runs.items()])
        return assemble(plan, data)

    async def _write_runs(
        self, layout: Layout, parts: Sequence[tuple[int, Buffer]], fua: bool
    ) -> None:
        plan = layout.plan_writes(parts)
        if plan:
            await _all(
                [
                    partial(_write_leg, self._order[number], runs, fua)
                    for number, runs in plan.items()
                ]
            )

    async def _each_run(self, offset_bytes: int, length_bytes: int, kind: str) -> None:
        layout = await self._enter()
        try:

            async def on_leg(number: int, runs: list[Run]) -> None:
                state = self._order[number]
                try:
                    for start, length in runs:
                        if kind == "discard":
                            await state.device.discard(start, length)
                        else:
                            await state.device.write_zeroes(start, length)
                finally:
                    state.written += 1

            plan = layout.plan_ranges(offset_bytes, length_bytes)
            if plan:
                await _all([partial(on_leg, number, runs) for number, runs in plan.items()])
        except trio.Cancelled:
            self._in_doubt = True
            raise
        finally:
            self._leave()

    # --- the gate ------------------------------------------------------------------------------

    def _enter_now(self) -> Layout | None:
        """Count in if the gate is open."""
        if self._closed:
            return None
        self._in_flight += 1
        return self._layout

    async def _enter(self) -> Layout:
        """Count in when the gate is open. No await stands between the check and the count."""
        while self._closed:
            if self._failure is not None:
                raise self._failure
            await self._opened.wait()
        self._in_flight += 1
        assert self._layout is not None
        return self._layout

    def _leave(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._drained is not None:
            self._drained.set()
            self._drained = None

    def _close_gate(self) -> None:
        if not self._closed:
            self._closed = True
            self._opened = trio.Event()

    def _open_gate(self) -> None:
        if self._map is not None and not self._suspended and self._failure is None:
            self._closed = False
            self._opened.set()
            if self._drained is not None:
                self._drained.set()
                self._drained = None

    async def _wait_drained(self) -> None:
        """Return when nothing is in flight, or when the gate was opened again."""
        while self._in_flight and self._closed:
            if self._drained is None:
                self._drained = trio.Event()
            await self._drained.wait()
        if self._in_doubt and self._closed:
            await self._wait_idle()

    async def _wait_idle(self) -> None:
        """A write was cancelled, yet its leg still carries it out: wait for an idle moment."""
        for leg in self.legs().values():
            while isinstance(leg, StatusDevice) and leg.status()["pending"]:  # noqa: ASYNC110
                await trio.sleep(IDLE_POLL_S)
        self._in_doubt = False

    async def suspend(self, sequence: int, claim: int) -> None:
        """Close the gate for the change to `sequence`; return when nothing is in flight.

        Harmless to repeat. A suspend for a map that is already in use comes late and is ignored;
        one of a change that was given up or taken over raises StackError.
        """
        if self._map is not None and sequence <= self._map.sequence:
            return
        if claim < self._claim:
            raise StackError(f"{self.name}: this change was given up or taken over")
        self._claim = claim
        self._suspended = True
        self._close_gate()
        await self._wait_drained()
        if not self._suspended:
            raise StackError(f"{self.name} was resumed while it was being suspended")

    async def resume(self, volume_map: VolumeMap) -> None:
        """Switch to the map (the new one, or the old one of an abandoned change); open the gate."""
        async with self._switching:
            newest = self._map is None or volume_map.sequence >= self._map.sequence
            if newest and volume_map.claim >= self._claim:
                self._suspended = False
                await self._switch(volume_map)

    async def start(self, volume_map: VolumeMap) -> None:
        """Take the first map, unless a suspend or resume overtook the answer of `volume.open`."""
        async with self._switching:
            if self._map is None or volume_map.sequence > self._map.sequence:
                await self._switch(volume_map)

    async def _switch(self, volume_map: VolumeMap) -> None:
        """Open the new map's legs, then replace the map while nothing is in flight."""
        for pv, leg in map_legs(volume_map).items():
            if pv not in self._legs:
                state = _LegState(await self._open_leg(leg, volume_map), leg.server)
                self._legs[pv] = state
                self._tell_epoch(state)
        if self._map is None or not same_layout(self._map, volume_map):
            self._close_gate()
            await self._wait_drained()
            layout = Layout(volume_map)
            self._order = [self._legs[pv] for pv in layout.pvs]
            legs = [state.device for state in self._order]
            prompt: list[PromptDevice] = [leg for leg in legs if isinstance(leg, PromptDevice)]
            self._prompt = prompt if len(prompt) == len(legs) else []
            self._layout = layout
        self._map = volume_map
        self._claim = max(self._claim, volume_map.claim)
        await self._declare(volume_map.sequence)
        self._open_gate()

    async def _declare(self, sequence: int) -> None:
        """Tell the servers how new the map is, while the gate is closed. A server that is away
        hears it when it is back, before anything else: nobody waits for it here."""
        behind = [state for state in self._legs.values() if state.sequence < sequence]
        for state in behind:
            state.sequence = sequence
        devices = [one.device for one in behind if isinstance(one.device, SequencedDevice)]
        with trio.move_on_after(DECLARE_S):
            if devices:
                await _all([partial(device.set_sequence, sequence) for device in devices])

    def fail(self, error: StackError) -> None:
        """Answer every request that waits at the gate, and every later one, with an error."""
        self._failure = error
        self._closed = True
        self._opened.set()

    # --- epochs --------------------------------------------------------------------------------

    def _tell_epoch(self, state: _LegState) -> None:
        if isinstance(state.device, EpochDevice) and self._epoch:
            state.device.set_epoch(self._epoch)
            if state.server in self._installed:
                state.device.note_installed(self._epoch)

    def set_epoch(self, required: Epoch, installed: frozenset[int] = frozenset()) -> None:
        """Use the legs from now on only where `required` is installed (`installed`: server ids).

        Synchronous: a request that starts after this call is already held to the new epoch.
        """
        if required < self._epoch:
            return
        newer = required > self._epoch
        self._epoch, self._installed = required, installed
        for state in self._legs.values():
            state.written += newer
            self._tell_epoch(state)


async def _flush_leg(state: _LegState) -> None:
    """Flush one leg. Two flushes at once both go to the leg: neither may answer for the other."""
    covered = state.written
    await state.device.flush()
    state.flushed = max(state.flushed, covered)


async def _write_leg(state: _LegState, runs: list[WriteRun], fua: bool) -> None:
    """One vectored call for all runs of a leg."""
    try:
        await state.device.write_many(joined(runs), fua=fua)
    finally:
        if not fua:
            state.written += 1  # also after an error: some may have been written


class VolumeClient:
    """The volumes that one instance (a mount, mkfs, fsck) has open.

    Make it first, merge `handlers()` into the handlers of the control session and call `on_view`
    from the session's `on_event`; then `open` volumes.
    """

    def __init__(self) -> None:
        self._volumes: dict[str, VolumeDevice] = {}
        self._view: ViewInfo | None = None

    def handlers(self) -> dict[str, Handler]:
        """What clusterd may call on the session."""
        return {"volume.suspend": self._suspend, "volume.resume": self._resume}

    async def _suspend(self, params: dict[str, Any]) -> dict[str, Any]:
        device = self._volumes.get(str(params["volume"]))
        if device is not None:
            await device.suspend(int(params["sequence"]), int(params["claim"]))
        return {}

    async def _resume(self, params: dict[str, Any]) -> dict[str, Any]:
        device = self._volumes.get(str(params["volume"]))
        if device is not None:
            await device.resume(decode_map_untrusted(params["map"]))
        return {}

    def on_view(self, view: ViewInfo) -> None:
        """Hold all volumes to the view's epoch. Call it for every `view` event, in order."""
        if self._view is not None and view.epoch < self._view.epoch:
            return
        self._view = view
        for device in self._volumes.values():
            device.set_epoch(view.epoch, frozenset(view.installed))

    async def open(
        self, session: Session, volume: str, mode: str, open_leg: OpenLeg
    ) -> VolumeDevice:
        """Open `VG/LV` through clusterd in an activation mode; legs come from `open_leg`."""
        assert volume not in self._volumes, f"{volume} is open already"
        assert len(self._volumes) < OPEN_VOLUMES_MAX
        device = VolumeDevice(volume, open_leg)
        # Known before clusterd answers: a suspend may overtake the answer.
        self._volumes[volume] = device
        if self._view is not None:
            device.set_epoch(self._view.epoch, frozenset(self._view.installed))
        try:
            answer = await session.call("volume.open", {"volume": volume, "mode": mode})
            await device.start(decode_map_untrusted(answer))
        except BaseException:
            del self._volumes[volume]
            raise
        return device

    async def close(self, session: Session, volume: str) -> None:
        """Flush, give the volume back, and close its legs."""
        device = self._volumes[volume]
        await device.flush()
        await session.call("volume.close", {"volume": volume})
        del self._volumes[volume]
        await close_legs(device)


@runtime_checkable
class ClosableDevice(Protocol):
    async def aclose(self) -> None: ...


async def close_legs(device: VolumeDevice) -> None:
    """Close the leg devices that can be closed; requests fail from now on."""
    device.fail(StackError(f"volume {device.name} is closed"))
    for leg in device.legs().values():
        if isinstance(leg, ClosableDevice):
            await leg.aclose()


def gnbd_legs(granted: InstanceGranted, nursery: trio.Nursery) -> OpenLeg:
    """Legs on block servers, logged in as the granted instance; their tasks run in `nursery`."""
    from gnbd.client.device_io import Options, open_device

    secret = bytes.fromhex(granted.secret)

    async def open_leg(leg: Leg, volume_map: VolumeMap) -> BlockDevice:
        server = _server_of(leg, volume_map.servers, granted.servers)
        is_ours = partial(is_label_of, leg.uuid)
        options = Options(sequence=volume_map.sequence, tls=granted.tls, is_ours=is_ours)
        return await open_device(server, leg.export, granted.instance, secret, nursery, options)

    return open_leg


def _server_of(leg: Leg, *lists: Sequence[ServerInfo]) -> ServerInfo:
    for servers in lists:
        for server in servers:
            if server.id == leg.server:
                return server
    raise StackError(
        f"the cluster knows no server {leg.server} (of {leg.pv})",
        hint="see: clusterctl status",
    )


async def open_volume(
    session: Session,
    volume: str,
    mode: str,
    granted: InstanceGranted,
    nursery: trio.Nursery,
    client: VolumeClient | None = None,
) -> VolumeDevice:
    """Open a volume over gnbd. `client` is the one whose `handlers` the session has."""
    client = client or VolumeClient()
    client.on_view(granted.view)
    return await client.open(session, volume, mode, gnbd_legs(granted, nursery))
