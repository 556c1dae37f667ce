"""What the volume manager needs from the node around it. The node implements these protocols.

No method may wait for ever: a device or a node that does not answer within the node's bounds is a
`StackError`. (The data path waits for lost storage; commands do not.)
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from cluster.control import ServerInfo
from cluster.device import BlockDevice
from cluster.ids import Instance, ServerId
from cvm.layout import VolumeMap


class VgChange(msgspec.Struct, frozen=True):
    """A change of a volume group that is under way, as the register knows it.

    It stands from before the first instance is suspended until all of them are resumed, so that
    whoever takes the VG's lock next sees what is left to do.
    """

    purpose: str
    volumes: tuple[str, ...]
    """Names (without the VG) of the volumes whose instances may be suspended."""


class VgEntry(msgspec.Struct, frozen=True):
    """A volume group in the register: which metadata counts, and on which PVs it stands.

    `claim` goes up whenever somebody starts or takes over a change, so that the compare-and-set of
    an earlier, late coordinator fails.
    """

    name: str
    uuid: str
    sequence: int
    checksum: str
    pvs: tuple[str, ...]
    claim: int = 0
    change: VgChange | None = None


class ExportInfo(msgspec.Struct, frozen=True):
    """An export of a block server that could be a PV. `size_bytes` is 0 when it does not answer.
    `sequence_min`: it refuses every nexus whose map is older."""

    pv: str
    server: ServerId
    export: str
    size_bytes: int
    reachable: bool = True
    sequence_min: int = 0


class Opener(msgspec.Struct, frozen=True):
    """One instance that has a volume open, or a node's activation of it (`title` "activation")."""

    volume: str
    instance: Instance
    node_name: str
    mode: str
    title: str = ""


class VgRegister(Protocol):
    """The volume groups inside the register's value."""

    async def read(self) -> dict[str, VgEntry]:
        """The decided entries (a quorum read). Raises NotQuorateError."""
        ...

    async def compare_and_set(self, vg: str, expected: VgEntry | None, new: VgEntry | None) -> bool:
        """Replace entry `vg` if it equals `expected` (None: absent); False if it does not.

        An exception leaves the outcome unknown: it may be decided, now or later. The proposal must
        name this node as proposer, so that a barred node's is refused.
        """
        ...


class PhysicalDevices(Protocol):
    """The PVs as this node reaches them."""

    async def open(self, pv: str) -> BlockDevice:
        """The device of `SERVER/EXPORT`, opened once and kept. Raises StackError. Its reads raise
        one too when the server does not answer in time; its writes wait."""
        ...

    async def signature(self, pv: str) -> str:
        """What seems to be on a device that is no PV, in words; empty if it looks unused."""
        ...

    async def exports(self) -> list[ExportInfo]:
        """Every export of every server of the cluster with `access = "cluster"`."""
        ...

    def servers(self) -> list[ServerInfo]: ...

    async def raise_minimum(self, pv: str, sequence: int) -> None:
        """Make the PV's server refuse every nexus whose map is older than `sequence`, durably."""
        ...


class VolumeInstances(Protocol):
    """The instances (on all nodes) that have volumes open. Volumes are named `VG/LV`."""

    async def suspend_all(self, volume: str, sequence: int, claim: int) -> None:
        """Return when every instance with the volume open has closed its gate and has nothing in
        flight, or is barred on the servers. Raises StackError when neither can be reached. An
        instance that has heard of a higher claim stays as it is."""
        ...

    async def resume_all(self, volume: str, volume_map: VolumeMap) -> None:
        """Give the map to every live instance with the volume open and open its gate. Idempotent;
        also for instances that were not suspended. Returns when all have acknowledged."""
        ...

    async def openers(self, volume: str) -> list[Opener]:
        """All live openers on all nodes; with `volume` empty those of every volume."""
        ...

    async def opened(self, opener: Opener) -> None:
        """Record a new opener before its map is given out; called while the VG's lock is held.
        From now on it is in `openers` everywhere and takes part in `suspend_all`."""
        ...

    async def closed(self, volume: str, instance: Instance) -> None: ...


class VgLocks(Protocol):
    """Cluster-wide exclusive locks by name, released by the node's death after its fence."""

    def lock(self, name: str) -> AbstractAsyncContextManager[None]: ...
