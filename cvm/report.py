"""Columns of `pvs`, `vgs`, `lvs` and the tree of `status`. Pure: rows in, lines out.

One table holds every field: its name (LVM's where LVM has it), heading, type. Sizes are bytes in
the rows and formatted here (`--units`). JSON has LVM's form: `{"report": [{"lv": [{...}]}]}`, all
values strings; `status --json` is typed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

from cluster.errors import UsageError
from cvm.units import format_size

Row = dict[str, Any]


class Field(msgspec.Struct, frozen=True):
    """One column. kind: text, number or size. LVM fields that never apply here are always empty."""

    name: str
    heading: str
    kind: str = "text"


class Report(msgspec.Struct, frozen=True):
    """A listing: `key` is its name in JSON, `default` its columns without `-o`."""

    key: str
    fields: tuple[Field, ...]
    default: tuple[str, ...]
    sort: tuple[str, ...]


PVS = Report(
    "pv",
    (
        Field("pv_name", "PV"),
        Field("vg_name", "VG"),
        Field("pv_fmt", "Fmt"),
        Field("pv_attr", "Attr"),
        Field("pv_size", "PSize", "size"),
        Field("pv_free", "PFree", "size"),
        Field("pv_used", "Used", "size"),
        Field("pv_uuid", "PV UUID"),
        Field("dev_size", "DevSize", "size"),
        Field("pe_start", "1st PE", "size"),
        Field("pv_pe_count", "PE", "number"),
        Field("pv_pe_alloc_count", "Alloc", "number"),
        Field("pv_missing", "Missing"),
        Field("server", "Server"),
        Field("export", "Export"),
        Field("minimum_seqno", "MinSeq", "number"),
    ),
    ("pv_name", "vg_name", "pv_fmt", "pv_attr", "pv_size", "pv_free"),
    ("pv_name",),
)
VGS = Report(
    "vg",
    (
        Field("vg_name", "VG"),
        Field("pv_count", "#PV", "number"),
        Field("lv_count", "#LV", "number"),
        Field("snap_count", "#SN", "number"),
        Field("vg_attr", "Attr"),
        Field("vg_size", "VSize", "size"),
        Field("vg_free", "VFree", "size"),
        Field("vg_uuid", "VG UUID"),
        Field("vg_seqno", "Seq", "number"),
        Field("vg_extent_size", "Ext", "size"),
        Field("vg_extent_count", "#Ext", "number"),
        Field("vg_free_count", "Free", "number"),
        Field("vg_missing_pv_count", "#PV Missing", "number"),
        Field("change", "Change"),
    ),
    ("vg_name", "pv_count", "lv_count", "snap_count", "vg_attr", "vg_size", "vg_free"),
    ("vg_name",),
)
LVS = Report(
    "lv",
    (
        Field("lv_name", "LV"),
        Field("vg_name", "VG"),
        Field("lv_attr", "Attr"),
        Field("lv_size", "LSize", "size"),
        Field("pool_lv", "Pool"),
        Field("origin", "Origin"),
        Field("data_percent", "Data%"),
        Field("metadata_percent", "Meta%"),
        Field("move_pv", "Move"),
        Field("mirror_log", "Log"),
        Field("copy_percent", "Cpy%Sync"),
        Field("convert_lv", "Convert"),
        Field("lv_full_name", "LV"),
        Field("lv_uuid", "LV UUID"),
        Field("seg_count", "#Seg", "number"),
        Field("segtype", "Type"),
        Field("stripes", "#Str", "number"),
        Field("stripe_size", "Stripe", "size"),
        Field("devices", "Devices"),
        Field("lv_active", "Active"),
        Field("lv_open_count", "#Open", "number"),
        Field("open_on", "Open on"),
        Field("open_mode", "Mode"),
        Field("lv_host", "Host"),
        Field("vg_seqno", "Seq", "number"),
    ),
    (
        "lv_name",
        "vg_name",
        "lv_attr",
        "lv_size",
        "pool_lv",
        "origin",
        "data_percent",
        "metadata_percent",
        "move_pv",
        "mirror_log",
        "copy_percent",
        "convert_lv",
    ),
    ("vg_name", "lv_name"),
)
REPORTS = {"pvs": PVS, "vgs": VGS, "lvs": LVS}


class Style(msgspec.Struct, frozen=True):
    """How a listing is written; the options of LVM's reporting commands."""

    units: str = "r"
    suffix: bool = True
    headings: bool = True
    separator: str = ""
    aligned: bool = True


def _find(report: Report, name: str) -> Field:
    for field in report.fields:
        if field.name == name or field.name == f"{report.key}_{name}":
            return field
    names = ", ".join(field.name for field in report.fields)
    raise UsageError(f"Unrecognised field: {name}", hint=f"fields: {names}")


def choose_fields(report: Report, options: Sequence[str]) -> tuple[Field, ...]:
    """The columns for the `-o` options: a list, `+more`, `-less`, `all`. Raises UsageError."""
    names = list(report.default)
    for option in options:
        sign = option[0] if option[:1] in ("+", "-") else ""
        listed = [name.strip() for name in option.removeprefix(sign).split(",") if name.strip()]
        if any(name in ("all", f"{report.key}_all") for name in listed):
            found = [field.name for field in report.fields]
        else:
            found = [_find(report, name).name for name in listed]
        if sign == "+":
            names += [name for name in found if name not in names]
        elif sign == "-":
            names = [name for name in names if name not in found]
        else:
            names = found
    return tuple(_find(report, name) for name in names)


def sort_rows(report: Report, rows: Sequence[Row], keys: str = "") -> list[Row]:
    """Rows in LVM's order, or by `-O key,-key`. Raises UsageError."""
    order = [key.strip() for key in keys.split(",") if key.strip()] or list(report.sort)
    out = list(rows)
    for key in reversed(order):
        field = _find(report, key.lstrip("+-"))
        out.sort(key=partial(_sort_key, field), reverse=key[0] == "-")
    return out


def _sort_key(field: Field, row: Row) -> tuple[int, str]:
    if field.kind == "text":
        return 0, str(row.get(field.name, ""))
    return int(row.get(field.name, 0)), ""


def cell(row: Row, field: Field, style: Style) -> str:
    """One value as text."""
    value = row.get(field.name, "")
    if value == "" or value is None:
        return ""
    if isinstance(value, bool):
        return ("missing" if value else "") if field.name == "pv_missing" else str(value).lower()
    if field.kind == "size":
        if field.name == "stripe_size" and value == 0:
            return "0"
        return format_size(int(value), style.units, suffix=style.suffix)
    return str(value)


def render(fields: Sequence[Field], rows: Sequence[Row], style: Style) -> list[str]:
    """Lines of a listing as LVM prints them, indented by two."""
    table = [[cell(row, field, style) for field in fields] for row in rows]
    if style.headings and table:
        table.insert(0, [field.heading for field in fields])
    aligned = style.aligned and not style.separator
    if not aligned:
        return [f"  {(style.separator or ' ').join(line)}" for line in table]
    widths = [
        max((len(line[column]) for line in table), default=0) for column in range(len(fields))
    ]
    lines = []
    for line in table:
        cells = [
            text.ljust(width) if field.kind == "text" else text.rjust(width)
            for text, width, field in zip(line, widths, fields, strict=True)
        ]
        lines.append(f"  {' '.join(cells).rstrip()}")
    return lines


def render_json(report: Report, fields: Sequence[Field], rows: Sequence[Row], style: Style) -> str:
    """The listing as LVM's `--reportformat json`."""
    body = [{field.name: cell(row, field, style) for field in fields} for row in rows]
    whole = {"report": [{report.key: body}]}
    return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode()


def help_fields(report: Report) -> list[str]:
    """`-o help`."""
    width = max(len(field.name) for field in report.fields)
    return [f"  {field.name.ljust(width)} - {field.heading}" for field in report.fields]


# --- status ------------------------------------------------------------------------------------


def _shape(lv: Row) -> str:
    if lv["stripes"] > 1:
        return f"striped x{lv['stripes']}, {format_size(lv['stripe_size'], 'h')}"
    return str(lv["segtype"])


def _advice(vg: Row) -> tuple[str, str]:
    """(status, action) lines, as `zpool status` has them; empty when all is well."""
    if vg["trouble"]:
        return vg["trouble"], "Bring the block servers back; then: cvmctl status"
    if vg["state"] != "ONLINE":
        return (
            "Some physical volumes do not answer. I/O to volumes on them waits; nothing is lost.",
            "Bring the block server back: clusterctl status, gnbdctl status",
        )
    if vg["change"]:
        return (
            f"A change is under way or was left unfinished: {vg['change']}.",
            "If it stays, any command that changes the group settles it; volumes may wait.",
        )
    return "", ""


def render_status(rows: Sequence[Row]) -> list[str]:
    """The tree of `cvmctl status`: groups, volumes, legs with their servers, and who has them."""
    lines: list[str] = []
    for vg in rows:
        if lines:
            lines.append("")
        lines.append(f"  group: {vg['vg_name']}")
        lines.append(f"  state: {vg['state']}")
        for name, text in zip(("status", "action"), _advice(vg), strict=True):
            if text:
                lines.append(f" {name}: {text}")
        size, free = format_size(vg["vg_size"], "h"), format_size(vg["vg_free"], "h")
        lines.append(f"   size: {size}, {free} free")
        last = f", last change: {vg['description']}" if vg["description"] else ""
        by = f" on {vg['written_on']}" if vg["written_on"] else ""
        lines.append(f"    seq: {vg['vg_seqno']}{last}{by}")
        lines.append(" config:")
        lines += ["", *_tree(vg)]
    return lines or ["  no volume groups"]


def _tree(vg: Row) -> list[str]:
    table = [("NAME", "STATE", "SIZE", "")]
    table.append((vg["vg_name"], vg["state"], format_size(vg["vg_size"], "h"), ""))
    for lv in vg["lvs"]:
        size = format_size(lv["lv_size"], "h")
        table.append((f"  {lv['lv_name']}", lv["state"], size, _shape(lv)))
        for leg in lv["legs"]:
            state = leg["state"]
            note = "" if state == "ONLINE" else "server does not answer"
            size = format_size(leg["size"], "h")
            table.append((f"    {leg['pv_name']}", state, size, note))
        for one in lv["openers"]:
            node, incarnation, number = one["instance"]
            who = f"n{node}.{incarnation}.{number}"
            table.append(
                (f"    @{one['node_name']}", "open", "", f"{one['title']} {who} {one['mode']}")
            )
    used = {leg["pv_name"] for lv in vg["lvs"] for leg in lv["legs"]}
    for pv in vg["pvs"]:
        if pv["pv_name"] not in used:
            table.append((f"  {pv['pv_name']}", pv["state"], "", "unused"))
    widths = [max(len(line[column]) for line in table) for column in range(3)]
    return [
        "        "
        + "  ".join(
            (line[0].ljust(widths[0]), line[1].ljust(widths[1]), line[2].rjust(widths[2]), line[3])
        ).rstrip()
        for line in table
    ]
