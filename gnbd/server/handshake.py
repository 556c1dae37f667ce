"""The server's side of the NBD handshake, without I/O.

Feed bytes, take actions. Options that need the server's state (LOGIN, CONTROL) come out as
`Private` and are answered through `private_reply`; the next option is not looked at before that.
Unknown options are refused with ERR_UNSUP and the haggling goes on.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import msgspec

from gnbd import protocol as p
from native.nbd import EXTENDED, SIMPLE, STRUCTURED

_U32 = struct.Struct(">I")
_U16 = struct.Struct(">H")


class Offer(msgspec.Struct, frozen=True):
    """An export that this client may use."""

    name: str
    size_bytes: int
    flags: int
    description: str = ""
    life: int = 0
    """Of the export; transmission begins only in the same one."""
    block_bytes_min: int = 1
    tls: str = "allowed"
    clients: tuple[str, ...] = ()


class Denied(msgspec.Struct, frozen=True):
    """Why it may not. `kind` is an NBD error reply."""

    kind: int
    message: str


class Directory(Protocol):
    """What this client may see; the answer may change with LOGIN."""

    def names(self) -> Sequence[tuple[str, str]]:
        """Names with their descriptions."""

    def find(self, name: str) -> Offer | Denied: ...


class Send(msgspec.Struct, frozen=True):
    data: bytes


class Private(msgspec.Struct, frozen=True):
    """Answer with `private_reply`."""

    option: int
    data: bytes


class StartTls(msgspec.Struct, frozen=True):
    """Send this, then go on inside of TLS, where `secured` says that it is so."""

    data: bytes


class Enter(msgspec.Struct, frozen=True):
    """Begin transmission on this export; `rest` came after the last option. `contexts`: the
    metadata contexts that BLOCK_STATUS tells."""

    offer: Offer
    rest: bytes
    style: int = SIMPLE
    contexts: tuple[str, ...] = ()


class Close(msgspec.Struct, frozen=True):
    reason: str


Action = Send | Private | StartTls | Enter | Close

GREETING = p.GREETING.pack(p.INIT_MAGIC, p.OPTION_MAGIC, p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)


class Handshake:
    """One connection before transmission."""

    def __init__(
        self, directory: Directory, *, tls: bool = False, tls_required: bool = False
    ) -> None:
        """`tls`: the server has a certificate."""
        self._directory = directory
        self._tls = tls
        self._tls_required = tls_required
        self._secure = False
        self._client: str | None = None
        self._private_used = False
        self._buffer = bytearray()
        self._flags: int | None = None
        self._ended = False
        self.trusted = False
        """The shell says so when a CONTROL session has authenticated itself."""
        self._style = SIMPLE
        self._contexts: tuple[str, tuple[str, ...]] = ("", ())

    def secured(self, client: str) -> None:
        """TLS has begun. Everything that was agreed on before is forgotten: it may be a stranger's
        who sat in between. `client`: the name in its certificate."""
        self._secure = True
        self._client = client
        self._style = SIMPLE
        self._contexts = ("", ())

    def feed(self, data: bytes | memoryview) -> None:
        """More bytes from the client."""
        self._buffer += data
        assert len(self._buffer) <= self._option_bytes_max() + (1 << 20)

    def wanted_bytes(self) -> int:
        """How many more bytes the shell may read now; keeps the buffer bounded."""
        return max(1, min(1 << 18, self._option_bytes_max() + (1 << 19) - len(self._buffer)))

    def _option_bytes_max(self) -> int:
        return p.OPTION_BYTES_MAX if self.trusted else p.STRANGER_OPTION_BYTES_MAX

    def next(self) -> Action | None:
        """The next action, or None if more bytes are needed."""
        if self._ended:
            return None
        if self._flags is None:
            if len(self._buffer) < 4:
                return None
            self._flags = _U32.unpack_from(self._buffer)[0]
            del self._buffer[:4]
            if self._flags & ~(p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES):
                return self._close("unknown client flags")
        if len(self._buffer) < p.OPTION.size:
            return None
        magic, number, length = p.OPTION.unpack_from(self._buffer)
        if magic != p.OPTION_MAGIC:
            return self._close("not an NBD option")
        if length > self._option_bytes_max():
            return self._close("option too long")
        end = p.OPTION.size + length
        if len(self._buffer) < end:
            return None
        data = bytes(self._buffer[p.OPTION.size : end])
        del self._buffer[:end]
        return self._option(number, data)

    def private_reply(self, number: int, data: bytes) -> bytes:
        """The answer to a private option as bytes to send."""
        return p.option_reply(number, p.REP_CFS, data) + p.option_reply(number, p.REP_ACK)

    def refusal(self, number: int, kind: int, message: str) -> bytes:
        """An error to an option as bytes to send."""
        return p.option_reply(number, kind, message.encode())

    def _close(self, reason: str) -> Close:
        self._ended = True
        return Close(reason)

    def _option(self, number: int, data: bytes) -> Action:
        if number == p.OPT_STARTTLS and self._tls:
            return self._start_tls(data)
        if (
            self._tls_required
            and not self._secure
            and number not in (p.OPT_ABORT, p.OPT_CONTROL)  # that one proves itself
        ):
            if number == p.OPT_EXPORT_NAME:
                return self._close("EXPORT_NAME without TLS")
            return Send(self.refusal(number, p.REP_ERR_TLS_REQD, "this server demands TLS"))
        match number:
            case p.OPT_EXPORT_NAME:
                return self._export_name(data)
            case p.OPT_ABORT:
                self._ended = True
                return Send(p.option_reply(number, p.REP_ACK))
            case p.OPT_LIST:
                return self._list(data)
            case p.OPT_INFO | p.OPT_GO:
                return self._info(number, data)
            case p.OPT_STRUCTURED_REPLY:
                return self._structured_reply(data)
            case p.OPT_EXTENDED_HEADERS:
                return self._extended_headers(data)
            case p.OPT_LIST_META_CONTEXT | p.OPT_SET_META_CONTEXT:
                return self._meta_context(number, data)
            case p.OPT_LOGIN | p.OPT_CONTROL:
                self._private_used = True
                return Private(number, data)
        return Send(self.refusal(number, p.REP_ERR_UNSUP, "this server does not know that option"))

    def _start_tls(self, data: bytes) -> Action:
        if data or self._secure or self._private_used:
            text = "STARTTLS takes no data and comes once, before anything is proved"
            return Send(self.refusal(p.OPT_STARTTLS, p.REP_ERR_INVALID, text))
        if self._buffer:  # whoever sent that did not wait for TLS: it is not the client's
            return self._close("bytes behind STARTTLS")
        return StartTls(p.option_reply(p.OPT_STARTTLS, p.REP_ACK))

    def _find(self, name: str) -> Offer | Denied:
        """What this client may have, with its TLS as it is."""
        found = self._directory.find(name)
        if isinstance(found, Denied):
            return found
        if found.tls == "required" and not self._secure:
            return Denied(p.REP_ERR_TLS_REQD, f"export {found.name!r} demands TLS")
        if found.tls == "off" and self._secure:
            return Denied(p.REP_ERR_POLICY, f"export {found.name!r} is not served over TLS")
        if found.clients and self._client not in found.clients:
            if not self._secure:
                return Denied(p.REP_ERR_TLS_REQD, f"export {found.name!r} is for certain clients")
            text = f"export {found.name!r} is not for {self._client!r}"
            return Denied(p.REP_ERR_POLICY, text)
        return found

    @property
    def ended(self) -> bool:
        """No more options will be looked at."""
        return self._ended

    def _enter(self, offer: Offer) -> Enter:
        self._ended = True
        rest = bytes(self._buffer)
        self._buffer.clear()
        name, contexts = self._contexts
        return Enter(offer, rest, self._style, contexts if name == offer.name else ())

    def _flags_of(self, offer: Offer) -> int:
        return offer.flags | (p.FLAG_SEND_DF if self._style else 0)

    def _structured_reply(self, data: bytes) -> Action:
        if data:
            text = "STRUCTURED_REPLY takes no data"
            return Send(self.refusal(p.OPT_STRUCTURED_REPLY, p.REP_ERR_INVALID, text))
        if self._style == EXTENDED:
            text = "extended headers have been agreed on"
            return Send(self.refusal(p.OPT_STRUCTURED_REPLY, p.REP_ERR_EXT_HEADER_REQD, text))
        self._style = STRUCTURED
        return Send(p.option_reply(p.OPT_STRUCTURED_REPLY, p.REP_ACK))

    def _extended_headers(self, data: bytes) -> Action:
        if data:
            text = "EXTENDED_HEADERS takes no data"
            return Send(self.refusal(p.OPT_EXTENDED_HEADERS, p.REP_ERR_INVALID, text))
        self._style = EXTENDED
        return Send(p.option_reply(p.OPT_EXTENDED_HEADERS, p.REP_ACK))

    def _meta_context(self, number: int, data: bytes) -> Action:
        """LIST says what there is, SET chooses for the export that GO will name."""
        parsed = parse_meta_untrusted(data)
        if parsed is None or not self._style:
            text = "malformed request" if self._style else "structured replies come first"
            return Send(self.refusal(number, p.REP_ERR_INVALID, text))
        name, queries = parsed
        found = self._find(name)
        if isinstance(found, Denied):
            return Send(self.refusal(number, found.kind, found.message))
        listing = number == p.OPT_LIST_META_CONTEXT
        chosen = tuple(
            context
            for context in p.CONTEXT_IDS
            if (listing and not queries)
            or context in queries
            or (listing and context.partition(":")[0] + ":" in queries)
        )
        replies = [
            p.option_reply(
                number,
                p.REP_META_CONTEXT,
                _U32.pack(0 if listing else p.CONTEXT_IDS[context]) + context.encode(),
            )
            for context in chosen
        ]
        if not listing:
            self._contexts = (found.name, chosen)
        return Send(b"".join(replies) + p.option_reply(number, p.REP_ACK))

    def _list(self, data: bytes) -> Action:
        if data:
            return Send(self.refusal(p.OPT_LIST, p.REP_ERR_INVALID, "LIST takes no data"))
        replies = []
        for name, description in self._directory.names()[: p.LIST_MAX]:
            offered = isinstance(self._directory.find(name), Offer)
            if offered and isinstance(self._find(name), Denied):
                continue  # not with the TLS as it is
            raw = name.encode()
            data = _U32.pack(len(raw)) + raw + description.encode()
            replies.append(p.option_reply(p.OPT_LIST, p.REP_SERVER, data))
        replies.append(p.option_reply(p.OPT_LIST, p.REP_ACK))
        return Send(b"".join(replies))

    def _export_name(self, data: bytes) -> Action:
        """No error can be said here: the connection is dropped."""
        if self._style == EXTENDED:
            return self._close("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            found = self._find(data.decode())
        except UnicodeDecodeError:
            return self._close("export name is not UTF-8")
        if isinstance(found, Denied):
            return self._close(found.message)
        assert self._flags is not None
        self._pending = struct.pack(">QH", found.size_bytes, self._flags_of(found))
        if not self._flags & p.FLAG_NO_ZEROES:
            self._pending += bytes(p.ZERO_PADDING_BYTES)
        return self._enter(found)

    _pending = b""

    def entry_bytes(self) -> bytes:
        """What must be sent before transmission begins."""
        return self._pending

    def _info(self, number: int, data: bytes) -> Action:
        name = parse_go_untrusted(data)
        if name is None:
            return Send(self.refusal(number, p.REP_ERR_INVALID, "malformed request"))
        if len(name) > p.NAME_BYTES_MAX:
            return Send(self.refusal(number, p.REP_ERR_TOO_BIG, "the export name is too long"))
        found = self._find(name)
        if isinstance(found, Denied):
            return Send(self.refusal(number, found.kind, found.message))
        raw = found.name.encode()
        infos = [
            p.EXPORT_INFO.pack(p.INFO_EXPORT, found.size_bytes, self._flags_of(found)),
            p.BLOCK_SIZE_INFO.pack(
                p.INFO_BLOCK_SIZE,
                found.block_bytes_min,
                p.BLOCK_BYTES_PREFERRED,
                p.PAYLOAD_BYTES_MAX,
            ),
            _U16.pack(p.INFO_NAME) + raw,
        ]
        if found.description:
            infos.append(_U16.pack(p.INFO_DESCRIPTION) + found.description.encode())
        replies = b"".join(p.option_reply(number, p.REP_INFO, info) for info in infos)
        replies += p.option_reply(number, p.REP_ACK)
        if number == p.OPT_INFO:
            return Send(replies)
        self._pending = replies
        return self._enter(found)


def parse_go_untrusted(data: bytes) -> str | None:
    """The export name of INFO or GO, None if the data is malformed."""
    if len(data) < 6:
        return None
    length = _U32.unpack_from(data)[0]
    if length > len(data) - 6:
        return None
    count = _U16.unpack_from(data, 4 + length)[0]
    if len(data) != 6 + length + 2 * count:
        return None
    try:
        return data[4 : 4 + length].decode()
    except UnicodeDecodeError:
        return None


def parse_meta_untrusted(data: bytes) -> tuple[str, list[str]] | None:
    """Export name and queries of LIST_META_CONTEXT or SET_META_CONTEXT; None: malformed."""
    texts: list[str] = []
    at, wanted, queries = 0, 1, -1
    try:
        while wanted:
            length = _U32.unpack_from(data, at)[0]
            at += 4
            if length > min(len(data) - at, p.NAME_BYTES_MAX):
                return None
            texts.append(data[at : at + length].decode())
            at += length
            wanted -= 1
            if queries < 0:
                wanted = queries = _U32.unpack_from(data, at)[0]
                at += 4
    except (struct.error, UnicodeDecodeError):
        return None
    return (texts[0], texts[1:]) if at == len(data) else None
