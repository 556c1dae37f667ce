"""A tiny blocking NBD client: for tests that need to misbehave, and where every request is seen."""

from __future__ import annotations

import secrets
import socket
import struct

import msgspec

from cluster.ids import Instance
from cluster.wire import login_proof
from gnbd import messages as m
from gnbd import protocol as p
from lab.block_server import GnbdServer


class RawClient:
    """Handshake by hand; `request` sends one request and waits for its reply."""

    def __init__(
        self, server: GnbdServer, export: str | None = None, flags: int = 3, address: str = ""
    ) -> None:
        self.server = server
        self.sock = socket.create_connection((address or server.addresses[0], server.port), 15)
        self.greeting = self.take(18)
        self.sock.sendall(struct.pack(">I", flags))
        self.cookie = 0
        self.why = ""
        self.offset = -1
        self.structured = False
        if export is not None:
            replies = self.option(p.OPT_GO, p.go_data(export))
            assert replies[-1][0] == p.REP_ACK, replies

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.sock.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def option(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies up to ACK or an error."""
        self.sock.sendall(p.option(number, data))
        replies = []
        while True:
            magic, option, kind, length = p.OPTION_REPLY.unpack(self.take(20))
            assert (magic, option) == (p.OPTION_REPLY_MAGIC, number)
            replies.append((kind, self.take(length)))
            if kind == p.REP_ACK or kind & p.REP_ERROR:
                return replies

    def login(
        self,
        who: Instance,
        export: str,
        path: int = 0,
        generation: int = 1,
        secret: bytes | None = None,
        sequence: int = 0,
    ) -> m.LoginResult:
        secret = self.server.secret(who) if secret is None else secret
        hello = m.LoginHello(who, export, path, generation, secrets.token_bytes(32), sequence)
        replies = self.option(p.OPT_LOGIN, msgspec.msgpack.encode(hello))
        nonce = msgspec.msgpack.decode(replies[0][1], type=m.LoginNonce).nonce
        proof = m.LoginProof(login_proof(secret, nonce, path, generation))
        replies = self.option(p.OPT_LOGIN, msgspec.msgpack.encode(proof))
        return msgspec.msgpack.decode(replies[0][1], type=m.LoginResult)

    def go(self, export: str) -> None:
        assert self.option(p.OPT_GO, p.go_data(export))[-1][0] == p.REP_ACK

    def send(
        self,
        kind: int,
        offset: int = 0,
        data: bytes = b"",
        length: int | None = None,
        flags: int = 0,
    ) -> int:
        self.cookie += 1
        size = len(data) if length is None else length
        head = p.REQUEST.pack(p.REQUEST_MAGIC, flags, kind, self.cookie, offset, size)
        self.sock.sendall(head + data)
        return self.cookie

    def reply(self) -> tuple[int, int]:
        """Cookie and error; `why` and `offset` are what an error chunk says."""
        head = self.take(16)
        magic, error, cookie = p.REPLY.unpack(head)
        if magic == p.CHUNK_MAGIC:
            _, _, kind, cookie, length = p.CHUNK.unpack(head + self.take(4))
            payload = self.take(length)
            error, size = struct.unpack_from(">IH", payload)
            assert (kind, len(payload) - 6 - size) in ((0x8001, 0), (p.CHUNK_ERROR_OFFSET, 8))
            self.why = payload[6 : 6 + size].decode()
            self.offset = p.SIZE.unpack(payload[6 + size :])[0] if len(payload) > 6 + size else -1
            return cookie, error
        assert magic == p.REPLY_MAGIC
        return cookie, error

    def request(
        self,
        kind: int,
        offset: int = 0,
        data: bytes = b"",
        length: int | None = None,
        flags: int = 0,
    ) -> int:
        """The error of one request (0: none)."""
        cookie = self.send(kind, offset, data, length, flags)
        got, error = self.reply()
        assert got == cookie
        return error

    def compare_and_write(self, offset: int, expected: bytes, new: bytes, flags: int = 0) -> int:
        """The error; with simple replies the offset of the difference follows it."""
        error = self.request(p.CMD_COMPARE_AND_WRITE, offset, expected + new, flags=flags)
        if error == p.EMISCOMPARE and not self.structured:
            (self.offset,) = p.SIZE.unpack(self.take(p.SIZE.size))
        return error

    def read(self, offset: int, length: int) -> bytes:
        assert self.request(p.CMD_READ, offset, length=length) == 0
        return self.take(length)
