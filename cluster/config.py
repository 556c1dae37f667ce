"""Configuration: TOML decoded into Structs; an error names the file and the key path.

One knob, the profile; every period and limit is derived from it (cluster/timing.py).
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import ConfigError
from cluster.ids import NODE_ID_MAX, NodeId
from cluster.state import ClusterState
from cluster.tls import TlsSection

T = TypeVar("T")

CONTROL_PORT = 7400
HEARTBEAT_PORT = 7401
SERVER_PORT = 10809

Hex16 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
Hex32 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Addresses = Annotated[list[str], msgspec.Meta(min_length=1, max_length=4)]


def check_addresses(addresses: Sequence[str], *, listen: bool = False) -> None:
    """Raise ValueError unless these are different IP addresses, of one interface each (when
    listening all interfaces will do)."""
    for number, text in enumerate(addresses):
        try:
            address = ip_address(text)
        except ValueError:
            raise ValueError(f"{text!r} is not an IP address") from None
        if address.is_multicast or (address.is_unspecified and not listen):
            raise ValueError(f"{text} is not the address of one interface")
        if text in addresses[:number]:
            raise ValueError(f"address {text} is there twice")


class ClusterSection(msgspec.Struct, forbid_unknown_fields=True):
    """What all nodes share. `key` is the cluster key: whoever has it is trusted."""

    id: Hex16
    name: Name
    key: Hex32
    profile: Annotated[str, msgspec.Meta(pattern="^(fast|default|patient)$")] = "default"


class NodeSection(msgspec.Struct, forbid_unknown_fields=True):
    """This node: its id and one address per network, in the order of the networks."""

    id: Annotated[NodeId, msgspec.Meta(ge=1, le=NODE_ID_MAX)]
    name: Name
    addresses: Addresses

    def __post_init__(self) -> None:
        check_addresses(self.addresses)


class PortsSection(msgspec.Struct, forbid_unknown_fields=True):
    """The same on every node."""

    control: Port = CONTROL_PORT
    heartbeat: Port = HEARTBEAT_PORT


class NodeConfig(msgspec.Struct, forbid_unknown_fields=True):
    """node.toml: what a node must know before it can ask anybody."""

    cluster: ClusterSection
    node: NodeSection
    ports: PortsSection = msgspec.field(default_factory=PortsSection)
    tls: TlsSection | None = None


class Token(msgspec.Struct, frozen=True):
    """What an invitation carries: enough to find the cluster and to be believed by it. `known` is
    the register's value without volumes and history."""

    config: NodeConfig
    known: ClusterState


def decode_config(text: str | bytes, kind: type[T], source: str) -> T:
    """Decode TOML. Raises ConfigError that names `source` and the key path."""
    try:
        return msgspec.toml.decode(text, type=kind)
    except BROKEN as error:
        raise ConfigError(f"{source}: {error}", hint=f"correct {source}") from error


def read_config_text(path: Path) -> bytes:
    """The bytes of a configuration file. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def encode_node_config(config: NodeConfig) -> str:
    """node.toml as text; `decode_config` gives the same value back."""

    def table(section: msgspec.Struct) -> list[str]:
        values = msgspec.to_builtins(section)
        return [f"{key} = {json.dumps(value)}" for key, value in values.items()]

    lines = ["[cluster]", *table(config.cluster)]
    lines += ["", "[node]", *table(config.node)]
    lines += ["", "[ports]", *table(config.ports)]
    if config.tls is not None:
        lines += ["", "[tls]", *table(config.tls)]
    return "\n".join(lines) + "\n"


def encode_token(token: Token) -> str:
    """One line of base64 that `decode_token_untrusted` reads."""
    return "CFS1-" + _base64(msgspec.msgpack.encode(token))


def decode_token_untrusted(text: str) -> Token:
    """The inverse of `encode_token`. Raises ConfigError."""
    try:
        kind, _, body = text.strip().partition("-")
        if kind != "CFS1":
            raise ValueError("it does not start with CFS1-")
        return msgspec.msgpack.decode(_unbase64(body), type=Token)
    except BROKEN as error:
        raise ConfigError(
            f"this is not an invitation token: {error}",
            hint="clusterctl invite makes one; that of clusterctl server add is for gnbd-server "
            "--join",
        ) from error


def _base64(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _unbase64(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
