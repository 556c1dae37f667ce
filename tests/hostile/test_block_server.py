"""What the admin of a block server on its own does wrong: in the exports file, with gnbdctl, with
the machine below. One sentence, a hint, the documented code; and nothing has changed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cluster.errors import BusyError
from gnbd import protocol as p
from gnbd.server.catalogue_io import reload_or_complain
from gnbd.server.integrity_io import area_path
from lab.block_server import export_toml, reserve_port, running, wait_for
from tests.gnbd.certificates import Authority
from tests.gnbd.raw import RawClient
from tests.hostile.test_bad_input import (
    NOBODY,
    SERVE,
    changed,
    exports,
    lay_out,
    refused,
)
from tests.hostile.tools import one_sentence, run

CHECK = "gnbd-server --check-config {dir}/exports.toml"
DISK = '"{dir}/disk0"'
TLS = '[tls]\ncertificate = "{dir}/cert.pem"\nkey = "{dir}/key.pem"\n'


def below(more: str) -> dict[str, str | bytes]:
    """With more lines above the exports."""
    return exports("heartbeat_port = 0", f"heartbeat_port = 0\n{more}")


ROWS = [
    ("a path with a NUL", exports(DISK, '"{dir}/a\\u0000b"'), 2, "\\[0\\].path.*absolute"),
    ("a path from where one stands", exports(DISK, '"disk0"'), 2, "\\[0\\].path.*'disk0'.*hint"),
    ("a state_dir from where one stands", exports('"{dir}/gnbd"', '"gnbd"'), 2,
     "state_dir: 'gnbd' is not an absolute path"),
    ("a state_dir with a NUL", exports('"{dir}/gnbd"', '"/a\\u0000b"'), 2, "state_dir"),
    ("a Unix socket with a NUL", below('unix_sockets = ["/a\\u0000b"]'), 2, "Unix socket"),
    ("a file on the way", exports(DISK, '"{dir}/exports.toml/x"'), 2, "Not a directory.*hint"),
    ("metrics without an address", below('metrics = "9810"'), 2, "'9810' is not ADDRESS:PORT"),
    ("connections without end", exports(more=f"connections_max = {10**20}"), 2, "connections_max"),
    ("a size with a hint", exports("1M", "4X"), 2, "'4X' is not a size.*hint: sizes look"),
    ("16 EiB", exports("1M", "16E"), 2, "'16E' is too large"),
    ("16 EiB - 1", exports("1M", str(2**64 - 1)), 2, "too large"),
    ("memory with a hint", below('memory_max = "1X"'), 2, "memory_max.*hint: sizes look"),
    ("a log without a name", exports(more='filters = ["log:path="]'), 2, "path=FILE"),
    ("a log from where one stands", exports(more='filters = ["log:path=x"]'), 2, "absolute"),
    ("an error that is none", exports(more='filters = ["error:errno=0"]'), 2, "errno"),
    ("more than always", exports(more='filters = ["error:per_mille=1001"]'), 2, "per_mille"),
    ("a delay without end", exports(more=f'filters = ["delay:read_ms={10**15}"]'), 2, "read_ms"),
    ("a short disk", {**exports('size = "1M"', ""), "disk0": bytes(100)}, 10, "has 100 bytes only"),
    ("no certificate", below(TLS), 2, "tls: cannot read '.*/cert.pem': No such file"),
    ("a certificate with a NUL", below(changed(TLS, "/cert", "/\\u0000c")), 2, "tls: cannot read"),
    ("a certificate that is none", {**below(TLS), "cert.pem": "x", "key.pem": "x"}, 2,
     "cert.pem and .*key.pem are no pair"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path):
    return tmp_path


@pytest.mark.parametrize(
    ("files", "code", "words"), [pytest.param(*row[1:], id=row[0]) for row in ROWS]
)
def test_typed_wrong(place, files, code, words):
    """The table above; --check-config says what a start would say."""
    lay_out(place, files)
    refused(place, CHECK, code, words)


@pytest.mark.parametrize("what", ["another key", "an authority that is none", "a password"])
def test_certificates_that_do_not_fit(place, what):
    """The file is named; and nobody is asked for a password: there is nobody at a daemon."""
    authority = Authority(place / "ca")
    one, other = authority.issue("one", "server"), authority.issue("other", "server")
    shutil.copy(one / "server-cert.pem", place / "cert.pem")
    shutil.copy((other if "key" in what else one) / "server-key.pem", place / "key.pem")
    believed, words = 'authority = "{dir}/disk0"\n', "disk0 has no certificates"
    if what == "a password":
        words = "the key has a password.*hint: openssl"
        command = ["openssl", "pkey", "-in", one / "server-key.pem", "-aes256"]
        command += ["-passout", "pass:secret", "-out", place / "key.pem"]
        subprocess.run(command, check=True, capture_output=True)
    elif what == "another key":
        believed, words = "", "no pair of certificate and key"
    lay_out(place, {**below(TLS + believed), "disk0": bytes(1 << 20)})
    refused(place, CHECK, 2, words)


def test_the_port_of_the_metrics_is_in_use(place):
    """Its holder is named, and no disk is made."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        lay_out(place, below(f'metrics = "127.0.0.1:{port}"'))
        who = f"127.0.0.1:{port}.*in use by \\S+ \\(pid {os.getpid()}\\)"
        refused(place, SERVE, 5, who)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_unix_socket_whose_place_is_taken(place, kind):
    """What is there is left there; nobody is said to serve it."""
    (place / "taken").mkdir() if kind == "directory" else (place / "taken").write_text("precious")
    lay_out(place, below('unix_sockets = ["{dir}/taken"]'))
    refused(place, SERVE, 2, "taken: it is there, and no socket")


def test_a_state_directory_of_root():
    """Somebody else is told to be root."""
    with tempfile.TemporaryDirectory() as name:  # pytest's directories are root's
        place = Path(name)
        os.chmod(place, 0o755)
        lay_out(place, {**exports(), "gnbd/server.toml": "x"})
        os.chmod(place / "gnbd", 0o700)
        os.seteuid(NOBODY)
        try:
            refused_by_nobody(place)
        finally:
            os.seteuid(0)


def refused_by_nobody(place) -> None:
    """`snapshot` cannot look into a directory of root's: there is nothing to compare."""
    ended = run("gnbd-server", "--check-config", str(place / "exports.toml"))
    assert ended.code == 9, ended
    assert "server.toml: Permission denied" in one_sentence("gnbd-server", ended)


def test_a_socket_of_root():
    """Nobody says that no server runs."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as sock:
        os.chmod(name, 0o755)
        sock.bind(f"{name}/gnbd.sock")
        os.chmod(f"{name}/gnbd.sock", 0o600)
        sock.listen()
        os.seteuid(NOBODY)
        try:
            ended = run("gnbdctl", "-s", f"{name}/gnbd.sock", "exports")
        finally:
            os.seteuid(0)
    assert (ended.code, "root" in one_sentence("gnbdctl", ended)) == (9, True), ended
    assert "gnbd.sock: Permission denied" in ended.err


def test_a_disk_that_was_served_is_not_made_anew(tmp_path):
    """Its file system may not be mounted: clients would read zeroes where they wrote."""
    disk = tmp_path / "here" / "disk.img"
    with running(tmp_path, export_toml("disk", disk, size="1M"), joined=False) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"precious") == 0
        assert server.stop() == 0
        disk.parent.rename(tmp_path / "elsewhere")
        for arguments in ([], ["--check-config"]):
            command = server.command(*arguments)
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 7, done.stderr
            words = "served before, and .*disk.img is not there.*mounted.*truncate -s 1048576"
            assert re.search(words, done.stderr, re.DOTALL), done.stderr
            assert not disk.parent.exists()
        (tmp_path / "elsewhere").rename(disk.parent)
        server.start()
        with RawClient(server, "disk") as client:
            assert client.read(0, 8) == b"precious"
        assert server.stop() == 0
        disk.unlink()
        disk.touch()  # what the hint says, or nothing of it: an admin wants it empty
        server.start()
        with RawClient(server, "disk") as client:
            assert client.read(0, 8) == bytes(8)


@pytest.fixture
def server(tmp_path):
    made = export_toml("disk", tmp_path / "disk.img", size="1M")
    (tmp_path / "old.img").write_bytes(bytes(4096))
    made += f'[[exports]]\nname = "old"\npath = "{tmp_path}/old.img"\nread_only = true\n'
    made += f'filters = ["log:path={tmp_path}/writes.log"]\n'
    with running(tmp_path, made, joined=False) as server:
        yield server


ASKED = [
    ("resize nope 2M", 7, "there is no export 'nope'.*hint: see: gnbdctl exports"),
    ("filter nope add stats", 7, "no export"),
    ("integrity nope on", 7, "no export"),
    ("scrub nope", 7, "no export"),
    ("keys nope", 7, "no export"),
    ("remove nope", 7, "no export"),
    ("resize old 1M", 10, "old.img is read-only and has 4096 bytes"),
    ("resize disk 4096P", 1, "cannot make .*disk.img 4611686018427387904 bytes long: File too"),
    ("filter disk add log:path={dir}", 1, "^gnbdctl: {dir}: Is a directory"),
    ("filter disk add log:path=writes.log", 2, "absolute"),
    ("filter old set log", 2, "keeps its path"),
    ("filter old set log:path={dir}/other.log", 2, "keeps its path.*hint: remove"),
    ("add '' {dir}/more.img --size 1M", 2, "export '': .*name"),
    (f"add {'x' * 256} {{dir}}/more.img --size 1M", 2, "length <= 255.*name"),
    ("add more {dir}/more.img --size 4X", 2, "'4X'.*hint: sizes look"),
]


def test_asked_wrong(server, tmp_path):
    """The codes of docs/exit-codes.md come from the server too; what is served stays."""
    before = server.ctl("--json", "exports").stdout
    for typed, code, words in ASKED:
        done = server.ctl(*shlex.split(typed.replace("{dir}", str(tmp_path))))
        assert done.returncode == code, (typed, done.stderr)
        wanted = words.replace("{dir}", str(tmp_path))
        assert re.search(wanted, done.stderr, re.DOTALL), (typed, done.stderr)
        assert "Errno" not in done.stderr
    assert server.ctl("--json", "exports").stdout == before


def test_a_damaged_integrity_area_is_called_damaged(server, tmp_path):
    """Also when gnbdctl adds its disk."""
    assert server.ctl("add", "two", str(tmp_path / "two.img"), "--size", "1M").returncode == 0
    assert server.ctl("integrity", "two", "on").returncode == 0
    assert server.ctl("remove", "two").returncode == 0
    area_path(server.state_dir, "two").write_bytes(b"?" * 8192)
    done = server.ctl("add", "two", str(tmp_path / "two.img"))
    assert (done.returncode, "two.sums" in done.stderr) == (11, True), done.stderr


def test_the_same_filter_twice_does_not_spoil_the_metrics(tmp_path):
    """Prometheus refuses a scrape with two samples of one name."""
    reserved = reserve_port()
    port = reserved.getsockname()[1]
    made = export_toml("disk", tmp_path / "disk.img", size="1M", filters='"stats", "stats"')
    head = f'metrics = "127.0.0.1:{port}"\n'
    with reserved, running(tmp_path, made, joined=False, head=head) as server:
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"x") == 0
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
    names = [line.rpartition(" ")[0] for line in lines if line[0] != "#"]
    assert 'gnbd_filter{export="disk",filter="stats",what="write_count"}' in names
    assert len(set(names)) == len(names)


def test_a_client_whose_certificate_has_expired_is_in_the_log(tmp_path):
    """The client hears next to nothing; the admin has to."""
    authority = Authority(tmp_path / "ca")
    own, late = authority.issue("s1", "server"), authority.issue("n1", "client", expired=True)
    head = (
        f'tls = {{certificate = "{own}/server-cert.pem", key = "{own}/server-key.pem", '
        f'authority = "{authority.certificate}"}}\n'
    )
    made = export_toml("disk", tmp_path / "disk.img", size="1M")
    with running(tmp_path, made, joined=False, head=head) as server:
        uri = f"nbds://127.0.0.1:{server.port}/disk?tls-certificates={late}"
        assert subprocess.run(["nbdinfo", uri], capture_output=True, timeout=60).returncode
        wait_for(lambda: "no TLS" in server.log.read_text(), "the reason")
        assert re.search("no TLS.*expired", server.log.read_text(), re.IGNORECASE)


def test_what_the_log_says_of_a_reload_has_its_hint():
    """Of every refusal, not only of a wrong file."""

    class Refusing:
        def reload(self) -> str:
            raise BusyError("somebody has it", hint="stop that")

    with capture_logs() as logs:
        reload_or_complain(Refusing())  # type: ignore[arg-type]
    assert (logs[0]["reason"], logs[0]["hint"]) == ("somebody has it", "stop that")
