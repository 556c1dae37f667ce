"""Reports of the core as events: stable names, sentences for people. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.events import EventName
from cluster.state import ClusterState, node_of

_NAMES = {
    "view": EventName.VIEW_DECIDED,
    "suspect": EventName.NODE_SUSPECTED,
    "alive": EventName.NODE_SEEN,
    "silent": EventName.INSTANCE_SILENT,
    "installed": EventName.SERVER_INSTALLED,
}


def describe_report(kind: str, data: Mapping[str, object], state: ClusterState) -> tuple[str, str]:
    """Event name and text of a report."""
    name = str(_NAMES.get(kind, kind))
    node = data.get("node")
    called = str(node)
    if isinstance(node, int):
        info = node_of(state, node)
        called = info.name if info is not None else f"node {node}"
    match kind:
        case "view":
            members = data.get("members")
            present = ", ".join(members) if isinstance(members, Mapping) else ""
            return name, f"view {data.get('epoch')}: nodes {present}"
        case "suspect":
            return name, f"{called} is not heard any more"
        case "alive":
            return name, f"{called} is heard"
        case "silent":
            return name, f"{data.get('instance')} is barred and caches nothing any more"
        case _:
            return name, kind
