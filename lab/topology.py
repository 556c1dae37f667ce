"""What a lab consists of: hosts, addresses, directories; its state file.

A lab lives in one directory (`--dir`). Everything it makes outside of that directory carries its
tag, four hexadecimal digits derived from the directory's path: network namespaces `cfs-TAG-HOST`
and the control group `cfs-lab-TAG`. So `down` can remove all of it even after the lab's own death,
and never touches anything else.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from cluster.errors import CorruptionError, UsageError

NODES_MAX = 16
SERVERS_MAX = 8
STATE_FILE = "lab.json"
DEFAULT_DIR = Path("/var/tmp/cfs-lab")
NETWORKS = (1, 2)
MOUNT_POINT = "/mnt/cfs"
VOLUME = "vg0/vol0"


class Host(msgspec.Struct, frozen=True):
    """A node or a storage host. `index` counts from 1 within its kind."""

    name: str
    kind: str
    index: int

    @property
    def cluster_id_number(self) -> int:
        return self.index if self.kind == "node" else 128 + self.index

    def address(self, network: int) -> str:
        """IPv4 address in network 1 or 2."""
        assert network in NETWORKS
        host = self.index if self.kind == "node" else 100 + self.index
        return f"10.77.{network - 1}.{host}"


class LabState(msgspec.Struct):
    """The state file. `holders` maps a host to its holder process [pid, start time]. `volatile`: a
    storage host that loses power loses what was not flushed; the filter that does that executes
    every request in Python, and is no part of a server that is to be measured."""

    nodes: int
    servers: int
    disk_size: str
    profile: str
    formatted: bool = False
    volatile: bool = True
    holders: dict[str, tuple[int, int]] = {}


class Lab:
    """Names and places of one lab; no side effects but load and save."""

    def __init__(self, directory: Path, state: LabState) -> None:
        self.directory = directory.resolve()
        self.state = state
        self.tag = hashlib.sha256(str(self.directory).encode()).hexdigest()[:4]

    @property
    def nodes(self) -> list[Host]:
        return [Host(f"n{i}", "node", i) for i in range(1, self.state.nodes + 1)]

    @property
    def servers(self) -> list[Host]:
        return [Host(f"s{i}", "server", i) for i in range(1, self.state.servers + 1)]

    @property
    def hosts(self) -> list[Host]:
        return self.servers + self.nodes

    def host(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(h.name for h in self.hosts)
        raise UsageError(f"this lab has no host {name!r}", hint=f"its hosts: {known}")

    def node(self, name: str) -> Host:
        host = self.host(name)
        if host.kind != "node":
            raise UsageError(
                f"{name} is a storage host, not a node", hint="name a node: n1, n2, ..."
            )
        return host

    def namespace(self, name: str) -> str:
        return f"cfs-{self.tag}-{name}"

    def host_directory(self, host: Host) -> Path:
        return self.directory / "hosts" / host.name

    def save(self) -> None:
        """Replace the state file atomically."""
        path = self.directory / STATE_FILE
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.format(msgspec.json.encode(self.state)))
        new.replace(path)

    @classmethod
    def load(cls, directory: Path) -> Lab:
        """Raises UsageError when no lab lives in the directory."""
        try:
            data = (directory / STATE_FILE).read_bytes()
        except FileNotFoundError:
            raise UsageError(
                f"no lab in {directory}", hint="start one with: cfs-lab up (or name its --dir)"
            ) from None
        try:
            return cls(directory, msgspec.json.decode(data, type=LabState))
        except msgspec.DecodeError as error:
            raise CorruptionError(f"{directory / STATE_FILE} makes no sense: {error}") from error
