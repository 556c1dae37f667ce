"""The letter of the NBD protocol where clients rarely go."""

from __future__ import annotations

import os
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnbd import protocol as p
from gnbd.server.backends_io import FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FileBackend, fallocate
from gnbd.server.handshake import Close, Denied, Enter, Handshake, Offer, Private, Send
from lab.block_server import export_toml, running
from tests.gnbd.raw import RawClient

SIZE = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("conformance")
    exports = export_toml("disk", directory / "disk.img", size="1M")
    (directory / "ro.img").write_bytes(bytes(range(256)) * 4096)
    exports += f'[[exports]]\nname = "ro"\npath = "{directory}/ro.img"\nread_only = true\n'
    with running(directory, exports, joined=False) as server:
        yield server


def test_unknown_client_flags_drop_the_connection(server):
    """A client flag that the server does not know: hang up."""
    with RawClient(server, flags=3 | 4) as client, pytest.raises((EOFError, ConnectionError)):
        client.option(p.OPT_LIST)


@pytest.mark.parametrize("option", [p.OPT_STARTTLS, 12, 0x12345678])
def test_unknown_options_are_refused_and_haggling_goes_on(server, option):
    """ERR_UNSUP with a text, and the next option works."""
    with RawClient(server) as client:
        replies = client.option(option, b"whatever")
        assert replies[0][0] == p.REP_ERR_UNSUP
        assert client.option(p.OPT_LIST)[-1][0] == p.REP_ACK


def test_private_options_without_a_cluster(server):
    """LOGIN at a server that is in no cluster is refused with a text."""
    with RawClient(server) as client:
        assert client.option(p.OPT_LOGIN, b"x")[0][0] == p.REP_ERR_POLICY


def test_malformed_options(server):
    """LIST with data, GO with nonsense: ERR_INVALID; too long a name: ERR_TOO_BIG."""
    with RawClient(server) as client:
        assert client.option(p.OPT_LIST, b"x")[0][0] == p.REP_ERR_INVALID
        assert client.option(p.OPT_GO, b"abc")[0][0] == p.REP_ERR_INVALID
        assert client.option(p.OPT_GO, struct.pack(">I", 99) + b"abcd")[0][0] == p.REP_ERR_INVALID
        assert client.option(p.OPT_INFO, p.go_data("x" * 5000))[0][0] == p.REP_ERR_TOO_BIG
        assert client.option(p.OPT_INFO, p.go_data("nope"))[0][0] == p.REP_ERR_UNKNOWN
        assert client.option(p.OPT_ABORT)[-1][0] == p.REP_ACK


def test_info_and_go_say_the_same(server):
    """INFO then GO with the same parameters give the same data."""
    with RawClient(server) as client:
        assert client.option(p.OPT_INFO, p.go_data("disk")) == client.option(
            p.OPT_GO, p.go_data("disk")
        )


@pytest.mark.parametrize("flags", [1, 3])
def test_export_name(server, flags):
    """The old way in: size and flags, 124 zeroes unless NO_ZEROES."""
    with RawClient(server, flags=flags) as client:
        client.sock.sendall(p.option(p.OPT_EXPORT_NAME, b"disk"))
        size, export_flags = struct.unpack(">QH", client.take(10))
        assert size == SIZE
        assert export_flags & p.FLAG_HAS_FLAGS
        if flags == 1:
            assert client.take(124) == bytes(124)
        assert client.request(p.CMD_WRITE, 0, b"y" * 512) == 0
        assert client.read(0, 512) == b"y" * 512


def test_errors_of_the_transmission(server):
    """Past the end, unknown flags, unknown and private commands; the connection goes on."""
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_READ, SIZE - 1, length=2) == p.EINVAL
        assert client.request(p.CMD_READ, 1 << 63, length=2) == p.EINVAL
        assert client.request(p.CMD_WRITE, SIZE - 1, b"ab") == p.ENOSPC
        assert client.request(p.CMD_WRITE_ZEROES, SIZE - 1, length=2) == p.ENOSPC
        assert client.request(p.CMD_TRIM, SIZE - 1, length=2) == p.EINVAL
        assert client.request(p.CMD_WRITE, 0, b"ab", flags=1 << 9) == p.EINVAL
        assert client.request(p.CMD_READ, 0, length=2, flags=1 << 9) == p.EINVAL
        assert client.request(p.CMD_READ, 0, length=(64 << 20) + 1) == p.EINVAL
        for command in (
            p.CMD_BLOCK_STATUS,
            99,
            p.CMD_DRAIN,
            p.CMD_SEQUENCE,
            p.CMD_PING,
            p.CMD_LOGOUT,
            p.CMD_COMPARE_AND_WRITE,
        ):
            assert client.request(command) == p.EINVAL
        assert client.request(p.CMD_FLUSH, flags=p.CMD_FLAG_FUA) == 0
        assert client.request(p.CMD_READ, 0, length=0) == 0
        assert client.request(p.CMD_WRITE, 0, b"z", flags=p.CMD_FLAG_FUA) == 0
        assert client.read(0, 1) == b"z"


def test_read_only(server):
    """Changes are EPERM, reads and flushes work."""
    with RawClient(server, "ro") as client:
        assert client.request(p.CMD_WRITE, 0, b"ab") == p.EPERM
        assert client.request(p.CMD_TRIM, 0, length=512) == p.EPERM
        assert client.request(p.CMD_WRITE_ZEROES, 0, length=512) == p.EPERM
        assert client.request(p.CMD_FLUSH) == 0
        assert client.read(256, 256) == bytes(range(256))


def test_pipelined_requests_split_anywhere(server):
    """A stream of requests cut into odd pieces gives every reply, in order."""
    with RawClient(server, "disk") as client:
        stream = b""
        for index in range(50):
            data = bytes([index]) * (100 + 37 * index)
            stream += p.REQUEST.pack(p.REQUEST_MAGIC, 0, 1, index, index * 4096, len(data)) + data
        for start in range(0, len(stream), 1013):
            client.sock.sendall(stream[start : start + 1013])
        assert [client.reply() for _ in range(50)] == [(i, 0) for i in range(50)]
        for index in range(50):
            assert client.read(index * 4096, 100) == bytes([index]) * 100


def test_bad_magic_ends_the_connection(server):
    """Out of step: hang up instead of guessing."""
    with RawClient(server, "disk") as client:
        client.sock.sendall(bytes(28))
        with pytest.raises((EOFError, ConnectionError)):
            client.reply()


class One:
    """A directory with one export."""

    def names(self):
        return [("disk", "")]

    def find(self, name):
        return Offer("disk", SIZE, 1) if name == "disk" else Denied(p.REP_ERR_UNKNOWN, "no")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(1, 40), max_size=20))
def test_handshake_takes_any_bytes_in_any_pieces(noise, cuts):
    """No input makes it fail; pieces do not matter."""
    stream = struct.pack(">I", 3) + p.option(p.OPT_LIST) + noise

    def outcome(pieces):
        handshake = Handshake(One())
        seen = []
        for piece in pieces:
            handshake.feed(piece)
            while (action := handshake.next()) is not None:
                assert isinstance(action, Send | Private | Enter | Close)
                if isinstance(action, Enter):
                    return seen
                seen.append(action)
        return seen

    pieces, at = [], 0
    for cut in cuts:
        pieces.append(stream[at : at + cut])
        at += cut
    assert outcome([*pieces, stream[at:]]) == outcome([stream])


def chunks(client, cookie):
    """The chunks of one structured reply: (flags, type, payload)."""
    found = []
    while True:
        magic, flags, kind, got, length = p.CHUNK.unpack(client.take(p.CHUNK.size))
        assert (magic, got) == (p.CHUNK_MAGIC, cookie)
        found.append((flags, kind, client.take(length)))
        if flags & p.CHUNK_DONE:
            return found


def structured(server, *contexts):
    """A client that has agreed on structured replies and on these contexts of `disk`."""
    client = RawClient(server)
    assert client.option(p.OPT_STRUCTURED_REPLY) == [(p.REP_ACK, b"")]
    if contexts:
        queries = b"".join(struct.pack(">I", len(c)) + c for c in contexts)
        data = struct.pack(">I4sI", 4, b"disk", len(contexts)) + queries
        assert client.option(p.OPT_SET_META_CONTEXT, data)[-1][0] == p.REP_ACK
    client.go("disk")
    return client


def test_structured_reads_tell_holes(server):
    """OFFSET_DATA and OFFSET_HOLE cover the range once; DF gives one piece; other commands go on
    with simple replies; an error is a chunk."""
    with structured(server) as client:
        assert client.request(p.CMD_TRIM, 0, length=1 << 20) == 0
        assert client.request(p.CMD_WRITE, 65536, b"x" * 8192) == 0
        found = chunks(client, client.send(p.CMD_READ, 0, length=1 << 20))
        content = bytearray(b"?" * (1 << 20))
        for _, kind, payload in found:
            at = struct.unpack_from(">Q", payload)[0]
            if kind == 1:
                content[at : at + len(payload) - 8] = payload[8:]
            else:
                assert kind == 2
                length = struct.unpack_from(">I", payload, 8)[0]
                content[at : at + length] = bytes(length)
        assert content == bytes(65536) + b"x" * 8192 + bytes((1 << 20) - 73728)
        assert len(found) == 3
        whole = chunks(client, client.send(p.CMD_READ, 0, length=1 << 20, flags=p.CMD_FLAG_DF))
        assert whole == [(p.CHUNK_DONE, 1, bytes(8) + content)]
        assert client.request(p.CMD_READ, SIZE, length=1) == p.EINVAL
        assert client.why == "beyond the end of the export"
        assert client.request(p.CMD_FLUSH) == 0


def test_a_read_of_many_holes_is_whole(server):
    """More runs than one reply tells apart: the rest comes as data, nothing is lost."""
    with structured(server) as client:
        assert client.request(p.CMD_TRIM, 0, length=SIZE) == 0
        expected = bytearray(SIZE)
        for index in range(0, 256, 2):
            at = index * 4096
            block = struct.pack("<I", index) * 1024
            expected[at : at + 4096] = block
            assert client.request(p.CMD_WRITE, at, block) == 0
        cookies = [client.send(p.CMD_READ, 0, length=SIZE) for _ in range(9)]
        for cookie in cookies:
            content = bytearray(SIZE)
            covered = 0
            for _, kind, payload in chunks(client, cookie):
                at = struct.unpack_from(">Q", payload)[0]
                if kind == 1:
                    content[at : at + len(payload) - 8] = payload[8:]
                covered += len(payload) - 8 if kind == 1 else struct.unpack(">QI", payload)[1]
            assert (content, covered) == (expected, SIZE)


def test_contexts_need_structured_replies_and_know_their_names(server):
    """LIST tells what there is, SET takes what it knows."""
    with RawClient(server) as client:
        data = struct.pack(">I4sI", 4, b"disk", 0)
        assert client.option(p.OPT_LIST_META_CONTEXT, data)[0][0] == p.REP_ERR_INVALID
        client.option(p.OPT_STRUCTURED_REPLY)
        listed = client.option(p.OPT_LIST_META_CONTEXT, data)
        assert [text[4:] for kind, text in listed if kind == p.REP_META_CONTEXT] == [
            b"base:allocation", b"x-cfs:reservation",
        ]  # fmt: skip
        for bad in (b"", b"\0\0\0\4disk", data + b"\0", struct.pack(">I4sI", 4, b"disk", 1)):
            assert client.option(p.OPT_SET_META_CONTEXT, bad)[0][0] == p.REP_ERR_INVALID
        unknown = struct.pack(">I4sII3s", 4, b"disk", 1, 3, b"a:b")
        assert client.option(p.OPT_SET_META_CONTEXT, unknown) == [(p.REP_ACK, b"")]
        nothing = struct.pack(">I4sI", 4, b"none", 0)
        assert client.option(p.OPT_SET_META_CONTEXT, nothing)[0][0] == p.REP_ERR_UNKNOWN


def test_block_status(server):
    """Each agreed context once, REQ_ONE one extent; without a context it is EINVAL."""
    with structured(server, b"base:allocation", b"x-cfs:reservation") as client:
        assert client.request(p.CMD_TRIM, 0, length=1 << 20) == 0
        assert client.request(p.CMD_WRITE, 65536, b"x" * 4096) == 0
        first, second = chunks(client, client.send(p.CMD_BLOCK_STATUS, 0, length=1 << 20))
        assert first[2] == struct.pack(">I6I", 1, 65536, 3, 4096, 0, (1 << 20) - 69632, 3)
        assert second[2] == struct.pack(">I2I", 2, 1 << 20, p.STATE_WRITABLE)
        one = client.send(p.CMD_BLOCK_STATUS, 0, length=1 << 20, flags=p.CMD_FLAG_REQ_ONE)
        assert chunks(client, one)[0][2] == struct.pack(">I2I", 1, 65536, 3)
        assert client.request(p.CMD_BLOCK_STATUS, 0, length=0) == p.EINVAL
    with structured(server) as client:
        assert client.request(p.CMD_BLOCK_STATUS, 0, length=4096) == p.EINVAL


def test_cache_and_fast_zero(server):
    """Hints are taken; zeroes that cost nothing are."""
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 0, b"x" * 8192) == 0
        assert client.request(p.CMD_CACHE, 0, length=8192) == 0
        assert client.request(p.CMD_CACHE, SIZE, length=1) == p.EINVAL
        assert client.request(p.CMD_WRITE_ZEROES, 0, length=4096, flags=p.CMD_FLAG_FAST_ZERO) == 0
        assert client.read(0, 8192) == bytes(4096) + b"x" * 4096


def test_errors_say_why(server):
    """Who has agreed on structured replies is told in words, by C and by Python."""
    with structured(server) as client:
        for command, offset, length, flags, number, why in (
            (p.CMD_READ, 0, 1, 1 << 9, p.EINVAL, "unknown flags"),
            (p.CMD_READ, 0, (64 << 20) + 1, 0, p.EINVAL, "longer than 64 MiB"),
            (p.CMD_WRITE, SIZE, 2, 0, p.ENOSPC, "beyond the end of the export"),
            (p.CMD_WRITE_ZEROES, SIZE, 2, 0, p.ENOSPC, "beyond the end of the export"),
            (p.CMD_FLUSH, 0, 0, 1 << 9, p.EINVAL, "unknown flags"),
            (p.CMD_BLOCK_STATUS, 0, 512, 0, p.EINVAL, "no metadata context was agreed on"),
            (99, 0, 0, 0, p.EINVAL, "unknown command"),
        ):
            data = b"ab" if command == p.CMD_WRITE else b""
            assert client.request(command, offset, data, length, flags) == number
            assert client.why == why
    with RawClient(server) as client:
        client.option(p.OPT_STRUCTURED_REPLY)
        client.go("ro")
        for command in (p.CMD_WRITE, p.CMD_TRIM):
            data = b"x" * 512 if command == p.CMD_WRITE else b""
            assert client.request(command, 0, data, 512) == p.EPERM
            assert client.why == "the export is read-only"


def test_no_chunk_is_empty_where_somebody_punches_holes(server):
    """Where data ends is asked after where it begins; foreign clients hang up at an empty chunk."""
    disk = os.open(server.directory / "disk.img", os.O_RDWR)
    ended = threading.Event()

    def punch() -> None:
        while not ended.is_set():
            os.pwrite(disk, b"x" * 16384, 0)
            fallocate(disk, FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE, 0, 16384)

    puncher = threading.Thread(target=punch)
    with RawClient(server) as client:
        assert client.option(p.OPT_STRUCTURED_REPLY)[-1][0] == p.REP_ACK
        client.go("disk")
        puncher.start()
        try:
            for _ in range(1000):
                for _ in range(32):
                    client.send(p.CMD_READ, 0, length=16384)
                done = 0
                while done < 32:
                    _, flags, _, _, length = p.CHUNK.unpack(client.take(p.CHUNK.size))
                    assert length > p.SIZE.size
                    client.take(length)
                    done += flags & p.CHUNK_DONE
        finally:
            ended.set()
            puncher.join()
            os.close(disk)


def test_an_extent_that_becomes_a_hole_meanwhile(tmp_path, monkeypatch):
    """No odd byte of it is told: clients want multiples of their blocks."""
    disk = FileBackend(tmp_path / "disk.img", SIZE)
    disk.write(0, memoryview(b"x" * SIZE), False)
    real = os.lseek
    monkeypatch.setattr(
        os, "lseek", lambda fd, at, how: at if how == os.SEEK_HOLE else real(fd, at, how)
    )
    assert disk.extents(4096, 8192) == [(8192, False)]
    disk.close()
