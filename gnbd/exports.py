"""EXPORTS.toml: what a gnbd-server exports. Errors name the file and the key path.

    listen = ["0.0.0.0"]            # addresses (a text or a list); default all
    port = 10809
    unix_sockets = ["/run/nbd.sock"]   # beside them
    unix_mode = "0600"              # of these
    state_dir = "/var/lib/gnbd"     # bars, reservations, identity, acceptor, gnbd.sock
    connections_max = 1024          # of all exports together
    memory_max = "1G"               # for requests that are longer than a connection's buffers
    metrics = "127.0.0.1:9810"      # for Prometheus; none given: no
    heartbeat_port = 7401           # UDP echoes of a server with a vote; 0: none

    [tls]                           # none: no TLS
    certificate = "/etc/gnbd/server-cert.pem"
    key = "/etc/gnbd/server-key.pem"
    authority = "/etc/gnbd/ca-cert.pem"     # clients need a certificate of it
    required = false                # true: nothing goes without TLS

    [[exports]]
    name = "disk0"
    path = "/srv/disk0.img"
    size = "4G"                     # the file is made sparse if it does not exist (once)
    access = "cluster"              # or "plain": standard NBD for anyone
    description = "for the archive" # shown by LIST and INFO
    read_only = false
    tls = "allowed"                 # or "off", "required"
    clients = ["n1", "backup"]      # names in their certificates; none given: anyone
    direct = false                  # true: O_DIRECT, past the page cache of this host
    integrity = "crc32c"            # every read is checked; "none"; default: as gnbdctl has made it
    connections_max = 512
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
FILTER_MS_MAX = 3_600_000
_BOUNDS = {
    "count": (-1, SIZE_BYTES_MAX), "per_mille": (0, 1000), "errno": (1, 4095),
    **{f"{name}_ms": (0, FILTER_MS_MAX) for name in ("read", "write", "flush", "burst")},
}  # fmt: skip
"""Of parameters that are no plain amounts. -1: for ever; errno 0 would be a success."""
SECTOR_BYTES = 512
UNIX_PATH_BYTES_MAX = 107
MEMORY_BYTES_MIN = 64 << 20
"""So much one request may need."""

CONNECTIONS_MAX = 65536

ExportName = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Connections = Annotated[int, msgspec.Meta(ge=1, le=CONNECTIONS_MAX)]


def is_absolute(path: str) -> bool:
    """A path that means the same wherever the server was started."""
    return path.startswith("/") and "\0" not in path


class Tls(msgspec.Struct, forbid_unknown_fields=True):
    """Files in PEM. Clients must have a certificate of `authority`; none given: of nobody.
    `required`: nothing is negotiated without TLS."""

    certificate: str
    key: str
    authority: str = ""
    required: bool = False


class Export(msgspec.Struct, forbid_unknown_fields=True):
    """One export as configured."""

    name: ExportName
    path: str
    size: str | int | None = None
    access: Annotated[str, msgspec.Meta(pattern="^(plain|cluster)$")] = "plain"
    description: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    read_only: bool = False
    direct: bool = False
    integrity: Annotated[str, msgspec.Meta(pattern="^(kept|none|crc32c)$")] = "kept"
    tls: Annotated[str, msgspec.Meta(pattern="^(off|allowed|required)$")] = "allowed"
    clients: list[str] = []
    connections_max: Connections = 512
    filters: list[str] = []

    @property
    def size_bytes(self) -> int | None:
        return None if self.size is None else parse_size(self.size)


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The whole file."""

    state_dir: str
    listen: str | list[str] = "0.0.0.0"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = SERVER_PORT
    heartbeat_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = HEARTBEAT_PORT
    unix_sockets: list[str] = []
    unix_mode: Annotated[str, msgspec.Meta(pattern="^0?[0-7]{3}$")] = "0600"
    connections_max: Connections = 1024
    memory_max: str | int = "1G"
    metrics: str = ""
    tls: Tls | None = None
    exports: list[Export] = []

    def __post_init__(self) -> None:
        if not self.addresses and not self.unix_sockets:
            raise ValueError("listen names no address")
        check_addresses(self.addresses, listen=True)
        if not is_absolute(self.state_dir):
            raise ValueError(f"state_dir: {self.state_dir!r} is not an absolute path")
        for path in self.unix_sockets:
            if len(path.encode()) > UNIX_PATH_BYTES_MAX or not is_absolute(path):
                raise ValueError(f"{path!r} is not the absolute path of a Unix socket")
        host, _, port = self.metrics.rpartition(":")
        if self.metrics:
            if not host or not port.isdecimal() or not 0 <= int(port) <= 65535:
                raise ValueError(f"metrics: {self.metrics!r} is not ADDRESS:PORT")
            check_addresses([host.strip("[]")], listen=True)

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
        lowest, highest = _BOUNDS.get(key, (0, SIZE_BYTES_MAX))
        if wanted is int and not lowest <= int(value) <= highest:
            raise ConfigError(f"filter {kind!r}: {key} must not be {value}")
    if result.get("operation", "all") not in OPERATIONS:
        raise ConfigError(f"filter {kind!r}: operation must be one of {', '.join(OPERATIONS)}")
    if kind == "log" and (whole or "path" in result) and not is_absolute(str(result.get("path"))):
        raise ConfigError("filter 'log' needs path=FILE, an absolute one")
    return FilterSpec(kind, result)


def decode_exports(text: str | bytes, source: str) -> ServerConfig:
    """Decode and check EXPORTS.toml. Raises ConfigError naming source and key path."""
    config = decode_config(text, ServerConfig, source)
    if len(config.exports) > EXPORTS_MAX:
        raise ConfigError(f"{source}: more than {EXPORTS_MAX} exports")
    try:
        if parse_size(config.memory_max) < MEMORY_BYTES_MIN:
            raise ConfigError(f"must be at least {MEMORY_BYTES_MIN}")
    except ConfigError as error:
        raise ConfigError(f"{source}: $.memory_max: {error.message}", hint=error.hint) from error
    seen: set[str] = set()
    for index, export in enumerate(config.exports):
        where = f"{source}: $.exports[{index}]"
        if export.name in seen:
            raise ConfigError(f"{where}.name: {export.name!r} is used twice")
        seen.add(export.name)
        check_export(export, where)
        check_tls(export, config.tls, where)
    return config


def check_tls(export: Export, tls: Tls | None, where: str) -> None:
    """What an export says of TLS must be possible. Raises ConfigError."""
    if tls is None and export.tls == "required":
        raise ConfigError(f"{where}.tls: there is no [tls] with a certificate")
    if tls is not None and tls.required and export.tls == "off":
        raise ConfigError(f"{where}.tls: [tls] demands it of everybody")
    if export.clients and (tls is None or not tls.authority or export.tls == "off"):
        raise ConfigError(f"{where}.clients: names come from certificates; [tls] has no authority")


def check_export(export: Export, where: str) -> None:
    """What the types do not say. Raises ConfigError; `where` is the place of the export."""
    if not is_absolute(export.path):
        raise ConfigError(
            f"{where}.path: {export.path!r} is not an absolute path",
            hint="a service starts in another directory than yours",
        )
    try:
        size = export.size_bytes
        if size is not None and (size < SECTOR_BYTES or size % SECTOR_BYTES):
            raise ConfigError(f"must be a multiple of {SECTOR_BYTES}")
    except ConfigError as error:
        raise ConfigError(f"{where}.size: {error.message}", hint=error.hint) from error
    for number, text_filter in enumerate(export.filters):
        try:
            parse_filter(text_filter)
        except ConfigError as error:
            raise ConfigError(f"{where}.filters[{number}]: {error.message}") from error
