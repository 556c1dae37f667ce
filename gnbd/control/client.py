"""The client's end of a CONTROL session as dialogues, without I/O (see `dialogues`)."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import msgspec

from cluster.decoding import decode_untrusted
from cluster.errors import ProtocolError, StackError
from cluster.ids import Epoch
from cluster.wire import Keys
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.control.session import ControlSession, Peer
from gnbd.dialogues import option_exchange

CONNECT_TIMEOUT_S = 5.0
T = TypeVar("T", bound=m.Answer)


_welcomes = msgspec.msgpack.Decoder(m.ControlWelcome)


class InstallRefusedError(StackError):
    """The server has a later epoch, or another keep-list for this one."""

    def __init__(self, message: str, epoch: Epoch) -> None:
        super().__init__(message)
        self.epoch = epoch


class ControlProtocol:
    """The client's end of one CONTROL session as dialogues."""

    def __init__(self, keys: Keys, identity: Peer) -> None:
        self._keys = keys
        self._identity = identity
        self._session: ControlSession | None = None
        self.server_id = 0
        self.server_name = ""
        self.epoch = Epoch(0)
        """The epoch that the server had installed at its last answer."""

    def open(self, nonce: bytes) -> Generator[bytes | int, bytes, None]:
        """Greeting, flags, nonces."""
        greeting = yield p.GREETING.size
        magic, option_magic, flags = p.GREETING.unpack(greeting)
        if (magic, option_magic) != (p.INIT_MAGIC, p.OPTION_MAGIC) or not flags & 1:
            raise ProtocolError("this is not a fixed newstyle NBD server")
        yield (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES).to_bytes(4, "big")
        raw = yield from option_exchange(
            p.OPT_CONTROL, msgspec.msgpack.encode(m.ControlHello(nonce))
        )
        welcome = decode_untrusted(_welcomes, raw, "welcome of a server")
        self.server_id, self.server_name = welcome.server_id, welcome.name
        self._session = ControlSession(self._keys, self._identity, nonce, welcome.nonce)

    def ask(self, request: m.Request) -> Generator[bytes | int, bytes, m.Answer]:
        """One request and its answer."""
        session = self._session
        assert session is not None
        sealed = session.seal(msgspec.msgpack.encode(request), self.epoch)
        frame = session.open_untrusted((yield from option_exchange(p.OPT_CONTROL, sealed)))
        self.epoch = frame.epoch
        return m.decode_answer_untrusted(frame.payload)


def expect(answer: m.Answer, kind: type[T]) -> T:
    """The answer as what it must be, or the refusal as an error."""
    if isinstance(answer, m.Refused):
        if answer.kind == "epoch":
            raise InstallRefusedError(answer.message, answer.epoch)
        raise m.REFUSALS.get(answer.kind, StackError)(answer.message, hint=answer.hint)
    if not isinstance(answer, kind):
        raise ProtocolError("an answer of the wrong kind")
    return answer
