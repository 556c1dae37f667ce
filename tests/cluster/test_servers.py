"""What a node knows of the block servers."""

import msgspec

from cluster.control import MemberInfo, ServerInfo
from cluster.ids import Epoch, Incarnation, InstanceNo, NodeId, ServerId
from cluster.messages import Install, Installed
from cluster.servers import Servers
from cluster.state import NodeInfo, initial_state
from cluster.timing import MS, timing_of

TIMING = timing_of("fast")
STATE = msgspec.structs.replace(
    initial_state("c" * 32, "demo", "fast", NodeInfo(NodeId(1), "n1", ["127.0.0.1"])),
    servers=[ServerInfo(ServerId(129), "s1", ["127.0.0.1"], 1)],
    epoch=Epoch(4),
    members=[MemberInfo(NodeId(1), Incarnation(7), [InstanceNo(0)], InstanceNo(1), "n1")],
)


def installs(servers: Servers, now: int) -> list[int]:
    found = [action.message for action in servers.due(now, STATE)]
    return [message.request for message in found if isinstance(message, Install)]


def test_a_slow_server_is_believed_some_time():
    """Each answer comes later than the next attempt: the install counts all the same."""
    servers = Servers(NodeId(1), Incarnation(7), TIMING)
    servers.configure(0, STATE)
    asked: list[int] = []
    for tick in range(40):
        now = tick * 100 * MS
        asked += installs(servers, now)
        if len(asked) >= 3:
            servers.answered(now, 129, Installed(asked[-3], Epoch(4)), Epoch(4))
    assert servers.installed(Epoch(4)) == [129]
    assert servers.settled(now, Epoch(4))


def test_an_answer_for_an_older_epoch_does_not_count():
    servers = Servers(NodeId(1), Incarnation(7), TIMING)
    servers.configure(0, STATE)
    (request,) = installs(servers, 0)
    servers.answered(1, 129, Installed(request, Epoch(3)), Epoch(4))
    assert servers.installed(Epoch(4)) == []
    assert not servers.settled(1, Epoch(4))
    servers.answered(1, 129, Installed(request, Epoch(3), "refused"), Epoch(4))
    assert servers.installed(Epoch(4)) == []
