"""Other people's clients, unmodified, against plain exports."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from gnbd import protocol as p
from lab.block_server import export_toml, running, wait_for
from tests.gnbd.raw import RawClient

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("foreign")
    exports = export_toml("plain", directory / "plain.img", size="128M")
    exports += 'description = "a disk for everybody"\n'
    exports += export_toml("cached", directory / "cached.img", size="128M", filters='"volatile"')
    exports += export_toml("secret", directory / "secret.img", access="cluster")
    head = f'unix_sockets = ["{directory}/nbd.sock"]\n'
    with running(directory, exports, head=head) as server:
        yield server


def run(*command: str, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


def test_nbdinfo_lists_what_it_may_see(server):
    """LIST and INFO: sizes, flags and block sizes; cluster exports are not shown."""
    done = run("nbdinfo", "--json", "--list", server.uri)
    assert done.returncode == 0, done.stderr
    found = {e["export-name"]: e for e in json.loads(done.stdout)["exports"]}
    assert set(found) == {"plain", "cached"}
    plain = found["plain"]
    assert plain["export-size"] == 128 * MIB
    for flag in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert plain[flag] is True
    assert plain["is_read_only"] is False
    assert plain["block_size_minimum"] == 1
    assert plain["block_size_maximum"] >= 48 * MIB


def test_qemu_nbd_lists_the_same(server):
    """Another implementation of the negotiation: sizes, descriptions, contexts."""
    port = ("-b", server.addresses[0], "-p", str(server.port))
    done = run("qemu-nbd", "--list", *port)
    assert done.returncode == 0, done.stderr
    assert "exports available: 2" in done.stdout
    for text in ("a disk for everybody", "base:allocation", "x-cfs:reservation", "fast-zero"):
        assert text in done.stdout


def test_nbdinfo_maps_holes_and_reservations(server):
    """Structured replies and metadata contexts as libnbd asks for them."""
    write = ("qemu-io", "-f", "raw", "-c", "write 1M 64k")
    assert run(*write, f"{server.uri}/plain").returncode == 0
    done = run("nbdinfo", "--map", "--json", f"{server.uri}/plain")
    assert done.returncode == 0, done.stderr
    found = [(row["offset"], row["length"], row["type"]) for row in json.loads(done.stdout)]
    assert (1 << 20, 65536, 0) in found
    assert sum(length for _, length, _ in found) == 128 * MIB
    state = run("nbdinfo", "--map=x-cfs:reservation", "--json", f"{server.uri}/plain")
    assert [row["type"] for row in json.loads(state.stdout)] == [2]
    can = json.loads(run("nbdinfo", "--json", f"{server.uri}/plain").stdout)["exports"][0]
    for flag in ("can_cache", "can_df", "can_fast_zero"):
        assert can[flag] is True


def test_cluster_export_is_refused_politely(server):
    """INFO and GO of a cluster export fail with a message, the connection lives on."""
    done = run("nbdinfo", f"{server.uri}/secret")
    assert done.returncode != 0
    assert run("nbdinfo", f"{server.uri}/nothing").returncode != 0
    assert run("nbdinfo", "--size", f"{server.uri}/plain").stdout.strip() == str(128 * MIB)


@pytest.mark.parametrize("export", ["plain", "cached"])
def test_nbdcopy_round_trip(server, tmp_path, export):
    """Several connections, many requests in flight, both directions, with a flush."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(32 * MIB))
    many = ("nbdcopy", "--connections=4", "--requests=64", "--flush")
    done = run(*many, str(source), f"{server.uri}/{export}")
    assert done.returncode == 0, done.stderr
    back = tmp_path / "back"
    done = run(*many, f"{server.uri}/{export}", str(back))
    assert done.returncode == 0, done.stderr
    assert back.read_bytes()[: 32 * MIB] == source.read_bytes()


@pytest.mark.parametrize("export", ["plain", "cached"])
def test_qemu_io(server, export):
    """Patterns, FUA, zeroes, discard, an unaligned and a 48 MiB request."""
    commands = [
        "write -P 7 0 64k", "read -P 7 0 64k", "write -f -P 8 4k 8k", "read -P 8 4k 8k",
        "read -P 7 12k 52k", "write -z 16k 16k", "read -P 0 16k 16k", "flush", "discard 0 64k",
        "write -P 5 1M 48M", "read -P 5 1M 48M", "write -P 3 100M 1k", "read -P 3 100M 1k",
        "write -z -u 100M 64k", "read -P 0 100M 64k",
    ]  # fmt: skip
    arguments = [part for c in commands for part in ("-c", c)]
    done = run("qemu-io", "-f", "raw", *arguments, f"{server.uri}/{export}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    assert "verification" not in done.stdout


@pytest.mark.parametrize("export", ["plain", "cached"])
def test_fio_verifies(server, tmp_path, export):
    """fio's nbd engine: random writes of mixed sizes, verified by checksum."""
    done = run(
        "fio", "--name=v", "--ioengine=nbd", f"--uri={server.uri}/{export}", "--rw=randwrite",
        "--bsrange=4k-256k", "--iodepth=64", "--size=32M", "--verify=crc32c", "--do_verify=1",
        "--fsync=32", "--output-format=json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    assert job["error"] == 0


def test_qemu_img_as_a_target(server, tmp_path):
    """qemu-img compares an image with the export after a conversion."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MIB) + bytes(3 * MIB) + os.urandom(MIB))
    done = run(
        "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), f"{server.uri}/cached"
    )
    assert done.returncode == 0, done.stderr
    done = run("nbdcopy", f"{server.uri}/cached", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes()[: 5 * MIB] == image.read_bytes()


@pytest.mark.parametrize("flag", ["flush", "fua", "trim", "zero", "fast-zero", "df", "cache",
                                  "multi-conn", "connect", "structured-reply"])  # fmt: skip
def test_nbdinfo_asks_what_can_be(server, flag):
    """Exit status 0: yes."""
    assert run("nbdinfo", "--can", flag, f"{server.uri}/plain").returncode == 0
    assert run("nbdinfo", "--is", "read-only", f"{server.uri}/plain").returncode == 2


def test_a_qcow2_image_lives_on_an_export(server, tmp_path):
    """qemu-img makes, fills, checks and compares an image format on the export itself."""
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 * MIB) + bytes(6 * MIB) + os.urandom(MIB))
    target = f"{server.uri}/plain"
    for command in (
        ("create", "-f", "qcow2", target, "100M"),
        ("check", "-f", "qcow2", target),
        ("convert", "-f", "raw", "-O", "qcow2", str(source), target),
        ("check", "-f", "qcow2", target),
        ("compare", "-f", "raw", "-F", "qcow2", str(source), target),
    ):
        done = run("qemu-img", *command)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run("qemu-io", "-f", "qcow2", "-c", "write -P 9 3M 64k", target)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run("qemu-img", "compare", "-F", "qcow2", str(source), target).returncode == 1


def test_ext4_through_nbdfuse(server, tmp_path):
    """A file system made on the export as a file of nbdfuse, and found whole by another client."""
    mount = tmp_path / "disk"
    mount.touch()
    with subprocess.Popen(["nbdfuse", str(mount), f"{server.uri}/plain"]) as fuse:
        try:
            wait_for(lambda: mount.stat().st_size == 128 * MIB, "nbdfuse is there")
            (tmp_path / "tree").mkdir()
            (tmp_path / "tree" / "file").write_bytes(os.urandom(3 * MIB))
            done = run("mkfs.ext4", "-q", "-F", "-d", str(tmp_path / "tree"), str(mount))
            assert done.returncode == 0, done.stderr
        finally:
            run("fusermount3", "-u", str(mount))
            assert fuse.wait(60) == 0
    done = run("nbdcopy", f"{server.uri}/plain", str(tmp_path / "image"))
    assert done.returncode == 0, done.stderr
    done = run("e2fsck", "-f", "-n", str(tmp_path / "image"))
    assert done.returncode == 0, done.stdout
    done = run("debugfs", "-R", f"dump /file {tmp_path}/file", str(tmp_path / "image"))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "tree" / "file").read_bytes()


def test_a_killed_client_leaves_whole_writes_and_nothing_else(server, tmp_path):
    """kill -9 of a copy at random points, beside a client that verifies: what it had sent is there
    in whole requests, its connections go, the other one notices nothing."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    piece, count = 256 << 10, 256
    source = tmp_path / "source"
    source.write_bytes(b"".join(bytes([1 + n % 255]) * piece for n in range(count)))
    verifies = subprocess.Popen(
        ["fio", "--name=v", "--ioengine=nbd", f"--uri={server.uri}/cached", "--rw=randwrite",
         "--bs=4k", "--iodepth=16", "--size=16M", "--verify=crc32c", "--do_verify=1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for _ in range(4):
            with RawClient(server, "plain") as client:
                assert client.request(p.CMD_TRIM, 0, length=piece * count) == 0
            goal = chance.randrange(piece * count)
            copy = ("nbdcopy", "--connections=4", "--requests=8", f"--request-size={piece}")
            before = server.report("plain").counters["written_bytes"]
            with subprocess.Popen([*copy, str(source), f"{server.uri}/plain"]) as client:
                wait_for(
                    lambda g=before + goal: server.report("plain").counters["written_bytes"] >= g,
                    "it has written so much",
                )
                client.kill()
            wait_for(lambda: not server.report("plain").connections, "its connections go")
            assert run("nbdcopy", f"{server.uri}/plain", str(tmp_path / "back")).returncode == 0
            back = (tmp_path / "back").read_bytes()
            for n in range(count):
                found = set(back[n * piece : (n + 1) * piece])
                assert found in ({0}, {1 + n % 255}), n
        output, _ = verifies.communicate(timeout=60)
        assert verifies.returncode == 0, output
    finally:
        verifies.kill()
        verifies.wait()


def test_a_clean_stop_flushes_everything(tmp_path):
    """SIGTERM: what was only in the volatile cache is in the file afterwards."""
    path = tmp_path / "disk.img"
    exports = export_toml("disk", path, filters='"volatile"')
    with running(tmp_path, exports, joined=False) as server:
        # qemu-io would flush at close: a raw socket leaves the write unflushed
        with RawClient(server, "disk") as client:
            assert client.request(1, 4096, b"x" * 4096) == 0
            assert path.read_bytes()[4096:8192] == bytes(4096)
            assert server.stop() == 0
    assert path.read_bytes()[4096:8192] == b"x" * 4096


def test_libnbd_makes_every_call(server):
    """libnbd's Python module: negotiation, each command and flag, errors, asynchronous calls."""
    script = Path(__file__).with_name("libnbd_calls.py")
    done = run("/usr/bin/python3", str(script), server.uri, str(server.directory / "nbd.sock"))
    assert done.returncode == 0, done.stdout + done.stderr
