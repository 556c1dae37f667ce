"""How a process signs its frames (cluster/wire.py)."""

from __future__ import annotations

import msgspec

from cluster.ids import Incarnation
from cluster.wire import Keys


class Identity(msgspec.Struct, frozen=True):
    """The constant part of every frame of one life of one sender."""

    sender: int
    cluster_id: bytes
    incarnation: Incarnation
    keys: Keys
