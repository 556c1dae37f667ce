"""`GnbdDevice`: one export of one gnbd-server as a block device, over all networks (trio).

One task per path keeps its connections (`link_io`) up; decisions are `client`'s. Storage that is
away is waited for; only a bar (`BarredError`) or an error of the store (`DeviceError`) raise.

PINGs keep bytes on the wire. A path that acknowledges none of them for `path_ms` is given up if
there is another one, the last path after `dead_ms`. A server that is merely slow acknowledges, and
is not dead.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import structlog
import trio

from cluster.control import ServerInfo
from cluster.device import Buffer
from cluster.errors import BarredError, ForeignError, StackError, UnreachableError, UsageError
from cluster.ids import Epoch, Instance
from cluster.paths_io import boottime_ns
from cluster.tls import TlsSection
from gnbd import protocol as p
from gnbd.client.connection_io import Connection, connect
from gnbd.client.core import ClientCore, DrainWaiter
from gnbd.client.entrance_io import ClusterEntrance, Entrance, IsOurs, OldGenerationError
from gnbd.client.failures import MiscompareError, Patience
from gnbd.client.lanes import Lane, Path, Request
from gnbd.client.link_io import Group, Link
from gnbd.client.path_stats import PathStats, path_stats
from gnbd.client.pieces import REQUEST_BYTES_MAX, chunks, flat, reads_into, writes
from gnbd.client.retained import owned
from gnbd.client.started_io import Starter
from gnbd.control.client_io import drive
from gnbd.dialogues import greeting_dialogue, starttls_dialogue
from native.buffers import unset_bytes

RETRY_FIRST_S = 0.02
RETRY_MAX_S = 0.25
DEAD_MS_DEFAULT = 1000
PATH_MS_DEFAULT = 150
"""Well above what TCP may put an acknowledgement off when the server does not read: 40 ms and the
round-trip time."""
SPAN_BYTES_MAX = 1 << 30
"""Of one request without data; more than 32 bits do not fit."""
PATH_CHECKS = 3
"""Looks at a path in that time."""
log = structlog.get_logger("gnbd.client")


class Options(msgspec.Struct, frozen=True):
    """How a device behaves. `sequence`: the volume sequence number declared at LOGIN. `tls`: the
    certificates, if the server is to be spoken to over TLS. `is_ours`: see `ClusterEntrance`.

    `fail_after_ms`: 0 is to wait for storage that is away, as file systems need it. Else, once a
    request has waited for so long, all that wait end with UnreachableError, and new ones do until
    the server is back and has confirmed that nothing of them executes any more. A WRITE that ended
    so may have been executed, in whole or in part, and may be until a later request succeeds; what
    had been acknowledged before is not affected. Opening ends so too."""

    connections_per_path: int = 1
    dead_ms: int = DEAD_MS_DEFAULT
    path_ms: int = PATH_MS_DEFAULT
    sequence: int = 0
    fail_after_ms: int = 0
    tls: TlsSection | None = None
    is_ours: IsOurs | None = None


class GnbdDevice(Starter):
    """A `cluster.device.BlockDevice`. Make it with `open_device`."""

    def __init__(
        self, server: ServerInfo, export: str, entrance: Entrance, options: Options
    ) -> None:
        self.server = server
        self.export = export
        self.flags = 0
        """What the server can do (NBD's transmission flags)."""
        self.core = ClientCore(len(server.addresses), boottime_ns(), drains=entrance.fenced)
        self._entrance = entrance
        self._options = options
        self._links: dict[int, Link] = {}
        self._totals: list[Counter[str]] = [Counter() for _ in server.addresses]
        """By path, of connections that are closed."""
        self._scopes: dict[int, trio.CancelScope] = {}
        self._wake = trio.Event()
        self._opened = trio.Event()
        self._fatal: StackError | None = None
        self._problems: dict[int, str] = {}
        self._scope = trio.CancelScope()
        self._closed = False
        self._logins = 0
        self._logins_over = trio.Event()

    # -- BlockDevice -----------------------------------------------------------------------

    @property
    def size_bytes(self) -> int:
        return self.core.size_bytes

    async def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        if length_bytes > REQUEST_BYTES_MAX:
            return b"".join(await self.read_many(chunks(offset_bytes, length_bytes)))
        group = Group(1)
        request = Request(p.CMD_READ, offset_bytes, length_bytes, waiter=group)
        await self._run_one(group, request)
        return request.result

    async def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        group = Group(len(ranges))
        requests = [Request(p.CMD_READ, o, n, waiter=group) for o, n in ranges]
        await self._run(group, requests)
        return [request.result for request in requests]

    async def read_into(
        self, offset_bytes: int, view: memoryview, *, sums: array[int] | None = None
    ) -> None:
        """Read straight into a buffer; do not touch it before the return. `sums` gets the CRC-32C
        of each 4096 bytes of it, computed as they come. Raises TypeError if it is not writable."""
        if view.readonly:
            raise TypeError("what is read into must be writable")
        group = Group(0)
        requests = reads_into(offset_bytes, view.cast("B"), group, sums)
        group.left = len(requests)
        await self._run(group, requests)

    async def write(
        self, offset_bytes: int, data: Buffer, *, fua: bool = False, sums: array[int] | None = None
    ) -> None:
        """See `BlockDevice`. `sums` gets the CRC-32C of each 4096 bytes, computed as they go."""
        flags = p.CMD_FLAG_FUA if fua else 0
        data = flat(data)
        if len(data) > REQUEST_BYTES_MAX:
            group = Group(0)
            requests = writes(offset_bytes, data, flags, group, sums)
            group.left = len(requests)
            await self._run(group, requests)
            return
        group = Group(1)
        request = Request(p.CMD_WRITE, offset_bytes, len(data), data, flags, group)
        request.wanted = sums
        await self._run_one(group, request)

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        flags = p.CMD_FLAG_FUA if fua else 0
        group = Group(0)
        requests = []
        for offset, data in parts:
            requests += writes(offset, data, flags, group)
        group.left = len(requests)
        await self._run(group, requests)

    async def flush(self) -> None:
        group = Group(1)
        await self._run(group, [Request(p.CMD_FLUSH, waiter=group)])

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        await self._run_spans(p.CMD_TRIM, offset_bytes, length_bytes)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        await self._run_spans(p.CMD_WRITE_ZEROES, offset_bytes, length_bytes)

    async def compare_and_write(self, offset_bytes: int, expected: bytes, new: bytes) -> bool:
        """Write `new` (up to 64 KiB) durably if `expected` is there, and say whether it was.
        Nothing comes in between. Only at a gnbd-server. Raises UnknownOutcomeError if the
        connection breaks before the answer: it is not sent again."""
        if not self.fenced:
            raise UsageError(f"{self.name}: only a gnbd-server compares and writes")
        if len(expected) != len(new) or len(new) > p.COMPARE_BYTES_MAX:
            raise UsageError("compare and write: two equal lengths up to 64 KiB")
        if self.core.retained.may_overlap(offset_bytes, len(new)):
            await self.flush()  # if the answer is lost, nothing older is to come over what is there
        group = Group(1)
        kind, both = p.CMD_COMPARE_AND_WRITE, expected + new
        request = Request(kind, offset_bytes, len(both), both, p.CMD_FLAG_FUA, group)
        try:
            await self._run(group, [request])
        except MiscompareError:
            return False
        return True

    async def _run_spans(self, kind: int, offset: int, length: int) -> None:
        spans = chunks(offset, length, SPAN_BYTES_MAX)
        group = Group(len(spans))
        await self._run(group, [Request(kind, o, n, waiter=group) for o, n in spans])

    @property
    def fenced(self) -> bool:
        """Whether the server keeps barred instances from writing, and confirms what is drained."""
        return self._entrance.fenced

    # -- cluster ---------------------------------------------------------------------------

    def set_epoch(self, required: Epoch) -> None:
        """Rule R3: requests wait until the server is known to have installed this epoch."""
        self.core.set_epoch(required)

    def note_installed(self, epoch: Epoch) -> None:
        """The server has installed this epoch (from the view)."""
        self.core.note_installed(epoch)
        self._retry_now()
        self.pump()

    async def set_sequence(self, sequence: int) -> None:
        """Declare the volume sequence number that this instance works with. Call it while nothing
        is in flight; it is declared again at every LOGIN."""
        self._entrance.sequence = sequence
        group = Group(1)
        await self._run(group, [Request(p.CMD_SEQUENCE, sequence, waiter=group)])

    def status(self) -> dict[str, object]:
        """For humans: paths, requests, epochs."""
        core = self.core
        return {
            "server": self.server.name,
            "export": self.export,
            "fenced": self.fenced,
            "paths": [len(path.lanes) for path in core.paths],
            "standby": core.standby(boottime_ns()),
            "pending": len(core.all_requests()),
            "retained_bytes": core.retained.bytes,
            "installed": core.installed,
            "required": core.required,
            "barred": core.barred,
            "failed": core.failed,
            "problems": dict(self._problems),
        }

    def stats(self) -> list[PathStats]:
        """Of each path."""
        found = []
        for path, standby in zip(self.core.paths, self.core.standby(boottime_ns()), strict=True):
            totals = Counter(self._totals[path.index])
            for lane in path.lanes:
                totals.update(self._links[id(lane)].counters())
            found.append(path_stats(path, standby, totals))
        return found

    def _close_link(self, link: Link) -> None:
        counters = link.counters()
        del counters["service_ns"]
        self._totals[link.lane.path.index].update(counters)
        link.close()

    async def aclose(self) -> None:
        """End cleanly: the registration at the server goes, and what cancelled callers have left
        behind is done or discarded, unless the server takes longer than `dead_ms`."""
        if self._closed:
            return
        self._closed = True
        with trio.move_on_after(self._options.dead_ms / 1000):
            while self._logins:  # one that the server sees after LOGOUT would register anew
                await self._logins_over.wait()
        link = next(iter(self._links.values()), None)
        if not self.fenced:
            for one in self._links.values():
                one.post(Request(p.CMD_DISC))
                one.kick()
        elif link is not None and self.core.barred is None:
            group = Group(1)
            request = Request(p.CMD_LOGOUT, waiter=group)
            self.core.place_private(link.lane, request)
            link.post(request)
            link.kick()
            with trio.move_on_after(self._options.dead_ms / 1000):
                await group.wait()
        self._scope.cancel()

    # -- requests --------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return f"{self.server.name}/{self.export}"

    def completed(self, lane: Lane, cookie: int, number: int) -> None:
        """A reply came (link_io.Owner)."""
        if number == p.ESHUTDOWN:  # not of the disk: it goes to where the server comes back
            self._links[id(lane)].give_up()
            return
        measured = lane.measured is not None and lane.measured.cookie == cookie
        self.core.completed(lane, cookie, number, boottime_ns() if measured else 0)

    def place(self, lane: Lane, request: Request) -> None:
        """This very connection takes the request (link_io.Owner)."""
        self.core.place_private(lane, request)

    async def _run(self, group: Group, requests: list[Request]) -> None:
        if self._closed:
            raise StackError("the device is closed")
        core = self.core
        for request in requests:
            core.submit(request)
        self.pump()
        try:
            await group.wait()
        except trio.Cancelled:
            self._forsake(requests)
            raise

    async def _run_one(self, group: Group, request: Request) -> None:
        if self._closed:
            raise StackError("the device is closed")
        self.core.submit(request)
        lane = self.core.assign_one(boottime_ns())
        try:
            if lane is None:
                self.pump()
            else:
                link = self._links[id(lane)]
                link.post(request)
                leads = link.take_lead()
                link.kick()
                if leads:
                    await link.lead(group)
            await group.wait()
        except trio.Cancelled:
            self._forsake([request])
            raise

    def _forsake(self, requests: list[Request]) -> None:
        """Their caller is cancelled and takes its memory back; they go on without it."""
        for request in requests:
            if request.waiter is None:
                continue
            self.core.forsake(request)
            if request.data is not None:
                request.data = owned(request.data)
            elif request.into is not None:
                request.into, request.result = None, unset_bytes(request.length)
            if request.wanted is not None and request.sums is not None:
                request.sums = array("I", request.sums)
            request.wanted = None
            for link in self._links.values():
                link.forsake(request)

    def pump(self) -> None:
        """Send whatever may be sent."""
        core = self.core
        for path in core.paths:
            if path.stranded:
                self._send_drains()
                break
        if not core.queue and not core.urgent:
            return
        used: dict[int, Link] = {}
        for lane, request in core.assign(boottime_ns()):
            link = self._links[id(lane)]
            link.post(request)
            used[id(link)] = link
        for link in used.values():
            link.kick()

    def _send_drains(self) -> None:
        for drain in self.core.drains():
            link = self._links[id(drain.lane)]
            waiter = DrainWaiter(self.core, drain.path, drain.generation)
            request = Request(p.CMD_DRAIN, drain.generation, drain.path.index, waiter=waiter)
            self.core.place_private(drain.lane, request)
            link.post(request)
            link.kick()

    # -- paths -----------------------------------------------------------------------------

    async def start(self, nursery: trio.Nursery) -> None:
        """Run in `nursery`; return when a path is up. Raises what makes that impossible."""
        nursery.start_soon(self.run)
        try:
            await self.wait_open()
        except BaseException:
            self._scope.cancel()
            raise

    async def run(self) -> None:
        """Keep all paths up; ends with `aclose`, or when it is cancelled."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    for path in self.core.paths:
                        nursery.start_soon(self._path_loop, path)
                    if self._options.fail_after_ms:
                        nursery.start_soon(self._fail_loop, self._options.fail_after_ms)
        finally:
            self._closed = self._closed or self.core.barred is None
            self.core.fail_all(StackError("the device is closed"))
            self._opened.set()

    async def _fail_loop(self, limit_ms: int) -> None:
        """Give up what has waited for too long."""
        patience = Patience(limit_ms * 1_000_000)
        while self.core.barred is None:
            await trio.sleep(limit_ms / 8000)
            if patience.look(boottime_ns(), *self.core.waiting()):
                reason = f"{self.name}: not served for {limit_ms / 1000:g} s"
                log.warning("given up", device=self.name, problems=self._problems)
                self._cut(path for path in self.core.paths if path.lanes)
                self._entrance.lost()
                self.core.fail(reason)

    def _cut(self, paths: Iterable[Path]) -> None:
        """Close their connections; they come back as new ones."""
        for path in paths:
            self._scopes[path.index].cancel()
            for lane in path.lanes:
                self._close_link(self._links.pop(id(lane)))
            self.core.path_lost(path, boottime_ns())

    async def wait_open(self) -> None:
        """Return when the first path is up. Raises what makes that impossible."""
        limit_ms = self._options.fail_after_ms
        with trio.move_on_after(limit_ms / 1000 if limit_ms else math.inf):
            await self._opened.wait()
        if not self._opened.is_set():
            why = ", ".join(sorted(set(self._problems.values()))) or "no answer"
            raise UnreachableError(f"{self.name}: {why}", hint="is the server running?")
        if self._fatal is not None:
            raise self._fatal
        if self.core.barred is not None:
            raise BarredError(self.core.barred)

    def _retry_now(self) -> None:
        self._wake.set()
        self._wake = trio.Event()

    async def _path_loop(self, path: Path) -> None:
        delay_s = RETRY_FIRST_S
        while self.core.barred is None:
            began_ns = boottime_ns()
            with trio.CancelScope() as scope:
                self._scopes[path.index] = scope
                await self._path_once(path, scope)
            if self.core.barred is not None:
                break
            if boottime_ns() - began_ns > 1_000_000_000:
                delay_s = RETRY_FIRST_S
            with trio.move_on_after(delay_s):
                await self._wake.wait()
            delay_s = min(delay_s * 2, RETRY_MAX_S)
        self._opened.set()

    async def _path_once(self, path: Path, scope: trio.CancelScope) -> None:
        """One life of a path: connect, serve, clean up."""
        connections: list[Connection] = []
        links: list[Link] = []
        try:
            async with trio.open_nursery() as nursery:
                lone = len(self.core.paths) == 1
                for number in range(self._options.connections_per_path or (2 if lone else 1)):
                    if number and not self.flags & p.FLAG_CAN_MULTI_CONN:
                        break  # what one connection has flushed, another may not see
                    address = self.server.addresses[path.index]
                    dead_ms = self._options.dead_ms
                    connection = await connect(address, self.server.port, dead_ms)
                    connections.append(connection)
                    if not await self._negotiate(path, connection):
                        scope.cancel()
                        return
                    connection.patient()  # from here on `_ping_loop` judges
                    lane = self.core.lane_up(path, boottime_ns())
                    link = Link(self, lane, connection, scope)
                    links.append(link)
                    self._links[id(link.lane)] = link
                    nursery.start_soon(link.receive_loop)
                    nursery.start_soon(link.send_loop)
                nursery.start_soon(self._ping_loop, links)
                self._opened.set()
                self._problems.pop(path.index, None)
                self.pump()
        except* (OSError, StackError) as group:
            self._note_problem(path, group)
        finally:
            for link in links:
                self._links.pop(id(link.lane), None)
                link.interrupt()
                self._close_link(link)
            for connection in connections:
                connection.close()
            if path.lanes:
                self._entrance.lost()
            self.core.path_lost(path, boottime_ns())
            self.pump()

    def _note_problem(self, path: Path, group: BaseExceptionGroup[OSError | StackError]) -> None:
        """Why a path is down. Before the device is open, what no waiting can mend ends it."""
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if self._problems.get(path.index) != str(error):
            self._problems[path.index] = str(error)
            log.info("path is down", device=self.name, path=path.index, error=str(error))
        if isinstance(error, (UsageError, ForeignError)) and not self._opened.is_set():
            self._fatal = error
            self._opened.set()

    async def _ping_loop(self, links: list[Link]) -> None:
        """Ask where requests wait for an answer that does not come, and now and then elsewhere."""
        options = self._options
        path_ms = min(options.path_ms, options.dead_ms)
        idle_rounds = max(1, PATH_CHECKS * options.dead_ms // (4 * path_ms))
        answered = [-1] * len(links)
        for number in itertools.count():
            await trio.sleep(path_ms / PATH_CHECKS / 1000)
            self.core.look(boottime_ns())
            self.pump()
            for index, link in enumerate(links):
                lane = link.lane
                silent = bool(lane.in_flight) and lane.answered == answered[index]
                answered[index] = lane.answered
                if silent and (link.pinged_ns or not self.fenced):
                    limit_ms = path_ms if self._has_other_path(lane.path) else options.dead_ms
                    if link.is_unheard(limit_ms):
                        log.info("path is silent", device=self.name, path=lane.path.index)
                        link.give_up()
                        return
                elif not self.fenced:
                    if not lane.in_flight and link.has_ended():
                        link.give_up()
                        return
                elif silent or not number % idle_rounds:
                    link.ping()

    def _has_other_path(self, path: Path) -> bool:
        return any(other.lanes for other in self.core.paths if other is not path)

    def _bar(self, reason: str) -> None:
        for link in self._links.values():  # their callers go on at once
            self._close_link(link)
        self.core.bar(reason)
        self._retry_now()

    async def _negotiate(self, path: Path, connection: Connection) -> bool:
        """Greeting, TLS, LOGIN, GO. False: not now."""
        if self._closed:
            return False
        self._logins += 1
        try:
            return await self._log_in(path, connection)
        except UnreachableError:
            connection.raise_alert()
            raise
        finally:
            self._logins -= 1
            self._logins_over.set()
            self._logins_over = trio.Event()

    async def _log_in(self, path: Path, connection: Connection) -> bool:
        tls = self._options.tls
        async with connection.stream() as stream:
            await drive(greeting_dialogue(), stream)
            secure = tls is not None and await drive(
                starttls_dialogue(required=tls.required), stream
            )
        if tls is not None and secure:
            dead_ms = self._options.dead_ms
            await connection.start_tls(tls, self.server.name, dead_ms, is_host=not self.fenced)
        async with connection.stream() as stream:
            try:
                entered = await self._entrance.enter(path, stream)
            except BarredError as error:
                self._bar(error.message)
                return False
            except OldGenerationError as error:
                self.core.generation_floor(path, error.least)
                return False
        cut = self.core.logged_in(path, entered.epoch, entered.cache_generation, entered.size_bytes)
        connection.checked = entered.checksums
        self.flags = entered.flags
        self.core.can_flush = bool(self.flags & p.FLAG_SEND_FLUSH)
        self._cut(cut)
        return True


async def open_device(
    server: ServerInfo,
    export: str,
    instance: Instance,
    secret: bytes,
    nursery: trio.Nursery,
    options: Options | None = None,
) -> GnbdDevice:
    """Open one export; its tasks live in `nursery`. Waits until a path is up. Raises BarredError,
    or UsageError if the server has no such export."""
    options = options or Options()
    entrance = ClusterEntrance(export, instance, secret, options.sequence, options.is_ours)
    device = GnbdDevice(server, export, entrance, options)
    await device.start(nursery)
    return device
