"""The client's transmission in C: whatever the peer sends and however it is cut."""

from __future__ import annotations

import random
import socket
import struct
from array import array

import pytest

from native import crc32c_blocks
from native.link import (
    BLOCK_BYTES,
    COMPARES,
    MISMATCH,
    NO_DATA,
    RECEIVES,
    REQUESTS_MAX,
    SENDS,
    TRAILER,
    Buffer,
    Link,
    OutOfStepError,
)  # fmt: skip

READ, WRITE, FLUSH, COMPARE = 0, 1, 3, 0x4307
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REPLY_MAGIC = 0x67446698
LONG = 8 << 20
"""More than a socket takes at once."""


class Wire:
    """A socket, one link after the other at this end of it, and the peer at the other."""

    def __init__(self, ours: socket.socket, theirs: socket.socket) -> None:
        self.ours, self.theirs = ours, theirs

    def link(self) -> Link:
        return Link(self.ours.fileno())

    def arrived(self) -> bytes:
        """What has been sent and not been looked at."""
        found = b""
        try:
            while True:
                found += self.theirs.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found

    def sent(self, link: Link) -> bytes:
        """All that the link has to send."""
        found = b""
        while link.send():
            found += self.arrived()
        return found + self.arrived()

    def answer(self, link: Link, data: Buffer) -> list[tuple[int, int]]:
        """What is done when the peer has sent so much more."""
        self.theirs.sendall(data)
        return list(link.receive())


@pytest.fixture
def wire():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Wire(ours, theirs)


def cookies_of(sent: bytes, lengths: list[int]) -> list[int]:
    """Of requests with so much behind their headers."""
    found, at = [], 0
    for length in lengths:
        magic, _flags, _kind, cookie, _offset, _length = REQUEST.unpack_from(sent, at)
        assert magic == 0x25609513
        found.append(cookie)
        at += REQUEST.size + length
    assert at == len(sent)
    return found


def reply(cookie: int, data: bytes = b"", error: int = 0) -> bytes:
    return REPLY.pack(REPLY_MAGIC, error, cookie) + data


def big_endian(sums: array[int]) -> bytes:
    return struct.pack(f">{len(sums)}I", *sums)


def one_read(wire: Wire, link: Link, length: int, tag: int = 1) -> tuple[bytearray, int]:
    """A READ that is under way: its memory, its cookie."""
    memory = bytearray(length)
    link.post(tag, READ, 0, 0, length, RECEIVES, memory)
    return memory, cookies_of(wire.sent(link), [0])[0]


def test_requests_as_they_are_sent(wire):
    """Headers, data and trailers in the order of posting; zero-copy memory of every kind."""
    link = wire.link()
    data, sums = random.Random(1).randbytes(3 * BLOCK_BYTES + 5), array("I", bytes(16))
    link.post(7, WRITE, 1, 4096, 5, SENDS, b"hello")
    link.post(8, FLUSH, 0, 0, 0, NO_DATA)
    link.post(9, WRITE, 0, 0, len(data), SENDS | TRAILER, memoryview(data), sums)
    link.post(10, READ, 0, 1 << 40, 512, RECEIVES, bytearray(512))
    sent = wire.sent(link)
    lengths = [5, 0, len(data) + 16, 0]
    assert len(set(cookies_of(sent, lengths))) == 4
    assert REQUEST.unpack_from(sent)[1:3] == (1, WRITE)
    assert REQUEST.unpack_from(sent)[4:] == (4096, 5)
    assert sent[28:33] == b"hello"
    assert sent[33 + 56 :].startswith(data + big_endian(crc32c_blocks(data, BLOCK_BYTES)))
    assert REQUEST.unpack(sent[-28:])[4:] == (1 << 40, 512)


def build_session(wire: Wire, link: Link) -> tuple[bytes, dict[int, tuple[bytearray, bytes, int]]]:
    """One reply of each sort; by tag the memory, what must be in it, and the error."""
    chance = random.Random(3)
    contents = [chance.randbytes(n) for n in (1, 512, 5000, 0)]
    memories = [bytearray(len(c)) for c in contents]
    sums = array("I", bytes(8))
    trailed, trailed_memory = chance.randbytes(4100), bytearray(4100)
    for tag, memory in enumerate(memories):
        link.post(tag, READ, 0, 0, len(memory), RECEIVES, memory)
    link.post(4, WRITE, 0, 0, 3, SENDS, b"abc")
    link.post(5, READ, 0, 0, 512, RECEIVES, bytearray(512))
    link.post(6, READ, 0, 0, 4100, RECEIVES | TRAILER, trailed_memory, sums)
    for tag in (7, 8):
        link.post(tag, COMPARE, 0, 0, 4, SENDS | COMPARES, b"oldn")
    cookies = cookies_of(wire.sent(link), [0, 0, 0, 0, 3, 0, 0, 4, 4])
    stream = reply(cookies[2], contents[2]) + reply(cookies[4]) + reply(cookies[5], error=5)
    stream += reply(cookies[0], contents[0]) + reply(cookies[3])
    trailer = big_endian(crc32c_blocks(trailed, BLOCK_BYTES))
    stream += reply(cookies[7], bytes(8), error=MISMATCH) + reply(cookies[8])
    stream += reply(cookies[6], trailed + trailer) + reply(cookies[1], contents[1])
    expected = {tag: (memories[tag], contents[tag], 0) for tag in range(4)}
    expected[4] = (bytearray(), b"", 0)
    expected[5] = (bytearray(), b"", 5)
    expected[6] = (trailed_memory, trailed, 0)
    expected[7] = (bytearray(), b"", MISMATCH)
    expected[8] = (bytearray(), b"", 0)
    return stream, expected


def test_replies_cut_at_every_byte(wire):
    """In two parts, cut anywhere; and byte by byte."""
    length = len(build_session(wire, wire.link())[0])
    for cut in range(length + 1):
        link = wire.link()
        stream, expected = build_session(wire, link)
        done = [*wire.answer(link, stream[:cut]), *wire.answer(link, stream[cut:])]
        assert sorted(done) == [(tag, expected[tag][2]) for tag in range(9)]
        assert all(memory == content for memory, content, _ in expected.values())
    link = wire.link()
    stream, expected = build_session(wire, link)
    done = [pair for at in range(length) for pair in wire.answer(link, stream[at : at + 1])]
    assert [tag for tag, _ in done] == [2, 4, 5, 0, 3, 7, 8, 6, 1]
    assert all(memory == content for memory, content, _ in expected.values())


@pytest.mark.parametrize("how", ["magic", "cookie", "again", "not sent yet", "only half sent"])
def test_out_of_step(wire, how):
    """A reply that nobody waits for: what was done before is told first, then the error, again and
    again; nothing is written anywhere."""
    link = wire.link()
    memory, cookie = one_read(wire, link, 512)
    other, second = one_read(wire, link, 512, tag=2)
    wrong = reply(second, b"x" * 512)
    if how == "magic":
        wrong = b"X" + wrong[1:]
    elif how == "cookie":
        wrong = reply(second + (1 << 20), b"x" * 512)
    elif how == "again":
        wrong = reply(cookie, b"x" * 512)
    else:
        link.post(3, WRITE, 0, 0, LONG, SENDS, bytes(LONG))
        third = second + REQUESTS_MAX + 1
        if how == "only half sent":
            assert link.send()
            assert REQUEST.unpack_from(wire.arrived())[3] == third
        wrong = reply(third)
    assert wire.answer(link, reply(cookie, b"a" * 512) + wrong) == [(1, 0)]
    for _ in range(2):
        with pytest.raises(OutOfStepError):
            wire.answer(link, b"more")
    assert memory == b"a" * 512
    assert other == bytes(512)


def test_memory_is_given_back(wire):
    """`move`: the rest goes elsewhere; after the reply and after `close` nothing is pinned."""
    link = wire.link()
    memory, cookie = one_read(wire, link, 1000)
    with pytest.raises(BufferError):
        memory.clear()
    stream = reply(cookie, b"r" * 1000)
    assert not wire.answer(link, stream[:500])
    elsewhere = bytearray(1000)
    assert link.move(0, 1, elsewhere, 1000)
    assert memory == b"r" * 484 + bytes(516)
    memory.clear()
    assert wire.answer(link, stream[500:]) == [(1, 0)]
    assert elsewhere == b"r" * 1000
    assert not link.move(0, 1, bytearray(1000), 1000)
    elsewhere.clear()
    last, cookie = one_read(wire, link, 1000, tag=5)
    assert not wire.answer(link, reply(cookie, b"z" * 300))
    link.close()
    last.clear()
    assert not link.move(0, 5, bytearray(1000), 1000)
    for call in (link.send, link.receive, lambda: link.post(6, FLUSH, 0, 0, 0)):
        with pytest.raises(ConnectionError):
            call()
    link.close()


def test_data_that_is_moved_while_it_is_sent(wire):
    """What has not left yet is taken from the new place."""
    link = wire.link()
    data = bytearray(b"d" * LONG)
    place = link.post(1, WRITE, 0, 0, LONG, SENDS, data)
    assert link.send()
    assert link.move(place, 1, bytes(data), LONG)
    data[:] = b"!" * LONG
    first = wire.arrived()
    assert REQUEST.size < len(first) < LONG
    assert first[REQUEST.size :] + wire.sent(link) == b"d" * LONG


def test_checksums_of_what_is_read_and_written(wire):
    """Of the blocks of a request, with and without a trailer; a trailer that does not fit."""
    data = random.Random(5).randbytes(2 * BLOCK_BYTES + 100)
    right = crc32c_blocks(data, BLOCK_BYTES)
    for cut in (0, 16, 20, 4000, 4112, 5000, len(data)):
        link, sums, memory = wire.link(), array("I", bytes(12)), bytearray(len(data))
        link.post(1, READ, 0, 0, len(data), RECEIVES, memory, sums)
        stream = reply(cookies_of(wire.sent(link), [0])[0], data)
        assert not wire.answer(link, stream[:cut])
        assert wire.answer(link, stream[cut:]) == [(1, 0)]
        assert sums == right
    for ways in (SENDS, SENDS | TRAILER):
        link, sums = wire.link(), array("I", bytes(12))
        link.post(1, WRITE, 0, 0, len(data), ways, data, sums)
        behind = len(data) + (12 if ways & TRAILER else 0)
        cookie = cookies_of(wire.sent(link), [behind])[0]
        assert wire.answer(link, reply(cookie)) == [(1, 0)]
        assert sums == right
    for spoiled in (0, BLOCK_BYTES, len(data), len(data) + 8):
        link, sums, memory = wire.link(), array("I", bytes(12)), bytearray(len(data))
        link.post(1, READ, 0, 0, len(data), RECEIVES | TRAILER, memory, sums)
        stream = bytearray(data + big_endian(right))
        stream[spoiled] ^= 1
        cookie = cookies_of(wire.sent(link), [0])[0]
        assert wire.answer(link, reply(cookie, bytes(stream))) == [(1, MISMATCH)]


def test_a_full_table(wire):
    """As many requests as fit; one more is refused and changes nothing."""
    link = wire.link()
    for tag in range(REQUESTS_MAX):
        link.post(tag, FLUSH, 0, 0, 0)
    with pytest.raises(BlockingIOError):
        link.post(REQUESTS_MAX, FLUSH, 0, 0, 0)
    cookies = cookies_of(wire.sent(link), [0] * REQUESTS_MAX)
    assert len(set(cookies)) == REQUESTS_MAX
    done = wire.answer(link, b"".join(map(reply, reversed(cookies))))
    assert [tag for tag, _ in done] == list(reversed(range(REQUESTS_MAX)))
    link.post(0, FLUSH, 0, 0, 0)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    with ours, theirs:
        yield ours, theirs


def test_the_longest_requests_through_a_tiny_socket(pair):
    """64 MiB there and back, a little at a time, with a small request on either side."""
    ours, theirs = pair
    length = 64 << 20
    data = random.Random(9).randbytes(1 << 20) * 64
    link, memory, small = Link(ours.fileno()), bytearray(length), bytearray(512)
    link.post(1, WRITE, 0, 0, length, SENDS, data)
    link.post(2, READ, 0, 0, length, RECEIVES, memory)
    link.post(3, READ, 0, 0, 512, RECEIVES, small)
    sent = bytearray()
    room = bytearray(1 << 20)
    while link.send():
        sent += room[: theirs.recv_into(room)]
    while len(sent) < length + 3 * REQUEST.size:
        sent += room[: theirs.recv_into(room)]
    assert sent[REQUEST.size : REQUEST.size + length] == data
    write, read, third = cookies_of(bytes(sent), [length, 0, 0])
    stream = memoryview(reply(write) + reply(read, data) + reply(third, b"s" * 512))
    done = []
    while stream:
        stream = stream[theirs.send(stream) :]
        done += link.receive()
    while len(done) < 3:
        done += link.receive()
    assert done == [(1, 0), (2, 0), (3, 0)]
    assert memory == data
    assert small == b"s" * 512
    counters = link.counters()
    assert counters.pop("service_ns") > 0
    assert counters == {
        "replies": 3, "failures": 0, "read_bytes": length + 512, "written_bytes": length,
    }  # fmt: skip


@pytest.mark.parametrize("at", [0, 10, 16, 700, 1016])
def test_the_peer_hangs_up(pair, at):
    """In the middle of a reply or behind one: what is done is told, then the end."""
    ours, theirs = pair
    link = Link(ours.fileno())
    memory = bytearray(1000)
    link.post(1, READ, 0, 0, 1000, RECEIVES, memory)
    link.send()
    cookie = REQUEST.unpack(theirs.recv(100))[3]
    theirs.send(reply(cookie, b"m" * 1000)[:at])
    theirs.close()
    if at == 1016:
        assert list(link.receive()) == [(1, 0)]
    with pytest.raises(ConnectionError):
        link.receive()
    link.post(2, FLUSH, 0, 0, 0)
    with pytest.raises(ConnectionError):
        link.send()


def test_replies_in_any_order_and_any_pieces(pair):
    """Many requests of all sizes, answered as it pleases the peer, in pieces of any length: each
    byte comes to its place."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    ours, theirs = pair
    link = Link(ours.fileno())
    waiting: dict[int, tuple[bytearray, bytes]] = {}
    owed: list[int] = []
    answers: dict[int, int] = {}
    tag, received, stream, done = 0, bytearray(), b"", 0
    while done < 400:
        while len(waiting) < 20 and tag < 400:
            length = chance.choice([0, 1, 100, 4096, 70_000, 300_000])
            memory, content = bytearray(length), chance.randbytes(length)
            link.post(tag, READ, 0, tag, length, RECEIVES, memory)
            waiting[tag] = (memory, content)
            tag += 1
        link.send()
        try:
            received += theirs.recv(chance.randrange(1, 5000))
        except BlockingIOError:
            pass
        while len(received) >= REQUEST.size:
            cookie, number = REQUEST.unpack_from(received)[3:5]
            del received[: REQUEST.size]
            owed.append(cookie)
            assert number in waiting
            answers[cookie] = number
        if not stream and owed:
            chosen = owed.pop(chance.randrange(len(owed)))
            stream = reply(chosen, waiting[answers[chosen]][1])
        if stream:
            try:
                stream = stream[theirs.send(stream[: chance.choice([1, 15, 16, 17, 9000])]) :]
            except BlockingIOError:
                pass
        for got, error in link.receive():
            memory, content = waiting.pop(got)
            assert not error
            assert memory == content
            done += 1
