"""Parameters of the verbs that take little. Pure; those of lvcreate and lvextend stand with their
plans in cvm/planning.py."""

from __future__ import annotations

from typing import Annotated

import msgspec

Names = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class Pvs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`pvcreate PV...`, `pvremove PV...`."""

    pvs: Names
    yes: bool = False
    dry_run: bool = False


class VgCreate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`vgcreate [-s SIZE] VG PV...`."""

    vg: str
    pvs: Names
    extent_size: str = ""
    yes: bool = False
    dry_run: bool = False


class VgExtend(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`vgextend VG PV...`."""

    vg: str
    pvs: Names
    yes: bool = False
    dry_run: bool = False


class Vg(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vg: str


class Vgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`vgremove VG...`."""

    vgs: Names
    yes: bool = False
    dry_run: bool = False


class Volumes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`lvremove VG/LV...`, `lvremove VG`."""

    volumes: Names
    yes: bool = False
    dry_run: bool = False


class Activate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`activate VG/LV [--mode MODE]`, `deactivate VG/LV`."""

    volume: str
    mode: str = "sharedwrite"
    dry_run: bool = False


class Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`pvs|vgs|lvs|status [NAME...]`."""

    names: tuple[str, ...] = ()
