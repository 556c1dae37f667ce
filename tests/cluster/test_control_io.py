"""Control sessions: calls both ways, errors, descriptors, events in order, death of the peer."""

import os
import socket

import pytest
import trio

from cluster import control_client_io
from cluster.control_io import open_session, serve_sessions
from cluster.errors import BusyError, UnreachableError, UsageError
from cluster.paths_io import control_socket


class Server:
    def __init__(self):
        self.sessions = []
        self.gone = []
        self.left = trio.Event()

    def attach(self, session):
        self.sessions.append(session)

        async def echo(params):
            return params["text"]

        async def busy(_params):
            raise BusyError("held by n2", hint="ask n2")

        async def crash(_params):
            raise RuntimeError("a bug")

        async def back(params):
            return await session.call("client.add", {"a": params["a"], "b": 2})

        async def fd(params):
            with os.fdopen(params["fds"].pop(), "rb") as file:
                return file.read().decode()

        async def events(_params):
            for n in range(5):
                session.event("count", n)
            return "done"

        return {
            "echo": echo,
            "busy": busy,
            "crash": crash,
            "back": back,
            "fd": fd,
            "events": events,
        }

    def detach(self, session):
        self.gone.append(session)
        self.left.set()


@pytest.fixture
async def served(tmp_path, nursery):
    server = Server()
    await nursery.start(serve_sessions, control_socket(tmp_path), server.attach, server.detach)
    return server, tmp_path


@pytest.mark.trio
async def test_calls_events_and_descriptors(served):
    server, run = served
    seen = []

    async def add(params):
        return params["a"] + params["b"]

    async with open_session(
        run, {"client.add": add}, lambda name, data: seen.append((name, data))
    ) as session:
        assert await session.call("echo", {"text": "x" * 200_000}) == "x" * 200_000
        assert await session.call("back", {"a": 40}) == 42
        assert await session.call("events") == "done"
        assert seen == [("count", n) for n in range(5)]
        with pytest.raises(BusyError) as caught:
            await session.call("busy")
        assert (caught.value.hint, caught.value.exit_code) == ("ask n2", 5)
        with pytest.raises(UsageError):
            await session.call("nothing")
        with pytest.raises(UsageError):
            await session.call("echo", {})
        read, write = os.pipe()
        os.write(write, b"through")
        os.close(write)
        assert await session.send_fds("fd", {}, [read]) == "through"
        os.close(read)
    with trio.fail_after(60):
        await server.left.wait()
    assert server.gone == server.sessions


@pytest.mark.trio
async def test_bug_in_a_handler_does_not_end_the_daemon(served, capfd):
    _server, run = served
    async with open_session(run, {}, lambda *_: None) as session:
        with pytest.raises(Exception, match="a bug"):
            await session.call("crash")
        assert await session.call("echo", {"text": "alive"}) == "alive"
    assert "a bug" in capfd.readouterr().err


@pytest.mark.trio
async def test_pending_call_ends_when_the_daemon_dies(served):
    server, run = served
    async with open_session(run, {}, lambda *_: None) as session:
        assert await session.call("echo", {"text": "a"}) == "a"
        server.sessions[0].close()
        with pytest.raises(UnreachableError):
            await session.call("echo", {"text": "b"})


@pytest.mark.trio
async def test_blocking_client(served):
    _server, run = served
    call = control_client_io.call
    assert await trio.to_thread.run_sync(call, "echo", {"text": "hi"}, run) == "hi"
    with pytest.raises(BusyError):
        await trio.to_thread.run_sync(call, "busy", {}, run)

    def first_two():
        stream = control_client_io.follow("events", {}, run)
        return [next(stream).data, next(stream).data]

    assert await trio.to_thread.run_sync(first_two) == [0, 1]


def test_clusterd_starts_anew_between_connect_and_call(monkeypatch):
    ours, theirs = socket.socketpair()
    theirs.close()
    monkeypatch.setattr(control_client_io, "_connect", lambda *_arguments: ours)
    with pytest.raises(UnreachableError, match="broke"):
        control_client_io.call("cluster.status")


def test_unreachable(tmp_path):
    with pytest.raises(UnreachableError):
        control_client_io.call("echo", {}, tmp_path)
