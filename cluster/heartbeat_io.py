"""Heartbeats and echoes as authenticated datagrams, over every network, without trio.

One UDP socket per network. A datagram is a sealed frame (cluster/wire.py); its sequence number
rises per (sender, incarnation, network), and one that is not above the last is thrown away: a
replayed or doubled datagram is never looked at. What cannot be sent is dropped: the next heartbeat
comes soon. `receive` decodes at most `BURST_MAX` datagrams at once, so that a flood starves nobody.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

from cluster.errors import AuthenticationError, ProtocolError
from cluster.guard_events import Heard
from cluster.holders_io import bind
from cluster.identity import Identity
from cluster.ids import Epoch
from cluster.messages import (
    Echo,
    Heartbeat,
    Message,
    decode_message_untrusted,
    encode_message,
)
from cluster.wire import KIND_DATAGRAM, Frame, seal, unseal_untrusted

BURST_MAX = 64
DATAGRAM_BYTES_LIMIT = 60_000
"""Above DATAGRAM_BYTES_MAX (hundreds of instances on a node) IP has to cut it in pieces."""
LIVES_MAX = 512
PRIORITY = 6
DSCP_CS6 = 0xC0


class Datagrams:
    """The heartbeat sockets of one process. `on_wrong_key` is told of a peer, at one of its own
    addresses, whose datagrams carry another key; anyone who can forge that address can lie so."""

    def __init__(
        self,
        identity: Identity,
        addresses: Sequence[str],
        port: int,
        on_wrong_key: Callable[[int], None] = lambda _peer: None,
    ) -> None:
        self._on_wrong_key = on_wrong_key
        self._identity = identity
        self._port = port
        self._peers: dict[int, list[str]] = {}
        self._sequence = 0
        self._seen: dict[tuple[int, int, int], int] = {}
        self.sockets = [_bind(address, port) for address in addresses]

    def close(self) -> None:
        """Close the sockets."""
        for sock in self.sockets:
            sock.close()

    def set_peers(self, peers: Mapping[int, Sequence[str]]) -> None:
        """The addresses of nodes and servers by id, in the order of the networks."""
        self._peers = {peer: list(addresses) for peer, addresses in peers.items()}

    def send(self, to: int, network: int, message: Message, config_epoch: int = 0) -> None:
        """Send one message over one network."""
        addresses = self._peers.get(to, [])
        if network >= len(addresses) or network >= len(self.sockets):
            return
        body = encode_message(message)
        assert len(body) <= DATAGRAM_BYTES_LIMIT, f"a datagram of {len(body)} bytes"
        self._sequence += 1
        epoch = message.epoch if isinstance(message, Heartbeat) else Epoch(0)
        frame = Frame(
            sender=self._identity.sender,
            cluster_id=self._identity.cluster_id,
            incarnation=self._identity.incarnation,
            epoch=epoch,
            config_epoch=config_epoch,
            sequence=self._sequence,
            payload=body,
            kind=KIND_DATAGRAM,
        )
        try:
            self.sockets[network].sendto(
                seal(self._identity.keys, frame), (addresses[network], self._port)
            )
        except OSError:
            pass

    def receive(self, network: int) -> list[Heard]:
        """What has come in on one network, authenticated and new."""
        found: list[Heard] = []
        for _ in range(BURST_MAX):
            try:
                data, address = self.sockets[network].recvfrom(DATAGRAM_BYTES_LIMIT)
            except BlockingIOError:
                break
            except OSError:
                # An ICMP error of an earlier datagram: the peer is away; not our concern here.
                continue
            heard = self._open(network, data, address[0])
            if heard is not None:
                found.append(heard)
        return found

    def _open(self, network: int, data: bytes, address: str) -> Heard | None:
        identity = self._identity
        try:
            frame = unseal_untrusted(identity.keys, identity.cluster_id, data)
            message = decode_message_untrusted(frame.payload)
        except AuthenticationError as error:
            if address in self._peers.get(error.claimed_sender, []):
                self._on_wrong_key(error.claimed_sender)
            return None
        except ProtocolError:
            return None
        if frame.kind != KIND_DATAGRAM or not isinstance(message, Heartbeat | Echo):
            return None
        life = (frame.sender, int(frame.incarnation), network)
        if frame.sequence <= self._seen.get(life, 0):
            return None
        self._seen.pop(life, None)
        self._seen[life] = frame.sequence
        while len(self._seen) > LIVES_MAX:
            del self._seen[next(iter(self._seen))]
        return Heard(network, frame.sender, frame.incarnation, message)


def _bind(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, PRIORITY)
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, DSCP_CS6)
    bind(sock, address, port)
    sock.setblocking(False)
    return sock
