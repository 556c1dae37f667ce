"""Drives a `methods.Fencer`: one attempt at a time, in a task that can be stopped."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from cluster.errors import StackError
from cluster.paths_io import boottime_ns
from fencing.methods import Action, Begin, Done, Ended, Event, Fencer, Outcome, Run, Stop, Tick
from fencing.methods import Verdict as V

Perform = Callable[[str], Awaitable[Outcome]]
"""One attempt of the method with this name. Raises StackError, OSError: the attempt failed."""


async def carry_out(fencer: Fencer, perform: Perform) -> Done:
    """Try the levels until it is proven or there is nothing left to try."""
    send, receive = trio.open_memory_channel[Event](1)
    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def attempt(number: int, method: str, scope: trio.CancelScope) -> None:
            with scope:
                try:
                    outcome = await perform(method)
                except StackError as error:
                    outcome = Outcome(V.FAILED, error.message)
                except OSError as error:
                    outcome = Outcome(V.FAILED, str(error))
                await send.send(Ended(number, outcome))

        event: Event = Begin()
        while fencer.done is None:
            actions: list[Action] = fencer.step(boottime_ns(), event)
            fencer.check()
            for action in actions:
                match action:
                    case Run(number, method):
                        scope = trio.CancelScope()
                        nursery.start_soon(attempt, number, method, scope)
                    case Stop():
                        scope.cancel()
                    case Done():
                        pass
            event = await _next(fencer, receive)
        nursery.cancel_scope.cancel()
    assert fencer.done is not None
    return fencer.done


async def _next(fencer: Fencer, receive: trio.MemoryReceiveChannel[Event]) -> Event:
    """The outcome of an attempt, or a tick when the deadline is reached."""
    deadline_ns = fencer.deadline()
    if deadline_ns is None:
        return Tick()
    with trio.move_on_after(max(0, deadline_ns - boottime_ns()) / 1e9):
        return await receive.receive()
    return Tick()
