"""EXPORTS.toml: what a gnbd-server exports. Errors name the file and the key path.

    listen = ["0.0.0.0"]            # addresses (a text or a list); default all
    port = 10809
    state_dir = "/var/lib/gnbd"     # bars, reservations, identity, acceptor
    heartbeat_port = 7401           # UDP echoes of a server with a vote; 0: none

    [[exports]]
    name = "disk0"
    path = "/srv/disk0.img"
    size = "4G"                     # the file is made sparse if it does not exist
    access = "cluster"              # or "plain": standard NBD for anyone
    description = "for the archive" # shown by LIST and INFO
    read_only = false
    filters = ["volatile", "delay:write_ms=5", "log:path=/tmp/writes.log"]

Filters stand bottom up: the first one is next to the file.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from cluster.config import HEARTBEAT_PORT, SERVER_PORT, check_addresses, decode_config
from cluster.errors import ConfigError
from cluster.sizes import SIZE_BYTES_MAX, parse_size

EXPORTS_MAX = 256
OPERATIONS = ("all", "read", "write", "flush", "trim", "zero", "cache", "status")
"""Of a filter; `write` is also trim and zero, `read` also cache and status."""
_CHOICE: dict[str, type] = {
    "operation": str, "count": int, "skip": int, "per_mille": int, "seed": int, "offset": int,
    "length": int,
}  # fmt: skip
FILTER_KINDS: dict[str, dict[str, type]] = {
    "volatile": {},
    "log": {"path": str},
    "delay": {"read_ms": int, "write_ms": int, "flush_ms": int},
    "error": _CHOICE | {"errno": int},
    "drop": _CHOICE,
    "torn": _CHOICE | {"bytes": int},
    "rate": {"read_bytes_s": int, "write_bytes_s": int, "requests_s": int, "burst_ms": int},
    "stats": {},
}
SECTOR_BYTES = 512

ExportName = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class Export(msgspec.Struct, forbid_unknown_fields=True):
    """One export as configured."""

    name: ExportName
    path: Annotated[str, msgspec.Meta(min_length=1)]
    size: str | int | None = None
    access: Annotated[str, msgspec.Meta(pattern="^(plain|cluster)$")] = "plain"
    description: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    read_only: bool = False
    filters: list[str] = []


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    state_dir: Annotated[str, msgspec.Meta(min_length=1)]
    listen: str | list[str] = "0.0.0.0"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = SERVER_PORT
    heartbeat_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = HEARTBEAT_PORT
    exports: list[Export] = []

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ValueError("listen names no address")
        check_addresses(self.addresses, listen=True)

    @property
    def addresses(self) -> list[str]:
        return [self.listen] if isinstance(self.listen, str) else self.listen


class FilterSpec(msgspec.Struct, frozen=True):
    """One filter: kind and parameters."""

    kind: str
    parameters: dict[str, int | str] = {}

    def __str__(self) -> str:
        text = ",".join(f"{k}={v}" for k, v in self.parameters.items())
        return f"{self.kind}:{text}" if text else self.kind


def parse_filter(text: str, *, whole: bool = True) -> FilterSpec:
    """ "kind" or "kind:key=value,..."; `whole`: with all that it needs. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    parameters: dict[str, int | str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"filter {text!r}: {part!r} is not key=value")
        parameters[key] = value
    return checked_filter(kind, parameters, whole=whole)


def checked_filter(
    kind: str, parameters: dict[str, int | str], *, whole: bool = True
) -> FilterSpec:
    """A filter whose parameters have the right names and types. Raises ConfigError."""
    known = FILTER_KINDS.get(kind)
    if known is None:
        raise ConfigError(f"unknown filter {kind!r}: one of {', '.join(FILTER_KINDS)}")
    result: dict[str, int | str] = {}
    for key, value in parameters.items():
        wanted = known.get(key)
        if wanted is None:
            raise ConfigError(f"filter {kind!r} has no parameter {key!r}")
        try:
            result[key] = int(value) if wanted is int else str(value)
        except ValueError:
            raise ConfigError(f"filter {kind!r}: {key} must be a number") from None
        lowest = -1 if key == "count" else 0  # -1: for ever
        if wanted is int and not lowest <= int(value) <= SIZE_BYTES_MAX:
            raise ConfigError(f"filter {kind!r}: {key} must not be {value}")
    if result.get("operation", "all") not in OPERATIONS:
        raise ConfigError(f"filter {kind!r}: operation must be one of {', '.join(OPERATIONS)}")
    if whole and kind == "log" and "path" not in result:
        raise ConfigError("filter 'log' needs path=FILE")
    return FilterSpec(kind, result)


def decode_exports(text: str | bytes, source: str) -> ServerConfig:
    """Decode and check EXPORTS.toml. Raises ConfigError naming source and key path."""
    config = decode_config(text, ServerConfig, source)
    if len(config.exports) > EXPORTS_MAX:
        raise ConfigError(f"{source}: more than {EXPORTS_MAX} exports")
    seen: set[str] = set()
    for index, export in enumerate(config.exports):
        where = f"{source}: $.exports[{index}]"
        if export.name in seen:
            raise ConfigError(f"{where}.name: {export.name!r} is used twice")
        seen.add(export.name)
        try:
            if export.size is not None:
                size = parse_size(export.size)
                if size < SECTOR_BYTES or size % SECTOR_BYTES:
                    raise ConfigError(f"must be a multiple of {SECTOR_BYTES}")
        except ConfigError as error:
            raise ConfigError(f"{where}.size: {error.message}") from error
        for number, text_filter in enumerate(export.filters):
            try:
                parse_filter(text_filter)
            except ConfigError as error:
                raise ConfigError(f"{where}.filters[{number}]: {error.message}") from error
    return config
