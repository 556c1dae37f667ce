"""How a new connection of a device becomes one of its disk: LOGIN of a cluster, or plain NBD."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio

from cluster.errors import BarredError, ForeignError, StackError, UsageError
from cluster.ids import Epoch, Instance
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.client.lanes import Path
from gnbd.control.client_io import drive
from gnbd.dialogues import go_dialogue, head_dialogue, login_dialogue

IsOurs = Callable[[bytes], bool]


class OldGenerationError(StackError):
    """The server knows a newer connection of this path."""

    def __init__(self, least: int) -> None:
        super().__init__(f"only generation {least} and later ones are let in")
        self.least = least


class Entered(msgspec.Struct, frozen=True):
    """What is known once a connection is let in."""

    epoch: Epoch
    cache_generation: int
    size_bytes: int
    flags: int
    checksums: bool = False
    """Whether data may travel with their checksums."""


class Entrance(Protocol):
    """Of one disk."""

    fenced: bool
    """Whether the server keeps out who was barred, and confirms what is drained."""
    sequence: int

    async def enter(self, path: Path, stream: trio.SocketStream) -> Entered:
        """After the greeting. Raises BarredError, OldGenerationError, UsageError, ForeignError,
        StackError."""
        ...

    def lost(self) -> None:
        """A connection broke that was let in."""
        ...


class ClusterEntrance:
    """LOGIN as an instance, then GO. `is_ours`: whether a disk that begins so is the one that is
    meant; behind the name may be another one since the server started again."""

    fenced = True

    def __init__(
        self, export: str, instance: Instance, secret: bytes, sequence: int, is_ours: IsOurs | None
    ) -> None:
        self.sequence = sequence
        self._is_ours = is_ours
        self._export = export
        self._instance = instance
        self._secret = secret

    async def enter(self, path: Path, stream: trio.SocketStream) -> Entered:
        """See Entrance."""
        hello = m.LoginHello(
            self._instance, self._export, path.index, path.generation,
            secrets.token_bytes(m.NONCE_BYTES), self.sequence,
        )  # fmt: skip
        result = await drive(login_dialogue(hello, self._secret), stream)
        match result.status:
            case m.LOGIN_OK:
                pass
            case m.LOGIN_BARRED:
                raise BarredError(result.message)
            case m.LOGIN_OLD_GENERATION:
                raise OldGenerationError(result.generation)
            case m.LOGIN_NO_EXPORT | m.LOGIN_REFUSED:
                raise UsageError(f"the server refuses the login: {result.message}")
            case _:
                raise StackError(f"not now: {result.message}")
        found = await drive(go_dialogue(self._export), stream)
        if self._is_ours is not None:
            head = await drive(head_dialogue(), stream)
            if head and not self._is_ours(head):
                raise ForeignError(
                    f"another disk is behind {self._export!r}",
                    hint="were disks of that server renamed? see its exports.toml",
                )
        return Entered(
            result.epoch, result.cache_generation, found.size_bytes, found.flags, result.checksums
        )

    def lost(self) -> None:
        """The server tells what that means."""


class PlainEntrance:
    """GO alone. Nobody tells what became of the requests of a broken connection, nor whether the
    server is the same process with the same cache: the worst is assumed of both."""

    fenced = False
    sequence = 0

    def __init__(self, export: str) -> None:
        self._export = export
        self._life = 1
        self._size_bytes = 0

    async def enter(self, path: Path, stream: trio.SocketStream) -> Entered:
        """See Entrance."""
        life = self._life
        found = await drive(go_dialogue(self._export, (p.INFO_BLOCK_SIZE,)), stream)
        if found.size_bytes < self._size_bytes:
            raise StackError(f"another disk: it has {found.size_bytes} bytes now")
        self._size_bytes = found.size_bytes
        return Entered(Epoch(0), life, found.size_bytes, found.flags)

    def lost(self) -> None:
        """What was not flushed may be lost with the server."""
        self._life += 1
