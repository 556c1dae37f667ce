"""The client's side of the handshake as dialogues.

Generators that yield bytes to send or a count of bytes to read, so that blocking and trio code
share them.
"""

from __future__ import annotations

import hmac
from collections.abc import Generator

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import ForeignError, ProtocolError, StackError, UsageError
from cluster.wire import login_proof
from gnbd import messages as m
from gnbd import protocol as p

HEAD_BYTES = 4096
_NO_TLS_HINT = "give this client a certificate: [tls] in node.toml, then start clusterd again"


class OptionRefusedError(StackError):
    """The server answers an option with an error. `kind` is that of NBD."""

    def __init__(self, message: str, kind: int) -> None:
        super().__init__(f"the server refuses: {message}")
        self.kind = kind


def _refusal(kind: int, body: bytes) -> StackError:
    text = body.decode(errors="replace")
    if kind == p.REP_ERR_POLICY:
        return ForeignError(f"the server refuses: {text}")
    return OptionRefusedError(text or f"error {kind - p.REP_ERROR}", kind)


def option_exchange(option: int, data: bytes) -> Generator[bytes | int, bytes, bytes]:
    """Send an option, read replies until ACK; gives the last one. Raises StackError if the server
    refuses."""
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
            raise _refusal(kind, body)
        result = body


def greeting_dialogue() -> Generator[bytes | int, bytes, None]:
    """What comes before all options."""
    magic, option_magic, flags = p.GREETING.unpack((yield p.GREETING.size))
    if (magic, option_magic) != (p.INIT_MAGIC, p.OPTION_MAGIC) or not flags & 1:
        raise ProtocolError("this is not a fixed newstyle NBD server")
    yield (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES).to_bytes(4, "big")


def starttls_dialogue(*, required: bool) -> Generator[bytes | int, bytes, bool]:
    """Whether TLS begins now; if not, the server has none. Raises UsageError if it must."""
    try:
        yield from option_exchange(p.OPT_STARTTLS, b"")
    except (OptionRefusedError, ForeignError) as error:
        if required:
            raise UsageError(
                f"no TLS with this server: {error.message}",
                hint="[tls] of this node demands it: give the server a certificate, or take out "
                "required",
            ) from None
        return False
    return True


def login_dialogue(
    hello: m.LoginHello, secret: bytes
) -> Generator[bytes | int, bytes, m.LoginResult]:
    """LOGIN; checks that the server knows the secret too. Raises UsageError if a login is not
    possible there at all."""
    try:
        raw = yield from option_exchange(p.OPT_LOGIN, msgspec.msgpack.encode(hello))
        nonce = msgspec.msgpack.decode(raw, type=m.LoginNonce).nonce
        proof = login_proof(secret, nonce, hello.path, hello.generation)
        raw = yield from option_exchange(p.OPT_LOGIN, msgspec.msgpack.encode(m.LoginProof(proof)))
        result = msgspec.msgpack.decode(raw, type=m.LoginResult)
    except BROKEN as error:
        raise ProtocolError(f"bad login answer: {error}") from error
    except OptionRefusedError as error:
        if error.kind == p.REP_ERR_TLS_REQD:
            raise UsageError(error.message, hint=_NO_TLS_HINT) from error
        if error.kind == p.REP_ERR_UNSUP:
            raise UsageError(
                "it is no gnbd-server: nobody could be kept from writing to its disk",
                hint="a cluster needs disks of gnbd-server; open_plain takes others, for one user",
            ) from error
        raise
    expected = login_proof(secret, hello.nonce, hello.path, hello.generation)
    if result.status != m.LOGIN_REFUSED and not hmac.compare_digest(result.proof, expected):
        raise ProtocolError("the server does not know the secret of this instance")
    return result


def head_dialogue() -> Generator[bytes | int, bytes, bytes]:
    """Right after GO: the first HEAD_BYTES of the disk; empty if it cannot read them."""
    yield p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_READ, 0, 0, HEAD_BYTES)
    magic, error, cookie = p.REPLY.unpack((yield p.REPLY.size))
    if magic != p.REPLY_MAGIC or cookie:
        raise ProtocolError("bad reply")
    return b"" if error else (yield HEAD_BYTES)


class Found(msgspec.Struct, frozen=True):
    """What the server says of an export. `flags`: what it can do."""

    size_bytes: int
    flags: int


def go_dialogue(export: str, infos: tuple[int, ...] = ()) -> Generator[bytes | int, bytes, Found]:
    """GO. Transmission begins with the return. `infos`: what is asked for beside."""
    yield p.option(p.OPT_GO, p.go_data(export, infos))
    found = None
    while True:
        magic, option, kind, length = p.OPTION_REPLY.unpack((yield p.OPTION_REPLY.size))
        if magic != p.OPTION_REPLY_MAGIC or option != p.OPT_GO or length > p.OPTION_BYTES_MAX:
            raise ProtocolError("bad option reply")
        body = (yield length) if length else b""
        if kind == p.REP_ACK:
            if found is None:
                raise ProtocolError("the server does not tell the size of the export")
            return found
        if kind & p.REP_ERROR:
            if kind == p.REP_ERR_TLS_REQD:
                raise UsageError(body.decode(errors="replace"), hint=_NO_TLS_HINT)
            if kind == p.REP_ERR_UNKNOWN:
                raise UsageError(f"no export {export!r}: {body.decode(errors='replace')}")
            raise _refusal(kind, body)
        if kind == p.REP_INFO and len(body) == p.EXPORT_INFO.size:
            number, size_bytes, flags = p.EXPORT_INFO.unpack(body)
            if number == p.INFO_EXPORT:
                found = Found(size_bytes, flags)
