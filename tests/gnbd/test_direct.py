"""Exports past the page cache: alignment is told and demanded, everything else is the same."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from gnbd import protocol as p
from gnbd.server.backends_io import FileBackend
from lab.block_server import export_toml, running
from tests.gnbd.raw import RawClient
from tests.hostile.disks import loop_device

MIB = 1 << 20


def alignment_of(directory: Path) -> int:
    """What its file system wants. Raises ConfigError where there is no O_DIRECT."""
    backend = FileBackend(directory / "probe", MIB, direct=True)
    try:
        return backend.alignment
    finally:
        backend.close()


@pytest.fixture
def place(tmp_path):
    """A directory on a file system with O_DIRECT: that of the tests may be a tmpfs."""
    for parent in (tmp_path, "/var/tmp", Path(__file__).parent):
        with tempfile.TemporaryDirectory(dir=parent) as name:
            with contextlib.suppress(ConfigError):
                alignment_of(Path(name))
                yield Path(name)
                return
    pytest.fail("neither the directory of the tests nor /var/tmp knows O_DIRECT: set TMPDIR")


@pytest.fixture
def server(place):
    exports = export_toml("disk", place / "disk.img", size="64M") + "direct = true\n"
    exports += export_toml("cached", place / "cached.img", size="64M", filters='"volatile"')
    exports += "direct = true\n"
    with running(place, exports, joined=False) as server:
        yield server


@pytest.mark.parametrize("export", ["disk", "cached"])
def test_foreign_clients_respect_the_alignment(server, place, tmp_path, export):
    """nbdinfo sees it, nbdcopy and qemu-io work with it, also through a filter."""
    least = alignment_of(place)
    uri = f"{server.uri}/{export}"
    info = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, text=True, timeout=60)
    assert json.loads(info.stdout)["exports"][0]["block_size_minimum"] == least
    source = tmp_path / "source"
    source.write_bytes(os.urandom(16 * MIB))
    for command in (
        ["nbdcopy", "--flush", str(source), uri],
        ["nbdcopy", uri, str(tmp_path / "back")],
        ["qemu-io", "-f", "raw", "-c", "write -P 4 20M 12M", "-c", "read -P 4 20M 12M",
         "-c", "write -P 5 40000k 700", "-c", "read -P 5 40000k 700", uri],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert "failed" not in done.stdout
    assert (tmp_path / "back").read_bytes()[: 16 * MIB] == source.read_bytes()


def test_what_is_not_aligned_is_refused(server):
    """EINVAL for each command, and no byte is touched; many aligned ones in one stream are not."""
    with RawClient(server, "disk") as client:
        assert client.request(p.CMD_WRITE, 1, bytes(512)) == p.EINVAL
        assert client.request(p.CMD_WRITE, 0, bytes(511)) == p.EINVAL
        for command in (p.CMD_READ, p.CMD_TRIM, p.CMD_WRITE_ZEROES, p.CMD_CACHE):
            assert client.request(command, 0, length=100) == p.EINVAL
        stream, cookies = b"", range(100, 140)
        for number in cookies:
            head = p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.CMD_WRITE, number, number * 4096, 4096)
            stream += head + bytes([number]) * 4096
        client.sock.sendall(stream)
        assert [client.reply() for _ in cookies] == [(n, 0) for n in cookies]
        for number in cookies:
            assert client.read(number * 4096, 4096) == bytes([number]) * 4096


def test_a_loop_device(place):
    """A block device, past the cache: what was written is in its file."""
    image = place / "image"
    image.write_bytes(bytes(8 * MIB))
    with loop_device(image) as loop:
        exports = f'[[exports]]\nname = "loop"\npath = "{loop}"\ndirect = true\n'
        with running(place, exports, joined=False) as server, RawClient(server) as client:
            client.go("loop")
            assert client.request(p.CMD_WRITE, MIB, b"l" * 4096, flags=p.CMD_FLAG_FUA) == 0
            assert client.request(p.CMD_WRITE_ZEROES, MIB + 4096, length=4096) == 0
            assert client.read(MIB, 4096) == b"l" * 4096
            assert client.request(p.CMD_TRIM, 0, length=MIB) == 0
            assert server.stop() == 0
        assert image.read_bytes()[MIB : MIB + 4096] == b"l" * 4096
