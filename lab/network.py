"""Two bridged networks and a network namespace per host, with pyroute2.

The bridges `br1` and `br2` live in a namespace of their own (`...-sw`), so that nothing appears in
the machine's own network. A cable is cut at the switch: the host keeps its address and sees its
carrier go, as with a pulled plug.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyroute2 import NetNS, netns

from lab.topology import NETWORKS, Host, Lab

NETNS_DIR = Path("/run/netns")


def _link_index(space: Any, name: str) -> int | None:
    found = space.link_lookup(ifname=name)
    return int(found[0]) if found else None


def _ensure_namespace(name: str) -> Any:
    if not (NETNS_DIR / name).exists():
        netns.create(name)
    return NetNS(name)


def _ensure_bridge(switch: Any, name: str) -> int:
    index = _link_index(switch, name)
    if index is None:
        switch.link("add", ifname=name, kind="bridge", br_stp_state=0, br_forward_delay=0)
        index = _link_index(switch, name)
        assert index is not None
    switch.link("set", index=index, state="up")
    return index


def _plug(lab: Lab, switch: Any, space: Any, host: Host, network: int, bridge: int) -> None:
    leg = f"eth{network}"
    port = f"{host.name}-{network}"
    if _link_index(space, leg) is None:
        peer = {"ifname": port, "net_ns_fd": lab.namespace("sw")}
        space.link("add", ifname=leg, kind="veth", peer=peer)
        index = _link_index(space, leg)
        space.addr("add", index=index, address=host.address(network), prefixlen=24)
    space.link("set", index=_link_index(space, leg), state="up")
    switch.link("set", index=_link_index(switch, port), master=bridge, state="up")


def build(lab: Lab) -> None:
    """Make every namespace, bridge and cable that is missing."""
    with _ensure_namespace(lab.namespace("sw")) as switch:
        bridges = {network: _ensure_bridge(switch, f"br{network}") for network in NETWORKS}
        for host in lab.hosts:
            with _ensure_namespace(lab.namespace(host.name)) as space:
                space.link("set", index=1, state="up")
                for network in NETWORKS:
                    _plug(lab, switch, space, host, network, bridges[network])


def set_cable(lab: Lab, host: Host, network: int, *, up: bool) -> None:
    """Pull or plug the cable of a host in network 1 or 2, at the switch."""
    with NetNS(lab.namespace("sw")) as switch:
        index = _link_index(switch, f"{host.name}-{network}")
        assert index is not None
        switch.link("set", index=index, state="up" if up else "down")


def cables(lab: Lab, host: Host) -> dict[int, bool]:
    """Which cables of a host are plugged in."""
    with NetNS(lab.namespace("sw")) as switch:
        result = {}
        for network in NETWORKS:
            index = _link_index(switch, f"{host.name}-{network}")
            links = switch.get_links(index) if index is not None else ()
            result[network] = any(link.get("state") == "up" for link in links)
        return result


def namespaces(tag: str) -> list[str]:
    """The namespaces that carry a lab's tag."""
    if not NETNS_DIR.exists():
        return []
    return sorted(p.name for p in NETNS_DIR.iterdir() if p.name.startswith(f"cfs-{tag}-"))


def destroy(tag: str) -> None:
    """Remove every namespace with the lab's tag; bridges and cables go with them."""
    for name in namespaces(tag):
        netns.remove(name)
