"""The driver of the levels: attempts are tasks that fail, hang and are stopped."""

from __future__ import annotations

import trio

from cluster.errors import StackError
from fencing.methods import Done, Fencer, Method, Outcome, Verdict
from fencing.run_io import carry_out


def method(name, timeout_ms=60_000):
    return Method(name, retries=0, timeout_ms=timeout_ms, retry_ms=0)


def test_errors_are_failures_and_the_hanging_is_stopped():
    """A method that raises has failed; one that hangs is cancelled; the next level goes on."""
    stopped = []

    async def perform(name: str) -> Outcome:
        if name == "raises":
            raise StackError("no such plug")
        if name == "breaks":
            raise OSError(5, "Input/output error")
        if name == "hangs":
            try:
                await trio.sleep_forever()
            finally:
                stopped.append(name)
        return Outcome(Verdict.PROVEN, "seen")

    names = ("raises", "breaks", "hangs", "works")
    fencer = Fencer([[method(name, 10 if name == "hangs" else 60_000)] for name in names])
    done = trio.run(carry_out, fencer, perform)
    assert done == Done(Verdict.PROVEN, 4)
    assert stopped == ["hangs"]
    assert [(one.method, one.verdict, one.text) for one in fencer.history] == [
        ("raises", "failed", "no such plug"),
        ("breaks", "failed", "[Errno 5] Input/output error"),
        ("hangs", "unknown", "no answer within 10 ms"),
        ("works", "proven", "seen"),
    ]


def test_nothing_works():
    async def perform(_name: str) -> Outcome:
        return Outcome(Verdict.FAILED, "no")

    fencer = Fencer([[method("a"), method("b")]], rounds=3, pause_ms=1)
    assert trio.run(carry_out, fencer, perform) == Done(Verdict.FAILED, 0)
    assert [one.method for one in fencer.history] == ["a", "a", "a"]
