"""One authenticated CONTROL session, either end, without I/O (gnbd.messages)."""

from __future__ import annotations

import msgspec

from cluster.errors import AuthenticationError
from cluster.ids import Epoch, Incarnation
from cluster.wire import KIND_STREAM, Frame, Keys, seal, unseal_untrusted
from gnbd.messages import session_keys


class Peer(msgspec.Struct, frozen=True):
    """How one end presents itself in its frames: NodeId or ServerId, and its life."""

    sender: int
    cluster_id: bytes
    incarnation: Incarnation = Incarnation(0)


class ControlSession:
    """Seals what goes out, opens what comes in; sequence numbers must rise by one."""

    def __init__(self, keys: Keys, peer: Peer, client_nonce: bytes, server_nonce: bytes) -> None:
        self._keys = session_keys(keys, client_nonce, server_nonce)
        self._me = peer
        self._sent = 0
        self._received = 0

    def seal(self, payload: bytes, epoch: Epoch) -> bytes:
        """One frame."""
        self._sent += 1
        me = self._me
        frame = Frame(
            sender=me.sender, cluster_id=me.cluster_id, incarnation=me.incarnation, epoch=epoch,
            config_epoch=0, sequence=self._sent, payload=payload, kind=KIND_STREAM,
        )  # fmt: skip
        return seal(self._keys, frame)

    def open_untrusted(self, data: bytes) -> Frame:
        """The inverse. Raises ProtocolError; the session is over then."""
        frame = unseal_untrusted(self._keys, self._me.cluster_id, data)
        self._received += 1
        if frame.sequence != self._received or frame.kind != KIND_STREAM:
            raise AuthenticationError("a frame of this session is missing or was repeated")
        return frame
