"""The control mesh: messages, calls that run once, a network that goes, a new life."""

import random

import pytest
import trio

from cluster.errors import BusyError, UnreachableError, UsageError
from cluster.identity import Identity
from cluster.ids import Incarnation, NodeId
from cluster.timing import timing_of
from cluster.transport_io import Transport
from cluster.wire import Keys

CLUSTER = b"c" * 16
KEY = Keys(1, {1: b"k" * 32})
PORT = 7400


class Pair:
    def __init__(self):
        choose = random.SystemRandom()  # 127.40 and more belong to tests/node/harness.py
        part = f"127.{choose.randrange(20, 40)}.{choose.randrange(256)}"
        self.hosts = {NodeId(n): [f"{part}.{n}{net}" for net in (1, 2)] for n in (1, 2)}
        self.heard = {1: [], 2: []}
        self.nodes = {}

    def make(self, number, incarnation=1, key=KEY):
        def on_message(source, life, body):
            self.heard[number].append((source, life, body))

        identity = Identity(number, CLUSTER, Incarnation(incarnation), key)
        node = Transport(identity, self.hosts[NodeId(number)], PORT, timing_of("fast"), on_message)
        node.set_peers(self.hosts)
        self.nodes[number] = node
        return node


async def until(condition, what):
    with trio.fail_after(60):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert condition(), what


@pytest.fixture
async def pair(nursery):
    made = Pair()
    for number in (1, 2):
        await nursery.start(made.make(number).run)
    await until(lambda: made.nodes[1].connected(NodeId(2)) == [0, 1], "both networks")
    return made


@pytest.mark.trio
async def test_messages_and_calls(pair):
    runs = []

    async def add(source, params):
        runs.append(source)
        await trio.sleep(0.4)  # longer than the time after which a request is sent again
        return params["a"] + params["b"]

    async def busy(_source, _params):
        raise BusyError("held", hint="wait")

    pair.nodes[2].methods.update(add=add, busy=busy)
    assert pair.nodes[1].send(NodeId(2), b"hello")
    await until(lambda: pair.heard[2] == [(1, 1, b"hello")], "the message")
    assert await pair.nodes[1].call(NodeId(2), "add", {"a": 1, "b": 2}) == 3
    assert runs == [1]
    with pytest.raises(BusyError) as caught:
        await pair.nodes[1].call(NodeId(2), "busy", {})
    assert caught.value.hint == "wait"
    with pytest.raises(UsageError):
        await pair.nodes[1].call(NodeId(2), "nothing", {})


@pytest.mark.trio
async def test_a_call_survives_the_loss_of_its_connection(pair):
    runs = []

    async def slow(_source, _params):
        runs.append(1)
        for channel in list(pair.nodes[2]._channels.values()):
            channel.close()
        await trio.sleep(0.1)
        return "done"

    pair.nodes[2].methods["slow"] = slow
    assert await pair.nodes[1].call(NodeId(2), "slow", {}) == "done"
    assert runs == [1]


@pytest.mark.trio
async def test_unreachable_and_strangers(nursery):
    pair = Pair()
    await nursery.start(pair.make(1).run)
    with pytest.raises(UnreachableError):
        await pair.nodes[1].call(NodeId(2), "x", {}, timeout_s=0.2)
    stranger = pair.make(2, key=Keys(1, {1: b"x" * 32}))
    await nursery.start(stranger.run)
    await trio.sleep(0.3)
    assert stranger.nodes() == pair.nodes[1].nodes() == []
