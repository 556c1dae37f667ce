"""The client's bookkeeping for one export over several paths, without I/O (R3, R6, R7).

A request is in exactly one place: the queue, in flight on a lane (`gnbd.client.lanes`), or
*stranded*: sent on a path that was lost. Invariants:

- a stranded request goes back to the queue only when the server confirmed that its path is
  drained: by a LOGIN of a newer generation there, or by DRAIN on another path (R6); only a server
  that knows neither is not waited for, and gnbd.client.plain_io says what is lost with that;
- what would change bytes that a forsaken request (its caller was cancelled) may still change waits
  for that one's end;
- nothing is sent while the server is not known to have installed the required epoch (R3);
- when the server's cache generation changes, every lane of the old one is cut, and what was written
  since the last FLUSH is sent again before any new request (R7).

The shell calls one method per event and then `assign`; what it must do comes back as values.
"""

from __future__ import annotations

from collections import deque

from cluster.errors import BarredError, StackError
from cluster.ids import Epoch
from gnbd import protocol as p
from gnbd.client.failures import UnknownOutcomeError, failure, given_up
from gnbd.client.lanes import LANE_BYTES_MAX, Drain, Lane, Path, Request, Stranded
from gnbd.client.merging import merged
from gnbd.client.path_choice import LARGE_BYTES, SPREAD_BYTES, Ranking
from gnbd.client.retained import Piece, Retained, owned, split

_OF_ONE_LANE = frozenset({p.CMD_PING, p.CMD_DRAIN, p.CMD_LOGOUT})
_MEASURED = frozenset({p.CMD_READ, p.CMD_WRITE})
"""Of these the service time is taken."""
_CHANGES = frozenset({p.CMD_WRITE, p.CMD_WRITE_ZEROES, p.CMD_TRIM, p.CMD_COMPARE_AND_WRITE})


class ClientCore:
    """One export of one server as one instance sees it."""

    def __init__(self, path_count: int, first_generation: int, *, drains: bool = True) -> None:
        """`drains`: the server confirms them. If it does not, the requests of a lost path go back
        to the queue at once."""
        self._drains = drains
        self.paths = [Path(index, first_generation) for index in range(path_count)]
        self.queue: deque[Request] = deque()
        self.urgent: deque[Request] = deque()
        self.retained = Retained()
        self.required = Epoch(0)
        self.installed = Epoch(0)
        self.cache_generation = 0
        self.barred: str | None = None
        self.failed: str | None = None
        """Requests were given up; nothing is taken before the server has confirmed that they are
        drained."""
        self.size_bytes = 0
        self.can_flush = True
        """If not, what was written is not kept: nothing would ever make it durable."""
        self._cookie = 0
        self._order = 0
        self._barrier: Request | None = None
        self._round = 0
        self._resync_left = 0
        self._forsaken: set[Request] = set()
        self._refused: list[Request] = []
        """Of these; tried again at the next `look`."""
        self._own_flush = False
        self._rankings: list[Ranking[Lane] | None] = [None, None]

    # -- requests --------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """A new request. Raises BarredError, UnreachableError."""
        if self.barred is not None:
            raise BarredError(self.barred)
        if self.failed is not None:
            raise given_up(self.failed)
        self._order += 1
        request.order = self._order
        self.queue.append(request)

    def forsake(self, request: Request) -> None:
        """Its caller is cancelled and may write there again. It goes on, and newer bytes wait."""
        request.waiter = None
        if request.kind in _CHANGES:
            self._forsaken.add(request)
            request.waiter = _Forsaken(self._forsaken, request)

    def _must_wait(self, request: Request) -> bool:
        """Whether older bytes of a forsaken request could come over those of this one."""
        if not self._forsaken or request.kind not in _CHANGES:
            return False
        end = request.offset + request.length
        return any(
            part in self._forsaken
            and part.order < request.order
            and part.offset < end
            and request.offset < part.offset + part.length
            for sent in self._sent()
            for part in sent.parts or [sent]
        )

    def is_open(self) -> bool:
        """Whether ordinary requests may be sent."""
        return (
            self.installed >= self.required
            and self._resync_left == 0
            and self.barred is None
            and not self._has_old_round()
        )

    def _has_old_round(self) -> bool:
        """A repetition from an earlier round may still execute on a path that is not drained: new
        writes must not come before it."""
        return any(
            r.round and r.round != self._round
            for path in self.paths
            for stranded in path.stranded
            for r in stranded.requests
        )

    def assign(self, now_ns: int) -> list[tuple[Lane, Request]]:
        """Take what may be sent now and give each request its lane and cookie."""
        result: list[tuple[Lane, Request]] = []
        if self.installed < self.required or not any(path.lanes for path in self.paths):
            return result
        self._maybe_flush()
        self._declare_first()
        while True:
            queue = self.urgent if self.urgent else self.queue
            if not queue or (queue is self.queue and not self.is_open()):
                return result
            request = queue[0]
            if self._barrier is not None and request.order > self._barrier.order:
                return result
            if self._must_wait(request):
                return result
            changes = request.kind in (p.CMD_WRITE, p.CMD_WRITE_ZEROES)
            if changes and request.round == 0 and self.retained.is_full():
                flush = next((r for r in queue if r.kind == p.CMD_FLUSH), None)
                if flush is None:
                    return result
                queue.remove(flush)
                queue.appendleft(flush)
                continue
            lane = self._ranking(request, now_ns).choose(request.length)
            if lane is None:
                return result
            queue.popleft()
            if self._barrier is None and not self._forsaken:
                request = merged(request, queue)
            self._place(lane, request, now_ns)
            result.append((lane, request))

    def assign_one(self, now_ns: int) -> Lane | None:
        """What `assign` does, shorter, for the one request that has just been submitted, when
        nothing at all stands in its way and the first lane is the best one. Else None."""
        if (
            len(self.queue) != 1
            or self.urgent
            or self._barrier is not None
            or self._forsaken
            or self._resync_left
            or self.installed < self.required
            or self.retained.wants_flush()
        ):
            return None
        is_up = False
        for path in self.paths:
            if path.stranded:
                return None
            is_up = is_up or bool(path.lanes)
        if not is_up:
            return None
        request = self.queue[0]
        ranking = self._ranking(request, now_ns)
        lane = ranking.probe or ranking.first()
        if lane.bytes_in_flight >= SPREAD_BYTES or not lane.has_room():
            return None
        self.queue.popleft()
        self._place(lane, request, now_ns)
        return lane

    def _ranking(self, request: Request, now_ns: int) -> Ranking[Lane]:
        large = request.length >= LARGE_BYTES
        ranking = self._rankings[large]
        if ranking is None or now_ns >= ranking.until_ns:
            lanes = [lane for path in self.paths for lane in path.lanes]
            ranking = self._rankings[large] = Ranking(lanes, large, now_ns)
        return ranking

    def _rank_anew(self) -> None:
        self._rankings = [None, None]

    def look(self, now_ns: int) -> None:
        """Called now and then, before `assign`: whose answers are overdue gets less, and what the
        store refused to take again is tried again."""
        self.urgent.extend(self._refused)
        self._refused.clear()
        for path in self.paths:
            for lane in path.lanes:
                if lane.is_overdue(now_ns):
                    self._rank_anew()

    def _place(self, lane: Lane, request: Request, now_ns: int) -> None:
        self._cookie += 1
        request.cookie = self._cookie
        if request.kind == p.CMD_FLUSH:
            request.mark = self.retained.mark()
            lane.flushes += 1
        elif request.kind == p.CMD_SEQUENCE:
            # What comes later may need the new sequence number: it must not overtake elsewhere.
            self._barrier = request
        lane.in_flight[request.cookie] = request
        lane.bytes_in_flight += request.cost_bytes()
        if request.kind in _MEASURED and lane.measure(request, now_ns):
            ranking = self._rankings[request.length >= LARGE_BYTES]
            if ranking is not None and ranking.probe is lane:
                self._rank_anew()

    def _declare_first(self) -> None:
        """What is written again may be refused until a sequence number that waits is declared."""
        if self._resync_left:
            for request in [r for r in self.queue if r.kind == p.CMD_SEQUENCE]:
                self.queue.remove(request)
                self.urgent.appendleft(request)

    def _maybe_flush(self) -> None:
        if self.retained.wants_flush() and not self._own_flush and self.failed is None:
            self._own_flush = True
            self.submit(Request(p.CMD_FLUSH, waiter=_OwnFlush(self)))

    def place_private(self, lane: Lane, request: Request) -> None:
        """Send a private command on this very lane (the gates do not matter to it)."""
        self._place(lane, request, 0)

    def completed(self, lane: Lane, cookie: int, number: int, now_ns: int) -> None:
        """A reply. The result of a READ is already in the request. `now_ns` counts only if it is
        the one that the lane measures."""
        request = lane.in_flight.pop(cookie)
        lane.answered += 1
        lane.bytes_in_flight -= request.cost_bytes()
        lane.flushes -= request.kind == p.CMD_FLUSH
        if request is lane.measured:
            lane.measured_done(number, now_ns)
            self._rank_anew()
        if request is self._barrier:
            self._barrier = None
        if request.round:
            self._resync_done(request, number)
            return
        if number and request.parts:  # which of them it was shows when each goes alone
            self.queue.extendleft(reversed(request.parts))
            return
        if number:
            request.finish(failure(request.kind, request.offset, request.length, number))
            return
        if request.kind == p.CMD_PING:
            # An export only grows. A late answer of an earlier size changes nothing.
            self.size_bytes = max(self.size_bytes, p.SIZE.unpack(request.result)[0])
        elif request.kind == p.CMD_WRITE:
            assert request.data is not None
            if self.can_flush:
                piece = Piece(request.offset, request.length, owned(request.data))
                self.retained.add(piece, durable=bool(request.flags & p.CMD_FLAG_FUA))
        elif request.kind == p.CMD_WRITE_ZEROES:
            if self.can_flush:
                piece = Piece(request.offset, request.length, None)
                self.retained.add(piece, durable=bool(request.flags & p.CMD_FLAG_FUA))
        elif request.kind == p.CMD_COMPARE_AND_WRITE:  # with FUA: an older write there is over
            self.retained.add(Piece(request.offset, request.length // 2, None), durable=True)
        elif request.kind == p.CMD_FLUSH:
            self.retained.drop(request.mark)
        request.finish(None)

    # -- paths -----------------------------------------------------------------------------

    def logged_in(
        self, path: Path, epoch: Epoch, cache_generation: int, size_bytes: int
    ) -> list[Path]:
        """LOGIN with `path.generation` was granted: what the path had before is drained. Gives
        the other paths, which must be cut because they speak to an earlier life of the cache.
        Raises StackError if lanes of this very path do."""
        changed = self.cache_generation not in (0, cache_generation)
        if changed and path.lanes:
            raise StackError("the server started again between two connections")
        self.installed = max(self.installed, epoch)
        self.size_bytes = size_bytes
        self._unstrand(path, path.generation - 1)
        self._work_again()
        self.cache_generation = cache_generation
        if not changed:
            return []
        self._begin_resync()
        return [other for other in self.paths if other is not path and other.lanes]

    def lane_up(self, path: Path, now_ns: int) -> Lane:
        """A connection of this path has entered transmission."""
        if not path.lanes:
            path.health.up(now_ns)
        lane = Lane(path, len(path.lanes))
        path.lanes.append(lane)
        self._rank_anew()
        return lane

    def path_lost(self, path: Path, now_ns: int) -> None:
        """All connections of a path are closed on this side; the next one has a new generation."""
        lost: list[Request] = []
        if path.lanes:
            path.health.lost(now_ns)
            self._rank_anew()
        for lane in path.lanes:
            lost += lane.in_flight.values()
            lane.in_flight = {}
        path.lanes = []
        lost = [r for r in lost if r.kind not in _OF_ONE_LANE]
        if lost:
            path.stranded.append(Stranded(path.generation, lost))
        # A DRAIN that was on its way over this path is asked for again on another one.
        for other in self.paths:
            for stranded in other.stranded:
                stranded.asked = False
        if not self._drains:
            self._unstrand(path, path.generation)
        path.generation += 1

    def generation_floor(self, path: Path, least: int) -> None:
        """The server accepts only this generation and later ones."""
        path.generation = max(path.generation + 1, least)

    def drains(self) -> list[Drain]:
        """DRAINs to send now: for each lost generation with requests, over another path."""
        result: list[Drain] = []
        for path in self.paths:
            lane = next((o.lanes[0] for o in self.paths if o is not path and o.lanes), None)
            if lane is None:
                continue
            for stranded in path.stranded:
                if not stranded.asked:
                    stranded.asked = True
                    result.append(Drain(lane, path, stranded.generation))
        return result

    def drained(self, path: Path, generation: int) -> None:
        """The server confirmed that nothing of that path up to that generation executes."""
        self._unstrand(path, generation)
        self._work_again()
        path.generation = max(path.generation, generation + 1)

    def _unstrand(self, path: Path, generation: int) -> None:
        back: list[Request] = []
        for stranded in path.stranded:
            if stranded.generation <= generation:
                back += stranded.requests
        path.stranded = [s for s in path.stranded if s.generation > generation]
        path.repeated += len(back)
        for request in sorted(back, key=lambda r: r.order, reverse=True):
            if request.kind == p.CMD_COMPARE_AND_WRITE:  # it might compare with what it has written
                request.finish(UnknownOutcomeError("the answer to a compare and write is lost"))
            elif request.round == 0:
                self.queue.appendleft(request)
            elif request.round == self._round:
                self.urgent.append(request)

    # -- cache generation (R7) -------------------------------------------------------------

    def _begin_resync(self) -> None:
        self._round += 1
        self.queue.extendleft(r for r in self.urgent if r.round == 0)
        self.urgent.clear()
        self._refused.clear()
        pieces = self.retained.overlay()
        self._resync_left = 0
        for piece in pieces:
            for part in split(piece, LANE_BYTES_MAX // 4):
                kind = p.CMD_WRITE if part.data is not None else p.CMD_WRITE_ZEROES
                request = Request(kind, part.offset, part.length, part.data)
                request.round = self._round
                self.urgent.append(request)
                self._resync_left += 1

    def _resync_done(self, request: Request, number: int) -> None:
        if request.round != self._round:
            return
        if number:
            # Not even this store error may lose acknowledged bytes: again, until it succeeds.
            self._refused.append(request)
            return
        self._resync_left -= 1

    # -- facts -----------------------------------------------------------------------------

    def set_epoch(self, required: Epoch) -> None:
        self.required = max(self.required, required)

    def note_installed(self, epoch: Epoch) -> None:
        self.installed = max(self.installed, epoch)

    def bar(self, reason: str) -> None:
        """The server says that this instance is barred: everything ends."""
        if self.barred is None:
            self.barred = reason
        self.fail_all(BarredError(self.barred))

    def waiting(self) -> tuple[int, int | None]:
        """The number of the newest request, and of the oldest that waits; see Patience."""
        numbers = [r.order for r in self.all_requests() if r.order and not r.round]
        return self._order, min(numbers, default=None)

    def fail(self, reason: str) -> None:
        """All connections were cut. Everything that waits ends with UnreachableError, but what was
        acknowledged is still kept and written again. What may still execute on a path stays
        stranded, without its callers."""
        assert not any(path.lanes for path in self.paths)
        self.failed = reason
        ended = [r for r in self.all_requests() if not r.round]
        self.queue.clear()
        self.urgent = deque(r for r in self.urgent if r.round)
        self._barrier = None
        for path in self.paths:
            for stranded in path.stranded:
                stranded.requests = [r for r in stranded.requests if r.round]
        for request in ended:
            request.finish(given_up(reason))

    def _work_again(self) -> None:
        if not any(path.stranded for path in self.paths):
            self.failed = None

    def fail_all(self, error: StackError) -> None:
        """Nothing will be sent any more."""
        for request in self.all_requests():
            request.finish(error)
        self.queue.clear()
        self.urgent.clear()
        self._refused.clear()
        for path in self.paths:
            path.stranded = []
            for lane in path.lanes:
                lane.in_flight = {}
                lane.bytes_in_flight = lane.flushes = 0

    def all_requests(self) -> list[Request]:
        """Everything not yet finished."""
        return [*self.queue, *self.urgent, *self._refused, *self._sent()]

    def _sent(self) -> list[Request]:
        """What may be executing."""
        found: list[Request] = []
        for path in self.paths:
            found += [r for s in path.stranded for r in s.requests]
            found += [r for lane in path.lanes for r in lane.in_flight.values()]
        return found

    def standby(self, now_ns: int) -> list[bool]:
        """Which paths are held down."""
        return [path.health.standby_until_ns > now_ns for path in self.paths]

    def own_flush_done(self) -> None:
        self._own_flush = False

    def check(self) -> None:
        """Assert the invariants."""
        everything = self.all_requests()
        assert len({id(r) for r in everything}) == len(everything)
        assert self._forsaken <= {part for r in everything for part in r.parts or [r]}
        for path in self.paths:
            assert all(s.generation < path.generation for s in path.stranded)
            assert all(lane.generation == path.generation for lane in path.lanes)


class _Forsaken:
    """In the place of a caller that was cancelled."""

    def __init__(self, forsaken: set[Request], request: Request) -> None:
        self._forsaken = forsaken
        self._request = request

    def done(self, _error: StackError | None) -> None:
        self._forsaken.discard(self._request)


class _OwnFlush:
    """Waits for a FLUSH that the core itself wanted."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core

    def done(self, _error: StackError | None) -> None:
        self._core.own_flush_done()


class DrainWaiter:
    """Takes the answer to a DRAIN."""

    def __init__(self, core: ClientCore, path: Path, generation: int) -> None:
        self._core = core
        self._path = path
        self._generation = generation

    def done(self, error: StackError | None) -> None:
        if error is None:
            self._core.drained(self._path, self._generation)
