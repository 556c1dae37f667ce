"""Exports with an integrity area, as clients and administrators see them."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import threading
from contextlib import contextmanager

import pytest

from cluster.errors import StackError
from fencing.reservations import Reservations
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.exports import Export, ServerConfig
from gnbd.server.damages_io import Damages
from gnbd.server.export_io import ExportRuntime
from gnbd.server.integrity_io import area_path
from gnbd.server.protection_io import convert
from gnbd.server.service_io import Service
from lab.block_server import GnbdServer, export_toml, reserve_port, running, wait_for
from native.integrity import Area
from tests.gnbd.raw import RawClient
from tests.hostile.disks import loop_device

MIB = 1 << 20
SIZE = 24 * MIB + 1536
ON = 'integrity = "crc32c"\n'


def protected(tmp_path, more: str = "", filters: str = "") -> str:
    return export_toml("disk", tmp_path / "disk.img", size=str(SIZE), filters=filters) + ON + more


@pytest.fixture(params=["", '"stats"', "direct"])
def server(tmp_path, request):
    """Through C, through Python, past the page cache."""
    if request.param == "direct":
        exports = protected(tmp_path, "direct = true\n")
    else:
        exports = protected(tmp_path, filters=request.param)
    with running(tmp_path, exports, joined=False) as server:
        yield server


def said(server: GnbdServer, *arguments: str):
    done = server.ctl("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def damage(server: GnbdServer, offset: int, data: bytes = b"?") -> None:
    """Behind the server's back."""
    with open(server.directory / "disk.img", "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def test_damage_is_eio_with_the_address(server):
    """For the block alone, until it is written anew; counted and logged."""
    with RawClient(server) as client:
        assert client.option(p.OPT_STRUCTURED_REPLY)[-1][0] == p.REP_ACK
        client.go("disk")
        data = random.Random(1).randbytes(2 * MIB)
        assert client.request(p.CMD_WRITE, 0, data) == 0
        assert client.request(p.CMD_FLUSH) == 0
        damage(server, MIB + 512)
        for flags in (0, p.CMD_FLAG_DF):
            assert client.request(p.CMD_READ, 0, length=2 * MIB, flags=flags) == p.EIO
            assert client.why == f"checksum mismatch in the block at {MIB}"
        durable = p.CMD_FLAG_FUA  # part of a bad block; nobody is cut off for that
        assert client.request(p.CMD_WRITE, MIB, b"x" * 512, flags=durable) == p.EIO
        assert client.request(p.CMD_TRIM, MIB, length=512) == p.EIO
        assert f"{MIB}" in client.why
        assert client.request(p.CMD_WRITE, MIB, b"n" * 4096, flags=durable) == 0
    with RawClient(server, "disk") as client:
        assert client.read(MIB + 512, 512) == b"n" * 512
    wait_for(lambda: f"offset={MIB}" in server.log.read_text(), "it is logged")
    assert "export='disk'" in server.log.read_text()
    assert said(server, "exports")[0]["integrity"]["mismatches"] >= 4
    assert said(server, "stats")[0]["counters"]["checksum_mismatches"] >= 4


def test_foreign_clients_find_it(server, tmp_path):
    """nbdcopy and qemu-io fail instead of giving bad bytes; they agree with the disk before."""
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(8 * MIB) + bytes(8 * MIB + 1536))
    uri = f"{server.uri}/disk"

    def run(*command: str):
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run("nbdcopy", "--flush", str(source), uri).returncode == 0
    assert run("nbdcopy", uri, str(tmp_path / "back")).returncode == 0
    back = (tmp_path / "back").read_bytes()
    assert back == source.read_bytes().ljust(SIZE, b"\0")
    damage(server, 5 * MIB + 1)
    damage(server, 20 * MIB, b"in a hole")
    assert run("nbdcopy", uri, str(tmp_path / "back")).returncode != 0
    for place in ("5M", "20M"):
        done = run("qemu-io", "-f", "raw", "-c", f"read {place} 64k", uri)
        assert "Input/output error" in done.stdout + done.stderr


def test_data_that_became_a_hole_is_found_by_a_copy(tmp_path):
    """BLOCK_STATUS does not call it a hole, so that it is read."""
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 4 * MIB, b"x" * MIB) == 0
        os.truncate(tmp_path / "disk.img", 0)
        os.truncate(tmp_path / "disk.img", SIZE)
        command = ["nbdcopy", f"{server.uri}/disk", "null:"]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode != 0


def test_metrics_count_mismatches(tmp_path):
    import urllib.request

    with (
        reserve_port() as reserved,
        running(
            tmp_path,
            protected(tmp_path),
            joined=False,
            head=f'metrics = "127.0.0.1:{(port := reserved.getsockname()[1])}"\n',
        ) as server,
    ):
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x" * 4096) == 0
            damage(server, 0)
            assert client.request(p.CMD_READ, 0, length=1) == p.EIO
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
    assert 'gnbd_checksum_mismatches_total{export="disk"} 1.0' in text
    assert 'gnbd_integrity_regions{export="disk",state="flux"} 1.0' in text


class Load:
    """Clients that write over each other all the time, and read: no reader may be refused."""

    def __init__(self, server: GnbdServer, seed: int, clients: int = 4) -> None:
        self.server = server
        self.ended = threading.Event()
        self.refused: list[str] = []
        self.written = 0
        self.threads = [
            threading.Thread(target=self._run, args=(random.Random(seed + n),))
            for n in range(clients)
        ]
        for thread in self.threads:
            thread.start()

    def _run(self, chance: random.Random) -> None:
        try:
            with RawClient(self.server, "disk") as client:
                while not self.ended.is_set():
                    self._request(client, chance)
        except (EOFError, OSError):
            pass  # it was killed

    def _request(self, client: RawClient, chance: random.Random) -> None:
        step = 512 if "direct" in self.server.exports else 1
        offset = chance.choice([0, 4 * MIB, 8 * MIB]) + chance.randrange(60_000) // step * step
        length = max(chance.choice([100, 4096, 20_000]) // step * step, step)
        kind = chance.choice([p.CMD_WRITE] * 4 + [p.CMD_TRIM, p.CMD_WRITE_ZEROES, p.CMD_READ])
        flags = chance.choice([0, 0, 0, p.CMD_FLAG_FUA])
        if kind == p.CMD_READ:
            error = client.request(kind, offset, length=length)
            if not error:
                client.take(length)
        elif kind == p.CMD_WRITE:
            error = client.request(kind, offset, chance.randbytes(length), flags=flags)
            self.written += 1
        else:
            error = client.request(kind, offset, length=length, flags=flags)
        if error:
            self.refused.append(f"command {kind} at {offset}: error {error}")

    def wait(self, writes: int) -> None:
        target = self.written + writes
        wait_for(lambda: self.written >= target or bool(self.refused), "writes")

    def end(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join(60)
        assert not self.refused


@contextmanager
def load(server: GnbdServer, seed: int):
    clients = Load(server, seed)
    try:
        yield clients
    finally:
        clients.end()


def whole_disk(server: GnbdServer) -> None:
    """Every block can be read."""
    with RawClient(server, "disk") as client:
        for offset in range(0, SIZE, 8 * MIB):
            client.read(offset, min(8 * MIB, SIZE - offset))


@pytest.mark.parametrize("filters", ["", '"volatile"'])
def test_killed_under_load(tmp_path, filters):
    """kill -9 at random points, with the page cache or without: no block is refused afterwards."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with running(tmp_path, protected(tmp_path, filters=filters), joined=False) as server:
        for turn in range(6):
            with load(server, seed + 10 * turn) as clients:
                clients.wait(chance.randrange(1, 300))
                server.kill()
            server.start()
            whole_disk(server)
        assert server.stop() == 0
        server.start()
        assert said(server, "exports")[0]["integrity"]["unsettled_regions"] == 0
        whole_disk(server)
        damage(server, 4 * MIB + 4096)
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_READ, 4 * MIB, length=8192) == p.EIO


def test_regions_that_rest_become_clean(tmp_path):
    """By itself; what is damaged during a kill afterwards is found."""
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x" * 8192) == 0
        assert said(server, "exports")[0]["integrity"]["flux_regions"] == 1
        wait_for(lambda: said(server, "exports")[0]["integrity"]["flux_regions"] == 0, "it rests")
        server.kill()
        damage(server, 4096)
        server.start()
        with RawClient(server, "disk") as client:
            assert client.read(0, 4096) == b"x" * 4096
            assert client.request(p.CMD_READ, 4096, length=4096) == p.EIO


def test_it_grows_with_its_disk(tmp_path):
    """Under a client, and over a restart."""
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, SIZE - 100, b"e" * 100) == 0
            assert server.ctl("resize", "disk", "40M").returncode == 0
            assert client.request(p.CMD_WRITE, 40 * MIB - 10, b"f" * 10) == 0
            assert client.read(SIZE - 100, 200) == b"e" * 100 + bytes(100)
        wait_for(lambda: settled(server), "all sums are known")
        assert server.stop() == 0
        damage(server, 40 * MIB - 1)
        server.start()
        with RawClient(server, "disk") as client:
            assert client.read(SIZE - 100, 200) == b"e" * 100 + bytes(100)
            assert client.request(p.CMD_READ, 40 * MIB - 10, length=10) == p.EIO


def test_what_is_refused_at_the_start(tmp_path):
    """A disk that is gone, a damaged header; --check-config says it too, and makes nothing."""
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x") == 0
        assert server.stop() == 0
        area = area_path(server.state_dir, "disk")

        def refusal() -> str:
            command = server.command("--check-config")
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode
            return done.stderr

        (tmp_path / "disk.img").rename(tmp_path / "elsewhere")
        assert "is gone" in refusal()
        assert not (tmp_path / "disk.img").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "disk.img")
        good = area.read_bytes()
        area.write_bytes(b"?" * 8192 + good[8192:])
        assert "damaged" in refusal()
        area.write_bytes(b"?" * 4096 + good[4096:])  # one copy is enough
        server.start()
        with RawClient(server, "disk") as client:
            assert client.read(0, 1) == b"x"


def settled(server: GnbdServer) -> bool:
    (export,) = said(server, "exports")
    return bool(export["integrity"]) and export["integrity"]["unsettled_regions"] == 0


def test_a_disk_is_converted_under_load(tmp_path):
    """On and off and on again beside writers, and with a kill in the middle: nobody is refused, and
    afterwards damage anywhere is found."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    content = random.Random(seed).randbytes(SIZE)
    (tmp_path / "disk.img").write_bytes(content)
    exports = export_toml("disk", tmp_path / "disk.img", size=str(SIZE))
    with running(tmp_path, exports, joined=False) as server:
        with load(server, seed) as clients:
            for state in ("on", "off", "on"):
                assert server.ctl("integrity", "disk", state).returncode == 0
                clients.wait(50)
            assert "already" in server.ctl("integrity", "disk", "on").stdout
            server.kill()
        server.start()  # the file does not say so; it is remembered
        with load(server, seed + 100) as clients:
            clients.wait(20)
            wait_for(lambda: settled(server), "all sums are known")
        whole_disk(server)
        damage(server, 14 * MIB, bytes([content[14 * MIB] ^ 1]))
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_READ, 14 * MIB, length=1) == p.EIO
            assert server.ctl("integrity", "disk", "off").returncode == 0
            client.read(14 * MIB, 1)
        assert not area_path(server.state_dir, "disk").exists()


def test_a_conversion_waits_for_writes_that_know_nothing_of_it(tmp_path):
    """One ends while the gates are drained, without a sum: none has been computed before, and none
    is believed any more by who has begun under the old area."""
    (tmp_path / "disk.img").write_bytes(b"before" * (MIB // 6))
    config = Export("disk", str(tmp_path / "disk.img"))
    export = ExportRuntime(config, Reservations(), 0, tmp_path)

    class Busy(Service):
        """One write is under way."""

        def __init__(self) -> None:
            self.config = ServerConfig(str(tmp_path))
            self.lock = threading.RLock()
            self.damages = Damages()
            self.drained = 0
            self.before: Area | None = None

        def renew_gates(self, export: ExportRuntime) -> None:
            pass

        def wait_drained(self) -> None:
            area = export.disk.area
            if area is not None and export.keeper is not None:
                wait_for(lambda: not area.counters()["unsettled_regions"], "it began too early")
            os.pwrite(export.disk.fd, b"late"[self.drained :] * 1024, 4096)
            self.drained += 1
            if self.before is not None:
                self.before.read(export.disk.fd, 4096, memoryview(bytearray(10)))

        def flush(self, export: ExportRuntime, own: object = None) -> None:
            export.backend.flush()

    service = Busy()
    try:
        convert(service, export, True)
        area = export.disk.area
        assert area is not None
        wait_for(lambda: not area.counters()["unsettled_regions"], "all sums are known")
        data = bytearray(8192)
        export.backend.read_into(0, memoryview(data))
        assert data[4096:] == b"late" * 1024
        service.before = area
        convert(service, export, False)
        assert service.drained == 2
    finally:
        export.end()


def test_a_scrub_reads_the_disk_that_is_served(tmp_path):
    """Not what has its path by now."""
    path = tmp_path / "disk.img"
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x" * MIB) == 0
        path.rename(tmp_path / "moved.img")
        path.write_bytes(b"another" * (SIZE // 7))
        report = said(server, "scrub", "disk", "--wait", "--rate", "0")
        assert (report["state"], report["mismatches"]) == ("done", 0)


@pytest.fixture
def export(tmp_path):
    (tmp_path / "disk.img").write_bytes(b"before" * (MIB // 6))
    config = Export("disk", str(tmp_path / "disk.img"))
    export = ExportRuntime(config, Reservations(), 0, tmp_path)
    yield export
    export.end()


def test_a_conversion_goes_on_when_a_flush_fails(tmp_path, export):
    """That is told, and is no reason never to compute the sums, nor to keep an area open."""

    class Refusing(Service):
        def __init__(self) -> None:
            self.config = ServerConfig(str(tmp_path))
            self.lock = threading.RLock()
            self.damages = Damages()

        def renew_gates(self, export: ExportRuntime) -> None:
            pass

        def wait_drained(self) -> None:
            pass

        def flush(self, export: ExportRuntime, own: object = None) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        convert(Refusing(), export, True)
    area = export.disk.area
    assert area is not None
    wait_for(lambda: not area.counters()["unsettled_regions"], "all sums are known")
    with pytest.raises(OSError, match="Input/output"):
        convert(Refusing(), export, False)
    assert not area.raw


@pytest.mark.parametrize("what", ["integrity/disk.sums.new", "log"])
def test_a_disk_that_cannot_be_exported_is_let_go_of(tmp_path, what):
    """What kept it from being exported is repaired, and then nobody has it."""
    (tmp_path / what).mkdir(parents=True)  # where a file has to be
    config = Export(
        "disk", str(tmp_path / "disk.img"), "1M", integrity="crc32c",
        filters=[f"log:path={tmp_path}/log"],
    )  # fmt: skip
    with pytest.raises((StackError, OSError)):
        ExportRuntime(config, Reservations(), 0, tmp_path)
    (tmp_path / what).rmdir()
    ExportRuntime(config, Reservations(), 0, tmp_path).end()


def test_the_exports_file_decides(tmp_path):
    """By a reload; gnbdctl does not contradict it."""
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        refused = server.ctl("integrity", "disk", "off")
        assert (refused.returncode, "exports file says" in refused.stderr) == (2, True)
        server.exports = export_toml("disk", tmp_path / "disk.img", size=str(SIZE))
        server.exports += 'integrity = "none"\n'
        server.write_config()
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x") == 0
            assert server.ctl("reload").returncode == 0
            assert said(server, "exports")[0]["integrity"] == {}
            server.exports = protected(tmp_path)
            server.write_config()
            assert server.ctl("reload").returncode == 0
            wait_for(lambda: settled(server), "all sums are known")
            damage(server, 0)
            assert client.request(p.CMD_READ, 0, length=1) == p.EIO
        added = server.ctl("add", "two", str(tmp_path / "two.img"), "--size", "1M",
                           "--integrity", "crc32c")  # fmt: skip
        assert added.returncode == 0
        assert server.ctl("integrity", "two", "off").returncode == 0


def test_an_area_of_another_disk_does_not_count(tmp_path):
    """The same name, another path: nothing of the old one is believed."""
    with running(tmp_path, protected(tmp_path), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x" * 8192) == 0
        assert server.stop() == 0
        (tmp_path / "other.img").write_bytes(b"y" * SIZE)
        server.exports = export_toml("disk", tmp_path / "other.img", size=str(SIZE)) + ON
        server.start()
        whole_disk(server)
        wait_for(lambda: settled(server), "all sums are known")
        whole_disk(server)


def test_scrub_finds_what_nobody_reads(server):
    """With the addresses; beside writers, through a reload, within its rate; it can be stopped."""
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 16 * MIB, b"s" * 8 * MIB) == 0
        assert client.request(p.CMD_FLUSH) == 0
    assert said(server, "scrub", "disk", "status")["state"] == "never"
    with load(server, 1) as clients:
        report = said(server, "scrub", "disk", "--wait", "--rate", "0")
        assert (report["state"], report["mismatches"]) == ("done", 0)
        assert report["checked_bytes"] == report["size_bytes"] == SIZE
        clients.wait(10)
    damage(server, 17 * MIB)
    damage(server, 20 * MIB + 5000)
    done = server.ctl("scrub", "disk", "--wait", "--rate", "0")
    assert done.returncode == 11, done.stderr
    assert f"mismatch at {17 * MIB}\nmismatch at {20 * MIB + 4096}\n" in done.stdout
    assert said(server, "scrub", "disk", "--rate", "1M")["state"] == "running"
    assert server.ctl("scrub", "disk").returncode == 5
    assert server.ctl("reload").returncode == 0
    assert said(server, "scrub", "disk", "status")["state"] == "running"
    stopped = said(server, "scrub", "disk", "stop")
    assert stopped["state"] == "stopped"
    assert stopped["checked_bytes"] < SIZE


def test_members_of_the_cluster_are_told(tmp_path):
    """In the answers to their pings, each once: for the event stream."""
    exports = export_toml("disk", tmp_path / "disk.img", size=str(SIZE)) + ON
    with running(tmp_path, exports) as server, server.control() as control:
        assert control.ask(m.Ping(), m.Done).damaged == []
        damage(server, 3 * MIB)
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_READ, 3 * MIB, length=1) == p.EIO
            assert client.request(p.CMD_READ, 3 * MIB, length=1) == p.EIO
        found: list[tuple[str, int]] = []

        def told() -> bool:
            found.extend(control.ask(m.Ping(), m.Done).damaged)
            return bool(found)

        wait_for(told, "it is told")
        assert found == [("disk", 3 * MIB)]
        with server.control() as later:
            assert later.ask(m.Ping(), m.Done).damaged == []


def test_scrub_needs_sums(tmp_path):
    with running(tmp_path, export_toml("disk", tmp_path / "disk.img"), joined=False) as server:
        done = server.ctl("scrub", "disk")
        assert (done.returncode, "integrity disk on" in done.stderr) == (2, True)


@pytest.mark.parametrize("direct", ["false", "true"])
def test_a_block_device(tmp_path, direct):
    """Converted at the first start, over restarts; trims and zeroes; damage below it."""
    image = tmp_path / "image"
    image.write_bytes(b"was here" * (MIB // 2))
    with loop_device(image) as loop:
        exports = f'[[exports]]\nname = "disk"\npath = "{loop}"\ndirect = {direct}\n' + ON
        with running(tmp_path, exports, joined=False) as server:
            with RawClient(server, "disk") as client:
                wait_for(lambda: settled(server), "all sums are known")
                assert client.read(0, 8192) == b"was here" * 1024
                assert client.request(p.CMD_WRITE, MIB - 512, b"n" * 1024) == 0
                for kind, at in ((p.CMD_TRIM, 2 * MIB + 512), (p.CMD_WRITE_ZEROES, 3 * MIB)):
                    assert client.request(kind, at, length=9 * 512) == 0
            server.kill()
            server.start()
            with RawClient(server, "disk") as client:
                assert client.read(MIB - 1024, 2048) == b"was here" * 64 + b"n" * 1024 + (
                    b"was here" * 64
                )
                assert client.read(3 * MIB, 9 * 512) == bytes(9 * 512)
                client.read(0, 4 * MIB)
            wait_for(lambda: settled(server), "all sums are known")
            assert server.stop() == 0
            with open(loop, "r+b") as disk:
                disk.seek(2 * MIB)
                disk.write(b"?")
            server.start()
            with RawClient(server, "disk") as client:
                assert client.request(p.CMD_READ, 2 * MIB, length=512) == p.EIO
                assert client.read(2 * MIB - 4096, 4096) == b"was here" * 512
