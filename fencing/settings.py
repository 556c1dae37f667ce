"""Which fence methods a site has, and in which order they are tried: `fencing.toml`.

    levels = [["servers"], ["lun", "pdu"], ["manual"]]   # default: [["servers"]]
    rounds = 2                     # how often the whole list is tried
    pause_ms = 5000                # between two rounds

    [methods.pdu]
    kind = "agent"                 # an agent of the distribution
    agent = "fence_apc"            # /usr/sbin/fence_*
    parameters = { ip = "10.0.0.9", username = "cfs" }   # as in the agent's metadata
    secrets = "/etc/cfs/pdu.secrets"   # lines `password=...`, mode 0600
    ports = { n1 = "1", n2 = "2" } # plug of a node; without a line: the node's name
    retries = 1                    # after the first attempt
    timeout_ms = 60000             # of one attempt
    delay_ms = 0                   # before the first attempt
    retry_ms = 1000                # between two attempts

    [methods.lun]
    kind = "reservation"           # SCSI or NVMe persistent reservations through the kernel
    devices = ["/dev/mapper/lun0"] # all of them or none

| kind | proven when |
|---|---|
| servers | every block server, one at least, has installed a view that does not admit the life |
| reservation | each device took PREEMPT AND ABORT, or its keys show that only registrants write |
| agent | `off` succeeded and `status` then says off |
| self | the node runs a later life, which begins only after its guard has ended the earlier one |
| manual | an operator has typed the node's name (`fencectl confirm`) |

`servers`, `self` and `manual` need no table of their own.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

import msgspec

from cluster.config import decode_config
from cluster.errors import ConfigError
from fencing.methods import Method

Kind = Literal["servers", "reservation", "agent", "self", "manual"]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]

TIMEOUT_MS: dict[str, int] = {
    "servers": 30_000,
    "reservation": 30_000,
    "agent": 60_000,
    "self": 30_000,
    "manual": 3_600_000,
}
BUILT_IN = ("servers", "self", "manual")
OURS = ("action", "plug", "port", "nodename")
SECRET = re.compile(r"pass(w(or)?d)?(_|$)|secret|token|_key$")
AGENT = re.compile(r"fence_[a-z0-9_]+")


class MethodConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One table `[methods.NAME]`."""

    kind: Kind
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 1
    timeout_ms: Annotated[int, msgspec.Meta(ge=1, le=86_400_000)] | None = None
    delay_ms: Milliseconds = 0
    retry_ms: Milliseconds = 1000
    agent: str = ""
    parameters: dict[str, str | int | bool] = {}
    secrets: str = ""
    ports: dict[str, str] = {}
    devices: list[str] = []


Level = Annotated[list[str], msgspec.Meta(min_length=1, max_length=8)]
Levels = Annotated[list[Level], msgspec.Meta(min_length=1, max_length=9)]


class FencingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """fencing.toml."""

    levels: Levels = msgspec.field(default_factory=lambda: [["servers"]])
    rounds: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    pause_ms: Milliseconds = 5000
    methods: dict[str, MethodConfig] = {}

    def method(self, name: str) -> MethodConfig:
        """The table of a method, or what a built-in one has without."""
        found = self.methods.get(name)
        if found is None:
            assert name in BUILT_IN
            return MethodConfig(kind=name)  # type: ignore[arg-type]
        return found

    def plan(self) -> list[list[Method]]:
        """The levels for `methods.Fencer`."""
        return [[self._times(name) for name in level] for level in self.levels]

    def _times(self, name: str) -> Method:
        config = self.method(name)
        timeout_ms = config.timeout_ms or TIMEOUT_MS[config.kind]
        return Method(name, config.retries, timeout_ms, config.delay_ms, config.retry_ms)


def decode_fencing(text: str | bytes, source: str) -> FencingConfig:
    """fencing.toml. Raises ConfigError: one sentence that names the file and the place."""
    config = decode_config(text, FencingConfig, source)
    for name, method in config.methods.items():
        complaint = _complaint(name, method)
        if complaint:
            raise ConfigError(f"{source}: method {name}: {complaint}", hint=f"correct {source}")
    for level in config.levels:
        for name in level:
            if name not in config.methods and name not in BUILT_IN:
                raise ConfigError(
                    f"{source}: a level names the method {name}, which has no table",
                    hint=f"add [methods.{name}], or use {', '.join(BUILT_IN)}",
                )
        if len(set(level)) != len(level):
            raise ConfigError(f"{source}: a level names a method twice", hint=f"correct {source}")
    return config


def _complaint(name: str, method: MethodConfig) -> str:
    """What is wrong with a table, or an empty text."""
    if name in BUILT_IN and method.kind != name:
        return f"this name belongs to kind {name}"
    if method.kind != "agent":
        for key in ("agent", "parameters", "secrets", "ports"):
            if getattr(method, key):
                return f"{key} belongs to kind agent"
    if method.kind != "reservation" and method.devices:
        return "devices belong to kind reservation"
    if method.kind == "reservation" and not method.devices:
        return "devices are missing"
    if method.kind == "agent":
        return _agent_complaint(method)
    return ""


def _agent_complaint(method: MethodConfig) -> str:
    if not AGENT.fullmatch(method.agent):
        return f"{method.agent!r} is not the name of a fence agent (fence_...)"
    for key, value in method.parameters.items():
        if key in OURS:
            return f"parameter {key} is set by fencing itself"
        if key.endswith("_script"):
            return f"parameter {key}: put the value into the file of `secrets` instead"
        if SECRET.search(key):
            return f"parameter {key} looks like a secret: put it into the file of `secrets`"
        if "\n" in f"{key}{value}":
            return f"parameter {key} has more than one line"
    return ""


def decode_secrets(text: str, source: str) -> dict[str, str]:
    """Lines `key=value`; empty lines and lines that begin with # are passed over."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip() or key.strip() in OURS:
            raise ConfigError(f"{source}: line {number} is not `name=value`")
        found[key.strip()] = value
    return found
