"""The client's side of the handshake as dialogues.

Generators that yield bytes to send or a count of bytes to read, so that blocking and trio code
share them.
"""

from __future__ import annotations

import hmac
from collections.abc import Generator

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import ForeignError, ProtocolError, StackError
from cluster.wire import login_proof
from gnbd import messages as m
from gnbd import protocol as p


def option_exchange(option: int, data: bytes) -> Generator[bytes | int, bytes, bytes]:
    """Send a private option, read CFS reply and ACK. Raises StackError if the server refuses."""
    yield p.option(option, data)
    result = b""
    while True:
        magic, number, kind, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC or number != option or length > p.OPTION_BYTES_MAX:
            raise ProtocolError("bad option reply")
        body = (yield length) if length else b""
        if kind == p.REP_ACK:
            return result
        if kind & p.REP_ERROR:
            refused = ForeignError if kind == p.REP_ERR_POLICY else StackError
            raise refused(f"the server refuses: {body.decode(errors='replace')}")
        result = body


def login_dialogue(
    hello: m.LoginHello, secret: bytes
) -> Generator[bytes | int, bytes, m.LoginResult]:
    """Greeting and LOGIN; checks that the server knows the secret too."""
    magic, option_magic, flags = p.GREETING.unpack((yield p.GREETING.size))
    if (magic, option_magic) != (p.INIT_MAGIC, p.OPTION_MAGIC) or not flags & 1:
        raise ProtocolError("this is not a fixed newstyle NBD server")
    yield (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES).to_bytes(4, "big")
    try:
        raw = yield from option_exchange(p.OPT_LOGIN, msgspec.msgpack.encode(hello))
        nonce = msgspec.msgpack.decode(raw, type=m.LoginNonce).nonce
        proof = login_proof(secret, nonce, hello.path, hello.generation)
        raw = yield from option_exchange(p.OPT_LOGIN, msgspec.msgpack.encode(m.LoginProof(proof)))
        result = msgspec.msgpack.decode(raw, type=m.LoginResult)
    except BROKEN as error:
        raise ProtocolError(f"bad login answer: {error}") from error
    expected = login_proof(secret, hello.nonce, hello.path, hello.generation)
    if result.status != m.LOGIN_REFUSED and not hmac.compare_digest(result.proof, expected):
        raise ProtocolError("the server does not know the secret of this instance")
    return result


def go_dialogue(export: str) -> Generator[bytes | int, bytes, int]:
    """GO; gives the size. Transmission begins with the return."""
    yield p.option(p.OPT_GO, p.go_data(export))
    size_bytes = 0
    while True:
        magic, option, kind, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC or option != p.OPT_GO or length > p.OPTION_BYTES_MAX:
            raise ProtocolError("bad option reply")
        body = (yield length) if length else b""
        if kind == p.REP_ACK:
            return size_bytes
        if kind & p.REP_ERROR:
            raise StackError(f"the server refuses: {body.decode(errors='replace')}")
        if kind == p.REP_INFO and len(body) == p.EXPORT_INFO.size:
            number, size, _flags = p.EXPORT_INFO.unpack(body)
            if number == p.INFO_EXPORT:
                size_bytes = size
