"""What tests of a gnbd-server need of the lab."""

from lab.block_server import (
    INCARNATION,
    GnbdServer,
    export_toml,
    instance,
    member,
    opened,
    reserve_port,
    running,
    wait_for,
)

__all__ = [
    "INCARNATION",
    "GnbdServer",
    "export_toml",
    "instance",
    "member",
    "opened",
    "reserve_port",
    "running",
    "wait_for",
]
