"""A gnbd-server as a voter of the register, over a trio control session and over UDP."""

from __future__ import annotations

import socket

import msgspec
import pytest
import trio

from cluster.errors import StackError
from cluster.ids import Epoch, Incarnation, NodeId
from cluster.messages import (
    Accept,
    Accepted,
    Ballot,
    Beat,
    Current,
    Echo,
    Heartbeat,
    Initialise,
    Install,
    Installed,
    Prepare,
    Promised,
    Query,
    Refused,
    Uninitialised,
    decode_message_untrusted,
    encode_message,
)
from cluster.state import NodeInfo, initial_state
from cluster.wire import Frame, seal, unseal_untrusted
from gnbd.control.client_io import open_control
from gnbd.control.session import Peer
from lab.block_server import INCARNATION, export_toml, member, running


@pytest.fixture
def server(tmp_path):
    with running(tmp_path, export_toml("disk0", tmp_path / "d.img", "cluster")) as server:
        yield server


def ask(server, *messages):
    """Send messages over one session; all the answers."""

    async def body():
        identity = server.identity
        peer = Peer(1, identity.cluster_id_bytes, INCARNATION)
        answers = []
        async with open_control(server.info, identity.keys, peer) as control:
            assert control.server_id == 129
            for message in messages:
                answers += await control.cluster_call(message)
        return answers

    return trio.run(body)


def state_of(server):
    node = NodeInfo(NodeId(1), "n1", ["127.0.0.1"])
    state = initial_state(server.identity.cluster_id, "demo", "fast", node)
    return msgspec.structs.replace(state, members=[member(1, (0,), 1)], epoch=Epoch(1))


def make_voter(server):
    (none,) = ask(server, Query(1))
    assert isinstance(none, Uninitialised)
    state = state_of(server)
    ballot = Ballot(1, 1, INCARNATION)
    promised, accepted = ask(
        server, Initialise(2, none.boot), Prepare(3, ballot, 0), Accept(4, ballot, 0, state)
    )
    assert isinstance(promised, Promised)
    assert isinstance(accepted, Accepted)
    return ballot, state


def test_uninitialised_counts_for_nothing(server):
    """Without a store the acceptor says so; only Initialise with this start's number makes one."""
    first, second = ask(server, Query(1), Prepare(2, Ballot(1, 1, 1), 0))
    assert isinstance(first, Uninitialised)
    assert isinstance(second, Uninitialised)
    assert ask(server, Initialise(3, first.boot + 1)) == []
    (still,) = ask(server, Query(4))
    assert isinstance(still, Uninitialised)


def test_accepted_value_survives_kill(server):
    """Promise and value are durable before they are answered."""
    ballot, state = make_voter(server)
    server.kill()
    server.start()
    assert ask(server, Query(7)) == [Current(7, ballot, state)]


def test_a_witness_votes_without_exports(tmp_path):
    """A server without exports keeps a value, a promise and a keep-list through kill -9."""
    with running(tmp_path, "") as witness:
        ballot, state = make_voter(witness)
        witness.install(5, member(1, (0,), 1))
        witness.kill()
        witness.start()
        assert ask(witness, Query(7)) == [Current(7, ballot, state)]
        (refused,) = ask(witness, Prepare(8, Ballot(0, 1, INCARNATION), 0))
        assert isinstance(refused, Refused)
        with pytest.raises(StackError, match="older"):
            witness.install(4, member(1, (0,), 1))


def test_install_as_a_cluster_message(server):
    """`Installed.epoch` equals the asked one only on success."""

    def install(epoch, members):
        message = Install(epoch, NodeId(1), INCARNATION, Epoch(epoch), members)
        (answer,) = ask(server, message)
        assert isinstance(answer, Installed)
        return answer

    assert install(2, [member(1, (1,), 2)]).epoch == 2
    other = install(2, [member(1, (), 2)])
    assert other.epoch == 1
    assert "another keep-list" in other.reason
    assert install(1, [member(1, (1,), 2)]).epoch == 2


def test_echoes(tmp_path):
    """Only a voter echoes; it vouches for the admitted instances of the accepted value."""
    with running(tmp_path, "") as server:
        server.kill()
        port = server.port  # of UDP
        server.exports = f"heartbeat_port = {port}\n"
        server.start()
        identity = server.identity
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.3)
            count = 0

            def beat(incarnation=INCARNATION, config_epoch=1):
                nonlocal count
                count += 1
                heartbeat = Heartbeat(
                    NodeId(1), Incarnation(incarnation), count, Epoch(1), 1, config_epoch,
                    [Beat(0, 0), Beat(1, 0)], [], 0, 0, 0,
                )  # fmt: skip
                frame = Frame(
                    1, identity.cluster_id_bytes, Incarnation(incarnation), Epoch(1), 0, count,
                    encode_message(heartbeat),
                )  # fmt: skip
                sock.sendto(seal(identity.keys, frame), ("127.0.0.1", port))
                try:
                    data = sock.recv(65536)
                except TimeoutError:
                    return None
                opened = unseal_untrusted(identity.keys, identity.cluster_id_bytes, data)
                assert opened.sender == 129
                echo = decode_message_untrusted(opened.payload)
                assert isinstance(echo, Echo)
                assert echo.sequence == count
                return echo

            assert beat() is None
            make_voter(server)
            sock.settimeout(60)
            echo = beat()
            assert echo is not None
            assert echo.vouched == [0, 1]
            behind = beat(config_epoch=0)
            assert behind is not None
            assert behind.vouched == []
            sock.sendto(b"noise", ("127.0.0.1", port))
            barred = beat(INCARNATION - 1)
            assert barred is not None
            assert barred.vouched == []


def test_what_could_not_be_stored_is_not_answered_later(server):
    """A promise whose store failed is in memory only: the repeated request must not be answered
    before it is on disk, or a restart forgets a promise that counted."""
    ballot, _ = make_voter(server)
    blocker = server.state_dir / "acceptor.new"
    blocker.mkdir()
    higher = Ballot(9, 1, INCARNATION)
    for number in (10, 11):
        with pytest.raises(StackError):
            ask(server, Prepare(number, higher, 1))
    blocker.rmdir()
    (promised,) = ask(server, Prepare(12, higher, 1))
    assert isinstance(promised, Promised)
    server.kill()
    server.start()
    (refused,) = ask(server, Prepare(13, ballot, 1))
    assert isinstance(refused, Refused)
    assert refused.promised == higher
