"""Identities that every layer shares.

A *nexus* in the words of SCSI is an `Instance` here: one process on one node in one life of
that node. It stays the same over any number of connections, paths and reconnects, and it is
what the block servers admit or bar.
"""

from __future__ import annotations

from typing import NewType

import msgspec

NodeId = NewType("NodeId", int)
"""A node of the cluster, 1..64."""

ServerId = NewType("ServerId", int)
"""A block server, 129..192, so that a voter is named by one integer (`VoterId`)."""

VoterId = NewType("VoterId", int)
"""A register voter: the `NodeId` of a clusterd or the `ServerId` of a gnbd-server."""

Incarnation = NewType("Incarnation", int)
"""One life of a node, u64, strictly increasing; never reused."""

InstanceNo = NewType("InstanceNo", int)
"""One process of one incarnation, u16; 0 is clusterd itself."""

Epoch = NewType("Epoch", int)
"""Counter of decided views; decided by the register only."""

NODE_ID_MAX = 64
SERVER_ID_MIN = 129
SERVER_ID_MAX = 192
INSTANCE_NO_MAX = 0xFFFF


class Instance(msgspec.Struct, frozen=True, array_like=True, order=True, gc=False):
    """One process of one life of one node: the nexus of fencing, dlm and gnbd."""

    node: NodeId
    incarnation: Incarnation
    number: InstanceNo

    def __str__(self) -> str:
        return f"n{self.node}.{self.incarnation}.{self.number}"
