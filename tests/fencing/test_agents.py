"""Fence agents: fence_dummy of the distribution, and scripts that misbehave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from cluster.errors import ConfigError
from fencing.agent_io import Agent
from fencing.methods import Verdict
from fencing.settings import MethodConfig
from lab.block_server import wait_for

SECRET = "hunter2-hunter2"


def dummy(tmp_path, **more):
    parameters = {"status_file": str(tmp_path / "status"), **more}
    return MethodConfig(kind="agent", agent="fence_dummy", parameters=parameters)


def test_fence_dummy_off_and_on(tmp_path):
    """The distribution's own agent: off is proven by its status; on takes it back."""
    agent = Agent(dummy(tmp_path))
    assert trio.run(agent.unfence, "n2") == ""
    assert (tmp_path / "status").read_text() == "on"
    outcome = trio.run(agent.fence, "n2")
    assert outcome.verdict is Verdict.PROVEN, outcome
    assert outcome.text == "fence_dummy: off, and plug n2 is off"
    assert (tmp_path / "status").read_text() == "off"


def test_fence_dummy_that_fails(tmp_path):
    """It takes `type=fail` as its metadata says; the node stays on."""
    (tmp_path / "status").write_text("on")
    outcome = trio.run(Agent(dummy(tmp_path, type="fail", power_timeout=1)).fence, "n2")
    assert outcome.verdict is Verdict.FAILED
    assert outcome.text.startswith("fence_dummy off")


def script(tmp_path, text, **more):
    """An agent of our own that runs `text` with the parameters in $given."""
    path = tmp_path / "fence_test"
    path.write_text(f"#!/bin/sh\ngiven=$(cat)\n{text}\n")
    path.chmod(0o755)
    return Agent(MethodConfig(kind="agent", agent="fence_test", **more), tmp_path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("exit 0", "still on"),  # off succeeds, status says on
        ('case "$given" in *action=off*) exit 0;; esac; echo lost; exit 1', "status: lost"),
        ("echo no plug; exit 1", "off: no plug"),
        ("exit 2", "off: it said nothing"),
        ("kill -9 $$", "off: it said nothing"),
    ],
)
def test_no_success_without_proof(tmp_path, body, says):
    outcome = trio.run(script(tmp_path, body).fence, "n2")
    assert outcome.verdict is Verdict.FAILED
    assert says in outcome.text


def test_secrets_are_seen_by_the_agent_alone(tmp_path):
    """On stdin; neither in the arguments, nor in the environment, nor in what is handed on."""
    secrets = tmp_path / "secrets"
    secrets.write_text(f"password={SECRET}\n")
    secrets.chmod(0o600)
    body = (
        f'printf %s "$given" > {tmp_path}/given\n'
        f"tr '\\0' '\\n' < /proc/$$/cmdline > {tmp_path}/cmdline\n"
        f"env > {tmp_path}/environment\n"
        f'echo "login with {SECRET} refused"; exit 1'
    )
    os.environ["CFS_TEST_MARK"] = "inherited"
    try:
        agent = script(
            tmp_path, body, secrets=str(secrets), parameters={"ip": "1", "ssl": True},
            ports={"n2": "7"},
        )  # fmt: skip
        outcome = trio.run(agent.fence, "n2")
    finally:
        del os.environ["CFS_TEST_MARK"]
    given = (tmp_path / "given").read_text().splitlines()
    assert sorted(given) == [
        "action=off", "ip=1", "nodename=n2", f"password={SECRET}", "plug=7", "ssl=1",
    ]  # fmt: skip
    assert SECRET not in (tmp_path / "cmdline").read_text()
    environment = (tmp_path / "environment").read_text()
    assert SECRET not in environment
    assert "inherited" not in environment
    assert outcome.text == "fence_test off: login with *** refused"


def test_secrets_that_others_can_read_are_refused(tmp_path):
    secrets = tmp_path / "secrets"
    secrets.write_text(f"password={SECRET}\n")
    secrets.chmod(0o644)
    agent = script(tmp_path, "exit 2", secrets=str(secrets))
    with pytest.raises(ConfigError, match="can be read by others"):
        trio.run(agent.fence, "n2")


def test_an_agent_that_is_not_there(tmp_path):
    agent = Agent(MethodConfig(kind="agent", agent="fence_nothing"), tmp_path)
    with pytest.raises(ConfigError, match=r"cannot run .*fence_nothing"):
        trio.run(agent.fence, "n2")


@pytest.mark.parametrize("end", ["wait", "exit 0"])
def test_a_cancelled_agent_leaves_nothing_running(tmp_path, end):
    """An attempt that is late is killed, with what it has started, also when the agent itself has
    ended and only its child still holds the pipe."""
    pids = tmp_path / "pids"
    agent = script(tmp_path, f"sleep 1000 & echo $! $$ > {pids}.new; mv {pids}.new {pids}; {end}")

    def begun():
        return pids.exists() and (end == "wait" or not alive(int(pids.read_text().split()[1])))

    async def body():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(agent.fence, "n2")
            await trio.to_thread.run_sync(wait_for, begun, "the agent runs")
            nursery.cancel_scope.cancel()

    trio.run(body)
    started = [int(pid) for pid in pids.read_text().split()]
    wait_for(lambda: not any(alive(pid) for pid in started), "all are gone")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_agent_that_talks_without_end_is_bounded(tmp_path):
    """Only the end of what it says is kept."""
    body = "head -c 5000000 /dev/zero | tr '\\0' 'x'; echo; echo the end; exit 1"
    outcome = trio.run(script(tmp_path, body).fence, "n2")
    assert outcome.text == "fence_test off: the end"
