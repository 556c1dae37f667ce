"""A gnbd-server of its own, without a cluster, from the administrator's side."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner

from cluster.errors import ConfigError, UsageError
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.control.blocking_io import open_blocking
from gnbd.control.cli import control_main
from gnbd.control.session import Peer
from gnbd.exports import Export, decode_exports
from gnbd.identity import LOCAL_IDENTITY
from gnbd.server.catalogue_io import Catalogue
from gnbd.server.reload import plan_reload
from gnbd.server.service_io import Service
from lab.block_server import GnbdServer, export_toml, member, reserve_port, running, wait_for
from tests.gnbd.raw import RawClient
from tests.gnbd.test_client_io import MEMBERS, eventually, opened

MIB = 1 << 20


@pytest.fixture
def server(tmp_path):
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    with running(tmp_path, exports, joined=False) as server:
        yield server


def said(server, *arguments: str):
    """What gnbdctl prints, as JSON."""
    done = server.ctl("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_gnbdctl_on_the_storage_host(server, tmp_path):
    """Without a cluster or a key: exports come, grow and go, under a client."""
    assert [e["name"] for e in said(server, "exports")] == ["disk"]
    assert server.ctl("add", "two", str(tmp_path / "two.img"), "--size", "2M").returncode == 0
    with RawClient(server, "two") as client:
        assert client.request(p.CMD_WRITE, 2 * MIB - 1, b"x") == 0
        (row,) = said(server, "connections")
        assert (row["export"], row["instance"], row["state"]) == ("two", "", "open")
        assert "two" in server.ctl("connections").stdout
        busy = server.ctl("remove", "two")
        assert (busy.returncode, "1 connections" in busy.stderr) == (5, True), busy.stderr
        assert server.ctl("resize", "two", "+1M").returncode == 0
        assert client.request(p.CMD_WRITE, 3 * MIB - 1, b"y") == 0
        assert client.request(p.CMD_WRITE, 3 * MIB, b"z") == p.ENOSPC
        assert server.ctl("resize", "two", "1M").returncode == 2
        assert server.ctl("remove", "two", "--force").returncode == 0
        with pytest.raises((EOFError, ConnectionError)):
            client.request(p.CMD_FLUSH)
    data = (tmp_path / "two.img").read_bytes()
    assert (len(data), data[2 * MIB - 1 : 2 * MIB], data[-1:]) == (3 * MIB, b"x", b"y")
    assert server.ctl("remove", "two").returncode == 7
    with RawClient(server) as client:
        assert client.option(p.OPT_GO, p.go_data("two"))[0][0] == p.REP_ERR_UNKNOWN
    same = server.ctl("add", "three", str(tmp_path / "disk.img"))
    assert (same.returncode, "same disk" in same.stderr) == (2, True), same.stderr


def test_gnbdctl_watches(server):
    """What is added each second; filters report too."""
    assert server.ctl("filter", "disk", "add", "stats").returncode == 0
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 0, b"x" * 512) == 0
        assert "write_count=1" in server.ctl("stats").stdout
    (row,) = said(server, "stats", "--watch", "--count", "1")
    assert (row["name"], row["writes"]) == ("disk", 0)
    assert said(server, "paths") == []


def test_the_local_socket_decides_nothing_for_the_cluster(tmp_path):
    """Root of a storage host looks and steers; views are for members."""
    exports = export_toml("disk", tmp_path / "disk.img", access="cluster", size="1M")
    with running(tmp_path, exports) as server:
        path = server.state_dir / "gnbd.sock"
        assert path.stat().st_mode & 0o777 == 0o600
        peer = Peer(0, LOCAL_IDENTITY.cluster_id_bytes)
        with open_blocking([str(path)], 0, LOCAL_IDENTITY.keys, peer) as control:
            with pytest.raises(UsageError, match="member"):
                control.ask(m.Install(1, [member()]), m.Done)
            assert control.ask(m.StatusRequest(), m.StatusReport).epoch == 0
        server.install(1, MEMBERS)

        async def body():
            async with opened(server, export="disk") as device:
                paths = said(server, "paths")
                assert [(row["path"], row["connections"]) for row in paths] == [(0, 1)]
                assert device.size_bytes == MIB

        trio.run(body)


def test_the_socket_may_be_named_from_where_one_stands(server, monkeypatch):
    monkeypatch.chdir(server.directory)
    for name in ("state/gnbd.sock", "./state/gnbd.sock"):
        done = CliRunner().invoke(control_main, ["-s", name, "--json", "exports"])
        assert [row["name"] for row in json.loads(done.stdout)] == ["disk"]


def test_our_clients_see_an_export_grow(tmp_path):
    """Within a ping, on the connections they have; a restart does not shrink it."""
    exports = export_toml("disk", tmp_path / "disk.img", access="cluster", size="1M")

    async def body(server):
        async with opened(server, export="disk") as device:
            assert server.ctl("resize", "disk", "4M").returncode == 0
            with trio.fail_after(60):
                await eventually(lambda: device.size_bytes == 4 * MIB)
            await device.write(3 * MIB, b"n" * 4096, fua=True)

    with running(tmp_path, exports) as server:
        server.install(1, MEMBERS)
        trio.run(body, server)
        server.kill()
        server.start()
        assert said(server, "exports")[0]["size_bytes"] == 4 * MIB
    assert (tmp_path / "disk.img").read_bytes()[3 * MIB :][:4096] == b"n" * 4096


def test_growth_is_used_only_when_it_is_durable(server, tmp_path):
    """What lies beyond the old size would be cut off by a restart."""
    obstacle = server.state_dir / "grown.json.new"
    obstacle.mkdir()
    with RawClient(server, "disk") as client:
        assert server.ctl("resize", "disk", "2M").returncode != 0
        assert said(server, "exports")[0]["size_bytes"] == MIB
        assert client.request(p.CMD_WRITE, MIB, b"x") == p.ENOSPC
        assert server.ctl("filter", "disk", "add", "stats").returncode == 0
        assert client.request(p.CMD_WRITE, MIB, b"x") == p.ENOSPC
        obstacle.rmdir()
        assert server.ctl("resize", "disk", "2M").returncode == 0
        assert client.request(p.CMD_WRITE, MIB, b"x") == 0


def test_an_export_grows_by_what_its_disk_can_address(tmp_path):
    """Else the next start would refuse the size."""
    text = f'state_dir = "{tmp_path}/state"\n' + export_toml("disk", tmp_path / "d", size="1M")
    service = Service(decode_exports(text, "file"), None)
    service.exports["disk"].backend.alignment = 4096
    with pytest.raises(UsageError, match="4096"):
        service.resize("disk", MIB + 512)
    service.resize("disk", MIB + 4096)
    assert service.exports["disk"].offer().size_bytes == MIB + 4096
    service.stop()


@pytest.mark.parametrize("what", ["resize", "add"])
def test_a_slow_disk_keeps_no_decision_waiting(tmp_path, monkeypatch, what):
    """While an export grows or is made, members are heard and fences go on: nobody takes the server
    for cut off."""
    text = f'state_dir = "{tmp_path}/state"\n' + export_toml("disk", tmp_path / "d", size="1M")
    service = Service(decode_exports(text, "file"), None)
    catalogue = Catalogue(service, tmp_path / "file")
    slow, go_on, real = threading.Event(), threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        slow.set()
        assert go_on.wait(60)
        real(descriptor)

    def change() -> None:
        if what == "resize":
            catalogue.resize("disk", 2 * MIB)
        else:
            catalogue.add(Export("other", str(tmp_path / "other"), "1M"))

    monkeypatch.setattr(os, "fsync", fsync)
    changing = threading.Thread(target=change)
    changing.start()
    try:
        assert slow.wait(60)
        assert service.lock.acquire(timeout=60)
        service.lock.release()
        assert service.exports["disk"].size_bytes == MIB
        assert "other" not in service.exports
    finally:
        go_on.set()
        changing.join()
    assert what == "add" or service.exports["disk"].offer().size_bytes == 2 * MIB
    assert what == "resize" or service.exports["other"].size_bytes == MIB
    service.stop()


def test_growing_into_a_longer_file_cuts_nothing_off(tmp_path):
    """The file is longer than its export: what lies behind stays."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"k" * (3 * MIB))
    with running(tmp_path, export_toml("disk", path, size="1M"), joined=False) as server:
        assert server.ctl("resize", "disk", "2M").returncode == 0
        assert said(server, "exports")[0]["size_bytes"] == 2 * MIB
    assert path.read_bytes() == b"k" * (3 * MIB)


def test_reload_keeps_connections(server, tmp_path):
    """SIGHUP: what has gone from the file goes, what is new comes, what stays is not disturbed."""
    server.exports += export_toml("old", tmp_path / "old.img", size="1M")
    server.write_config()
    assert "added old" in server.ctl("reload").stdout
    with RawClient(server, "disk") as client, RawClient(server, "old") as other:
        assert client.request(p.CMD_WRITE, 0, b"before") == 0
        server.exports = export_toml("disk", tmp_path / "disk.img", size="2M",
                                     filters='"stats"') + 'description = "new"\n'  # fmt: skip
        server.exports += export_toml("new", tmp_path / "new.img", size="1M")
        server.write_config()
        server.process.send_signal(signal.SIGHUP)
        filters = {"disk": ["stats"], "new": []}
        wait_for(lambda: {e["name"]: e["filters"] for e in said(server, "exports")} == filters,
                 "reload")  # fmt: skip
        assert client.read(0, 6) == b"before"
        assert client.request(p.CMD_WRITE, 2 * MIB - 1, b"x") == 0
        with pytest.raises((EOFError, ConnectionError)):
            other.request(p.CMD_FLUSH)
        server.exports = server.exports.replace("new.img", "other.img")
        server.write_config()
        refused = server.ctl("reload")
        assert (refused.returncode, "path of export 'new'" in refused.stderr) == (2, True)
        server.file.write_text("nonsense =")
        assert server.ctl("reload").returncode == 2
        assert {e["name"] for e in said(server, "exports")} == {"disk", "new"}
        assert client.read(0, 6) == b"before"


def test_a_stop_lets_a_reload_end(server, tmp_path):
    """The exports file is a pipe: the reload waits for it until the server no longer listens."""
    server.exports += export_toml("new", tmp_path / "new.img", size="1M")
    server.write_config()
    wanted = server.file.read_text()
    server.file.unlink()
    os.mkfifo(server.file)
    server.process.send_signal(signal.SIGHUP)
    with server.file.open("w") as pipe:  # the server reads
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: not listens(server), "it stops")
        pipe.write(wanted)
    assert server.process.wait(60) == 0
    assert (tmp_path / "new.img").exists()


def listens(server) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((server.addresses[0], server.port)) == 0


def test_a_reload_that_cannot_be_changes_nothing(server, tmp_path):
    """A new disk is somebody else's: what stood before it in the file does not come either; an
    export that takes over the disk of one that goes does."""
    taken = tmp_path / "taken.img"
    taken.write_bytes(bytes(MIB))
    before = server.exports
    new = export_toml("new", tmp_path / "new.img", size="1M")
    with taken.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        server.exports = new + export_toml("taken", taken, size="1M")
        server.write_config()
        assert server.ctl("reload").returncode == 5
        assert [e["name"] for e in said(server, "exports")] == ["disk"]
    server.exports = before.replace('"disk"', '"renamed"')
    server.write_config()
    assert server.ctl("reload").returncode == 0
    assert [e["name"] for e in said(server, "exports")] == ["renamed"]


def test_a_reload_after_exports_were_removed_by_hand(server, tmp_path):
    """They stay away until the file has no more of them; one made in their place stays."""
    server.exports += export_toml("two", tmp_path / "two.img", size="1M")
    server.write_config()
    assert server.ctl("reload").returncode == 0
    for name in ("disk", "two"):
        assert server.ctl("remove", name).returncode == 0
    assert server.ctl("add", "two", str(tmp_path / "other.img"), "--size", "1M").returncode == 0
    server.exports = export_toml("disk", tmp_path / "disk.img", size="2M")
    server.write_config()
    assert server.ctl("reload").returncode == 0
    assert [e["name"] for e in said(server, "exports")] == ["two"]
    server.exports = export_toml("new", tmp_path / "new.img", size="1M")
    server.write_config()
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: {e["name"] for e in said(server, "exports")} == {"two", "new"}, "reload")


def test_a_reload_that_fails_half_way_can_be_repeated(server, tmp_path):
    """What is done is done; the rest follows when it can."""
    log = tmp_path / "here" / "writes.log"
    log.parent.touch()
    new = export_toml("new", tmp_path / "new.img", size="1M")
    filters = f'"log:path={log}"'
    server.exports = new + export_toml("disk", tmp_path / "disk.img", size="1M", filters=filters)
    server.write_config()
    assert server.ctl("reload").returncode != 0
    assert {e["name"] for e in said(server, "exports")} == {"disk", "new"}
    log.parent.unlink()
    assert "changed disk" in server.ctl("reload").stdout
    assert said(server, "exports")[0]["filters"] == [f"log:path={log}"]
    assert server.ctl("reload").stdout == "nothing has changed\n"


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        ("", "port = 1", "port has changed"),
        ('[[exports]]\nname="a"\npath="/a"', '[[exports]]\nname="a"\npath="/b"', "path of export"),
        ('[[exports]]\nname="a"\npath="/a"\nsize="2M"',
         '[[exports]]\nname="a"\npath="/a"\nsize="1M"', "only grows"),
        ('[[exports]]\nname="a"\npath="/a"', '[[exports]]\nname="a"\npath="/a"\n'
         'filters=["volatile"]', "volatile"),
        ("", '[[exports]]\nname="hand"\npath="/a"', "made by gnbdctl"),
    ],
)  # fmt: skip
def test_what_a_reload_refuses(before, after, match):
    """With the reason, before anything changes."""
    old, new = (decode_exports(f'state_dir = "/s"\n{text}', "file") for text in (before, after))
    with pytest.raises(ConfigError, match=match):
        plan_reload(old, new, {"hand"})


def test_check_config(tmp_path):
    """Right or wrong, nothing is made."""
    server = GnbdServer(tmp_path, export_toml("disk", tmp_path / "disk.img"))
    server.write_config()
    done = subprocess.run(server.command("--check-config"), capture_output=True, text=True)
    assert (done.returncode, "1 exports" in done.stdout) == (0, True), done.stderr
    server.exports += 'connections_max = "many"\n'
    server.write_config()
    done = subprocess.run(server.command("--check-config"), capture_output=True, text=True)
    assert (done.returncode, "connections_max" in done.stderr) == (2, True), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["exports.toml"]


def test_a_stop_answers_what_was_received(tmp_path):
    """SIGTERM: what has arrived is executed and answered, then the end is in order."""
    exports = export_toml("disk", tmp_path / "disk.img", size="1M", filters='"delay:write_ms=20"')
    with running(tmp_path, exports, joined=False) as server, RawClient(server, "disk") as client:
        cookies = [client.send(p.CMD_WRITE, n * 512, bytes([n]) * 512) for n in range(20)]
        assert client.reply() == (cookies[0], 0)
        server.process.send_signal(signal.SIGTERM)
        assert [client.reply() for _ in cookies[1:]] == [(c, 0) for c in cookies[1:]]
        assert client.sock.recv(1) == b""
        assert server.process.wait(60) == 0
    assert (tmp_path / "disk.img").read_bytes()[19 * 512 : 20 * 512] == bytes([19]) * 512


def test_one_bad_disk_spoils_no_stop(tmp_path):
    """What cannot be flushed is told by the exit code; the other exports are flushed."""
    exports = export_toml("bad", tmp_path / "bad.img", size="1M",
                          filters='"error:operation=flush"')  # fmt: skip
    exports += export_toml("good", tmp_path / "good.img", size="1M", filters='"volatile"')
    with running(tmp_path, exports, joined=False) as server:
        with RawClient(server, "good") as client:
            assert client.request(p.CMD_WRITE, 0, b"x" * 512) == 0
            assert server.stop() == 1
        assert "cannot flush export 'bad'" in server.log.read_text()
    assert (tmp_path / "good.img").read_bytes()[:512] == b"x" * 512


def test_a_state_directory_may_be_far_away(tmp_path):
    """Its socket is reached, also by the next server, though its path is no address."""
    directory = tmp_path / ("d" * 200)
    directory.mkdir()
    exports = export_toml("disk", directory / "disk.img", size="1M")
    with running(directory, exports, joined=False) as server:
        assert [e["name"] for e in said(server, "exports")] == ["disk"]
        server.kill()
        server.start()
        assert [e["name"] for e in said(server, "exports")] == ["disk"]


def test_metrics(tmp_path):
    """A scrape shows exports, requests, connections and filters."""
    exports = export_toml("disk", tmp_path / "disk.img", size="1M", filters='"stats"')
    with (
        reserve_port() as reserved,
        running(
            tmp_path,
            exports,
            joined=False,
            head=f'metrics = "127.0.0.1:{(port := reserved.getsockname()[1])}"\n',
        ) as server,
    ):
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x" * 512) == 0
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
                text = answer.read().decode()
    for line in (
        'gnbd_requests_total{export="disk",kind="writes"} 1.0',
        'gnbd_bytes_total{direction="written",export="disk"} 512.0',
        'gnbd_connections{export="disk"} 1.0',
        'gnbd_export_size_bytes{export="disk"} 1.048576e+06',
        'gnbd_filter{export="disk",filter="stats",what="write_count"} 1.0',
        "gnbd_serving 0.0",
    ):
        assert line in text, line


def test_unix_sockets_and_ipv6(tmp_path):
    """Both beside TCP; a socket that a dead server left is taken over."""
    path = tmp_path / "nbd.sock"
    exports = export_toml("disk", tmp_path / "disk.img", size="1M")
    head = f'unix_sockets = ["{path}"]\nunix_mode = "0660"\n'
    with running(tmp_path, exports, ("127.0.0.1", "::1"), joined=False, head=head) as server:
        assert path.stat().st_mode & 0o777 == 0o660
        for uri in (f"nbd+unix:///disk?socket={path}", f"nbd://[::1]:{server.port}/disk"):
            done = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True)
            assert done.stdout.strip() == str(MIB), done.stderr
        server.kill()
        assert path.exists()
        server.start()
        assert server.stop() == 0
        assert not path.exists()


def test_socket_activation(tmp_path):
    """libnbd starts the server with a listening socket, as systemd does."""
    server = GnbdServer(tmp_path, export_toml("disk", tmp_path / "disk.img", size="1M"))
    server.write_config()
    done = subprocess.run(
        ["nbdinfo", "--json", "--list", "--", "[", *server.command(), "]"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (export,) = json.loads(done.stdout)["exports"]
    assert (export["export-name"], export["export-size"]) == ("disk", MIB)


def test_a_socket_of_systemd_outlives_the_server(tmp_path):
    """The server ends, its socket stays open: who connects meanwhile is served by the next one."""
    path = tmp_path / "nbd.sock"
    server = GnbdServer(tmp_path, export_toml("disk", tmp_path / "disk.img", size="1M"))
    server.write_config()
    start = 'fd=$1; shift; exec env LISTEN_PID=$$ LISTEN_FDS=1 "$@" 3<&$fd'
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(8)
        number = str(listener.fileno())
        command = ["bash", "-c", start, "-", number, *server.command()]
        for _ in range(2):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
                client.settimeout(60)
                client.connect(str(path))  # nobody accepts yet
                with subprocess.Popen(command, pass_fds=[listener.fileno()]) as process:
                    assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
                    process.terminate()
                    assert process.wait(60) == 0
            assert path.exists()


def test_the_service_manager_is_told(tmp_path):
    """READY, RELOADING with its time, READY, STOPPING."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        exports = export_toml("disk", tmp_path / "disk.img", size="1M")
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with running(tmp_path, exports, joined=False, environment=environment) as server:
            assert manager.recv(100) == b"READY=1"
            server.process.send_signal(signal.SIGHUP)
            assert manager.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
            assert manager.recv(100) == b"READY=1"
            server.process.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert server.process.wait(60) == 0


def test_an_export_has_a_limit_of_connections(tmp_path):
    """One too many is told why; others are not concerned; a place that is left is free again."""
    exports = export_toml("few", tmp_path / "few.img", size="1M") + "connections_max = 2\n"
    exports += export_toml("many", tmp_path / "many.img", size="1M")
    with running(tmp_path, exports, joined=False) as server:
        with RawClient(server, "few"):
            with RawClient(server, "few"), RawClient(server) as third, RawClient(server, "many"):
                ((kind, text),) = third.option(p.OPT_GO, p.go_data("few"))
                assert (kind, b"2 connections" in text) == (p.REP_ERR_POLICY, True)
            wait_for(lambda: len(said(server, "connections")) == 1, "two have gone")
            with RawClient(server, "few") as client:
                assert client.request(p.CMD_FLUSH) == 0


def test_memory_for_long_requests_is_shared(tmp_path):
    """One long write at a time fits: the second one waits until the first has been executed."""
    exports = export_toml("disk", tmp_path / "disk.img", size="128M")
    with running(tmp_path, exports, joined=False, head='memory_max = "64M"\n') as server:
        with RawClient(server, "disk") as first, RawClient(server, "disk") as second:
            size = 48 * MIB
            head = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_WRITE, 7, 0, size)
            first.sock.sendall(head + b"a" * (size - 1))
            later = subprocess.Popen(
                ["nbdcopy", "--request-size=33554432", "--requests=1", "--connections=1",
                 "--", "[", "nbdkit", "--exit-with-parent", "pattern", "32M", "]",
                 f"{server.uri}/disk"],
            )  # fmt: skip
            assert second.request(p.CMD_WRITE, 0, b"short") == 0  # short ones do not wait
            first.sock.sendall(b"a")
            assert first.reply() == (7, 0)
            assert later.wait(60) == 0
            assert second.read(MIB, 8) == MIB.to_bytes(8, "big")


def test_gnbdctl_without_a_server(tmp_path):
    """One sentence, the code for 'unreachable'."""
    program = "from gnbd.control.cli import control_main; control_main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "-s", str(Path(tmp_path) / "gnbd.sock"), "exports"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (6, 2), done.stderr
