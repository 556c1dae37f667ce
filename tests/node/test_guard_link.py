"""clusterd's end of the link to a guard that cannot start: real guards, every order of ends."""

import socket

import pytest
import trio

from cluster.errors import BusyError
from cluster.timing import timing_of
from node.guard_link_io import GuardLink
from node.guard_messages import Alive, Settings

UNREAD_MAX = 3


@pytest.fixture
def taken(tmp_path):
    """Settings of a guard whose port somebody else has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield Settings(1, 1, "ab" * 16, "cd" * 32, ["127.0.0.1"], sock.getsockname()[1],
                       str(tmp_path), timing_of("fast"))  # fmt: skip


@pytest.mark.parametrize("unread", range(UNREAD_MAX))
def test_the_reason_of_a_guard_that_ended_is_heard(taken, unread):
    """Also when it left packets of clusterd unread: the kernel then tells the broken connection
    before it gives out what the guard said last."""
    link = GuardLink(taken, lambda _message: None)
    for _ in range(unread):
        link.send(Alive())
    assert link.process.wait(60) == BusyError.exit_code
    with pytest.RaisesGroup(pytest.RaisesExc(BusyError, match="cannot listen on UDP")):
        trio.run(link.run)


def test_a_guard_that_says_nothing_has_died(taken):
    """Killed before it could speak."""
    link = GuardLink(taken, lambda _message: None)
    link.send(Alive())
    link.process.kill()
    link.process.wait(60)
    with pytest.RaisesGroup(pytest.RaisesExc(match="clusterguard has died")):
        trio.run(link.run)
