"""COMPARE AND WRITE: all or nothing, alone on its export, never for who is barred."""

from __future__ import annotations

import struct
import threading

import pytest

from fencing.reservations import ServiceAction, Status
from gnbd import messages as m
from gnbd import protocol as p
from lab.block_server import export_toml, instance, member, running, wait_for
from tests.gnbd.raw import RawClient
from tests.gnbd.test_extended_headers import Extended

ME, OTHER = instance(1), instance(2)
BOTH = member(live=(1, 2), next_=3)
BLOCK = 4096
KIB_64 = 64 << 10
SIZE = 4 << 20


def login(server, who=ME, export="disk", *, structured=False, path=0, generation=1) -> RawClient:
    client = RawClient(server)
    assert client.login(who, export, path=path, generation=generation).status == m.LOGIN_OK
    if structured:
        assert client.option(p.OPT_STRUCTURED_REPLY)[-1][0] == p.REP_ACK
        client.structured = True
    client.go(export)
    return client


class ExtendedMember(Extended):
    """Logged in, with extended headers."""

    def __init__(self, server) -> None:
        RawClient.__init__(self, server)
        assert self.login(ME, "disk").status == m.LOGIN_OK
        assert self.option(p.OPT_EXTENDED_HEADERS)[-1][0] == p.REP_ACK
        self.go("disk")


def toml(directory, name="disk", filters="", more=""):
    return export_toml(name, directory / f"{name}.img", "cluster", "4M", filters) + more


@pytest.fixture
def server(tmp_path):
    exports = toml(tmp_path)
    exports += toml(tmp_path, "direct", more="direct = true\n")
    exports += toml(tmp_path, "sums", more='integrity = "crc32c"\n')
    exports += toml(tmp_path, "ro", more="read_only = true\n")
    (tmp_path / "ro.img").write_bytes(bytes(SIZE))
    exports += export_toml("plain", tmp_path / "plain.img", size="4M")
    with running(tmp_path, exports) as server:
        server.install(1, BOTH)
        yield server


@pytest.mark.parametrize("export", ["disk", "direct", "sums"])
@pytest.mark.parametrize("structured", [False, True])
def test_what_is_expected_is_replaced(server, export, structured):
    """All of it, or nothing and the place of the first byte that differs; other requests around it
    are answered in order."""
    with login(server, export=export, structured=structured) as client:
        old, new = bytes(range(256)) * 16, b"n" * BLOCK
        assert client.request(p.CMD_WRITE, BLOCK, old) == 0
        assert client.compare_and_write(BLOCK, old, new) == 0
        assert client.compare_and_write(BLOCK, new, old, p.CMD_FLAG_FUA) == 0
        for at in (0, 1, 511, BLOCK - 1):
            wrong = bytearray(old)
            wrong[at] ^= 0x80
            wrong[-1] ^= 1
            assert client.compare_and_write(BLOCK, bytes(wrong), new) == p.EMISCOMPARE
            assert client.offset == BLOCK + at
            if structured:
                assert client.why == f"the byte at {BLOCK + at} differs"
        assert client.compare_and_write(SIZE - KIB_64, bytes(KIB_64), b"e" * KIB_64) == 0
        assert client.request(p.CMD_FLUSH) == 0
    with server.control() as control:
        rows = control.ask(m.ExportsRequest(), m.ExportsReport).exports
    counters = next(row.counters for row in rows if row.name == export)
    assert (counters["writes"], counters["written_bytes"]) == (4, 3 * BLOCK + KIB_64)
    server.stop()
    data = (server.directory / f"{export}.img").read_bytes()[:SIZE]
    assert data == bytes(BLOCK) + old + bytes(SIZE - 2 * BLOCK - KIB_64) + b"e" * KIB_64


def test_extended_headers(server):
    """The length is that of the payload; a difference is an error chunk with an offset."""
    with ExtendedMember(server) as client:
        command = p.CMD_COMPARE_AND_WRITE
        assert client.ask(command, 512, data=bytes(512) + b"n" * 512) == [(0, b"")]
        ((kind, payload),) = client.ask(command, 512, data=b"nnx" + b"n" * 1021)
        error, length = struct.unpack_from(">IH", payload)
        assert (kind, error) == (p.CHUNK_ERROR_OFFSET, p.EMISCOMPARE)
        assert payload[6 : 6 + length] == b"the byte at 514 differs"
        assert p.SIZE.unpack(payload[6 + length :]) == (514,)


def test_mistakes(server):
    """Each has the error of a WRITE, with a reason; the payload is taken and the connection goes
    on."""
    with login(server, structured=True) as client:
        for offset, length, flags, error, why in [
            (0, 1023, 0, p.EINVAL, "twice"),
            (0, 2 * KIB_64 + 2, 0, p.EINVAL, "64 KiB"),
            (0, 6 << 20, 0, p.EINVAL, "64 KiB"),
            (0, 1024, p.CMD_FLAG_NO_HOLE, p.EINVAL, "flags"),
            (SIZE - 511, 1024, 0, p.ENOSPC, "end"),
            (1 << 63, 1024, 0, p.ENOSPC, "end"),
        ]:
            got = client.request(p.CMD_COMPARE_AND_WRITE, offset, bytes(length), flags=flags)
            assert got == error
            assert why in client.why
        assert client.compare_and_write(SIZE - 512, bytes(512), b"n" * 512) == 0
        assert client.compare_and_write(0, b"", b"") == 0
    with login(server, export="direct", structured=True) as client:
        assert client.compare_and_write(256, bytes(512), bytes(512)) == p.EINVAL
        assert client.compare_and_write(0, bytes(256), bytes(256)) == p.EINVAL
        assert "block size" in client.why
    with login(server, export="ro") as client:
        assert client.compare_and_write(0, bytes(512), bytes(512)) == p.EPERM


def test_only_after_login(server):
    """For others it is an unknown command, which has no data."""
    with RawClient(server, "plain") as client:
        assert client.request(p.CMD_COMPARE_AND_WRITE, 0, length=1024) == p.EINVAL
        assert client.read(0, 512) == bytes(512)


def counted(server, who, path, rounds, failures):
    """Add 1 to a counter of 64 KiB, so many times."""
    try:
        with login(server, who, path=path) as client:
            while rounds:
                old = client.read(BLOCK, KIB_64)
                assert old == old[:8] * (KIB_64 // 8), "torn"
                new = struct.pack(">Q", struct.unpack_from(">Q", old)[0] + 1) * (KIB_64 // 8)
                error = client.compare_and_write(BLOCK, old, new)
                assert error in (0, p.EMISCOMPARE)
                rounds -= not error
    except BaseException as error:  # to be seen by the test
        failures.append(error)
        raise


FILTERS = ["", '"delay:read_ms=1,write_ms=1"', '"volatile"']


@pytest.mark.parametrize("filters", FILTERS)
def test_no_update_is_lost_and_nobody_sees_half_of_one(tmp_path, filters):
    """Eight connections of two instances count together; ordinary reads are whole, and get their
    turn."""
    with running(tmp_path, toml(tmp_path, filters=filters)) as server:
        server.install(1, BOTH)
        failures = []
        rounds = 6 if "delay" in filters else 40
        threads = [
            threading.Thread(target=counted, args=(server, (ME, OTHER)[n % 2], n, rounds, failures))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        with login(server, generation=2) as client:
            assert struct.unpack(">Q", client.read(BLOCK, 8)) == (8 * rounds,)


@pytest.mark.parametrize("command", ["write", "zeroes", "trim"])
@pytest.mark.parametrize("filters", FILTERS[:2])
def test_against_other_changes(tmp_path, filters, command):
    """What was changed by an ordinary request is never compared before and overwritten after it:
    what its sender reads next comes from its own bytes."""
    with running(tmp_path, toml(tmp_path, filters=filters)) as server:
        server.install(1, BOTH)
        from_what, stop, failures = {}, threading.Event(), []

        def swapper(path):
            try:
                with login(server, OTHER, path=path) as client:
                    number = path
                    while not stop.is_set():
                        number += 16
                        old, new = client.read(0, BLOCK), struct.pack(">Q", number) * 512
                        from_what[new] = old
                        client.compare_and_write(0, old, new)
            except BaseException as error:
                failures.append(error)
                raise

        def change(client, number) -> bytes:
            if command == "write":
                mine = struct.pack(">Q", 1 << 40 | number) * 512
                assert client.request(p.CMD_WRITE, 0, mine) == 0
                return mine
            theirs_not = struct.pack(">Q", 1 << 41 | number) * 512
            assert client.request(p.CMD_WRITE, 0, theirs_not) == 0
            kind = p.CMD_TRIM if command == "trim" else p.CMD_WRITE_ZEROES
            assert client.request(kind, 0, length=BLOCK) == 0
            return bytes(BLOCK)

        threads = [threading.Thread(target=swapper, args=(path,)) for path in range(1, 4)]
        for thread in threads:
            thread.start()
        try:
            with login(server) as client:
                met = 0
                for number in range(60 if filters else 300):
                    before = len(from_what)
                    mine = change(client, number)
                    found = client.read(0, BLOCK)
                    met += found != mine
                    while found != mine:
                        assert found in from_what, "older than what was written"
                        found = from_what[found]
                    if number > 20 and not failures:
                        wait_for(lambda: len(from_what) > before or failures, "a swap")  # noqa: B023
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures


@pytest.mark.parametrize("how", ["install", "preempt"])
def test_a_barred_instance_never_executes_it(tmp_path, how):
    """Its turn comes after the bar, which does not wait for it."""
    with running(tmp_path, toml(tmp_path, filters='"delay:write_ms=3000"')) as server:
        server.install(1, BOTH)
        with login(server, OTHER) as other, login(server) as mine:
            other.send(p.CMD_WRITE, 0, b"o" * BLOCK)
            wait_for(lambda: busy(server), "the other's write executes")
            mine.send(p.CMD_COMPARE_AND_WRITE, 2 * BLOCK, bytes(BLOCK) + b"m" * BLOCK)
            if how == "install":
                server.install(2, member(live=(2,), next_=3))
                with pytest.raises((EOFError, ConnectionError)):
                    mine.reply()
            else:
                with server.control() as control:
                    found = control.ask(m.ReserveIn("disk"), m.ReserveReport).registrations
                    keys = {row.nexus: row.key for row in found}
                    action = int(ServiceAction.PREEMPT_AND_ABORT)
                    request = m.ReserveOut("disk", OTHER, action, keys[OTHER], keys[ME], 7)
                    assert control.ask(request, m.ReserveResult).status == Status.GOOD
                assert mine.reply()[1] == p.EPERM
            assert other.reply()[1] == 0
            assert other.read(2 * BLOCK, BLOCK) == bytes(BLOCK)


def busy(server) -> bool:
    """A thread of the server waits in the delay of a write."""
    data = (server.directory / "disk.img").stat()
    tasks = (server.proc / "task").iterdir()
    return data.st_size == SIZE and any(
        "nanosleep" in (task / "wchan").read_text() for task in tasks
    )


def test_durable_as_a_write(tmp_path):
    """With FUA, or after a FLUSH, it outlives the server and its cache; else it need not."""
    with running(tmp_path, toml(tmp_path, filters='"volatile"')) as server:
        server.install(1, BOTH)
        with login(server) as client:
            assert client.compare_and_write(0, bytes(512), b"a" * 512) == 0
            assert client.request(p.CMD_FLUSH) == 0
            assert client.compare_and_write(512, bytes(512), b"b" * 512, p.CMD_FLAG_FUA) == 0
            assert client.compare_and_write(1024, bytes(512), b"c" * 512) == 0
            assert client.read(1024, 512) == b"c" * 512
        server.kill()
        server.start()
        server.install(1, BOTH)
        with login(server) as client:
            assert client.read(0, 1536) == b"a" * 512 + b"b" * 512 + bytes(512)


def test_errors_of_the_disk(tmp_path):
    """One in the comparison, or in a write that need not be durable, is told, and nothing else
    happens; a durable write that fails is told, and ends the connection, as WRITE does."""
    filters = '"error:operation=write,count=2","error:operation=read,count=1"'
    with running(tmp_path, toml(tmp_path, filters=filters)) as server:
        server.install(1, BOTH)
        with login(server) as client:
            assert client.compare_and_write(0, bytes(512), b"a" * 512) == p.EIO
            assert client.compare_and_write(0, bytes(512), b"a" * 512) == p.EIO
            assert client.read(0, 512) == bytes(512)
            flags = p.CMD_FLAG_FUA
            assert client.compare_and_write(0, b"x" * 512, b"a" * 512, flags) == p.EMISCOMPARE
            assert client.compare_and_write(0, bytes(512), b"a" * 512, flags) == p.EIO
            with pytest.raises((EOFError, ConnectionError)):
                client.reply()
        with login(server, generation=2) as client:
            assert client.compare_and_write(0, bytes(512), b"a" * 512) == 0


def test_an_answer_that_is_kept_back_keeps_nobody_out(tmp_path):
    """The export is free when the deed is done, whether it is answered or not."""
    with running(tmp_path, toml(tmp_path, filters='"drop:operation=write,count=1"')) as server:
        server.install(1, BOTH)
        with login(server) as client, login(server, OTHER) as other:
            client.send(p.CMD_COMPARE_AND_WRITE, 0, bytes(512) + b"a" * 512)
            wait_for(lambda: other.read(0, 512) == b"a" * 512, "it is done")
            assert other.request(p.CMD_WRITE, 0, b"b" * 512) == 0
