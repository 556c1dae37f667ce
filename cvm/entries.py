"""Volume groups inside the register's value. Pure: how a node implements `VgRegister`.

The register keeps free data per VG and a number that rises with every change of it
(`VolumeGroup.sequence`); the entry, with the sequence number of the metadata, is the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.errors import CorruptionError
from cluster.state import SetVolumeGroup, VolumeGroup
from cvm.seams import VgEntry


def entries_of(groups: Sequence[VolumeGroup]) -> dict[str, VgEntry]:
    """`VgRegister.read` from the decided value. Raises CorruptionError."""
    try:
        return {group.name: msgspec.convert(group.data, VgEntry) for group in groups}
    except msgspec.ValidationError as error:
        raise CorruptionError(f"the register's volume groups make no sense: {error}") from error


def change_for(
    groups: Sequence[VolumeGroup], vg: str, expected: VgEntry | None, new: VgEntry | None
) -> SetVolumeGroup | None:
    """The register change that carries out a compare-and-set on a value that has `groups`.

    None when the entry is not the expected one. The change fails by itself when the VG's number
    moved on before it is decided.
    """
    present = next((group for group in groups if group.name == vg), None)
    entry = None if present is None else entries_of([present])[vg]
    if entry != expected:
        return None
    uuid = present.uuid if present is not None else new.uuid if new is not None else ""
    number = present.sequence if present is not None else 0
    group = None
    if new is not None:
        data = msgspec.to_builtins(new)
        group = VolumeGroup(uuid=uuid, name=vg, sequence=number + 1, data=data)
    return SetVolumeGroup(uuid=uuid, expected=number, group=group)
