"""Filters on a running server, as clients see them."""

from __future__ import annotations

import signal

import pytest

from cluster.errors import ConfigError, UsageError
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.exports import FILTER_KINDS, FilterSpec, checked_filter, parse_filter
from gnbd.server.filters.bucket import Bucket
from gnbd.server.filters.chooser_io import Chooser
from lab.block_server import export_toml, instance, member, running, wait_for
from tests.gnbd.raw import RawClient, logged_in

SECOND_NS = 1_000_000_000


@pytest.fixture
def server(tmp_path):
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    exports += export_toml("shared", tmp_path / "shared.img", access="cluster", size="1M")
    with running(tmp_path, exports) as server:
        yield server


def change(server, action: str, text: str, export: str = "disk") -> None:
    spec = parse_filter(text, whole=action == "add")
    with server.control() as control:
        control.ask(m.FilterCommand(export, action, spec.kind, spec.parameters), m.Done)


def test_every_kind_comes_changes_and_goes_under_a_client(server, tmp_path):
    """One connection works through all of it."""
    specs = [
        "delay:write_ms=1", "error:count=0", "drop:count=0", "torn:count=0", "stats",
        "rate:requests_s=1000000", f"log:path={tmp_path}/log",
    ]  # fmt: skip
    assert {s.partition(":")[0] for s in specs} == set(FILTER_KINDS) - {"volatile"}
    with RawClient(server, "disk") as client:
        for number, text in enumerate(specs):
            change(server, "add", text)
            assert client.request(p.CMD_WRITE, 0, bytes([number]) * 512) == 0
            change(server, "set", text)
            assert client.read(0, 512) == bytes([number]) * 512
        assert server.report("disk").filters == specs
        for text in specs:
            change(server, "remove", text.partition(":")[0])
            assert client.request(p.CMD_FLUSH) == 0
        assert server.report("disk").filters == []
    with pytest.raises(UsageError):
        change(server, "remove", "stats")


def test_a_dropped_reply_is_of_an_executed_request(server):
    """The write is done, its answer never comes, the next one's does."""
    change(server, "add", "drop:operation=write,skip=1,count=1")
    with RawClient(server, "disk") as client:
        cookies = [client.send(p.CMD_WRITE, n * 512, bytes([n + 1]) * 512) for n in range(3)]
        assert [client.reply() for _ in range(2)] == [(cookies[0], 0), (cookies[2], 0)]
        assert client.read(512, 512) == b"\2" * 512
    change(server, "set", "drop:operation=read,count=1")
    with RawClient(server, "disk") as client:
        client.send(p.CMD_READ, 0, length=512)
        assert client.request(p.CMD_FLUSH) == 0


@pytest.mark.parametrize("text", ["torn:skip=1,bytes=700", "torn:skip=1"])
def test_a_torn_write_is_the_last_one(server, tmp_path, text):
    """The server dies with a prefix applied; it serves again and shows just that."""
    change(server, "add", text)
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 0, b"a" * 2048) == 0
        client.send(p.CMD_WRITE, 0, b"b" * 2048)
        with pytest.raises((EOFError, ConnectionError)):
            client.reply()
    assert server.process.wait(60) == -signal.SIGKILL
    server.start()
    kept = 700 if "bytes" in text else 1024
    with RawClient(server, "disk") as client:
        assert client.read(0, 2048) == b"b" * kept + b"a" * (2048 - kept)


def test_errors_by_class_and_once(server):
    """One trim fails, other requests and later trims do not."""
    change(server, "add", "error:operation=trim,count=1,errno=28")
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 0, b"x") == 0
        assert client.request(p.CMD_TRIM, 0, length=512) == p.ENOSPC
        assert client.request(p.CMD_TRIM, 0, length=512) == 0
        change(server, "set", "error:operation=read,offset=4096,length=4096")
        assert client.request(p.CMD_READ, 8191, length=2) == p.EIO
        assert client.request(p.CMD_CACHE, 4096, length=1) == p.EIO
        assert client.read(8192, 1) == b"\0"


def test_stats_count_what_is_below_them(server):
    """Numbers per kind of request; `set` begins anew."""
    change(server, "add", "stats")
    with RawClient(server, "disk") as client:
        for _ in range(3):
            assert client.request(p.CMD_WRITE, 0, b"x" * 1024) == 0
        client.read(0, 512)
        change(server, "add", "error:operation=flush")  # above: they never come down
        assert client.request(p.CMD_FLUSH) == p.EIO
    with RawClient(server, "disk"):
        seen = server.report("disk").filter_reports["stats"]
        assert (seen["write_count"], seen["write_bytes"]) == (3, 3072)
        assert (seen["read_count"], seen["read_bytes"]) == (1, 512)
        assert seen["write_p50_us"] <= seen["write_p99_us"]
        assert "flush_count" not in seen
        change(server, "set", "stats")
        assert server.report("disk").filter_reports == {}


def test_a_limited_client_rests_and_holds_up_no_bar(server):
    """A write over the limit is answered; the next one waits, and is never executed when its sender
    is barred meanwhile, for which nobody waits."""
    server.install(1, member(live=(1,), next_=2), member(node=2, live=(1,), next_=2))
    change(server, "add", "rate:write_bytes_s=1", "shared")
    with logged_in(server, instance(), "shared") as victim:
        assert victim.request(p.CMD_WRITE, 0, b"a" * 4096) == 0
        victim.send(p.CMD_WRITE, 0, b"b" * 4096)
        server.install(2, member(node=2, live=(1,), next_=2), node=2)
        with pytest.raises((EOFError, ConnectionError)):
            victim.reply()
    with logged_in(server, instance(node=2), "shared") as other:
        assert other.read(0, 4096) == b"a" * 4096
    wait_for(lambda: server.report("shared").connections == 0, "the connections end")


def test_a_limited_client_does_not_delay_a_stop(server):
    """What it has sent is executed and answered at once when the server is asked to end."""
    change(server, "add", "rate:write_bytes_s=1")
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 0, b"a" * 4096) == 0
        cookie = client.send(p.CMD_WRITE, 0, b"b" * 4096)
        server.process.send_signal(signal.SIGTERM)
        assert client.reply() == (cookie, 0)
        assert server.process.wait(60) == 0
    assert (server.directory / "disk.img").read_bytes()[:4096] == b"b" * 4096


def test_the_bucket_pays_its_debts():
    """Whatever is taken, over a long time no more than the rate passes."""
    bucket, now_ns = Bucket(1000, 100, 0), 0
    taken = 0
    for amount in (50, 500, 1, 3000, 10) * 20:
        bucket.take(now_ns, amount)
        taken += amount
        now_ns += bucket.owed_ns(now_ns)
        assert bucket.owed_ns(now_ns) == 0
    assert taken - 100 <= now_ns * 1000 / SECOND_NS + 1
    bucket = Bucket(1000, 100, 0)
    bucket.take(3600 * SECOND_NS, 200)  # an idle hour saves no more than the burst
    assert bucket.owed_ns(3600 * SECOND_NS) == SECOND_NS // 10


def test_chances_are_repeatable():
    """The same seed takes the same requests, about as many as asked."""
    spec = FilterSpec("error", {"per_mille": 300, "seed": 5})

    def taken():
        chooser = Chooser(spec)
        return [chooser.takes("write", 0, 1) for _ in range(1000)]

    assert taken() == taken()
    assert 200 < sum(taken()) < 400


@pytest.mark.parametrize(
    "text", ["error:operation=flash", "torn:bytes=-1", "rate:per_s=3", "stats:x=1", "drop:count=-2"]
)
def test_bad_parameters_are_refused(text):
    """By name, before anything changes."""
    kind, _, rest = text.partition(":")
    with pytest.raises(ConfigError, match=kind):
        checked_filter(kind, dict([rest.split("=")]))
