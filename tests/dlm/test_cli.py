"""dlmctl's screens, from the reports of real members."""

import json

import pytest
import trio
from click.testing import CliRunner

from cluster.errors import UnreachableError, UsageError
from cluster.locks import Mode
from dlm import cli, report
from tests.dlm.cluster_io import cluster, until


def rows(result, node="n1"):
    return [{"node": node, "kind": "mount", "title": "/mnt", "result": result}]


@pytest.mark.trio
async def test_screens(monkeypatch):
    async with cluster(2) as (_hub, (one, two)):
        await one.get(b"A").hold(Mode.EX)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.get(b"A").hold, Mode.PR)
            await until(lambda: one.get(b"A")._demand)
            found = {verb: await one.query(verb, {"name": "A"}) for verb in ("spaces", "locks")}
            found |= {verb: await one.query(verb, {"name": "A"}) for verb in ("waiters", "why")}
            nursery.cancel_scope.cancel()
    calls = []

    def call(method, params):
        calls.append((method, params))
        return json.loads(json.dumps(rows(found[method.removeprefix("dlm.")])))

    monkeypatch.setattr(cli.control_client_io, "call", call)
    run = CliRunner().invoke
    assert "test" in run(cli.main, ["spaces"]).output
    assert "EX" in run(cli.main, ["locks", "--all"]).output
    assert calls[-1] == ("dlm.locks", {"all": True})
    assert "PR" in run(cli.main, ["waiters"]).output
    why = run(cli.main, ["why", "A"])
    assert f"{two.space.me} waits for PR" in why.output
    assert f"{one.space.me} holds EX" in why.output
    assert json.loads(run(cli.main, ["why", "A", "--json"]).output)[0]["result"]


def test_errors_have_exit_codes(monkeypatch):
    def call(method, params):
        raise UnreachableError("no daemon")

    monkeypatch.setattr(cli.control_client_io, "call", call)
    result = CliRunner().invoke(cli.main, ["spaces"])
    assert result.exit_code == 6
    monkeypatch.setattr(
        cli.control_client_io, "call", lambda m, p: [{"node": "n1", "error": {"message": "hangs"}}]
    )
    result = CliRunner().invoke(cli.main, ["locks"])
    assert result.exit_code == 1


def test_names_for_people():
    for name in (b"I0000000000000001", b"\x00\xff", b"0xab", b"a b"):
        assert report.parse(report.text(name)) == name
    with pytest.raises(UsageError):
        report.parse("0xzz")
