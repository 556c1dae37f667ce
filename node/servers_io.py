"""Sessions of clusterd with the block servers: installs, the register's messages, administration.

Two sessions per server, because a session answers one request at a time and an install may take
long (it drains I/O): one for installs, one for everything else. They keep to different networks if
there are two, so that a server goes on hearing of its members when one is cut: it serves nobody
when it does not (R3). What the cores send is repeated by the cores, so that a full queue or a
broken session simply drops it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar

import trio

from cluster.actions import Received
from cluster.control import ServerInfo, Timing
from cluster.core_events import ServerDown, ServerUp
from cluster.errors import StackError, UnreachableError
from cluster.events import EventName
from cluster.ids import ServerId
from cluster.messages import Install, Message
from cluster.wire import Keys
from gnbd.control.client_io import Control, open_control
from gnbd.control.session import Peer
from gnbd.messages import Done

QUEUE_MAX = 64
REGISTER_TIMEOUT_S = 2.0
INSTALL_TIMEOUT_S = 20.0
ADMIN_TIMEOUT_S = 10.0
RETRY_S = 0.2
APART_PINGS = 8
"""Every so many pings a session that shares a network with the other one looks for another."""
T = TypeVar("T")


class ServerControl(Protocol):
    """What is used of a session with a block server."""

    async def cluster_call(self, message: Message) -> list[Message]: ...

    async def ping(self) -> Any: ...


class _Lane:
    """One session with a server and the queue of what goes over it."""

    def __init__(self) -> None:
        send, receive = trio.open_memory_channel[Message](QUEUE_MAX)
        self.send = send
        self.receive = receive
        self.control: Control | None = None
        self.network = 0

    def push(self, message: Message) -> None:
        try:
            self.send.send_nowait(message)
        except trio.WouldBlock:
            pass


class _Link:
    """Everything about one server."""

    def __init__(self, info: ServerInfo) -> None:
        self.info = info
        self.scope = trio.CancelScope()
        self.install = _Lane()
        self.register = _Lane()
        self.up = False
        self.problem = "not connected yet"


class ServerLinks:
    """The sessions with all servers of the cluster."""

    def __init__(
        self,
        keys: Keys,
        peer: Peer,
        timing: Timing,
        step: Callable[[Any], None],
        note: Callable[[str, str], object],
    ) -> None:
        self._keys = keys
        self._peer = peer
        self._timing = timing
        self._step = step
        self._note = note
        self._links: dict[ServerId, _Link] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the sessions, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for link in self._links.values():
                self._start(link)
            task_status.started()
            await trio.sleep_forever()

    def set_servers(self, servers: Sequence[ServerInfo]) -> None:
        """The servers of the configuration; sessions with others end."""
        wanted = {server.id: server for server in servers}
        for number, link in list(self._links.items()):
            if wanted.get(number) != link.info:
                link.scope.cancel()
                del self._links[number]
        for number, info in wanted.items():
            if number not in self._links:
                self._links[number] = _Link(info)
                if self._nursery is not None:
                    self._start(self._links[number])

    def _start(self, link: _Link) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, link)

    def send(self, to: int, message: Message) -> None:
        """A message of a core."""
        link = self._links.get(ServerId(to))
        if link is not None:
            (link.install if isinstance(message, Install) else link.register).push(message)

    def infos(self) -> list[ServerInfo]:
        """The servers of the configuration."""
        return [link.info for link in self._links.values()]

    def is_up(self, server: ServerId) -> bool:
        """Whether a session is established."""
        link = self._links.get(server)
        return link is not None and link.up

    def problem(self, server: ServerId) -> str:
        """Why not."""
        link = self._links.get(server)
        return "unknown" if link is None else ("" if link.up else link.problem)

    async def ask(self, server: ServerId, work: Callable[[Control], Awaitable[T]], what: str) -> T:
        """Run `work` on a session of its own (administration). Raises UnreachableError."""
        link = self._links.get(server)
        if link is None:
            raise UnreachableError(f"no server {server}", hint="see: clusterctl status")
        try:
            with trio.fail_after(ADMIN_TIMEOUT_S):
                async with self._session(link.info, None) as control:
                    return await work(control)
        except trio.TooSlowError:
            raise UnreachableError(f"server {link.info.name} does not answer {what}") from None

    @asynccontextmanager
    async def _session(self, info: ServerInfo, network: int | None) -> AsyncIterator[Control]:
        """Over one network, or the first that answers."""
        async with open_control(info, self._keys, self._peer, network=network) as control:
            if control.server_id != info.id:
                raise StackError(f"another server ({control.server_id}) answers as {info.name}")
            yield control

    async def _serve(self, link: _Link) -> None:
        with link.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._lane, link, link.install, INSTALL_TIMEOUT_S)
                nursery.start_soon(self._lane, link, link.register, REGISTER_TIMEOUT_S)
        self._down(link)

    def _up(self, link: _Link) -> None:
        link.up = True
        self._note(EventName.SERVER_UP, f"server {link.info.name} answers")
        self._step(ServerUp(link.info.id))

    def _down(self, link: _Link) -> None:
        if link.up:
            link.up = False
            self._note(EventName.SERVER_DOWN, f"server {link.info.name} does not answer")
            self._step(ServerDown(link.info.id))

    async def _lane(self, link: _Link, lane: _Lane, timeout_s: float) -> None:
        attempt = 0
        networks = len(link.info.addresses)
        while True:
            first = 0 if lane is link.install else link.install.network + 1
            lane.network = (first + attempt) % networks
            try:
                async with self._session(link.info, lane.network) as control:
                    lane.control = control
                    if lane is link.install:
                        self._up(link)
                    await self._work(link, lane, control, timeout_s)
                    attempt = 0
            except (StackError, OSError, trio.TooSlowError, trio.BrokenResourceError) as error:
                link.problem = str(error) or "it does not answer in time"
                attempt += 1
            finally:
                lane.control = None
                if lane is link.install:
                    self._down(link)
            await trio.sleep(RETRY_S)

    async def _should_move(self, link: _Link, lane: _Lane) -> bool:
        """Whether a session for the register shares its network with the one for installs although
        the server answers on another one."""
        info = link.info
        if lane is link.install or lane.network != link.install.network or len(info.addresses) < 2:
            return False
        other = info.addresses[(lane.network + 1) % len(info.addresses)]
        with trio.move_on_after(RETRY_S):
            try:
                stream = await trio.open_tcp_stream(other, info.port)
            except OSError:
                return False
            await stream.aclose()
            return True
        return False

    def _note_damage(self, link: _Link, lane: _Lane, answer: Done) -> None:
        """Both sessions are told; one says it."""
        for export, offset in answer.damaged if lane is link.install else ():
            text = f"server {link.info.name}: export {export}: checksum mismatch at {offset}"
            self._note(EventName.DISK_DAMAGED, text)

    async def _work(self, link: _Link, lane: _Lane, control: Control, timeout_s: float) -> None:
        """Pass messages and answers; ping when idle, as a sign of life both ways (R3). Returns when
        the session should be made anew on another network."""
        pings = 0
        while True:
            message: Message | None = None
            with trio.move_on_after(self._timing.dead_ms / 4000):
                message = await lane.receive.receive()
            if message is None:
                with trio.fail_after(REGISTER_TIMEOUT_S):
                    self._note_damage(link, lane, await control.ping())
                pings += 1
                if pings % APART_PINGS == 0 and await self._should_move(link, lane):
                    return
                continue
            with trio.fail_after(timeout_s):
                answers = await control.cluster_call(message)
            for answer in answers:
                self._step(Received(int(link.info.id), answer))
