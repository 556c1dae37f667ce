"""The voter's half of the register: a CASPaxos acceptor.

Invariants:
- promise and accepted value are durable before they are answered, and never go back; so the record
  that a start gives to `Acceptor` is durable already (`paths_io.read_store`): a repeated request
  is answered by it without a `Persist`;
- a request with a config_epoch below that of the accepted value is refused (with that value);
- without a store the acceptor answers `Uninitialised` and counts for nothing; a store is made
  only by `birth_record` (cluster init) or by `Initialise` with this start's `boot` number, which
  only the proposer of a change that adds this voter sends;
- an accept is answered only after the echoes of everyone whom the value bars have stopped
  (`Vouch` -> `Vouched`), with the ages of the last ones (rule R8).

A runner of its own performs the actions (see `cluster.actions`). At start it performs those of
`start()`. The record carries its own checksum: decoding a damaged one raises CorruptionError.
"""

from __future__ import annotations

import struct
import zlib

import msgspec

from cluster.actions import Action, Notify, Persist, Received, Send, Tick
from cluster.decoding import BROKEN
from cluster.errors import CorruptionError
from cluster.guard_events import Vouch, Vouched
from cluster.messages import (
    ZERO_BALLOT,
    Accept,
    Accepted,
    Ballot,
    Current,
    Initialise,
    Prepare,
    Promised,
    Query,
    Refused,
    Uninitialised,
)
from cluster.state import ClusterState

RECORD_MAGIC = b"CFSreg01"
PENDING_MAX = 256


class Record(msgspec.Struct, frozen=True):
    """The durable state of a voter.

    offset size
    0      8    magic "CFSreg01"
    8      4    CRC-32 of the rest, little endian
    12     n    msgpack of this struct
    """

    promised: Ballot
    accepted: Ballot
    value: ClusterState | None


def encode_record(record: Record) -> bytes:
    """The bytes of the acceptor's store."""
    body = msgspec.msgpack.encode(record)
    return RECORD_MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def decode_record_untrusted(data: bytes) -> Record:
    """The inverse of `encode_record`. Raises CorruptionError."""
    if data[:8] != RECORD_MAGIC or data[8:12] != struct.pack("<I", zlib.crc32(data[12:])):
        raise CorruptionError(
            "the acceptor's store is damaged",
            hint="this voter must be removed and added again: clusterctl voter",
        )
    try:
        return msgspec.msgpack.decode(data[12:], type=Record)
    except BROKEN as error:
        raise CorruptionError(f"the acceptor's store makes no sense: {error}") from error


def birth_record(state: ClusterState) -> bytes:
    """The store of the first voter at `clusterctl init` (and of `recover`)."""
    ballot = Ballot(1, int(state.voters[0]), 0)
    return encode_record(Record(ballot, ballot, state))


class Replace(msgspec.Struct, frozen=True):
    """Event: by an operator's word the store holds this from now on (`clusterctl recover`), also
    after messages that come meanwhile. `Replaced` follows when that is durable."""

    record: Record


class Replaced(msgspec.Struct, frozen=True):
    """In Notify; see `Replace`."""


class Acceptor:
    """See the module. `boot` is a number that no other start of this voter had (the node's
    incarnation; a server's start counter or time). `record` is the store, None without one."""

    def __init__(self, boot: int, record: bytes | None) -> None:
        self.boot = boot
        self.record = decode_record_untrusted(record) if record is not None else None
        self._token = 0
        self._waiting: dict[int, tuple[int, int, Ballot]] = {}

    def start(self) -> list[Action]:
        """Actions at start: tell the guard what was accepted in the earlier life."""
        if self.record is None or self.record.value is None:
            return []
        return [self._vouch()]

    def deadline(self) -> int | None:
        """No timers."""
        return None

    def step(self, now_ns: int, event: Received | Vouched | Replace | Tick) -> list[Action]:
        """`Received` of Prepare, Accept, Query, Initialise; `Vouched` of the guard."""
        match event:
            case Replace(record):
                self.record = record
                self._waiting.clear()
                return [Persist(encode_record(record)), Notify(Replaced())]
            case Received(source, message):
                if isinstance(message, Initialise):
                    return self._initialise(message)
                if self.record is None:
                    return [Send(source, Uninitialised(message.request, self.boot))]
                if isinstance(message, Prepare):
                    return self._prepare(source, message)
                if isinstance(message, Accept):
                    return self._accept(source, message)
                if isinstance(message, Query):
                    record = self.record
                    return [Send(source, Current(message.request, record.accepted, record.value))]
                return []
            case Vouched(token, ages, start_age_ns):
                waiting = self._waiting.pop(token, None)
                if waiting is None:
                    return []
                source, request, ballot = waiting
                return [Send(source, Accepted(request, ballot, ages, start_age_ns))]
            case _:
                return []

    def check(self) -> None:
        """Assert the invariants."""
        if self.record is not None:
            assert self.record.accepted <= self.record.promised
            assert (self.record.value is None) == (self.record.accepted == ZERO_BALLOT)

    def _initialise(self, message: Initialise) -> list[Action]:
        if self.record is not None or message.boot != self.boot:
            return []
        self.record = Record(ZERO_BALLOT, ZERO_BALLOT, None)
        return [Persist(encode_record(self.record))]

    def _refusal(self, request: int, ballot: Ballot, config_epoch: int) -> Refused | None:
        record = self.record
        assert record is not None
        floor = record.value.config_epoch if record.value is not None else 0
        if ballot >= record.promised and config_epoch >= floor:
            return None
        return Refused(request, record.promised, record.accepted, record.value)

    def _prepare(self, source: int, message: Prepare) -> list[Action]:
        assert self.record is not None
        refused = self._refusal(message.request, message.ballot, message.config_epoch)
        if refused is not None:
            return [Send(source, refused)]
        actions: list[Action] = []
        if message.ballot > self.record.promised:
            self.record = msgspec.structs.replace(self.record, promised=message.ballot)
            actions.append(Persist(encode_record(self.record)))
        answer = Promised(message.request, message.ballot, self.record.accepted, self.record.value)
        return [*actions, Send(source, answer)]

    def _accept(self, source: int, message: Accept) -> list[Action]:
        assert self.record is not None
        refused = self._refusal(message.request, message.ballot, message.config_epoch)
        if refused is not None:
            return [Send(source, refused)]
        actions: list[Action] = []
        if message.ballot != self.record.accepted:
            self.record = Record(message.ballot, message.ballot, message.value)
            actions.append(Persist(encode_record(self.record)))
        if len(self._waiting) >= PENDING_MAX:
            del self._waiting[min(self._waiting)]
        vouch = self._vouch()
        self._waiting[self._token] = (source, message.request, message.ballot)
        return [*actions, vouch]

    def _vouch(self) -> Notify:
        assert self.record is not None
        assert self.record.value is not None
        self._token += 1
        value = self.record.value
        return Notify(Vouch(self._token, value.config_epoch, value.members))
