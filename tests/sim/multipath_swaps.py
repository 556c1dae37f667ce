"""COMPARE AND WRITE in the multipath world: every member swaps the value of one block, without a
lock, both through `ClientCore` and beside it.

Each value is new, and its depth is one more than that of the value that it replaced. So swaps are
atomic, durable and never undone if and only if the values that were told form one chain:

- no value is replaced twice by swaps that were told to have succeeded;
- what was told not to have been written is never there: no swap is done twice, the second time
  against itself;
- what is read later is at least as deep as what was told, also after a power cut.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.errors import StackError
from cluster.ids import Epoch
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.client.failures import MiscompareError, UnknownOutcomeError
from gnbd.client.lanes import Request
from tests.sim.multipath_server import (
    SWAPPED,
    WIDTH,
    Call,
    Go,
    GoAnswer,
    Hello,
    LoginAnswer,
    Reply,
)
from tests.sim.streams import CLOSE, Pipe
from tests.sim.world import Violation

if TYPE_CHECKING:
    from tests.sim.multipath_client import Client, Device

PATH = 7
"""Not one of those of `ClientCore`."""


class Chain:
    """The values of the block of one server, as they were told."""

    def __init__(self) -> None:
        self.depths = {0: 0}
        self.replaced: set[int] = set()
        self.refused: set[int] = set()
        self.seen: set[int] = set()
        self.told = 0

    def succeeded(self, old: int, new: int) -> None:
        """A swap was told to have been done."""
        if old in self.replaced:
            raise Violation(f"{old} was replaced twice, now by {new}")
        self.replaced.add(old)
        self.told = max(self.told, self.depths[new])

    def refuse(self, new: int) -> None:
        """A swap was told to have found something else."""
        self.refused.add(new)
        self.check()

    def check(self) -> None:
        if wrong := self.refused & self.seen:
            raise Violation(f"{wrong} are there, and were told not to have been written")

    def read(self, value: int, told: int) -> None:
        """By who began when `told` was known."""
        self.seen.add(value)
        self.check()
        if self.depths[value] < told:
            raise Violation(f"{value} is read, {self.depths[value]} swaps deep, after {told}")


class Swapper:
    """One instance at one server: reads, swaps, and begins anew when its connection ends."""

    def __init__(self, client: Client, device: Device) -> None:
        self.client, self.device, self.world = client, device, client.world
        self.chain = self.world.chains[device.server.name]
        self.generation = 0
        self.pipe: Pipe | None = None
        self.again(50)

    def again(self, mean_ms: float) -> None:
        self.world.later(mean_ms, self.connect)

    def connect(self) -> None:
        if not self.client.alive:
            return
        self.generation += 1
        self.pipe = self.world.connect(self.client.nexus.node, self.device.server, 0)
        if self.pipe is None:
            self.again(50)
            return
        self.pipe.down.receiver = self.receive
        self.answered: Callable[[Reply], None] = lambda _reply: None
        self.pipe.up.send(Hello(self.client.nexus, PATH, self.generation, self.device.declared))

    def give_up(self) -> None:
        """What was under way may have been done, or not."""
        if self.pipe is not None:
            self.pipe.client_closes()
            self.pipe = None
        self.again(50)

    def receive(self, message: object) -> None:
        assert self.pipe is not None
        match message:
            case LoginAnswer(status=m.LOGIN_OK):
                self.pipe.up.send(Go())
            case GoAnswer():
                self.look()
            case Reply():
                self.answered(message)
            case _:
                assert message is CLOSE or isinstance(message, LoginAnswer)
                self.give_up()

    def ask(self, kind: int, data: bytes, answered: Callable[[Reply], None]) -> None:
        if self.pipe is None or not self.client.alive:
            return
        self.answered = answered
        length = len(data) or WIDTH
        offset, flags = SWAPPED * WIDTH, p.CMD_FLAG_FUA if data else 0
        self.pipe.up.send(Call(kind, 1, offset, length, data, flags, Epoch(0), p.SEQUENCE_MAX))

    def soon(self, action: Callable[[], None]) -> None:
        """On this connection."""
        generation = self.generation
        self.world.later(60, lambda: action() if self.generation == generation else None)

    def look(self) -> None:
        told = self.chain.told

        def answered(reply: Reply) -> None:
            if reply.error:
                self.give_up()
                return
            value = int.from_bytes(reply.data, "big")
            self.chain.read(value, told)
            self.soon(lambda: self.swap(value))

        self.ask(p.CMD_READ, b"", answered)

    def swap(self, old: int) -> None:
        new = self.world.value()
        self.chain.depths[new] = self.chain.depths[old] + 1

        def answered(reply: Reply) -> None:
            if reply.error not in (0, p.EMISCOMPARE):
                self.give_up()
                return
            if reply.error:
                self.chain.refuse(new)
            else:
                self.chain.succeeded(old, new)
                self.world.swaps += 1
            self.soon(self.look)

        data = old.to_bytes(WIDTH, "big") + new.to_bytes(WIDTH, "big")
        self.ask(p.CMD_COMPARE_AND_WRITE, data, answered)


class CoreSwapper:
    """The same through `ClientCore`, as `GnbdDevice.compare_and_write` does: it is told when the
    answer is lost. Nobody else writes this block: nothing has to be flushed before."""

    def __init__(self, client: Client, name: int) -> None:
        self.client, self.name = client, name
        self.chain = client.world.chains[name]
        self.busy = False
        self.found: int | None = None

    def go_on(self) -> None:
        """Look, or swap what was found."""
        if self.busy:
            return
        self.busy = True
        if self.found is None:
            self.look()
        else:
            self.swap(self.found)

    def look(self) -> None:
        told = self.chain.told
        request = Request(p.CMD_READ, SWAPPED * WIDTH, WIDTH)

        def done(error: StackError | None) -> None:
            self.busy = False
            if error is None:
                self.found = int.from_bytes(request.result, "big")
                self.chain.read(self.found, told)

        self.client.submit(self.name, request, done)

    def swap(self, old: int) -> None:
        new = self.client.world.value()
        self.chain.depths[new] = self.chain.depths[old] + 1
        self.found = None

        def done(error: StackError | None) -> None:
            self.busy = False
            if error is None:
                self.chain.succeeded(old, new)
                self.client.world.swaps += 1
            elif isinstance(error, MiscompareError):
                self.chain.refuse(new)
            elif isinstance(error, UnknownOutcomeError):
                self.client.world.unknown_swaps += 1

        data = old.to_bytes(WIDTH, "big") + new.to_bytes(WIDTH, "big")
        kind, flags = p.CMD_COMPARE_AND_WRITE, p.CMD_FLAG_FUA
        self.client.submit(self.name, Request(kind, SWAPPED * WIDTH, len(data), data, flags), done)
